"""Experiments name what there is, and compare models of equal size."""

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from ttt_e2e.configuration import load_config, load_systems, system_preset
from ttt_e2e.configuration.experiments import (
    EXPERIMENT_FOLDER,
    experiment_description,
    experiment_names,
    load_experiment,
)
from ttt_e2e.configuration.strict_yaml import merged


def changed(tmp_path, change):
    fields = yaml.safe_load((EXPERIMENT_FOLDER / "token-position.yaml").read_text())
    change(fields)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(fields))
    return str(path)


@pytest.mark.parametrize("name", experiment_names())
def test_rows_have_equal_parameters(name):
    experiment = load_experiment(name)
    assert experiment_description(name) and experiment.paper and experiment.claims
    counts = {}
    for label, row in ((label, experiment.rows[row.of or label]) for label, row in experiment.rows.items()):
        config = load_config(system_preset(row.system, experiment.size))
        config = type(config).from_dict(merged(config.to_dict(), load_systems()[row.system].training | row.model))
        with torch.device("meta"):
            counts[label] = AutoModelForCausalLM.from_config(config).num_parameters()
    assert max(counts.values()) <= 1.02 * min(counts.values()), counts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields.update(sise="tiny"), "unknown field 'sise'; did you mean 'size'"),
        (lambda fields: fields["rows"]["TTT-E2E"].update(system="ttt-e3e"), "did you mean 'ttt-e2e'"),
        (lambda fields: fields["rows"].update({"b = 1": {"system": "ttt-e2e"}}), "row 'b = 1': a label must not hold"),
        (lambda fields: fields["rows"]["TTT-E2E"].update(of="nobody"), "of='nobody' is no row"),
        (lambda fields: fields["claims"][0]["smaller"].update(row="nobody"), "row='nobody' is no row"),
        (lambda fields: fields["claims"][0]["larger"].update(length=7), "length=7 is not measured"),
        (lambda fields: fields.update(recipes=["pretrain-9k"]), "recipes has 'pretrain-9k'"),
        (lambda fields: fields.update(baseline="nobody"), "baseline='nobody' is no row"),
    ],
)
def test_mistakes_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_experiment(changed(tmp_path, change))
