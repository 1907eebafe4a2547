"""Model presets are complete, spelt correctly, of the paper's sizes, and comparable where they are compared."""

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from ttt_e2e import RecurrentHybridConfig, TTTE2EConfig, TTTLayersConfig
from ttt_e2e.configuration import load_config, load_preset, load_systems, preset_description, preset_names

SIZES = ("tiny", "125m", "350m", "760m", "1b", "3b")
BASELINES = [system.name for system in load_systems().values() if system.preset_suffix]


def meta_model(name):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(load_config(name))


def millions(model):
    """Parameters in millions, rounded to the nearest one, as the paper's table has them."""
    return round(model.num_parameters() / 1e6)


@pytest.mark.parametrize("name", preset_names())
def test_preset_builds_the_configuration_that_it_describes(name):
    fields = load_preset(name)
    config = load_config(name)
    kinds = {"mamba2": RecurrentHybridConfig, "gated-delta-net": RecurrentHybridConfig}
    kinds |= dict.fromkeys(("ttt-linear", "ttt-mlp", "ttt-kvb"), TTTLayersConfig)
    assert type(config) is kinds.get(name.partition("-")[2], TTTE2EConfig)
    assert {field: getattr(config, field) for field in fields} == fields
    assert preset_description(name)


def test_every_size_has_every_baseline():
    assert set(preset_names()) == {*SIZES, *(f"{size}-{baseline}" for size in SIZES for baseline in BASELINES)}


@pytest.mark.parametrize("preset", ["125m", "125m-gated-delta-net"])
def test_default_configuration_is_the_125m_preset(preset):
    config = load_config(preset)
    assert config.to_dict() == type(config)().to_dict()


@pytest.mark.parametrize(
    ("size", "total", "fast", "baseline"),
    [
        ("125m", 184, 11.5, 183),
        ("350m", 444, 42.5, 440),
        ("760m", 884, 92.0, 877),
        ("1b", 1468, 160.4, 1458),
        ("3b", 2898, 346.0, 2866),
    ],
)
def test_parameters_are_those_of_the_paper(size, total, fast, baseline):
    """In millions; totals rounded to the nearest million, fast parameters to the nearest tenth of one."""
    model = meta_model(size)
    prime = sum(p.numel() for name, p in model.named_parameters() if ".prime_mlp." in name)
    assert (millions(model), round(prime / 1e6, 1)) == (total, fast)
    assert millions(meta_model(f"{size}-full-attention")) == baseline


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("twin", "layer_type"), [("sliding-window", "sliding"), ("full-attention", "full")])
def test_baselines_differ_only_in_what_they_are_named_after(size, twin, layer_type):
    ours, baseline = load_config(size), load_config(f"{size}-{twin}")
    assert set(baseline.layer_types) == {f"{layer_type}_attention"}
    assert not baseline.test_time_training and baseline.num_suffix_layers == 0
    same = "vocab_size hidden_size num_hidden_layers num_attention_heads head_dim sliding_window".split()
    assert [getattr(baseline, name) for name in same] == [getattr(ours, name) for name in same]


@pytest.mark.parametrize("size", SIZES)
def test_baselines_have_as_many_parameters(size):
    count = meta_model(size).num_parameters()
    for baseline in BASELINES:
        assert meta_model(f"{size}-{baseline}").num_parameters() == pytest.approx(count, rel=0.02), baseline


@pytest.mark.parametrize("size", SIZES)
def test_hybrid_has_full_attention_in_every_sixth_block(size):
    config = load_config(f"{size}-hybrid")
    period = 4 if size == "tiny" else 6  # tiny has no six blocks
    full = [index for index, name in enumerate(config.layer_types) if name == "full_attention"]
    assert full == list(range(period - 1, config.num_hidden_layers, period))
    assert not config.test_time_training and config.num_suffix_layers == 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mixer", ["mamba2", "gated-delta-net"])
def test_recurrent_baselines_attend_in_every_fourth_block(size, mixer):
    ours, baseline = load_config(size), load_config(f"{size}-{mixer}")
    pattern = [mixer.replace("-", "_")] * 3 + ["sliding_attention"]
    assert baseline.mixer_types == pattern * (ours.num_hidden_layers // 4)
    same = "vocab_size hidden_size num_attention_heads head_dim sliding_window rope_parameters eos_token_id".split()
    assert [getattr(baseline, name) for name in same] == [getattr(ours, name) for name in same]
    assert not baseline.linear_allow_neg_eigval
    keys = baseline.linear_num_key_heads * baseline.linear_key_head_dim
    assert mixer == "mamba2" or keys == 0.75 * baseline.hidden_size


def test_tiny_baselines_have_as_many_parameters():
    counts = [meta_model(name).num_parameters() for name in ("tiny", "tiny-sliding-window", "tiny-full-attention")]
    assert counts == pytest.approx([counts[0]] * 3, rel=1e-3)


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"name='126m'.*125m"):
        load_preset("126m")


def preset_file(folder, text):
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_file_of_the_user_varies_a_preset(tmp_path):
    path = preset_file(tmp_path, "# mine\nbase: tiny\nnum_hidden_layers: 3\nlayer_types: full_attention\n")
    changes = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    assert load_preset(path) == load_preset("tiny") | changes
    assert preset_description(path) == "mine"


def test_printed_preset_is_a_preset(tmp_path):
    """What `ttt-e2e presets` prints can be kept as a file."""
    path = preset_file(tmp_path, yaml.safe_dump(load_preset("tiny-mamba2")))
    assert load_config(path).to_dict() == load_config("tiny-mamba2").to_dict()


def test_types_by_block_may_be_a_pattern(tmp_path):
    path = preset_file(tmp_path, "base: tiny-mamba2\n")
    with pytest.raises(ValueError, match="base='tiny-mamba2' has a base itself"):
        load_preset(path)
    text = (
        "model_type: recurrent_hybrid\nbase: tiny\nmixer_types: {repeat: [mamba2, full_attention, gated_delta_net]}\n"
    )
    mixers = ["mamba2", "full_attention", "gated_delta_net", "mamba2"]
    assert load_config(preset_file(tmp_path, text)).mixer_types == mixers
    text = "num_hidden_layers: 3\nmodel_type: recurrent_hybrid\nmixer_types: sliding_attention\n"
    assert load_config(preset_file(tmp_path, text)).mixer_types == ["sliding_attention"] * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_type: recurent_hybrid\n", r"mine.yaml: model_type='recurent_hybrid' is unknown; .*recurrent_hybrid"),
        ("model_type: recurrent_hybrid\nmini_batch_size: 8\n", r"unknown field 'mini_batch_size'"),
        ("mixer_types: mamba2\n", r"unknown field 'mixer_types'"),
        ("layer_types: {repeat: []}\n", r"layer_types: .* must be a list, one type, or \{repeat: \[type, \.\.\.\]\}"),
        ("layer_types: {cycle: [full_attention]}\n", r"layer_types: .* must be a list, one type, or"),
        ("hiden_size: 32\n", r"mine.yaml: unknown field 'hiden_size'; did you mean 'hidden_size'"),
        ("base: 126m\n", r"base='126m' is no model preset; choose one of .*125m"),
        ("base: 125m-full-attention\n", r"has a base itself; use that one, '125m'"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_preset(preset_file(tmp_path, text))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.yaml.*no such file"):
        load_preset(str(tmp_path / "none.yaml"))
