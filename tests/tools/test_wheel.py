"""The wheel holds every file of the package's folders, and works without them."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .packaged import DESCRIBED, LEFT_OUT, ROOT, copy_sources


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the repository, and unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    copy_sources(folder / "clone")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    subprocess.run([*command, folder / "clone"], check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_it_holds_every_file(wheel):
    for package, name in DESCRIBED.package_dir.items():
        files = [path.relative_to(ROOT / name) for path in (ROOT / name).rglob("*") if path.is_file()]
        files = [path for path in files if not set(LEFT_OUT) & set(path.parts)]
        there = wheel / package.replace(".", "/")
        assert not [str(path) for path in files if not (there / path).is_file()], name


def test_its_metrics_load(wheel, tmp_path):
    script = (
        "import evaluate, ttt_e2e\n"
        "from ttt_e2e.evaluation import metric_path\n"
        "print(ttt_e2e.__file__)\n"
        "print(evaluate.load(metric_path('token_perplexity')).compute(losses=[[0.5, 1.5]])['loss'])\n"
    )
    variables = os.environ | {"PYTHONPATH": str(wheel), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    where, loss = done.stdout.split()
    assert Path(where).is_relative_to(wheel) and loss == "1.0"


@pytest.mark.slow  # it installs, trains nothing, but starts the commands one after the other
def test_a_release_is_built_and_tried_out(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "release.py"), "--output", str(tmp_path / "dist")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.suffix for path in (tmp_path / "dist").iterdir()) == [".gz", ".whl"]
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode != 0 and "not empty" in again.stderr
