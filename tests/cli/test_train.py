"""`ttt-e2e train` from text to a saved model, at a size of seconds; and every mistake before any work."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ttt_e2e.cli.main import app
from ttt_e2e.configuration import load_preset
from ttt_e2e.storage.claims import claimed_run
from ttt_e2e.training import MetaTrainer
from ttt_e2e.training.checkpoints import MANIFEST

from ..storage.holding import held_elsewhere

SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mini_batch_size": 4,
    "sliding_window": 8,
}
SETTINGS = {
    "batch_size": 4,
    "data.sequence_length": 16,
    "data.validation_rows": 8,
    "training.max_steps": 6,
    "training.logging_steps": 1,
    "training.save_steps": 2,
    "training.eval_steps": 3,
    "training.disable_tqdm": "true",
}
WORDS = "the a little old machine reads writes learns forgets quickly slowly and then again".split()


@pytest.fixture
def place(tmp_path):
    """A folder with texts, a small model's configuration, and nothing else."""
    choose = random.Random(0)
    (tmp_path / "texts").mkdir()
    for number in range(16):
        text = " ".join(choose.choices(WORDS, k=80))
        (tmp_path / "texts" / f"{number:02}.txt").write_text(text)
    (tmp_path / "small.yaml").write_text("# small\n" + yaml.safe_dump(SIZES))
    return tmp_path


def train(place, *options, output="run", **changes):
    """Run the command; `changes` with __ for dots replace those of SETTINGS."""
    settings = SETTINGS | {name.replace("__", "."): value for name, value in changes.items()}
    arguments = {"--model": place / "small.yaml", "--recipe": "pretrain-tiny", "--data": place / "texts"}
    arguments |= {"--output": place / output, "--cache": place / "cache"}
    given = dict(zip(options[::2], options[1::2], strict=True)) if len(options) % 2 == 0 else {}
    flags = [] if given or not options else list(options)
    line = [str(part) for pair in (arguments | given).items() if pair[1] is not None for part in pair]
    for name, value in settings.items():
        line += ["--set", f"{name}={value}"]
    return CliRunner().invoke(app, ["train", *line, *flags], env={"COLUMNS": "400", "TERM": "dumb", "NO_COLOR": "1"})


