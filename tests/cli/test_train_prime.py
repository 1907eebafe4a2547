"""`ttt-e2e train --train prime` at a size of seconds: a small result on a base that stays as it is."""

import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from ttt_e2e.cli.main import app
from ttt_e2e.conversion import PrimeWeights
from ttt_e2e.conversion.prime_weights import PRIME_WEIGHTS, is_new
from ttt_e2e.loading import find_model, load_model
from ttt_e2e.training.checkpoints import checkpoint_bytes
from ttt_e2e.training.prime_trainer import freeze_all_but_prime

from .train_runs import everything_below, fill_place, refusal, train


@pytest.fixture
def place(tmp_path):
    fill_place(tmp_path)
    assert train(tmp_path, output="base", training__max_steps=2).exit_code == 0
    return tmp_path


def train_prime(place, *options, output="run", **changes):
    return train(place, "--model", place / "base", "--train", "prime", *options, output=output, **changes)


def weights(folder):
    return {name: tensor.clone() for name, tensor in load_model(find_model(folder)).named_parameters()}


@pytest.mark.parametrize("bf16", ["false", "true"])
def test_only_new_weights_change_and_only_they_are_saved(place, bf16):
    base_files = everything_below(place / "base" / "model")
    result = train_prime(place, training__bf16=bf16)
    assert result.exit_code == 0, result.output
    assert everything_below(place / "base" / "model") == base_files
    for folder in (place / "run" / "model", place / "run" / "checkpoint-6"):
        assert all(is_new(name) for name in load_file(folder / PRIME_WEIGHTS))
        assert not (folder / "model.safetensors").exists()
    before, after = weights(place / "base"), weights(place / "run")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if is_new(name)}
    merged = CliRunner().invoke(app, ["merge", "--adapter", str(place / "run"), "--output", str(place / "merged")])
    assert merged.exit_code == 0, merged.output
    whole = weights(place / "merged")
    assert all(torch.equal(whole[name], after[name]) for name in after)


def test_checkpoints_need_room_for_the_new_weights_alone(place, monkeypatch):
    model = load_model(find_model(place / "base"))
    needed = checkpoint_bytes(model)
    freeze_all_but_prime(model)
    room = 3 * checkpoint_bytes(model, saves_frozen=False)  # for two checkpoints and the result
    assert room < 3 * needed
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Disk", "total used free")(2**40, 0, room))
    limited = {"training__save_total_limit": 2}
    assert "checkpoints" in refusal(train(place, "--model", place / "base", output="all", **limited))
    assert train_prime(place, **limited).exit_code == 0


def test_a_resumed_run_ends_as_the_uninterrupted_one(place):
    assert train_prime(place, output="whole").exit_code == 0
    shutil.copytree(place / "whole", place / "cut")
    shutil.rmtree(place / "cut" / "model")
    shutil.rmtree(place / "cut" / "checkpoint-6")
    options = {"--model": place / "base", "--train": "prime", "--output": place / "cut"}
    shutil.rmtree(place / "whole" / "checkpoint-4")
    line = [str(part) for pair in options.items() for part in pair]
    result = train(place, *line, "--resume")
    assert result.exit_code == 0, result.output
    assert "Going on after step 4" in result.output
    one, other = (load_file(place / name / "model" / PRIME_WEIGHTS) for name in ("whole", "cut"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_training_can_go_on_with_new_weights(place):
    assert train_prime(place).exit_code == 0
    assert train(place, "--model", place / "run", "--train", "prime", output="further").exit_code == 0
    assert PrimeWeights.from_pretrained(place / "further").base == PrimeWeights.from_pretrained(place / "run").base


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--train", "some"), "choose one of all, prime"),
        (("--lora", "prime"), "give one or the other"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(place, options, message):
    before = everything_below(place)
    result = train_prime(place, *options)
    assert message in refusal(result)
    assert everything_below(place) == before


def test_a_model_without_anything_new_is_refused_before_any_work(place):
    refused = train(place, "--train", "prime", "--output", place / "run")
    assert "is a preset" in refusal(refused)
    plain = place / "plain.yaml"
    plain.write_text((place / "small.yaml").read_text() + "use_prime_mlp: false\n")
    assert train(place, "--model", plain, output="plain", training__max_steps=2).exit_code == 0
    before = everything_below(place)
    refused = train_prime(place, "--model", place / "plain")
    assert "has no prime MLPs" in refusal(refused)
    assert everything_below(place) == before


def test_a_dry_run_counts_what_is_trained(place):
    line = ["train", "--dry-run", "--model", str(place / "base"), "--recipe", "pretrain-tiny", "--train", "prime"]
    shown = CliRunner().invoke(app, [*line, "--set", "data.sequence_length=16"])
    assert shown.exit_code == 0, shown.output
    count = sum(tensor.numel() for name, tensor in weights(place / "base").items() if is_new(name))
    assert f"{count:,}" in shown.output
