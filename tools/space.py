"""Put a Space together that can be pushed to the Hub: the files of `spaces/`, the package, and the shipped weights.

    python tools/space.py build/space

The package lies unpacked beside `app.py`, where Python finds it: a Space installs `requirements.txt` before it has any
other file.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHECKPOINTS = Path("model_cards") / "checkpoints"
MODELS = ("smollm2-135m-ttt", "tiny-standard-library")
# What a model is loaded from; cards and results stay with the repository, its code is in the package.
NEEDED = ("*.json", "*.safetensors", "*.jinja")


def build_wheel(folder: Path) -> Path:
    """The package's wheel, built from the files that git knows."""
    copy = folder / "copy"
    subprocess.run(["git", "-C", ROOT, "checkout-index", "--all", f"--prefix={copy}/"], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "--wheel-dir", folder, copy], check=True)
    return next(folder.glob("*.whl"))


def lay_out_space(folder: Path, wheel: Path) -> None:
    """Write the Space.

    Args:
        folder: new, or one that was written before and is written anew.
        wheel: of the package.

    Raises:
        ValueError: the folder holds something else.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "app.py").is_file():
        raise ValueError(f"folder={str(folder)!r} holds something that is no Space; name another one")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "spaces", folder, ignore=shutil.ignore_patterns("__pycache__"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    for model in MODELS:
        target = folder / "ttt_e2e" / CHECKPOINTS / model
        target.mkdir(parents=True)
        for path in sorted(path for pattern in NEEDED for path in (ROOT / CHECKPOINTS / model).glob(pattern)):
            shutil.copy(path, target)


def main() -> None:
    folder = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as temporary:
        lay_out_space(folder, build_wheel(Path(temporary)))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.0f} MiB. Push it to a Space, or try it: python {folder / 'app.py'}")


if __name__ == "__main__":
    main()
