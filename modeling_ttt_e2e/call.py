"""One call of the model: check its arguments, read its columns piece by piece, and put the outputs back in place."""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import DynamicCache
from transformers.utils import logging

from .attention import TWICE_DIFFERENTIABLE
from .cache_ttt_e2e import TTTE2ECache
from .checks import (
    check_embeddings,
    check_extra_arguments,
    check_flags,
    check_ids,
    check_label_arguments,
    check_learning_span,
    check_logits_to_keep,
    check_not_reentrant,
    check_positions,
    check_something_to_read,
    real_columns,
)
from .context import LearnedContext
from .inner_loop import NO_TARGET, UpdateRule
from .layout import Columns, ColumnWriter, attention_writers, segments, split_by_learning
from .reader import Reader, Wanted
from .reading import inner_table, read_segment
from .sharding import check_quantisation, check_tensor_parallelism, check_units

logger = logging.get_logger(__name__)

# Longest segment of a text that is read without gradients; long enough to keep matrix products efficient.
SEGMENT_TOKENS = 1024


@dataclass(frozen=True)
class CallArguments:
    """The arguments of [`TTTE2EModel.forward`], as given."""

    input_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    cache: TTTE2ECache | None
    inputs_embeds: torch.Tensor | None
    labels: torch.Tensor | None
    shift_labels: torch.Tensor | None
    use_cache: bool | None
    logits_to_keep: int | torch.Tensor | None
    output_hidden_states: bool | None
    output_attentions: bool | None
    test_time_training: bool | None
    learning_span: tuple[int, int] | None


@dataclass(frozen=True)
class Request:
    """A call whose arguments are checked and filled in.

    Attributes:
        columns: the input.
        attention_mask: as given.
        cache: the one to go on from, and to update; None for a new one.
        context: what was read before; columns_read: how many columns that were.
        learning: take inner steps; span: only within these columns, None for all.
        use_cache: the learned context is returned.
        wanted: optional outputs; first_kept: the first column whose hidden state is returned.
        label_columns: how many columns of `token_nll` are returned; labelled_tokens: [], how many tokens have a label.
    """

    columns: Columns
    attention_mask: torch.Tensor | None
    cache: TTTE2ECache | None
    context: LearnedContext
    columns_read: int
    learning: bool
    span: tuple[int, int] | None
    use_cache: bool
    wanted: Wanted
    first_kept: int
    label_columns: int
    labelled_tokens: torch.Tensor | None


@dataclass(frozen=True)
class Answer:
    """Outputs over the columns of a call, and the learned context after it."""

    hidden: torch.Tensor | None
    token_nll: torch.Tensor | None
    layers: tuple[torch.Tensor, ...] | None
    attentions: tuple[torch.Tensor, ...] | None
    inner_loss: torch.Tensor | None
    inner_grad_norm: torch.Tensor | None
    context: LearnedContext


