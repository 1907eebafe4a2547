"""Installs the package, editable, for the Python that runs this, with the versions of `requirements.lock`.

    python tools/install.py [--extra dev] [--torch torch==2.13.0] [--leave]

A torch that is there stays, whatever its version. The build backend is installed beside the package, so that nothing
is fetched for building it: where all the versions are there, pip asks no index.
"""

import argparse
import importlib
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
BACKEND = "setuptools"


def pip(*arguments: str, **how) -> int:
    """pip's exit status."""
    return subprocess.run([sys.executable, "-m", "pip", *arguments], **how).returncode


def fits(package: list[str]) -> bool:
    """Install the package alone; False, with nothing changed, where the ranges of setup.py ask for anything else."""
    alone = ["--isolated", "install", "--no-index", "--no-build-isolation", *package]
    return pip(*alone, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0


def installed_torch() -> str | None:
    importlib.invalidate_caches()
    try:
        return f"torch=={version('torch')}"
    except PackageNotFoundError:
        return None


def install_locked(package: list[str], torch: str) -> int:
    """Install the package and what it needs as locked, and `torch` where there is none; pip's exit status."""
    lines = LOCK.read_text(encoding="utf-8").splitlines()
    others = [line for line in lines if not line.startswith("torch==")]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        for wanted in ([BACKEND, *([] if installed_torch() else [torch])], ["--no-build-isolation", *package]):
            held = [line for line in [installed_torch()] if line]
            constraints.write_text("\n".join([*others, *held]) + "\n", encoding="utf-8")
            status = pip("install", "--constraint", str(constraints), *wanted)
            if status:
                return status
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", help="extras of setup.py, as in dev or dev,evaluation")
    parser.add_argument("--torch", default="torch", help="what pip installs where there is no torch")
    parser.add_argument("--leave", action="store_true", help="change no package where setup.py's ranges are met")
    asked = parser.parse_args()
    package = ["--editable", str(ROOT) + (f"[{asked.extra}]" if asked.extra else "")]
    if asked.leave and fits(package):
        return 0
    return install_locked(package, asked.torch)


if __name__ == "__main__":
    sys.exit(main())
