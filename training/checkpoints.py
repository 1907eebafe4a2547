"""Checkpoint folders of a run: which of them are complete, whether they fit the model, and whether the disk has room.

A checkpoint counts only once its manifest is there: a file with the sizes of all others, written last, under a
temporary name first. A run that is killed while it saves leaves a folder without one, which is never resumed from.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

MANIFEST = "complete.json"
# Settings that training may change, or that say where a model comes from and not what it is.
NOT_COMPARED = {
    "transformers_version", "dtype", "use_cache", "architectures", "_name_or_path", "auto_map",
    "inner_checkpoint_every", "inner_checkpoint_offload",
}  # fmt: skip


def write_manifest(folder: Path) -> None:
    """Declare a checkpoint complete, once all its files are on the disk."""
    files = _files(folder)
    for path in files:
        _flush(path)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    temporary = folder / f".{MANIFEST}.part"
    temporary.write_text(json.dumps({"bytes": sizes}, indent=1), encoding="utf-8")
    _flush(temporary)
    os.replace(temporary, folder / MANIFEST)
    _flush(folder)


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint was saved to its end and still has all files at their size."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["bytes"]
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def checkpoint_folders(run_folder: Path) -> list[Path]:
    """Folders `checkpoint-N` of a run, complete or not, in order of N."""
    steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(run_folder).glob("checkpoint-*")}
    return sorted((path for path in steps if steps[path] and path.is_dir()), key=lambda path: int(steps[path][1]))


def last_complete_checkpoint(run_folder: Path) -> Path | None:
    """The complete checkpoint of the most steps, or None."""
    return next((path for path in reversed(checkpoint_folders(run_folder)) if is_complete(path)), None)


def check_same_model(folder: Path, model: torch.nn.Module) -> None:
    """Check that a checkpoint belongs to a model like this one, by its configuration and the shapes of its weights.

    Raises:
        ValueError: naming the first difference.
    """
    config_file, config = folder / "config.json", getattr(model, "config", None)
    if config_file.is_file() and config is not None:
        saved = json.loads(config_file.read_text(encoding="utf-8"))
        own = json.loads(config.to_json_string(use_diff=False))
        for name in sorted(saved.keys() & own.keys() - NOT_COMPARED):
            if saved[name] != own[name]:
                raise ValueError(
                    f"{folder} is the checkpoint of another model: its {name} is {saved[name]}, but this model's is "
                    f"{own[name]}. Resume with the model that the run began with, or start a new run."
                )
    shapes = {_adapter_key(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    whole = not (folder / "adapter_config.json").is_file()  # an adapter may rename the other modules that it saves
    for name, shape in _saved_shapes(folder):
        if shapes.get(name, None if whole else shape) != shape:
            raise ValueError(
                f"{folder} is the checkpoint of another model: it has {name} of shape {shape}, but this model has "
                f"{shapes.get(name, 'no such weight')}. Resume with the model that the run began with."
            )


def checkpoint_bytes(model: torch.nn.Module) -> int:
    """About what a checkpoint takes on the disk: weights, AdamW's two moments, and a hundredth for the rest."""
    weights = {p.data_ptr() if p.device.type != "meta" else id(p): p for p in model.parameters()}.values()
    total = sum(p.numel() * p.element_size() * (3 if p.requires_grad else 1) for p in weights)
    return total + total // 100 + 2**20


def _saved_shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                yield name, tuple(tensors.get_slice(name).get_shape())


def _adapter_key(name: str) -> str:
    """The name under which a PEFT adapter saves a parameter; other names are their own."""
    return re.sub(r"\.default(?=\.|$)", "", name) if "lora_" in name else name


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk and not only in its buffer."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
