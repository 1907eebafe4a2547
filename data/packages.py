"""Long real documents that every machine has: Python packages, each read as one text.

A document is a run of a package's source files in the order of their path: a package of up to `LONGEST` characters is
one document, a larger one is cut between files. The packages are those of the standard library and of the distributions
that this one needs, as far as their licence lets anyone copy them.
"""

import functools
import hashlib
import importlib.metadata
import platform
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from datasets import Dataset
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OWN_NAME = "ttt-e2e"
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
def installed_package_documents() -> Dataset:
    """`package_documents` of the running Python."""
    return package_documents(package_roots())


def installed_packages_state() -> str:
    """What tells whether these documents have changed, without reading them: SHA-256 of the versions."""
    versions = [(name, importlib.metadata.version(name)) for name in sorted(needed_distributions())]
    return hashlib.sha256(repr((platform.python_version(), versions)).encode()).hexdigest()


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


def package_roots() -> Iterator[tuple[str, Path]]:
    """Name and folder of every package that is read: "stdlib.NAME" or "DISTRIBUTION.NAME"."""
    library = Path(sysconfig.get_paths()["stdlib"])
    modules = [path for path in library.iterdir() if path.is_dir() and path.name not in LEFT_OUT]
    for path in modules:
        if (path / "__init__.py").is_file():
            yield f"stdlib.{path.name}", path
    for name in sorted(needed_distributions()):
        distribution = importlib.metadata.distribution(name)
        if not FREE.search(licence(distribution)):
            continue
        for package in sorted({file.parts[0] for file in distribution.files or () if len(file.parts) > 1}):
            folder = Path(str(distribution.locate_file(package)))
            if (folder / "__init__.py").is_file() and package not in LEFT_OUT:
                yield f"{name}.{package}", folder


def needed_distributions() -> set[str]:
    """Names of the installed distributions that this one needs, directly or not, without its extras."""
    found: set[str] = set()
    waiting = [OWN_NAME]
    while waiting:
        for line in importlib.metadata.requires(waiting.pop()) or ():
            requirement = Requirement(line)
            name = canonicalize_name(requirement.name)
            if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
                continue
            try:
                importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                continue  # needed on other platforms only
            found.add(name)
            waiting.append(name)
    return found


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
