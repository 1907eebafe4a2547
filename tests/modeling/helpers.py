"""A model small enough to test exhaustively, whose lengths straddle every border: mini-batch 8, window 16."""

import torch
from transformers import set_seed

from ttt_e2e import TTTE2EConfig, TTTE2EForCausalLM

VOCAB, BATCH, WINDOW = 97, 8, 16  # vocabulary, mini-batch and window of the small model

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
