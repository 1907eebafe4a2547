"""Model presets are complete, spelt correctly, of the paper's sizes, and comparable where they are compared."""

import pytest
import torch

from ttt_e2e import TTTE2EConfig, TTTE2EForCausalLM
from ttt_e2e.configuration import load_preset, preset_description, preset_names

SIZES = ("tiny", "125m", "350m", "760m", "1b", "3b")


def meta_model(name):
    with torch.device("meta"):
        return TTTE2EForCausalLM(TTTE2EConfig(**load_preset(name)))


def millions(model):
    """Parameters in millions, rounded to the nearest one, as the paper's table has them."""
    return round(model.num_parameters() / 1e6)


@pytest.mark.parametrize("name", preset_names())
def test_preset_builds_the_configuration_that_it_describes(name):
    fields = load_preset(name)
    config = TTTE2EConfig(**fields)
    assert {field: getattr(config, field) for field in fields} == fields
    assert preset_description(name)


def test_every_size_has_both_baselines():
    twins = ("", "-sliding-window", "-full-attention")
    assert set(preset_names()) == {size + twin for size in SIZES for twin in twins}


def test_default_configuration_is_the_125m_preset():
    assert TTTE2EConfig(**load_preset("125m")).to_dict() == TTTE2EConfig().to_dict()


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
    ours, baseline = TTTE2EConfig(**load_preset(size)), TTTE2EConfig(**load_preset(f"{size}-{twin}"))
    assert set(baseline.layer_types) == {f"{layer_type}_attention"}
    assert not baseline.test_time_training and baseline.num_suffix_layers == 0
    same = "vocab_size hidden_size num_hidden_layers num_attention_heads head_dim sliding_window".split()
    assert [getattr(baseline, name) for name in same] == [getattr(ours, name) for name in same]
    count = meta_model(size).num_parameters()
    assert meta_model(f"{size}-{twin}").num_parameters() == pytest.approx(count, rel=0.02)


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
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
