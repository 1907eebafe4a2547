"""The folder that is pushed to the Hub: it asks for what the package asks for, and holds all that it needs."""

import os
import runpy
import subprocess
import sys
import zipfile

import pytest
import yaml
from packaging.requirements import Requirement

from ..tools.packaged import DESCRIBED, ROOT

TOOL = runpy.run_path(str(ROOT / "tools" / "space.py"))
LOCK = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line)


def test_it_asks_for_what_setup_py_asks_for():
    lines = (ROOT / "spaces" / "requirements.txt").read_text().splitlines()
    asked = [Requirement(line) for line in lines if not line.startswith(("#", "--"))]
    described = [*DESCRIBED.install_requires, *DESCRIBED.extras_require["app"]]
    assert asked == [Requirement(text) for text in described]


def test_its_front_matter_is_that_of_a_space():
    _, front, text = (ROOT / "spaces" / "README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["sdk"] == "gradio" and facts["sdk_version"] == LOCK["gradio"]
    assert (ROOT / "spaces" / facts["app_file"]).is_file() and text.strip()


def test_it_holds_the_package_and_the_weights(tmp_path):
    wheel = tmp_path / "package.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("ttt_e2e/__init__.py", "")
    TOOL["lay_out_space"](tmp_path / "space", wheel)
    TOOL["lay_out_space"](tmp_path / "space", wheel)
    there = {path.relative_to(tmp_path / "space").as_posix() for path in (tmp_path / "space").rglob("*")}
    weights = {f"ttt_e2e/model_cards/checkpoints/{name}" for name in ("smollm2-135m-ttt/prime_model.safetensors",)}
    weights.add("ttt_e2e/model_cards/checkpoints/tiny-standard-library/model.safetensors")
    assert {"app.py", "README.md", "requirements.txt", "ttt_e2e/__init__.py", *weights} <= there
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something that is no Space"):
        TOOL["lay_out_space"](tmp_path / "other", wheel)
    assert (tmp_path / "other" / "thesis.txt").exists()


@pytest.mark.slow  # it builds a wheel and loads a model
def test_it_runs_where_the_package_is_not_installed(tmp_path):
    pytest.importorskip("gradio")
    subprocess.run([sys.executable, str(ROOT / "tools" / "space.py"), str(tmp_path / "space")], check=True)
    script = (
        "import app, ttt_e2e; print(ttt_e2e.__file__); from ttt_e2e.app import shipped_models; "
        "print(shipped_models([]).names)"
    )
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tmp_path / "space"), "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "space", env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "space") in done.stdout and "tiny-standard-library" in done.stdout
