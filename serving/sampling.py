"""What `generate` does with the logits of one sequence, step by step.

`generate` itself prepares it, from the same arguments and with the same checks, and hands over where its loop would
begin: so every processor of logits and every criterion to stop is transformers' own.
"""

import copy
from typing import Any, NamedTuple

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)

from .. import TTTE2EForCausalLM


class _Prepared(NamedTuple):
    """What `generate` has made of its arguments."""

    ids: torch.Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    do_sample: bool


def _hand_over(
    model: TTTE2EForCausalLM,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **rest: Any,
) -> _Prepared:
    """In place of `generate`'s loop."""
    return _Prepared(input_ids, logits_processor, stopping_criteria, bool(generation_config.do_sample))


class Sampling:
    """Chooses the tokens of one sequence.

    Args:
        ids: what is read before, int64 [1, tokens].
        config: how to write.
        seed: of the draws, which are those of `generate` after `torch.manual_seed(seed)`; None draws by chance.

    Attributes:
        ids: what was read, and what was chosen behind it.

    Raises:
        ValueError: `generate` refuses the arguments.
    """

    def __init__(
        self,
        model: TTTE2EForCausalLM,
        ids: torch.Tensor,
        config: GenerationConfig,
        tokenizer: PreTrainedTokenizerBase,
        seed: int | None = None,
    ):
        criteria = StoppingCriteriaList()
        if config.stop_strings:  # `generate` loses the tokenizer where another loop takes over
            criteria.append(StopStringCriteria(tokenizer, config.stop_strings))
            config = copy.copy(config)
            config.stop_strings = None
        made: Any = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            stopping_criteria=criteria,
            logits_processor=LogitsProcessorList([SomethingLeft()]),
            custom_generate=_hand_over,
        )
        self.ids, self.processors, self.criteria, self.do_sample = made
        self.generator = torch.Generator(ids.device)
        self.generator.seed() if seed is None else self.generator.manual_seed(seed)

    def choose(self, logits: torch.Tensor) -> tuple[int, bool]:
        """The next token, which is put behind `ids`.

        Args:
            logits: [1, vocabulary].

        Returns:
            The token, and whether it is the last one.

        Raises:
            ValueError: every token is forbidden.
        """
        scores = self.processors(self.ids, logits.float())
        if self.do_sample:
            token = torch.multinomial(scores.softmax(dim=-1), 1, generator=self.generator)
        else:
            token = scores.argmax(dim=-1, keepdim=True)
        self.ids = torch.cat([self.ids, token], dim=1)
        return int(token), bool(self.criteria(self.ids, scores).all())


class SomethingLeft(LogitsProcessor):
    """Refuses to go on where every token is forbidden: drawing one would fail, on CUDA together with the process."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not scores.isfinite().any(dim=-1).all():
            raise ValueError(
                "every token is forbidden (by suppress_tokens, begin_suppress_tokens, no_repeat_ngram_size or "
                "min_new_tokens); allow some"
            )
        return scores
