"""Learned contexts as folders: read at once or in parts, used often, and never by the wrong model."""

import json

import pytest
import torch

from ttt_e2e import TTTE2ECache
from ttt_e2e.serving import (
    ContextFolder,
    StoredContext,
    document_text,
    open_context,
    read_documents,
    text_tokens,
    write,
    write_context,
    writing_arguments,
)
from ttt_e2e.serving.documents import PIECE_CHARACTERS

from .small import BOOK, GREEDY, alone, files, same, small_text_model


@pytest.fixture(scope="module")
def text_model():
    return small_text_model()


@pytest.fixture(scope="module")
def book(text_model):
    """A context that has read the book."""
    return read(text_model, BOOK)


@pytest.fixture
def folder(book, tmp_path):
    write_context(tmp_path / "book", book)
    return tmp_path / "book"


def read(text_model, *texts, start=None):
    documents = [(text[:5], text_tokens(text, text_model.tokenizer, begin=True)) for text in texts]
    return read_documents(text_model, start or StoredContext.new(text_model.model), documents)


def test_two_readings_equal_one(text_model, folder):
    parts = read(text_model, BOOK[::-1], start=open_context(folder, text_model.model))
    whole = read(text_model, BOOK, BOOK[::-1])
    assert same(parts.cache, whole.cache)
    assert parts.documents == whole.documents and parts.tokens == whole.tokens
    assert sum(document.tokens for document in whole.documents) == whole.tokens


def test_writing_from_a_context_equals_the_whole_text_as_the_prompt(text_model, folder):
    tokenizer = text_model.tokenizer
    prompt = text_tokens(" and then", tokenizer, begin=False).tolist()
    context = open_context(folder, text_model.model)
    written = write(text_model.model, prompt, context.cache, **GREEDY)
    whole = text_tokens(BOOK, tokenizer, begin=True).tolist() + prompt
    assert written == alone(text_model, whole)
    assert written != alone(text_model, prompt)  # the model is one that shows what it has read


@pytest.mark.parametrize("learn_from", ["context", "prompt", "none"])
def test_after_writing_all_has_been_read(text_model, book, learn_from):
    """A second text goes on exactly as if both were one, whatever is learned from."""
    ids = text_tokens(BOOK[:40], text_model.tokenizer, begin=False).tolist()
    cache = book.fork().cache
    first = write(text_model.model, ids, cache, learn_from=learn_from, **GREEDY)
    assert cache.get_seq_length() == book.tokens + len(ids) + len(first)
    expected = book.fork().cache
    with torch.no_grad():
        span = {"context": None, "prompt": (book.tokens, book.tokens + len(ids)), "none": (0, 0)}[learn_from]
        text_model.model(torch.tensor([ids + first]), cache=expected, learning_span=span)
    assert cache.context.pending_counts == expected.context.pending_counts
    torch.testing.assert_close(cache.context.fast.tensors, expected.context.fast.tensors, rtol=1e-4, atol=1e-5)


def test_a_context_is_used_twice_and_stays(text_model, folder):
    before = files(folder)
    prompt = text_tokens(BOOK[10:30], text_model.tokenizer, begin=False).tolist()
    answers = [write(text_model.model, prompt, open_context(folder, text_model.model).cache, **GREEDY) for _ in "ab"]
    assert answers[0] == answers[1]
    assert files(folder) == before


def test_padding_is_never_written(text_model, monkeypatch):
    head = text_model.model.lm_head
    likely = torch.eye(300)[0]
    monkeypatch.setattr(head, "forward", lambda hidden: likely + 0 * hidden.sum(dim=-1, keepdim=True))
    assert 0 not in write(text_model.model, [5, 6, 7], TTTE2ECache(text_model.model.config), **GREEDY)


def test_the_folder_is_one_of_the_cache(text_model, book, folder):
    assert same(TTTE2ECache.from_pretrained(folder, text_model.model), book.cache)
    (folder / "documents.json").unlink()
    assert open_context(folder, text_model.model).documents == ()


