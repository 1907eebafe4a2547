"""Checkpoint folders of a run: which of them are complete, whether they fit the model, and whether the disk has room.

A checkpoint counts only once its manifest is there: a file with size and SHA-256 of all others, written last, under a
temporary name first. A run that is killed while it saves leaves a folder without one, which is never resumed from.
"""

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..conversion.prime_weights import BASE_SKETCHES, PRIME_CONFIG
from ..storage.disk import follow_umask
from ..storage.manifest import damage, has_sizes, write_manifest

logger = logging.get_logger(__name__)

MANIFEST, ADAPTER_CONFIG = "complete.json", "adapter_config.json"
# Beside an adapter: its model's configuration. As config.json it would make the folder look like a whole model.
BASE_CONFIG = "base_config.json"
ADAPTER_SETTINGS = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")
# Settings that training may change, or that say where a model comes from and not what it is.
NOT_COMPARED = {
    "transformers_version", "dtype", "use_cache", "architectures", "_name_or_path", "auto_map",
    "inner_checkpoint_every", "inner_checkpoint_offload",
}  # fmt: skip


def compared_settings(config: PreTrainedConfig) -> dict:
    """The fields of a configuration that tell whether two models are the same, as plain values."""
    settings = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in settings.items() if name not in NOT_COMPARED}


def complete_checkpoint(folder: Path) -> None:
    """Declare a checkpoint complete, once all its files are on the disk; its files are readable as the umask says."""
    follow_umask(folder)
    write_manifest(folder, MANIFEST)


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint was saved to its end and still has all files at their size; before use see `damage`."""
    return has_sizes(folder, MANIFEST)


def check_resumable(folder: Path, compared: bool = False) -> None:
    """Check that a checkpoint holds all that a run needs to go on.

    Args:
        compared: every byte of it has just been compared with its manifest.

    Raises:
        ValueError: it is incomplete or damaged, or was saved without the optimizer.
    """
    found = None if compared else damage(folder, MANIFEST)
    if found is not None:
        raise ValueError(
            f"resume_from_checkpoint={str(folder)!r}: the checkpoint is incomplete or damaged ({found}); give an "
            "earlier one, or True for the last whole one."
        )
    if not any(folder.glob("optimizer*")):
        raise ValueError(
            f"resume_from_checkpoint={str(folder)!r}: it was saved without its optimizer (save_only_model), which "
            "would begin anew: load the folder as a model and begin a new run."
        )


def checkpoint_folders(run_folder: Path) -> list[Path]:
    """Folders `checkpoint-N` of a run, complete or not, in order of N."""
    steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(run_folder).glob("checkpoint-*")}
    return sorted((path for path in steps if steps[path] and path.is_dir()), key=checkpoint_step)


def checkpoint_step(folder: Path) -> int:
    """The outer step after which a checkpoint was saved."""
    return int(folder.name.removeprefix("checkpoint-"))


def last_whole_checkpoint(run_folder: Path) -> Path | None:
    """The checkpoint of the most steps of which every byte is as it was saved, with a warning about damaged ones.

    Returns:
        None where no checkpoint was saved to its end.

    Raises:
        ValueError: all that were saved to their end are damaged.
    """
    damaged = {}
    for path in reversed(checkpoint_folders(run_folder)):
        found = damage(path, MANIFEST)
        if found is None:
            if damaged:
                logger.warning(f"{_listed(damaged)}; going back to {path.name}, the last whole checkpoint.")
            return path
        if (path / MANIFEST).is_file():
            damaged[path] = found
    if damaged:
        raise ValueError(
            f"output_dir={str(run_folder)!r} holds no complete checkpoint: {_listed(damaged)}. Restore the files "
            "from a copy, or start a new run in another folder. Nothing was overwritten."
        )
    return None


def _listed(damaged: dict[Path, str]) -> str:
    return ", ".join(f"{path.name} is damaged ({found})" for path, found in damaged.items())


def last_complete_checkpoint(run_folder: Path) -> Path | None:
    """The checkpoint of the most steps that was saved to its end, by the sizes of its files; or None."""
    return next((path for path in reversed(checkpoint_folders(run_folder)) if is_complete(path)), None)


def check_same_model(folder: Path, model: torch.nn.Module) -> None:
    """Check that a checkpoint belongs to a model like this one: by configuration, adapter and shapes of weights.

    Raises:
        ValueError: naming the first difference.
    """
    differences = chain(
        _configuration_differences(folder, model),
        _adapter_differences(folder, model),
        _shape_differences(folder, model),
    )
    for name, saved, own in differences:
        raise ValueError(
            f"{folder} is the checkpoint of another model: its {name} is {saved}, but this model's is {own}. Resume "
            "with the model that the run began with, or start a new run."
        )


def _configuration_differences(folder: Path, model: torch.nn.Module) -> Iterator[tuple[str, object, object]]:
    files = [folder / name for name in ("config.json", BASE_CONFIG, PRIME_CONFIG)]
    file, config = next((file for file in files if file.is_file()), None), getattr(model, "config", None)
    if file is None or config is None:
        return
    saved, own = json.loads(file.read_text(encoding="utf-8")), compared_settings(config)
    saved = saved.get("config", saved)
    for name in sorted(saved.keys() & own.keys()):
        if saved[name] != own[name]:
            yield name, saved[name], own[name]


def _adapter_differences(folder: Path, model: torch.nn.Module) -> Iterator[tuple[str, object, object]]:
    file, adapters = folder / ADAPTER_CONFIG, getattr(model, "peft_config", None)
    if file.is_file() != (adapters is not None):
        kinds = ("the whole model", "an adapter")
        yield "trained part", kinds[file.is_file()], kinds[adapters is not None]
    elif adapters is not None:
        saved = json.loads(file.read_text(encoding="utf-8"))
        own = next(iter(adapters.values())).to_dict()
        for name in ADAPTER_SETTINGS:
            before, now = (_ordered(settings.get(name)) for settings in (saved, own))
            if before != now:
                yield name, before, now


def _shape_differences(folder: Path, model: torch.nn.Module) -> Iterator[tuple[str, object, object]]:
    shapes = {_adapter_key(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    whole = not (folder / ADAPTER_CONFIG).is_file()  # an adapter may rename the other modules that it saves
    for file in sorted({*folder.glob("*.safetensors")} - {folder / BASE_SKETCHES}):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                shape = tuple(tensors.get_slice(name).get_shape())
                if shapes.get(name, None if whole else shape) != shape:
                    yield f"shape of {name}", shape, shapes.get(name, "missing")


def _ordered(value: object) -> object:
    return sorted(value) if isinstance(value, list | set | tuple) else value


def checkpoint_bytes(model: torch.nn.Module, saves_frozen: bool = True) -> int:
    """About what a checkpoint takes on the disk: weights, AdamW's two moments, and a hundredth for the rest.

    Args:
        saves_frozen: the weights that are not trained are among those that are saved.
    """
    frozen = int(saves_frozen)
    total = sum(p.numel() * p.element_size() * (3 if p.requires_grad else frozen) for p in model.parameters())
    return total + total // 100 + 2**20


def _adapter_key(name: str) -> str:
    """The name under which a PEFT adapter saves a parameter; other names are their own."""
    return re.sub(r"\.default(?=\.|$)", "", name) if "lora_" in name else name
