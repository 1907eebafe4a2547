"""Documents by their address are those of the files there, streamed or not."""

import json

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from ttt_e2e.data import load_documents
from ttt_e2e.data.addresses import check_address, is_address


@pytest.fixture
def bucket(request):
    """A folder in memory, as any object storage of fsspec."""
    filesystem, folder = fsspec.filesystem("memory"), f"/bucket-{abs(hash(request.node.name))}"
    yield f"memory:/{folder}"
    filesystem.rm(folder, recursive=True)


def put(address, data):
    with fsspec.open(address, "wb") as file:
        file.write(data)


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def texts(source, tmp_path, **options):
    return [document["text"] for document in load_documents(source, cache_folder=tmp_path, **options)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_in_object_storage(bucket, tmp_path, streaming):
    put(f"{bucket}/b.jsonl", lines("third"))
    put(f"{bucket}/a/x.jsonl", lines("first", "second"))
    put(f"{bucket}/.hidden.jsonl", lines("not a document"))
    assert texts(bucket, tmp_path, streaming=streaming) == ["first", "second", "third"]
    assert texts(f"{bucket}/b.jsonl", tmp_path, streaming=streaming) == ["third"]
    assert texts(f"{bucket}/*.jsonl", tmp_path, streaming=streaming) == ["third"]


@pytest.mark.parametrize("streaming", [False, True])
def test_other_kinds_of_files(bucket, tmp_path, streaming):
    put(f"{bucket}/texts/a.txt", b"one\ntext")
    put(f"{bucket}/texts/b.txt", b"another")
    with fsspec.open(f"{bucket}/rows.parquet", "wb") as file:
        pyarrow.parquet.write_table(pyarrow.table({"body": ["first", "second"]}), file)
    assert texts(f"{bucket}/texts", tmp_path, streaming=streaming) == ["one\ntext", "another"]
    options = {"streaming": streaming, "text_column": "body"}
    assert texts(f"{bucket}/rows.parquet", tmp_path, **options) == ["first", "second"]
    with pytest.raises(ValueError, match="no text_column='text'; name one of 'body'"):
        texts(f"{bucket}/rows.parquet", tmp_path, streaming=streaming)
    with pytest.raises(ValueError, match=r"several kinds \(parquet, text\)"):
        texts(bucket, tmp_path, streaming=streaming)


def test_a_stream_reads_no_more_than_is_asked_for(bucket, tmp_path):
    put(f"{bucket}/a.jsonl", lines("first"))
    put(f"{bucket}/b.jsonl", b"broken\n")
    assert next(iter(load_documents(bucket, cache_folder=tmp_path, streaming=True)))["text"] == "first"


def test_a_file_of_this_machine_by_its_address(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines("first"))
    assert texts(f"file://{tmp_path / 'a.jsonl'}", tmp_path / "cache") == ["first"]


def test_addresses_that_cannot_be_read(bucket, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there is no file; correct the address"):
        texts(f"{bucket}/nothing", tmp_path)
    put(f"{bucket}/a.parquet", b"no parquet")
    with pytest.raises(ValueError, match=r"source='memory://.*': cannot be read"):
        texts(bucket, tmp_path)
    with pytest.raises(ValueError, match="Protocol not known: nowhere; give a path, or an address as s3://"):
        check_address("nowhere://bucket")
    with pytest.raises(ValueError, match="give the data set's name alone, as owner/name"):
        check_address("hf://datasets/owner/name")

    def missing(scheme):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("ttt_e2e.data.addresses.fsspec.get_filesystem_class", missing)
    with pytest.raises(ImportError, match=r"source='s3://bucket': .*: install s3fs, or download it and give the path"):
        check_address("s3://bucket")


def test_what_is_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_address("s3://bucket/a") and is_address("github+https://x")
    assert not any(map(is_address, ("owner/name", "a.txt", "://x", "/a/b", "C:\\x")))
