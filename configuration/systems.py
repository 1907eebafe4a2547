"""The registry of systems: what the paper compares, in one YAML file. A new system is a new entry."""

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.dataclasses import strict

from .presets import preset_names
from .reading import build_strictly, read_mapping

SYSTEMS = Path(__file__).with_name("systems.yaml")


@strict
@dataclass
class System:
    """One column of a comparison.

    Attributes:
        name: for command lines and files.
        label: for tables and plots.
        preset_suffix: what follows the size in the name of its model preset; empty for TTT-E2E's own.
        training: fields of the configuration that differ from the preset's while training.
        evaluation: arguments of the model's forward while evaluating.
    """

    name: str
    label: str
    preset_suffix: str
    training: dict
    evaluation: dict


def load_systems(path: Path = SYSTEMS) -> dict[str, System]:
    """All systems by name, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a field is unknown, missing or of the wrong type.
    """
    systems = {}
    for name, fields in read_mapping(path).items():
        source = f"{path}, system {name}"
        if not isinstance(fields, dict):
            raise ValueError(f"{source} must hold a mapping of fields to values, but holds {fields!r}")
        optional = {"training": {}, "evaluation": {}}
        systems[name] = build_strictly(System, {"name": name} | optional | fields, source=source)
    return systems


def system_preset(system: str, size: str) -> str:
    """The model preset of a system at a size, for `load_config`.

    Args:
        system: a name out of `load_systems()`, for example "mamba2".
        size: for example "125m".

    Raises:
        ValueError: there is no such system, no such size, or the system has no preset of that size; the message names
            the nearest.
    """
    systems, presets = load_systems(), preset_names()
    if system not in systems:
        raise ValueError(f"system={system!r}: no such system; {_nearest(system, systems)}")
    suffix = systems[system].preset_suffix
    sizes = [name.removesuffix(suffix) for name in presets if name.endswith(suffix)]
    sizes = [name for name in sizes if "-" not in name]
    if size not in sizes:
        raise ValueError(f"size={size!r}: no such size of {system!r}; {_nearest(size, sizes)}")
    return size + suffix


def _nearest(name: str, known: Collection[str]) -> str:
    similar = difflib.get_close_matches(name, known, n=1)
    listed = f"choose one of {', '.join(known)}"
    return f"did you mean {similar[0]!r}? Otherwise {listed}" if similar else listed
