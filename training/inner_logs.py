"""What the inner loop did between two logs: losses by mini-batch, gradient norms, clipped steps."""

import math
from collections import Counter
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather_object


@dataclass
class InnerLogs:
    """Inner losses and gradient norms, kept until they are logged.

    Attributes:
        losses, norms: per forward pass [batch, mini-batches], as the model returns them: NaN where there is none.
        clipped: inner steps whose gradient was clipped, per forward pass.
        tokens: tokens read, padding left out, per forward pass.
    """

    losses: list[torch.Tensor] = field(default_factory=list)
    norms: list[torch.Tensor] = field(default_factory=list)
    clipped: list[torch.Tensor] = field(default_factory=list)
    tokens: list[torch.Tensor] = field(default_factory=list)

    def add(self, outputs: dict, inputs: dict, max_grad_norm: float) -> None:
        """Note one forward pass, without waiting for the device.

        Args:
            outputs: with `inner_loss` and `inner_grad_norm`, or without for a model that does not learn.
            inputs: with `input_ids`, and `attention_mask` where something is padded.
            max_grad_norm: what inner gradients are clipped to; 0 for no clipping.
        """
        mask = inputs.get("attention_mask")
        tokens = torch.tensor(inputs["input_ids"].numel()) if mask is None else mask.sum()
        self.tokens.append(tokens.detach())
        losses, norms = outputs.get("inner_loss"), outputs.get("inner_grad_norm")
        if losses is None:
            return
        self.losses.append(losses)
        self.norms.append(norms)
        self.clipped.append((norms > max_grad_norm).sum() if max_grad_norm > 0 else torch.tensor(0))

    def collect(self) -> tuple[dict[str, float], int]:
        """The logs over all processes, and the tokens read; forgets what was noted.

        Returns:
            `nll_mini_batch_I` (mean inner loss of each row's mini-batch I, under the fast weights before its own step),
            `inner_grad_norm` (mean), `inner_steps_clipped` (fraction); nothing for a model that does not learn.
        """
        sums, counts = Counter(), Counter()
        for losses in self.losses:
            totals = losses.double().nan_to_num(nan=0.0, posinf=math.inf).sum(dim=0).tolist()
            present = (~losses.isnan()).sum(dim=0).tolist()
            for index, (total, count) in enumerate(zip(totals, present, strict=True)):
                sums[f"nll_mini_batch_{index}"] += total
                counts[f"nll_mini_batch_{index}"] += count
        norms = torch.cat([norms.flatten() for norms in self.norms]) if self.norms else torch.zeros(0)
        norms = norms[~norms.isnan()].double()
        sums["inner_grad_norm"] = norms.sum().item()
        sums["inner_steps_clipped"] = sum(int(clipped) for clipped in self.clipped)
        counts["inner_grad_norm"] = counts["inner_steps_clipped"] = norms.numel()
        tokens = sum(int(tokens) for tokens in self.tokens)
        for values in (self.losses, self.norms, self.clipped, self.tokens):
            values.clear()
        parts = gather_object([(sums, counts, tokens)])
        # Counters that are added leave zeros out.
        sums, counts = (sum((part[which] for part in parts), Counter()) for which in (0, 1))
        return {name: sums[name] / count for name, count in counts.items()}, sum(part[2] for part in parts)
