"""`ttt-e2e evaluate`: measures each point once, compares, and refuses every mistake before any work."""

import dataclasses
import json
import random

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM
from typer.testing import CliRunner

from ttt_e2e import TTTE2EConfig, TTTE2EForCausalLM
from ttt_e2e.cli.main import app
from ttt_e2e.data import load_documents, tokenize_documents, train_tokenizer
from ttt_e2e.evaluation import runs, tasks

WORDS = "the a little old machine reads writes learns forgets quickly slowly and then again".split()
SIZES = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "sliding_window": 8}
LONG = 100  # words of the longest document


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the little machine reads and then again"], 300)


def save_models(folder, tokenizer, seed=0):
    torch.manual_seed(seed)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ours = TTTE2EForCausalLM(TTTE2EConfig(**SIZES, **ids, mini_batch_size=4, num_suffix_layers=1))
    theirs = MistralForCausalLM(MistralConfig(**SIZES, **ids, num_key_value_heads=1, head_dim=8))
    for name, model in {"ours": ours, "theirs": theirs}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


@pytest.fixture
def place(tmp_path, tokenizer, monkeypatch):
    """A folder with texts and two small models, which is the current one."""
    choose = random.Random(0)
    (tmp_path / "texts").mkdir()
    for number, words in enumerate([LONG, 40, LONG, 60]):
        (tmp_path / "texts" / f"{number}.txt").write_text(" ".join(choose.choices(WORDS, k=words)))
    save_models(tmp_path, tokenizer)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """The points that were measured; their perplexity is the length, of "theirs" one more."""
    measured = []

    def measure(subject, data, length, settings):
        measured.append((subject.label, length))
        return [{"perplexity": float(length + (subject.label == "theirs")), "loss": 1.0}]

    task = dataclasses.replace(tasks.TASKS["perplexity"], parts=measure, numbers=lambda parts, settings: parts[0])
    monkeypatch.setitem(tasks.TASKS, "perplexity", task)
    return measured


def evaluate(*options, task="perplexity", models=("ours", "theirs"), **changes):
    """Run the command; an option that is None is left out."""
    arguments = {"data": "texts", "lengths": "16,32", "output": "out", "cache": "cache"} | changes
    line = [text for name, value in arguments.items() if value is not None for text in (f"--{name}", str(value))]
    line += [text for model in models for text in ("--model", model)]
    environment = {"COLUMNS": "400", "TERM": "dumb", "NO_COLOR": "1"}
    return CliRunner().invoke(app, ["evaluate", task, *line, *options], env=environment)


def refusal(result) -> str:
    """The message of a refused command, its box and line breaks taken away."""
    assert result.exit_code == 2, result.output
    return " ".join(result.output.replace("│", " ").split())


def points(place):
    return [json.loads(line) for line in (place / "out" / "results.jsonl").read_text().splitlines()]


def test_points_tables_and_pictures_are_written(place, calls):
    result = evaluate("--baseline", "theirs")
    assert result.exit_code == 0, result.output
    assert calls == [("ours", 16), ("ours", 32), ("theirs", 16), ("theirs", 32)]
    names = {path.name for path in (place / "out").iterdir() if not path.name.startswith(".")}
    assert names == {"results.jsonl", "results.md", "results.png", "results.svg"}
    markdown = (place / "out" / "results.md").read_text()
    assert "| theirs | 17.000 | 33.000 |" in markdown and "| ours | -1.000 | -1.000 |" in markdown
    assert "minus theirs" in result.output
    first = points(place)[0]
    assert (first["task"], first["label"], first["spec"], first["length"]) == ("perplexity", "ours", "ours", 16)
    assert first["environment"]["torch"] == torch.__version__


