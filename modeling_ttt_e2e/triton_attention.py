"""Sliding-window attention that is differentiable twice, in Triton kernels that never hold a score matrix.

    O = softmax(scale Q K^T, masked) V

The readable twin is `twice_differentiable.plain_attention`; the formulas of both derivatives are those of
`twice_differentiable._AttentionGradient`. With P the probabilities, and per row D = sum(P dP) = sum(dO O):

    first    dS = P (dP - D),   dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO
    second   from the gradients q, k, v of dQ, dK, dV, with G = scale (q K^T + Q k^T):
             row sums  g = sum(P G),   r = sum(P (dO v^T + G (dP - D)))
             of dP: P (G - g);   of S: scale P (dO v^T + (G - g) (dP - D) - r)

Which keys a query sees follows from numbers (`VisibleKeys`), so that blocks of keys outside of every window are
skipped. Query heads share keys without a copy of these; products take bfloat16 or float16 and add up in float32.

Axis letters: B batch rows, H query heads, N key/value heads, Q queries, K keys, C channels of a head.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from .twice_differentiable import autocast_type

try:
    from .triton_kernels import INTERPRETED, KERNELS
except ImportError:  # `triton` is optional
    INTERPRETED = KERNELS = None

MAX_CHANNELS = 256
# By bytes of a place in memory: queries and keys of a block, and warps; those of the second derivative last.
BLOCKS = {
    32: ((64, 64, 4), (32, 32, 4)),
    64: ((64, 64, 4), (32, 32, 4)),
    128: ((64, 64, 8), (32, 32, 4)),
    256: ((32, 32, 4), (32, 16, 4)),
    512: ((16, 32, 4), (16, 16, 4)),
    1024: ((16, 16, 4), (16, 16, 4)),
}
OVER_KEYS = ("key_gradient", "second_key")
OF_THE_SECOND_DERIVATIVE = ("row_sums", "second_query", "second_key")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class VisibleKeys:
    """Which keys a query sees, in numbers where other implementations take a mask [B, 1, Q, K].

    The keys are [sinks | earlier tokens, aligned right | new tokens]. Query i is new token i; it sees itself and what
    precedes it within the window, and the sinks that have left it.

    Attributes:
        num_sinks, num_past, num_new: how many keys there are of each kind.
        window: keys that a query sees, itself included, sinks apart.
        tokens_read: [B] int32, tokens before the new ones.
    """

    num_sinks: int
    num_past: int
    num_new: int
    window: int
    tokens_read: torch.Tensor

    @classmethod
    def of(
        cls,
        window: int,
        num_past: int,
        num_new: int,
        tokens_read: Sequence[int],
        device: torch.device,
        num_sinks: int,
    ) -> "VisibleKeys":
        """From the arguments of `attention.attention_mask`; `window` is of all keys for full attention."""
        return cls(num_sinks, num_past, num_new, window, torch.tensor(tokens_read, dtype=torch.int32, device=device))

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        return self.num_new, self.num_past, self.num_sinks, self.window


def why_not(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    """Why these kernels cannot compute attention of such tensors; None where they can.

    Args:
        channels: C, those that stand for attention sinks included.
    """
    if KERNELS is None:
        return "the package `triton` is not installed: pip install triton"
    if device.type != "cuda" and not is_interpreted():
        return f"the device is '{device.type}': Triton kernels need a GPU, or TRITON_INTERPRET=1 from the start (slow)"
    if dtype not in DTYPES:
        return f"{dtype} is not among {', '.join(map(str, DTYPES))}"
    return None if channels <= MAX_CHANNELS else f"heads have {channels} channels, and at most {MAX_CHANNELS} can be"


def is_interpreted() -> bool:
    """Whether kernels run on the CPU, statement by statement; decided when this module is imported."""
    return KERNELS is not None and INTERPRETED.value


def triton_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: VisibleKeys, scale: float
) -> torch.Tensor:
    """softmax(scale * query key^T, masked) value, differentiable twice, where `why_not` has no objection.

    Args:
        query: [B, H, Q, C]; key, value: [B, N, K, C] with H a multiple of N, all of one dtype.

    Returns:
        [B, H, Q, C].
    """
    with torch.autocast(autocast_type(query.device), enabled=False):
        # Outside of the function: what it saves must be its inputs, to be differentiated twice.
        output, _ = _TritonAttention.apply(query.contiguous(), key.contiguous(), value.contiguous(), visible, scale)
    return output


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, visible, scale):
        output, log_sums = torch.empty_like(query), _row_numbers(query)
        _launch("forward", query, key, visible, scale, [query, key, value, output, log_sums])
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.visible, ctx.scale = visible, scale
        ctx.mark_non_differentiable(log_sums)
        return output, log_sums

    @staticmethod
    def backward(ctx, grad_output, _):
        query, key, value, output, log_sums = ctx.saved_tensors
        with torch.autocast(autocast_type(query.device), enabled=False):
            # The output and the sums are functions of the rest; the second derivative accounts for that.
            known = (output.detach(), log_sums, ctx.visible, ctx.scale)
            return *_TritonAttentionGradient.apply(query, key, value, grad_output, *known), None, None


class _TritonAttentionGradient(torch.autograd.Function):
    """First derivative of attention, and its own derivative."""

    @staticmethod
    def forward(ctx, query, key, value, grad_output, output, log_sums, visible, scale):
        grad_output = grad_output.contiguous()
        dots = (grad_output.float() * output.float()).sum(-1)
        read = [query, key, value, grad_output, log_sums, dots]
        grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
        _launch("query_gradient", query, key, visible, scale, [*read, grads[0]])
        _launch("key_gradient", query, key, visible, scale, [*read, *grads[1:]])
        ctx.save_for_backward(*read)
        ctx.visible, ctx.scale = visible, scale
        return tuple(grads)

    @staticmethod
    @once_differentiable
    def backward(ctx, query_bar, key_bar, value_bar):
        query, key, value, grad_output, log_sums, dots = ctx.saved_tensors
        bars = [bar.to(query.dtype).contiguous() for bar in (query_bar, key_bar, value_bar)]
        sums, products = _row_numbers(query), _row_numbers(query)
        read = [query, key, value, grad_output, *bars, log_sums, dots]
        of_query, of_key, of_value, of_grad = (torch.empty_like(own) for own in (query, key, value, grad_output))
        shared = (query, key, ctx.visible, ctx.scale)
        _launch("row_sums", *shared, [*read, sums, products])
        read += [sums, products]
        _launch("second_query", *shared, [*read, of_query, of_grad])
        _launch("second_key", *shared, [*read, of_key, of_value])
        return of_query, of_key, of_value, of_grad, None, None, None, None


def _row_numbers(query: torch.Tensor) -> torch.Tensor:
    return torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)


def _launch(
    kernel: str,
    query: torch.Tensor,
    key: torch.Tensor,
    visible: VisibleKeys,
    scale: float,
    tensors: Sequence[torch.Tensor],
) -> None:
    """Run a kernel in one program per block of queries and head, or of keys and key/value head (`OVER_KEYS`)."""
    (batch, heads, num_queries, channels), (_, key_heads, num_keys, _) = query.shape, key.shape
    # float32 products are exact, as PyTorch's are unless it is allowed TF32.
    exact = query.dtype == torch.float32 and not (query.is_cuda and torch.backends.cuda.matmul.allow_tf32)
    constants, options = kernel_settings(kernel, channels, heads, key_heads, query.dtype, exact)
    if kernel in OVER_KEYS:
        grid = (_blocks(num_keys, constants["COLUMNS"]), batch * key_heads)
    else:
        grid = (_blocks(num_queries, constants["ROWS"]), batch * heads)
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        KERNELS[kernel][grid](*tensors, visible.tokens_read, scale, *visible.numbers, **constants, **options)


def _blocks(length: int, size: int) -> int:
    return -(-length // size)


def kernel_settings(
    kernel: str, channels: int, heads: int, key_heads: int, dtype: torch.dtype, exact: bool
) -> tuple[dict, dict]:
    """What a kernel is compiled for: its constants, and the compiler's options.

    Blocks are such that few registers are spilled; those of the second derivative have four tiles of queries and four
    of keys.

    Args:
        exact: products of float32 without TF32.
    """
    width = max(16, 1 << (channels - 1).bit_length())
    rows, columns, warps = BLOCKS[min(width * dtype.itemsize, max(BLOCKS))][kernel in OF_THE_SECOND_DERIVATIVE]
    constants: dict[str, int | str] = {"CHANNELS": channels, "WIDTH": width, "HEADS": heads, "ROWS": rows}
    constants |= {"GROUPS": heads // key_heads, "PRECISION": "ieee" if exact else "tf32", "COLUMNS": columns}
    return constants, {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
