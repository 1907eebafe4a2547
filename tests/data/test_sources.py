"""Every kind of source becomes the documents that are in it, and every bad one an error that says what to do."""

import bz2
import gzip
import json
import lzma
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, IterableDataset

from ttt_e2e.data import load_documents


def load(source, tmp_path, **options):
    documents = load_documents(source, cache_folder=tmp_path / "cache", **options)
    assert isinstance(documents, IterableDataset if options.get("streaming") else Dataset)
    return list(documents)


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_parquet(path, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "b" / ".hidden").mkdir(parents=True)
    return folder


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["one.txt", "one.py", "one"])
def test_text_file_is_one_document(tmp_path, name, streaming):
    (tmp_path / name).write_bytes("grüße\r\n\n second line".encode())
    expected = [{"path": name, "text": "grüße\r\n\n second line"}]
    assert load(tmp_path / name, tmp_path, streaming=streaming) == expected
    assert load(str(tmp_path / name), tmp_path, streaming=streaming) == expected


def test_byte_order_mark_is_not_part_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "abc"}\n')
    assert load(tmp_path / "a.txt", tmp_path) == [{"path": "a.txt", "text": "abc"}]
    assert load(tmp_path / "a.jsonl", tmp_path) == [{"text": "abc"}]


@pytest.mark.parametrize("streaming", [False, True])
def test_json_lines_are_one_document_each(tmp_path, streaming):
    path = write_lines(tmp_path / "a.jsonl", {"text": "one", "n": 1}, {"n": "x", "text": "two\n"}, {"text": ""})
    path.write_text(path.read_text() + "\n")  # an empty line is no record
    assert load(path, tmp_path, streaming=streaming) == [{"text": "one"}, {"text": "two\n"}, {"text": ""}]


@pytest.mark.parametrize("text", ['{"text": "a"}\n{"text": "b"}', '[{"text": "a"},\n {"text": "b"}]'])
def test_json_file_holds_lines_or_one_list(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert load(tmp_path / "a.json", tmp_path) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip), ("bz2", bz2), ("xz", lzma)])
def test_json_lines_may_be_compressed(tmp_path, suffix, compress):
    path = tmp_path / f"a.v1.jsonl.{suffix}"
    path.write_bytes(compress.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert load(path, tmp_path) == [{"text": "one"}, {"text": "two"}]
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(ValueError, match=rf"a.v1.jsonl.{suffix}: cannot be read"):
        load(path, tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_rows_are_one_document_each(tmp_path, streaming):
    path = write_parquet(tmp_path / "a.parquet", {"content": [str(n) for n in range(250)], "n": range(250)})
    documents = load(path, tmp_path, text_column="content", streaming=streaming)
    assert documents == [{"text": str(n)} for n in range(250)]


@pytest.mark.parametrize("streaming", [False, True])
def test_folder_is_read_in_the_order_of_the_paths(tmp_path, folder, streaming):
    write_lines(folder / "b" / "a.jsonl", {"text": "3"}, {"text": "4"})
    write_parquet(folder / "c.parquet", {"text": ["5", "6"]})
    (folder / "b.txt").write_text("2")  # "b.txt" is before "b/"
    (folder / "a").write_text("1")
    (folder / ".secret.txt").write_text("hidden")
    (folder / "b" / ".hidden" / "d.txt").write_text("hidden")
    assert load(folder, tmp_path, streaming=streaming) == [{"text": str(n)} for n in range(1, 7)]


@pytest.mark.parametrize("streaming", [False, True])
def test_folder_of_texts_keeps_their_paths(tmp_path, folder, streaming):
    (folder / "b" / "c.txt").write_text("2")
    (folder / "a.md").write_text("1")
    expected = [{"path": "a.md", "text": "1"}, {"path": "b/c.txt", "text": "2"}]
    assert load(folder, tmp_path, streaming=streaming) == expected


def test_files_are_written_to_the_cache_until_they_change(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    [cached] = load_documents(path, cache_folder=tmp_path / "cache").cache_files
    written = Path(cached["filename"]).stat()
    assert Path(cached["filename"]).is_relative_to(tmp_path / "cache")
    assert load(path, tmp_path) == [{"path": "a.txt", "text": "old"}]
    assert Path(cached["filename"]).stat() == written
    path.write_text("new")
    assert load(path, tmp_path) == [{"path": "a.txt", "text": "new"}]


@pytest.mark.parametrize("damage", ["missing", "cut off", "changed"])
def test_damaged_cache_is_written_anew(tmp_path, damage):
    path = tmp_path / "a.txt"
    path.write_text("good")
    [cached] = load_documents(path, cache_folder=tmp_path / "cache").cache_files
    cached = Path(cached["filename"])
    data = cached.read_bytes()
    cached.unlink()
    if damage != "missing":
        cached.write_bytes(data[:-100] if damage == "cut off" else data.replace(b"good", b"evil"))
    assert load(path, tmp_path) == [{"path": "a.txt", "text": "good"}]


def test_too_little_space_on_the_disk_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a" * 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=999))
    with pytest.raises(OSError, match=r"a copy of the documents needs 1000 bytes, .* only 999 left"):
        load(tmp_path / "a.txt", tmp_path)
    assert not list((tmp_path / "cache").rglob("*.arrow"))


@pytest.mark.parametrize("streaming", [False, True])
def test_standard_library_is_a_source(tmp_path, monkeypatch, streaming):
    documents = Dataset.from_dict({"path": ["a.py"], "text": ["import os"]})
    monkeypatch.setattr("ttt_e2e.data.sources.standard_library_documents", lambda: documents)
    assert load("standard-library", tmp_path, streaming=streaming) == [{"path": "a.py", "text": "import os"}]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("text_column", ["text", "content"])
def test_other_names_are_datasets(tmp_path, monkeypatch, streaming, text_column):
    asked = {}

    def load_dataset(name, configuration, **options):
        asked.update(options, name=name, configuration=configuration)
        found = Dataset.from_dict({"id": [1, 2], text_column: ["one", "two"]})
        return found.to_iterable_dataset() if options["streaming"] else found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = {"configuration": "en", "split": "train[:2]", "streaming": streaming, "text_column": text_column}
    assert load("someone/corpus", tmp_path, **options) == [{"text": "one"}, {"text": "two"}]
    assert (asked["name"], asked["configuration"], asked["split"]) == ("someone/corpus", "en", "train[:2]")
    assert Path(asked["cache_dir"]).is_relative_to(tmp_path / "cache") and asked["keep_in_memory"] is False


def unknown_columns():
    yield {"id": 1, "content": "one"}


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Dataset.from_dict({"id": [1], "content": ["one"]}), "no text_column='text'; name one of 'id', 'content'"),
        (IterableDataset.from_generator(unknown_columns), "no text_column='text'; name one of 'id', 'content'"),
        (Dataset.from_dict({"text": []}), "there is no text in it"),
        (Dataset.from_dict({"text": ["", None]}), "there is no text in it"),
    ],
)
def test_dataset_without_text_is_an_error(tmp_path, monkeypatch, dataset, message):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: dataset)
    with pytest.raises(ValueError, match=f"source='?someone/corpus'?: .*{message}"):
        load_documents("someone/corpus", cache_folder=tmp_path)


