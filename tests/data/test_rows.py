"""Documents become rows without losing, mixing or reordering tokens."""

import multiprocessing
import pickle
from itertools import islice

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from ttt_e2e.data import (
    DocumentRows,
    PackedRows,
    PackedStream,
    collate_rows,
    document_prefixes,
    load_documents,
    longest_reading,
    separator_id,
    texts,
    tokenize_documents,
    train_tokenizer,
)

from .letters import letters_tokenizer, store_of

# In tokens: 0 1 2 3 | 0 4 5 6 7 8 | 0 | 0 9, thirteen in all.
TEXTS = ["abc", "defgh", "", "i"]


@pytest.fixture
def store(tmp_path):
    return store_of(tmp_path, *TEXTS)


def as_lists(rows):
    return [{name: tensor.tolist() for name, tensor in row.items()} for row in rows]


def test_rows_are_cut_from_the_documents_end_to_end(store):
    rows = PackedRows(store, sequence_length=3)
    assert len(rows) == 3
    assert as_lists(rows[index] for index in range(3)) == [
        {"input_ids": [0, 1, 2, 3], "labels": [-100, 1, 2, 3]},
        {"input_ids": [0, 4, 5, 6], "labels": [-100, 4, 5, 6]},
        {"input_ids": [7, 8, 0, 0], "labels": [7, 8, -100, -100]},
    ]
    assert {tensor.dtype for row in [rows[0]] for tensor in row.values()} == {torch.int64}
    assert rows[-1]["input_ids"].tolist() == [7, 8, 0, 0]
    with pytest.raises(IndexError):
        rows[3]


def test_what_is_left_over_is_dropped(store):
    rows = PackedRows(store, sequence_length=7)
    assert as_lists(rows[index] for index in range(len(rows))) == [
        {"input_ids": [0, 1, 2, 3, 0, 4, 5, 6], "labels": [-100, 1, 2, 3, -100, 4, 5, 6]}
    ]


def test_a_row_may_be_the_whole_stream_and_no_longer(store):
    assert PackedRows(store, sequence_length=12)[0]["input_ids"].tolist() == [0, 1, 2, 3, 0, 4, 5, 6, 7, 8, 0, 0, 9]
    with pytest.raises(ValueError, match="sequence_length=13: a row has 14 tokens, and the documents have only 13"):
        PackedRows(store, sequence_length=13)


def test_document_rows_hold_one_document_each(store):
    rows = DocumentRows(store, sequence_length=2)
    assert as_lists(rows[index] for index in range(len(rows))) == [
        {"input_ids": [0, 1, 2], "labels": [-100, 1, 2]},  # the rest of it is one token
        {"input_ids": [0, 4, 5], "labels": [-100, 4, 5]},
        {"input_ids": [6, 7, 8], "labels": [6, 7, 8]},
        {"input_ids": [0, 9], "labels": [-100, 9]},
    ]


def test_document_rows_without_anything_to_predict_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="none of the 2 documents has a token besides"):
        DocumentRows(store_of(tmp_path, "", ""), sequence_length=4)


@pytest.mark.parametrize("rows_class", [PackedRows, DocumentRows])
def test_sequence_length_below_one_is_an_error(store, rows_class):
    with pytest.raises(ValueError, match="sequence_length=0: must be at least 1"):
        rows_class(store, 0)


@pytest.mark.parametrize("rows_class", [PackedRows, DocumentRows])
def test_pickled_rows_are_the_same_and_carry_no_tokens(tmp_path, rows_class):
    rows = rows_class(store_of(tmp_path, "abc" * 10_000), sequence_length=5000)
    expected = as_lists([rows[0], rows[4]])
    pickled = pickle.dumps(rows)
    assert len(pickled) < 2000
    assert as_lists(pickle.loads(pickled)[index] for index in (0, 4)) == expected


def test_collated_rows_of_one_length_have_no_mask(store):
    rows = PackedRows(store, 3)
    batch = collate_rows([rows[0], rows[1]])
    assert as_lists([batch]) == [
        {"input_ids": [[0, 1, 2, 3], [0, 4, 5, 6]], "labels": [[-100, 1, 2, 3], [-100, 4, 5, 6]]}
    ]


def test_shorter_rows_are_padded_on_the_right(store):
    rows = DocumentRows(store, 2)
    batch = collate_rows([rows[3], rows[2]])
    assert as_lists([batch]) == [
        {
            "input_ids": [[0, 9, 0], [6, 7, 8]],
            "labels": [[-100, 9, -100], [6, 7, 8]],
            "attention_mask": [[1, 1, 0], [1, 1, 1]],
        }
    ]
    assert batch["attention_mask"].dtype == torch.int64


