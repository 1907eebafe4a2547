"""Decoding loss (arXiv 2512.23675, Figure 7): is what a model writes after a long context good text?

The model continues a prompt; another, stronger model, the judge, says how likely the continuation is.
"""

from collections.abc import Mapping, Sequence

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from .subject import Subject, check_positions, first_tokens, token_losses

# As in the paper; `top_k=0` because `generate` would otherwise keep the 50 likeliest tokens only.
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0, "repetition_penalty": 1.1}


def measure_decoding_loss(
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

    Every row gets exactly `new_tokens` tokens: the end of the text and padding are never written.

    Args:
        judge: scores the continuation given the prompt; reads the same token ids as `subject`.
        documents: token ids, int64 [documents, at least length]; no padding.
        length: tokens of the prompt, at least 1.
        new_tokens: tokens written after it.
        sampling: arguments of `generate` (default: temperature 1, top-p 0.95, repetition penalty 1.1).
        seed: of the samples; random numbers outside are left as they are.
        batch_size: documents continued side by side.
        buckets: parts of the continuation, as equal as possible, at most `new_tokens`.

    Returns:
        `loss` (nats per written token), `loss_by_bucket`, `bucket_starts` (the first position of each, counted from
        the prompt's end) and `tokens` (how many were written).

    Raises:
        ValueError: the two have different vocabularies, a number is not positive, or the documents are too short.
    """
    prompts = first_tokens(documents, length, least=1)
    for name, value in (("new_tokens", new_tokens), ("batch_size", batch_size), ("buckets", buckets)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    _check_vocabularies(subject, judge)
    check_positions(judge.model, length + new_tokens)
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
            losses.append(token_losses(judge, sequences)[:, length - 1 :].double())
            progress.update(losses[-1].numel())
    by_position = torch.cat(losses).mean(dim=0)
    parts = by_position.tensor_split(min(buckets, new_tokens))
    starts = torch.tensor([0] + [len(part) for part in parts[:-1]]).cumsum(0)
    return {
        "loss": by_position.mean().item(),
        "loss_by_bucket": [part.mean().item() for part in parts],
        "bucket_starts": starts.tolist(),
        "tokens": len(prompts) * new_tokens,
    }


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
    check_positions(model, ids.shape[1] + new_tokens)
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


def _check_vocabularies(subject: Subject, judge: Subject) -> None:
    remedy = "the judge reads the same token ids, so name one with the same tokenizer"
    sizes = subject.vocabulary_size, judge.vocabulary_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"judge={judge.label!r}: it knows {sizes[1]} tokens, but {subject.label!r} {sizes[0]}; {remedy}"
        )
    tokenizers = subject.tokenizer, judge.tokenizer
    if None not in tokenizers and tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise ValueError(f"judge={judge.label!r}: its tokens are not those of {subject.label!r}; {remedy}")
