"""The converter from the official layout: complete, strict, and a mere rearrangement of values."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ttt_e2e import TTTE2EForCausalLM
from ttt_e2e.convert_jax_checkpoint import config_from_official, convert_parameters, expected_tensors

from .helpers import small_config, small_model

GOLDEN = Path(__file__).parents[1] / "golden"
VARIANTS = sorted(path.stem for path in GOLDEN.glob("*.json"))
WQ = "language_model.model.h.blocks.seq_modeling_block.wq.weight"
Q_NORM = "language_model.model.h.blocks.seq_modeling_block.q_norm.weight"


def official(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def parameters(name: str) -> dict[str, np.ndarray]:
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return {key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")}


def numbered(config) -> dict[str, np.ndarray]:
    """Official parameters in which no value occurs twice."""
    arrays, first = {}, 0
    for name, (shape, _, _) in expected_tensors(config):
        arrays[name] = np.arange(first, first + np.prod(shape), dtype=np.float64).reshape(shape)
        first += arrays[name].size
    return arrays


@pytest.mark.parametrize("name", VARIANTS)
def test_config_from_official_names_every_setting(name):
    model, training = official(name)["config"]["model"], official(name)["config"]["training"]
    config = config_from_official(model, training)
    assert config.test_time_training == (training["train_mode"] == "meta")
    same = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads mini_batch_size rms_norm_eps"
    for field in [*same.split(), "tie_word_embeddings", "qk_norm", "post_norm", "bos_token_id", "eos_token_id"]:
        assert getattr(config, field) == model[field], field
    assert config.num_suffix_layers == model["suffix_len"]
    assert config.use_prime_mlp == model["prime"]
    assert config.rope_parameters["rope_theta"] == model["rope_theta"]
    slides = model["seq_modeling_block"] == "SWA"
    assert set(config.layer_types) == {"sliding_attention" if slides else "full_attention"}
    assert config.sliding_window == (model["sliding_window_size"] if slides else None)
    if config.test_time_training:
        assert config.inner_learning_rate == training["optimizer_inner"]["lr"]
        assert config.inner_max_grad_norm == training["optimizer_inner"]["clip_gradient"]


@pytest.mark.parametrize(
    ("group", "change", "message"),
    [
        ("model", {"seq_modeling_block": "Mamba"}, "seq_modeling_block.*Mamba"),
        ("model", {"pre_norm": False}, "pre_norm.*False"),
        ("model", {"output_size": 32000}, "output_size.*32000.*vocab_size.*61"),
        ("training", {"optimizer_inner": {"optimizer_type": "adamw", "lr": 1.0}}, "optimizer_type.*adamw"),
    ],
)
def test_settings_this_model_does_not_have_are_named(group, change, message):
    groups = official("micro_adamw_steps")["config"]
    groups[group] |= change
    with pytest.raises(ValueError, match=message):
        config_from_official(groups["model"], groups["training"])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_lands_in_the_state_dict(name):
    groups = official(name)["config"]
    config = config_from_official(groups["model"], groups["training"])
    converted = convert_parameters(parameters(name), config)
    state = TTTE2EForCausalLM(config).state_dict()
    assert converted.keys() == state.keys() - {"model.lm_head.weight"}, "a tied head is left out, all else is there"
    assert all(converted[key].shape == state[key].shape for key in converted)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False},
        {"tie_word_embeddings": False, "num_key_value_heads": 2, "prime_intermediate_size": 24},
        {"qk_norm": False, "post_norm": False},
        {"use_prime_mlp": False},
        {"num_suffix_layers": 0, "test_time_training": False},
    ],
    ids=["untied", "untied-grouped-narrow-prime", "no-norms", "no-prime", "no-suffix"],
)
def test_values_are_rearranged_and_never_scaled(changes):
    config = small_config(**changes)
    arrays = numbered(config)
    converted = convert_parameters(arrays, config)
    values = torch.cat([tensor.flatten() for tensor in converted.values()]).sort().values
    assert torch.equal(values, torch.arange(len(values), dtype=torch.float64)), "each value once, none changed"
    model = small_model(torch.float64, **changes)
    keys = model.load_state_dict(converted, strict=False)
    assert not keys.unexpected_keys
    assert keys.missing_keys == (["model.lm_head.weight"] if config.tie_word_embeddings else [])
    assert converted["model.norm.weight"].tolist() == arrays["language_model.model.ln_f.weight"].tolist()
    if not config.tie_word_embeddings:
        head = torch.from_numpy(arrays["language_model.lm_head.weight"])
        assert torch.equal(model.lm_head.weight, head.mT)
        assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    if config.use_prime_mlp and config.num_suffix_layers:
        prime = arrays["language_model.model.h.prime_storage.feed_forward_prime.w2.weight"]
        first = config.num_prefix_layers
        assert converted[f"model.layers.{first}.prime_mlp.down_proj.weight"].tolist() == prime[0].T.tolist()


def test_interleaved_pairs_become_halves():
    """Channels (2i, 2i + 1), which the official RoPE rotates together, stand head_dim / 2 apart here."""
    config = small_config()
    arrays = numbered(config)
    converted = convert_parameters(arrays, config)
    half = config.head_dim // 2
    q_norm = converted["model.layers.1.self_attn.q_norm.weight"]
    assert q_norm[:half].tolist() == arrays[Q_NORM][1, 0::2].tolist()
    assert q_norm[half:].tolist() == arrays[Q_NORM][1, 1::2].tolist()
    heads = converted["model.layers.1.self_attn.q_proj.weight"].view(config.num_attention_heads, config.head_dim, -1)
    official_heads = arrays[WQ][1].T.reshape(config.num_attention_heads, config.head_dim, -1)
    assert heads[:, half:].tolist() == official_heads[:, 1::2].tolist()


def test_a_missing_tensor_is_named():
    config = small_config()
    arrays = numbered(config)
    del arrays[WQ]
    with pytest.raises(ValueError, match=f"lack.*{WQ}"):
        convert_parameters(arrays, config)


def test_a_superfluous_tensor_is_named():
    config = small_config()
    arrays = numbered(config) | {"language_model.lm_head.weight": np.zeros((32, 97))}
    with pytest.raises(ValueError, match=r"language_model\.lm_head\.weight.*no place"):
        convert_parameters(arrays, config)


def test_a_wrongly_shaped_tensor_is_named_with_both_shapes():
    config = small_config()
    arrays = numbered(config)
    arrays[WQ] = arrays[WQ][:, :-1]
    with pytest.raises(ValueError, match=rf"{WQ}.*\(4, 31, 32\).*\(4, 32, 32\)"):
        convert_parameters(arrays, config)