@pytest.mark.parametrize("sequence_length", [1, 3, 4, 12])
@pytest.mark.parametrize("documents_per_batch", [1, 3, 1000])
def test_stream_gives_the_same_rows_again_and_again(store, monkeypatch, sequence_length, documents_per_batch):
    monkeypatch.setattr(texts, "DOCUMENTS_PER_BATCH", documents_per_batch)
    documents = Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    stream = PackedStream(documents, letters_tokenizer(), sequence_length)
    rows = PackedRows(store, sequence_length)
    expected = as_lists(rows[index] for index in range(len(rows)))
    for _ in range(2):
        # After the last document it begins anew.
        assert as_lists(islice(stream, 2 * len(expected))) == 2 * expected


@pytest.mark.parametrize("split", [True, False])
def test_a_stream_reads_special_tokens_as_a_store_does(tmp_path, split):
    trained = train_tokenizer(["end begin"], 260)
    documents = Dataset.from_dict({"text": ["a<|end|>b", "<|begin|>"]})
    stored = tokenize_documents(documents, trained, tmp_path, split_special_tokens=split)
    rows = PackedRows(stored, 1)
    stream = PackedStream(documents.to_iterable_dataset(), trained, 1, split_special_tokens=split)
    assert as_lists(islice(stream, len(rows))) == as_lists(rows[index] for index in range(len(rows)))
    assert (trained.eos_token_id in stored.tokens) is not split


def test_stream_too_short_for_a_row_is_an_error():
    documents = Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    with pytest.raises(ValueError, match="sequence_length=13: a row has 14 tokens, and the documents have only 13"):
        next(iter(PackedStream(documents, letters_tokenizer(), 13)))


def test_shuffled_stream_has_another_order_in_each_pass():
    documents = Dataset.from_dict({"text": list("abcdefghij")}).to_iterable_dataset().shuffle(seed=0, buffer_size=10)
    stream = PackedStream(documents, letters_tokenizer(), 1)
    rows = as_lists(islice(stream, 20))
    assert rows[:10] != rows[10:]
    assert sorted(map(str, rows[:10])) == sorted(map(str, rows[10:]))
    assert as_lists(islice(stream, 20)) == rows


def test_workers_share_the_stream(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for letter in "abcdef":
        (folder / f"{letter}.txt").write_text(letter)
    documents = load_documents(folder, cache_folder=tmp_path, streaming=True)
    stream = PackedStream(documents, letters_tokenizer(), 1)
    # Forked, for a test's sake: a fresh process would import torch anew.
    loader = DataLoader(
        stream, batch_size=1, num_workers=2, multiprocessing_context=multiprocessing.get_context("fork")
    )
    # A worker begins its share anew when it has come to its end.
    assert sorted(batch["input_ids"][0, 1].item() for batch in islice(loader, 6)) == [1, 2, 3, 4, 5, 6]


def test_separator_is_the_begin_token_or_else_the_end_token():
    assert separator_id(letters_tokenizer(bos_token="b", eos_token="c")) == 2
    assert separator_id(letters_tokenizer(bos_token=None, eos_token="c")) == 3
    with pytest.raises(ValueError, match="neither a bos_token nor an eos_token"):
        separator_id(letters_tokenizer(bos_token=None))


def test_prefixes_are_of_documents_that_are_long_enough(store):
    names, tokens = document_prefixes(store, length=2, count=2)
    assert names == ["0.txt", "1.txt"] and tokens.tolist() == [[0, 1], [0, 4]]
    names, tokens = document_prefixes(store, length=2, count=9)
    assert names == ["0.txt", "1.txt", "3.txt"] and tokens.dtype == torch.int64
    with pytest.raises(ValueError, match="length=7: no document has so many"):
        document_prefixes(store, length=7, count=1)


def test_longest_reading_starts_with_the_longest_document(store):
    for length, names in [(6, ["1.txt"]), (7, ["1.txt", "0.txt"]), (13, ["1.txt", "0.txt", "3.txt", "2.txt"])]:
        used, tokens = longest_reading(store, length)
        assert used == names
        assert tokens.tolist() == [0, 4, 5, 6, 7, 8, 0, 1, 2, 3, 0, 9, 0][:length]
    with pytest.raises(ValueError, match="length=14: the documents have only 13"):
        longest_reading(store, 14)
