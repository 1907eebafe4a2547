"""`generate` for a model that learns while it reads and writes.

Decoding itself is transformers': this adds the learned context as the cache, the choice of what to learn from, rows
that stop learning when they are finished, and clear refusals of what cannot work.
"""

from contextvars import ContextVar
from dataclasses import dataclass

import torch

from .base_causal_lm import BaseGenerationMixin, prompt_learning
from .cache_ttt_e2e import TTTE2ECache
from .checks import accept_earlier_cache_names, asked_or, check_cache, check_last_is_token, check_tensor
from .sharding import check_quantisation, check_units

LEARN_FROM = ("context", "prompt", "none")
ASSISTED_BY = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


@dataclass(frozen=True)
class WrittenPositions:
    """Where a call's own output begins, and which ids end a row.

    Attributes:
        first_id: index of the first generated id in the running sequences.
        positions_before: positions that were read before the running sequences' first id.
        end_ids: end-of-sequence ids, and the padding that stands for them.
        quiet_ids: those of them that do not end the generation of a single row.
    """

    first_id: int
    positions_before: int
    end_ids: tuple[int, ...]
    quiet_ids: tuple[int, ...]

    def after_end(self, sequences: torch.Tensor) -> torch.Tensor | None:
        """[rows, generated] bool: ids that were written behind a row's generated end; None when there is none."""
        ends = self.end_ids if sequences.shape[0] > 1 else self.quiet_ids
        if not ends:
            return None
        written = sequences[:, self.first_id :]
        ended = torch.isin(written, torch.tensor(ends, device=written.device, dtype=written.dtype)).long()
        after_end = (ended.cumsum(dim=1) - ended) > 0
        return after_end if bool(after_end.any()) else None

    def mask(self, sequences: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """`attention_mask` without what stands behind a generated end."""
        after_end = self.after_end(sequences)
        if after_end is None:
            return attention_mask
        if attention_mask is None:
            attention_mask = sequences.new_ones(sequences.shape[0], self.positions_before + sequences.shape[1])
        written = slice(attention_mask.shape[1] - after_end.shape[1], None)
        attention_mask = attention_mask.clone()
        attention_mask[:, written] = attention_mask[:, written].masked_fill(after_end, 0)
        return attention_mask


# Of the call of `generate` that this thread is in: the steps of decoding get no arguments but those of the model.
_WRITTEN: ContextVar[WrittenPositions | None] = ContextVar("positions that generate() has written", default=None)


class TTTE2EGenerationMixin(BaseGenerationMixin):
    """Generation with a learned context; see [`~TTTE2EGenerationMixin.generate`]."""

    own_cache_class = TTTE2ECache

    @accept_earlier_cache_names
    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, *args, learn_from: str = "context", **kwargs):
        """transformers' `generate`, with one argument more.

        Args:
            learn_from: `"context"` learns from everything that is read and written (the paper's method), `"prompt"`
                only from the prompt of this call, `"none"` from nothing (a learned context is used as it is).
            test_time_training: `False` runs the plain model.
            cache: a [`TTTE2ECache`] to go on from, with either the whole sequence as `input_ids`, or only
                its new part together with an `attention_mask` over all positions.

        Under PEFT's prompt tuning and prefix tuning learning has to be off, and every step reads the whole text (no
        cache).

        Raises:
            ValueError, TypeError, NotImplementedError: for what this model cannot do, before any work.
        """
        if learn_from not in LEARN_FROM:
            raise ValueError(f"`learn_from` must be one of {list(LEARN_FROM)}, got {learn_from!r}.")
        if learn_from != "context" and kwargs.get("learning_span") is not None:
            raise ValueError(
                f"`learning_span={kwargs['learning_span']}` and `learn_from={learn_from!r}` both say what is learned: "
                "give one of them."
            )
        check_learning(self, learn_from != "none", kwargs.get("test_time_training"))
        config, _ = self._prepare_generation_config(generation_config, **kwargs)
        cache = kwargs.get("cache")
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        embeddings = kwargs.get("inputs_embeds")
        mask = kwargs.get("attention_mask")
        check_prompt(ids, embeddings, mask)
        check_cache(cache, TTTE2ECache, None, self.config)
        check_supported(config, cache, kwargs.get("assistant_model"))
        check_prompt_embeddings(ids, embeddings, config.prefill_chunk_size)
        check_left_padding(ids, mask, config.pad_token_id, _end_ids(config))
        read = 0 if cache is None else cache.get_seq_length()
        if read:
            check_continuation(cache, ids, embeddings, mask)
        given = embeddings if embeddings is not None else ids
        length = 1 if given is None else given.shape[1]
        new_only = read > 0 and mask is not None and mask.shape[1] == read + length
        end = read + length if new_only else length
        if learn_from != "context":
            kwargs["learning_span"] = (read, end) if learn_from == "prompt" else (0, 0)
        number_of_ids = ids.shape[1] if ids is not None else (1 if embeddings is None else 0)
        ends = _all_end_ids(config)
        quiet = tuple(set(ends) - set(_end_ids(config)))
        written = WrittenPositions(number_of_ids, end - number_of_ids, ends, quiet)
        before = _WRITTEN.set(written)
        try:
            output = super().generate(inputs, generation_config, *args, **kwargs)
        finally:
            _WRITTEN.reset(before)
        if config.num_beams == 1 and isinstance(getattr(output, "cache", None), TTTE2ECache):
            _note_finished(output, written, config)
        return output

    def generate_batch(self, *args, **kwargs):
        """Continuous batching shares one cache among all sequences; here each has weights of its own."""
        raise NotImplementedError(
            "Continuous batching is not possible: every sequence has its own fast weights. Use generate() with a "
            "left-padded batch."
        )

    @property
    def init_continuous_batching(self):
        raise AttributeError("no continuous batching: every sequence has its own fast weights")

    def prepare_inputs_for_generation(self, input_ids, *args, attention_mask=None, inputs_embeds=None, **kwargs):
        written = _WRITTEN.get()
        if written is not None:
            attention_mask = written.mask(input_ids, attention_mask)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, *args, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        prompt = model_inputs.get("inputs_embeds")
        if prompt is not None and input_ids.shape[1] >= prompt.shape[1]:
            # The ids beside the embeddings are the targets of the inner loop.
            model_inputs["input_ids"] = input_ids[:, -prompt.shape[1] :]
        return model_inputs

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """None: the model counts each row's own tokens, also across calls and padding."""
        return None


