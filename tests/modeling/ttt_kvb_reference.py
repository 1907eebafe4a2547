"""The readable twin of `ttt_kvb`: inner gradients by `torch.autograd.grad`, one loop, no padding, no pending tokens.

D_m = - sum_t eta_{t,m} grad_{W_m} l_t(W),   l_t(W) = -<f_W(k_t), v_t>
"""

import torch
from torch.nn import functional as F

from ttt_e2e.ttt_kvb import SMALLEST_NORM, KVBMemory, KVBRule, KVBTokens, SwiGLUWeights


def swiglu_by_definition(weights: SwiGLUWeights, inputs: torch.Tensor) -> torch.Tensor:
    """W_down (silu(W_gate x) * (W_up x)) for each token of [B, N, T, C]."""
    gate = torch.einsum("bnhc,bntc->bnth", weights.gate, inputs)
    up = torch.einsum("bnhc,bntc->bnth", weights.up, inputs)
    return torch.einsum("bnch,bnth->bntc", weights.down, F.silu(gate) * up)


def kvb_step_by_autograd(
    memory: KVBMemory, queries: torch.Tensor | None, batch: KVBTokens, rule: KVBRule
) -> tuple[torch.Tensor, KVBMemory]:
    """`ttt_kvb.kvb_step` with differentiable inner gradients that autograd finds."""
    with torch.enable_grad():
        weights = SwiGLUWeights(*(w if w.requires_grad else w.detach().requires_grad_() for w in memory.weights))
        predictions = swiglu_by_definition(weights, batch.keys)
        losses = -(predictions * batch.values).sum(dim=-1)
        steps = []
        for matrix, rates in zip(weights, batch.learning_rates.unbind(dim=-1), strict=True):
            (gradient,) = torch.autograd.grad((rates * losses).sum(), matrix, create_graph=True)
            steps.append(-gradient)
    outputs = predictions if rule.output_rule == "key" else swiglu_by_definition(weights, queries)
    momentum = None
    if rule.momentum:
        decay = batch.momentum_factors.mean(dim=(2, 3))[:, :, None, None]
        steps = [step + decay * earlier for step, earlier in zip(steps, memory.momentum, strict=True)]
        momentum = SwiGLUWeights(*steps)
    new = [w + step for w, step in zip(weights, steps, strict=True)]
    if rule.weight_norm:
        norms = [w.square().sum(dim=-1, keepdim=True).sqrt().clamp_min(SMALLEST_NORM) for w in new]
        new = [w * first / norm for w, first, norm in zip(new, memory.norms, norms, strict=True)]
    return outputs, KVBMemory(SwiGLUWeights(*new), memory.norms, momentum)


def kvb_scan_by_autograd(
    memory: KVBMemory, queries: torch.Tensor | None, tokens: KVBTokens, rule: KVBRule
) -> tuple[torch.Tensor, KVBMemory]:
    """Read T >= 1 tokens per row: outputs [B, N, T, C], and the memory after floor((T - 1) / b) steps."""
    outputs, length = [], tokens.keys.shape[2]
    for first in range(0, length, rule.mini_batch_size):
        own = slice(first, first + rule.mini_batch_size)
        reads = None if queries is None else queries[:, :, own]
        batch = tokens.each(lambda tensor, own=own: tensor[:, :, own])
        output, new = kvb_step_by_autograd(memory, reads, batch, rule)
        outputs.append(output)
        if first + rule.mini_batch_size < length:
            memory = new
    return torch.cat(outputs, dim=2), memory
