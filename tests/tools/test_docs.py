"""The documentation builds with all its links and names, and the README's Python runs."""

import os
import re
import runpy
import shutil
import subprocess
import sys

import pytest

from .packaged import ROOT

LAY_OUT = runpy.run_path(str(ROOT / "tools" / "package_path.py"))["lay_out"]


def build(folder):
    """Build the site of a copy; returns what the builder says of it, or None where it is content."""
    for name in ("docs", "examples"):
        if not (folder / name).exists():
            shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "mkdocs.yml", folder)
    LAY_OUT(folder / "build" / "package")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    variables = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr


def test_the_site_builds_and_needs_nothing_from_elsewhere(tmp_path):
    assert build(tmp_path) is None
    pages = {path.relative_to(tmp_path / "site").as_posix(): path for path in (tmp_path / "site").rglob("*.html")}
    reference = pages["api/training/index.html"].read_text()
    assert 'id="ttt_e2e.training.MetaTrainer.compute_loss"' in reference
    assert "def learn(" in re.sub(r"<[^>]+>", "", pages["method/index.html"].read_text())
    fetched = r'(?:src|rel="stylesheet" href)="(https?:[^"]+)"'
    assert not [(name, url) for name, path in pages.items() for url in re.findall(fetched, path.read_text())]


@pytest.mark.parametrize(
    "wrong",
    [
        {"faq.md": "[a page](nowhere.md)", "index.md": "[a heading](training.md#nothing)"},
        {"api/model.md": "::: ttt_e2e.Nothing"},
    ],
)
def test_a_broken_link_or_name_fails(tmp_path, wrong):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for page, line in wrong.items():
        with open(tmp_path / "docs" / page, "a") as file:
            file.write(f"\n{line}\n")
    said = build(tmp_path)
    for line in wrong.values():
        assert re.search(r"nowhere\.md|#nothing|ttt_e2e\.Nothing", line).group() in said, said


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_to_files_of_the_repository_exist(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_files_that_pages_name_exist():
    """Paths in backquotes, as in `tests/modeling/test_cache.py` or `modeling_ttt_e2e/call.py`."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        named = re.findall(r"`([a-z0-9_]+(?:/[A-Za-z0-9_.-]+)+\.(?:py|yaml|md|ipynb))`", page.read_text())
        missing = [name for name in named if name.split("/")[0] in folders and not (ROOT / name).is_file()]
        assert not missing, (page.name, missing)


def test_the_first_python_of_the_readme_runs(tmp_path):
    readme = (ROOT / "README.md").read_text()
    assert "```python" in "\n".join(readme.splitlines()[:40])
    code = re.search(r"```python\n(.+?)```", readme, flags=re.DOTALL).group(1)
    for name in ("setup.py", "model_cards"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "learned_context").is_dir() and done.stdout.strip()
