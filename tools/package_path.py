"""Lay the package out as it is imported: `ttt_e2e/` with its folders, as links to the files of this clone.

    python tools/package_path.py build/package

What reads code without running it (type checkers, builders of references) does not find a package whose folders
`setup.py` maps to other names, as an ordinary editable install has it. It finds this folder.
"""

import importlib
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def described(root: Path = ROOT):
    """The distribution as the clone's setup.py describes it, with its bounds."""
    importlib.import_module("setuptools")  # brings distutils where Python has none
    from distutils.core import run_setup

    return run_setup(str(root / "setup.py"), stop_after="init")


def lay_out(folder: Path, root: Path = ROOT) -> None:
    """Make `folder` anew, with every package of `setup.py` as a folder of links.

    Args:
        root: the clone.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for package, source in sorted(described(root).package_dir.items()):
        target = folder.joinpath(*package.split("."))
        target.mkdir(parents=True)
        for path in (root / source).iterdir():
            if path.suffix in (".py", ".yaml", ".md"):
                (target / path.name).symlink_to(path.resolve())


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
