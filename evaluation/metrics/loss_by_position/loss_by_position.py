"""Mean loss by token position, of token losses that are already there."""

import datasets
import evaluate

DESCRIPTION = """Mean loss of the tokens at positions [start, end), for each of several such buckets.

A model that uses its context has a lower loss at later positions; one that forgets stays level."""

INPUTS = """
Args:
    losses: per row a list of negative log-likelihoods in nats; entry t is of the token at position t + 1, because the
        token at position 0 is never predicted.
    mask: per row a list as long, 1 for tokens that count and 0 for others; left out, all count. Required by
        `add` and `add_batch`.
    edges: where buckets begin, growing; the last bucket goes to the end of the longest row. Left out: 0, 256, 512,
        1024 and so on.
Returns:
    loss: mean over all tokens that count. start, end, loss_by_position, tokens: one number per bucket; a bucket without
    a token that counts has no mean (None).
Raises:
    ValueError: no token counts, a mask of another length, or edges that do not grow from 0 on inside the longest row.
Example:
    >>> evaluate.load(metric_path("loss_by_position")).compute(losses=[[3.0, 2.0, 1.0]], edges=[0, 2])
    {'loss': 2.0, 'start': [0, 2], 'end': [2, 4], 'loss_by_position': [3.0, 1.5], 'tokens': [1, 2]}
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class LossByPosition(evaluate.Metric):
    def _info(self):
        rows = datasets.Features(
            {"losses": datasets.List(datasets.Value("float64")), "mask": datasets.List(datasets.Value("int64"))}
        )
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=rows)

    def compute(self, *, losses=None, mask=None, **settings):
        """Compute from what is given here, or from what `add` and `add_batch` have collected."""
        if losses is not None:
            losses = [[float(loss) for loss in row] for row in losses]
            mask = [[1] * len(row) for row in losses] if mask is None else [[int(bit) for bit in row] for row in mask]
        return super().compute(losses=losses, mask=mask, **settings)

    def _compute(self, losses, mask, edges=None):
        for index, (row, bits) in enumerate(zip(losses, mask, strict=True)):
            if len(row) != len(bits):
                raise ValueError(f"mask: row {index} has {len(bits)} entries, its losses {len(row)}; give one per loss")
        if not any(any(bits) for bits in mask):
            raise ValueError("mask: no token counts; give at least one loss whose mask is 1")
        length = 1 + max(len(row) for row in losses)
        starts = _default_edges(length) if edges is None else [int(edge) for edge in edges]
        ends = [*starts[1:], length]
        if not starts or starts[0] < 0 or any(start >= end for start, end in zip(starts, ends, strict=True)):
            raise ValueError(f"edges={edges}: must grow from 0 or later on and stay below {length}, the longest row")
        buckets = [_counted(losses, mask, start, end) for start, end in zip(starts, ends, strict=True)]
        everything = _counted(losses, mask, 0, length)
        return {
            "loss": sum(everything) / len(everything),
            "start": starts,
            "end": ends,
            "loss_by_position": [sum(bucket) / len(bucket) if bucket else None for bucket in buckets],
            "tokens": [len(bucket) for bucket in buckets],
        }


def _default_edges(length):
    edges = [0, 256]
    while edges[-1] * 2 < length:
        edges.append(edges[-1] * 2)
    return [edge for edge in edges if edge < length]


def _counted(losses, mask, start, end):
    """Losses of the tokens at positions [start, end) that count, of all rows."""
    window = slice(max(start - 1, 0), max(end - 1, 0))
    counted = []
    for row, bits in zip(losses, mask, strict=True):
        counted += [loss for loss, bit in zip(row[window], bits[window], strict=True) if bit]
    return counted
