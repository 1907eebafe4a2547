"""Bits per byte count every byte once, whatever the tokens."""

import dataclasses
import math

import pytest
import torch

from ttt_e2e.data.tokenizer import train_tokenizer
from ttt_e2e.evaluation import Subject
from ttt_e2e.evaluation.bits_per_byte import bits_per_byte, first_bytes

from .subjects import learner, losses_by_hand

TEXTS = ["some text about something, and än umlaut", "another text that is longer than the first one"]


def reader(text: str, seed: int = 0, **changes) -> Subject:
    tokenizer = train_tokenizer([text], 280)
    torch.manual_seed(seed)
    return Subject("reader", learner(vocab_size=len(tokenizer), **changes), tokenizer)


def test_bits_per_byte_by_hand():
    tested, bits = reader("some text some text"), []
    for text in ("some text about ", "another text tha"):
        ids = tested.tokenizer(text, add_special_tokens=False).input_ids
        row = torch.tensor([[tested.tokenizer.bos_token_id, *ids]])
        bits.append(losses_by_hand(tested.model, row).sum().item() / math.log(2) / 16)
    measured = bits_per_byte(tested, TEXTS, 16)
    assert measured["bits_per_byte_by_document"] == pytest.approx(bits, rel=1e-5)
    assert measured["bits_per_byte"] == pytest.approx(sum(bits) / 2, rel=1e-5) and measured["bytes"] == 32


def test_a_model_that_knows_nothing_needs_the_logarithm_of_its_vocabulary_per_token():
    """Whatever its tokenizer: few tokens with many bytes each, or a token per byte."""
    for text in ("some text about something", "zzzz"):
        tested = reader(text)
        torch.nn.init.zeros_(tested.model.model.embed_tokens.weight)
        measured = bits_per_byte(tested, TEXTS, 20)
        expected = measured["tokens"] * math.log2(tested.vocabulary_size) / measured["bytes"]
        assert measured["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("split", [True, False])
def test_special_tokens_that_a_text_spells_out(split):
    tested = dataclasses.replace(reader("end begin"), split_special_tokens=split)
    text = "ab<|end|>"
    measured = bits_per_byte(tested, [text], len(text))
    tokens = tested.tokenizer(text, add_special_tokens=False, split_special_tokens=split).input_ids
    assert measured["tokens"] == len(tokens) and (tested.tokenizer.eos_token_id in tokens) is not split


def test_a_character_is_not_cut():
    assert first_bytes("aän", 2) == "a" and first_bytes("aän", 3) == "aä"
    with pytest.raises(ValueError, match="one has 4 bytes, but length=5"):
        first_bytes("aän", 5)


def test_a_subject_without_tokenizer_is_an_error():
    with pytest.raises(ValueError, match="'bare' has no tokenizer"):
        bits_per_byte(Subject("bare", learner()), TEXTS, 8)
