"""What makes two runs different."""

import json

import pytest

from ttt_e2e.storage.record import check_record, first_difference, write_record


def test_the_first_difference_is_named():
    assert first_difference({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 2}}) is None
    assert first_difference({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}) == ("b.c", 2, 3)
    assert first_difference({"a": 1, "b": 2}, {"a": 1}) == ("b", 2, None), "what was there and is gone"


@pytest.mark.parametrize("off", [False, 0.0, None, "", []])
def test_a_setting_that_came_later_is_no_difference_while_it_is_off(off):
    assert first_difference({"data": {"rows": 4}}, {"data": {"rows": 4, "later": off}}) is None
    assert first_difference({"data": {"rows": 4}}, {"data": {"rows": 4, "later": 0.5}}) == ("data.later", None, 0.5)


def test_a_run_of_an_earlier_version_is_resumed(tmp_path):
    write_record(tmp_path, {"recipe": {"data": {"sequence_length": 8}}}, {"model": "tiny"})
    check_record(tmp_path, {"recipe": {"data": {"sequence_length": 8, "needle_share": 0.0}}})
    with pytest.raises(ValueError, match=r"begun with recipe.data.needle_share=None, but now it is 0.25"):
        check_record(tmp_path, {"recipe": {"data": {"sequence_length": 8, "needle_share": 0.25}}})
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["asked"] == {"model": "tiny"}
