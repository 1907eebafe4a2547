"""Build a release and try it out as its users will have it.

    python tools/release.py [--output dist]

Wheel and sdist are built from the files that git knows, checked, and the wheel is installed into an environment of its
own, outside of the clone, that sees the packages of the Python that runs this. There presets, experiments, metrics,
generation, the card and the export of the small model must work. Nothing is uploaded.
"""

import argparse
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "model_cards" / "checkpoints" / "tiny-standard-library"
# What an installed package must do, run in an empty folder; `{model}` is the small trained model.
TRIALS = (
    "presets",
    "presets 125m",
    "reproduce",
    "train --dry-run",
    "generate --model {model} --prompt 'class Reader:' --max-new-tokens 8",
    "export --model {model} --license apache-2.0 --output hub",
    "generate --model hub --prompt 'class Reader:' --max-new-tokens 8",
)
SCRIPT = """
import evaluate, ttt_e2e
from pathlib import Path
from ttt_e2e.evaluation import metric_path
assert Path(ttt_e2e.__file__).is_relative_to({place!r}), ttt_e2e.__file__
assert ttt_e2e.__version__ == {version!r}
assert evaluate.load(metric_path("token_perplexity")).compute(losses=[[0.5, 1.5]])["loss"] == 1.0
assert Path("hub/README.md").is_file() and Path("hub/modeling_ttt_e2e.py").is_file()
"""


def run(*command: object, **how) -> None:
    print("+", *command, flush=True)
    subprocess.run(list(map(str, command)), check=True, **how)


def build(folder: Path) -> list[Path]:
    """Wheel and sdist of a copy of what git knows; returns their paths in `folder`."""
    with tempfile.TemporaryDirectory() as copy:
        run("git", "-C", ROOT, "checkout-index", "--all", f"--prefix={copy}/")
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, copy, stdout=subprocess.DEVNULL)
    return sorted(path for path in folder.iterdir() if path.suffix in (".whl", ".gz"))


def environment(folder: Path) -> Path:
    """A new environment that sees the packages of this one, made in a second and without a network.

    What .pth files add is not seen, and an editable installation of this package is such a file.

    Returns:
        Its folder of commands.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    # An environment may itself stand on another one.
    further = (path for path in sys.path if Path(path).name == "site-packages")
    installed = dict.fromkeys([sysconfig.get_paths()["purelib"], *further])
    (packages / "all.pth").write_text("".join(f"{path}\n" for path in installed))
    return folder / "bin"


def try_out(wheel: Path, version: str) -> None:
    """Install the wheel outside of the clone and run all trials.

    Raises:
        subprocess.CalledProcessError: one failed.
    """
    with tempfile.TemporaryDirectory() as place:
        work = Path(place, "work")
        work.mkdir()
        commands = environment(Path(place, "environment"))
        pip = [sys.executable, "-m", "pip", "--python", commands / "python", "install", "--quiet", "--no-deps"]
        run(*pip, "--force-reinstall", wheel)
        how = {"cwd": work, "env": os.environ | {"HF_HUB_OFFLINE": "1"}}
        for trial in TRIALS:
            arguments = [part.format(model=CHECKPOINT) for part in shlex.split(trial)]
            run(commands / "ttt-e2e", *arguments, stdout=subprocess.DEVNULL, **how)
        run(commands / "python", "-c", SCRIPT.format(place=str(place), version=version), **how)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder of the wheel and the sdist")
    output = parser.parse_args().output.resolve()
    if output.is_dir() and any(output.iterdir()):
        sys.exit(f"--output {output}: is not empty; a release is built into an empty folder")
    files = build(output)
    run(sys.executable, "-m", "twine", "check", "--strict", *files)
    [wheel] = [path for path in files if path.suffix == ".whl"]
    version = wheel.name.split("-")[1]
    try_out(wheel, version)
    print(f"ttt-e2e {version}: {', '.join(path.name for path in files)} in {output}")


if __name__ == "__main__":
    main()
