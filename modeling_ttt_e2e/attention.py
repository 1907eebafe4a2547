"""Attention over earlier and new keys and values: masks, long texts block by block, and transformers' interface.

    out = softmax(scale * Q K^T + mask) V

Axis letters: B batch rows, H heads, Q queries, K keys, C channels of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    causal_mask_function,
    or_masks,
    sdpa_mask,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .sinks import KeysValues, Sinks, sink_channels, sink_mask_function
from .triton_attention import VisibleKeys, triton_attention, why_not
from .twice_differentiable import plain_attention, twice_differentiable_attention

TWICE_DIFFERENTIABLE = "twice_differentiable"
TRITON = "twice_differentiable_triton"
# Compute capabilities on which `benchmarks/gpu.py` found the kernels faster than `TWICE_DIFFERENTIABLE`.
TRITON_MEASURED_FASTER: tuple[tuple[int, int], ...] = ()
# A text of more than two blocks is read block by block, so that no mask or score grows with its square, and few are of
# keys outside of the window.
BLOCKS_IN_A_WINDOW = 4
SMALLEST_BLOCK = 64


def float64_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU for one that has no float64 (Apple's MPS)."""
    return torch.device("cpu") if device.type == "mps" else device


@dataclass(frozen=True)
class AttentionInputs:
    """What every attention layer of one call shares.

    Attributes:
        position_embeddings: by layer type, cosines and sines of the RoPE angles of the new tokens, each
            [1 or B, 1, Q, C].
        masks: by layer type, what `attention_mask` the implementation takes, or [`BlockMasks`] of a long text.
        implementation: name in transformers' attention interface, or `TWICE_DIFFERENTIABLE` or `TRITON`.
        sinks: how sliding layers see their attention sinks; None where all of these are in every window.
    """

    position_embeddings: dict[str, tuple[torch.Tensor, torch.Tensor]]
    masks: "dict[str, torch.Tensor | VisibleKeys | BlockMasks | None]"
    implementation: str
    sinks: Sinks | None = None


def attention_mask(
    implementation: str,
    sliding_window: int | None,
    num_past: int,
    num_new: int,
    tokens_read: Sequence[int],
    device: torch.device,
    num_sinks: int = 0,
) -> torch.Tensor | VisibleKeys | None:
    """Mask of `num_new` queries over `num_sinks + num_past + num_new` keys, in the form that `implementation` takes.

    Distance of keys is distance of tokens: earlier keys are aligned right, the new tokens left. A query sees itself and
    what precedes it within the window, and the sinks that have left it. New tokens need no padding mask, because
    padding stands to the right of every token that is read.

    Args:
        sliding_window: keys that a query sees, itself included; None for full attention.
        tokens_read: per row, tokens before the new ones, the last ones of which are the earlier keys.
        num_sinks: attention sinks that stand before the earlier keys.
    """
    window = num_past + num_new if sliding_window is None else sliding_window
    if implementation == TRITON:
        return VisibleKeys.of(window, num_past, num_new, tokens_read, device, num_sinks)
    own = implementation in ("eager", TWICE_DIFFERENTIABLE)
    if num_new == 1 and not own and num_past < window and not num_sinks and min(tokens_read) >= num_past:
        return None  # one token that sees all there is, as in decoding
    function = sliding_window_causal_mask_function(window) if sliding_window is not None else causal_mask_function
    padding = past_token_mask(tokens_read, num_past, device)
    alike = padding is None
    if num_sinks:
        # A row that has read more sees all sinks.
        alike &= len({min(count, window + num_sinks) for count in tokens_read}) == 1
        starts = torch.tensor(tokens_read[:1] if alike else tokens_read, device=device)
        sinks = sink_mask_function(starts, window, num_past, num_sinks)
        function = or_masks(sinks, and_masks(lambda batch, head, query, key: key >= num_sinks, function))
    if padding is not None:
        padding = nn.functional.pad(padding, [num_sinks, num_new], value=True)
    make_mask = sdpa_mask if own else ALL_MASK_ATTENTION_FUNCTIONS[implementation]
    return make_mask(
        batch_size=1 if alike else len(tokens_read),
        q_length=num_new,
        kv_length=num_sinks + num_past + num_new,
        q_offset=num_sinks + num_past,
        kv_offset=0,
        mask_function=function,
        attention_mask=padding,
        local_size=sliding_window,
        allow_is_causal_skip=not own and not num_sinks,
        device=device,
    )


@dataclass(frozen=True)
class BlockMasks:
    """Masks of a sliding-window layer that reads a long text block by block, each block with what its window holds.

    Memory and time then grow with the length and not with its square.

    Attributes:
        size: tokens of a block.
        before: keys before a block, at most.
        masks: of each block; equal ones are the same tensor.
    """

    size: int
    before: int
    masks: tuple[torch.Tensor | None, ...]


