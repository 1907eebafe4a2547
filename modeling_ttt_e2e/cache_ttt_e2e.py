"""The cache of a TTT-E2E model: a learned context under transformers' name `cache`.

Its size does not depend on how much was read: a window of keys and values, at most one pending mini-batch, and one copy
of the fast weights per sequence that has learned something of its own.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DynamicCache

from .base_cache import LearnedCache
from .cache_files import load_context, save_context
from .context import LearnedContext, keep_visible
from .fingerprints import WeightMarks
from .growing import owned
from .layers import NewStates
from .twice_differentiable import is_asynchronous


@dataclass(frozen=True)
class CachedLayer:
    """Keys and values of one block, [batch, key/value heads, kept tokens, head_dim], for inspection; those of the
    attention sinks come first."""

    keys: torch.Tensor
    values: torch.Tensor
    is_sliding: bool


class TTTE2ECache(LearnedCache):
    """What a batch of sequences has read and learned; pass it as `cache` and read on.

    Everything in it is detached. Contexts are immutable values, so `fork()` and reordering rows copy no fast weights:
    rows share theirs until they differ.

    Args:
        config: the model's configuration.

    Attributes:
        context: the [`LearnedContext`], None before anything is read.
        columns: positions read so far, padding included; transformers' `get_seq_length()`.
    """

    def __init__(self, config):
        self.config = config
        self.context: LearnedContext | None = None
        self.columns = 0
        self.finished: tuple[bool, ...] | None = None
        self.padding_id: int | None = None
        self._model: weakref.ref | None = None
        self._marks: WeightMarks | None = None
        super().__init__(layers=[])

    @classmethod
    def of_prefix(cls, prefix: DynamicCache, config) -> "TTTE2ECache":
        """Keys and values before a text, as prefix tuning learns them, in a cache of this kind; nothing is learned.

        Args:
            prefix: per block keys and values, [batch, key/value heads, length, head_dim]. Gradients reach them.

        Raises:
            ValueError: they are not those of such a model.
        """
        length = prefix.get_seq_length()
        shape = (config.num_key_value_heads, length, config.head_dim)
        found = [getattr(layer, "keys", None) for layer in prefix.layers]
        found = [None if keys is None else tuple(keys.shape[1:]) for keys in found]
        if not config.use_attention or found != [shape] * config.num_hidden_layers:
            raise ValueError(
                f"`cache` is a {type(prefix).__name__} with keys of the shapes {found}, but this model needs "
                f"{config.num_hidden_layers} times {shape} [key/value heads, length, head_dim]: make a cache with "
                "TTTE2ECache(model.config), or leave it to generate()."
            )
        rows, past_key_values = len(prefix.layers[0].keys), []
        for layer, layer_type in zip(prefix.layers, config.layer_types, strict=True):
            window, sinks = None, 0
            if layer_type == "sliding_attention":
                window, sinks = config.sliding_window - 1, config.num_sink_tokens
            new = (layer.keys, layer.values)
            past_key_values.append(keep_visible(None, NewStates(new), (0,) * rows, (length,) * rows, window, sinks))
        cache = cls(config)
        cache.context = LearnedContext((length,) * rows, (length,) * rows, tuple(past_key_values))
        cache.columns = length
        return cache

    @classmethod
    def joined(cls, caches: Sequence["TTTE2ECache"]) -> "TTTE2ECache":
        """The rows of several caches as one batch, which reads on as each of them would; these stay as they are.

        Rows may have read different numbers of tokens. `batch_select_indices` takes rows out again. The positions of
        such a cache are counted from its longest row, so that `learning_span` has no meaning for the others; give None
        or (0, 0).

        Raises:
            ValueError: there is none, one has read nothing, or has rows that ended before others.
        """
        for name, wrong in (
            ("has read nothing", [number for number, cache in enumerate(caches) if cache.context is None]),
            ("has finished rows", [number for number, cache in enumerate(caches) if cache.finished is not None]),
        ):
            if wrong:
                raise ValueError(f"`caches`: number {wrong[0]} of {len(caches)} {name}; leave it out.")
        if not caches:
            raise ValueError("`caches` is empty: give at least one.")
        cache = caches[0].fork()
        cache.context = LearnedContext.joined([each.context for each in caches])
        cache.columns = max(each.columns for each in caches)
        return cache

    @property
    def layers(self) -> list[CachedLayer]:
        if self.context is None:
            return []
        types = zip(self.config.layer_types, self.context.past_key_values, strict=True)
        return [CachedLayer(*past.joined(), kind == "sliding_attention") for kind, past in types if past is not None]

    @layers.setter
    def layers(self, value: list) -> None:
        """transformers assigns an empty list; the layers are a view of `context`."""

    def __repr__(self) -> str:
        return f"TTTE2ECache(columns={self.columns}, batch_size={self.batch_size}, learned={self.has_learned})"

    def __getstate__(self) -> dict:
        """Without the model, and without the memory behind a tensor, in which forks may have gone on."""
        context = None if self.context is None else self.context.map(torch.Tensor.clone)
        return {**self.__dict__, "_model": None, "_marks": None, "context": context}

    @property
    def batch_size(self) -> int:
        return -1 if self.context is None else self.context.rows

    @property
    def has_learned(self) -> bool:
        """Whether an inner step has been taken."""
        return self.context is not None and self.context.fast is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; fast weights that rows share count once."""
        return sum(tensor.nbytes for tensor in (self.context.tensors() if self.context else ()))

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Keys that `query_length` new tokens see, and the position of the first of them."""
        kept = 0
        if self.context is not None and self.context.past_key_values[layer_idx] is not None:
            past = self.context.past_key_values[layer_idx]
            kept = past.length + (0 if past.sinks is None else past.sinks[0].shape[2])
        return kept + query_length, self.columns - kept

    def store(self, context: LearnedContext, length: int, model: torch.nn.Module) -> None:
        """Take over a context after `length` more positions were read by the model `model`."""
        if self._model is None or self._model() is not model:
            self._model = weakref.ref(model)
            self._marks = WeightMarks.of(model)
        if self.finished is not None:
            rows = zip(self.finished, self.context.tokens, context.tokens, strict=True)
            self.finished = tuple(finished and old == new for finished, old, new in rows)
        # Tensors made in inference mode could not be saved for a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            self.context = context.map(owned)
        self.columns += length

    def mask_after_end(self, ids: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor | None:
        """Hide the padding that generate() wrote behind the end of a finished row, when reading goes on from there.

        Args:
            ids: [batch, length] new ids; token_mask: [batch, length] bool, which of them are tokens; None when all are.
        """
        if self.finished is None or self.padding_id is None:
            return token_mask
        finished = torch.tensor(self.finished, device=ids.device)[:, None]
        hidden = finished & (ids == self.padding_id).long().cumprod(dim=1).bool()
        if not is_asynchronous(hidden) and not bool(hidden.any()):
            return token_mask
        return ~hidden if token_mask is None else token_mask & ~hidden

    def reset(self) -> None:
        """Forget everything."""
        self.context, self.columns, self.finished, self.padding_id = None, 0, None, None
        self._model, self._marks = None, None

    def to(self, device: torch.device | str) -> "TTTE2ECache":
        """Move all tensors, in place; returns itself."""
        if self.context is not None:
            self.context = self.context.map(lambda tensor: tensor.to(device))
        return self

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Fast weights are shared, not copied."""
        self.context = self.context.select(rows)
        self.finished = None if self.finished is None else tuple(self.finished[row] for row in rows)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the learned context to a folder, with a fingerprint of the model's weights, adapters and configuration.

        Raises:
            ValueError: nothing was read yet, the model is gone, or its weights or adapters changed since it read.
        """
        model = None if self._model is None else self._model()
        if self.context is None:
            raise ValueError("This cache is empty: read something with it before `save_pretrained`.")
        if model is None:
            raise ValueError("The model that read this context is gone: save the context while the model is loaded.")
        self._marks.check(model)
        save_context(Path(folder), self.context, self._counters(), model)

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: torch.nn.Module) -> "TTTE2ECache":
        """Load what `save_pretrained` wrote, onto the model's device. Files of strangers may be loaded: see
        `context_schema` for what is checked.

        Args:
            model: the model whose weights read the text, or anything that wraps it.

        Raises:
            FileNotFoundError: the folder holds no learned context.
            ValueError: the files are damaged or forged, or belong to other weights, other adapters at work or another
                configuration.
        """
        reader = next((module for module in model.modules() if hasattr(module, "rotary_emb")), None)
        if reader is None:
            raise ValueError(f"`model` is a {type(model).__name__}, which holds no TTTE2EModel.")
        context, counters = load_context(Path(folder), reader)
        cache = cls(reader.config)
        cache.context = context
        cache.columns = counters["columns"]
        cache.finished = None if counters["finished"] is None else tuple(counters["finished"])
        cache.padding_id = counters["padding_id"]
        cache._model, cache._marks = weakref.ref(reader), WeightMarks.of(reader)
        return cache

    def _counters(self) -> dict:
        finished = None if self.finished is None else list(self.finished)
        return {"columns": self.columns, "finished": finished, "padding_id": self.padding_id}


__all__ = ["TTTE2ECache"]