def everything_below(folder):
    """Every file with its contents and time of change."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def refusal(result) -> str:
    """The message of a refused command, its box and line breaks taken away."""
    assert result.exit_code == 2, result.output
    return " ".join(result.output.replace("│", " ").split())


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
    }
    result = train(place, "--model", place / "run", output="longer", **changes)
    assert result.exit_code == 0, result.output
    config = AutoModelForCausalLM.from_pretrained(place / "longer" / "model").config
    assert config.sliding_window == 12
    assert config.rope_parameters["rope_theta"] == 2e6 and config.rope_parameters["rope_type"] == "default"
    before, after = (load_file(place / name / "model" / "model.safetensors") for name in ("run", "longer"))
    # The weights went on from where they were, with a fresh and small learning rate.
    assert all(0 < (after[name] - before[name]).abs().max() < 1e-3 for name in before)


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


# -------------------------------------------------------------------------------------------------------- bad input


def empty(place):
    (place / "empty.txt").write_text("")
    return place / "empty.txt"


def missing(place):
    return place / "nothing.txt"


def binary(place):
    (place / "picture.txt").write_bytes(bytes(range(256)))
    return place / "picture.txt"


def short(place):
    (place / "short.txt").write_text("a word")
    return place / "short.txt"


@pytest.mark.parametrize(
    ("data", "message"),
    [(empty, "empty"), (missing, "nothing.txt"), (binary, "picture.txt"), (short, "sequence_length=16")],
)
def test_unusable_data_is_refused(place, data, message):
    refused = refusal(train(place, "--data", data(place), data__validation_every="null"))
    assert message in refused
    assert not (place / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__sequence_length": 3}, "data.sequence_length=3 is shorter than a mini-batch (model.mini_batch_size=4)"),
        ({"training__max_stepps": 3}, "did you mean 'training.max_steps'"),
        ({"training__save_steps": 3, "training__logging_steps": 2}, "make save_steps=3 a multiple of logging_steps=2"),
        ({"training__learning_rate": -1}, "learning_rate=-1: must be finite and not negative"),
        ({"training__learning_rate": ".nan"}, "learning_rate=nan: must be finite and not negative"),
        ({"training__weight_decay": -0.1}, "weight_decay=-0.1: must be finite and not negative"),
        ({"training__adam_beta1": 1.0}, "adam_beta1=1.0: must be at least 0 and below 1"),
        ({"training__adam_beta2": 1.5}, "adam_beta2=1.5: must be at least 0 and below 1"),
        ({"training__adam_epsilon": -1}, "adam_epsilon=-1: must be finite and not negative"),
        ({"training__max_grad_norm": -1}, "max_grad_norm=-1: must be finite and not negative"),
        ({"training__warmup_steps": -2}, "warmup_steps=-2: must be finite and not negative"),
        ({"training__inner_lr_init": -0.1}, "inner_lr_init=-0.1: must be finite and not negative"),
        ({"training__label_smoothing_factor": 1.5}, "label_smoothing_factor=1.5: must be at least 0 and below 1"),
        ({"training__num_train_epochs": 0}, "num_train_epochs=0: must be finite and above 0"),
        ({"training__logging_steps": 0}, "logging_steps=0: must be finite and above 0"),
        ({"training__save_steps": -2}, "save_steps=-2: must be finite and above 0"),
        ({"training__save_total_limit": 0}, "save_total_limit=0: must be at least 1"),
        ({"training__seed": -1}, "seed=-1: must be at least 0"),
        ({"training__eval_steps": -3}, "eval_steps=-3: must be finite and above 0"),
        ({"model__inner_learning_rate": -1}, "inner_learning_rate"),
        ({"model__mini_batch_size": 0}, "mini_batch_size"),
        ({"model__rms_norm_eps": -1}, "rms_norm_eps"),
        ({"model__hidden_act": 3}, "hidden_act"),
        ({"data__sequence_length": -1}, "data.sequence_length=-1"),
        ({"data__validation_rows": 0}, "data.validation_rows=0"),
        ({"model__sliding_window": 2}, "`mini_batch_size` (4) is larger than `sliding_window` (2)"),
    ],
)
def test_settings_that_do_not_fit_are_refused(place, changes, message):
    assert message in refusal(train(place, **changes))
    assert not (place / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "tinny"), "no such model preset"),
        (("--model", "nowhere/"), "nowhere"),
        (("--recipe", "pretrain-9k"), "pretrain-8k"),
        (("--output", None), "--output is missing"),
        (("--data", None), "--data is missing"),
        (
            ("--data", "gs://bucket/texts"),
            "source='gs://bucket/texts': addresses are not supported; download it",
        ),
        (
            ("--data", "hf://datasets/owner/name"),
            "addresses are not supported; give the data set's name alone",
        ),
        (("--validation-data", "https://host/a.txt"), "addresses are not supported; download it and give the path"),
        (("--lora", "prime"), "adapters are trained on a saved model"),
        (("--tokenizer", "./nowhere"), "there is no such folder"),
    ],
)
def test_options_that_do_not_fit_are_refused(place, options, message):
    assert message in refusal(train(place, *options))
    assert not (place / "run").exists()


def test_folder_of_another_run_is_left_alone(place):
    assert train(place).exit_code == 0
    before = everything_below(place / "run")
    assert "holds another run" in refusal(train(place))
    assert "its run was begun with recipe.training.learning_rate=0.006" in refusal(
        train(place, "--resume", training__learning_rate=0.1)
    )
    (place / "texts" / "00.txt").write_text("other words")
    assert "='other texts', but now it is" in refusal(train(place, "--resume"))
    assert everything_below(place / "run") == before


def test_folder_into_which_another_run_trains_is_left_alone(place):
    with held_elsewhere(claimed_run, place / "run") as other:
        assert f"process {other.pid} on " in refusal(train(place))
        assert [path.name for path in (place / "run").iterdir()] == [".run.lock"]
    assert train(place).exit_code == 0  # the claim has gone with its process
    assert not (place / "run" / ".run.lock").exists()


def test_folder_with_other_files_is_left_alone(place):
    (place / "run").mkdir()
    (place / "run" / "thesis.txt").write_text("years of work")
    assert "holds other files" in refusal(train(place))
    assert "holds no run to resume" in refusal(train(place, "--resume"))
    assert (place / "run" / "thesis.txt").read_text() == "years of work"


def test_run_of_another_model_is_not_resumed(place):
    assert train(place).exit_code == 0
    before = everything_below(place / "run")
    (place / "small.yaml").write_text("# small\n" + yaml.safe_dump(SIZES | {"intermediate_size": 24}))
    assert "model.intermediate_size=16, but now it is 24" in refusal(train(place, "--resume"))
    assert everything_below(place / "run") == before


def test_sizes_of_a_saved_model_cannot_change(place):
    assert train(place).exit_code == 0
    refused = refusal(train(place, "--model", place / "run", output="other", model__hidden_size=32))
    assert "model.hidden_size=32: the saved model has 16" in refused


def test_adapters_are_named_rightly_and_merged_before_more_training(place):
    assert train(place).exit_code == 0
    wrong = train(place, "--model", place / "run", "--lora", "all-linar", output="adapted")
    assert "did you mean 'all-linear'" in refusal(wrong) and not (place / "adapted").exists()
    assert train(place, "--model", place / "run", "--lora", "prime", output="adapted").exit_code == 0
    again = train(place, "--model", place / "adapted", output="again")
    assert "is an adapter: merge it into its model first" in refusal(again)


def test_saved_model_needs_a_recipe_and_its_own_tokenizer(place):
    assert train(place).exit_code == 0
    assert "--recipe: say what a saved model is trained for" in refusal(
        train(place, "--model", place / "run", "--recipe", None, output="other")
    )
    larger = SIZES | {"vocab_size": 400}
    (place / "larger.yaml").write_text("# larger\n" + yaml.safe_dump(larger))
    assert train(place, "--model", place / "larger.yaml", output="larger").exit_code == 0
    refused = refusal(train(place, "--model", place / "run", "--tokenizer", place / "larger" / "model", output="other"))
    assert "but the model only 300" in refused


def test_finished_run_is_evaluated_again_and_not_trained_further(place):
    assert train(place).exit_code == 0
    weights = (place / "run" / "model" / "model.safetensors").read_bytes()
    assert train(place, "--resume").exit_code == 0
    assert (place / "run" / "model" / "model.safetensors").read_bytes() == weights
    assert not (place / "run" / "checkpoint-7").exists()


def test_recipes_that_go_on_refuse_random_weights(place):
    assert "goes on with a saved model" in refusal(train(place, "--recipe", "extend-32k"))


def test_validation_on_the_training_data_is_refused(place):
    refused = refusal(train(place, "--validation-data", place / "texts", data__validation_every="null"))
    assert "is the training data" in refused


def test_misspelt_nested_field_is_refused(place):
    assert "did you mean 'rope_theta'" in refusal(train(place, model__rope_parameters__rope_thetta=1e6))


def test_dry_run_counts_adapters(place):
    assert train(place).exit_code == 0
    line = ["train", "--dry-run", "--model", str(place / "run"), "--recipe", "pretrain-tiny", "--lora", "prime"]
    shown = CliRunner().invoke(app, [*line, "--lora-rank", "2", *("--set", "data.sequence_length=16")])
    numbers = dict(row.split(": ") for row in shown.output.splitlines())
    # Gate, up and down, each A [2, 16] and B [16, 2], in one suffix block.
    assert int(numbers["trained_parameters"]) == 3 * 2 * 2 * 16 < int(numbers["parameters"])
    assert CliRunner().invoke(app, ["train", "--dry-run", "--lora", "nonsense"]).exit_code == 2


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


def test_full_disk_is_noticed_before_anything_is_written(place, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 1000, 1000))
    refused = train(place)
    assert refused.exit_code != 0
    assert "has only 1000" in " ".join((refused.output + repr(refused.exception)).split())
    assert not (place / "run").exists() or not list((place / "run").glob("checkpoint-*"))
