"""`ttt-e2e train` from text to a saved model, at a size of seconds; and every mistake before any work."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ttt_e2e.cli.main import app
from ttt_e2e.configuration import load_preset
from ttt_e2e.training import MetaTrainer
from ttt_e2e.training.checkpoints import MANIFEST

from .train_runs import SETTINGS, everything_below, fill_place, refusal, train


@pytest.fixture
def place(tmp_path):
    return fill_place(tmp_path)


def test_train_writes_a_model_that_loads_and_generates(place):
    result = train(place)
    assert result.exit_code == 0, result.output
    run = place / "run"
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert model.config.bos_token_id == tokenizer.bos_token_id and model.config.use_cache
    inputs = tokenizer("the little old machine", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**inputs, max_new_tokens=5).shape[1] == inputs["input_ids"].shape[1] + 5
    log = json.loads((run / "training_log.json").read_text())
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0]
    evaluations = [entry for entry in log if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [3, 6]
    assert "eval_loss_learning_off" in evaluations[-1] and "eval_loss_learning_off" in result.output
    assert (run / "training.png").read_bytes().startswith(b"\x89PNG")
    assert not list((run / "model").glob("*.bin")) and not list(run.glob(".*"))


def test_resumed_run_ends_as_the_uninterrupted_one(place):
    assert train(place, output="whole").exit_code == 0
    shutil.copytree(place / "whole", place / "cut")
    shutil.rmtree(place / "cut" / "model")
    shutil.rmtree(place / "cut" / "checkpoint-6")
    (place / "cut" / "checkpoint-4" / MANIFEST).unlink()  # as if killed while it was written
    result = train(place, "--resume", output="cut")
    assert result.exit_code == 0, result.output
    one, other = (load_file(place / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    logs = [
        [entry["loss"] for entry in json.loads((place / name / "training_log.json").read_text()) if "loss" in entry]
        for name in ("whole", "cut")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 6


def test_damaged_checkpoint_is_named_and_the_one_before_it_is_used(place, caplog):
    assert train(place).exit_code == 0
    weights = (place / "run" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(place / "run" / "model")
    flip_a_bit(place / "run" / "checkpoint-6" / "model.safetensors")
    output = " ".join(train(place, "--resume").output.split())
    found = "checkpoint-6 is damaged (model.safetensors does not match its digest)"
    assert f"{found}; going back to checkpoint-4, the last whole checkpoint" in caplog.text
    assert "Going on after step 4" in output
    assert (place / "run" / "model" / "model.safetensors").read_bytes() == weights
    for folder in (place / "run").glob("checkpoint-*"):
        flip_a_bit(folder / "optimizer.pt")
    before = everything_below(place / "run")
    assert "checkpoint-6 is damaged (optimizer.pt does not match its digest)" in refusal(train(place, "--resume"))
    assert everything_below(place / "run") == before


def test_run_goes_on_when_prepared_data_is_removed_and_names_what_is_missing(place, monkeypatch):
    begin = MetaTrainer.train

    def train_without_cache(trainer, *arguments, **named):
        shutil.rmtree(place / "cache")
        return begin(trainer, *arguments, **named)

    monkeypatch.setattr(MetaTrainer, "train", train_without_cache)
    result = train(place)
    assert result.exit_code == 0, result.output
    assert (place / "run" / "model" / "model.safetensors").is_file()

    def fail(trainer, *arguments, **named):
        raise FileNotFoundError("some folder: the prepared data has been removed")

    monkeypatch.setattr(MetaTrainer, "train", fail)
    message = refusal(train(place, output="other"))
    assert "the prepared data has been removed (the same command with --resume goes on" in message


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_all_files_of_a_run_are_as_readable_as_the_umask_says(place):
    before = os.umask(0o027)
    try:
        assert train(place).exit_code == 0
    finally:
        os.umask(before)
    files = [path for path in (place / "run").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} > {".safetensors", ".json", ".pt"}
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {path.name: "0o640" for path in files}


def test_run_that_was_killed_before_its_first_checkpoint_begins_again(place):
    assert train(place, output="whole").exit_code == 0
    (place / "early").mkdir()
    shutil.copy(place / "whole" / "run.json", place / "early")
    assert train(place, "--resume", output="early").exit_code == 0
    one, other = (load_file(place / name / "model" / "model.safetensors") for name in ("whole", "early"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("targets", ["all-linear", "prime"])
def test_adapters_are_trained_on_a_saved_model_and_merged(place, targets):
    assert train(place).exit_code == 0
    adapted = train(place, "--model", place / "run", "--lora", targets, "--lora-rank", 2, output="adapted")
    assert adapted.exit_code == 0, adapted.output
    assert (place / "adapted" / "model" / "adapter_model.safetensors").is_file()
    merge = ["merge", "--adapter", str(place / "adapted" / "model"), "--output", str(place / "merged")]
    assert CliRunner().invoke(app, merge).exit_code == 0
    one, other = (AutoModelForCausalLM.from_pretrained(place / name) for name in ("run/model", "merged"))
    moved = {name for name, p in one.named_parameters() if not torch.equal(p, other.get_parameter(name))}
    assert moved and all("prime_mlp" in name for name in moved) == (targets == "prime")


def test_saved_model_is_extended_to_longer_rows_and_another_rope_base(place):
    assert train(place).exit_code == 0
    changes = {
        "data__sequence_length": 32,
        "model__sliding_window": 12,
        "model__rope_parameters__rope_theta": 2e6,
        "training__learning_rate": 1e-5,
        "training__muon_learning_rate": 1e-5,
    }
    result = train(place, "--model", place / "run", output="longer", **changes)
    assert result.exit_code == 0, result.output
    config = AutoModelForCausalLM.from_pretrained(place / "longer" / "model").config
    assert config.sliding_window == 12
    assert config.rope_parameters["rope_theta"] == 2e6 and config.rope_parameters["rope_type"] == "default"
    before, after = (load_file(place / name / "model" / "model.safetensors") for name in ("run", "longer"))
    # The weights went on from where they were, with a fresh and small learning rate.
    assert all(0 < (after[name] - before[name]).abs().max() < 1e-3 for name in before)


@pytest.mark.slow
def test_documents_and_streams_are_trained_on(place):
    assert train(place, output="rows", data__one_document_per_row="true").exit_code == 0
    assert train(place, output="first").exit_code == 0
    changes = {"data__streaming": "true", "data__validation_every": "null"}
    result = train(place, "--tokenizer", place / "first" / "model", output="stream", **changes)
    assert result.exit_code == 0, result.output


# --------------------------------------------------------------------------------------------------------- dry run


def dry_run(*options) -> dict[str, int]:
    result = CliRunner().invoke(app, ["train", "--dry-run", *options])
    assert result.exit_code == 0, result.output
    return dict(line.split(": ") for line in result.output.splitlines())


def test_dry_run_needs_neither_data_nor_tokenizer():
    shown = dry_run("--model", "125m", "--recipe", "pretrain-8k")
    assert shown["parameters"] == "184363776" and shown["fast_weight_bytes_per_sequence"] == str(3 * 3 * 768 * 1664 * 4)
    assert shown["steps"] == "4800" and shown["tokens"] == str(4800 * 64 * 8192)
    assert int(shown["peak_memory_bytes"]) > 16 * 184363776


def test_dry_run_takes_the_vocabulary_of_a_named_tokenizer(place):
    assert train(place).exit_code == 0
    plain = dry_run("--model", "tiny")
    named = dry_run("--model", "tiny", "--tokenizer", str(place / "run" / "model"))
    fewer = load_preset("tiny")["vocab_size"] - len(AutoTokenizer.from_pretrained(place / "run" / "model"))
    assert int(plain["parameters"]) - int(named["parameters"]) == fewer * load_preset("tiny")["hidden_size"]


def test_dry_run_writes_nothing(place):
    before = everything_below(place)
    shown = train(place, "--dry-run")
    assert shown.exit_code == 0 and everything_below(place) == before


def test_dry_run_counts_adapters(place):
    assert train(place).exit_code == 0
    line = ["train", "--dry-run", "--model", str(place / "run"), "--recipe", "pretrain-tiny", "--lora", "prime"]
    shown = CliRunner().invoke(app, [*line, "--lora-rank", "2", *("--set", "data.sequence_length=16")])
    numbers = dict(row.split(": ") for row in shown.output.splitlines())
    # Gate, up and down, each A [2, 16] and B [16, 2], in one suffix block.
    assert int(numbers["trained_parameters"]) == 3 * 2 * 2 * 16 < int(numbers["parameters"])
    assert CliRunner().invoke(app, ["train", "--dry-run", "--lora", "nonsense"]).exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2])
def test_two_processes_train_as_one(place, processes):
    """Started as the documentation says, with the same rows in each step."""
    assert train(place).exit_code == 0
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["-m", "ttt_e2e.cli.main", "train", "--model", place / "small.yaml", "--recipe", "pretrain-tiny"]
    command += ["--data", place / "texts", "--output", place / "two", "--cache", place / "cache"]
    for name, value in SETTINGS.items():
        command += ["--set", f"{name}={value}"]
    subprocess.run(list(map(str, command)), check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    logs = [
        [entry for entry in json.loads((place / name / "training_log.json").read_text()) if "learning_rate" in entry]
        for name in ("run", "two")
    ]
    assert [entry["loss"] for entry in logs[1]] == pytest.approx([entry["loss"] for entry in logs[0]], rel=1e-5)
    assert (place / "two" / "checkpoint-6" / "rng_state_1.pth").is_file(), "there were two"
