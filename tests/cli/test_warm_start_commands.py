"""The three commands of a warm start, one after the other, and what they say about mistakes."""

import inspect
import json

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from ttt_e2e.cli.main import app as main_app
from ttt_e2e.cli.warm_start import transformer, tune_inner_lr
from ttt_e2e.data import train_tokenizer
from ttt_e2e.evaluation.inner_learning_rate import DEFAULT_GRID

SENTENCES = ("the old machine reads on and on. ", "a letter is written slowly. ", "then it forgets again. ")
# Room for a token that transformers adds to every tokenizer of a Qwen2.
SIZES = {"vocab_size": 301, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.1, "tie_word_embeddings": True}
app = typer.Typer()
app.command()(transformer)
app.command()(tune_inner_lr)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with texts and a small Qwen2, which is the current one."""
    (tmp_path / "texts").mkdir()
    for number, sentence in enumerate(SENTENCES):
        (tmp_path / "texts" / f"{number}.txt").write_text(20 * sentence)
    tokenizer = train_tokenizer(SENTENCES, 300)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**SIZES, **ids)).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*line, of=app):
    environment = {"COLUMNS": "400", "TERM": "dumb", "NO_COLOR": "1"}
    return CliRunner().invoke(of, [str(word) for word in line], env=environment)


def convert(*options):
    sizes = ("--window", 16, "--suffix", 1, "--mini-batch", 8)
    return call("transformer", "--model", "source", "--output", "warm", *sizes, *options)


def tune(*options, model="warm"):
    line = ("--model", model, "--data", "texts", "--output", "sweep", "--cache", "cache", "--length", 40)
    return call("tune-inner-lr", *line, *options)


def refusal(result) -> str:
    """The message of a refused command, its box and line breaks taken away."""
    assert result.exit_code == 2, result.output
    return " ".join(result.output.replace("│", " ").split())


def test_convert_tune_and_train_follow_one_another(place):
    result = convert("--prime-size", 20, "--inner-lr", 0.5)
    assert result.exit_code == 0, result.output
    assert "1,008 of them new" in result.output and "the last 1 of 2 blocks learn" in result.output
    assert "ttt-e2e tune-inner-lr --model warm" in result.output
    config = json.loads((place / "warm" / "config.json").read_text())
    expected = {"sliding_window": 16, "num_suffix_layers": 1, "mini_batch_size": 8, "prime_intermediate_size": 20}
    assert expected.items() <= config.items() and config["inner_learning_rate"] == 0.5
    result = tune("--learning-rates", "0,0.03,0.3,3", "--mini-batches", "4,8", "--write")
    assert result.exit_code == 0, result.output
    assert "3 documents of 40 tokens" in result.output and "Best inner learning rate" in result.output
    assert "minus learning off" in result.output
    best = json.loads((place / "sweep" / "best.json").read_text())
    config = json.loads((place / "warm" / "config.json").read_text())
    assert best["written"] and config["inner_learning_rate"] == best["best"]["learning_rate"]
    assert config["mini_batch_size"] == best["best"]["mini_batch_size"]
    settings = ["batch_size=2", "data.sequence_length=16", "training.max_steps=2", "training.logging_steps=1"]
    settings += ["training.save_steps=1", "training.bf16=false", "training.disable_tqdm=true"]
    line = ["train", "--model", "warm", "--recipe", "warm-start", "--data", "texts", "--output", "run"]
    line += ["--cache", "cache", *(word for setting in settings for word in ("--set", setting))]
    result = call(*line, of=main_app)
    assert result.exit_code == 0, result.output
    trained = AutoModelForCausalLM.from_pretrained(place / "run" / "model")
    assert trained.config.inner_learning_rate == best["best"]["learning_rate"]
    assert trained.model.layers[1].prime_mlp.down_proj.weight.abs().max() > 0
    result = call(
        *("tune-inner-lr", "--model", "run/checkpoint-1", "--data", "texts", "--output", "sweep-1", "--length", 40),
        *("--learning-rates", "0.03,0.3", "--cache", "cache"),
    )
    assert result.exit_code == 0, result.output


def test_the_grid_is_the_same_in_python_and_on_the_command_line():
    default = inspect.signature(tune_inner_lr).parameters["learning_rates"].default
    assert tuple(map(float, default.split(","))) == DEFAULT_GRID


def test_a_second_sweep_measures_nothing_again(place):
    convert()
    assert tune("--learning-rates", "0.1").exit_code == 0
    result = tune("--learning-rates", "0.1")
    assert result.exit_code == 0 and "nothing was measured again" in result.output


def test_no_prime_adds_no_parameters(place):
    result = convert("--no-prime")
    # Only the bias of o_proj, which Qwen2 does not have, and which is zero.
    assert result.exit_code == 0 and " 32 of them new" in result.output
    source = AutoModelForCausalLM.from_pretrained(place / "source")
    assert AutoModelForCausalLM.from_pretrained(place / "warm").num_parameters() == source.num_parameters() + 2 * 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--suffix", 0), "`num_suffix_layers`=0: must be between 1 and 2"),
        (("--suffix", 3), "`num_suffix_layers`=3: must be between 1 and 2"),
        (("--mini-batch", 17), "`mini_batch_size` (17) is larger than `sliding_window` (16)"),
        (("--output", "source"), "holds other files"),
        (("--model", "nowhere/at/all"), "there is no such folder"),
        (("--model", "texts"), "no config.json in it"),
        (("--dtype", "int4"), "dtype='int4': choose one of"),
        (("--max-shard-size", "much"), "max_shard_size='much'"),
    ],
)
def test_mistakes_of_a_conversion_are_refused(place, options, message):
    before = sorted(place.iterdir())
    assert message in refusal(convert(*options))
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--learning-rates", "0.1;1"), "--learning-rates '0.1;1': give numbers with commas between them"),
        (("--mini-batches", "4.5"), "--mini-batches '4.5': give numbers"),
        (("--model", "source"), "a qwen2 model has no inner learning rate"),
        (("--data", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_mistakes_of_a_sweep_are_refused(place, options, message):
    convert()
    assert message in refusal(tune(*options))
    assert not (place / "sweep").exists()