def make_request(model: torch.nn.Module, arguments: CallArguments, unknown: dict) -> Request:
    """Check a call's arguments and fill in the defaults.

    Raises:
        ValueError, TypeError: naming the argument, its value and the remedy.
    """
    config = model.config
    check_extra_arguments(unknown)
    check_flags(
        use_cache=arguments.use_cache,
        output_hidden_states=arguments.output_hidden_states,
        output_attentions=arguments.output_attentions,
        test_time_training=arguments.test_time_training,
    )
    check_learning_span(arguments.learning_span)
    shape = check_inputs(arguments.input_ids, arguments.inputs_embeds, config)
    ids, embeddings = _out_of_inference_mode(arguments.input_ids), _out_of_inference_mode(arguments.inputs_embeds)
    cache = arguments.cache
    has_prefix = isinstance(cache, DynamicCache) and cache.get_seq_length() > 0
    if has_prefix:
        cache = TTTE2ECache.of_prefix(cache, config)
    _check_cache(cache, shape[0], config)
    context = cache.context if cache is not None and cache.context is not None else None
    context = context or LearnedContext.start(shape[0], config.num_hidden_layers)
    span = arguments.learning_span
    never = span is not None and span[1] <= span[0]
    learning = not never and _check_learning(model, arguments.test_time_training, context, ids)
    if learning and has_prefix:
        raise ValueError(
            f"`cache` is a DynamicCache of {cache.columns} columns, as prefix tuning of PEFT makes it, and what is no "
            "tokens cannot be learned from: read with `test_time_training=False`, or adapt the model with LoRA instead."
        )
    columns_read = 0 if cache is None else cache.columns
    real = real_columns(arguments.attention_mask, shape, columns_read)
    real = _mask_after_end(cache, ids, real, shape)
    position_ids = arguments.position_ids
    if position_ids is not None:
        position_ids = check_positions(position_ids, real, shape, context.next_positions)
    labels = _position_labels(arguments, real, shape, config.vocab_size)
    has_labels = labels is not None
    use_cache = arguments.use_cache
    if use_cache is None:
        use_cache = cache is not None or (config.use_cache and not model.training and not has_labels)
    check_something_to_read(real, goes_on=use_cache or columns_read > 0)
    keep = arguments.logits_to_keep
    check_logits_to_keep(keep, shape[1])
    if not config.use_attention and _default(arguments.output_attentions, config.output_attentions):
        raise ValueError(
            "`output_attentions=True`, but this model has no attention (`use_attention=False` in its "
            "configuration): leave the argument out."
        )
    wanted = Wanted(
        hidden=keep is not None,
        layers=_default(arguments.output_hidden_states, config.output_hidden_states),
        attentions=_default(arguments.output_attentions, config.output_attentions),
    )
    all_needed = use_cache or wanted.hidden or wanted.layers or wanted.attentions
    return Request(
        columns=Columns(
            ids=ids,
            embeddings=embeddings,
            position_ids=position_ids,
            real=real,
            labels=labels,
            last_needed=(shape[1],) * shape[0] if all_needed or not has_labels else _last_labelled(labels),
        ),
        attention_mask=arguments.attention_mask,
        cache=cache,
        context=context,
        columns_read=columns_read,
        learning=learning,
        span=span,
        use_cache=use_cache,
        wanted=wanted,
        first_kept=max(shape[1] - keep, 0) if isinstance(keep, int) and keep > 0 else 0,
        label_columns=shape[1] - (arguments.shift_labels is None),
        labelled_tokens=(labels != NO_TARGET).sum() if has_labels else None,
    )


def answer_request(model: torch.nn.Module, request: Request) -> Answer:
    """Read the call's columns and return its outputs."""
    if torch.is_inference_mode_enabled():
        # Tensors made in inference mode could not be saved for the inner gradient.
        with torch.inference_mode(False), torch.no_grad():
            return answer_request(model, request)
    with _without_cast_cache(request.columns):
        return _read_call(model, request)


