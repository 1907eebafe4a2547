"""The type checker sees the whole package, across its folders."""

import runpy
import shutil
import subprocess
import sys

import pytest

from .packaged import DESCRIBED, ROOT

LAY_OUT = runpy.run_path(str(ROOT / "tools" / "package_path.py"))["lay_out"]
# By the file it is added to: what it gets wrong of another folder, and the line that mypy shall find.
PLANTED = {
    "evaluation/perplexity.py": ("from ..data import collate_rows", "collate_rows([], lenght=3)", "[call-arg]"),
    "cli/train.py": ("from ttt_e2e.storage.disk import read_json", "read_json(path=3, remedy='')", "[arg-type]"),
    "training/run.py": ("from .. import TTTE2ECache", "TTTE2ECache.from_pretrained()", "[call-arg]"),
}


def check(folder):
    """Lines of mypy over a copy of the package. What it knows of other packages it keeps in the clone."""
    LAY_OUT(folder / "package", root=folder)
    cache = ["--cache-dir", str(ROOT / ".mypy_cache")]
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *cache, "package/ttt_e2e"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return [line for line in done.stdout.splitlines() if ": error:" in line]


@pytest.mark.slow  # without what `make types` has kept it takes most of a minute
def test_wrong_arguments_across_folders_are_errors(tmp_path):
    for name in {*DESCRIBED.package_dir.values()}:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "checkpoints"))
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    assert check(tmp_path) == []
    for name, (line, wrong, _) in PLANTED.items():
        with open(tmp_path / name, "a") as file:
            file.write(f"\n{line}\n{wrong}\n")
    errors = check(tmp_path)
    for name, (_, _, said) in PLANTED.items():
        assert [error for error in errors if f"{name}:" in error and said in error], (name, errors)
