"""Reading YAML files strictly: a misspelt field is an error that names the field it was meant to be."""

import dataclasses
import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import MISSING
from pathlib import Path

import yaml
from huggingface_hub.dataclasses import type_validator
from huggingface_hub.errors import StrictDataclassError

LISTED_FIELDS = 30  # an error lists the known fields if they are no more than these


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with numbers and truth values as in YAML 1.2: 1e-3 is a number, and `no` and `off` are strings."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, source: str):
    """The value of a YAML text.

    Args:
        source: where the text comes from, for the message.

    Raises:
        ValueError: the text is no YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not valid YAML: {error}") from error


def read_mapping(path: Path) -> dict:
    """Contents of a YAML file that must hold a mapping.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no YAML, or holds something other than a mapping.
    """
    contents = parse_yaml(path.read_text(encoding="utf-8"), source=str(path))
    if not isinstance(contents, dict):
        raise ValueError(f"{path} must hold a mapping of fields to values, but holds a {type(contents).__name__}")
    return contents


def file_names(folder: Path) -> list[str]:
    """Names of the YAML files of a folder, without their endings, sorted."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def named_file(name: str, folder: Path, kind: str) -> Path:
    """The file of a built-in name, or the file at a path.

    Args:
        name: the name of a file in `folder` without its ending, or any path that ends in .yaml or .yml.
        kind: what the file holds, for the message.

    Raises:
        ValueError: there is neither.
    """
    check_name(name, file_names(folder), kind)
    return Path(name) if is_path(name) else folder / f"{name}.yaml"


def read_with_bases(path: Path, folder: Path, kind: str) -> list[tuple[Path, dict]]:
    """A file's fields behind those of the file that it names as its `base`, if any, which may name one in turn.

    Args:
        folder, kind: of the bases, as `named_file` takes them.

    Raises:
        ValueError: a base is no name of a file, or one of the files that go on from it.
    """
    found: list[tuple[Path, dict]] = []
    while True:
        fields = read_mapping(path)
        base = fields.pop("base", None)
        found.insert(0, (path, fields))
        if base is None:
            return found
        if not isinstance(base, str):
            raise ValueError(f"{path}: base={base!r} must be the name of a {kind} or the path of a .yaml file")
        further = named_file(base, folder, kind)
        if any(further.resolve() == known.resolve() for known, _ in found):
            raise ValueError(f"{path}: base={base!r} goes on from this file; name another one")
        path = further


def check_name(name: str, built_in: Collection[str], kind: str) -> None:
    """Check that a name is built in, or the path of a file that is there.

    Raises:
        ValueError: it is neither; `kind` is what was looked for.
    """
    if is_path(name) and not Path(name).is_file():
        raise ValueError(f"name={name!r}: no such file; give the path of a {kind}, or one of the built-in names")
    if not is_path(name) and name not in built_in:
        raise ValueError(
            f"name={name!r}: no such {kind}; choose one of {', '.join(built_in)}, or give the path of a .yaml file"
        )


def is_path(name: str) -> bool:
    """Whether a name is the path of a file of the user's, and no built-in name."""
    return name.endswith((".yaml", ".yml"))


def first_comment(path: Path) -> str:
    """The comment in the first line of a file; empty when it is none."""
    first, *_ = path.read_text(encoding="utf-8").splitlines() or [""]
    return first.lstrip("# ") if first.startswith("#") else ""


def merged(fields: Mapping, changes: Mapping) -> dict:
    """`fields` with `changes` over them; a mapping over a mapping is merged in the same way."""
    result = dict(fields)
    for name, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = merged(result[name], value) if both else value
    return result


def check_field_names(
    fields: Collection[str], known: Collection[str], source: str, required: Collection[str] = ()
) -> None:
    """Raise a ValueError for the first field that is not `known`, or for a `required` one that is missing.

    Args:
        source: where the fields come from, for the message: a file, or a file and a section.
    """
    for field in fields:
        if field not in known:
            raise ValueError(f"{source}: unknown field {field!r}; {_remedy(str(field), known)}")
    missing = [field for field in required if field not in fields]
    if missing:
        raise ValueError(f"{source}: missing field {missing[0]!r}; add it to the file")


def _remedy(field: str, known: Collection[str]) -> str:
    similar = difflib.get_close_matches(field, known, n=1)
    if similar:
        return f"did you mean {similar[0]!r}?"
    if len(known) <= LISTED_FIELDS:
        return f"known fields: {', '.join(sorted(known))}"
    return f"the nearest of {len(known)} fields: {', '.join(difflib.get_close_matches(field, known, cutoff=0.0))}"


def check_field_types(fields: Mapping, types: Mapping[str, object], source: str) -> None:
    """Raise a ValueError for the first field whose value is not of its type; an int will do for a float.

    Args:
        types: the types of those fields that are to be checked.
    """
    for field, value in fields.items():
        if field not in types:
            continue
        try:
            type_validator(field, value, types[field])
        except TypeError as error:
            if type(value) is int and _accepts_float(field, float(value), types[field]):
                continue
            raise ValueError(f"{source}: {error}") from error


def _accepts_float(field: str, value: float, expected: object) -> bool:
    try:
        type_validator(field, value, expected)
    except TypeError:
        return False
    return True


def build_strictly(kind: type, fields: object, source: str):
    """An instance of a strict dataclass from nested mappings; fields without a default are required.

    Raises:
        ValueError: a field is unknown, missing or of the wrong type.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f"{source} must hold a mapping of fields to values, but holds {fields!r}")
    declared = {field.name: field for field in dataclasses.fields(kind)}
    required = [name for name, field in declared.items() if field.default is field.default_factory is MISSING]
    check_field_names(fields, declared, source=source, required=required)
    values = {}
    for name, value in fields.items():
        kind_of_field = declared[name].type
        if isinstance(kind_of_field, type) and dataclasses.is_dataclass(kind_of_field):
            value = build_strictly(kind_of_field, value, source=f"{source}, section {name}")
        values[name] = value
    try:
        return kind(**values)
    except StrictDataclassError as error:
        raise ValueError(f"{source}: {error}") from error
