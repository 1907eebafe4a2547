"""Attention over a history of keys and values: masks, the eager reference, and a twice differentiable form.

    out = softmax(scale * Q K^T + mask) V

The inner loop differentiates through the attention of suffix blocks, and meta-learning differentiates that gradient
once more. Fused kernels have no second derivative. `twice_differentiable_attention` keeps only q, k, v (and, for the
gradient, the incoming gradient) and recomputes the scores in each pass; `eager_attention_forward` is its readable twin.

Axis letters: B batch rows, H heads, Q queries, K keys, C channels of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

TWICE_DIFFERENTIABLE = "twice_differentiable"


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32 for bfloat16 and float16; float32 and float64 stay as they are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def float64_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU for one that has no float64 (Apple's MPS)."""
    return torch.device("cpu") if device.type == "mps" else device


@dataclass(frozen=True)
class AttentionInputs:
    """What every attention layer of one call shares.

    Attributes:
        position_embeddings: cosines and sines of the RoPE angles of the new tokens, each [1 or B, Q, C].
        masks: by layer type, what `attention_mask` the implementation takes, or [`BlockMasks`] of a long text.
        implementation: name in transformers' attention interface, or `TWICE_DIFFERENTIABLE`.
    """

    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    masks: "dict[str, torch.Tensor | BlockMasks | None]"
    implementation: str


def attention_mask(
    implementation: str,
    sliding_window: int | None,
    num_history: int,
    num_new: int,
    rows: int,
    history_valid: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor | None:
    """Mask of `num_new` queries over `num_history + num_new` keys, in the form that `implementation` takes.

    Column distance is token distance: the history is aligned right, the new tokens left. A query sees itself and
    what precedes it within the window. New columns need no padding mask, because padding stands to the right of every
    token that is read.

    Args:
        sliding_window: keys that a query sees, itself included; None for full attention.
        history_valid: [rows, num_history] bool, False where a row has no history yet; None when all are valid.
    """
    window = sliding_window if sliding_window is not None else num_history + num_new
    function = sliding_window_causal_mask_function(window) if sliding_window is not None else causal_mask_function
    padding = None
    if history_valid is not None:
        padding = torch.cat([history_valid, history_valid.new_ones(rows, num_new)], dim=1)
    own = implementation in ("eager", TWICE_DIFFERENTIABLE)
    make_mask = sdpa_mask if own else ALL_MASK_ATTENTION_FUNCTIONS[implementation]
    return make_mask(
        batch_size=1 if padding is None else rows,
        q_length=num_new,
        kv_length=num_history + num_new,
        q_offset=num_history,
        kv_offset=0,
        mask_function=function,
        attention_mask=padding,
        local_size=sliding_window,
        allow_is_causal_skip=not own,
        device=device,
    )


@dataclass(frozen=True)
class BlockMasks:
    """Masks of a sliding-window layer that reads a long text block by block, each block together with the one before.

    Memory then grows with the length and not with its square.

    Attributes:
        size: tokens of a block, the window.
        first: mask of the first block, which follows the history; middle, last: of the others.
    """

    size: int
    first: torch.Tensor | None
    middle: torch.Tensor | None
    last: torch.Tensor | None

    def of(self, index: int, count: int) -> torch.Tensor | None:
        """Mask of block `index` of `count`."""
        if index == 0:
            return self.first
        return self.last if index == count - 1 else self.middle


def block_masks(
    implementation: str,
    sliding_window: int,
    num_history: int,
    num_new: int,
    rows: int,
    history_valid: torch.Tensor | None,
    device: torch.device,
) -> BlockMasks:
    """Masks of blocks of one window; the arguments are those of `attention_mask`."""

    def mask(history: int, new: int, valid: torch.Tensor | None = None) -> torch.Tensor | None:
        return attention_mask(implementation, sliding_window, history, new, rows, valid, device)

    first = mask(num_history, min(sliding_window, num_new), history_valid)
    middle = mask(sliding_window, sliding_window)
    rest = num_new % sliding_window
    return BlockMasks(sliding_window, first, middle, mask(sliding_window, rest) if rest else middle)


def attend_in_blocks(
    attend: Callable,
    query: torch.Tensor,
    new: tuple[torch.Tensor, torch.Tensor],
    history: tuple[torch.Tensor, torch.Tensor] | None,
    masks: BlockMasks,
) -> torch.Tensor:
    """Sliding-window attention over a long text, block by block.

    Args:
        attend: `attend(query, keys, values, mask)` -> [B, Q, H, C].
        query: [B, H, T, C]; new: keys and values of the same tokens; history: those before them.

    Returns:
        [B, T, H, C].
    """
    blocks = list(zip(*(states.split(masks.size, dim=2) for states in (query, *new)), strict=True))
    outputs, before = [], history
    for index, (queries, *keys_values) in enumerate(blocks):
        seen = (
            keys_values
            if before is None
            else [torch.cat(pair, dim=2) for pair in zip(before, keys_values, strict=True)]
        )
        outputs.append(attend(queries, *seen, masks.of(index, len(blocks))))
        before = keys_values
    return torch.cat(outputs, dim=1)


def valid_columns(tokens: Sequence[int], columns: int, device: torch.device) -> torch.Tensor | None:
    """[rows, columns] bool: which history columns hold a token, given the tokens read per row; None when all do."""
    if min(tokens) >= columns:
        return None
    first = columns - torch.tensor(tokens, device=device)
    return torch.arange(columns, device=device) >= first[:, None]


def attention_function(implementation: str) -> Callable:
    """The function behind a name, with transformers' signature (module, q, k, v, mask, scaling=, ...)."""
    if implementation == TWICE_DIFFERENTIABLE:
        return twice_differentiable_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)


