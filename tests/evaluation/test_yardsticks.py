"""Compressors as yardsticks: what they need, spread over tokens."""

import gzip
import math

import pytest
import torch

from ttt_e2e.evaluation.yardsticks import COMPRESSORS, compressed_losses

from ..data.letters import letters_tokenizer


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_compressors_bits_are_nats_of_the_tokens(name):
    tokenizer = letters_tokenizer()
    letters = tokenizer("abcab" * 40, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([letters, letters[::-1]])
    losses, size = compressed_losses(ids, tokenizer, COMPRESSORS[name])
    texts = [tokenizer.decode(row, skip_special_tokens=True).encode() for row in ids]
    assert size == sum(map(len, texts)) and losses.shape == (2, ids.shape[1] - 1)
    for row, text in zip(losses, texts, strict=True):
        assert row.sum().item() == pytest.approx(8 * len(COMPRESSORS[name](text)) * math.log(2), rel=1e-5)
        assert len(set(row.tolist())) == 1


def test_they_are_what_anyone_would_call_by_these_names():
    text = b"to be or not to be " * 50
    assert gzip.decompress(COMPRESSORS["gzip"](text)) == text
    assert COMPRESSORS["zstd"](text)[:4] == bytes.fromhex("28b52ffd")
