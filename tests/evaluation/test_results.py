"""A file of results loses nothing that was measured, and mixes nothing."""

import json
import logging
from dataclasses import replace

import pytest
import torch

from ttt_e2e.evaluation.results import Point, ResultsFile, digest, folder_digest, tokens_digest

IDENTITY = {"model": "weights", "data": "texts", "settings": "none"}
POINT = Point("task", "ours", "runs/ours", 64, {"new_tokens": 4}, {"loss": 2.5}, {"device": "cpu"}, IDENTITY)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "results.jsonl"


def write(path, *points):
    with ResultsFile(path) as results:
        for point in points:
            results.append(point)


def check(results, task="task", settings=POINT.settings, data="texts", models=None, device="cpu"):
    results.check(task, settings, data, models or {"ours": "weights"}, device)


def test_a_point_comes_back_as_it_was(path):
    write(path, POINT, replace(POINT, length=128))
    results = ResultsFile(path)
    assert results.points == [POINT, replace(POINT, length=128)]
    assert results.has("ours", 128) and not results.has("ours", 256) and not results.has("other", 64)


def test_a_number_that_is_not_finite_is_null(path):
    write(path, replace(POINT, numbers={"loss": float("nan"), "curve": [1.0, float("inf")], "tokens": 3}))
    assert json.loads(path.read_text())["numbers"] == {"loss": None, "curve": [1.0, None], "tokens": 3}
    assert ResultsFile(path).points[0].numbers["loss"] is None


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_a_torn_last_line_is_dropped_with_a_warning(path, caplog, kept):
    write(path, POINT)
    line = replace(POINT, length=128).line()
    with path.open("a") as file:
        file.write(line[:kept])
    with caplog.at_level(logging.WARNING):
        logging.getLogger("ttt_e2e.evaluation.results").addHandler(caplog.handler)
        results = ResultsFile(path)
    assert "not written to its end" in caplog.text
    assert results.points == [POINT]
    with results:
        results.append(replace(POINT, length=256))
    assert [point.length for point in ResultsFile(path).points] == [64, 256]


@pytest.mark.parametrize("damage", ['{"task": 1}', "no JSON", '{"a": 1', "[1, 2]"])
def test_damage_inside_the_file_is_an_error_that_names_the_line(path, damage):
    path.parent.mkdir()
    path.write_text(f"{POINT.line()}{damage}\n{POINT.line()}")
    with pytest.raises(ValueError, match="line 2: is no point"):
        ResultsFile(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "other"}, "of the task 'task', not 'other'"),
        ({"data": "other"}, "measured on other data"),
        ({"settings": {"new_tokens": 5}}, "measured with new_tokens=4, not 5"),
        ({"models": {"ours": "changed"}}, "another model with the label 'ours'"),
        ({"device": "H200"}, "measured on 'cpu', not 'H200'"),
    ],
)
def test_results_of_another_run_are_refused_and_left_alone(path, changes, message):
    write(path, POINT)
    before, results = path.read_bytes(), ResultsFile(path)
    check(results)
    with pytest.raises(ValueError, match=message):
        check(results, **changes)
    assert path.read_bytes() == before


def test_a_device_counts_only_where_numbers_depend_on_it(path):
    write(path, replace(POINT, environment={"device": "other"}))
    check(ResultsFile(path), device=None)


def test_models_with_other_labels_may_be_added(path):
    write(path, POINT)
    check(ResultsFile(path), models={"theirs": "other weights"})


def test_two_processes_cannot_write_one_file(path):
    write(path, POINT)
    late = ResultsFile(path)
    with ResultsFile(path) as first:
        with pytest.raises(ValueError, match="another process is writing"), ResultsFile(path):
            pass
        first.append(replace(POINT, length=128))
    with pytest.raises(ValueError, match="has written"), late:
        pass
    with ResultsFile(path):
        pass  # the refused one has let go of the file


def test_identity_of_a_folder_is_that_of_its_weights_and_configuration(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(ValueError, match="no weights"):
        folder_digest(folder)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    before = folder_digest(folder)
    (folder / "README.md").write_text("about it")
    assert folder_digest(folder) == before
    (folder / "model.safetensors").write_bytes(b"weighty")
    after = folder_digest(folder)
    (folder / "config.json").write_text('{"a": 1}')
    assert len({before, after, folder_digest(folder)}) == 3


def test_digests_tell_contents_apart():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    ids = torch.arange(6)
    assert tokens_digest(ids.view(2, 3)) == tokens_digest(ids.view(2, 3).clone())
    assert len({tokens_digest(ids.view(2, 3)), tokens_digest(ids.view(3, 2)), tokens_digest(ids.view(2, 3) + 1)}) == 3
