"""What the inner loop did between two logs: losses by mini-batch, gradient norms, clipped steps."""

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
        sums = [0.0] * max((losses.shape[1] for losses in self.losses), default=0)
        counts = [0] * len(sums)
        for losses in self.losses:
            present = ~losses.isnan()
            for index, total in enumerate(losses.double().nan_to_num(nan=0.0, posinf=float("inf")).sum(0).tolist()):
                sums[index] += total
            for index, count in enumerate(present.sum(dim=0).tolist()):
                counts[index] += count
        norms = torch.cat([norms.flatten() for norms in self.norms]) if self.norms else torch.zeros(0)
        norms = norms[~norms.isnan()].double()
        own = {
            "sums": sums,
            "counts": counts,
            "norm": norms.sum().item(),
            "steps": norms.numel(),
            "clipped": sum(int(clipped) for clipped in self.clipped),
            "tokens": sum(int(tokens) for tokens in self.tokens),
        }
        for values in (self.losses, self.norms, self.clipped, self.tokens):
            values.clear()
        parts = gather_object([own])
        logs = {}
        for index in range(max(len(part["sums"]) for part in parts)):
            present = [part for part in parts if len(part["sums"]) > index]
            count = sum(part["counts"][index] for part in present)
            if count:
                logs[f"nll_mini_batch_{index}"] = sum(part["sums"][index] for part in present) / count
        steps = sum(part["steps"] for part in parts)
        if steps:
            logs["inner_grad_norm"] = sum(part["norm"] for part in parts) / steps
            logs["inner_steps_clipped"] = sum(part["clipped"] for part in parts) / steps
        return logs, sum(part["tokens"] for part in parts)
