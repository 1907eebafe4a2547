"""Which files are read, and how they are split."""

import pytest
from datasets import Dataset

from ttt_e2e.data import split_documents, standard_library_documents


def test_tests_and_installed_packages_are_left_out(tmp_path):
    for path in ["b.py", "a/c.py", "a/test/d.py", "tests/e.py", "site-packages/f.py", "a/readme.txt"]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"# {path}\n")
    documents = standard_library_documents(tmp_path)
    assert documents["path"][:] == ["a/c.py", "b.py"]
    assert documents["text"][:] == ["# a/c.py\n", "# b.py\n"]


def test_folder_without_sources_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="root="):
        standard_library_documents(tmp_path)


def test_split_keeps_every_document_on_one_side():
    paths = [f"tables/{n}.py" if n % 5 == 0 else f"{n}.py" for n in range(100)]
    documents = Dataset.from_dict({"path": paths, "text": ["x" * (n * 37 % 101) for n in range(100)]})
    training, validation = split_documents(documents, validation_every=8, training_only=["tables"])
    assert sorted([*training["path"], *validation["path"]]) == sorted(paths)
    assert len(validation) == 10
    assert not any(path.startswith("tables/") for path in validation["path"])
    assert max(map(len, validation["text"])) > 90 and min(map(len, validation["text"])) < 20
    assert split_documents(documents, 8, ["tables"])[1]["path"][:] == validation["path"][:]


@pytest.mark.parametrize(
    ("count", "validation_every", "message"), [(3, 1, "validation_every=1"), (1, 8, "documents: 1")]
)
def test_impossible_split_is_an_error(count, validation_every, message):
    documents = Dataset.from_dict({"path": ["a.py"] * count, "text": ["x"] * count})
    with pytest.raises(ValueError, match=message):
        split_documents(documents, validation_every)


def test_documents_without_paths_can_be_split():
    documents = Dataset.from_dict({"text": ["x" * n for n in range(1, 9)]})
    training, validation = split_documents(documents, validation_every=4)
    assert [len(text) for text in validation["text"]] == [2, 6]
    assert [len(text) for text in training["text"]] == [1, 3, 4, 5, 7, 8]
    with pytest.raises(ValueError, match=r"training_only=\['tables'\]: the documents have no column `path`"):
        split_documents(documents, validation_every=4, training_only=["tables"])


def test_whole_folders_stay_on_one_side():
    paths = [f"{number % 10}/{number}.py" for number in range(60)]
    documents = Dataset.from_dict({"path": paths, "text": ["x" * (1 + number % 10) for number in range(60)]})
    training, validation = split_documents(documents, validation_every=4, whole_folders=True)
    sides = [{path.partition("/")[0] for path in part["path"]} for part in (training, validation)]
    assert not sides[0] & sides[1] and len(sides[1]) == 2
    assert sorted([*training["path"], *validation["path"]]) == sorted(paths)
    with pytest.raises(ValueError, match=r"whole_folders=True: the documents have no column `path`"):
        split_documents(documents.select_columns(["text"]), 4, whole_folders=True)
