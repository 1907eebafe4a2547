"""Documents by number and name: each is found at once, and what cannot be read costs only itself."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from ttt_e2e.data.named_documents import LONGEST_NAME, NamedDocuments, safe_name


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "library"
    (folder / "poems").mkdir(parents=True)
    (folder / "a.txt").write_text("first")
    (folder / "poems" / "My poem.txt").write_text("second")
    (folder / "rows.jsonl").write_text('{"text": "third"}\n\nbroken\n{"text": null}\n{"text": "fourth"}\n')
    (folder / ".hidden").write_text("not a document")
    return folder


def listed(source, tmp_path, **options):
    return NamedDocuments(str(source), cache_folder=tmp_path / "cache", **options)


def texts(documents):
    """The text of each document, or what is wrong with it."""
    found = []
    for number in range(len(documents)):
        try:
            found.append(documents.text(number))
        except (ValueError, OSError) as error:
            found.append(error)
    return found


def test_a_folder_of_texts_and_rows(source, tmp_path):
    documents = listed(source, tmp_path)
    names = [documents.name(number) for number in range(len(documents))]
    assert names == ["a.txt", "poems/My poem.txt", *(f"rows.jsonl, row {row}" for row in range(4))]
    folders = [documents.folder_name(number) for number in range(len(documents))]
    assert folders[0] == "a.txt" and folders[2:] == [f"rows.jsonl-{row:08d}" for row in range(4)]
    assert folders[1].startswith("poems-My-poem.txt-")
    first, second, third, broken, missing, fourth = texts(documents)
    assert [first, second, third, fourth] == ["first", "second", "third", "fourth"]
    assert "rows.jsonl, line 3: is not JSON" in str(broken) and "line 4: text_column='text' holds no" in str(missing)
    assert [documents.size(number) for number in range(len(documents))] == [5, 6, 5, 0, 0, 6]


def test_each_kind_of_what_cannot_be_read(source, tmp_path):
    (source / "b.bin").write_bytes(b"\0")
    (source / "c.txt").write_text(" \n")
    (source / "d.parquet").write_text("no parquet")
    documents = listed(source, tmp_path)
    wrong = {documents.name(number): str(text) for number, text in enumerate(texts(documents)) if number in (1, 2, 3)}
    for name, complaint in {"b.bin": "NUL", "c.txt": "is empty", "d.parquet, row 0": "no"}.items():
        assert complaint in wrong[name]


def test_a_file_that_goes_away_after_the_listing(source, tmp_path):
    documents = listed(source, tmp_path)
    (source / "a.txt").unlink()
    with pytest.raises(OSError, match=r"a\.txt"):
        documents.text(0)
    assert documents.text(1) == "second"


def test_the_rows_of_a_parquet_file(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["one", "two two"]}), tmp_path / "two.parquet")
    documents = listed(tmp_path / "two.parquet", tmp_path, text_column="body")
    assert texts(documents) == ["one", "two two"] and [documents.size(number) for number in (0, 1)] == [3, 7]
    assert documents.folder_name(1) == "two.parquet-00000001"
    [wrong] = texts(listed(tmp_path / "two.parquet", tmp_path))
    assert "there is no text_column='text'; name one of 'body'" in str(wrong)


def test_a_file_that_has_changed_is_listed_anew(source, tmp_path):
    before = len(listed(source, tmp_path))
    with (source / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"text": "fifth"}) + "\n")
    assert texts(listed(source, tmp_path))[-1] == "fifth" and len(listed(source, tmp_path)) == before + 1


def test_built_in_documents_are_called_by_their_path(tmp_path):
    documents = listed("standard-library", tmp_path)
    number = [documents.name(number) for number in range(len(documents))].index("json/decoder.py")
    assert "class JSONDecoder" in documents.text(number) and documents.size(number) > 1000


def test_sources_without_documents(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no document in it"):
        listed(tmp_path / "empty.jsonl", tmp_path)
    with pytest.raises(FileNotFoundError, match="missing"):
        listed(tmp_path / "missing.txt", tmp_path)


def test_names_are_safe_and_never_shared():
    plain = ["a.txt", "a_b-c.txt", "Résumé.md", "x" * LONGEST_NAME]
    others = ["a b.txt", "a-b.txt/", "a/b.txt", "a\\b.txt", "a:b.txt", "...", "-", "", ".txt", "x" * 300, "書" * 99]
    others += ["rows.jsonl-00000001", "a\n.txt"]
    names = [safe_name(name) for name in plain + others]
    assert names[: len(plain)] == plain and len(set(names)) == len(names)
    assert not set(names) & set(others)
    for name in names:
        assert name.isprintable() and "/" not in name and "\\" not in name and not name.startswith(".")
        assert len(name.encode()) <= LONGEST_NAME