def check_learning(model, learn_from_any: bool, test_time_training: bool | None) -> None:
    """Refuse to learn where that cannot be: behind a prompt of PEFT, which has no ids, and through layers that pass no
    gradient on, which would else show in the middle of the writing.

    Args:
        learn_from_any: `generate` was not told to learn from nothing.
        test_time_training: the argument of `generate`.
    """
    method = prompt_learning(model)
    if not learn_from_any or not asked_or(test_time_training, model.config.test_time_training):
        return
    if method is not None:
        raise ValueError(
            f"{method.capitalize()} of PEFT puts a prompt that is no tokens before the text, so that it cannot be "
            "learned from: generate with `test_time_training=False`, or adapt the model with LoRA instead."
        )
    check_units(model.model)
    check_quantisation(model.model)


def check_prompt(ids, embeddings, mask) -> None:
    """Inputs are tensors [batch, length, ...]; their values are looked at when they are read."""
    for name, given in (("input_ids", ids), ("inputs_embeds", embeddings), ("attention_mask", mask)):
        if given is None:
            continue
        check_tensor(name, given)
        beside_embeddings = given is ids and embeddings is not None  # these may have no ids yet
        if given.dim() < 2 or (0 in given.shape and not beside_embeddings):
            raise ValueError(
                f"`{name}` must be [batch, length, ...] with at least one token, got {tuple(given.shape)}: give every "
                "row a token."
            )


