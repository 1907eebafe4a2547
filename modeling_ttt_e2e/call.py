"""One call of the model: check its arguments, read its tokens segment by segment, and put the outputs back in place."""

import math
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.utils import logging

from .attention import inner_attention
from .cache_ttt_e2e import TTTE2ECache
from .causal_lm_loss import NO_TARGET, position_labels
from .checks import (
    asked_or,
    check_cache,
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
    read_attention_mask,
)
from .context import LearnedContext
from .inner_loop import UpdateRule, inner_table
from .learner import learn
from .outputs import PositionWriter, attention_writers
from .reader import Reader, SegmentMemory, SegmentOutput
from .sharding import check_quantisation, check_tensor_parallelism, check_units
from .tokens import Segment, Tokens, added
from .twice_differentiable import autocast_type, is_asynchronous

logger = logging.get_logger(__name__)

# Longest segment of a text that is read without gradients; long enough to keep matrix products efficient.
SEGMENT_TOKENS = 1024


@dataclass(frozen=True)
class Call:
    """A call whose arguments are checked and filled in.

    Attributes:
        tokens: the input.
        attention_mask: as given.
        cache: the one to go on from, and to update; None for a new one.
        context: what was read before; positions_read: how many positions that were.
        learning: take inner steps; span: only within these positions, None for all.
        use_cache: the learned context is returned.
        want_hidden, want_layers, want_attentions: optional outputs.
        first_kept: the first position whose hidden state is returned.
        label_length: how many positions of `token_nll` are returned; labelled_tokens: [], how many tokens have a label.
    """

    tokens: Tokens
    attention_mask: torch.Tensor | None
    cache: TTTE2ECache | None
    context: LearnedContext
    positions_read: int
    learning: bool
    span: tuple[int, int] | None
    use_cache: bool
    want_hidden: bool
    want_layers: bool
    want_attentions: bool
    first_kept: int
    label_length: int
    labelled_tokens: torch.Tensor | None

    def completes_mini_batch(self, size: int) -> bool:
        """Whether some row may take a step in this call: a mini-batch is full, and another token is there or read."""
        pending = zip(self.context.pending_counts, self.tokens.counts, strict=True)
        return any(before + new >= size for before, new in pending)


@dataclass(frozen=True)
class CallOutput:
    """Outputs over the positions of a call, and the learned context after it."""

    hidden: torch.Tensor | None
    token_nll: torch.Tensor | None
    layers: tuple[torch.Tensor, ...] | None
    attentions: tuple[torch.Tensor, ...] | None
    inner_loss: torch.Tensor | None
    inner_grad_norm: torch.Tensor | None
    context: LearnedContext


