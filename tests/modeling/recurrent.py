"""Small recurrent hybrids, one for every mix of mixers."""

import math

import torch
from torch.nn.functional import softplus
from transformers import set_seed

from ttt_e2e import RecurrentHybridConfig, RecurrentHybridForCausalLM

VOCAB, WINDOW, LENGTH = 97, 16, 45  # the window slides, and the scans' chunks of 8 (Mamba 2) end inside the length

MIXES = {
    "mamba2": ["mamba2", "mamba2", "sliding_attention"],
    "gated-delta-net": ["gated_delta_net", "gated_delta_net", "sliding_attention"],
    "attention-first": ["full_attention", "mamba2", "gated_delta_net"],
    "everything": ["gated_delta_net", "mamba2", "sliding_attention", "full_attention"],
    "attention-only": ["sliding_attention", "full_attention"],
}
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "sliding_window": WINDOW,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "mamba_head_dim": 16,
    "mamba_state_size": 8,
    "mamba_chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
}


def hybrid_config(mix: str, **changes) -> RecurrentHybridConfig:
    mixers = MIXES[mix]
    return RecurrentHybridConfig(**SMALL | {"mixer_types": mixers, "num_hidden_layers": len(mixers)} | changes)


def hybrid(mix: str, dtype: torch.dtype = torch.float64, **changes) -> RecurrentHybridForCausalLM:
    """A random model in evaluation mode; `changes` are configuration fields."""
    set_seed(0)
    return RecurrentHybridForCausalLM(hybrid_config(mix, **changes)).to(dtype).eval()


def tolerance(mix: str) -> dict[str, float]:
    """Of logits of size 1 in float64: transformers' recurrent mixers compute their scans in float32 all the same."""
    close = 1e-12 if mix == "attention-only" else 2e-4
    return {"rtol": 0.0, "atol": close}


@torch.no_grad()
def assert_initial_decays_and_steps(model: RecurrentHybridForCausalLM) -> None:
    """Mamba 2 and Gated DeltaNet begin with time steps between 0.001 and 0.1 and with decays of several sizes."""
    for layer in model.model.layers:
        if layer.mixer_type == "mamba2":
            mixer = layer.mamba
            torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, mixer.num_heads + 1))
            assert torch.equal(mixer.D, torch.ones(mixer.num_heads))
            assert 0.4 < mixer.conv1d.weight.abs().max() <= 0.5, "1 / sqrt(kernel of 4)"
            assert mixer.out_proj.weight.abs().max() <= 1 / math.sqrt(mixer.intermediate_size)
        elif layer.mixer_type == "gated_delta_net":
            mixer = layer.linear_attn
            assert (mixer.A_log.exp() <= 16).all() and len(set(mixer.A_log.tolist())) == mixer.num_v_heads
        else:
            continue
        assert ((softplus(mixer.dt_bias) > 0.00099) & (softplus(mixer.dt_bias) < 0.101)).all()