def check_supported(config, cache, assistant_model) -> None:
    """Refuse decoding modes that a learned context cannot serve."""
    assistants = {name: getattr(config, name, None) for name in ASSISTED_BY}
    if assistant_model is not None:
        assistants["assistant_model"] = type(assistant_model).__name__
    for name, value in assistants.items():
        if value:
            raise ValueError(
                f"`{name}={value}` asks for assisted decoding, which takes back tokens that were read; what is learned "
                "from them cannot be taken back. Leave the argument out."
            )
    if config.cache_implementation not in (None, "dynamic"):
        raise ValueError(
            f"`cache_implementation={config.cache_implementation!r}` is not possible: the cache is a learned context "
            "of its own kind. Leave the argument out."
        )
    if cache is not None and config.use_cache is False:
        raise ValueError("`use_cache=False` contradicts `cache`: leave one of them out.")


def check_prompt_embeddings(ids, embeddings, prefill_chunk_size: int | None) -> None:
    """Ids beside embeddings describe the same tokens, and embeddings are read at once."""
    if embeddings is not None and prefill_chunk_size is not None:
        raise ValueError(
            f"`prefill_chunk_size={prefill_chunk_size}` cuts ids, not `inputs_embeds`: leave one of them out. (Memory "
            "does not grow with the prompt in either case.)"
        )
    if ids is not None and embeddings is not None and ids.shape[:2] != embeddings.shape[:2]:
        raise ValueError(
            f"`inputs_embeds` {tuple(embeddings.shape)} and `input_ids` {tuple(ids.shape)} must describe the same "
            "tokens."
        )


def check_left_padding(ids, mask, pad_token_id: int | None, end_ids: tuple[int, ...]) -> None:
    """Padding must stand left of the prompt, because the next token follows the last position."""
    known = ids is not None and ids.dim() == 2 and ids.shape[1] and pad_token_id is not None
    if mask is None and known and pad_token_id not in end_ids:
        mask = ids != pad_token_id
    check_last_is_token(mask)


def check_continuation(cache: TTTE2ECache, ids, embeddings, mask) -> None:
    """A cache comes with the whole sequence, or with the ids of its new part and a mask over all positions."""
    read = cache.get_seq_length()
    name, given = ("input_ids", ids) if embeddings is None else ("inputs_embeds", embeddings)
    length = 0 if given is None else given.shape[1]
    covered = length if mask is None else mask.shape[1]
    if mask is not None and covered == read + length and embeddings is None:
        return
    whole = length > read and covered == length and (ids is None or _matches_pending(cache, ids, mask))
    if not whole:
        raise ValueError(
            f"`cache` has read {read} positions, but `{name}` ({length} positions"
            + (f", with an `attention_mask` of {covered})" if mask is not None else ")")
            + " are not the whole sequence. Pass the whole sequence (what was read and the new tokens), or the new "
            f"tokens with an `attention_mask` of {read} + {length} positions."
        )


def _matches_pending(cache: TTTE2ECache, ids: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether the ids agree with the last token that each row still keeps as pending."""
    pending, last = cache.context.pending, cache.get_seq_length() - 1
    if pending is None or cache.finished is not None or ids.shape[0] != cache.context.rows:
        return True
    holds_token = [True] * len(ids) if mask is None else mask[:, last].tolist()
    kept = ((row, count) for row, count in enumerate(pending.counts) if count and holds_token[row])
    return all(int(pending.ids[row, count - 1]) == int(ids[row, last]) for row, count in kept)


def _end_ids(config) -> tuple[int, ...]:
    end = config.eos_token_id
    if end is None:
        return ()
    return tuple(int(i) for i in (end.tolist() if torch.is_tensor(end) else end if isinstance(end, list) else [end]))


def _all_end_ids(config) -> tuple[int, ...]:
    """Ids after which a row is finished: end of sequence, and the padding that stands for it."""
    ends = _end_ids(config)
    return ends if config.pad_token_id is None else (*ends, int(config.pad_token_id))


def _note_finished(output, written: WrittenPositions, config) -> None:
    """Tell the cache which rows ended, so that their padding is not read when somebody goes on from it."""
    cache, after_end = output.cache, written.after_end(output.sequences)
    cache.finished = None if after_end is None else tuple(after_end.any(dim=1).tolist())
    cache.padding_id = None
    if cache.finished is not None:
        cache.padding_id = int(config.pad_token_id) if config.pad_token_id is not None else _end_ids(config)[0]