def block_size(sliding_window: int) -> int:
    """Tokens of a block: few against the window, of which each block sees one besides itself."""
    return max(sliding_window // BLOCKS_IN_A_WINDOW, SMALLEST_BLOCK)


def block_masks(
    implementation: str,
    sliding_window: int,
    num_past: int,
    num_new: int,
    tokens_read: Sequence[int],
    device: torch.device,
    num_sinks: int = 0,
) -> BlockMasks:
    """Masks of the blocks of a text; the arguments are those of `attention_mask`."""
    size, before = block_size(sliding_window), sliding_window - 1
    made: dict[tuple, torch.Tensor | None] = {}
    masks = []
    for begin in range(0, num_new, size):
        past, new = min(num_past + begin, before), min(size, num_new - begin)
        # Rows that have read more see all sinks and have all earlier keys.
        read = tuple(min(count + begin, sliding_window + num_sinks + past) for count in tokens_read)
        if (past, new, read) not in made:
            made[past, new, read] = attention_mask(implementation, sliding_window, past, new, read, device, num_sinks)
        masks.append(made[past, new, read])
    return BlockMasks(size, before, tuple(masks))


def segment_masks(
    implementation: str,
    sliding_window: int | None,
    num_past: int,
    num_new: int,
    tokens_read: Sequence[int],
    device: torch.device,
    want_weights: bool,
    num_sinks: int = 0,
) -> torch.Tensor | VisibleKeys | BlockMasks | None:
    """The masks with which a segment is read: of blocks where it is long.

    Args:
        tokens_read, num_sinks: as `attention_mask` has them.
        want_weights: the attention weights are asked for, which blocks do not give.
    """
    # A flash kernel needs no mask and no scores at any length.
    whole = sliding_window is None or want_weights or "flash" in implementation
    make = attention_mask if whole or num_new <= 2 * block_size(sliding_window) else block_masks
    return make(implementation, sliding_window, num_past, num_new, tokens_read, device, num_sinks)


def attend_in_blocks(
    attend: Callable,
    query: torch.Tensor,
    new: tuple[torch.Tensor, torch.Tensor],
    past: tuple[torch.Tensor, torch.Tensor] | None,
    masks: BlockMasks,
) -> torch.Tensor:
    """Sliding-window attention over a long text, block by block.

    Args:
        attend: `attend(query, keys, values, mask)` -> [B, Q, H, C].
        query: [B, H, T, C]; new: keys and values of the same tokens; past: those before them.

    Returns:
        [B, T, H, C].
    """
    blocks = zip(*(states.split(masks.size, dim=2) for states in (query, *new)), masks.masks, strict=True)
    outputs, chunks = [], () if past is None else (past,)
    for queries, keys, values, mask in blocks:
        chunks = (*last_chunks(chunks, masks.before), (keys, values))
        seen = [torch.cat(states, dim=2) for states in zip(*chunks, strict=True)]
        outputs.append(attend(queries, *seen, mask))
    return torch.cat(outputs, dim=1)


def last_chunks(chunks: tuple[KeysValues, ...], length: int | None) -> tuple[KeysValues, ...]:
    """What of chunks of keys and values the last `length` tokens (None: all) are in, cut to these."""
    if length is None:
        return chunks
    # Whole chunks beyond the window go first; then at most one is cut, before joining, which copies less.
    surplus = sum(keys.shape[2] for keys, _ in chunks) - length
    while surplus > 0 and chunks[0][0].shape[2] <= surplus:
        surplus -= chunks[0][0].shape[2]
        chunks = chunks[1:]
    if chunks and surplus > 0:
        keys, values = chunks[0]
        return ((keys[:, :, surplus:], values[:, :, surplus:]), *chunks[1:])
    return chunks


def past_token_mask(tokens: Sequence[int], num_past: int, device: torch.device) -> torch.Tensor | None:
    """[rows, num_past] bool: which earlier keys are of a token, given the tokens read per row; None when all do."""
    if min(tokens) >= num_past:
        return None
    first = num_past - torch.tensor(tokens, device=device)
    return torch.arange(num_past, device=device) >= first[:, None]


def attention_function(implementation: str) -> Callable:
    """The function behind a name, with transformers' signature (module, q, k, v, mask, scaling=, ...)."""
    if implementation == TWICE_DIFFERENTIABLE:
        return twice_differentiable_attention_forward
    if implementation == TRITON:
        return triton_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)


def inner_attention(config, device: torch.device, dtype: torch.dtype, differentiated: bool) -> str:
    """What computes the attention of suffix blocks inside inner steps.

    Args:
        dtype: of queries, keys and values. differentiated: the inner gradients will be.

    Raises:
        ValueError: `config.inner_attention` is "triton" and its kernels cannot run here.
    """
    channels = config.head_dim + sink_channels(config.num_sink_tokens, dtype, config.head_dim)
    if config.inner_attention == "triton":
        reason = why_not(device, dtype, channels)
        if reason is not None:
            raise ValueError(f"`inner_attention='triton'` cannot be used here: {reason}. Or set it to 'torch'.")
        return TRITON
    if not differentiated:
        return config._attn_implementation
    auto = config.inner_attention == "auto"
    if auto and config._attn_implementation == "eager":
        return "eager"
    measured = auto and device.type == "cuda" and torch.cuda.get_device_capability(device) in TRITON_MEASURED_FASTER
    return TRITON if measured and why_not(device, dtype, channels) is None else TWICE_DIFFERENTIABLE


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
    output, weights = plain_attention(query, key, value, attention_mask, scaling)
    return output.transpose(1, 2), weights


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


def triton_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: VisibleKeys,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """`triton_attention` with the signature of transformers' attention interface."""
    dtype = value.dtype
    return triton_attention(query.to(dtype), key.to(dtype), value, attention_mask, scaling).transpose(1, 2), None