def test_nothing_is_overwritten(book, folder):
    before = files(folder)
    with pytest.raises(ValueError, match="holds other files"):
        write_context(folder, book)
    assert files(folder) == before and [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_an_empty_folder_is_filled(text_model, book, tmp_path):
    (tmp_path / "empty").mkdir()
    write_context(tmp_path / "empty", book)
    assert open_context(tmp_path / "empty", text_model.model).documents == book.documents


def test_nothing_half_written_is_left(book, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("no more room")

    monkeypatch.setattr("ttt_e2e.storage.disk.os.replace", fail)
    with pytest.raises(OSError, match="no more room"):
        write_context(tmp_path / "book", book)
    assert list(tmp_path.iterdir()) == []


def test_a_context_of_other_weights_is_refused(folder):
    with pytest.raises(ValueError, match="read with other weights"):
        open_context(folder, small_text_model(seed=1).model)


@pytest.mark.parametrize("name", ["context.safetensors", "context.json", "documents.json"])
def test_a_damaged_context_is_refused(text_model, folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="damaged"):
        open_context(folder, text_model.model)


def test_facts_of_a_wrong_kind_are_refused(text_model, folder):
    facts = json.loads((folder / "documents.json").read_text())
    (folder / "documents.json").write_text(json.dumps(facts | {"answer_end": 3}))
    with pytest.raises(ValueError, match="answer_end"):
        open_context(folder, text_model.model)


def test_several_sequences_are_refused(text_model, tmp_path):
    cache = read(text_model, BOOK).cache
    cache.batch_repeat_interleave(2)
    cache.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="2 sequences"):
        open_context(tmp_path / "two", text_model.model)


def test_a_model_that_does_not_learn_reads_nothing(text_model, monkeypatch):
    monkeypatch.setattr(text_model.model.config, "test_time_training", False)
    with pytest.raises(ValueError, match="test_time_training=False"):
        read(text_model, BOOK)


def test_a_long_text_is_tokenized_in_pieces_at_line_ends(text_model, monkeypatch):
    text = "".join(f"{sentence}\n" for sentence in BOOK.split(","))
    whole = text_tokens(text, text_model.tokenizer, begin=True)
    assert len(text) < PIECE_CHARACTERS
    for limit in (7, 60, len(text) - 1):
        monkeypatch.setattr("ttt_e2e.serving.documents.PIECE_CHARACTERS", limit)
        pieces = text_tokens(text, text_model.tokenizer, begin=True)
        assert text_model.tokenizer.decode(pieces) == text_model.tokenizer.decode(whole)
    assert torch.equal(pieces, whole)


@pytest.mark.parametrize("limit", [13, 60, 100])
def test_a_long_line_is_cut_before_words(text_model, monkeypatch, limit):
    whole = text_tokens(BOOK, text_model.tokenizer, begin=True)
    monkeypatch.setattr("ttt_e2e.serving.documents.PIECE_CHARACTERS", limit)
    assert torch.equal(text_tokens(BOOK, text_model.tokenizer, begin=True), whole)


def test_documents_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("Fluß".encode("latin-1"))
    (tmp_path / "binary.bin").write_bytes(b"a\0b")
    complaints = {"missing.txt": "no such file", "empty.txt": "empty", "latin.txt": "UTF-8", "binary.bin": "NUL"}
    for name, complaint in (complaints | {"": "not a file"}).items():
        with pytest.raises((ValueError, OSError), match=complaint):
            document_text(tmp_path / name)
    (tmp_path / "marked.txt").write_text("text", encoding="utf-8-sig")
    assert document_text(tmp_path / "marked.txt") == "text"


@pytest.mark.parametrize("arguments", [(-1, 1), (float("nan"), 1), (1, 0), (1, 1.1), (1, 1, "all")])
def test_impossible_ways_of_writing(arguments):
    with pytest.raises(ValueError, match="must be"):
        writing_arguments(*arguments)


def test_named_contexts(text_model, book, folder):
    (folder.parent / "other").mkdir()
    (folder.parent / "file").write_text("x")
    contexts = ContextFolder(folder.parent, text_model.model)
    assert contexts.names() == ["book"]
    one, two = contexts.open("book"), contexts.open("book")
    write(text_model.model, [5], one.cache, **GREEDY)
    assert one.tokens > book.tokens and two.tokens == book.tokens
    assert ContextFolder(None, text_model.model).names() == []


@pytest.mark.parametrize("name", ["../book", "../parent/book", "book/", "book/../book", ".", "", "other", "/book", "*"])
def test_names_lead_nowhere_else(text_model, folder, name):
    (folder.parent / "parent").mkdir()
    with pytest.raises(KeyError):
        ContextFolder(folder.parent, text_model.model).open(name)
    with pytest.raises(KeyError):
        ContextFolder(folder.parent / "parent", text_model.model).open(name)


def test_a_context_that_was_written_anew_is_loaded_anew(text_model, folder, tmp_path):
    contexts = ContextFolder(folder.parent, text_model.model, kept=1)
    old = contexts.open("book").tokens
    folder.rename(tmp_path / "old")
    write_context(folder, read(text_model, BOOK[:50]))
    assert contexts.open("book").tokens < old
    assert contexts.open("old").tokens == old


def test_a_missing_folder_of_contexts(text_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ContextFolder(tmp_path / "missing", text_model.model)
