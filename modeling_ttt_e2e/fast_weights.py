"""Fast weights: what a sequence has learned, as differences to the slow weights of the prime MLPs.

    y = x W^T + x dW^T,   dW = 0 before the first inner step

Keeping the difference, and calling the slow layer as it is, lets adapters, quantised, offloaded and parallel layers
work unchanged; the gradient with respect to dW equals that with respect to W.

Axis letters: B batch rows, S stored copies (S <= B: rows share a copy until they differ), T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

# Below this many tokens per row, adding the difference to the slow weights costs more than a second product.
FOLD_FROM_TOKENS = 32


@dataclass(frozen=True)
class FastMatrix:
    """The fast weights of one matrix, per row.

    Attributes:
        weights: [S, out, in], at least float32: differences dW to the slow weights.
        rows: for each batch row, which of the S copies is its own; None when row i owns copy i.
        whole: `weights` hold sums W + dW instead; then `rows` is None.
    """

    weights: torch.Tensor
    rows: tuple[int, ...] | None = None
    whole: bool = False

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, in] -> x times the weights transposed, [B, T, out]; no copy is made of any weight."""
        weights = self.weights.to(x.dtype)
        if self.rows is None:
            return torch.bmm(x, weights.mT)
        if len(set(self.rows)) == 1:
            return F.linear(x, weights[self.rows[0]])
        output = x.new_empty(*x.shape[:-1], weights.shape[1])
        for copy in set(self.rows):
            members = [row for row, own in enumerate(self.rows) if own == copy]
            output[members] = F.linear(x[members], weights[copy])
        return output


@dataclass(frozen=True)
class FastWeights:
    """Fast weights of all suffix blocks for a batch. Immutable: an update makes a new object.

    Attributes:
        tensors: one per matrix that learns, block by block (gate, up, down, or down alone), each [S, out, in].
        rows, whole: as in [`FastMatrix`], shared by all tensors.
    """

    tensors: tuple[torch.Tensor, ...]
    rows: tuple[int, ...] | None = None
    whole: bool = False

    def of_layer(self, index: int, count: int) -> tuple[FastMatrix, ...]:
        """The `count` differences of suffix block `index`, where each block has so many."""
        own = self.tensors[count * index : count * (index + 1)]
        return tuple(FastMatrix(tensor, self.rows, self.whole) for tensor in own)

    def added_to(self, layers: Sequence[nn.Module]) -> "FastWeights":
        """W + dW in one tensor per row, for plain `layers`; `less` is its inverse."""
        own = self.own_copies().tensors
        return FastWeights(tuple(layer.weight + d for layer, d in zip(layers, own, strict=True)), whole=True)

    def less(self, layers: Sequence[nn.Module]) -> "FastWeights":
        """The differences dW of what `added_to` the same layers gave and inner steps moved."""
        pairs = zip(layers, self.tensors, strict=True)
        return FastWeights(tuple(tensor - layer.weight for layer, tensor in pairs))

    def select(self, indices: Sequence[int]) -> "FastWeights":
        """The fast weights of the rows `indices`, without copying."""
        rows = range(len(self.tensors[0])) if self.rows is None else self.rows
        return FastWeights(self.tensors, tuple(rows[index] for index in indices))

    def own_copies(self) -> "FastWeights":
        """The same values with one copy per row, and none that no row uses."""
        if self.rows is None:
            return self
        rows = list(self.rows)
        return FastWeights(tuple(tensor[rows] for tensor in self.tensors))

    def used_copies(self) -> "FastWeights":
        """The same values without copies that no row uses."""
        if self.rows is None or len(set(self.rows)) == len(self.tensors[0]):
            return self
        used = sorted(set(self.rows))
        return FastWeights(tuple(tensor[used] for tensor in self.tensors), tuple(map(used.index, self.rows)))

    def replace(self, indices: Sequence[int], new: Sequence[torch.Tensor]) -> "FastWeights":
        """Fast weights in which the rows `indices` have the values `new`, each [len(indices), out, in]."""
        own = self.own_copies().tensors
        if len(indices) == len(own[0]):
            return FastWeights(tuple(new))
        index = torch.tensor(indices, device=own[0].device)
        return FastWeights(
            tuple(old.index_copy(0, index.to(old.device), fresh) for old, fresh in zip(own, new, strict=True))
        )


def linear(layer: nn.Module, x: torch.Tensor, fast: FastMatrix | None = None) -> torch.Tensor:
    """`layer(x)` plus the row's own difference.

    Args:
        layer: anything that maps [B, T, in] to [B, T, out].
        x: [B, T, in].

    Raises:
        ValueError: a gradient is wanted that the layer does not pass on.
    """
    if fast is not None and fast.whole:
        return row_products(x, fast.weights)
    plain = fast is not None and fast.rows is None and x.shape[1] >= FOLD_FROM_TOKENS
    if plain and is_plain(layer, fast.weights.dtype):
        # One product with W + dW instead of two; under autocast it is cast as W alone would be.
        return row_products(x, layer.weight + fast.weights)
    output = layer(x)
    if x.requires_grad and torch.is_grad_enabled() and not output.requires_grad:
        raise ValueError(
            f"A {type(layer).__module__}.{type(layer).__name__} passes no gradient on, so that nothing can be learned "
            "through it: leave the suffix blocks and `lm_head` (for training all blocks) as they were, or "
            "read with `test_time_training=False`."
        )
    return output if fast is None else output + fast.linear(x.to(output.dtype))


def row_products(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """x [B, T, in] times weights [B, out, in], row by row: [B, T, out].

    Written as (W x^T)^T, because then the gradient of the weights is laid out as they are, and a step of descent is
    one pass over contiguous memory.
    """
    return torch.bmm(weights, x.mT).mT


def is_plain(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether reading `layer.weight` is the same as calling the layer: no adapter, hook, quantisation or shard."""
    return (
        type(layer) is nn.Linear
        and layer.bias is None
        and type(layer.weight) in (nn.Parameter, torch.Tensor)
        and layer.weight.dtype == dtype
        and not layer.weight.is_meta
        and "forward" not in vars(layer)
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)
    )
