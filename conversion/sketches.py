"""A few numbers of a tensor that tell how far another one is from it, without either at hand.

    s_j = sum of sign(i) w_i over all i = j mod SIZE,   sign(i) = +1 or -1 as a hash of i says
    E |s - s'|^2 = |w - w'|^2

The signs make products of different places cancel out, so that distances of sketches are those of the tensors, within
a share of about sqrt(2 / SIZE) (Charikar, Chen, Farach-Colton: "Finding frequent items in data streams", 2002).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

SIZE = 128
PART = SIZE * 2**13  # places at once
# The 64-bit multipliers of splitmix64, as signed numbers.
FIRST, SECOND = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64


@dataclass(frozen=True)
class Distance:
    """How far tensors are from those of a sketch.

    Attributes:
        relative: |w - w'| / |w'| over all tensors.
        largest: the same of the tensor where it is largest, and its name.
    """

    relative: float
    largest: tuple[float, str]


def sketch(tensor: torch.Tensor) -> torch.Tensor:
    """[SIZE] float32 of a tensor of any shape and floating-point dtype."""
    values, total = tensor.detach().flatten(), torch.zeros(SIZE, dtype=torch.float64)
    for begin in range(0, len(values), PART):
        part = values[begin : begin + PART].to("cpu", torch.float64)
        part = part * _signs(begin, len(part))
        rest = -len(part) % SIZE
        total += torch.nn.functional.pad(part, (0, rest)).view(-1, SIZE).sum(dim=0)
    return total.float()


def distance(tensors: Iterable[tuple[str, torch.Tensor]], sketches: Mapping[str, torch.Tensor]) -> Distance:
    """How far tensors are from those that were sketched.

    Args:
        tensors: by name; read one after the other.
        sketches: of the same names.
    """
    apart, size, largest = 0.0, 0.0, (0.0, "")
    for name, tensor in tensors:
        kept = sketches[name].double()
        own = (float((sketch(tensor).double() - kept).square().sum()), float(kept.square().sum()))
        apart, size = apart + own[0], size + own[1]
        largest = max(largest, (_root(*own), name))
    return Distance(_root(apart, size), largest)


def _root(apart: float, size: float) -> float:
    if apart == 0:
        return 0.0
    return (apart / size) ** 0.5 if size else float("inf")


def _signs(begin: int, count: int) -> torch.Tensor:
    mixed = torch.arange(begin + 1, begin + count + 1) * FIRST
    mixed = (mixed ^ (mixed >> 30)) * SECOND
    return (((mixed ^ (mixed >> 27)) >> 33) & 1).double() * 2 - 1