def make_call(
    model: torch.nn.Module,
    *,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: TTTE2ECache | None,
    inputs_embeds: torch.Tensor | None,
    labels: torch.Tensor | None,
    shift_labels: torch.Tensor | None,
    use_cache: bool | None,
    logits_to_keep: int | torch.Tensor | None,
    output_hidden_states: bool | None,
    output_attentions: bool | None,
    test_time_training: bool | None,
    learning_span: tuple[int, int] | None,
    **unknown,
) -> Call:
    """Check the arguments of [`TTTE2EModel.forward`] and fill in the defaults.

    Raises:
        ValueError, TypeError: naming the argument, its value and the remedy.
    """
    config = model.config
    check_extra_arguments(unknown)
    check_flags(
        use_cache=use_cache,
        output_hidden_states=output_hidden_states,
        output_attentions=output_attentions,
        test_time_training=test_time_training,
    )
    check_learning_span(learning_span)
    shape = check_inputs(input_ids, inputs_embeds, config)
    ids, embeddings = _out_of_inference_mode(input_ids), _out_of_inference_mode(inputs_embeds)
    has_prefix = False
    if isinstance(cache, DynamicCache) and cache.get_seq_length() > 0:
        has_prefix, cache = True, TTTE2ECache.of_prefix(cache, config)
    check_cache(cache, TTTE2ECache, shape[0], config)
    context = cache.context if cache is not None and cache.context is not None else None
    context = context or LearnedContext.start(shape[0], config.num_hidden_layers)
    if any(tensor.is_inference() for tensor in context.tensors()):
        context = context.map(_out_of_inference_mode)
    never = learning_span is not None and learning_span[1] <= learning_span[0]
    learning = not never and _check_learning(model, test_time_training, context, ids)
    if learning and has_prefix:
        raise ValueError(
            f"`cache` is a DynamicCache of {cache.columns} positions, as prefix tuning of PEFT makes it, and what is "
            "no tokens cannot be learned from: read with `test_time_training=False`, or adapt the model with LoRA "
            "instead."
        )
    positions_read = 0 if cache is None else cache.columns
    token_mask = read_attention_mask(attention_mask, shape, positions_read)
    if cache is not None and ids is not None:
        token_mask = cache.mask_after_end(ids, token_mask)
    if position_ids is not None:
        position_ids = check_positions(position_ids, token_mask, shape, context.next_positions)
    check_label_arguments(labels, shift_labels, shape, config.vocab_size)
    targets = position_labels(labels, shift_labels, token_mask)
    label_length = 0 if targets is None else targets.shape[1]
    if targets is not None:
        targets = F.pad(targets, [0, shape[1] - label_length], value=NO_TARGET)
    if use_cache is None:
        use_cache = cache is not None or (config.use_cache and not model.training and targets is None)
    check_something_to_read(token_mask, goes_on=use_cache or positions_read > 0)
    check_logits_to_keep(logits_to_keep, shape[1])
    want_layers = asked_or(output_hidden_states, config.output_hidden_states)
    want_attentions = asked_or(output_attentions, config.output_attentions)
    if not config.use_attention and want_attentions:
        raise ValueError(
            "`output_attentions=True`, but this model has no attention (`use_attention=False` in its "
            "configuration): leave the argument out."
        )
    all_needed = use_cache or logits_to_keep is not None or want_layers or want_attentions or targets is None
    # Where a look would wait for the device, what no label needs is read as well.
    last_needed = None if all_needed or is_asynchronous(targets) else _last_labelled(targets)
    first_kept = 0
    if isinstance(logits_to_keep, int) and logits_to_keep > 0:
        first_kept = max(shape[1] - logits_to_keep, 0)
    return Call(
        tokens=Tokens.of(ids, embeddings, targets, position_ids, token_mask, context.next_positions, last_needed),
        attention_mask=attention_mask,
        cache=cache,
        context=context,
        positions_read=positions_read,
        learning=learning,
        span=learning_span,
        use_cache=use_cache,
        want_hidden=logits_to_keep is not None,
        want_layers=want_layers,
        want_attentions=want_attentions,
        first_kept=first_kept,
        label_length=label_length,
        labelled_tokens=None if targets is None else (targets != NO_TARGET).sum(),
    )


def run_call(model: torch.nn.Module, call: Call) -> CallOutput:
    """Read the call's tokens and return its outputs."""
    if torch.is_inference_mode_enabled():
        # Tensors made in inference mode could not be saved for the inner gradient.
        with torch.inference_mode(False), torch.no_grad():
            return run_call(model, call)
    with _without_cast_cache(call.tokens.device):
        return _read_call(model, call)


def _read_call(model: torch.nn.Module, call: Call) -> CallOutput:
    tokens, context, config = call.tokens, call.context, model.config
    reader, outputs = make_reader(model, call), _Outputs(config, call)
    size = None if torch.is_grad_enabled() else segment_size(config)
    stretches = tokens.stretches(call.learning, call.span, call.positions_read)
    for stretch in stretches:
        if call.span is not None and call.positions_read + stretch.first == call.span[0]:
            # Mini-batches never reach across the beginning of what may be learned.
            context = reader.drop_pending(context)
        more = call.use_cache or stretch is not stretches[-1]
        for segment in tokens.segments(stretch, context.pending_counts, config.mini_batch_size, size, more):
            context, output = read_segment(reader, context, segment)
            outputs.add(segment, output)
    if call.use_cache:
        context = replace(context, next_positions=tokens.next_positions)
    return outputs.result(context)


class _Outputs:
    """Collects what segments give and puts it back in place."""

    def __init__(self, config, call: Call):
        tokens, layers = call.tokens, config.num_hidden_layers + 1
        self.call = call
        self.hidden, self.nll = PositionWriter(tokens, call.first_kept), PositionWriter(tokens)
        self.layers = [PositionWriter(tokens) for _ in range(layers if call.want_layers else 0)]
        self.attentions, self.inner = {}, []
        if call.want_attentions:
            before = (call.attention_mask, call.context.tokens, call.positions_read)
            self.attentions = attention_writers(config, tokens, *before)

    def add(self, segment: Segment, output: SegmentOutput) -> None:
        if output.hidden is not None:
            self.hidden.add(output.hidden, segment)
        if output.label_nll is not None:
            self.nll.add(output.label_nll, segment)
        for writer, chunks in zip(self.layers, output.layers, strict=True):
            writer.add_chunks(chunks, segment)
        for index, weights, start in output.attentions:
            self.attentions[index].add(weights, segment, start)
        self.inner += output.inner

    def result(self, context: LearnedContext) -> CallOutput:
        """All of it; `context` is what was learned."""
        call, tokens = self.call, self.call.tokens
        inner_loss = inner_grad_norm = None
        if call.learning:
            inner_loss, inner_grad_norm = inner_table(self.inner, tokens.rows, tokens.device)
            _warn_about_gradients(inner_grad_norm)
        return CallOutput(
            hidden=self.hidden.result() if call.want_hidden else None,
            token_nll=self.nll.result()[:, : call.label_length] if tokens.labels is not None else None,
            layers=tuple(writer.followed() for writer in self.layers) if call.want_layers else None,
            attentions=tuple(own.result() for own in self.attentions.values()) if call.want_attentions else None,
            inner_loss=inner_loss,
            inner_grad_norm=inner_grad_norm,
            context=context,
        )


