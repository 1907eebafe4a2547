"""Model presets are complete, spelt correctly, and comparable where they are compared."""

import pytest
import torch

from ttt_e2e import TTTE2EConfig, TTTE2EForCausalLM
from ttt_e2e.configuration import load_preset, preset_description, preset_names, presets


@pytest.mark.parametrize("name", preset_names())
def test_preset_builds_the_configuration_that_it_describes(name):
    fields = load_preset(name)
    config = TTTE2EConfig(**fields)
    assert {field: getattr(config, field) for field in fields} == fields
    assert preset_description(name)


def test_default_configuration_is_the_125m_preset():
    assert TTTE2EConfig(**load_preset("125m")).to_dict() == TTTE2EConfig().to_dict()


@pytest.mark.parametrize("baseline", ["demo-sliding-window", "demo-full-attention"])
def test_demo_baselines_have_as_many_parameters(baseline):
    with torch.device("meta"):
        counts = [TTTE2EForCausalLM(TTTE2EConfig(**load_preset(name))).num_parameters() for name in ("demo", baseline)]
    assert counts[0] == pytest.approx(counts[1], rel=1e-3)


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"name='126m'.*125m"):
        load_preset("126m")


def test_misspelt_field_is_an_error_with_a_suggestion(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("# mine\nhiden_size: 32\n")
    monkeypatch.setattr(presets, "MODEL_FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"mine.yaml: unknown field 'hiden_size'; did you mean 'hidden_size'"):
        load_preset("mine")
