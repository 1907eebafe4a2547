"""The cache of a [`TTTLayersModel`]: what its blocks learned and keep, under transformers' name `cache`.

Its size does not depend on how much was read, except in `full_attention` blocks: inner weights and running sums, the
last inputs of the convolutions, windows of keys and values, and counters.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import Cache

from .checks import check_repeats, selected_rows
from .growing import owned


class TTTLayersCache(Cache):
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

    is_compileable = False
    is_croppable = False

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

    def __copy__(self) -> "TTTLayersCache":
        return self.fork()

    def __deepcopy__(self, memo) -> "TTTLayersCache":
        return self.fork()

    def __getstate__(self) -> dict:
        """Without the memory behind a tensor, in which forks may have gone on."""
        return {**self.__dict__, "states": map_tensors(torch.Tensor.clone, self.states)}

    def fork(self) -> "TTTLayersCache":
        """An independent cache with the same content; costs no memory until either reads on."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    @property
    def is_linear(self) -> list[bool]:
        """Per block: transformers need not know where the new tokens of a longer sequence begin. False for all, because
        what is read twice is learned twice."""
        return [False] * self.config.num_hidden_layers

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before anything is read."""
        return len(self.tokens) if self.is_initialized else -1

    @property
    def is_initialized(self) -> bool:
        return self.states is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in all_tensors(self.states))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read so far, padding included."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no longest text."""
        return -1

    def to(self, device: torch.device | str) -> "TTTLayersCache":
        """Move all tensors, in place; returns itself."""
        self.states = map_tensors(lambda tensor: tensor.to(device), self.states)
        return self

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (ids, or a bool per row), in that order."""
        if not self.is_initialized:
            return
        rows = selected_rows(indices, self.batch_size)
        kept = torch.tensor(rows)
        self.states = map_tensors(lambda tensor: tensor.index_select(0, kept.to(tensor.device)), self.states)
        self.tokens = tuple(self.tokens[row] for row in rows)
        self.next_positions = tuple(self.next_positions[row] for row in rows)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, for beams or several answers to one prompt."""
        check_repeats(repeats)
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Only 0 (nothing) is possible: what is learned cannot be unlearned. Fork the cache before reading instead."""
        if tokens_to_remove:
            raise NotImplementedError(
                f"crop({tokens_to_remove}): what was learned cannot be rolled back. Keep a `fork()` from before."
            )


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