def test_an_interrupted_run_measures_only_the_rest(place, calls, monkeypatch):
    measure = tasks.TASKS["perplexity"].parts

    def interrupted(*arguments):
        if len(calls) == 1:
            raise KeyboardInterrupt
        return measure(*arguments)

    task = dataclasses.replace(tasks.TASKS["perplexity"], parts=interrupted)
    monkeypatch.setitem(tasks.TASKS, "perplexity", task)
    result = evaluate()
    assert result.exit_code == 130 and "goes on" in result.output
    assert calls == [("ours", 16)] == [(point["label"], point["length"]) for point in points(place)]
    monkeypatch.setitem(tasks.TASKS, "perplexity", dataclasses.replace(task, parts=measure))
    result = evaluate()
    assert result.exit_code == 0 and calls == [("ours", 16), ("ours", 32), ("theirs", 16), ("theirs", 32)]
    assert "1/4" in result.output, "the bar counts what was there"
    result = evaluate()
    assert len(calls) == 4 and "nothing was measured again" in result.output


def test_a_point_that_was_torn_is_measured_again(place, calls):
    evaluate(models=["ours"])
    path = place / "out" / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert evaluate(models=["ours"]).exit_code == 0
    assert calls == [("ours", 16), ("ours", 32), ("ours", 32)] and len(points(place)) == 2


def test_models_and_shorter_lengths_are_added(place, calls):
    evaluate(models=["ours"])
    result = evaluate("--baseline", "ours", models=["theirs"], lengths="8,32")
    assert calls[2:] == [("theirs", 8), ("theirs", 32)]
    assert result.exit_code == 0, result.output
    markdown = (place / "out" / "results.md").read_text()
    assert "| ours |  | 16.000 | 32.000 |" in markdown and "| theirs | 9.000 |  | 33.000 |" in markdown
    assert "|  | 32 |\n| --- | ---: |\n| theirs | +1.000 |" in markdown, "the one length that both have"


def test_results_of_other_weights_data_settings_or_tasks_are_refused(place, calls, tokenizer):
    evaluate()
    before = (place / "out" / "results.jsonl").read_bytes()
    assert "of the task 'perplexity', not 'needle'" in refusal(evaluate(task="needle", data=None))
    assert "on other data" in refusal(evaluate(lengths="16,40"))
    assert "with dtype='auto', not 'bfloat16'" in refusal(evaluate(dtype="bfloat16"))
    save_models(place, tokenizer, seed=1)
    assert "another model with the label 'ours'" in refusal(evaluate())
    save_models(place, tokenizer)
    assert "label 'ours'" in refusal(evaluate(models=["ours=theirs"]))
    assert "label 'ours'" in refusal(evaluate(models=["ours=ours@learning-off"]))
    (place / "texts" / "0.txt").write_text("the machine " * LONG)
    assert "on other data" in refusal(evaluate())
    assert (place / "out" / "results.jsonl").read_bytes() == before and len(calls) == 4


