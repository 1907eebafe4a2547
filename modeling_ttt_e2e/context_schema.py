"""What the files of a learned context may hold: every field, shape and number, as the configuration allows them.

A file may come from a stranger, and everybody who has the weights can forge its checksums. So nothing in it is trusted:
the description is checked first, then the header of the tensors against it, and their values last.
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from .checks import END_OF_POSITIONS, shown

FINGERPRINT = {"weights", "config", "adapters", "adapted_layers"}
FIELDS = {
    "format",
    "fingerprint",
    "tokens",
    "next_positions",
    "fast_rows",
    "pending_counts",
    "columns",
    "finished",
    "padding_id",
    "tensors",
    "checksum",
}
MOST_COLUMNS = 2**40  # more than anybody reads; masks have one entry for each
# The product of two larger numbers is infinite in float32, as a gated MLP would find.
LARGEST = torch.finfo(torch.float32).max ** 0.5
SAVED_STATES, SAVED_DIFFERENCES, SAVED_INDICES = ("F16", "BF16", "F32", "F64"), ("F32", "F64"), ("I32", "I64")
# Rounding: relative, and per step the error of adding a difference to the slow weights and taking those away again.
RELATIVE_ERROR, ERROR_OF_A_STEP = 0.01, 0.01


@dataclass(frozen=True)
class Header:
    """A tensor as the header of a safetensors file describes it."""

    shape: tuple[int, ...]
    dtype: str


def check_fingerprint(found: Any) -> None:
    """Check that a fingerprint is one of `fingerprints.fingerprint`, whatever it says.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(found, dict) or set(found) != FINGERPRINT or not all(isinstance(v, str) for v in found.values()):
        raise ValueError(f"`fingerprint` must be texts named {sorted(FINGERPRINT)}, got {shown(found)}")


def check_description(description: dict[str, Any], config) -> None:
    """Check all that the json says, but for its checksums and the fingerprint.

    Args:
        description: any dictionary.
        config: the model's configuration.

    Raises:
        ValueError: naming the field, its value, and what it may be.
    """
    _check_names("fields", description, FIELDS)
    _check_integer("columns", description["columns"], 1, MOST_COLUMNS)
    tokens = description["tokens"]
    if not isinstance(tokens, list) or not tokens:
        raise ValueError(f"`tokens` must be a list with an entry for each row, got {shown(tokens)}")
    rows = len(tokens)
    _check_rows("tokens", tokens, [(0, description["columns"])] * rows)
    _check_rows("next_positions", description["next_positions"], [(count, END_OF_POSITIONS) for count in tokens])
    if description["fast_rows"] is not None:
        _check_rows("fast_rows", description["fast_rows"], [(0, rows - 1)] * rows)
        copies = set(description["fast_rows"])
        if copies != set(range(len(copies))) or not config.num_suffix_layers:
            raise ValueError(f"`fast_rows` must name copies 0, 1, ... without a gap, got {shown(copies)}")
    if description["pending_counts"] is not None:
        largest = config.mini_batch_size if config.num_suffix_layers else 0
        _check_rows("pending_counts", description["pending_counts"], [(0, min(largest, count)) for count in tokens])
        if not any(description["pending_counts"]):
            raise ValueError("`pending_counts` must be null where no token is pending, got zeros")
    _check_end(description, rows, config.vocab_size)


def _check_end(description: dict[str, Any], rows: int, vocab_size: int) -> None:
    finished, padding_id = description["finished"], description["padding_id"]
    if finished is not None and (
        not isinstance(finished, list) or len(finished) != rows or not all(isinstance(end, bool) for end in finished)
    ):
        raise ValueError(f"`finished` must be null or true or false for each of {rows} rows, got {shown(finished)}")
    if padding_id is not None or finished is not None:
        _check_integer("padding_id", padding_id, 0, vocab_size - 1)


def header_limit(config) -> int:
    """The longest header, in bytes, that the tensors of a context can need."""
    return 1024 + 512 * (2 * config.num_hidden_layers + 3 * config.num_suffix_layers + 3)


def check_headers(headers: dict[str, Header], description: dict[str, Any], config) -> None:
    """Check names, shapes and dtypes of the tensors against a checked description.

    Raises:
        ValueError: naming the tensor, what it is, and what it must be.
    """
    expected = _keys_and_values(headers, description, config)
    if description["fast_rows"] is not None:
        copies = max(description["fast_rows"]) + 1
        width = config.prime_intermediate_size if config.use_prime_mlp else config.intermediate_size
        up, down = (copies, width, config.hidden_size), (copies, config.hidden_size, width)
        shapes = (up, up, down)[config.inner_matrices] * config.num_suffix_layers
        expected |= {f"fast.{index}": (shape, SAVED_DIFFERENCES) for index, shape in enumerate(shapes)}
    if description["pending_counts"] is not None:
        shape = (len(description["tokens"]), max(description["pending_counts"]))
        expected["pending.inputs"] = ((*shape, config.hidden_size), SAVED_STATES)
        expected |= {f"pending.{name}": (shape, SAVED_INDICES) for name in ("ids", "positions")}
    _check_names("tensors", headers, set(expected))
    for name, (shape, dtypes) in expected.items():
        header = headers[name]
        if header.shape != shape or header.dtype not in dtypes:
            raise ValueError(
                f"the tensor `{name}` is {header.dtype} {list(header.shape)}, but must be {' or '.join(dtypes)} "
                f"{list(shape)}"
            )


