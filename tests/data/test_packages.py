"""Long documents of Python packages: which files, how they are cut, what is left out."""

import importlib.metadata
import random
import zipfile

import pytest

from ttt_e2e.data import packages
from ttt_e2e.data.packages import (
    LONGEST,
    MOST_OF_A_PACKAGE,
    SHORTEST,
    licence,
    listed_packages_state,
    package_documents,
    package_roots,
    source_files,
    word_runs,
)


def prose(seed, characters):
    """Words that no other seed gives in the same order."""
    choose = random.Random(seed)
    return " ".join("".join(choose.choices("abcdefgh", k=4)) for _ in range(characters // 5))


def package(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder.name, folder


def test_a_small_package_is_one_document_in_the_order_of_its_paths(tmp_path):
    root = package(tmp_path / "one", {"b.py": "b = 1", "a/c.py": "c = 1\n\n", "empty.py": "\n", "notes.txt": "no"})
    documents = package_documents([root])
    assert documents["path"][:] == ["one/0"]
    assert documents["text"][0] == "# one/a/c.py\nc = 1\n\n# one/b.py\nb = 1\n\n"


def test_tests_and_copies_of_other_packages_are_left_out(tmp_path):
    files = {name: f"x = {name!r}" for name in ("a.py", "tests/b.py", "_vendor/c.py", "test_d.py", "sub/testing/e.py")}
    _, folder = package(tmp_path / "one", files)
    assert "".join(source_files(folder)) == "# one/a.py\nx = 'a.py'\n\n"


def test_a_large_package_is_cut_between_files(tmp_path):
    files = {f"{number:02}.py": prose(number, LONGEST // 3) for number in range(7)}
    documents = package_documents([package(tmp_path / "one", files)])
    assert documents["path"][:] == [f"one/{number}" for number in range(4)]
    assert all(SHORTEST <= len(text) <= LONGEST for text in documents["text"])
    assert "".join(documents["text"]).count("# one/") == 7


def test_a_short_rest_goes_and_no_package_has_too_much(tmp_path):
    files = {f"{number:02}.py": prose(number, LONGEST - 100) for number in range(2 * MOST_OF_A_PACKAGE)}
    documents = package_documents([package(tmp_path / "many", files | {"99.py": "rest = 1"})])
    assert len(documents) == MOST_OF_A_PACKAGE
    starts = [text.split(maxsplit=2)[1] for text in documents["text"]]
    assert starts[0] == "many/00.py" and starts[-1] == "many/14.py", "evenly spread"


def test_near_copies_are_left_out(tmp_path):
    text = prose(0, 40_000)
    copy = text[:30_000] + prose(1, 10_000)
    own = text[:2_000] + prose(2, 38_000)
    roots = [package(tmp_path / name, {"a.py": body}) for name, body in (("first", text), ("copy", copy), ("own", own))]
    # In the order of their names: the later one of two is the copy.
    assert package_documents(roots)["path"][:] == ["copy/0", "own/0"]


def test_runs_are_the_same_in_every_process():
    assert word_runs(" ".join(map(str, range(200)))) == word_runs("  ".join(map(str, range(200))))
    assert word_runs("too few words") == set()
    runs = word_runs(" ".join(map(str, range(2000))))
    assert 60 < len(runs) < 200 and all(value % packages.SAMPLED == 0 for value in runs)


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Python source file in any package"):
        package_documents([package(tmp_path / "none", {"notes.txt": "no"})])


def test_packages_are_the_listed_ones(tmp_path, monkeypatch):
    listed = packages.listed_distributions()
    assert {"torch", "transformers", "numpy"} <= set(listed) and list(listed) == sorted(listed)
    few = {
        name: importlib.metadata.version(name).partition("+")[0] for name in ("torch", "numpy", "certifi", "packaging")
    }
    monkeypatch.setattr(packages, "listed_distributions", lambda: few)
    names = [name for name, _ in package_roots(tmp_path)]
    assert {"stdlib.asyncio", "torch.torch", "numpy.numpy"} <= set(names) and len(names) == len(set(names))
    assert not any(name.startswith(("stdlib.test", "stdlib.encodings", "certifi.")) for name in names)
    assert "BSD" in licence(importlib.metadata.distribution("numpy")) and not any(tmp_path.iterdir())


def index_with(folder, name, version, text):
    """A wheel in a folder, as pip finds it there."""
    facts = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nLicense: MIT\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        inside = f"{name}-{version}.dist-info"
        wheel.writestr(f"{name}/__init__.py", text)
        wheel.writestr(f"{name}/fast.so", "no source")
        wheel.writestr(f"{inside}/METADATA", facts)
        wheel.writestr(f"{inside}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{inside}/RECORD", f"{name}/__init__.py,,\n{name}/fast.so,,\n{inside}/METADATA,,\n")


def test_another_version_than_the_installed_one_is_fetched_once(tmp_path, monkeypatch):
    index = tmp_path / "index"
    index.mkdir()
    index_with(index, "numpy", "0.0.1", "answer = 42\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(packages, "listed_distributions", lambda: {"numpy": "0.0.1"})
    roots = {name: folder for name, folder in package_roots(tmp_path / "cache") if not name.startswith("stdlib.")}
    assert list(roots) == ["numpy.numpy"]
    assert [path.name for path in roots["numpy.numpy"].iterdir()] == ["__init__.py"]
    assert (roots["numpy.numpy"] / "__init__.py").read_text() == "answer = 42\n"
    monkeypatch.setattr(packages, "_fetch", lambda *arguments: pytest.fail("fetched again"))
    assert dict(package_roots(tmp_path / "cache"))["numpy.numpy"] == roots["numpy.numpy"]


def test_what_can_neither_be_found_nor_fetched_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(OSError, match=r"reads numpy==0.0.1, .*pip install numpy==0.0.1, or name other data"):
        packages.find_distribution("numpy", "0.0.1", tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_state_follows_the_versions(monkeypatch):
    before = listed_packages_state()
    assert before == listed_packages_state()
    monkeypatch.setattr(packages, "listed_distributions", lambda: {"numpy": "0"})
    assert listed_packages_state() != before
