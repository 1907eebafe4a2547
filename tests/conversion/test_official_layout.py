"""The converter from and to the official layout: complete, strict, and a mere rearrangement of values."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ttt_e2e import TTTE2EForCausalLM
from ttt_e2e.conversion.official_layout import (
    config_from_official,
    config_to_official,
    convert_parameters,
    empty_leaves,
    expected_tensors,
    sizes_of_shapes,
    tensor_to_official,
)

from ..modeling.helpers import small_config, small_model

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
    for tensor in expected_tensors(config):
        size = int(np.prod(tensor.shape))
        arrays[tensor.name] = np.arange(first, first + size, dtype=np.float64).reshape(tensor.shape)
        first += size
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
def test_a_configuration_survives_the_way_to_the_official_one_and_back(name):
    groups = official(name)["config"]
    config = config_from_official(groups["model"], groups["training"])
    written = json.loads(json.dumps(config_to_official(config)))
    same = written["model"].keys() - {"seq_len", "sliding_window_size"}
    assert {field: written["model"][field] for field in same} == {field: groups["model"][field] for field in same}
    if config.test_time_training:
        assert written["training"]["spec_inner"] == groups["training"]["spec_inner"]
    assert config_from_official(written["model"], written["training"]).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act.*gelu.*silu"),
        ({"attention_bias": True}, "attention_bias.*True"),
        ({"num_key_value_heads": 2}, "num_key_value_heads.*2.*needs 4"),
        ({"head_dim": 16}, "head_dim.*16.*needs 8"),
        ({"prime_intermediate_size": 24}, "prime_intermediate_size.*24.*needs 48"),
        ({"layer_types": ["full_attention", *["sliding_attention"] * 3]}, "layer_types.*one type"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_parameters.*default"),
        ({"eos_token_id": [2, 3]}, r"eos_token_id.*\[2, 3\].*one id"),
        ({"bos_token_id": None}, "bos_token_id.*None.*one id"),
    ],
)
def test_settings_the_official_model_does_not_have_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        config_to_official(small_config(**changes))


def test_the_tree_is_the_official_one_with_its_empty_leaves():
    groups = official("micro_adamw_steps")["config"]
    config = config_from_official(groups["model"], groups["training"])
    metadata = json.loads((GOLDEN / "official_orbax_tiny" / "0" / "model_weights" / "_METADATA").read_text())
    tree = {
        ".".join(key["key"] for key in leaf["key_metadata"]): leaf["value_metadata"]["value_type"] == "None"
        for leaf in metadata["tree_metadata"].values()
    }
    assert sorted(empty_leaves(config)) == sorted(name for name, empty in tree.items() if empty)
    assert sorted(t.name for t in expected_tensors(config)) == sorted(name for name, empty in tree.items() if not empty)


@pytest.mark.parametrize(
    ("changes", "present", "absent"),
    [
        ({"tie_word_embeddings": False}, [], ["language_model.lm_head"]),
        ({"layer_types": ["full_attention"] * 4}, [], ["seq_modeling_block.kv_cache_index.init"]),
        ({"use_prime_mlp": False}, ["model.h.prime_storage"], ["prime_storage.ffn_prime_norm.bias"]),
        ({"post_norm": False}, ["blocks.seq_post_norm", "prime_storage.ffn_prime_post_norm"], ["ffn_post_norm.bias"]),
        ({"qk_norm": False}, ["seq_modeling_block.q_norm"], ["seq_modeling_block.q_norm.bias"]),
    ],
    ids=["untied", "full-attention", "no-prime", "no-post-norms", "no-qk-norms"],
)
def test_parts_that_a_model_lacks_are_empty_leaves(changes, present, absent):
    config = small_config(**changes)
    leaves = empty_leaves(config)
    arrays = [tensor.name for tensor in expected_tensors(config)]
    assert len(set(leaves)) == len(leaves)
    assert all(any(leaf.endswith(name) for leaf in leaves) for name in present)
    assert not any(leaf.endswith(name) for leaf in leaves for name in absent)
    for leaf in leaves:
        assert not any(array == leaf or array.startswith(f"{leaf}.") for array in arrays), "an array below a None"


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


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "num_key_value_heads": 2}], ids=["", "grouped"])
def test_the_way_back_gives_the_same_bits(changes):
    config = small_config(**changes)
    arrays = numbered(config)
    converted = convert_parameters(arrays, config)
    for tensor in expected_tensors(config):
        back = [tensor_to_official(converted[target], tensor.layout, config.head_dim) for target in tensor.targets]
        assert all(converted[target].shape == tensor.target_shape for target in tensor.targets)
        expected = torch.from_numpy(arrays[tensor.name])
        assert torch.equal(torch.stack(back) if tensor.stacked else back[0], expected), tensor.name


def test_shapes_tell_the_sizes():
    config = small_config(prime_intermediate_size=24)
    sizes = sizes_of_shapes({tensor.name: tensor.shape for tensor in expected_tensors(config)})
    assert len(sizes) == 7
    assert sizes == {field: getattr(config, field) for field in sizes}
    assert sizes_of_shapes({}) == {}


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
