"""The code of a Hub folder is that of the package in few files, which transformers finds, and nothing is missing."""

import ast
import builtins
import dis
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files

import ttt_e2e
from ttt_e2e.model_cards.joined_code import joined_code, needed_files

KINDS = {"ttt_e2e": "TTTE2E", "ttt_layers": "TTTLayers", "recurrent_hybrid": "RecurrentHybrid"}
PACKAGE = Path(ttt_e2e.checks.__file__).parent


def sources(kind: str) -> tuple[Path, Path]:
    return PACKAGE / f"configuration_{kind}.py", PACKAGE / f"modeling_{kind}.py"


def written(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(params=KINDS)
def joined(request, tmp_path):
    """A kind, and the folder with its code."""
    return request.param, written(tmp_path / "joined", joined_code(*sources(request.param)))


def top_level(path: Path) -> set[str]:
    """Names that a file defines."""
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_all_that_is_needed_is_there_and_once(joined):
    kind, folder = joined
    apart = [name for path in needed_files(sources(kind)) for name in top_level(path)]
    together = [name for path in folder.iterdir() for name in top_level(path)]
    assert sorted(apart) == sorted(together)


def test_transformers_finds_every_file(joined):
    kind, folder = joined
    modeling = folder / f"modeling_{kind}.py"
    assert {modeling, *map(Path, get_relative_import_files(modeling))} == set(folder.iterdir())


def test_the_configuration_needs_no_model(joined):
    kind, folder = joined
    assert get_relative_import_files(folder / f"configuration_{kind}.py") == []


def test_every_name_that_a_function_uses_is_known(joined, monkeypatch):
    kind, folder = joined
    monkeypatch.syspath_prepend(folder.parent)
    (folder / "__init__.py").touch()
    for name in [name for name in sys.modules if name.split(".")[0] == folder.name]:
        del sys.modules[name]
    for path in sorted(folder.glob("[!_]*.py")):
        module = importlib.import_module(f"{folder.name}.{path.stem}")
        known = vars(module).keys() | vars(builtins).keys()
        for name in global_names(compile(path.read_text(), path, "exec")):
            assert name in known, (path.name, name)
    listed = set(importlib.import_module(f"{folder.name}.modeling_{kind}").__all__)
    assert {f"{KINDS[kind]}ForCausalLM", f"{KINDS[kind]}Model"} <= listed


def global_names(code) -> set[str]:
    """Names that functions look up outside of themselves."""
    found = {each.argval for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL"}
    return found.union(*(global_names(each) for each in code.co_consts if hasattr(each, "co_code")))


def test_a_module_keeps_its_order_its_comments_and_its_docstring(tmp_path):
    written(
        tmp_path,
        {
            "first.py": '"""What it does.\n\nAnd why."""\n\nimport math  # numbers\n\nONE = math.exp(0)  # why one\n',
            "configuration_x.py": '"""Settings."""\n\nfrom .first import ONE\n\nTWO = ONE + 1\n__all__ = ["TWO"]\n',
            "modeling_x.py": '"""A model."""\n\nfrom .configuration_x import TWO\nfrom .first import ONE\n\n'
            "try:\n    from .extra import MORE\nexcept ImportError:\n    MORE = 0\n\nTHREE = ONE + TWO\n",
            "extra.py": "MORE = 5\n",
        },
    )
    joined = joined_code(tmp_path / "configuration_x.py", tmp_path / "modeling_x.py")
    assert joined.keys() == {"configuration_x.py", "modeling_x.py", "extra.py"}
    settings = joined["configuration_x.py"]
    assert settings.index("# And why.") < settings.index("import math  # numbers") < settings.index("# why one")
    assert settings.index("# why one") < settings.index("TWO = ONE + 1") and "from .first" not in settings
    folder = written(tmp_path / "together", joined | {"__init__.py": ""})
    command = "from together import modeling_x as m; print(m.THREE, m.MORE)"
    shown = subprocess.run([sys.executable, "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["3.0", "5"] and folder.is_dir()


@pytest.mark.parametrize(
    "other, message",
    [
        ("NAME = 2\n", "'NAME' in modeling_x.py means another thing"),
        ("from os import path as NAME\n", "'NAME' in modeling_x.py means another thing"),
        ("if True:\n    NAME = 2\n", "'NAME' in modeling_x.py means another thing"),
        ("from .configuration_x import SIZE\nSIZE = 3\n", "'SIZE' in"),
        ("def sum():\n    pass\n", "'sum' in modeling_x.py means another thing"),
        ("from .first import NAME as one\n", "modeling_x.py, line 4: .* leave out `as`"),
        ("try:\n    from .extra import MORE\nexcept ImportError:\n    pass\n", "extra.py is imported within `try`"),
    ],
)
def test_what_would_go_wrong_is_refused(tmp_path, other, message):
    written(
        tmp_path,
        {
            "first.py": "NAME = 1\n",
            "extra.py": "from .first import NAME\nMORE = NAME\n",
            "configuration_x.py": '"""Settings."""\nSIZE = 1\n',
            "modeling_x.py": f'"""A model."""\n\nfrom .first import NAME\n{other}',
        },
    )
    with pytest.raises(ValueError, match=message):
        joined_code(tmp_path / "configuration_x.py", tmp_path / "modeling_x.py")
