"""The code of a Hub folder: the small modules that a model needs, joined into a few files.

    configuration_X.py   the module of the configuration, and what it needs
    modeling_X.py        all the rest, each module behind those that it needs
    others               modules that are imported within `try`, as they are

The Hub sends every file by itself, and who is to trust the code of a folder wants to read it from top to bottom.
"""

import ast
import builtins
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

WIDTH = 120


@dataclass(frozen=True)
class Module:
    """A source file, taken apart.

    Attributes:
        name: without its ending.
        text: of the whole file; docstring: its own; body: without docstring, `__all__` and imports from beside.
        needs: what it imports from modules beside it, by their names; optional: those that it imports within `try`.
        names: what it defines or imports from elsewhere, with where that comes from.
        listed: what `__all__` names.
    """

    name: str
    text: str
    docstring: str
    body: str
    needs: dict[str, list[str]]
    optional: set[str]
    names: dict[str, str]
    listed: list[str]


def joined_code(configuration: Path, modeling: Path) -> dict[str, str]:
    """The text of each file of code, by its name.

    Args:
        configuration, modeling: the files of the configuration's class and of the models' classes.

    Raises:
        ValueError: the modules of a file use one name for two things or two for one, or one that may be missing needs
            another.
    """
    modules = {path.stem: _take_apart(path) for path in needed_files([configuration, modeling])}
    optional = sorted({name for module in modules.values() for name in module.optional})
    for name in optional:
        if modules[name].needs:
            raise ValueError(f"{name}.py is imported within `try`, but imports others; these would come too late")
    first = _all_needed(configuration.stem, modules)
    files = {name: configuration.stem if name in first else modeling.stem for name in modules if name not in optional}
    order = TopologicalSorter({name: sorted(modules[name].needs) for name in files}).static_order()
    groups: dict[str, list[Module]] = {configuration.stem: [], modeling.stem: []}
    for name in order:
        groups[files[name]].append(modules[name])
    joined = {f"{name}.py": _join(modules[name], group, files) for name, group in groups.items()}
    return joined | {f"{name}.py": modules[name].text for name in optional}


def needed_files(entries: Iterable[Path]) -> list[Path]:
    """Source files, and those beside them that they import, found as transformers finds them."""
    return sorted({*entries, *(Path(found) for entry in entries for found in get_relative_import_files(entry))})


def _take_apart(path: Path) -> Module:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    docstring = ast.get_docstring(tree) or ""
    needs: dict[str, list[str]] = {}
    names, listed, taken_out = {}, [], [tree.body[0]] if docstring else []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level:
            if any(each.asname for each in node.names):
                raise ValueError(f"{path.name}, line {node.lineno}: a file has one name for a thing; leave out `as`")
            needs.setdefault(str(node.module), []).extend(each.name for each in node.names)
            taken_out.append(node)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            origin = getattr(node, "module", "")
            names |= {each.asname or each.name: f"{origin} {each.name}" for each in node.names}
        elif isinstance(node, ast.Assign) and "__all__" in _defined_by(node):
            listed = ast.literal_eval(node.value)
            taken_out.append(node)
        else:
            names |= dict.fromkeys(_defined_by(node), path.stem)
    gone = {line for node in taken_out for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    body = "\n".join(line for number, line in enumerate(text.split("\n"), 1) if number not in gone)
    inner = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level)
    optional = {str(node.module) for node in inner if node not in tree.body}
    body = body.replace("# isort: split\n", "").strip()
    return Module(path.stem, text, docstring, body, needs, optional, names, listed)


def _defined_by(node: ast.AST) -> set[str]:
    """Names of the module that a statement binds, wherever in it."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Name):
        return {node.id} if isinstance(node.ctx, ast.Store) else set()
    if isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        return set()  # these bind names for themselves
    return set().union(*map(_defined_by, ast.iter_child_nodes(node)))


def _all_needed(name: str, modules: dict[str, Module]) -> set[str]:
    return {name}.union(*(_all_needed(other, modules) for other in modules[name].needs))


def _join(named: Module, group: Sequence[Module], files: dict[str, str]) -> str:
    """The text of the file that has the name of one of its modules; `files` says where each module is."""
    names: dict[str, str] = {}
    for module in group:
        imported = {name: other for other, needed in module.needs.items() for name in needed}
        for name, origin in [*module.names.items(), *imported.items()]:
            if names.setdefault(name, origin) != origin or name in vars(builtins):
                raise ValueError(f"{name!r} in {module.name}.py means another thing in {named.name}.py; rename it")
    written = "Written by `ttt-e2e export` from " + ", ".join(f"{module.name}.py" for module in group) + "."
    title = '"""' + named.docstring.splitlines()[0] + "\n\n" + textwrap.fill(written, WIDTH) + '\n"""'
    listed = sorted({name for module in group for name in module.listed})
    return "\n\n\n".join([title, *(_section(module, files) for module in group), f"__all__ = {listed}"]) + "\n"


def _section(module: Module, files: dict[str, str]) -> str:
    """A module as a part of a file, in which most of what it imports from beside it stands further up."""
    beside = {other: names for other, names in module.needs.items() if files[other] != files[module.name]}
    imports = [f"from .{files[other]} import ({', '.join(names)})\n" for other, names in beside.items()]
    docstring = "\n".join(f"# {line}".rstrip() for line in [f"{module.name}.py", "", *module.docstring.splitlines()])
    return f"# {'-' * (WIDTH - 2)}\n{docstring}\n\n{''.join(imports)}{module.body}"