def _read_call(model: torch.nn.Module, request: Request) -> Answer:
    columns, context, wanted = request.columns, request.context, request.wanted
    rows, length = columns.shape
    reader = make_reader(model, request)
    hidden = ColumnWriter(rows, request.first_kept, length)
    nll = ColumnWriter(rows, 0, length)
    layers = [ColumnWriter(rows, 0, length) for _ in range(model.config.num_hidden_layers + 1)]
    attentions = []
    if wanted.attentions:
        mask, before, seen = request.attention_mask, context.tokens, request.columns_read
        writers = attention_writers(model.config, columns.real, mask, before, seen, length, columns.device)
        attentions = list(writers.values())
    read, inner = [0] * rows, []
    size = None if torch.is_grad_enabled() else segment_size(model.config)
    pieces = split_by_learning(length, request.columns_read, request.learning, request.span)
    for piece in pieces:
        if request.span is not None and request.columns_read + piece.start == request.span[0]:
            # Mini-batches never reach across the beginning of what may be learned.
            context = reader.drop_pending(context)
        more = request.use_cache or piece is not pieces[-1]
        for segment, placement in segments(columns, piece, context, size, model.config.mini_batch_size, more):
            context, output = read_segment(reader, context, segment)
            if wanted.hidden:
                hidden.add(output.hidden, placement)
            if columns.labels is not None:
                nll.add(output.label_nll, placement)
            for writer, chunks in zip(layers, output.layers, strict=False):
                writer.add_chunks(chunks, placement)
            ends = [n + count for n, count in zip(read, segment.counts, strict=True)]
            for writer, parts in zip(attentions, output.attentions, strict=False):
                for weights, first in parts:
                    writer.add(weights, [n + f for n, f in zip(read, first, strict=True)], read, ends)
            inner += output.inner
            read = ends
    inner_loss = inner_grad_norm = None
    if request.learning:
        inner_loss, inner_grad_norm = inner_table(inner, rows, columns.device)
        _warn_about_gradients(inner_grad_norm)
    states = tuple(writer.followed() for writer in layers) if wanted.layers else None
    return Answer(
        hidden=hidden.result() if wanted.hidden else None,
        token_nll=nll.result()[:, : request.label_columns] if columns.labels is not None else None,
        layers=states,
        attentions=tuple(writer.result() for writer in attentions) if wanted.attentions else None,
        inner_loss=inner_loss,
        inner_grad_norm=inner_grad_norm,
        context=context,
    )


def make_reader(model: torch.nn.Module, request: Request) -> Reader:
    """The decoder set up for one call."""
    config = model.config
    rule = UpdateRule(
        learning_rate=config.inner_learning_rate * (model.inner_learning_rate_multiplier if model.training else 1.0),
        max_grad_norm=config.inner_max_grad_norm or 0.0,
        second_order=config.meta_gradient == "second_order",
        horizon=config.meta_gradient_horizon,
    )
    implementation = "eager" if request.wanted.attentions else config._attn_implementation
    inner_implementation = implementation
    differentiated = torch.is_grad_enabled() and rule.second_order and request.learning
    if request.learning:
        check_units(model)
        check_quantisation(model)
    if differentiated:
        check_tensor_parallelism(model)
        inner_implementation = "eager" if implementation == "eager" else TWICE_DIFFERENTIABLE
    checkpointing = model.gradient_checkpointing and model.training
    if checkpointing and request.learning and torch.is_grad_enabled():
        check_not_reentrant(model._gradient_checkpointing_func)
    return Reader(model, rule, implementation, inner_implementation, checkpointing, request.wanted)


