"""Model presets: the fields of a `TTTE2EConfig` in a YAML file, checked by name when they are loaded."""

import dataclasses
from pathlib import Path

from .. import TTTE2EConfig
from .reading import check_field_names, read_mapping

MODEL_FOLDER = Path(__file__).with_name("models")


def preset_names() -> list[str]:
    """Names that `load_preset` knows, sorted."""
    return sorted(path.stem for path in MODEL_FOLDER.glob("*.yaml"))


def load_preset(name: str) -> dict:
    """Fields of a model preset, ready for `TTTE2EConfig(**load_preset(name))`.

    Args:
        name: a name out of `preset_names()`, for example "125m".

    Raises:
        ValueError: no such preset, or the file holds a field that `TTTE2EConfig` does not have. (The configuration
            itself would keep an unknown field without a word, so that a misspelt one would have no effect.)
    """
    path = _preset_path(name)
    fields = read_mapping(path)
    check_field_names(fields, [field.name for field in dataclasses.fields(TTTE2EConfig)], source=str(path))
    return fields


def preset_description(name: str) -> str:
    """First comment line of a preset's file: what it is for."""
    return _preset_path(name).read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def _preset_path(name: str) -> Path:
    path = MODEL_FOLDER / f"{name}.yaml"
    if name not in preset_names():
        raise ValueError(f"name={name!r}: no such model preset; choose one of {', '.join(preset_names())}")
    return path
