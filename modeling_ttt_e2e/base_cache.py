"""What the caches of models that learn while they read share: forks, rows, and that nothing read can be unread."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from transformers import Cache

from .checks import check_repeats, selected_rows


class LearnedCache(Cache):
    """A cache whose tensors are detached and replaced, never written in place, so that copies are free.

    Args:
        config: the model's configuration.

    Attributes:
        columns: positions read so far, padding included; transformers' `get_seq_length()`.
    """

    is_compileable = False
    is_croppable = False
    config: Any
    columns: int

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before anything is read."""
        raise NotImplementedError

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows of what was read, in that order."""
        raise NotImplementedError

    def __copy__(self) -> Self:
        return self.fork()

    def __deepcopy__(self, memo) -> Self:
        return self.fork()

    def fork(self) -> Self:
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
    def is_initialized(self) -> bool:
        return self.batch_size >= 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions read so far, padding included."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no longest text."""
        return -1

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (ids, or a bool per row), in that order."""
        if self.is_initialized:
            rows = selected_rows(indices, self.batch_size)
            if rows != list(range(self.batch_size)):
                self.keep_rows(rows)

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
