"""Decoding loss (arXiv 2512.23675, Figure 7): is what a model writes after a long context good text?

The model continues a prompt; another, stronger model, the judge, says how likely the continuation is.
"""

from collections.abc import Mapping, Sequence

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from ..data.tokenizer import encode_with_offsets
from .subject import Subject, check_longest_text, first_tokens, token_losses

# As in the paper; `top_k=0` because `generate` would otherwise keep the 50 likeliest tokens only.
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0, "repetition_penalty": 1.1}


def decoding_loss(
    subject: Subject,
    judge: Subject,
    documents: torch.Tensor,
    length: int,
    new_tokens: int,
    sampling: Mapping | None = None,
    seed: int = 0,
    batch_size: int = 1,
    buckets: int = 8,
) -> dict[str, float | int | list]:
    """Loss, under a judge, of what a model writes after the first `length` tokens of every document.

    Every row gets exactly `new_tokens` tokens: the end of the text and padding are never written. A judge with another
    tokenizer reads the text that they stand for; its loss is still counted per token that the model wrote, and placed
    where in the written text its own tokens begin.

    Args:
        judge: scores the continuation given the prompt.
        documents: token ids, int64 [documents, at least length]; no padding.
        length: tokens of the prompt, at least 1.
        new_tokens: tokens written after it.
        sampling: arguments of `generate` (default: temperature 1, top-p 0.95, repetition penalty 1.1).
        seed: of the samples; random numbers outside are left as they are.
        batch_size: documents continued side by side.
        buckets: parts of the continuation, as equal as possible, at most `new_tokens`.

    Returns:
        `loss` (nats per written token), `loss_by_document`, `loss_by_bucket`, `bucket_starts` (the first position of
        each, counted from the prompt's end) and `tokens` (how many were written).

    Raises:
        ValueError: the two have different vocabularies and no tokenizers that relate them, a number is not positive,
            or the documents are too short.
    """
    prompts = first_tokens(documents, length, least=1)
    for name, value in (("new_tokens", new_tokens), ("batch_size", batch_size), ("buckets", buckets)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    same_tokens = _check_vocabularies(subject, judge)
    if same_tokens:
        check_longest_text(judge.model, length + new_tokens)
    sampling = SAMPLING if sampling is None else sampling
    device = subject.model.device
    losses = []
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        tqdm(total=len(prompts) * new_tokens, desc=subject.label, unit=" tokens", unit_scale=True) as progress,
    ):
        torch.manual_seed(seed)
        for batch in prompts.split(batch_size):
            sequences = write_tokens(subject, batch, new_tokens, **sampling).sequences
            if same_tokens:
                losses.append(token_losses(judge, sequences)[:, length - 1 :].double())
            else:
                losses += [text_losses(subject, judge, row, length)[None] for row in sequences]
            progress.update(len(batch) * new_tokens)
    written = torch.cat(losses)  # [documents, new_tokens]
    by_position = written.mean(dim=0)
    parts = by_position.tensor_split(min(buckets, new_tokens))
    starts = torch.tensor([0] + [len(part) for part in parts[:-1]]).cumsum(0)
    return {
        "loss": by_position.mean().item(),
        "loss_by_document": written.mean(dim=1).tolist(),
        "loss_by_bucket": [part.mean().item() for part in parts],
        "bucket_starts": starts.tolist(),
        "tokens": len(prompts) * new_tokens,
    }


def text_losses(subject: Subject, judge: Subject, ids: torch.Tensor, length: int) -> torch.Tensor:
    """A judge's losses of the written part of a text that it cuts into tokens of its own.

    Args:
        ids: [tokens] of the subject's tokenizer, of which the first `length` were given.

    Returns:
        Nats, float64 [tokens - length]: each loss stands where, in the written characters, the judge's token begins.
    """
    given, text = (str(subject.tokenizer.decode(part, skip_special_tokens=True)) for part in (ids[:length], ids))
    [encoded] = encode_with_offsets([text], judge.tokenizer, judge.split_special_tokens, add_special_tokens=True)
    losses = token_losses(judge, torch.tensor([encoded.ids]))[0].double()
    starts = torch.tensor([start for start, _ in encoded.offsets[1:]]) - len(given)
    new_tokens, characters = len(ids) - length, max(1, len(text) - len(given))
    written = starts >= 0
    places = (starts[written] * new_tokens // characters).clamp(max=new_tokens - 1)
    return torch.zeros(new_tokens, dtype=torch.float64).index_add(0, places, losses[written])


def write_tokens(
    subject: Subject, ids: torch.Tensor, new_tokens: int, attention_mask: torch.Tensor | None = None, **settings
) -> GenerateDecoderOnlyOutput:
    """Let a model write exactly `new_tokens` tokens in every row.

    Args:
        ids: int64 [rows, length], padded on the left.
        attention_mask: [rows, length], 0 at padding; None: nothing is padded.
        settings: further arguments of `generate`.

    Raises:
        ValueError: the model has a learned position for each token, and too few of them.
    """
    model = subject.model
    check_longest_text(model, ids.shape[1] + new_tokens)
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    ends = _ends_of_text(model)
    if ends:
        # No row ever ends; naming an id for padding only spares a warning in every call.
        settings = {"suppress_tokens": ends, "pad_token_id": ends[0]} | settings
    return model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=new_tokens,
        return_dict_in_generate=True,
        **subject.arguments,
        **settings,
    )


def _ends_of_text(model: PreTrainedModel) -> list[int]:
    """The ids after which a row would be finished: end of text, and the padding that stands for it."""
    config = model.generation_config
    given = [config.eos_token_id, config.pad_token_id]
    lists = [ids if isinstance(ids, Sequence) else [ids] for ids in given if ids is not None]
    return sorted({int(token) for ids in lists for token in ids})


def _check_vocabularies(subject: Subject, judge: Subject) -> bool:
    """Whether the two read the same token ids.

    Raises:
        ValueError: they do not, and there are no tokenizers to go by way of the text.
    """
    tokenizers = subject.tokenizer, judge.tokenizer
    if None in tokenizers:
        sizes = subject.vocabulary_size, judge.vocabulary_size
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"judge={judge.label!r}: it knows {sizes[1]} tokens, but {subject.label!r} {sizes[0]}; give both their "
                "tokenizers, or name a judge with the same one"
            )
        return True
    if tokenizers[0].get_vocab() == tokenizers[1].get_vocab():
        return True
    if not judge.tokenizer.is_fast:
        raise ValueError(
            f"judge={judge.label!r}: its tokenizer is not that of {subject.label!r}, and does not tell where its "
            "tokens stand in a text; give it a fast tokenizer, or name a judge with the same one"
        )
    return False