MISTAKES = {
    "unknown task": ({"task": "perplexty"}, "did you mean 'perplexity'"),
    "no model": ({"models": []}, "--model is missing"),
    "unknown model": ({"models": ["nowhere"]}, "nowhere"),
    "no spec": ({"models": ["label="]}, "must be SPEC or LABEL=SPEC"),
    "equal labels": ({"models": ["ours", "ours"]}, "2 models have the label 'ours'"),
    "cannot learn": ({"models": ["theirs@learning-off"]}, "no test-time training"),
    "unknown suffix": ({"models": ["ours@learning-of"]}, "did you mean '@learning-off'"),
    "length zero": ({"lengths": "0,16"}, "0 is too small"),
    "negative length": ({"lengths": "-16"}, "-16 is too small"),
    "length no number": ({"lengths": "16,1K"}, "'1K' is no whole number"),
    "no data": ({"data": None}, "--data is missing"),
    "data not there": ({"data": "./nowhere"}, "nowhere"),
    "no output": ({"output": None}, "--output is missing"),
    "documents": ({"documents": 0}, "documents=0"),
    "batch size": ({"batch-size": 0}, "batch_size=0"),
    "baseline": ({"baseline": "thiers"}, "did you mean 'theirs'"),
    "judge": ({"judge": "ours"}, "has no judge"),
    "no judge": ({"task": "decoding"}, "--judge is missing"),
    "setting": ({"set": "new_tokens=3"}, "has no settings"),
    "data for latency": ({"task": "latency"}, "makes its own text"),
    "dtype": ({"dtype": "float8"}, "dtype='float8'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused_before_any_work(place, calls, name):
    changes, message = MISTAKES[name]
    assert message in refusal(evaluate(**changes))
    assert not calls and not (place / "out").exists()


def test_a_length_beyond_the_data_names_the_longest(place, calls, tokenizer):
    texts = load_documents("texts", cache_folder=place / "cache")
    longest = int(tokenize_documents(texts, tokenizer, place / "cache").lengths().max())
    assert f"longest document has {longest} tokens" in refusal(evaluate(lengths=f"16,{longest + 1}"))
    assert not calls and not (place / "out").exists()
    assert evaluate(lengths=longest).exit_code == 0


def test_a_model_without_a_tokenizer_needs_one_named(place, calls):
    for path in (place / "ours").glob("tokenizer*"):
        path.unlink()
    assert "has no tokenizer" in refusal(evaluate())
    assert evaluate(tokenizer="theirs").exit_code == 0 and len(calls) == 4


def test_models_that_cut_texts_differently_are_not_compared(place, calls):
    train_tokenizer(["another text altogether, altogether"], 280).save_pretrained(place / "theirs")
    assert "'theirs' has another tokenizer than 'ours'" in refusal(evaluate())
    assert not calls
    # Bits per byte can be, and a judge reads the text.
    assert evaluate(task="bits-per-byte").exit_code == 0
    small = {"task": "decoding", "judge": "theirs", "set": "new_tokens=4", "output": "judged"}
    assert evaluate(models=["ours"], **small).exit_code == 0


def test_a_tokenizer_that_is_too_large_for_the_model_is_refused(place, calls):
    # Its merges, which have the ids from 259 on, are those of the texts themselves.
    larger = train_tokenizer(["".join(path.read_text() for path in (place / "texts").iterdir())], 400)
    larger.save_pretrained(place / "ours")
    assert "knows 300 tokens" in refusal(evaluate(models=["ours"]))


def test_a_folder_with_other_files_is_left_alone(place, calls):
    (place / "out").mkdir()
    (place / "out" / "letter.txt").write_text("dear")
    assert "holds other files" in refusal(evaluate())
    assert [path.name for path in (place / "out").iterdir()] == ["letter.txt"] and not calls


def test_a_preset_has_the_same_random_weights_every_time(place):
    models = runs.find_candidates(["a=tiny", "b=tiny"], "ours", tasks.TASKS["perplexity"])
    first, second = (runs.load_candidate(model, "auto").model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert models[0].digest() == models[1].digest()


SMALL = {
    "loss-by-position": {},
    "perplexity": {},
    "context-length": {},
    "bits-per-byte": {},
    "decoding": {"judge": "theirs", "set": "new_tokens=4"},
    "latency": {"data": None, "set": "new_tokens=2"},
    "needle": {"data": None, "lengths": "900", "set": "answer_tokens=4"},
}


@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_task_runs_from_the_command_line(place, task):
    extra = ("--set", "samples=1") if task == "needle" else ()
    models = ("ours", "ours@learning-off", "theirs")
    result = evaluate("--baseline", "theirs", *extra, task=task, models=models, **SMALL[task])
    assert result.exit_code == 0, result.output
    labels = {point["label"] for point in points(place)}
    assert labels == {"ours", "ours, learning off", "theirs"}
    assert "minus theirs" in (place / "out" / "results.md").read_text()


def test_learning_changes_the_loss_only_where_it_is_on(place):
    assert evaluate(models=("ours", "ours@learning-off", "again=ours@learning-off")).exit_code == 0
    losses = {point["label"]: point["numbers"]["loss"] for point in points(place) if point["length"] == 32}
    assert losses["again"] == losses["ours, learning off"] != losses["ours"]


def test_help_teaches():
    shown = CliRunner().invoke(app, ["evaluate", "--help"], env={"COLUMNS": "160", "TERM": "dumb"}).output
    assert all(name in shown for name in tasks.TASKS) and "Try it" in shown
