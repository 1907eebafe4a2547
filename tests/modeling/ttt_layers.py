"""Small TTT-Linear and TTT-MLP models, one for every mix of mixers, and how a text is read with them."""

import torch
from transformers import set_seed

from ttt_e2e import TTTLayersConfig, TTTLayersForCausalLM

VOCAB, SIZE, WINDOW = 97, 4, 6  # vocabulary, mini-batch, window
LENGTH = 4 * SIZE + 3  # the window slides, and the last mini-batch is not full
CLOSE = {"rtol": 1e-9, "atol": 1e-9}

MAMBA_BACKBONE = {"ttt_use_gate": True, "ttt_share_qk": True, "ttt_pre_conv": True}
MIXES = {
    "linear": {"mixer_types": ["ttt_linear"] * 2},
    "mlp": {"mixer_types": ["ttt_mlp"] * 2},
    "mamba-backbone": {"mixer_types": ["ttt_linear", "ttt_mlp"], **MAMBA_BACKBONE},
    "pre-conv": {"mixer_types": ["ttt_linear"] * 2, "ttt_pre_conv": True},
    "bare": {
        "mixer_types": ["ttt_linear"] * 2,
        "ttt_use_bias": False,
        "ttt_learn_initial_weights": False,
        "ttt_layer_norm_residual": False,
        "ttt_learn_learning_rate": False,
        "ttt_token_scale": False,
        "ttt_rope_theta": None,
        "ttt_base_learning_rate": 0.1,
    },
    "everything": {
        "mixer_types": ["ttt_linear", "sliding_attention", "ttt_mlp", "full_attention"],
        "post_norm": True,
        **MAMBA_BACKBONE,
    },
    "kvb": {"mixer_types": ["ttt_kvb"] * 2, "ttt_kvb_num_heads": 2, "qk_norm": True, "post_norm": True},
    "kvb-answers-keys": {
        "mixer_types": ["ttt_kvb", "ttt_linear"],
        "ttt_kvb_num_heads": 3,
        "ttt_kvb_output_rule": "key",
        "ttt_kvb_momentum": False,
        "ttt_kvb_weight_norm": False,
    },
    "attention-only": {"mixer_types": ["sliding_attention", "full_attention"]},
}
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_attention_heads": 3,
    "sliding_window": WINDOW,
    "mini_batch_size": SIZE,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def layers_config(mix: str, **changes) -> TTTLayersConfig:
    fields = SMALL | MIXES[mix] | changes
    return TTTLayersConfig(**{"num_hidden_layers": len(fields["mixer_types"])} | fields)


def layers_model(mix: str, dtype: torch.dtype = torch.float64, **changes) -> TTTLayersForCausalLM:
    """A random model in evaluation mode, every parameter away from its neutral value."""
    set_seed(0)
    model = TTTLayersForCausalLM(layers_config(mix, **changes))
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def read(model, ids, sizes, mask=None):
    """Logits of a text that is read in pieces of the given sizes, and the cache after it."""
    cache, logits, end = None, [], 0
    for piece in ids.split(sizes, dim=1):
        end += piece.shape[1]
        part = None if mask is None else mask[:, :end]
        with torch.no_grad():
            output = model(piece, attention_mask=part, cache=cache, use_cache=True)
        cache = output.cache
        logits.append(output.logits)
    return torch.cat(logits, dim=1), cache


def padded(ids: torch.Tensor, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns with the tokens of `ids` among padding that holds ids of real words, and their mask."""
    rows, length = ids.shape
    wider, generator = length + 9, torch.Generator().manual_seed(0)
    mask = torch.zeros(rows, wider, dtype=torch.long)
    for row in range(rows):
        start = {"left": 9, "right": 0}.get(side)
        kept = torch.randperm(wider, generator=generator)[:length]
        mask[row, kept if start is None else slice(start, start + length)] = 1
    columns = torch.randint(3, VOCAB, (rows, wider), generator=generator)
    columns[mask.bool()] = ids.flatten()
    return columns, mask
