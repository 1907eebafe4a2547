"""Learning while reading: cut each row's tokens into its own mini-batches and run the inner loop over them.

The inner loop begins after the attention of the first suffix block, the last place that no fast weight reaches:

    for block k of the suffix:   x += attention_k(x) (k > 0);   x += prime_mlp_k(x; W + dW_k);   x += mlp_k(x)
    logits = head(norm(x))

A mini-batch is complete once its tokens and the token after them are known; until then its tokens stay pending. A
segment either fills up begun mini-batches or begins new ones (`tokens.Tokens.segments`), so that mini-batches of all
rows begin at equal places of it.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from .attention import AttentionInputs, BlockMasks, attention_mask, last_chunks
from .causal_lm_loss import NO_TARGET
from .checkpointing import run_checkpointed
from .context import LearnedContext, Pending, gather_positions, last_tokens
from .fast_weights import FastWeights, is_plain, linear
from .inner_loop import InnerState, MiniBatch, StepOutput, cut_gradient, run_inner_loop
from .layers import NewStates, zero_fast_weights
from .reader import Reader, SegmentMemory, SegmentOutput, run_blocks
from .sinks import KeysValues, Past, join_pairs, with_new_sinks
from .tokens import Segment, added
from .triton_attention import VisibleKeys

PastChunks = tuple[tuple[KeysValues, ...], ...]


@torch.compiler.disable
def learn(memory: SegmentMemory, inputs: torch.Tensor, output: SegmentOutput) -> LearnedContext:
    """Run the suffix over a segment with learning on.

    Args:
        memory: of the segment, after the outer parts.
        inputs: [B, T, D], the hidden states that enter the inner loop.
        output: filled in.

    Returns:
        The context with new fast weights, pending tokens, and keys and values of the inner layers.
    """
    reader, context, segment = memory.reader, memory.context, memory.segment
    size = reader.config.mini_batch_size
    counts = zip(context.pending_counts, segment.counts, strict=True)
    rows = [row for row, (pending, new) in enumerate(counts) if pending == size and new > 0]
    if rows:
        context = learn_pending(reader, context, segment, output, rows)
    counts = zip(context.pending_counts, segment.counts, segment.next_known, strict=True)
    if any(pending + new + known > size for pending, new, known in counts):
        steps = tuple(int(row in rows) for row in range(context.rows))
        return run_mini_batches(reader, context, segment, inputs, output, steps)
    return read_on(memory.going_on(context), inputs, output)


def learn_pending(
    reader: Reader, context: LearnedContext, segment: Segment, output: SegmentOutput, rows: Sequence[int]
) -> LearnedContext:
    """Take the step of the rows whose pending mini-batch is full and whose next token has now arrived.

    Keys and values stay those that were read, constants where an earlier call has read them; the step alone is a
    function of the slow weights, which compute the mini-batch again from its inputs.
    """
    before, pending = _without_pending(reader, context.select(rows)), context.pending
    mini_batch = Segment(
        ids=pending.ids[rows],
        embeddings=None,
        position_ids=pending.positions[rows],
        labels=None,
        begin=(0,) * len(rows),
        counts=tuple(pending.counts[row] for row in rows),
        next_ids=segment.ids[rows, 0],
        next_known=(True,) * len(rows),
        learning=True,
        needs_context=True,
    )
    silent, own = replace(reader, want_hidden=False, want_layers=False, want_attentions=False), SegmentOutput()
    part = run_mini_batches(silent, before, mini_batch, pending.inputs[rows], own, (0,) * len(rows))
    output.inner += [(tuple(rows), *values) for _, *values in own.inner]
    fast = part.fast
    if len(rows) < context.rows:
        whole = context.fast or zero_fast_weights(reader.suffix_layers, pending.inputs)
        fast = whole.replace(rows, part.fast.tensors)
    left = tuple(0 if row in rows else count for row, count in enumerate(pending.counts))
    past_key_values = context.past_key_values
    if reader.rule.horizon == 1:
        cut = tuple(row in rows for row in range(context.rows))
        past_key_values = tuple(past and past.map(lambda states: cut_gradient(states, cut)) for past in past_key_values)
    pending = replace(pending, counts=left) if any(left) else None
    return replace(context, fast=fast, pending=pending, past_key_values=past_key_values)


def read_on(memory: SegmentMemory, inputs: torch.Tensor, output: SegmentOutput) -> LearnedContext:
    """New tokens that complete no mini-batch: the suffix runs over them alone, and they join the pending ones."""
    reader, context, segment = memory.reader, memory.context, memory.segment
    x, states = reader.run(reader.inner_parts, inputs, context.fast, memory, output)
    reader.note_layers(output, states)
    reader.finish(output, x, segment.labels)
    if not segment.needs_context:
        return context
    return replace(memory.context, pending=_pending_after(context, segment, inputs, (0,) * context.rows))


def run_mini_batches(
    reader: Reader,
    context: LearnedContext,
    segment: Segment,
    inputs: torch.Tensor,
    output: SegmentOutput,
    steps: tuple[int, ...],
) -> LearnedContext:
    """The inner loop over all mini-batches that the segment fills or begins. Rows with pending tokens only wait.

    Args:
        steps: inner steps that each row has taken before in this call.
    """
    batches = mini_batches(reader, context.tokens, segment, inputs, steps)
    layers = reader.suffix_layers
    fast = context.fast
    if fast is None and any(any(batch.update) for batch in batches):
        fast = zero_fast_weights(layers, inputs)
    if fast is not None:
        fast = _own_fast_weights(fast, layers, differences=reader.rule.horizon is not None)
    waiting = max(context.pending_counts)
    suffix = Suffix(reader, forget=not segment.needs_context)
    state = InnerState(fast, _first_chunks(reader, context, waiting, inputs))
    if reader.checkpointing and torch.is_grad_enabled():
        every, offload = reader.config.inner_checkpoint_every, reader.config.inner_checkpoint_offload
        state, outputs = run_checkpointed(suffix, state, batches, reader.rule, suffix.parameters(), every, offload)
    else:
        state, outputs = run_inner_loop(suffix, state, batches, reader.rule)
    _collect(reader, batches, outputs, output)
    if not segment.needs_context:
        return context
    done = tuple(sum(complete) for complete in zip(*(batch.complete for batch in batches), strict=True))
    pending = _pending_after(context, segment, inputs, tuple(count * reader.config.mini_batch_size for count in done))
    past_key_values = list(context.past_key_values)
    for part, chunks in zip(reader.inner_parts[1:], state.chunks, strict=True):
        window, sinks = reader.windows_before[part.index], chunks[0] if reader.sink_counts[part.index] else None
        joined = join_pairs(chunks if sinks is None else chunks[1:])
        ends = [joined[0].shape[2] - segment.length + count for count in segment.counts]
        if window is not None and pending is not None:
            window += max(pending.counts)
        past_key_values[part.index] = Past(last_tokens(joined, ends, window), sinks)
    fast = state.fast
    if fast is not None and fast.whole:
        fast = fast.less(_projections(layers))
    return replace(context, fast=fast, pending=pending, past_key_values=tuple(past_key_values))


def mini_batches(
    reader: Reader, tokens_before: tuple[int, ...], segment: Segment, inputs: torch.Tensor, steps: tuple[int, ...]
) -> list[MiniBatch]:
    """Cut a segment into mini-batches; the last one may be shorter.

    Args:
        tokens_before: tokens that precede the segment, per row.
        inputs: [B, T, D], the hidden states that enter the inner loop.
        steps: inner steps that each row has taken before in this call.
    """
    size, horizon = reader.config.mini_batch_size, reader.rule.horizon
    targets = inner_targets(segment, reader.config.bos_token_id)
    angles = reader.model.rotary_emb(segment.position_ids, reader.model.dtype)
    batches = []
    # One split instead of many slices: its backward pass is one concatenation.
    for index, own_inputs in enumerate(inputs.split(size, dim=1)):
        part, end = slice(index * size, (index + 1) * size), (index + 1) * size
        following = zip(segment.counts, segment.next_known, strict=True)
        complete = tuple(count >= end and count + known > end for count, known in following)
        follows = zip(complete, segment.counts, strict=True)
        tokens_read = tuple(count + index * size for count in tokens_before)
        batches.append(
            MiniBatch(
                index=index,
                tokens_read=tokens_read,
                inputs=own_inputs,
                targets=targets[:, part],
                labels=None if segment.labels is None else segment.labels[:, part],
                position_embeddings={kind: (cos[:, :, part], sin[:, :, part]) for kind, (cos, sin) in angles.items()},
                sinks=reader.sinks(segment.position_ids[:, part], tokens_read),
                complete=complete,
                # A step is taken only where something will be read with its result.
                update=tuple(full and (segment.needs_context or count > end) for full, count in follows),
                cut=tuple(horizon is not None and (before + index + 1) % horizon == 0 for before in steps),
            )
        )
    return batches


def inner_targets(segment: Segment, bos_token_id: int | None) -> torch.Tensor:
    """[B, T]: the id after each token; `NO_TARGET` where it is unknown or BOS."""
    device = segment.ids.device
    last = torch.tensor(segment.counts, device=device)[:, None] - 1
    following = torch.full_like(segment.ids[:, :1], -1)
    if segment.next_ids is not None:
        known = torch.tensor(segment.next_known, device=device)
        following = torch.where(known, segment.next_ids, -1)[:, None]
    places = torch.arange(segment.length, device=device)
    targets = torch.where(places == last, following, segment.ids.roll(-1, dims=1))
    unknown = (places > last) | (targets < 0)
    if bos_token_id is not None:
        unknown = unknown | (targets == bos_token_id)
    return targets.masked_fill(unknown, NO_TARGET)


@dataclass(frozen=True)
class Suffix:
    """What an inner step evaluates; see `inner_loop.inner_step`.

    Attributes:
        reader: whose inner blocks, head and wishes these are.
        forget: drop chunks of keys that the next mini-batch cannot see.
        masks: those already made, by window, earlier keys and tokens.
    """

    reader: Reader
    forget: bool
    masks: dict[tuple, torch.Tensor | VisibleKeys | None] = field(default_factory=dict)

    def parameters(self) -> list[torch.Tensor]:
        """Every parameter that takes a gradient, once."""
        modules = [*self.reader.suffix_layers, self.reader.model.norm, self.reader.model.lm_head]
        found = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
        return list(found.values())

    def __call__(
        self, batch: MiniBatch, fast: FastWeights | None, chunks: PastChunks, with_logits: bool
    ) -> tuple[StepOutput, PastChunks, torch.Tensor | None]:
        """Evaluate one mini-batch under `fast`.

        Returns:
            The outputs without losses, the keys and values with this mini-batch's, and the logits [B, T, V].
        """
        reader, memory = self.reader, StepMemory(self, batch, chunks)
        x, states, weights = run_blocks(reader.inner_parts, batch.inputs, fast, memory, operator.call)
        wanted = reader.want_hidden or reader.want_layers or with_logits
        hidden = reader.model.norm(x) if wanted else None
        output = StepOutput(
            hidden=hidden if reader.want_hidden else None,
            label_nll=None,
            inner_loss=None,
            inner_grad_norm=None,
            layers=(*states[:-1], hidden) if reader.want_layers else (),
            attentions=tuple(weights.values()) if reader.want_attentions else (),
        )
        logits = linear(reader.model.lm_head, hidden) if with_logits else None
        return output, tuple(memory.chunks), logits

    def mask(
        self, batch: MiniBatch, window: int | None, num_past: int, num_sinks: int
    ) -> torch.Tensor | VisibleKeys | None:
        """The mask of a mini-batch over `num_past` earlier keys and its own, and the sinks before them."""
        tokens, implementation = batch.inputs.shape[1], self.reader.inner_implementation
        # Rows that have read more have all earlier keys, and see all sinks.
        most = num_past if window is None or not num_sinks else num_past + window + num_sinks
        read = tuple(min(count, most) for count in batch.tokens_read)
        key = (window, num_past, tokens, num_sinks, read)
        if key not in self.masks:
            device = batch.inputs.device
            self.masks[key] = attention_mask(implementation, window, num_past, tokens, read, device, num_sinks)
        return self.masks[key]


class StepMemory:
    """Keys and values around one inner step: chunks in order of time, to which the step adds one per block.

    The first chunk of a block with attention sinks is theirs.
    """

    def __init__(self, suffix: Suffix, batch: MiniBatch, chunks: PastChunks):
        self.suffix, self.batch = suffix, batch
        self.chunks = list(chunks)
        self.first = suffix.reader.config.num_prefix_layers + 1

    def before(self, index: int) -> tuple[AttentionInputs, Past]:
        reader, window = self.suffix.reader, self.suffix.reader.windows_before[index]
        sinks, chunks = self._chunks(index)
        chunks = last_chunks(chunks, window)
        past = Past(join_pairs(chunks) if chunks else None, sinks[0] if sinks else None)
        seen = self.batch.sinks if sinks else None
        mask = None
        if reader.config.use_attention:
            num_past, count = sum(keys.shape[2] for keys, _ in chunks), 0 if seen is None else seen.count
            mask = self.suffix.mask(self.batch, None if window is None else window + 1, num_past, count)
        masks: dict[str, torch.Tensor | VisibleKeys | BlockMasks | None] = {reader.layer_types[index]: mask}
        return AttentionInputs(self.batch.position_embeddings, masks, reader.inner_implementation, seen), past

    def add(self, index: int, states: NewStates) -> None:
        (sinks, chunks), new = self._chunks(index), states.new
        window = self.suffix.reader.windows_before[index]
        if sinks:
            sinks = (with_new_sinks(sinks[0], new, self.batch.tokens_read, sinks[0][0].shape[2]),)
        chunks = (*chunks, new)
        if self.suffix.forget and window is not None:
            num_past = sum(keys.shape[2] for keys, _ in chunks)
            while chunks and num_past - chunks[0][0].shape[2] >= window:
                num_past -= chunks[0][0].shape[2]
                chunks = chunks[1:]
        self.chunks[index - self.first] = (*sinks, *chunks)

    def _chunks(self, index: int) -> tuple[tuple[KeysValues, ...], tuple[KeysValues, ...]]:
        """The chunk of the sinks, if the block has some, and the others."""
        chunks, split = self.chunks[index - self.first], self.suffix.reader.sink_counts[index] > 0
        return chunks[:split], chunks[split:]


def _projections(layers: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    return [projection for layer in layers for projection in layer.inner_mlp.projections]


def _own_fast_weights(fast: FastWeights, layers: Sequence[torch.nn.Module], differences: bool) -> FastWeights:
    """One copy per row; where the layers are plain, W + dW formed once for all mini-batches.

    Args:
        differences: keep dW apart, so that a cut of the outer gradient does not cut off the slow weights.
    """
    pairs = zip(_projections(layers), fast.tensors, strict=True)
    if not differences and all(is_plain(projection, tensor.dtype) for projection, tensor in pairs):
        return fast.added_to(_projections(layers))
    return fast.own_copies()


def _first_chunks(reader: Reader, context: LearnedContext, waiting: int, inputs: torch.Tensor) -> PastChunks:
    """Keys and values of the inner attention layers as first chunks: the sinks, the window, and what the `waiting`
    tokens of a row with a begun mini-batch have left."""
    first = []
    for part in reader.inner_parts[1:]:
        before, sinks = context.past_key_values[part.index] or Past(None)
        window, count = reader.windows_before[part.index], reader.sink_counts[part.index]
        if count and sinks is None:  # no row has read any
            shape = (context.rows, reader.config.num_key_value_heads, count, reader.config.head_dim)
            sinks = inputs.new_zeros(shape), inputs.new_zeros(shape)
        if before is not None and window is not None:
            before = last_tokens(before, [before[0].shape[2]], window + waiting)
        first.append(tuple(pair for pair in (sinks, before) if pair is not None))
    return tuple(first)


def _without_pending(reader: Reader, context: LearnedContext) -> LearnedContext:
    """The context before its pending tokens were read, as far as the inner blocks are concerned."""
    past_key_values = list(context.past_key_values)
    for part in reader.inner_parts[1:]:
        past = past_key_values[part.index]
        ends = [past.length - count for count in context.pending_counts]
        window = last_tokens(past.window, ends, reader.windows_before[part.index]) if max(ends) else None
        past_key_values[part.index] = window and past._replace(window=window)
    tokens = tuple(read - count for read, count in zip(context.tokens, context.pending_counts, strict=True))
    return replace(context, tokens=tokens, past_key_values=tuple(past_key_values), pending=None)


def _pending_after(
    context: LearnedContext, segment: Segment, inputs: torch.Tensor, done: tuple[int, ...]
) -> Pending | None:
    """The pending tokens of the context and then the segment's, without the `done` first ones of each row; None when no
    token is left."""
    before, counts = context.pending_counts, added(context.pending_counts, segment.counts)
    counts = tuple(count - learned for count, learned in zip(counts, done, strict=True))
    if max(counts) == 0:
        return None
    tensors = (inputs, segment.ids, segment.position_ids.expand(context.rows, -1))
    width = 0
    if context.pending is not None:
        width = max(before)
        old = (context.pending.inputs.to(inputs.dtype), context.pending.ids, context.pending.positions)
        tensors = tuple(torch.cat([o[:, :width], new], dim=1) for o, new in zip(old, tensors, strict=True))
    if len(set(before)) == 1 and len(set(done)) == 1:
        return Pending(counts, *(tensor[:, done[0] : done[0] + max(counts)] for tensor in tensors))
    places = torch.arange(max(counts)) + torch.tensor(done)[:, None]
    own = torch.tensor(before)[:, None]
    places = torch.where(places < own, places, places - own + width).clamp_max(tensors[0].shape[1] - 1)
    return Pending(counts, *(gather_positions(tensor, places) for tensor in tensors))


def _collect(
    reader: Reader, batches: Sequence[MiniBatch], outputs: Sequence[StepOutput], output: SegmentOutput
) -> None:
    """Join the steps' outputs."""
    if reader.want_hidden:
        output.hidden = torch.cat([step.hidden for step in outputs], dim=1)
    if batches[0].labels is not None:
        output.label_nll = torch.cat([step.label_nll for step in outputs], dim=1)
    if reader.want_layers:
        output.layers += map(list, zip(*(step.layers for step in outputs), strict=True))
    for batch, step in zip(batches, outputs, strict=True):
        first = batch.index * reader.config.mini_batch_size
        blocks = (part.index for part in reader.inner_parts[1:])
        # Without wanted weights there is none.
        output.attentions += [(index, own, first) for index, own in zip(blocks, step.attentions, strict=False)]
        if any(batch.complete):
            rows = tuple(range(len(batch.complete)))
            output.inner.append((rows, batch.complete, step.inner_loss, step.inner_grad_norm))
