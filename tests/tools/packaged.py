"""The package as setup.py describes it, and copies of what it is built from."""

import runpy
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
DESCRIBED = runpy.run_path(str(ROOT / "tools" / "package_path.py"))["described"]()
LEFT_OUT = ("__pycache__", "checkpoints")


def copy_sources(folder, *others):
    """What the package is built from, and other files and folders of the repository."""
    for name in {*DESCRIBED.package_dir.values(), *others}:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for name in ["setup.py", "pyproject.toml", "README.md", "LICENSE", *others]:
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder)
