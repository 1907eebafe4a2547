"""Writing on from a learned context."""

from collections.abc import Callable, Sequence

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from .. import TTTE2ECache, TTTE2EForCausalLM
from ..generation_ttt_e2e import LEARN_FROM


def writing_arguments(temperature: float, top_p: float, learn_from: str = "context") -> dict:
    """How to write, as arguments of [`write`].

    Args:
        temperature: 0 always takes the likeliest token.
        top_p: sample among the likeliest tokens that share this probability.
        learn_from: as in `generate`.

    Raises:
        ValueError: a negative temperature, `top_p` outside (0, 1], an unknown `learn_from`.
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: must be 0 (always the likeliest token) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be above 0 and at most 1")
    if learn_from not in LEARN_FROM:
        raise ValueError(f"learn_from={learn_from!r}: must be one of {', '.join(LEARN_FROM)}")
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    return {"learn_from": learn_from, **sampling}


@torch.no_grad()
def write(
    model: TTTE2EForCausalLM,
    ids: Sequence[int],
    cache: TTTE2ECache,
    *,
    learn_from: str = "context",
    stop: Callable[[], bool] | None = None,
    **arguments,
) -> list[int]:
    """Read ids and write on.

    Args:
        ids: what follows after all that the cache has read; at least one.
        cache: of one sequence; changed in place: it has read `ids` and everything that was written afterwards.
        learn_from: as in `generate`.
        stop: asked after every token whether to stop there.
        arguments: of `generate`, `max_new_tokens` among them.

    Returns:
        The ids that were written, an end token included. Padding is never written.
    """
    read = cache.get_seq_length()
    if stop is not None:
        arguments["stopping_criteria"] = StoppingCriteriaList([StopWhen(stop)])
    new = torch.tensor([list(ids)], dtype=torch.long, device=model.device)
    sequences = model.generate(
        new,
        attention_mask=new.new_ones(1, read + new.shape[1]),
        cache=cache,
        learn_from=learn_from,
        suppress_tokens=_padding(model),
        **arguments,
    )
    spans = {"context": None, "prompt": (read, read + new.shape[1]), "none": (0, 0)}
    # generate has not read its last token.
    model(sequences[:, -1:], cache=cache, use_cache=True, logits_to_keep=1, learning_span=spans[learn_from])
    return sequences[0, new.shape[1] :].tolist()


class StopWhen(StoppingCriteria):
    """Ends a text after the token at which `stop()` is true."""

    def __init__(self, stop: Callable[[], bool]):
        self.stop = stop

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        ends = torch.full((len(input_ids),), self.stop(), dtype=torch.bool, device=input_ids.device)
        return ends  # type: ignore[return-value]  # any tensor of bool is one


def _padding(model: TTTE2EForCausalLM) -> list[int] | None:
    """The padding token, where it is not an end token as well: what is behind it would not be learned."""
    padding, ends = model.generation_config.pad_token_id, model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return None if padding is None or padding in ends else [padding]
