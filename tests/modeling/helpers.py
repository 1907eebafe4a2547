"""A model small enough to test exhaustively, whose lengths straddle every border: mini-batch 8, window 16."""

import math

import torch
from transformers import set_seed

from ttt_e2e import TTTE2EConfig, TTTE2EForCausalLM

VOCAB, BATCH, WINDOW = 97, 8, 16  # vocabulary, mini-batch and window of the small model
LENGTH = 3 * BATCH + 2  # straddles three borders

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_suffix_layers": 2,
    "mini_batch_size": BATCH,
    "sliding_window": WINDOW,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def small_config(**changes) -> TTTE2EConfig:
    return TTTE2EConfig(**(SMALL | changes))


def small_model(dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> TTTE2EForCausalLM:
    """A random model in evaluation mode; `changes` are configuration fields."""
    set_seed(seed)
    return TTTE2EForCausalLM(small_config(**changes)).to(dtype).eval()


def random_ids(rows: int, length: int, seed: int = 0, low: int = 3, high: int = VOCAB) -> torch.Tensor:
    """[rows, length] ids, none of them special."""
    return torch.randint(low, high, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters' gradients."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_and_gradients(model, ids, **arguments):
    model.zero_grad()
    loss = model(ids, labels=ids, **arguments).loss
    loss.backward()
    return loss.detach(), gradients(model)


def distance(one, other):
    """Relative L2 distance over all gradients."""
    assert one.keys() == other.keys()
    apart = sum((one[name] - other[name]).square().sum().item() for name in one)
    return math.sqrt(apart / sum(tensor.square().sum().item() for tensor in other.values()))


def ragged(rows=3, length=4 * BATCH + 3):
    """Ids and a mask with padding on the right, each row of another number of mini-batches."""
    ids = random_ids(rows, length)
    mask = torch.ones_like(ids)
    mask[1, BATCH + 3 :] = 0
    mask[2, 3 * BATCH :] = 0
    return ids, mask


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Ids, mask and lengths of four rows; columns of padding hold ids of real words."""
    lengths = [LENGTH, BATCH + 1, 2 * BATCH + 5, 3]
    ids, mask = random_ids(4, LENGTH), torch.zeros(4, LENGTH, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    for row, length in enumerate(lengths):
        if side == "left":
            mask[row, LENGTH - length :] = 1
        elif side == "right":
            mask[row, :length] = 1
        else:
            mask[row, torch.randperm(LENGTH, generator=generator)[:length]] = 1
    return ids, mask, lengths
