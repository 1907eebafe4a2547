"""Model presets: the fields of a `TTTE2EConfig` in a YAML file, checked by name when they are loaded.

A file may name the preset that it is a variation of, `base: 125m`; its own fields come over those of the base. And
`layer_types` may be one type, for all blocks.
"""

import dataclasses
from pathlib import Path

from .. import TTTE2EConfig
from .reading import check_field_names, file_names, first_comment, merged, named_file, read_mapping

MODEL_FOLDER = Path(__file__).with_name("models")


def preset_names() -> list[str]:
    """Names that `load_preset` knows, sorted."""
    return file_names(MODEL_FOLDER)


def load_preset(name: str) -> dict:
    """Fields of a model preset, ready for `TTTE2EConfig(**load_preset(name))`.

    Args:
        name: a name out of `preset_names()`, for example "125m", or the path of a YAML file of yours.

    Raises:
        ValueError: no such preset, or the file holds a field that `TTTE2EConfig` does not have. (The configuration
            itself would keep an unknown field without a word, so that a misspelt one would have no effect.)
    """
    path = named_file(name, MODEL_FOLDER, "model preset")
    fields = _read(path)
    base = fields.pop("base", None)
    if base is not None:
        if base not in preset_names():
            raise ValueError(f"{path}: base={base!r} is no model preset; choose one of {', '.join(preset_names())}")
        base_fields = _read(named_file(base, MODEL_FOLDER, "model preset"))
        if "base" in base_fields:
            raise ValueError(f"{path}: base={base!r} has a base itself; use that one, {base_fields['base']!r}")
        fields = merged(base_fields, fields)
    if isinstance(fields.get("layer_types"), str):
        blocks = fields.get("num_hidden_layers", TTTE2EConfig.num_hidden_layers)
        fields["layer_types"] = [fields["layer_types"]] * blocks
    return fields


def preset_description(name: str) -> str:
    """First comment line of a preset's file: what it is for."""
    return first_comment(named_file(name, MODEL_FOLDER, "model preset"))


def _read(path: Path) -> dict:
    fields = read_mapping(path)
    known = [field.name for field in dataclasses.fields(TTTE2EConfig)]
    check_field_names(fields, [*known, "base"], source=str(path))
    return fields
