"""From the columns of a padded batch to its rows' tokens, aligned left, and back.

Axis letters: B batch rows, N columns of the call, T tokens of the longest row, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .cache_ttt_layers import TTTLayersCache
from .checks import check_positions, real_columns
from .context import gather_columns
from .layout import AttentionWriter, attention_writers, follow_gradient


@dataclass(frozen=True)
class TokenColumns:
    """The tokens of a call.

    Attributes:
        tokens: [B, T, D] their embeddings.
        positions: [1 or B, T] their position ids.
        counts: tokens of each row.
        starts: position id of each row's next token before the call.
        real: [B, N] bool, which columns hold a token; None when all do.
        where: [B, T] the column of each token; None likewise.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    counts: tuple[int, ...]
    starts: tuple[int, ...]
    real: torch.Tensor | None
    where: torch.Tensor | None

    @classmethod
    def of(
        cls,
        embeddings: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        columns_read: int,
        starts: tuple[int, ...],
    ) -> "TokenColumns":
        """Check the arguments of a call and move its tokens to the left.

        Args:
            embeddings: [B, N, D].
            attention_mask, position_ids: as in [`TTTLayersModel.forward`].
            columns_read: columns of earlier calls.
            starts: position id of each row's next token.

        Raises:
            ValueError: the mask has another shape, or positions do not grow along a row's tokens.
        """
        rows, columns = shape = tuple(embeddings.shape[:2])
        device, where, counts = embeddings.device, None, (columns,) * rows
        real = real_columns(attention_mask, shape, columns_read)
        if real is not None:
            counts = tuple(real.sum(dim=1).tolist())
            # A call of nothing but padding reads one column of it, for the shapes of its outputs.
            where = real.logical_not().long().argsort(dim=1, stable=True)[:, : max(1, *counts)]
            embeddings = gather_columns(embeddings, where)
        if position_ids is not None:
            positions = check_positions(position_ids, real, shape, starts)
            positions = positions if where is None else positions.gather(1, where)
        else:
            first = starts[:1] if len(set(starts)) == 1 else starts
            positions = torch.tensor(first, device=device)[:, None] + torch.arange(embeddings.shape[1], device=device)
        return cls(embeddings, positions, counts, starts, real, where)

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def counts_in(self, start: int, end: int) -> tuple[int, ...]:
        """Tokens of each row among tokens start to end - 1."""
        return tuple(min(max(count - start, 0), end - start) for count in self.counts)

    def next_positions(self) -> tuple[int, ...]:
        """Position id of each row's next token after the call."""
        last = torch.tensor(self.counts, device=self.positions.device)[:, None] - 1
        found = self.positions.expand(len(self.counts), -1).gather(1, last.clamp_min(0)).squeeze(1).tolist()
        rows = zip(self.starts, self.counts, found, strict=True)
        return tuple(position + 1 if count else start for start, count, position in rows)

    def restore(self, tokens: torch.Tensor) -> torch.Tensor:
        """Values of tokens [B, T, ...] -> of columns [B, N, ...], zero at padding."""
        if self.real is None:
            return tokens
        index = (self.real.long().cumsum(dim=1) - 1).clamp_min(0)
        padding = ~self.real.view(*self.real.shape, *[1] * (tokens.dim() - 2))
        return gather_columns(tokens, index).masked_fill(padding, 0.0)

    def restore_followed(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """As `restore` of consecutive parts, with the gradient of the tokens: see `layout.follow_gradient`."""
        tokens = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        state = self.restore(tokens)
        if state is not tokens:
            follow_gradient(state, tokens, lambda own, gradient: own.copy_(self.restore(gradient)))
        return state

    def attention_writers(
        self, config, attention_mask: torch.Tensor | None, tokens_before: Sequence[int], columns_read: int
    ) -> dict[int, AttentionWriter]:
        """Collectors of attention weights by the index of their block."""
        columns, device = self.tokens.shape[1] if self.real is None else self.real.shape[1], self.tokens.device
        return attention_writers(config, self.real, attention_mask, tokens_before, columns_read, columns, device)


def check_cache(cache: TTTLayersCache | None, rows: int | None, config) -> None:
    """Refuse a cache that is not one of this model's, or has not `rows` rows (None: any number).

    Raises:
        TypeError: it is of another kind.
        ValueError: it holds another number of rows, or what another configuration has read.
    """
    if cache is None:
        return
    if not isinstance(cache, TTTLayersCache):
        raise TypeError(
            f"`cache` is a {type(cache).__name__}; this model needs a TTTLayersCache, because it also has to "
            "keep what was learned. Make one with TTTLayersCache(model.config), or leave it to generate(). (Prefix "
            "tuning of PEFT makes caches of keys and values, which not all blocks have: use LoRA or prompt tuning.)"
        )
    if cache.is_initialized and rows is not None and cache.batch_size != rows:
        raise ValueError(
            f"`cache` holds {cache.batch_size} rows but the inputs have {rows}: use "
            "`batch_repeat_interleave` or `batch_select_indices` on the cache."
        )
    if cache.config is not config and cache.config.context_settings() != config.context_settings():
        raise ValueError("`cache` belongs to a model of another configuration: read the text with this one.")
