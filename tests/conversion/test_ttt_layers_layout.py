"""The official layout of TTT-Linear and TTT-MLP, in both directions."""

import pytest
import torch

from ttt_e2e import TTTLayersConfig, TTTLayersForCausalLM
from ttt_e2e.conversion.ttt_layers_layout import (
    ttt_layers_config_from_official,
    ttt_layers_config_to_official,
    ttt_layers_from_official,
    ttt_layers_to_official,
)

from ..modeling.ttt_layers_golden import VARIANTS, OfficialRun

# All sizes differ, so that no axis can stand for another one.
OFFICIAL = {
    "vocab_size": 31,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "mini_batch_size": 5,
    "tie_word_embeddings": False,
    "ttt_layer_type": "mlp",
    "ttt_base_lr": 0.1,
    "use_gate": True,
    "share_qk": True,
    "pre_conv": True,
    "conv_kernel": 3,
    "rope_theta": 100.0,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


@pytest.fixture(params=VARIANTS)
def run(request):
    return OfficialRun(request.param)


def test_every_parameter_goes_there_and_back(run):
    official = run.under("param.")
    here = ttt_layers_from_official(official, run.config)
    own = {name for name, _ in run.model.named_parameters()}
    assert here.keys() == own
    back = ttt_layers_to_official(here, run.config)
    assert back.keys() == official.keys()
    assert all(torch.equal(back[name], official[name]) for name in official)


def test_a_whole_state_dict_goes_back(run):
    """With the head of a tied model, which the official layout does not hold."""
    back = ttt_layers_to_official(run.model.state_dict(), run.config)
    assert all(torch.equal(back[name], tensor) for name, tensor in run.under("param.").items())


def test_configuration_goes_there_and_back(run):
    given = run.description["config"]
    official = ttt_layers_config_to_official(run.config)
    ignored = {"scan_checkpoint_group_size", "pretraining_tp", "use_cache"}  # change no output
    assert {name: official[name] for name in given.keys() - ignored} == {n: given[n] for n in given.keys() - ignored}
    assert ttt_layers_config_from_official(official).to_dict() == run.config.to_dict()


def test_all_switches_and_sizes():
    config = ttt_layers_config_from_official(OFFICIAL)
    assert config.mixer_types == ["ttt_mlp"] * 2 and config.ttt_rope_theta == 100.0
    model = TTTLayersForCausalLM(config)
    official = ttt_layers_to_official(model.state_dict(), config)
    assert official["model.layers.1.seq_modeling_block.W1"].shape == (3, 4, 16)
    assert official["model.layers.1.seq_modeling_block.learnable_ttt_lr_weight"].shape == (3, 1, 12)
    assert official["model.layers.0.conv.conv.weight"].shape == (12, 1, 3)
    assert "model.layers.0.seq_modeling_block.k_proj.weight" not in official
    again = TTTLayersForCausalLM(config)
    assert not any(again.load_state_dict(ttt_layers_from_official(official, config)))
    ids = torch.arange(3, 14)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_fields_left_out_have_official_defaults():
    config = ttt_layers_config_from_official({})
    assert (config.vocab_size, config.num_hidden_layers, config.mini_batch_size) == (32000, 24, 16)
    assert config.mixer_types == ["ttt_linear"] * 24 and config.ttt_base_learning_rate == 1.0
    assert ttt_layers_config_from_official({"ttt_layer_type": "mlp"}).base_learning_rate("ttt_mlp") == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ttt_layer_type": "conv"}, r"`ttt_layer_type` is 'conv'; known: \['linear', 'mlp'\]"),
        ({"rope_scaling": {"type": "linear"}}, r"`rope_scaling` is .*does not implement"),
        ({"num_key_value_heads": 1}, r"`num_key_value_heads` is 1, which the official code does not implement"),
    ],
)
def test_official_settings_that_cannot_be_read(changes, message):
    with pytest.raises(ValueError, match=message):
        ttt_layers_config_from_official(OFFICIAL | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"mixer_types": ["ttt_linear", "sliding_attention"]},
        {"post_norm": True},
        {"ttt_intermediate_ratio": 2},
        {"ttt_rope_theta": None},
        {"ttt_use_bias": False},
        {"ttt_layer_norm_residual": False},
        {"ttt_learn_learning_rate": False},
        {"ttt_token_scale": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_models_that_the_official_code_cannot_hold(changes):
    fields = {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 2, "mixer_types": ["ttt_mlp"] * 2}
    config = TTTLayersConfig(**fields | changes)
    for convert in (lambda: ttt_layers_config_to_official(config), lambda: ttt_layers_to_official({}, config)):
        with pytest.raises(ValueError, match=f"`{next(iter(changes))}` is .* the official model needs"):
            convert()


class TestStrictness:
    def test_missing(self):
        run = OfficialRun("linear_tied")
        official = run.under("param.")
        del official["model.layers.1.seq_modeling_block.b1"]
        with pytest.raises(ValueError, match=r"lack \['model.layers.1.seq_modeling_block.b1'\]"):
            ttt_layers_from_official(official, run.config)

    def test_superfluous(self):
        run = OfficialRun("linear_tied")
        official = run.under("param.") | {"lm_head.weight": torch.zeros(61, 32)}
        with pytest.raises(ValueError, match=r"hold \['lm_head.weight'\], which this configuration has no place for"):
            ttt_layers_from_official(official, run.config)

    def test_another_shape(self):
        run = OfficialRun("linear_tied")
        official = run.under("param.")
        official["model.layers.0.seq_modeling_block.learnable_token_idx"] = torch.zeros(5)
        with pytest.raises(ValueError, match=r"`model.layers.0.*token_idx` has shape \(5,\).*needs \(4,\)"):
            ttt_layers_from_official(official, run.config)

    def test_the_way_back(self):
        run = OfficialRun("mlp_tied")
        state = run.model.state_dict()
        del state["model.layers.0.ttt.initial_bias_2"]
        with pytest.raises(ValueError, match=r"lack \['model.layers.0.ttt.initial_bias_2'\]"):
            ttt_layers_to_official(state, run.config)
