"""Every architecture of the configuration reads alike, and is that of the decoders it is named after."""

import copy
import itertools

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding, apply_rotary_pos_emb

from ttt_e2e import TTTE2ECache, TTTE2EConfig, TTTLayersConfig
from ttt_e2e.layers import rotate

from .helpers import (
    BATCH,
    LENGTH,
    SMALL,
    padded,
    random_ids,
    small_model,
)

ARCHITECTURES = {
    "sliding": {},
    "full attention": {"layer_types": ["full_attention"] * 4, "sliding_window": None},
    "5:1 hybrid": {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
    "no suffix": {"num_suffix_layers": 0, "test_time_training": False},
    "no prime": {"use_prime_mlp": False},
    "narrow prime": {"prime_intermediate_size": 24},
    "grouped": {"num_key_value_heads": 2, "head_dim": 16},
    "bias": {"attention_bias": True},
    "no qk norm": {"qk_norm": False},
    "no post norm": {"post_norm": False},
    "whole model learns": {"num_suffix_layers": 4},
    "gelu untied": {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": False},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
    "no attention": {"use_attention": False, "mini_batch_size": 4, "sliding_window": 2, "use_prime_mlp": False},
    "sinks": {"num_sink_tokens": 3},
    "sinks of a hybrid": {"num_sink_tokens": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "rope by layer type": {
        "num_sink_tokens": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    },
}


@pytest.mark.parametrize("learning", [True, False])
@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_reading_in_parts_is_reading_at_once(changes, learning):
    if learning and changes.get("num_suffix_layers") == 0:
        learning = False
    model = small_model(torch.float64, **changes)
    ids = random_ids(2, LENGTH)
    arguments = {"test_time_training": learning}
    whole = model(ids, use_cache=False, **arguments).logits
    with torch.no_grad():
        cache, parts, start = TTTE2ECache(model.config), [], 0
        for end in (1, 2, BATCH, BATCH + 1, 2 * BATCH + 3, LENGTH):
            parts.append(model(ids[:, start:end], cache=cache, **arguments).logits)
            start = end
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-10)
    plain = model(ids, test_time_training=False).logits
    assert ((whole - plain).abs().max() > 1e-3) == learning


@pytest.mark.parametrize("layers", [TTTE2EConfig, TTTLayersConfig])
def test_each_layer_type_turns_by_its_own_rope(layers, tmp_path):
    """The angles are those of Gemma 3, which has two kinds of RoPE; the first block is that of a model of its kind."""
    by_type = ARCHITECTURES["rope by layer type"]["rope_parameters"]
    ids = random_ids(2, LENGTH)
    for first, second in itertools.permutations(sorted(by_type)):
        kinds = {"layer_types" if layers is TTTE2EConfig else "mixer_types": [first, second]}
        made = {}
        for name, rope in (("both", by_type), ("first", by_type[first]), ("second", by_type[second])):
            torch.manual_seed(0)
            fields = SMALL | {"num_hidden_layers": 2, "num_suffix_layers": 1, "max_position_embeddings": 16} | kinds
            if layers is TTTLayersConfig:
                del fields["num_suffix_layers"]
            config = layers(**fields, rope_parameters=copy.deepcopy(rope))
            made[name] = AutoModelForCausalLM.from_config(config).double().eval()
        hidden = {name: model(ids, output_hidden_states=True).hidden_states for name, model in made.items()}
        assert torch.equal(hidden["both"][1], hidden["first"][1])
        assert (hidden["both"][1] - hidden["second"][1]).abs().max() > 1e-4
        assert (hidden["both"][2] - hidden["first"][2]).abs().max() > 1e-4, "the second block has the other kind"
        made["both"].save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
        assert torch.equal(again(ids).logits, made["both"](ids).logits)
    theirs = Gemma3TextConfig(
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        head_dim=8,
        layer_types=sorted(by_type),
        rope_parameters=copy.deepcopy(by_type),
        max_position_embeddings=16,
    )
    places = torch.arange(40)[None]
    ours, states = again.model.rotary_emb(places, torch.float32), torch.rand(1, 4, 40, 8)
    for kind in by_type:
        expected, _ = apply_rotary_pos_emb(states, states, *Gemma3RotaryEmbedding(theirs)(torch.zeros(1), places, kind))
        turned = rotate(states, *ours[kind])
        torch.testing.assert_close(turned, expected, rtol=0, atol=2e-6)  # their angles are float32


def test_without_attention_a_token_sees_others_only_through_what_was_learned(tmp_path):
    """A bigram model with learning off; padding, batch rows, files and mini-batches of one token as in any model."""
    model = small_model(torch.float64, use_attention=False, mini_batch_size=1, num_suffix_layers=4)
    assert not [name for name, _ in model.named_parameters() if "attn" in name or "input_layernorm" in name]
    ids = random_ids(2, LENGTH)
    plain = model(ids, test_time_training=False).logits
    alone = model(ids[:, 5:6], test_time_training=False).logits
    torch.testing.assert_close(plain[:, 5:6], alone, rtol=1e-12, atol=1e-12)
    learned = model(ids).logits
    torch.testing.assert_close(learned[:, :1], plain[:, :1], rtol=1e-12, atol=1e-12)
    assert (learned[:, 1:] - plain[:, 1:]).abs().amax(dim=(0, 2)).min() > 1e-6, "every token but the first"
    ids, mask, lengths = padded("left")
    together = model(ids, attention_mask=mask).logits
    for row, length in enumerate(lengths):
        own = model(ids[row : row + 1, LENGTH - length :]).logits
        torch.testing.assert_close(together[row : row + 1, LENGTH - length :], own, rtol=1e-9, atol=1e-10)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(again(ids, attention_mask=mask).logits, together)
    with pytest.raises(ValueError, match="`output_attentions=True`, but this model has no attention"):
        model(ids, output_attentions=True)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("config_class", "model_class", "theirs", "ours"),
    [
        (LlamaConfig, LlamaForCausalLM, {}, {}),
        (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3, "attention_bias": True}, {}),
        (LlamaConfig, LlamaForCausalLM, {"rope_parameters": ARCHITECTURES["yarn"]["rope_parameters"]}, {}),
        (LlamaConfig, LlamaForCausalLM, {"rope_parameters": ARCHITECTURES["linear"]["rope_parameters"]}, {}),
        (MistralConfig, MistralForCausalLM, {"sliding_window": 7}, {"layer_types": ["sliding_attention"] * 4}),
        (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}, {"qk_norm": True}),
    ],
    ids=["llama", "llama3-rope-and-bias", "yarn", "linear", "mistral", "qwen3"],
)
def test_the_plain_model_is_that_of_other_decoders(config_class, model_class, theirs, ours):
    """The same weights under our names give the same logits as transformers' own models."""
    sizes = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads initializer_range"
    shared = {name: SMALL[name] for name in sizes.split()} | {
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    other = model_class(config_class(**(shared | theirs))).double().eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    plain = {"layer_types": ["full_attention"] * 4, "qk_norm": False, "post_norm": False}
    none = {"num_suffix_layers": 0, "test_time_training": False, "sliding_window": None}
    model = small_model(torch.float64, **(shared | plain | none | theirs | ours))
    renamed = {}
    for name, tensor in other.state_dict().items():
        name = name.replace("post_attention_layernorm", "pre_feedforward_layernorm")
        renamed["model.lm_head.weight" if name == "lm_head.weight" else name] = tensor
    model.load_state_dict(renamed)
    ids, mask, _ = padded("left")
    real = mask.bool()
    expected = other(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    # Their frequencies and angles are float32, ours float64 from float32 frequencies.
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[real], expected[real], rtol=0, atol=2e-5)