def _keys_and_values(headers: dict[str, Header], description: dict[str, Any], config) -> dict[str, tuple]:
    """Keys and values of every block, with as many tokens as the header says, within what can be kept."""
    tokens, expected = description["tokens"], {}
    channels = config.head_dim if config.use_attention else 0
    for index, kind in enumerate(config.layer_types):
        # Rows that stand at different places of their mini-batches add up to a mini-batch of empty places to a call.
        low, high = max(tokens), description["columns"] * (1 + config.mini_batch_size)
        if kind == "sliding_attention":
            window = config.sliding_window - 1
            pending = config.mini_batch_size if index > config.num_prefix_layers else 0
            sinks = config.num_sink_tokens
            low, high = sinks + min(low, window), sinks + min(high, window + pending)
        shape = headers[f"keys.{index}"].shape if f"keys.{index}" in headers else ()
        kept = min(max(shape[2], low), high) if len(shape) == 4 else low
        for name in ("keys", "values"):
            expected[f"{name}.{index}"] = (len(tokens), config.num_key_value_heads, kept, channels), SAVED_STATES
    return expected


def check_values(tensors: dict[str, torch.Tensor], description: dict[str, Any], config) -> None:
    """Check the numbers in tensors whose shapes are checked: finite, in range, and within what inner steps can reach.

    Raises:
        ValueError: naming the tensor, the number, and what it may be.
    """
    for name, tensor in tensors.items():
        if name == "pending.ids":
            _check_range(name, tensor, 0, config.vocab_size - 1)
        elif name == "pending.positions":
            _check_range(name, tensor, 0, END_OF_POSITIONS - 1)
        else:
            _check_range(name, tensor, -LARGEST, LARGEST)
    if description["fast_rows"] is not None and config.inner_max_grad_norm:
        _check_distances(tensors, description, config)
    if description["pending_counts"] is not None:
        _check_pending_positions(tensors["pending.positions"], description)


def _check_distances(tensors: dict[str, torch.Tensor], description: dict[str, Any], config) -> None:
    """A step moves a row's fast weights by at most the learning rate times the norm that gradients are clipped to."""
    fast = [tensor for name, tensor in tensors.items() if name.startswith("fast.")]
    norms = [torch.linalg.vector_norm(tensor.flatten(1), dim=1, dtype=torch.float64) for tensor in fast]
    distances = torch.linalg.vector_norm(torch.stack(norms), dim=0).tolist()
    step = config.inner_learning_rate * config.inner_max_grad_norm * (1 + RELATIVE_ERROR) + ERROR_OF_A_STEP
    for row, (copy, tokens) in enumerate(zip(description["fast_rows"], description["tokens"], strict=True)):
        steps = max(tokens - 1, 0) // config.mini_batch_size
        if not distances[copy] <= steps * step:
            raise ValueError(
                f"the fast weights of row {row} have a joint norm of {distances[copy]:.3g}, but {steps} inner steps, "
                f"all that {tokens} tokens allow, reach at most {steps * step:.3g}"
            )


def _check_pending_positions(positions: torch.Tensor, description: dict[str, Any]) -> None:
    rows = zip(positions.tolist(), description["pending_counts"], description["next_positions"], strict=True)
    for row, (places, count, following) in enumerate(rows):
        own = [*places[:count], following]
        if any(later <= earlier for earlier, later in pairwise(own)):
            raise ValueError(f"`pending.positions` of row {row} must grow and end before {following}, got {own[:-1]}")


def _check_names(kind: str, found: Collection[str], wanted: set[str]) -> None:
    missing, unknown = sorted(wanted - set(found)), sorted(set(found) - wanted)
    if missing:
        raise ValueError(f"the {kind} {shown(missing)} are missing")
    if unknown:
        raise ValueError(f"the {kind} {shown(unknown)} are unknown")


def _check_integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"`{name}` must be an integer from {low} to {high}, got {shown(value)}")


def _check_rows(name: str, values: Any, bounds: list[tuple[int, int]]) -> None:
    if not isinstance(values, list) or len(values) != len(bounds):
        raise ValueError(f"`{name}` must be a list with an entry for each of {len(bounds)} rows, got {shown(values)}")
    for row, (value, (low, high)) in enumerate(zip(values, bounds, strict=True)):
        _check_integer(f"{name}[{row}]", value, low, high)


def _check_range(name: str, tensor: torch.Tensor, low: float, high: float) -> None:
    if not tensor.numel():
        return
    least, most = (bound.item() for bound in torch.aminmax(tensor))
    if not (low <= least and most <= high):
        wrong = most if low <= least else least
        raise ValueError(f"the tensor `{name}` holds {wrong}, but its numbers must lie from {low:.6g} to {high:.6g}")