def _probabilities(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    # [B, H, Q, K], in at least float32
    scores = (query @ key.mT).to(at_least_float32(query.dtype)) * scale
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain operations; softmax in at least float32.

    Args:
        query: [B, H, Q, C]; key, value: [B, key/value heads, K, C]; attention_mask: bool, broadcast to [B, H, Q, K].

    Returns:
        The output [B, Q, H, C] and the attention weights [B, H, Q, K].
    """
    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    weights = _probabilities(query, key, attention_mask, scaling).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


def twice_differentiable_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """`twice_differentiable_attention` with the signature of transformers' attention interface."""
    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    dtype = value.dtype  # under autocast the rotated queries and keys are float32, the values bfloat16
    output = twice_differentiable_attention(query.to(dtype), key.to(dtype), value, attention_mask, scaling)
    return output.transpose(1, 2), None


def twice_differentiable_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """softmax(scale * query key^T, masked) value, differentiable twice without ever storing scores.

    Args:
        query: [B, H, Q, C]; key, value: [B, H, K, C], all of one dtype; mask: bool, broadcast to [B, H, Q, K].

    Returns:
        [B, H, Q, C].
    """
    with torch.autocast(query.device.type, enabled=False):
        return _Attention.apply(query, key, value, mask, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, scale):
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        return _probabilities(query, key, mask, scale).to(value.dtype) @ value

    @staticmethod
    def backward(ctx, grad_output):
        query, key, value, mask = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            return *_AttentionGradient.apply(query, key, value, grad_output, mask, ctx.scale), None, None


class _AttentionGradient(torch.autograd.Function):
    """First derivative of attention, and its own derivative.

    With P the probabilities, dP = dO V^T and D = rowsum(P dP):
        dS = P (dP - D),  dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO.
    """

    @staticmethod
    def forward(ctx, query, key, value, grad_output, mask, scale):
        ctx.save_for_backward(query, key, value, grad_output, mask)
        ctx.scale = scale
        probabilities, grad_scores, _ = _AttentionGradient.scores(query, key, value, grad_output, mask, scale)
        grad_scores = (grad_scores * scale).to(query.dtype)
        return grad_scores @ key, grad_scores.mT @ query, probabilities.to(query.dtype).mT @ grad_output

    @staticmethod
    def scores(query, key, value, grad_output, mask, scale):
        probabilities = _probabilities(query, key, mask, scale)
        grad_probabilities = (grad_output @ value.mT).to(probabilities.dtype)
        centred = grad_probabilities - (probabilities * grad_probabilities).sum(-1, keepdim=True)
        return probabilities, probabilities * centred, centred

    @staticmethod
    @once_differentiable
    def backward(ctx, query_bar, key_bar, value_bar):
        """Given the gradients of dQ, dK and dV, those of Q, K, V and dO.

        With G = scale (dQ_bar K^T + Q dK_bar^T) the gradient of dS, and g = rowsum(P G):
            of dP: P (G - g);   of P: dO dV_bar^T + G (dP - D) - g dP;   of S: P (of P - rowsum(P of P)).
        """
        query, key, value, grad_output, mask = ctx.saved_tensors
        scale, dtype = ctx.scale, query.dtype
        with torch.autocast(query.device.type, enabled=False):
            probabilities, grad_scores, centred = _AttentionGradient.scores(query, key, value, grad_output, mask, scale)
            grad_scores_bar = ((query_bar @ key.mT + query @ key_bar.mT) * scale).to(probabilities.dtype)
            row = (probabilities * grad_scores_bar).sum(-1, keepdim=True)
            grad_probabilities_bar = (probabilities * (grad_scores_bar - row)).to(dtype)
            # Terms that are constant along a row vanish in the softmax's own derivative below, so that
            # `centred` may stand for dP in the last product.
            probabilities_bar = (grad_output @ value_bar.mT).to(row.dtype) + (grad_scores_bar - row) * centred
            inner = (probabilities * probabilities_bar).sum(-1, keepdim=True)
            scores_bar = (probabilities * (probabilities_bar - inner) * scale).to(dtype)
            grad_scores = (grad_scores * scale).to(dtype)
            probabilities = probabilities.to(dtype)
            return (
                scores_bar @ key + grad_scores @ key_bar,
                scores_bar.mT @ query + grad_scores.mT @ query_bar,
                grad_probabilities_bar.mT @ grad_output,
                probabilities @ value_bar + grad_probabilities_bar @ value,
                None,
                None,
            )
