"""Documents become rows without losing, mixing or reordering tokens."""

import pytest
from datasets import Dataset

from ttt_e2e.training import document_prefixes, longest_reading, pack_rows, tokenize_documents, train_tokenizer


@pytest.fixture
def documents():
    lengths = [5, 40, 12, 33]
    return Dataset.from_dict(
        {
            "path": [f"{n}.py" for n in range(4)],
            "input_ids": [[100 * n + position for position in range(length)] for n, length in enumerate(lengths)],
        }
    )


def test_tokens_of_a_document_are_framed():
    tokenizer = train_tokenizer(["abc abc abc"], vocabulary_size=262)
    texts = Dataset.from_dict({"path": ["a.py", "b.py"], "text": ["abc", ""]})
    tokens = tokenize_documents(texts, tokenizer)
    assert tokens.column_names == ["path", "input_ids"]
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokens[0]["input_ids"][0] == begin and tokens[0]["input_ids"][-1] == end
    assert tokenizer.decode(tokens[0]["input_ids"], skip_special_tokens=True) == "abc"
    assert tokens[1]["input_ids"] == [begin, end]


def test_rows_are_the_shuffled_documents_end_to_end(documents):
    rows = pack_rows(documents, training_length=7, seed=1)
    stream = [token for ids in documents.shuffle(seed=1)["input_ids"] for token in ids]
    assert len(rows) == 90 // 8
    assert [token for ids in rows["input_ids"] for token in ids] == stream[: 8 * len(rows)]
    assert rows["labels"][:] == rows["input_ids"][:]


def test_rows_longer_than_the_text_are_an_error(documents):
    with pytest.raises(ValueError, match="training_length=90: the documents have only 90 tokens"):
        pack_rows(documents, training_length=90, seed=0)


def test_prefixes_are_of_documents_that_are_long_enough(documents):
    chosen = document_prefixes(documents, length=12, count=2)
    assert chosen["path"][:] == ["1.py", "2.py"]
    assert chosen["input_ids"][:] == [ids[:12] for ids in documents["input_ids"][1:3]]
    with pytest.raises(ValueError, match="length=41"):
        document_prefixes(documents, length=41, count=1)


def test_longest_reading_starts_with_the_longest_document(documents):
    assert longest_reading(documents, 40) == (["1.py"], documents[1]["input_ids"])
    paths, tokens = longest_reading(documents, 50)
    assert paths == ["1.py", "3.py"]
    assert tokens == documents[1]["input_ids"] + documents[3]["input_ids"][:10]
    with pytest.raises(ValueError, match="length=91: the documents have only 90"):
        longest_reading(documents, 91)
