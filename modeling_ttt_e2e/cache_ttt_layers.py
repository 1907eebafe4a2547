"""The cache of a [`TTTLayersModel`]: what its blocks learned and keep, under transformers' name `cache`.

Its size does not depend on how much was read, except in `full_attention` blocks: inner weights and running sums, the
last inputs of the convolutions, windows of keys and values, and counters.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .base_cache import LearnedCache
from .growing import owned


class TTTLayersCache(LearnedCache):
    """What a batch of rows has read; pass it as `cache` and read on.

    Everything in it is detached, and tensors are replaced, never written in place: copies are free, and gradients of
    an earlier call are not disturbed.

    Args:
        config: the model's configuration.

    Attributes:
        states: per block what its mixer returned, nested tuples of tensors with the rows on the first axis; None
            before anything is read.
        tokens: tokens read, per row; empty before anything is read.
        next_positions: position id of each row's next token.
        columns: positions read, padding included; transformers' `get_seq_length()`.
    """

    def __init__(self, config):
        self.config = config
        super().__init__(layers=[])
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.states: tuple[Any, ...] | None = None
        self.tokens: tuple[int, ...] = ()
        self.next_positions: tuple[int, ...] = ()
        self.columns = 0

    def store(
        self, states: tuple[Any, ...], tokens: tuple[int, ...], next_positions: tuple[int, ...], length: int
    ) -> None:
        """Take over what a model has read, with `length` more positions."""
        # Tensors made in inference mode could not be saved for a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            self.states = map_tensors(owned, states)
        self.tokens, self.next_positions = tokens, next_positions
        self.columns += length

    def __len__(self) -> int:
        return 0 if self.states is None else len(self.states)

    def __repr__(self) -> str:
        return f"TTTLayersCache(columns={self.columns}, batch_size={self.batch_size})"

    def __getstate__(self) -> dict:
        """Without the memory behind a tensor, in which forks may have gone on."""
        return {**self.__dict__, "states": map_tensors(torch.Tensor.clone, self.states)}

    @property
    def batch_size(self) -> int:
        return -1 if self.states is None else len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in all_tensors(self.states))

    def to(self, device: torch.device | str) -> "TTTLayersCache":
        """Move all tensors, in place; returns itself."""
        self.states = map_tensors(lambda tensor: tensor.to(device), self.states)
        return self

    def keep_rows(self, rows: Sequence[int]) -> None:
        kept = torch.tensor(rows)
        self.states = map_tensors(lambda tensor: tensor.index_select(0, kept.to(tensor.device)), self.states)
        self.tokens = tuple(self.tokens[row] for row in rows)
        self.next_positions = tuple(self.next_positions[row] for row in rows)


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], states: Any) -> Any:
    """Nested tuples with `function` applied to every tensor; None and named tuples stay what they are."""
    if states is None:
        return None
    if isinstance(states, torch.Tensor):
        return function(states)
    parts = [map_tensors(function, part) for part in states]
    return type(states)(*parts) if hasattr(states, "_fields") else tuple(parts)


def all_tensors(states: Any) -> Iterator[torch.Tensor]:
    """Every tensor of nested tuples."""
    if isinstance(states, torch.Tensor):
        yield states
    elif states is not None:
        for part in states:
            yield from all_tensors(part)


__all__ = ["TTTLayersCache"]
