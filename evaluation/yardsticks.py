"""Yardsticks beside the losses of models: what counting and compressing alone make of the same texts.

A model that is not better than the 3-gram model of its own training text has learned nothing that counting does not
give; gzip and zstd are numbers that anyone can take again.
"""

import gzip
import math
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow
import torch
from transformers import PreTrainedTokenizerBase

from ..storage.digests import digest
from .kneser_ney import KneserNey
from .results import Point, environment, tokens_digest
from .runs import Evaluation
from .verdicts import n_gram_label

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, compresslevel=9),
    "zstd": lambda data: pyarrow.Codec("zstd", compression_level=19).compress(data, asbytes=True),
}
BY_PART = ("loss_by_position", "loss_by_block")


def measure_yardsticks(
    evaluation: Evaluation, orders: Sequence[int], training_tokens: Callable[[], np.ndarray], vocabulary_size: int
) -> None:
    """Add the points of n-gram models and compressors that are not there yet to a task's results.

    Args:
        evaluation: of a task that is made of losses alone.
        orders: of the n-gram models.
        training_tokens: gives what they count, int64 [tokens].
        vocabulary_size: of the tokenizer.
    """
    task, documents, tokenizer = evaluation.task, evaluation.data.documents, evaluation.candidates[0].tokenizer
    lengths, results = sorted(set(evaluation.request.lengths)), evaluation.results
    assert task.of_losses is not None and documents is not None and tokenizer is not None
    missing = {
        label: [length for length in lengths if not results.has(label, length)]
        for label in (*map(n_gram_label, orders), *COMPRESSORS)
    }
    uncounted = [order for order in orders if missing[n_gram_label(order)]]
    tokens = training_tokens() if uncounted else np.empty(0, dtype=np.int64)
    text = tokens_digest(torch.from_numpy(tokens))
    with results:
        for order in uncounted:
            model, identity = KneserNey(tokens, vocabulary_size, order), ["kneser-ney", order, vocabulary_size, text]
            for length in missing[n_gram_label(order)]:
                losses = model.token_losses(documents[:, :length])
                results.append(_point(evaluation, n_gram_label(order), length, task.of_losses(losses), identity))
        for name, compress in COMPRESSORS.items():
            for length in missing[name]:
                losses, size = compressed_losses(documents[:, :length], tokenizer, compress)
                numbers = task.of_losses(losses) | {"bytes": size}
                for name_of_part in BY_PART:  # a compressor tells only what the whole takes
                    numbers.pop(name_of_part, None)
                results.append(_point(evaluation, name, length, numbers, [name]))


def compressed_losses(
    documents: torch.Tensor, tokenizer: PreTrainedTokenizerBase, compress: Callable[[bytes], bytes]
) -> tuple[torch.Tensor, int]:
    """What a compressor needs for each document, spread evenly over its tokens.

    Args:
        documents: token ids, int64 [documents, length].

    Returns:
        Nats per token, float32 [documents, length - 1]; and the bytes of all texts in UTF-8.
    """
    texts = [str(text).encode() for text in tokenizer.batch_decode(documents, skip_special_tokens=True)]
    nats = torch.tensor([len(compress(text)) * 8 * math.log(2) for text in texts])
    predicted = documents.shape[1] - 1
    return (nats / predicted)[:, None].expand(-1, predicted), sum(map(len, texts))


def _point(evaluation: Evaluation, label: str, length: int, numbers: dict, identity: list) -> Point:
    return Point(
        evaluation.task.name,
        label,
        label,
        length,
        evaluation.recorded,
        numbers,
        environment(),
        {"model": digest(identity), "data": evaluation.data_digest, "settings": digest(evaluation.recorded)},
    )
