"""Reading: one segment of text and a learned context in, outputs and the next learned context out.

    prefix blocks and the attention of the first suffix block   over the whole segment at once
    learning off: the rest of the suffix                        over the whole segment, fast weights as they are
    learning on: the rest of the suffix                         mini-batch by mini-batch (`learner`)

All of these are one loop over blocks, `run_blocks`; they differ in where keys and values come from and go to.

Axis letters: B batch rows, T tokens of the segment (aligned left; what stands behind a row's last token means nothing),
D hidden size, V vocabulary.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Literal, NamedTuple, Protocol

import torch

from .attention import AttentionInputs, BlockMasks, segment_masks
from .causal_lm_loss import hidden_nll
from .context import LearnedContext, keep_visible, last_tokens
from .fast_weights import FastWeights
from .inner_loop import UpdateRule
from .layers import NewStates
from .sinks import Past, Sinks, positions_at_sinks, sinks_left_behind
from .tokens import Segment, added
from .triton_attention import VisibleKeys


@dataclass
class SegmentOutput:
    """Attributes:
    hidden: [B, T, D] after the final norm, or None.
    label_nll: [B, T], or None without labels.
    layers: hidden states before the first block, after every block but the last, and after the final norm, each as
        consecutive chunks [B, t, D], when asked for.
    attentions: in any order (block, weights [B, heads, queries, keys], the segment's token of the first query), when
        asked for.
    inner: in order of time (rows, which have a complete mini-batch, inner loss [rows], inner gradient norm [rows]).
    """

    hidden: torch.Tensor | None = None
    label_nll: torch.Tensor | None = None
    layers: list[list[torch.Tensor]] = field(default_factory=list)
    attentions: list[tuple[int, torch.Tensor, int]] = field(default_factory=list)
    inner: list[tuple[tuple[int, ...], tuple[bool, ...], torch.Tensor, torch.Tensor]] = field(default_factory=list)


class BlockPart(NamedTuple):
    """What of block `index` a loop runs; `fast_index` is its place among the blocks with fast weights, or None."""

    index: int
    layer: torch.nn.Module
    part: Literal["whole", "attention", "feed_forward"]
    fast_index: int | None


class Memory(Protocol):
    """Keys and values around a loop over blocks."""

    def before(self, index: int) -> tuple[AttentionInputs, Past | None]:
        """What the attention of block `index` needs: angles and masks, and earlier keys and values."""

    def add(self, index: int, states: NewStates) -> None:
        """Take over the new tokens' keys and values."""


def run_blocks(
    parts: Sequence[BlockPart],
    x: torch.Tensor,
    fast: FastWeights | None,
    memory: Memory,
    call: Callable,
) -> tuple[torch.Tensor, list[torch.Tensor], dict[int, torch.Tensor | None]]:
    """Run x [B, T, D] through blocks.

    Args:
        call: `call(layer, ...)` runs a block; a place for checkpointing.

    Returns:
        The last hidden states, those after every part, and the attention weights by block.
    """
    states, weights = [], {}
    for index, layer, part, fast_index in parts:
        learns = fast is not None and fast_index is not None
        matrices = fast.of_layer(fast_index, len(layer.inner_mlp.projections)) if learns else None
        if part == "feed_forward":
            x, _, _ = call(layer, x, None, None, matrices, part=part)
        else:
            x, left, weights[index] = call(layer, x, *memory.before(index), matrices, part=part)
            memory.add(index, left)
        states.append(x)
    return x, states, weights


@dataclass(frozen=True)
class Reader:
    """The decoder as a function of learned contexts.

    Attributes:
        model: the [`TTTE2EModel`] whose modules compute.
        rule: the inner loop's update rule.
        implementation: attention implementation.
        inner_implementation: that of suffix blocks inside inner steps.
        checkpointing: recompute activations in the backward pass.
        want_hidden, want_layers, want_attentions: optional outputs.
    """

    model: torch.nn.Module
    rule: UpdateRule
    implementation: str
    inner_implementation: str
    checkpointing: bool
    want_hidden: bool
    want_layers: bool
    want_attentions: bool

    @property
    def config(self):
        return self.model.config

    @cached_property
    def suffix_layers(self) -> list[torch.nn.Module]:
        return list(self.model.layers)[self.config.num_prefix_layers :]

    @cached_property
    def inner_parts(self) -> list[BlockPart]:
        """What fast weights reach: the suffix without the attention of its first block."""
        first = self.config.num_prefix_layers
        return [
            BlockPart(first + own, layer, "whole" if own else "feed_forward", own)
            for own, layer in enumerate(self.suffix_layers)
        ]

    def outer_parts(self, learning: bool) -> list[BlockPart]:
        """What runs over a whole segment at once: all, or when learning what no fast weight reaches."""
        first = self.config.num_prefix_layers
        whole = [
            BlockPart(index, layer, "whole", index - first if index >= first else None)
            for index, layer in enumerate(self.model.layers)
        ]
        return [*whole[:first], BlockPart(first, whole[first].layer, "attention", 0)] if learning else whole

    def read_prefix(self, memory: "SegmentMemory", output: SegmentOutput) -> torch.Tensor:
        """The parts that run over the whole segment at once: the hidden states [B, T, D] after them."""
        segment = memory.segment
        x = segment.embeddings if segment.embeddings is not None else self.model.embed_tokens(segment.ids)
        before = [x]
        x, states = self.run(self.outer_parts(segment.learning), x, memory.before_segment.fast, memory, output)
        self.note_layers(output, before + (states[:-1] if segment.learning else states))
        return x

    def run(
        self,
        parts: Sequence[BlockPart],
        x: torch.Tensor,
        fast: FastWeights | None,
        memory: Memory,
        output: SegmentOutput,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """`run_blocks` over a whole segment; a suffix block is checkpointed as prefix blocks checkpoint themselves."""

        suffix = self.suffix_layers

        def call(layer, *args, **kwargs):
            if layer not in suffix or not self.checkpointing or not torch.is_grad_enabled():
                return layer(*args, **kwargs)
            return self.model._gradient_checkpointing_func(partial(layer, **kwargs), *args)

        x, states, weights = run_blocks(parts, x, fast, memory, call)
        if self.want_attentions:
            output.attentions += [(index, own, 0) for index, own in weights.items()]
        return x, states

    def note_layers(self, output: SegmentOutput, states: Sequence[torch.Tensor]) -> None:
        if self.want_layers:
            output.layers += [[state] for state in states]

    @cached_property
    def layer_types(self) -> tuple[str, ...]:
        """What each block sees. This and the next two are asked for so often that the configuration would be slow."""
        return tuple(self.config.layer_types)

    @cached_property
    def windows_before(self) -> tuple[int | None, ...]:
        """By block, keys that the first of some new queries sees before itself; None: all."""
        window = self.config.sliding_window
        return tuple(window - 1 if kind == "sliding_attention" else None for kind in self.layer_types)

    @cached_property
    def sink_counts(self) -> tuple[int, ...]:
        """Attention sinks by block."""
        sinks = self.config.num_sink_tokens
        return tuple(sinks if kind == "sliding_attention" else 0 for kind in self.layer_types)

    def sinks(self, position_ids: torch.Tensor, tokens_read: Sequence[int]) -> Sinks | None:
        """How the tokens at `position_ids` [1 or B, T] see the sinks of sliding blocks; None where these are in every
        window, unless attention weights are wanted.

        Args:
            tokens_read: per row, tokens before these.
        """
        count, window = self.config.num_sink_tokens, self.config.sliding_window
        left_behind = sinks_left_behind(count, window, tokens_read, position_ids.shape[1])
        if count == 0 or not (left_behind or self.want_attentions):
            return None
        positions = positions_at_sinks(position_ids, tokens_read, window, count)
        angles = self.model.rotary_emb["sliding_attention"](positions, self.model.dtype)
        return Sinks(count, tuple(tokens_read), angles)

    def drop_pending(self, context: LearnedContext) -> LearnedContext:
        """Forget the pending mini-batch, and the keys that were kept only to learn from it."""
        if context.pending is None:
            return context
        past_key_values = []
        for index, past in enumerate(context.past_key_values):
            window = last_tokens(past.window, [past.length] * context.rows, self.windows_before[index])
            past_key_values.append(past._replace(window=window))
        return replace(context, pending=None, past_key_values=tuple(past_key_values))

    def finish(self, output: SegmentOutput, x: torch.Tensor, labels: torch.Tensor | None) -> None:
        """Final norm, and the outer loss without ever holding the logits of more than a mini-batch."""
        hidden = self.model.norm(x)
        output.hidden = hidden if self.want_hidden else None
        if self.want_layers:
            output.layers[-1] = [hidden]
        if labels is not None:
            size, checkpointing = self.config.mini_batch_size, self.checkpointing
            output.label_nll = hidden_nll(self.model.lm_head, hidden, labels, checkpointing, size)


class SegmentMemory:
    """The keys and values of a context, to which blocks that read a whole segment add theirs."""

    def __init__(self, reader: Reader, context: LearnedContext, segment: Segment):
        self.reader, self.segment = reader, segment
        self.pending = 0  # tokens, per row, whose keys are kept besides the window
        self.before_segment, self.past_key_values = context, list(context.past_key_values)
        self.angles = reader.model.rotary_emb(segment.position_ids, reader.model.dtype)
        self.sinks = reader.sinks(segment.position_ids, context.tokens)
        self.inputs: dict[tuple[str, int], AttentionInputs] = {}

    @property
    def context(self) -> LearnedContext:
        """The context with what was added."""
        return replace(self.before_segment, past_key_values=tuple(self.past_key_values))

    def going_on(self, context: LearnedContext) -> "SegmentMemory":
        """For inner blocks that read the same segment after `context`, and keep the keys that they will learn from."""
        inner = copy.copy(self)
        inner.before_segment, inner.past_key_values = context, list(context.past_key_values)
        inner.pending = max(added(context.pending_counts, self.segment.counts))
        return inner

    def before(self, index: int) -> tuple[AttentionInputs, Past | None]:
        past = self.past_key_values[index]
        kind = self.reader.layer_types[index]
        num_past = 0 if past is None else past.length
        if (kind, num_past) not in self.inputs:
            sinks = self.sinks if kind == "sliding_attention" else None
            masks = {kind: self._mask(kind, num_past, 0 if sinks is None else sinks.count)}
            self.inputs[kind, num_past] = AttentionInputs(self.angles, masks, self.reader.implementation, sinks)
        return self.inputs[kind, num_past], past

    def add(self, index: int, states: NewStates) -> None:
        """Earlier keys and values with the new ones, aligned right, as many as will be seen."""
        if not self.segment.needs_context:
            return
        past, window = self.past_key_values[index], self.reader.windows_before[index]
        window = None if window is None else window + self.pending
        counts = (self.before_segment.tokens, self.segment.counts)
        self.past_key_values[index] = keep_visible(past, states, *counts, window, self.reader.sink_counts[index])

    def _mask(self, kind: str, num_past: int, num_sinks: int) -> torch.Tensor | VisibleKeys | BlockMasks | None:
        reader, segment = self.reader, self.segment
        if not reader.config.use_attention:
            return None
        window = reader.config.sliding_window if kind == "sliding_attention" else None
        sizes, device = (num_past, segment.length, self.before_segment.tokens), segment.position_ids.device
        return segment_masks(reader.implementation, window, *sizes, device, reader.want_attentions, num_sinks)