def test_dataset_that_cannot_be_loaded_is_an_error_with_its_cause(tmp_path, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"source='someone/corpus'.* could not be loaded .*no network") as caught:
        load_documents("someone/corpus", cache_folder=tmp_path)
    assert isinstance(caught.value.__cause__, ConnectionError)


@pytest.mark.parametrize(
    "source",
    [
        "missing.txt",
        "missing.JSONL",
        "missing.json.gz",
        "./missing",
        "~/missing",
        "/missing",
        "a/b/missing",
        "a/",
        "a\\b",
    ],
)
def test_missing_path_is_an_error(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("taken for a dataset"))
    with pytest.raises(FileNotFoundError, match=r"source=.*: there is no such file or folder"):
        load_documents(source, cache_folder=tmp_path)


def test_missing_path_object_is_never_a_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("taken for a dataset"))
    with pytest.raises(FileNotFoundError, match="source=missing: there is no such file or folder"):
        load_documents(Path("missing"), cache_folder=tmp_path)


BAD_FILES = {
    "empty text": ("a.txt", b"", "there is no text in it, or every document is empty"),
    "empty lines": ("a.jsonl", b"\n\n", "there is no text in it, or every document is empty"),
    "empty records": ("a.jsonl", b'{"text": ""}\n', "there is no text in it, or every document is empty"),
    "other encoding": ("a.txt", "grüße".encode("latin-1"), r"a\.txt: is not UTF-8 text .*convert it"),
    "NUL bytes": ("a.bin", b"abc\0def", r"a\.bin: is not UTF-8 text \(it has NUL bytes\); convert it"),
    "encoding in lines": ("a.jsonl", b'{"text": "\xfc"}\n', r"a\.jsonl: is not UTF-8 text"),
    "broken line": ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: is not JSON .*repair it"),
    "broken list": ("a.json", b'[{"text": "a"},', r"a\.json: is not JSON .*repair it"),
    "no object": ("a.jsonl", b'"abc"\n', r"a\.jsonl, line 1: must be a JSON object"),
    "missing field": ("a.jsonl", b'{"text": "a"}\n{"x": 1, "y": 2}', r"2: there is no .*; name one of 'x', 'y'"),
    "number": ("a.json", b'[{"text": 3}]', r"entry 0: text_column='text' holds no text \(int\)"),
    "null": ("a.jsonl", b'{"text": null}\n', r"line 1: text_column='text' holds no text \(NoneType\)"),
    "half a character": ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1: text_column='text' is not Unicode"),
    "no gzip": ("a.jsonl.gz", b'{"text": "a"}\n', r"a\.jsonl\.gz: cannot be read"),
    "no parquet": ("a.parquet", b"PAR1 and no more", r"a\.parquet: is not a readable parquet file"),
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file_is_an_error(tmp_path, kind, streaming):
    name, data, message = BAD_FILES[kind]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name, tmp_path, streaming=streaming)
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_parquet_without_the_column_is_an_error(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"id": [1], "content": ["x"]})
    with pytest.raises(ValueError, match=r"a\.parquet: there is no text_column='text'; name one of 'id', 'content'"):
        load(path, tmp_path)
    path = write_parquet(tmp_path / "b.parquet", {"text": [1]})
    with pytest.raises(ValueError, match=r"b\.parquet, row 0: text_column='text' holds no text \(int\)"):
        load(path, tmp_path)


def test_bad_file_in_a_folder_is_named(tmp_path, folder):
    (folder / "a.txt").write_text("good")
    (folder / "b" / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"b/bad\.txt: is not UTF-8 text"):
        load(folder, tmp_path)


def test_folder_without_text_is_an_error(tmp_path, folder):
    (folder / ".hidden.txt").write_text("hidden")
    with pytest.raises(ValueError, match="no file below it"):
        load(folder, tmp_path)
    (folder / "a.txt").touch()
    (folder / "b" / "b.txt").touch()
    with pytest.raises(ValueError, match="every document is empty"):
        load(folder, tmp_path)


@pytest.mark.parametrize("options", [{"split": "test"}, {"configuration": "en"}])
def test_files_have_no_splits_and_configurations(tmp_path, options):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="only a dataset of the Hub has them"):
        load(tmp_path / "a.txt", tmp_path, **options)
