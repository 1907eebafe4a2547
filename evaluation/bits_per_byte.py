"""Bits per byte: a loss that models with unlike tokenizers share.

bits per byte = (nats of all tokens of a text) / (ln 2 * bytes of the text)
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from ..data.tokenizer import encode_texts
from .subject import Subject, token_losses


def bits_per_byte(subject: Subject, texts: Sequence[str], length: int) -> dict[str, float | int | list[float]]:
    """Bits per byte of the first `length` bytes of every text, each read once from its beginning.

    The model's token for the beginning of a text (for its end, where there is none) stands before the first token, so
    that every byte is predicted, as in the community's harness.

    Args:
        subject: with a tokenizer.
        texts: each of at least `length` bytes in UTF-8.
        length: bytes of each text, cut back to a whole character.

    Returns:
        `bits_per_byte`, `bits_per_byte_by_document`, `bytes` (how many were read) and `tokens` (into how many the
        model's tokenizer cut them).

    Raises:
        ValueError: no tokenizer, none of the two special tokens, or a text that is too short.
    """
    return means_of_texts(text_bits(subject, texts, length))


class TextBits(NamedTuple):
    """Of one text: the bits of all its tokens, its bytes, and the tokens that it was cut into."""

    bits: float
    size: int
    tokens: int


def text_bits(subject: Subject, texts: Sequence[str], length: int) -> list[TextBits]:
    """The bits of each text, with arguments and errors as of `bits_per_byte`."""
    if subject.tokenizer is None:
        raise ValueError(f"subject: {subject.label!r} has no tokenizer, which text needs; give one")
    start, found = first_special_token(subject), []
    parts = [first_bytes(text, length) for text in texts]
    for part in tqdm(parts, desc=subject.label, unit=" documents"):
        [ids] = encode_texts([part], subject.tokenizer, subject.split_special_tokens)
        losses = token_losses(subject, torch.tensor([[start, *ids]]))
        found.append(TextBits(losses.double().sum().item() / math.log(2), len(part.encode()), len(ids)))
    return found


def means_of_texts(texts: Sequence[TextBits]) -> dict[str, float | int | list[float]]:
    """What `bits_per_byte` returns, of the bits of each text."""
    size = sum(text.size for text in texts)
    return {
        "bits_per_byte": sum(text.bits for text in texts) / size,
        "bits_per_byte_by_document": [text.bits / text.size for text in texts],
        "bytes": size,
        "tokens": sum(text.tokens for text in texts),
    }


def first_bytes(text: str, length: int) -> str:
    """The first `length` bytes of a text in UTF-8, without the rest of a character that is cut.

    Raises:
        ValueError: the text has fewer bytes.
    """
    encoded = text.encode()
    if len(encoded) < length:
        raise ValueError(f"texts: one has {len(encoded)} bytes, but length={length}; give longer texts")
    return encoded[:length].decode(errors="ignore")


def first_special_token(subject: Subject) -> int:
    """The id that stands before a text.

    Raises:
        ValueError: the tokenizer knows neither a beginning nor an end of text.
    """
    ids = (subject.tokenizer.bos_token_id, subject.tokenizer.eos_token_id)
    found = next((token for token in ids if token is not None), None)
    if found is None:
        raise ValueError(
            f"subject: the tokenizer of {subject.label!r} has neither a bos_token nor an eos_token, one of which must "
            "stand before the text; set one"
        )
    return found
