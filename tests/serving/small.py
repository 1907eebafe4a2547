"""A small random model with a tokenizer, as folders and loaded, and what tests say to it."""

from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing

from ttt_e2e import TTTE2ECache
from ttt_e2e.serving import TextModel

from ..modeling.helpers import small_model
from ..modeling.tiny_tokenizer import SENTENCES, byte_level_tokenizer

BOOK = " ".join(SENTENCES)
GREEDY = {"do_sample": False, "max_new_tokens": 12}


def small_text_model(seed: int = 0, chat_template: bool = True, **changes) -> TextModel:
    """Learns fast and never ends, so that answers show what was read; `changes` are configuration fields."""
    tokenizer = byte_level_tokenizer()
    begin = [("<begin>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<begin> $A", special_tokens=begin)
    if not chat_template:
        tokenizer.chat_template = None
    sizes = {"vocab_size": 300, "num_hidden_layers": 2, "num_suffix_layers": 1, "eos_token_id": None}
    rates = {"initializer_range": 0.3, "inner_learning_rate": 0.3}
    model = small_model(seed=seed, **sizes | rates | changes)
    return TextModel(model, tokenizer)


def save_text_model(text_model: TextModel, folder: Path) -> Path:
    text_model.model.save_pretrained(folder)
    text_model.tokenizer.save_pretrained(folder)
    return folder


def alone(text_model: TextModel, ids: list[int], **arguments) -> list[int]:
    """What plain `generate` writes behind the ids, with nothing read before."""
    new = torch.tensor([list(ids)])
    arguments = GREEDY | {"suppress_tokens": [0]} | arguments
    return text_model.model.generate(new, **arguments)[0, new.shape[1] :].tolist()


def files(folder: Path) -> dict[str, bytes]:
    """All files of a folder, byte by byte."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def same(one: TTTE2ECache, other: TTTE2ECache) -> bool:
    """Whether two caches are bit-identical, as far as reading on depends on them."""
    if one.columns != other.columns or one.context.tokens != other.context.tokens:
        return False
    pairs = [
        (left, right)
        for states in zip(one.context.past_key_values, other.context.past_key_values, strict=True)
        for left, right in zip(*(past.joined() for past in states), strict=True)
    ]
    pairs += list(zip(one.context.fast.tensors, other.context.fast.tensors, strict=True))
    return all(torch.equal(left, right) for left, right in pairs)
