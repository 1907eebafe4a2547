"""Learned contexts as files: `context.safetensors` and `context.json` in a folder of their own.

The json holds the counters, a checksum of everything, and a fingerprint of the slow weights and the configuration that
read the text: under any other weights the keys, values and fast weights would be noise.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from .context import LearnedContext, Pending
from .fast_weights import FastWeights

FORMAT = 1
TENSORS, COUNTERS = "context.safetensors", "context.json"


def fingerprint(model: torch.nn.Module) -> dict[str, str]:
    """SHA-256 of all weights (names, shapes, dtypes, bytes) and of the settings that shape a learned context."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            raise ValueError(f"The weight `{name}` is offloaded and cannot be fingerprinted: load the model whole.")
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    text = json.dumps(model.config.context_settings(), sort_keys=True)
    return {"weights": digest.hexdigest(), "config": hashlib.sha256(text.encode()).hexdigest()}


def save_context(folder: Path, context: LearnedContext, counters: dict, model: torch.nn.Module) -> None:
    """Write a context; the folder appears whole or not at all, and an older context in it is replaced.

    Raises:
        ValueError: the folder holds something else.
    """
    if folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - {TENSORS, COUNTERS}):
        raise ValueError(f"`folder` ({folder}) holds other files: name a folder of its own for the learned context.")
    tensors = {}
    for index, history in enumerate(context.histories):
        if history is not None:
            tensors[f"keys.{index}"], tensors[f"values.{index}"] = history
    for index, tensor in enumerate(context.fast.tensors if context.fast is not None else ()):
        tensors[f"fast.{index}"] = tensor
    if context.pending is not None:
        pending = context.pending
        tensors |= {
            "pending.inputs": pending.inputs,
            "pending.ids": pending.ids,
            "pending.positions": pending.positions,
        }
    data = save({name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()})
    description = {
        "format": FORMAT,
        "fingerprint": fingerprint(model),
        "tokens": context.tokens,
        "next_positions": context.next_positions,
        "fast_rows": None if context.fast is None else context.fast.rows,
        "pending_counts": None if context.pending is None else context.pending.counts,
        **counters,
    }
    description["checksum"] = checksum(data, description)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        (new / TENSORS).write_bytes(data)
        (new / COUNTERS).write_text(json.dumps(description, indent=1))
        _exchange(folder, new, Path(temporary) / "old")


def checksum(data: bytes, description: dict) -> str:
    """SHA-256 of the tensor file and of all that the json says beside it."""
    text = json.dumps({k: v for k, v in description.items() if k != "checksum"}, sort_keys=True)
    return hashlib.sha256(data + text.encode()).hexdigest()


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
        ValueError: a file is damaged, or the weights or the configuration differ.
    """
    for name in (TENSORS, COUNTERS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"`folder` ({folder}) holds no learned context: {name} is missing.")
    damaged = f"The learned context in {folder} is damaged ({{}}): read the text again and save it anew."
    try:
        counters = json.loads((folder / COUNTERS).read_text())
        expected = counters["checksum"]
        if counters["format"] != FORMAT:
            raise ValueError(
                f"The learned context in {folder} has format {counters['format']}; this code reads {FORMAT}."
            )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(damaged.format(f"{COUNTERS}: {error}")) from error
    data = (folder / TENSORS).read_bytes()
    if checksum(data, counters) != expected:
        raise ValueError(damaged.format(f"{TENSORS} and {COUNTERS} do not match their checksum"))
    found, own = counters["fingerprint"], fingerprint(model)
    for part, remedy in (("config", "another configuration"), ("weights", "other weights")):
        if found[part] != own[part]:
            raise ValueError(f"The learned context in {folder} was read with {remedy} than `model` has.")
    try:
        tensors = {name: tensor.to(model.device) for name, tensor in load(data).items()}
        return _context(tensors, counters, len(model.layers)), counters
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(damaged.format(error)) from error


def _context(tensors: dict[str, torch.Tensor], counters: dict, num_layers: int) -> LearnedContext:
    histories = (
        (tensors[f"keys.{i}"], tensors[f"values.{i}"]) if f"keys.{i}" in tensors else None for i in range(num_layers)
    )
    fast = [tensors[f"fast.{i}"] for i in range(sum(name.startswith("fast.") for name in tensors))]
    rows, counts = counters["fast_rows"], counters["pending_counts"]
    pending = None
    if counts is not None:
        parts = (tensors[f"pending.{part}"] for part in ("inputs", "ids", "positions"))
        pending = Pending(tuple(counts), *parts)
    return LearnedContext(
        tokens=tuple(counters["tokens"]),
        next_positions=tuple(counters["next_positions"]),
        histories=tuple(histories),
        fast=FastWeights(tuple(fast), None if rows is None else tuple(rows)) if fast else None,
        pending=pending,
    )
