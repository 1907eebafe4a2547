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


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        (None, "experimint", "demo", "unknown field 'experimint'; did you mean 'experiment'"),
        (None, "experiment", "dmeo", "name='dmeo': no such experiment"),
        (None, "row", "TTT", "row='TTT' is no trained row of 'demo', which has: full attention"),
        (None, "experiment", "latency", "row='TTT-E2E' is no trained row of 'latency', which has: none"),
        ("generation", "new_tokens", "many", "section generation: .*'new_tokens' expected int, got str"),
        ("generation", "long_read_tokens", 1, "must be below long_read_tokens=1"),
    ],
)
def test_mistakes_are_named(tmp_path, section, field, value, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_demo_recipe(changed_recipe(tmp_path, section, field, value))


def test_missing_field_is_named(tmp_path):
    fields = yaml.safe_load(DEMO_RECIPE.read_text())
    del fields["generation"]["read_step"]
    path = tmp_path / "short.yaml"
    path.write_text(yaml.safe_dump(fields))
    with pytest.raises(ValueError, match="section generation: missing field 'read_step'"):
        load_demo_recipe(path)


def test_file_without_a_mapping_is_an_error(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match="must hold a mapping"):
        load_demo_recipe(path)
