"""Reading YAML files strictly: a misspelt field is an error that names the field it was meant to be."""

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path

import yaml


def read_mapping(path: Path) -> dict:
    """Contents of a YAML file that must hold a mapping.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no YAML, or holds something other than a mapping.
    """
    try:
        contents = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path} must hold a mapping of fields to values, but holds a {type(contents).__name__}")
    return contents


def check_field_names(fields: Mapping, known: Collection[str], source: str, required: Collection[str] = ()) -> None:
    """Raise a ValueError for the first field that is not `known`, or for a `required` one that is missing.

    Args:
        source: where the fields come from, for the message: a file, or a file and a section.
    """
    for field in fields:
        if field not in known:
            similar = difflib.get_close_matches(str(field), known, n=1)
            remedy = f"did you mean {similar[0]!r}?" if similar else f"known fields: {', '.join(sorted(known))}"
            raise ValueError(f"{source}: unknown field {field!r}; {remedy}")
    missing = [field for field in required if field not in fields]
    if missing:
        raise ValueError(f"{source}: missing field {missing[0]!r}; add it to the file")
