"""Reading one segment: prefix, then suffix, then the books (see `reader` and `learner`)."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from .context import LearnedContext, gather_columns
from .learner import learn
from .reader import Reader, Segment, SegmentOutput


def read_segment(reader: Reader, context: LearnedContext, segment: Segment) -> tuple[LearnedContext, SegmentOutput]:
    """Read one segment.

    Returns:
        The learned context after it (meaningless when `segment.needs_context` is False) and the outputs.
    """
    output = SegmentOutput(attentions=[[] for _ in context.histories])
    if not segment.learning:
        context = reader.drop_pending(context)
    context, x = reader.read_prefix(context, segment, output)
    if segment.learning:
        context = learn(reader, context, segment, x, output)
    else:
        reader.finish(output, x, segment.labels)
    return advance(context, segment) if segment.needs_context else context, output


def advance(context: LearnedContext, segment: Segment) -> LearnedContext:
    """The context with the segment's tokens counted."""
    last = torch.tensor([max(count - 1, 0) for count in segment.counts], device=segment.position_ids.device)
    positions = segment.position_ids.expand(context.rows, -1).gather(1, last[:, None]).squeeze(1).tolist()
    rows = zip(segment.counts, positions, context.next_positions, strict=True)
    return replace(
        context,
        tokens=tuple(old + count for old, count in zip(context.tokens, segment.counts, strict=True)),
        next_positions=tuple(position + 1 if count else old for count, position, old in rows),
    )


def inner_table(
    records: Sequence[tuple[tuple[int, ...], torch.Tensor, torch.Tensor]], rows: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inner losses and gradient norms of a call, each [rows, mini-batches], NaN where a row has fewer.

    Args:
        records: in order of time (rows, losses, norms).
    """
    if not records:
        return torch.empty(rows, 0, device=device), torch.empty(rows, 0, device=device)
    everyone = tuple(range(rows))
    columns = []
    for members, losses, norms in records:
        both = torch.stack([losses, norms], dim=-1)  # [members, 2]
        if members != everyone:
            full = both.new_full((rows, 2), float("nan"))
            both = full.index_copy(0, torch.tensor(members, device=both.device), both)
        columns.append(both)
    table = torch.stack(columns, dim=1)  # [rows, records, 2]
    # Rows that learned at different times stand in different columns: move every row's own entries to the left.
    missing = table[..., 0].isnan()
    if bool(missing.any()):
        order = missing.long().argsort(dim=1, stable=True)
        table = gather_columns(table, order)[:, : int((~missing).sum(dim=1).max())]
    return table[..., 0], table[..., 1]
