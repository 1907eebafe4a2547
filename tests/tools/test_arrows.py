"""Every folder of the package builds on those before it and knows nothing of those behind it."""

import ast

import pytest

from .packaged import DESCRIBED, ROOT

ORDER = (
    "storage ttt_e2e configuration data conversion loading training evaluation model_cards serving app benchmarks cli"
).split()
FOLDERS = {package.removeprefix("ttt_e2e."): folder for package, folder in DESCRIBED.package_dir.items()}


def imported(path, package):
    """The packages of ours that a file imports from."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        first, *below = (node.module or "").split(".")
        if node.level == 2 or (node.level == 0 and first == "ttt_e2e"):
            name = first if node.level else next(iter(below), "")
            yield name if name in ORDER else "ttt_e2e"
        elif node.level == 1:
            yield package


def test_every_folder_has_its_place():
    assert {*ORDER, "ttt_e2e_cli"} == FOLDERS.keys()


@pytest.mark.parametrize("package", ORDER)
def test_arrows_go_one_way(package):
    known = ORDER[: ORDER.index(package) + 1]
    files = (ROOT / FOLDERS[package]).glob("*.py")
    assert not {(path.name, other) for path in files for other in imported(path, package) if other not in known}


def test_no_two_folders_or_files_give_one_name_to_two_things():
    """Public functions and classes; commands of the command line are named by what is typed."""
    where = {}
    for package in ORDER[:-1]:
        for path in (ROOT / FOLDERS[package]).glob("*.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    where.setdefault(node.name, []).append(f"{FOLDERS[package]}/{path.name}")
    assert not {name: paths for name, paths in where.items() if len(paths) > 1}
