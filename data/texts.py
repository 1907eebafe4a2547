"""The texts of a set of documents, one after the other, with memory that does not grow with it."""

import hashlib
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm

DOCUMENTS_PER_BATCH, CHARACTERS_PER_BATCH = 1000, 2_000_000


class TextTotals(NamedTuple):
    """What all texts come to: SHA-256 of them in their order, UTF-8 bytes, number of documents."""

    digest: str
    text_bytes: int
    documents: int


def text_batches(documents: Dataset | IterableDataset) -> Iterator[list[str]]:
    """The texts (column `text`) in their order, in lists that fit into memory however long the documents are.

    Raises:
        ValueError: a text is missing or is not a text.
    """
    texts, characters, number = [], 0, 0
    # Not so for a stream: a selection from it would not know of the epoch that was set.
    examples = documents.select_columns("text") if isinstance(documents, Dataset) else documents
    for example in examples:
        text = example["text"]
        if not isinstance(text, str):
            raise ValueError(f"documents: the text of document {number} is {text!r}, not a text; leave it out")
        texts.append(text)
        characters, number = characters + len(text), number + 1
        if len(texts) == DOCUMENTS_PER_BATCH or characters >= CHARACTERS_PER_BATCH:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


def text_totals(documents: Dataset) -> TextTotals:
    """Read all texts once."""
    digest, text_bytes, count = hashlib.sha256(), 0, 0
    texts = chain.from_iterable(text_batches(documents))
    for text in tqdm(texts, total=len(documents), desc="Reading", unit=" documents", unit_scale=True, delay=5):
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
        text_bytes, count = text_bytes + len(data), count + 1
    return TextTotals(digest.hexdigest(), text_bytes, count)
