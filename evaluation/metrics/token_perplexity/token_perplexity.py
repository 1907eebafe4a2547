"""Perplexity of token losses that are already there: exp of their mean over all tokens that count."""

import math

import datasets
import evaluate
import numpy as np

DESCRIPTION = """Perplexity and mean loss over all tokens of all rows together, so that a longer row weighs more.

Unlike the metric `perplexity` of the library it runs no model: it takes what the model said of each token."""

INPUTS = """
Args:
    losses: per row a list of negative log-likelihoods in nats, rows of any length.
    mask: per row a list as long, 1 for tokens that count and 0 for others; left out, all count. Required by
        `add` and `add_batch`.
    log_probabilities: the `losses` are log-probabilities, so without the minus (default: False).
Returns:
    loss: mean in nats per token. perplexity: its exp (infinite where that is too large). tokens: those that count.
Raises:
    ValueError: no token counts, or a mask of another length.
Example:
    >>> evaluate.load(metric_path("token_perplexity")).compute(losses=[[0.5, 1.5], [1.0]])
    {'loss': 1.0, 'perplexity': 2.718281828459045, 'tokens': 3}
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class TokenPerplexity(evaluate.Metric):
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

    def _compute(self, losses, mask, log_probabilities=False):
        for index, (row, bits) in enumerate(zip(losses, mask, strict=True)):
            if len(row) != len(bits):
                raise ValueError(f"mask: row {index} has {len(bits)} entries, its losses {len(row)}; give one per loss")
        counted = np.concatenate(losses)[np.concatenate(mask) != 0]
        if not counted.size:
            raise ValueError("mask: no token counts; give at least one loss whose mask is 1")
        loss = float(-counted.mean() if log_probabilities else counted.mean())
        # Beyond this exp overflows a float.
        perplexity = math.exp(loss) if loss < 709 else math.inf
        return {"loss": loss, "perplexity": perplexity, "tokens": int(counted.size)}
