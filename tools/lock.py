"""Renews `requirements.lock`: the newest versions that setup.py's ranges admit together, as on an empty machine.

    python tools/lock.py [--torch torch==2.13.0]

pip resolves them with all extras and installs nothing.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
# All but `flash`.
EXTRAS = "app,dev,docs,evaluation,gguf,jax,peft,ray,serve,triton"
# What a CUDA build of torch brings, each at the one version that it names.
OF_CUDA = re.compile(r"(nvidia|cuda|triton)(-|$)")
HEADER = """\
# Exact versions of all that `make` installs, extras included; written by `make lock` with Python {python} on {system}.
# torch stands here by its version alone: no local version, no hash, and no CUDA packages, which its own metadata pins.
# flash-attn (extra `flash`) is left out: it is compiled against the CUDA and the torch of a machine.
"""


def resolve(torch: str) -> list[tuple[str, str]]:
    """Names and versions of all distributions; pip explains itself where there is no answer."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = ["install", "--dry-run", "--ignore-installed", "--quiet", "--report", str(report)]
        needed = [torch, "setuptools", f"{ROOT}[{EXTRAS}]"]
        subprocess.run([sys.executable, "-m", "pip", *command, *needed], check=True)
        entries = [entry["metadata"] for entry in json.loads(report.read_text(encoding="utf-8"))["install"]]
    return [(re.sub(r"[-_.]+", "-", entry["name"]).lower(), entry["version"]) for entry in entries]


def lines(distributions: list[tuple[str, str]]) -> list[str]:
    """The lines of the lock; of torch only what every build of it has in common."""
    public = {name: version.partition("+")[0] if name == "torch" else version for name, version in distributions}
    return [
        f"{name}=={version}"
        for name, version in sorted(public.items())
        if name != "ttt-e2e" and not OF_CUDA.match(name)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default="torch", help="the torch that the others must fit")
    asked = parser.parse_args()
    header = HEADER.format(python=".".join(map(str, sys.version_info[:2])), system=sys.platform)
    LOCK.write_text(header + "\n".join(lines(resolve(asked.torch))) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"requirements.lock is as it was: pip ended with status {error.returncode}")
