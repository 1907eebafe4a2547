"""Keys and values that grow by a token at a time without being copied each time.

    memory:   [ places that are shown | free places ]      ->      [ places that are shown, new | free places ]

New tokens are written behind the last place that anybody shows, so that all earlier tensors stay what they were. Free
places belong to who takes them first: of two that go on from one tensor, as forks of a cache, the second gets a copy.

Axis letters: B batch rows, H heads, K earlier tokens, T new ones, C channels of a head.
"""

import threading
import weakref

import torch

SHARE = 8  # for so many tokens one place is kept free
# By the memory of keys or values: places for tokens, and the first one that is free.
_PLACES = weakref.WeakKeyDictionary[torch.UntypedStorage, tuple[int, int]]()
_taking = threading.Lock()


def grown(past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Earlier states [B, H, K, C] and new ones [B, H, T, C] one behind the other, [B, H, K + T, C].

    Where a gradient is wanted, and for more than a few tokens, this is `torch.cat`.
    """
    length, count = past.shape[2], new.shape[2]
    free = length // SHARE  # a cache copies what has many more places than it shows
    if count > free or not _may_share(past, new):
        return torch.cat([past, new], dim=2)
    if not _take_places(past, count):
        past = _with_free_places(past, free)
        _take_places(past, count)
    strides, start = past.stride(), past.storage_offset()
    # `data` counts versions for itself: what others have saved for a backward pass lies before these places.
    past.data.as_strided(new.shape, strides, start + length * strides[2]).copy_(new)
    return past.as_strided((*past.shape[:2], length + count, past.shape[3]), strides, start)


def _may_share(past: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether new states may be written into the memory of earlier ones."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(past) is type(new) is torch.Tensor
        and (past.dtype, past.device) == (new.dtype, new.device)
        and (*past.shape[:2], past.shape[3]) == (*new.shape[:2], new.shape[3])
        and past.numel() > 0
        and past.is_inference() == torch.is_inference_mode_enabled()
    )


def _take_places(past: torch.Tensor, count: int) -> bool:
    """Take so many places behind a tensor; false where there are not as many, or another one has them."""
    memory, (batch, heads, length, channels) = past.untyped_storage(), past.shape
    with _taking:
        places, free = _PLACES.get(memory, (0, 0))
        end = past.storage_offset() // channels + length
        whole = memory.nbytes() == batch * heads * places * channels * past.element_size()
        strides = (heads * places * channels, places * channels, channels, 1)
        fits = past.stride() == strides or (batch == 1 and past.stride()[1:] == strides[1:])
        if not whole or not fits or end != free or end + count > places:
            return False
        _PLACES[memory] = (places, end + count)
        return True


def _with_free_places(past: torch.Tensor, count: int) -> torch.Tensor:
    """A copy with free places behind it."""
    batch, heads, length, channels = past.shape
    memory = past.new_empty(batch, heads, length + count, channels)
    _PLACES[memory.untyped_storage()] = (length + count, length)
    return memory[:, :, :length].copy_(past)


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """What a cache keeps: the values without their graph, as an ordinary tensor that is not a small part of a long
    text's memory."""
    wasteful = tensor.untyped_storage().nbytes() > 1.25 * tensor.nbytes + 1024
    return tensor.clone() if wasteful or tensor.is_inference() else tensor.detach()
