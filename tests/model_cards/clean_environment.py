"""A Python that has all that is installed here except ttt_e2e, made in a second and without a network."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

MAKE = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "release.py"))["environment"]


class CleanEnvironment:
    """A virtual environment that sees the installed packages, but nothing that .pth files add to them.

    An editable installation is such a .pth file, so that ttt_e2e cannot be imported.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.commands = MAKE(folder / "environment")

    def run(self, *arguments: str, **variables: str) -> str:
        """Run Python in an empty place; what it printed.

        Raises:
            AssertionError: it failed; with all that it printed.
        """
        place = self.folder / "place"
        place.mkdir(exist_ok=True)
        own = {"HF_HOME": str(self.folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "TMPDIR", "HOME")}
        done = subprocess.run(
            [str(self.commands / "python"), *arguments],
            cwd=place,
            env=kept | own | variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
        )
        assert done.returncode == 0, f"{arguments} with {sys.version}:\n{done.stdout}"
        return done.stdout
