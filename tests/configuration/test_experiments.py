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
    base, own = (
        yaml.safe_load((EXPERIMENT_FOLDER / f"{name}.yaml").read_text()) for name in ("_tiny", "token-position")
    )
    del own["base"]
    fields = merged(base, own)
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
        (lambda fields: fields.pop("yardsticks"), "there are no yardsticks; add them"),
        (lambda fields: fields["yardsticks"].update(static_twin="nobody"), "static_twin='nobody' is no row"),
        (lambda fields: fields.update(by_recipe={"extend-9k": {}}), "by_recipe has 'extend-9k'"),
        (lambda fields: fields.update(recipes_of={"ttt-e2e": ["extend-9k"]}), "recipes_of, 'ttt-e2e', has 'extend-9k'"),
        (lambda fields: fields.update(recipes_of={"ttt-e3e": []}), "did you mean 'ttt-e2e'"),
        (lambda fields: fields["rows"]["TTT-E2E"].update(seeds=0), "row 'TTT-E2E': seeds=0 must be at least 1"),
        (lambda fields: fields.update(by_recipe={"extend-32k": {"ttt-e3e": []}}), "did you mean 'ttt-e2e'"),
        (lambda fields: fields.update(base="nothing"), "no such experiment"),
    ],
)
def test_mistakes_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_experiment(changed(tmp_path, change))


def test_what_a_base_says_holds_unless_the_experiment_says_otherwise(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "# Mine\nbase: _tiny\npaper: Nothing.\nrows: {full attention: {seeds: 2}, second: {system: mamba2}}\n"
        "measured: [{task: context-length, lengths: [64], documents: 2}]\nclaims: []\n"
    )
    experiment = load_experiment(str(path))
    assert experiment.rows["full attention"].seeds == 2 and experiment.rows["sliding window"].seeds == 1
    assert list(experiment.rows)[-1] == "second" and experiment.yardsticks.n_grams == [3, 5]
    assert not any(name.startswith("_") for name in experiment_names())
    path.write_text(path.read_text().replace("rows: {", "rows: {sliding window: null, "))
    with pytest.raises(ValueError, match="yardsticks: limited_context='sliding window' is no row"):
        load_experiment(str(path))


@pytest.mark.parametrize("name", experiment_names())
def test_losses_are_never_compared_without_yardsticks(name):
    experiment = load_experiment(name)
    assert (experiment.yardsticks is not None) == bool(experiment.recipes) or not experiment.measures_losses()


def test_a_part_keeps_yardsticks_and_what_is_evaluated_of_its_rows():
    experiment = load_experiment("context-length")
    part = experiment.part(["Mamba 2"], seeds=2)
    assert list(part.rows) == [
        "full attention",
        "sliding window",
        "static twin",
        "TTT-E2E",
        "TTT-E2E, learning off",
        "Mamba 2",
    ]
    assert {row.seeds for row in part.rows.values()} == {1, 2}
    named = {number.row for claim in part.claims for number in (claim.smaller, claim.larger)}
    assert "Mamba 2" in named and named <= part.rows.keys() and len(part.claims) < len(experiment.claims)
    assert experiment.part([]) == experiment
    judged = load_experiment("decoding").part(["sliding window"])
    assert "Mamba 2" in judged.rows, "the judge stays"
    with pytest.raises(ValueError, match="row='nobody': experiment 'context-length' has full attention"):
        experiment.part(["nobody"])


def test_the_systems_of_the_headline_are_extended_at_rates_that_were_chosen_for_each():
    experiment = load_experiment("context-length-extended")
    headline = {
        experiment.rows[label].system for label in vars(experiment.yardsticks).values() if isinstance(label, str)
    }
    assert headline <= experiment.by_recipe["extend-packages"].keys()
