"""The recipe of the demo is read strictly."""

import pytest
import yaml

from ttt_e2e.configuration import load_demo_recipe
from ttt_e2e.configuration.demo_recipe import DEMO_RECIPE


def changed_recipe(folder, section, field, value):
    fields = yaml.safe_load(DEMO_RECIPE.read_text())
    (fields[section] if section else fields)[field] = value
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def test_built_in_recipe_evaluates_four_times_the_training_length():
    recipe = load_demo_recipe()
    assert recipe.evaluation.length == 4 * recipe.data.training_length
    assert recipe.data.training_length in recipe.evaluation.bucket_edges


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        (None, "sed", 1, "unknown field 'sed'; did you mean 'seed'"),
        ("data", "training_lenght", 8, "section data: unknown field 'training_lenght'; did you mean 'training_length'"),
        (
            "training",
            "lerning_rate",
            0.1,
            "section training: unknown field 'lerning_rate'; did you mean 'learning_rate'",
        ),
        ("data", "training_length", "long", "section data: .*'training_length' expected int, got str"),
        ("evaluation", "bucket_edges", [0, 8, 4], r"bucket_edges=\[0, 8, 4\] must begin with 0 and increase"),
        ("evaluation", "bucket_edges", [0, 10**6], "must all be below length="),
        ("generation", "long_read_tokens", 1, "must be below long_read_tokens=1"),
        ("baselines", "mine", "no-such", "name='no-such': no such model preset"),
        ("baselines", "big", "125m", "vocab_size=128256"),
    ],
)
def test_mistakes_are_named(tmp_path, section, field, value, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_demo_recipe(changed_recipe(tmp_path, section, field, value))


def test_missing_field_is_named(tmp_path):
    fields = yaml.safe_load(DEMO_RECIPE.read_text())
    del fields["evaluation"]["length"]
    path = tmp_path / "short.yaml"
    path.write_text(yaml.safe_dump(fields))
    with pytest.raises(ValueError, match="section evaluation: missing field 'length'"):
        load_demo_recipe(path)


def test_file_without_a_mapping_is_an_error(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match="must hold a mapping"):
        load_demo_recipe(path)
