"""Documents to tokens, and tokens to the rows that a model is trained on."""

from itertools import chain

from datasets import Dataset
from transformers import PreTrainedTokenizerBase


def tokenize_documents(documents: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Encode every document as a whole: begin token, its tokens, end token.

    Args:
        documents: column `text`; the others are kept.
        tokenizer: one that puts its begin token first by itself and has an end token.

    Returns:
        The documents with a column `input_ids` instead of `text`.
    """

    def encode(batch: dict) -> dict:
        encoded = tokenizer(batch["text"], return_attention_mask=False, verbose=False)["input_ids"]
        return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in encoded]}

    return documents.map(encode, batched=True, remove_columns=["text"], desc="Tokenizing")


def pack_rows(documents: Dataset, training_length: int, seed: int) -> Dataset:
    """Lay shuffled documents end to end and cut them into rows of equal length, as the paper's training does.

    A row holds `training_length` + 1 tokens: the last one is only a target, so that each of the first
    `training_length` positions has one. What is left over at the end is dropped.

    Args:
        documents: column `input_ids`, each document with its begin token.
        training_length: tokens of context in a row.
        seed: of the order of the documents.

    Returns:
        Columns `input_ids` and `labels`, which are equal: the model shifts the labels itself.

    Raises:
        ValueError: the documents are too short in all for a single row.
    """
    row_length = training_length + 1
    tokens = list(chain.from_iterable(documents.shuffle(seed=seed)["input_ids"]))
    if len(tokens) < row_length:
        raise ValueError(
            f"training_length={training_length}: the documents have only {len(tokens)} tokens; "
            "give more text or shorter rows"
        )
    starts = range(0, len(tokens) - row_length + 1, row_length)
    rows = [tokens[start : start + row_length] for start in starts]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def document_prefixes(documents: Dataset, length: int, count: int) -> Dataset:
    """The first `length` tokens of the first `count` documents that have so many.

    Raises:
        ValueError: not one document is long enough.
    """
    long_enough = documents.filter(lambda ids: len(ids) >= length, input_columns="input_ids", desc="Choosing")
    if len(long_enough) == 0:
        raise ValueError(f"length={length}: no document has so many tokens; give longer documents or a smaller length")
    chosen = long_enough.select(range(min(count, len(long_enough))))
    return chosen.map(lambda ids: {"input_ids": ids[:length]}, input_columns="input_ids", desc="Cutting")


def longest_reading(documents: Dataset, length: int) -> tuple[list[str], list[int]]:
    """Tokens of the longest document, followed by the next longest ones while that is not enough.

    Args:
        documents: columns `path` and `input_ids`.
        length: tokens wanted.

    Returns:
        The paths that were used, and `length` tokens.

    Raises:
        ValueError: all documents together are too short.
    """
    paths, tokens = [], []
    for row in sorted(documents, key=lambda document: -len(document["input_ids"])):
        paths.append(row["path"])
        tokens.extend(row["input_ids"])
        if len(tokens) >= length:
            return paths, tokens[:length]
    raise ValueError(f"length={length}: the documents have only {len(tokens)} tokens; give a smaller length")
