"""`ttt-e2e convert`: an official checkpoint there and back, verified, and every mistake before any work."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ttt_e2e.cli.convert import convert
from ttt_e2e.conversion.orbax import OrbaxReader

from ..conversion.official import CHECKPOINT, REFERENCE, official_file

pytest.importorskip("tensorstore")


def run(*arguments):
    return CliRunner().invoke(convert, list(map(str, arguments)), env={"COLUMNS": "300", "NO_COLOR": "1"})


def official(folder, *arguments, **options):
    """`convert official` of the small checkpoint into `folder / "model"`."""
    options = {"checkpoint": CHECKPOINT, "size": official_file(folder), "output": folder / "model"} | options
    return run("official", *(part for name, value in options.items() for part in (f"--{name}", value)), *arguments)


def test_there_and_back_with_verification(tmp_path):
    done = official(tmp_path, "--verify", REFERENCE)
    assert done.exit_code == 0, done.output
    assert "64 reference losses" in done.output and "tolerance 5e-05" in done.output
    assert str(CHECKPOINT / "0" / "model_weights") in done.output
    done = run("to-official", "--model", tmp_path / "model", "--output", tmp_path / "official")
    assert done.exit_code == 0 and "config.json" in done.output
    original, back = (OrbaxReader(root / "0" / "model_weights") for root in (CHECKPOINT, tmp_path / "official"))
    assert original.shapes.keys() == back.shapes.keys()
    assert all(torch.equal(original.read(name), back.read(name)) for name in original.shapes)


def test_a_folder_below_the_home_is_verified_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    done = official(tmp_path / "size", "--verify", REFERENCE, output="~/model")
    assert done.exit_code == 0 and (tmp_path / "model" / "model.safetensors").is_file(), done.output


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_losses_that_are_not_the_reference_fail(tmp_path, wrong):
    tensors = load_file(REFERENCE)
    tensors["out.token_nll"][1, 7] += wrong
    save_file(tensors, tmp_path / "reference")
    failed = official(tmp_path, "--verify", tmp_path / "reference")
    assert failed.exit_code == 1 and "does not reproduce" in failed.output
    assert (tmp_path / "model" / "model.safetensors").is_file()
    if wrong < 1:
        passed = official(tmp_path, "--verify", tmp_path / "reference", "--tolerance", 0.01, output=tmp_path / "second")
        difference = re.search(r"losses: ([\d.e-]+) nats \(tolerance 0.01\)", passed.output)
        assert passed.exit_code == 0 and float(difference[1]) == pytest.approx(wrong, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([], {"size": "126m"}, "did you mean '125m'"),
        ([], {"checkpoint": "nowhere"}, "no such folder"),
        ([], {"dtype": "int8"}, "dtype='int8'"),
        (["--tolerance", 1], {}, "--tolerance 1.0 is of --verify"),
        (["--verify", "nowhere"], {}, "no such file"),
    ],
)
def test_mistakes_are_refused_before_any_work(tmp_path, arguments, options, message):
    refused = official(tmp_path, *arguments, **options)
    assert refused.exit_code == 2 and message in refused.output
    assert not (tmp_path / "model").exists()


def test_a_model_that_is_not_there_is_refused(tmp_path):
    refused = run("to-official", "--model", tmp_path, "--output", tmp_path / "official")
    assert refused.exit_code == 2 and "no config.json" in refused.output
    assert not (tmp_path / "official").exists()


def test_help_states_the_formats():
    shown = run("official", "--help").output
    assert all(word in shown for word in ("batch.input_ids", "out.token_nll", "gs://", "5e-05", "50GB"))
    assert all(command in run("--help").output for command in ("official", "to-official"))
