"""Long real documents that any machine can have: Python packages, each read as one text.

A document is a run of a package's source files in the order of their path: a package of up to `LONGEST` characters is
one document, a larger one is cut between files. The packages are those of the standard library and of the distributions
in packages.yaml, as far as their licence lets anyone copy them. What is installed in another version than there is
fetched with pip, and read without being installed.
"""

import functools
import hashlib
import importlib.metadata
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml
from datasets import Dataset

from ..storage.cached_folder import cached_folder

LISTED, MANIFEST = Path(__file__).with_name("packages.yaml"), "manifest.json"
# Characters: of a document at most (about 100K tokens of a small vocabulary), and so many that a rest is one too.
LONGEST, SHORTEST = 300_000, 60_000
MOST_OF_A_PACKAGE = 8  # documents, evenly spread, so that no package outweighs the others
# Tests, copies of other packages, and files that a program wrote.
LEFT_OUT = frozenset(
    "test tests idle_test testing _testing _vendor vendor vendored _vendored externals extern site-packages "
    "dist-packages encodings pydoc_data lib2to3 unicode_codes __pycache__ node_modules".split()
)
FREE = re.compile(r"\b(MIT|BSD|Apache|ISC|PSF|Python Software Foundation|HPND|Unlicense|CC0|0BSD)\b", re.IGNORECASE)
GRAM, SHARE_OF_COPIES, SAMPLED = 13, 0.2, 16  # words of a run, the share of known runs in a copy, one run in so many


@functools.cache  # a quarter of a minute
def listed_package_documents(cache_folder: Path) -> Dataset:
    """`package_documents` of the running Python's library and of the listed distributions.

    Args:
        cache_folder: for those that are not installed.

    Raises:
        OSError: one is neither installed nor can be fetched.
    """
    return package_documents(package_roots(cache_folder))


def listed_packages_state() -> str:
    """What tells whether these documents have changed, without reading them: SHA-256 of the versions."""
    return hashlib.sha256(repr((platform.python_version(), listed_distributions())).encode()).hexdigest()


def listed_distributions() -> dict[str, str]:
    """Version by name, sorted by name."""
    return dict(sorted(yaml.safe_load(LISTED.read_text(encoding="utf-8")).items()))


def package_documents(roots: Iterable[tuple[str, Path]]) -> Dataset:
    """Documents of Python packages; near-copies of earlier ones are left out.

    Args:
        roots: name and folder of each package.

    Returns:
        Columns `path`, "PACKAGE/NUMBER", and `text`; in the order of the packages' names.

    Raises:
        FileNotFoundError: there is no source file in any of them.
    """
    paths, texts, known = [], [], set()
    for name, root in sorted(roots):
        for number, text in enumerate(_spread(list(_cut(source_files(root))), MOST_OF_A_PACKAGE)):
            runs = word_runs(text)
            if len(runs & known) > SHARE_OF_COPIES * len(runs):
                continue
            known |= runs
            paths.append(f"{name}/{number}")
            texts.append(text)
    if not paths:
        raise FileNotFoundError("there is no Python source file in any package; install them with their sources")
    return Dataset.from_dict({"path": paths, "text": texts})


def package_roots(cache_folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and folder of every package that is read: "stdlib.NAME" or "DISTRIBUTION.NAME"."""
    library = Path(sysconfig.get_paths()["stdlib"])
    modules = [path for path in library.iterdir() if path.is_dir() and path.name not in LEFT_OUT]
    for path in modules:
        if (path / "__init__.py").is_file():
            yield f"stdlib.{path.name}", path
    for name, version in listed_distributions().items():
        distribution = find_distribution(name, version, cache_folder)
        if not FREE.search(licence(distribution)):
            continue
        for package in sorted({file.parts[0] for file in distribution.files or () if len(file.parts) > 1}):
            folder = Path(str(distribution.locate_file(package)))
            if (folder / "__init__.py").is_file() and package not in LEFT_OUT:
                yield f"{name}.{package}", folder


def find_distribution(name: str, version: str, cache_folder: Path) -> importlib.metadata.Distribution:
    """The distribution as it is installed, or its wheel's sources from a package index, without installing it.

    Raises:
        OSError: it is neither installed nor can be fetched.
    """
    try:
        installed = importlib.metadata.distribution(name)
        if installed.version.partition("+")[0] == version:  # builds of one version differ in no source
            return installed
    except importlib.metadata.PackageNotFoundError:
        pass
    folder = cache_folder / "python-packages" / f"{name}-{version}"
    cached_folder(folder, MANIFEST, functools.partial(_fetch, f"{name}=={version}"))
    return next(iter(importlib.metadata.distributions(path=[str(folder)])))


def _fetch(requirement: str, folder: Path) -> dict:
    """Unpack the sources and the metadata of a distribution's wheel into a folder."""
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*command, "--dest", temporary, requirement], capture_output=True, text=True)
        wheels = list(Path(temporary).glob("*.whl"))
        if not wheels:
            said = (done.stderr.strip().splitlines() or ["pip is missing"])[-1]
            raise OSError(
                f"data=python-packages reads {requirement}, which is not installed and could not be fetched ({said}): "
                f"pip install {requirement}, or name other data"
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            for member in archive.namelist():
                if member.endswith(".py") or ".dist-info/" in member:
                    archive.extract(member, folder)
    return {"requirement": requirement}


def licence(distribution: importlib.metadata.Distribution) -> str:
    """What a distribution says of its licence, in one line."""
    facts = distribution.metadata
    classifiers = [line for line in facts.get_all("Classifier") or () if line.startswith("License ::")]
    return "; ".join([facts.get("License-Expression") or (facts.get("License") or "").split("\n")[0], *classifiers])


def source_files(root: Path) -> Iterator[str]:
    """The texts of a package's source files in the order of their path, each under its path."""
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if LEFT_OUT.isdisjoint(inside.parts) and not inside.name.startswith("test_"):
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield f"# {root.name}/{inside.as_posix()}\n{text.strip()}\n\n"


def word_runs(text: str) -> set[int]:
    """Hashes of a text's runs of 13 words, one in sixteen of them (the same ones in every text)."""
    words = re.findall(r"\w+", text)
    runs = (" ".join(words[start : start + GRAM]) for start in range(len(words) - GRAM + 1))
    return {value for value in map(zlib.crc32, map(str.encode, runs)) if value % SAMPLED == 0}


def _cut(files: Iterable[str]) -> Iterator[str]:
    """Documents of at most `LONGEST` characters, unless one file is longer; no rest below `SHORTEST` behind others."""
    gathered, length, count = [], 0, 0
    for text in files:
        if gathered and length + len(text) > LONGEST:
            yield "".join(gathered)
            gathered, length, count = [], 0, count + 1
        gathered.append(text)
        length += len(text)
    if gathered and (length >= SHORTEST or not count):
        yield "".join(gathered)


def _spread(documents: list[str], most: int) -> list[str]:
    if len(documents) <= most:
        return documents
    return [documents[number * len(documents) // most] for number in range(most)]
