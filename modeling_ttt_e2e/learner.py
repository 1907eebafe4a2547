"""Learning while reading: cut each row's tokens into its own mini-batches and run the inner loop over them.

A row has p pending tokens, whose mini-batch began earlier, and n new ones. Side by side they fill slots 0 .. p+n-1, so
that slot m * mini_batch_size starts mini-batch m in every row, however the rows were padded or split into calls
(`slots`).
A mini-batch is complete once its tokens and the token after them are known; until then its tokens stay pending.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from .checkpointing import run_checkpointed
from .context import LearnedContext, take_last
from .fast_weights import FastWeights, is_plain
from .inner_loop import InnerState, MiniBatch, StepOutput, cut_gradient, run_inner_loop
from .layers import TTTE2ESuffixLayer, zero_fast_weights
from .reader import Reader, Segment, SegmentOutput
from .slots import Slots
from .suffix import Histories, Suffix, join


@torch.compiler.disable
def learn(
    reader: Reader, context: LearnedContext, segment: Segment, inputs: torch.Tensor, output: SegmentOutput
) -> LearnedContext:
    """Run the suffix over a segment with learning on.

    Args:
        inputs: [B, T, D], the hidden states that enter the inner loop.
        output: filled in.

    Returns:
        The context with new fast weights, pending tokens, and keys and values of the inner layers.
    """
    size = reader.config.mini_batch_size
    rows = [
        row
        for row, (pending, new) in enumerate(zip(context.pending_counts, segment.counts, strict=True))
        if pending == size and new > 0
    ]
    if rows:
        context = learn_pending(reader, context, segment, output, rows)
    counts = zip(context.pending_counts, segment.counts, segment.next_ids, strict=True)
    if any(pending + new + (following >= 0) > size for pending, new, following in counts):
        steps = tuple(int(row in rows) for row in range(context.rows))
        return run_mini_batches(reader, context, segment, inputs, output, steps)
    return read_on(reader, context, segment, inputs, output)


def learn_pending(
    reader: Reader, context: LearnedContext, segment: Segment, output: SegmentOutput, rows: Sequence[int]
) -> LearnedContext:
    """Take the step of the rows whose pending mini-batch is full and whose next token has now arrived.

    Keys and values stay those that were read, constants where an earlier call has read them; the step alone is a
    function of the slow weights, which compute the mini-batch again from its inputs.
    """
    ids = segment.ids[rows, 0].tolist()
    nothing = Segment(
        ids=segment.ids[rows, :0],
        embeddings=None,
        counts=(0,) * len(rows),
        position_ids=segment.position_ids.expand(context.rows, -1)[rows, :0],
        next_ids=tuple(ids),
        labels=None,
        learning=True,
        needs_context=True,
    )
    own = SegmentOutput(attentions=[[] for _ in output.attentions])
    empty = context.pending.inputs[rows, :0]
    silent = replace(reader, wanted=replace(reader.wanted, hidden=False, layers=False, attentions=False))
    part = run_mini_batches(silent, context.select(rows), nothing, empty, own, (0,) * len(rows))
    output.inner += [(tuple(rows[row] for row in members), *values) for members, *values in own.inner]
    fast = part.fast
    if len(rows) < context.rows:
        whole = context.fast or zero_fast_weights(_suffix_layers(reader), context.pending.inputs)
        fast = whole.replace(rows, part.fast.tensors)
    left = tuple(0 if row in rows else count for row, count in enumerate(context.pending_counts))
    pending = replace(context.pending, counts=left) if any(left) else None
    histories = context.histories
    if reader.rule.horizon == 1:
        cut = tuple(row in rows for row in range(context.rows))
        histories = tuple(kv and tuple(cut_gradient(states, cut) for states in kv) for kv in histories)
    return replace(context, fast=fast, pending=pending, histories=histories)


def read_on(
    reader: Reader, context: LearnedContext, segment: Segment, inputs: torch.Tensor, output: SegmentOutput
) -> LearnedContext:
    """New tokens that complete no mini-batch: the suffix runs over them alone, and they join the pending ones."""
    first = reader.config.num_prefix_layers
    histories = list(context.histories)
    attention = None
    x = inputs
    for offset, layer in enumerate(_suffix_layers(reader)):
        index = first + offset
        deltas = None if context.fast is None else context.fast.of_layer(offset)
        if offset == 0:
            x, _, _ = reader.run_suffix_layer(layer, x, None, None, deltas, part="feed_forward")
        else:
            attention = attention or reader.attention_inputs(context, segment.position_ids, segment.length, index)
            x, new, weights = reader.run_suffix_layer(layer, x, attention, histories[index], deltas)
            if reader.wanted.attentions:
                output.attentions[index].append((weights, (0,) * context.rows))
            if segment.needs_context:
                keep = reader.window_before(index)
                totals = map(sum, zip(context.pending_counts, segment.counts, strict=True))
                keep = None if keep is None else keep + max(totals)
                histories[index] = reader.extend(histories[index], new, segment.counts, keep)
        if reader.wanted.layers:
            output.layers.append([x])
    reader.finish(output, x, segment.labels)
    if not segment.needs_context:
        return context
    pending = Slots(context, segment, inputs).left_after((0,) * context.rows)
    return replace(context, histories=tuple(histories), pending=pending)


def run_mini_batches(
    reader: Reader,
    context: LearnedContext,
    segment: Segment,
    inputs: torch.Tensor,
    output: SegmentOutput,
    steps: tuple[int, ...],
) -> LearnedContext:
    """The inner loop over all mini-batches that the pending and the new tokens fill or begin.

    Args:
        steps: inner steps that each row has taken before in this call.
    """
    slots = Slots(context, segment, inputs)
    batches = mini_batches(reader, slots, steps)
    layers = _suffix_layers(reader)
    fast = context.fast
    if fast is None and any(any(batch.update) for batch in batches):
        fast = zero_fast_weights(layers, inputs)
    suffix = Suffix(
        layers=layers,
        norm=reader.model.norm,
        head=reader.model.lm_head,
        implementation=reader.inner_implementation,
        mini_batch_size=reader.config.mini_batch_size,
        tokens_before=tuple(n - p for n, p in zip(context.tokens, context.pending_counts, strict=True)),
        forget=not segment.needs_context,
        want_hidden=reader.wanted.hidden,
        want_layers=reader.wanted.layers,
        want_attentions=reader.wanted.attentions,
    )
    if fast is not None:
        fast = _own_fast_weights(fast, layers, differences=reader.rule.horizon is not None)
    state = InnerState(fast, _keys_before(reader, context))
    if reader.checkpointing and torch.is_grad_enabled():
        every, offload = reader.config.inner_checkpoint_every, reader.config.inner_checkpoint_offload
        state, outputs = run_checkpointed(suffix, state, batches, reader.rule, suffix.parameters(), every, offload)
    else:
        state, outputs = run_inner_loop(suffix, state, batches, reader.rule)
    _collect(reader, slots, batches, outputs, output)
    if not segment.needs_context:
        return context
    done = tuple(sum(complete) for complete in zip(*(batch.complete for batch in batches), strict=True))
    pending = slots.left_after(tuple(count * reader.config.mini_batch_size for count in done))
    histories = list(context.histories)
    # A row that only waits has computed the keys of its pending tokens again; they stay as constant as they were.
    waiting = tuple(count > 0 for count in context.pending_counts)
    for index, chunks in enumerate(state.histories, start=reader.config.num_prefix_layers + 1):
        keep = reader.window_before(index)
        joined = join(chunks, None)
        ends = [joined[0].shape[2] - slots.length + total for total in slots.totals]
        keep = max(ends) if keep is None else keep + (max(pending.counts) if pending is not None else 0)
        histories[index] = tuple(cut_gradient(take_last(states, ends, keep), waiting) for states in joined)
    fast = state.fast
    if fast is not None and fast.whole:
        fast = fast.less(_projections(layers))
    return replace(context, fast=fast, pending=pending, histories=tuple(histories))


def mini_batches(reader: Reader, slots: Slots, steps: tuple[int, ...]) -> list[MiniBatch]:
    """Cut the slots into mini-batches; the last one may be shorter.

    Args:
        steps: inner steps that each row has taken before in this call.
    """
    size, segment, horizon = reader.config.mini_batch_size, slots.segment, reader.rule.horizon
    targets = slots.targets(reader.config.bos_token_id)
    cosines, sines = reader.model.rotary_emb(slots.position_ids, reader.model.dtype)
    # One split instead of many slices: its backward pass is one concatenation.
    inputs = slots.inputs.split(size, dim=1)
    batches = []
    for index, start in enumerate(range(0, slots.length, size)):
        end = start + size
        part = slice(start, end)
        known = zip(slots.totals, segment.next_ids, strict=True)
        complete = tuple(total + (following >= 0) > end and total >= end for total, following in known)
        follows = zip(complete, slots.totals, strict=True)
        batches.append(
            MiniBatch(
                index=index,
                inputs=inputs[index],
                targets=targets[:, part],
                labels=None if slots.labels is None else slots.labels[:, part],
                position_embeddings=(cosines[:, part], sines[:, part]),
                complete=complete,
                # A step is taken only where something will be read with its result.
                update=tuple(full and (segment.needs_context or total > end) for full, total in follows),
                cut=tuple(horizon is not None and (before + index + 1) % horizon == 0 for before in steps),
            )
        )
    return batches


def _suffix_layers(reader: Reader) -> list[TTTE2ESuffixLayer]:
    return list(reader.model.layers[reader.config.num_prefix_layers :])


def _projections(layers: list[TTTE2ESuffixLayer]) -> list[torch.nn.Module]:
    return [projection for layer in layers for projection in layer.inner_mlp.projections]


def _own_fast_weights(fast: FastWeights, layers: list[TTTE2ESuffixLayer], differences: bool) -> FastWeights:
    """One copy per row; where the layers are plain, W + dW formed once for all mini-batches.

    Args:
        differences: keep dW apart, so that a cut of the outer gradient does not cut off the slow weights.
    """
    pairs = zip(_projections(layers), fast.tensors, strict=True)
    if not differences and all(is_plain(projection, tensor.dtype) for projection, tensor in pairs):
        return fast.added_to(_projections(layers))
    return fast.own_copies()


def _keys_before(reader: Reader, context: LearnedContext) -> Histories:
    """Keys and values of the inner attention layers up to the pending mini-batch, as first chunks."""
    chunks = []
    for index in range(reader.config.num_prefix_layers + 1, reader.config.num_hidden_layers):
        history, keep = context.histories[index], reader.window_before(index)
        if history is None:
            chunks.append(())
            continue
        ends = [history[0].shape[2] - count for count in context.pending_counts]
        length = max(ends) if keep is None else keep
        chunks.append((tuple(take_last(states, ends, length) for states in history),))
    return tuple(chunks)


def _collect(
    reader: Reader,
    slots: Slots,
    batches: Sequence[MiniBatch],
    outputs: Sequence[StepOutput],
    output: SegmentOutput,
) -> None:
    """Join the steps' outputs and return them to the order of the new tokens."""

    def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return slots.new_tokens(torch.cat(list(tensors), dim=1))

    if reader.wanted.hidden:
        output.hidden = joined(step.hidden for step in outputs)
    if slots.labels is not None:
        output.label_nll = joined(step.label_nll for step in outputs)
    if reader.wanted.layers:
        # A row with new tokens has none pending here: its slots are its tokens.
        output.layers += map(list, zip(*(step.layers for step in outputs), strict=True))
    for batch, step in zip(batches, outputs, strict=True):
        first = tuple(batch.index * reader.config.mini_batch_size - start for start in slots.starts)
        for index, weights in enumerate(step.attentions, start=reader.config.num_prefix_layers + 1):
            output.attentions[index].append((weights, first))
        if any(batch.complete):
            output.inner.append((tuple(range(len(first))), step.inner_loss, step.inner_grad_norm))
