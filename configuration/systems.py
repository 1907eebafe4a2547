"""The registry of systems: what the paper compares, in one YAML file. A new system is a new entry."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.dataclasses import strict

from .strict_yaml import build_strictly, read_mapping

SYSTEMS = Path(__file__).with_name("systems.yaml")


@strict
@dataclass
class System:
    """One column of a comparison.

    Attributes:
        name: for command lines and files.
        label: for tables and plots.
        preset_suffix: what follows the size in the name of its model preset; empty for TTT-E2E's own.
        description: of its presets, in which `{size}` stands for the size; empty for TTT-E2E's own.
        model: fields of the configuration that differ from TTT-E2E's of the same size.
        training: fields of the configuration that differ from the preset's while training.
        evaluation: arguments of the model's forward while evaluating.
    """

    name: str
    label: str
    preset_suffix: str
    description: str
    model: dict
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
        optional = {"description": "", "model": {}, "training": {}, "evaluation": {}}
        systems[name] = build_strictly(System, {"name": name} | optional | fields, source=source)
    return systems