def segment_size(config) -> int:
    """Tokens read at once without gradients: whole mini-batches, about a window."""
    window = SEGMENT_TOKENS if config.sliding_window is None else min(config.sliding_window, SEGMENT_TOKENS)
    return config.mini_batch_size * max(1, window // config.mini_batch_size)


def check_inputs(ids: torch.Tensor | None, embeddings: torch.Tensor | None, config) -> tuple[int, int]:
    """Rows and columns of a call's input.

    Raises:
        ValueError: there is none, or what there is cannot be read.
    """
    if ids is None and embeddings is None:
        raise ValueError("`input_ids` and `inputs_embeds` are both None: give one of them.")
    if ids is not None:
        check_ids(ids, config.vocab_size)
    if embeddings is not None:
        check_embeddings(embeddings, config.hidden_size)
    if ids is not None and embeddings is not None and ids.shape != embeddings.shape[:2]:
        raise ValueError(
            f"`inputs_embeds` {tuple(embeddings.shape)} and `input_ids` {tuple(ids.shape)} must describe the same "
            "tokens."
        )
    return tuple((ids if ids is not None else embeddings).shape[:2])


def _check_cache(cache: TTTE2ECache | None, rows: int, config) -> None:
    if cache is None:
        return
    if not isinstance(cache, TTTE2ECache):
        raise TypeError(
            f"`cache` is a {type(cache).__name__}; this model needs a TTTE2ECache, because it also has to "
            "keep what was learned. Make one with TTTE2ECache(model.config), or leave it to generate()."
        )
    if cache.context is not None and cache.context.rows != rows:
        raise ValueError(
            f"`cache` holds {cache.context.rows} rows but the inputs have {rows}: use "
            "`batch_repeat_interleave` or `batch_select_indices` on the cache."
        )
    if cache.config is not config and cache.config.context_settings() != config.context_settings():
        raise ValueError("`cache` belongs to a model of another configuration: read the text with this one.")


def _check_learning(
    model: torch.nn.Module, asked: bool | None, context: LearnedContext, ids: torch.Tensor | None
) -> bool:
    learning = model.config.test_time_training if asked is None else asked
    if learning:
        model.config.check_can_learn()
        if model.training:
            _check_multiplier(model.inner_learning_rate_multiplier)
        if ids is None:
            raise ValueError(
                "`inputs_embeds` alone (as from prompt tuning of PEFT) cannot be learned from, because the next tokens "
                "are not known: give `input_ids` beside them, or `test_time_training=False`."
            )
    elif context.fast is not None:
        raise ValueError(
            "`test_time_training=False` asks for the plain model, but `cache` has learned: start from an "
            'empty cache, or stop further learning with generate(..., learn_from="none").'
        )
    return learning


def _check_multiplier(multiplier: float) -> None:
    if not 0 <= multiplier < math.inf:
        raise ValueError(
            f"`inner_learning_rate_multiplier` of the model is {multiplier}: set it to a finite number, not "
            "negative (1.0 is no warm-up)."
        )


def _mask_after_end(
    cache: TTTE2ECache | None, ids: torch.Tensor | None, real: torch.Tensor | None, shape: tuple[int, int]
) -> torch.Tensor | None:
    """Hide the padding that generate() wrote behind the end of a finished row, when reading goes on from there."""
    if cache is None or cache.finished is None or ids is None or cache.padding_id is None:
        return real
    finished = torch.tensor(cache.finished, device=ids.device)[:, None]
    leading = (ids == cache.padding_id).long().cumprod(dim=1).bool()
    hidden = finished & leading
    if not bool(hidden.any()):
        return real
    return ~hidden if real is None else real & ~hidden


def _position_labels(
    arguments: CallArguments, real: torch.Tensor | None, shape: tuple[int, int], vocab_size: int
) -> torch.Tensor | None:
    """What each column's output is compared with, [batch, length], `NO_TARGET` at padding; None without labels."""
    labels, shift_labels = arguments.labels, arguments.shift_labels
    check_label_arguments(labels, shift_labels, shape, vocab_size)
    if shift_labels is not None:
        labels = shift_labels
    elif labels is not None:
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], NO_TARGET)], dim=1)
    if labels is None or real is None:
        return labels
    return labels.masked_fill(~real, NO_TARGET)


def _last_labelled(labels: torch.Tensor) -> tuple[int, ...]:
    """One past each row's last labelled column, at least 1."""
    places = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return tuple(((labels != NO_TARGET) * places).amax(dim=1).clamp_min(1).tolist())


def _warn_about_gradients(norms: torch.Tensor) -> None:
    if bool(norms.isinf().any()):
        logger.warning_once(
            "An inner gradient was not finite; that sequence keeps its last finite fast weights. The model may run in "
            "too narrow a dtype, or `inner_learning_rate` may be too large."
        )


@contextmanager
def _without_cast_cache(columns: Columns):
    """Under autocast without gradients: do not keep a cast copy of the fast weights of every inner step."""
    device = columns.device.type
    if torch.is_grad_enabled() or not torch.is_autocast_enabled(device):
        yield
        return
    with torch.autocast(device, dtype=torch.get_autocast_dtype(device), cache_enabled=False):
        yield


def _out_of_inference_mode(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None or not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def _default(asked: bool | None, configured: bool) -> bool:
    return bool(configured if asked is None else asked)
