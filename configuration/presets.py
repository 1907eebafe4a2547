"""Model presets: the fields of a model's configuration in a YAML file, checked by name when they are loaded.

A file may name the configuration's `model_type` (default: `ttt_e2e`) and the preset that it is a variation of,
`base: 125m`; its own fields come over those of the base. A base of another model type gives the fields that both
types have. `layer_types` and `mixer_types` may be one type, for all blocks, or `{repeat: [...]}`, from the first block
to the last.
"""

import dataclasses
from pathlib import Path

from transformers import PreTrainedConfig

from .. import RecurrentHybridConfig, TTTE2EConfig, TTTLayersConfig
from .reading import check_field_names, file_names, first_comment, merged, named_file, read_mapping

MODEL_FOLDER = Path(__file__).with_name("models")
CONFIG_CLASSES = {each.model_type: each for each in (TTTE2EConfig, RecurrentHybridConfig, TTTLayersConfig)}
TYPES_BY_BLOCK = ("layer_types", "mixer_types")


def preset_names() -> list[str]:
    """Names that `load_preset` and `load_config` know, sorted."""
    return file_names(MODEL_FOLDER)


def load_config(name_or_path: str) -> PreTrainedConfig:
    """The configuration of a model preset, of the class that its `model_type` names.

    Args:
        name_or_path: a name out of `preset_names()`, for example "125m-mamba2", or the path of a YAML file of yours.

    Raises:
        ValueError: as `load_preset`, or the fields contradict one another.
        StrictDataclassFieldValidationError: a field has the wrong type.
    """
    fields = load_preset(name_or_path)
    return _config_class(fields, source=name_or_path)(**fields)


def load_preset(name: str) -> dict:
    """Fields of a model preset, as `load_config` builds a configuration from them.

    Args:
        name: a name out of `preset_names()`, for example "125m", or the path of a YAML file of yours.

    Returns:
        The fields, `model_type` among them where the file names it; the others are those of a `TTTE2EConfig`.

    Raises:
        ValueError: no such preset, an unknown `model_type`, or the file holds a field that its configuration does not
            have. (The configuration itself would keep an unknown field without a word, so that a misspelt one would
            have no effect.)
    """
    path = named_file(name, MODEL_FOLDER, "model preset")
    fields = _read(path)
    config_class = _config_class(fields, source=str(path))
    base = fields.pop("base", None)
    if base is not None:
        if base not in preset_names():
            raise ValueError(f"{path}: base={base!r} is no model preset; choose one of {', '.join(preset_names())}")
        base_fields = _read(named_file(base, MODEL_FOLDER, "model preset"))
        if "base" in base_fields:
            raise ValueError(f"{path}: base={base!r} has a base itself; use that one, {base_fields['base']!r}")
        if _config_class(base_fields, source=base) is not config_class:
            known = _field_names(config_class)
            base_fields = {field: value for field, value in base_fields.items() if field in known}
        fields = merged(base_fields, fields)
    blocks = fields.get("num_hidden_layers", config_class.num_hidden_layers)
    for field in TYPES_BY_BLOCK:
        if field in fields:
            fields[field] = _for_all_blocks(fields[field], blocks, source=f"{path}, {field}")
    return fields


def preset_description(name: str) -> str:
    """First comment line of a preset's file: what it is for."""
    return first_comment(named_file(name, MODEL_FOLDER, "model preset"))


def _read(path: Path) -> dict:
    fields = read_mapping(path)
    known = _field_names(_config_class(fields, source=str(path)))
    check_field_names(fields, [*known, "base", "model_type"], source=str(path))
    return fields


def _config_class(fields: dict, source: str) -> type[PreTrainedConfig]:
    model_type = fields.get("model_type", TTTE2EConfig.model_type)
    if model_type not in CONFIG_CLASSES:
        raise ValueError(f"{source}: model_type={model_type!r} is unknown; choose one of {', '.join(CONFIG_CLASSES)}")
    return CONFIG_CLASSES[model_type]


def _field_names(config_class: type[PreTrainedConfig]) -> list[str]:
    return [field.name for field in dataclasses.fields(config_class)]


def _for_all_blocks(types: object, blocks: int, source: str) -> object:
    """One type, or a pattern to repeat, as a list with one type per block."""
    if isinstance(types, str):
        return [types] * blocks
    if not isinstance(types, dict):
        return types
    pattern = types.get("repeat")
    if list(types) != ["repeat"] or not isinstance(pattern, list) or not pattern:
        raise ValueError(f"{source}: {types!r} must be a list, one type, or {{repeat: [type, ...]}}")
    return [pattern[index % len(pattern)] for index in range(blocks)]
