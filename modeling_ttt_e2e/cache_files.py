"""Learned contexts as files: `context.safetensors` and `context.json` in a folder of their own.

The json holds the counters, checksums of everything, and a fingerprint of the weights, adapters and settings that read
the text: under any others the keys, values and fast weights would be noise. A checksum finds damage, not forgery: see
`context_schema` for what is believed.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from .context import LearnedContext, Pending
from .context_schema import (
    Header,
    check_description,
    check_fingerprint,
    check_headers,
    check_values,
    header_limit,
)
from .fast_weights import FastWeights
from .fingerprints import fingerprint, settings_fingerprint
from .sinks import Past

FORMAT = 2
TENSORS, COUNTERS = "context.safetensors", "context.json"
PENDING = ("inputs", "ids", "positions")
LONGEST_DESCRIPTION = 4 * 2**20  # bytes: counters of tens of thousands of rows


def save_context(folder: Path, context: LearnedContext, counters: dict, model: torch.nn.Module) -> None:
    """Write a context; the folder appears whole or not at all, and an older context in it is replaced.

    Raises:
        ValueError: the folder holds something else.
    """
    if folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - {TENSORS, COUNTERS}):
        raise ValueError(f"`folder` ({folder}) holds other files: name a folder of its own for the learned context.")
    tensors = {}
    for index, past in enumerate(context.past_key_values):
        if past is not None:
            tensors[f"keys.{index}"], tensors[f"values.{index}"] = past.joined()
    fast = None if context.fast is None else context.fast.used_copies()
    if fast is not None:
        tensors |= {f"fast.{index}": tensor for index, tensor in enumerate(fast.tensors)}
    width = max(context.pending_counts)
    if width:
        tensors |= {f"pending.{name}": getattr(context.pending, name)[:, :width] for name in PENDING}
    data = save({name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()})
    description = {
        "format": FORMAT,
        "fingerprint": fingerprint(model),
        "tokens": context.tokens,
        "next_positions": context.next_positions,
        "fast_rows": None if fast is None else fast.rows or tuple(range(context.rows)),
        "pending_counts": context.pending_counts if width else None,
        **counters,
        "tensors": hashlib.sha256(data).hexdigest(),
    }
    description["checksum"] = checksum(description)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        (new / TENSORS).write_bytes(data)
        (new / COUNTERS).write_text(json.dumps(description, indent=1))
        _exchange(folder, new, Path(temporary) / "old")


def checksum(description: dict) -> str:
    """SHA-256 of all that the json says beside it, that of the tensor file included."""
    text = json.dumps({k: v for k, v in description.items() if k != "checksum"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _exchange(folder: Path, new: Path, old: Path) -> None:
    """Put `new` in the place of `folder`; when that fails, what was there comes back."""
    existed = folder.exists()
    if existed:
        os.replace(folder, old)
    try:
        os.replace(new, folder)
    except BaseException:
        if existed:
            os.replace(old, folder)
        raise


def load_context(folder: Path, model: torch.nn.Module) -> tuple[LearnedContext, dict]:
    """Read a context and its counters, checked against `model` and moved to its device.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or holds what no reading leaves behind, or the weights, the adapters at work or
            the configuration differ.
    """
    for name in (TENSORS, COUNTERS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"`folder` ({folder}) holds no learned context: {name} is missing.")
    with _as_damage(folder):
        description = _read_description(folder / COUNTERS)
    _check_format(folder, description["format"])
    with _as_damage(folder):
        if description["checksum"] != checksum(description):
            raise ValueError(f"{COUNTERS} does not match its checksum")
        check_fingerprint(description["fingerprint"])
    _check_reader(folder, description["fingerprint"], settings_fingerprint(model))
    config = model.config
    with _as_damage(folder):
        check_description(description, config)
        check_headers(_read_headers(folder / TENSORS, header_limit(config)), description, config)
        data = (folder / TENSORS).read_bytes()
        if hashlib.sha256(data).hexdigest() != description["tensors"]:
            raise ValueError(f"{TENSORS} does not match its checksum")
        tensors = load(data)
        check_values(tensors, description, config)
    _check_reader(folder, description["fingerprint"], fingerprint(model))
    tensors = {name: tensor.to(model.device) for name, tensor in tensors.items()}
    return _context(tensors, description, config), description


@contextmanager
def _as_damage(folder: Path) -> Iterator[None]:
    """What is wrong with the files, as an error that names the folder and the remedy."""
    try:
        yield
    except (ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(
            f"The learned context in {folder} is damaged ({error}): read the text again and save it anew."
        ) from error


def _read_description(path: Path) -> dict:
    """The json: any dictionary with a number as its format, a checksum and a fingerprint."""
    with path.open("rb") as file:
        text = file.read(LONGEST_DESCRIPTION + 1)
    if len(text) > LONGEST_DESCRIPTION:
        raise ValueError(f"{COUNTERS} is longer than {LONGEST_DESCRIPTION} bytes")
    description = json.loads(text)
    if not isinstance(description, dict):
        raise ValueError(f"{COUNTERS} holds a {type(description).__name__} instead of fields")
    missing = {"format", "checksum", "fingerprint"} - description.keys()
    if missing or not isinstance(description["format"], int):
        raise ValueError(f"{COUNTERS} lacks {sorted(missing)}" if missing else "`format` is no number")
    return description


def _check_format(folder: Path, found: int) -> None:
    if found == FORMAT:
        return
    reason = f"this code reads {FORMAT}"
    if found == 1:
        reason = "which does not say which adapters were at work while it was read"
    raise ValueError(
        f"The learned context in {folder} has format {found}, {reason}: read the text again and save it anew."
    )


def _check_reader(folder: Path, found: dict[str, str], own: dict[str, str]) -> None:
    """Check that the model is the one that read, as far as `own`, its fingerprint or a part of it, tells."""
    adapters = (
        f"other adapters at work than `model` has (then: {found['adapters'][:200]}; now: {own['adapters'][:200]}): "
        "activate, scale and merge them as they were, in the same layers, or read the text again."
    )
    differences = {
        "config": "another configuration than `model` has: load the model that read it, or read the text again.",
        "adapters": adapters,
        "adapted_layers": adapters,
        "weights": "other weights than `model` has, or the same in another dtype: load the model that read it, as it "
        "was then (as with dtype='bfloat16'), or read the text again.",
    }
    for part, what in differences.items():
        if part in own and found[part] != own[part]:
            raise ValueError(f"The learned context in {folder} was read with {what}")


def _read_headers(path: Path, limit: int) -> dict[str, Header]:
    """Shapes and dtypes of a safetensors file, whose library checks that the file is exactly as long as they say."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > limit:
        raise ValueError(f"the header of {TENSORS} claims {size} bytes, more than the {limit} it can need")
    with safe_open(path, framework="pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: Header(tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}


def _context(tensors: dict[str, torch.Tensor], description: dict, config) -> LearnedContext:
    rows, counts = description["fast_rows"], description["pending_counts"]
    fast = pending = None
    if rows is not None:
        own = rows == list(range(len(rows)))
        names = sorted((name for name in tensors if name.startswith("fast.")), key=lambda name: int(name[5:]))
        fast = FastWeights(tuple(tensors[name] for name in names), None if own else tuple(rows))
    if counts is not None:
        pending = Pending(tuple(counts), *(tensors[f"pending.{name}"] for name in PENDING))
    return LearnedContext(
        tokens=tuple(description["tokens"]),
        next_positions=tuple(description["next_positions"]),
        past_key_values=tuple(
            Past.of_joined(
                (tensors[f"keys.{index}"], tensors[f"values.{index}"]),
                config.num_sink_tokens if kind == "sliding_attention" else 0,
            )
            for index, kind in enumerate(config.layer_types)
        ),
        fast=fast,
        pending=pending,
    )