def read_segment(reader: Reader, context: LearnedContext, segment: Segment) -> tuple[LearnedContext, SegmentOutput]:
    """The learned context after one segment (meaningless when `segment.needs_context` is False) and the outputs."""
    output = SegmentOutput()
    if not segment.learning:
        context = reader.drop_pending(context)
    memory = SegmentMemory(reader, context, segment)
    x = reader.read_prefix(memory, output)
    if segment.learning:
        context = learn(memory, x, output)
    else:
        context = memory.context
        reader.finish(output, x, segment.labels)
    return replace(context, tokens=added(context.tokens, segment.counts)), output


def make_reader(model: torch.nn.Module, call: Call) -> Reader:
    """The decoder set up for one call."""
    config = model.config
    rule = UpdateRule(
        learning_rate=config.inner_learning_rate * (model.inner_learning_rate_multiplier if model.training else 1.0),
        max_grad_norm=config.inner_max_grad_norm or 0.0,
        second_order=config.meta_gradient == "second_order",
        horizon=config.meta_gradient_horizon,
    )
    implementation = "eager" if call.want_attentions else config._attn_implementation
    if config.num_sink_tokens and "flash" in implementation:
        raise ValueError(
            f"`attn_implementation={implementation!r}` knows no attention sinks (`num_sink_tokens` is "
            f"{config.num_sink_tokens}): use 'sdpa', as in model.set_attn_implementation('sdpa')."
        )
    inner_implementation = implementation
    differentiated = torch.is_grad_enabled() and rule.second_order and call.learning
    if call.learning and call.completes_mini_batch(config.mini_batch_size):
        check_units(model)
        check_quantisation(model)
    if differentiated:
        check_tensor_parallelism(model)
    if call.learning and not call.want_attentions:
        inner_implementation = inner_attention(config, model.device, activation_dtype(model), differentiated)
    checkpointing = model.gradient_checkpointing and model.training
    if checkpointing and call.learning and torch.is_grad_enabled():
        check_not_reentrant(model._gradient_checkpointing_func)
    return Reader(
        model=model,
        rule=rule,
        implementation=implementation,
        inner_implementation=inner_implementation,
        checkpointing=checkpointing,
        want_hidden=call.want_hidden,
        want_layers=call.want_layers,
        want_attentions=call.want_attentions,
    )


def activation_dtype(model: torch.nn.Module) -> torch.dtype:
    """The dtype of keys and values."""
    kind = autocast_type(model.device)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype


def segment_size(config) -> int:
    """Tokens read at once without gradients: whole mini-batches, about a window."""
    window = SEGMENT_TOKENS if config.sliding_window is None else min(config.sliding_window, SEGMENT_TOKENS)
    return config.mini_batch_size * max(1, window // config.mini_batch_size)


def check_inputs(ids: torch.Tensor | None, embeddings: torch.Tensor | None, config) -> tuple[int, int]:
    """Rows and positions of a call's input.

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
    given = ids if ids is not None else embeddings
    return given.shape[0], given.shape[1]


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


def _last_labelled(labels: torch.Tensor) -> tuple[int, ...]:
    """One past each row's last labelled position, at least 1."""
    places = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return tuple(((labels != NO_TARGET) * places).amax(dim=1).clamp_min(1).tolist())


def _warn_about_gradients(norms: torch.Tensor) -> None:
    if not is_asynchronous(norms) and bool(norms.isinf().any()):
        logger.warning_once(
            "An inner gradient was not finite; that sequence keeps its last finite fast weights. The model may run in "
            "too narrow a dtype, or `inner_learning_rate` may be too large."
        )


@contextmanager
def _without_cast_cache(device: torch.device):
    """Under autocast without gradients: do not keep a cast copy of the fast weights of every inner step."""
    kind = autocast_type(device)
    if torch.is_grad_enabled() or not torch.is_autocast_enabled(kind):
        yield
        return
    with torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False):
        yield


def _out_of_inference_mode(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None or not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()
