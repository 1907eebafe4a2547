"""The registry of systems: every entry can be built, trained and evaluated at every size, and mistakes are named."""

import dataclasses
import inspect

import pytest
from transformers import AutoModelForCausalLM

from ttt_e2e.configuration import load_config, load_systems, system_preset

from .test_presets import SIZES

NAMES = (
    "full-attention sliding-window hybrid mamba2 gated-delta-net ttt-linear ttt-mlp ttt-kvb ttt-naive static-twin "
    "ttt-e2e".split()
)


def test_systems_of_the_papers():
    systems = load_systems()
    assert list(systems) == NAMES
    assert [system.name for system in systems.values()] == NAMES
    assert len({system.label for system in systems.values()}) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_system_has_a_preset_of_every_size(name):
    for size in SIZES:
        assert load_config(system_preset(name, size)).num_hidden_layers == load_config(size).num_hidden_layers


@pytest.mark.parametrize("name", NAMES)
def test_changes_and_arguments_exist(name):
    """Fields that are to differ while training, and arguments of the forward pass, are those of the system's model."""
    system, config = load_systems()[name], load_config(system_preset(name, "tiny"))
    assert set(system.training) <= {field.name for field in dataclasses.fields(config)}
    model = AutoModelForCausalLM.from_config(type(config)(**config.to_dict() | system.training))
    assert set(system.evaluation) <= set(inspect.signature(model.forward).parameters)


def test_naive_differs_from_ours_in_training_only():
    """The same model and the same learning while reading, but trained on the loss without it."""
    systems = load_systems()
    assert system_preset("ttt-naive", "760m") == system_preset("ttt-e2e", "760m") == "760m"
    assert systems["ttt-naive"].training == {"test_time_training": False}
    assert systems["ttt-naive"].evaluation == {"test_time_training": True}
    assert (systems["ttt-e2e"].training, systems["ttt-e2e"].evaluation) == ({}, {})
    assert load_config("760m").test_time_training


@pytest.mark.parametrize(
    ("system", "size", "message"),
    [
        ("mamba", "125m", r"system='mamba': no such system; did you mean 'mamba2'"),
        ("transformer-xl", "125m", r"system='transformer-xl'.*full-attention.*ttt-e2e"),
        ("mamba2", "126m", r"size='126m': no such size of 'mamba2'; did you mean '125m'"),
        ("ttt-e2e", "tiny-mamba2", r"size='tiny-mamba2': no such size of 'ttt-e2e'; choose one of .*tiny"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(system, size, message):
    with pytest.raises(ValueError, match=message):
        system_preset(system, size)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine: {label: Mine}", r"system mine: missing field 'preset_suffix'"),
        ("mine: {label: Mine, preset_suffix: -mine, trainig: {}}", r"system mine: unknown field 'trainig'.*'training'"),
        ("mine: {label: Mine, preset_suffix: -mine, training: on}", r"system mine: .*training"),
        ("mine: Mine", r"system mine must hold a mapping"),
    ],
)
def test_mistakes_in_an_entry_are_named(tmp_path, text, message):
    path = tmp_path / "systems.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_systems(path)
