"""Model presets: the fields of a model's configuration, checked by name when they are loaded.

The built-in ones combine two tables: `sizes.yaml` (TTT-E2E at each size) and `systems.yaml` (how the others differ from
it). `125m` is TTT-E2E's own, `125m-mamba2` that of another system.

A YAML file of yours may name the configuration's `model_type` (default: `ttt_e2e`) and the size that it is a variation
of, `base: 125m`; its own fields come over those of the base. A base of another model type gives the fields that both
types have. `layer_types` and `mixer_types` may be one type, for all blocks, or `{repeat: [...]}`, from the first block
to the last.
"""

import copy
import dataclasses
import difflib
from collections.abc import Collection
from functools import cache
from pathlib import Path

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .. import TTTE2EConfig
from ..registration import CONFIGURATIONS
from .strict_yaml import build_strictly, check_field_names, check_name, first_comment, is_path, merged, read_mapping
from .systems import System, load_systems

SIZES = Path(__file__).with_name("sizes.yaml")
TYPES_BY_BLOCK = ("layer_types", "mixer_types")


@strict
@dataclasses.dataclass
class Size:
    """A row of the table of sizes.

    Attributes:
        description: of TTT-E2E at this size.
        model: fields of TTT-E2E's configuration.
        systems: by the name of another system, fields that differ at this size.
    """

    description: str
    model: dict
    systems: dict


@cache
def load_sizes() -> dict[str, Size]:
    """All sizes by name, in the order of the file."""
    rows = read_mapping(SIZES).items()
    return {name: build_strictly(Size, fields, source=f"{SIZES}, size {name}") for name, fields in rows}


@cache
def _built_in() -> dict[str, tuple[str, System | None]]:
    """By the name of a preset, its size and its system; None for TTT-E2E's own."""
    others = [system for system in load_systems().values() if system.preset_suffix]
    presets = {size: (size, None) for size in load_sizes()}
    return presets | {size + system.preset_suffix: (size, system) for size in load_sizes() for system in others}


def preset_names() -> list[str]:
    """Names that `load_preset` and `load_config` know, sorted."""
    return sorted(_built_in())


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
        The fields, `model_type` among them where it is named; the others are those of a `TTTE2EConfig`.

    Raises:
        ValueError: no such preset, an unknown `model_type`, or a field that the configuration does not have. (The
            configuration itself would keep an unknown field without a word, so that a misspelt one would have no
            effect.)
    """
    check_name(name, preset_names(), "model preset")
    fields = _read_file(Path(name)) if is_path(name) else _combine(*_built_in()[name])
    blocks = fields.get("num_hidden_layers", _config_class(fields, source=name).num_hidden_layers)
    for field in TYPES_BY_BLOCK:
        if field in fields:
            fields[field] = _for_all_blocks(fields[field], blocks, source=f"{name}, {field}")
    return fields


def preset_description(name: str) -> str:
    """What a preset is for; of a file of yours, the comment in its first line.

    Raises:
        ValueError: there is no such preset.
    """
    check_name(name, preset_names(), "model preset")
    if is_path(name):
        return first_comment(Path(name))
    size, system = _built_in()[name]
    return load_sizes()[size].description if system is None else system.description.format(size=size)


def system_preset(system: str, size: str) -> str:
    """The model preset of a system at a size, for `load_config`.

    Args:
        system: a name out of `load_systems()`, for example "mamba2".
        size: for example "125m".

    Raises:
        ValueError: there is no such system, or no such size; the message names the nearest.
    """
    systems = load_systems()
    if system not in systems:
        raise ValueError(f"system={system!r}: no such system; {_nearest(system, systems)}")
    if size not in load_sizes():
        raise ValueError(f"size={size!r}: no such size of {system!r}; {_nearest(size, load_sizes())}")
    return size + systems[system].preset_suffix


def _combine(size: str, system: System | None) -> dict:
    """The fields of a built-in preset."""
    row = load_sizes()[size]
    fields = _checked(row.model, source=f"{SIZES}, size {size}")
    if system is None:
        return fields
    changes = merged(system.model, row.systems.get(system.name, {}))
    return _varied(fields, _checked(changes, source=f"system {system.name} of size {size}"))


def _read_file(path: Path) -> dict:
    """The fields of a file, over those of its base."""
    fields = _checked(read_mapping(path), source=str(path), also=("base",))
    base = fields.pop("base", None)
    if base is None:
        return fields
    if base not in _built_in():
        raise ValueError(f"{path}: base={base!r} is no model preset; choose one of {', '.join(load_sizes())}")
    size, system = _built_in()[base]
    if system is not None:
        raise ValueError(f"{path}: base={base!r} has a base itself; use that one, {size!r}")
    return _varied(_combine(size, None), fields)


def _varied(base: dict, changes: dict) -> dict:
    """`changes` over the fields of `base` that their configuration has."""
    known = _field_names(_config_class(changes, source="model preset"))
    return merged({field: value for field, value in base.items() if field in known}, changes)


def _checked(fields: dict, source: str, also: Collection[str] = ()) -> dict:
    """A copy of the fields, all of which their configuration has."""
    known = _field_names(_config_class(fields, source))
    check_field_names(fields, [*known, "model_type", *also], source=source)
    return copy.deepcopy(fields)


def _config_class(fields: dict, source: str) -> type[PreTrainedConfig]:
    model_type = fields.get("model_type", TTTE2EConfig.model_type)
    if model_type not in CONFIGURATIONS:
        raise ValueError(f"{source}: model_type={model_type!r} is unknown; choose one of {', '.join(CONFIGURATIONS)}")
    return CONFIGURATIONS[model_type]


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


def _nearest(name: str, known: Collection[str]) -> str:
    similar = difflib.get_close_matches(name, known, n=1)
    listed = f"choose one of {', '.join(known)}"
    return f"did you mean {similar[0]!r}? Otherwise {listed}" if similar else listed
