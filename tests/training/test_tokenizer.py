"""The tokenizer encodes every text, puts its begin token first, and survives saving."""

import pytest
from transformers import AutoTokenizer

from ttt_e2e.training import train_tokenizer

TEXTS = ["def f(x):\n    return x + 1\n", "import os\nimport sys\n"] * 10


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocabulary_size=280)


@pytest.mark.parametrize("text", ["def f(x):\n    return x\n", "grüße \U0001f600 \x00\t\r\n", " leading", ""])
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_merges_were_learned(tokenizer):
    assert len(tokenizer) == 280
    assert len(tokenizer("import os")["input_ids"]) < 1 + len("import os")


def test_special_tokens_are_the_first_ids(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    batch = ["import os", "def f(x):"]
    assert loaded(batch, padding=True)["input_ids"] == tokenizer(batch, padding=True)["input_ids"]
    assert loaded(batch, padding=True)["attention_mask"][0][0] == 0, "padding must be on the left"


def test_vocabulary_without_room_for_the_bytes_is_an_error():
    with pytest.raises(ValueError, match="vocabulary_size=258: must be at least 259"):
        train_tokenizer(TEXTS, vocabulary_size=258)
