"""What the card says was measured comes from results files of this very model, and every number of it can be traced."""

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard

from ttt_e2e.evaluation.candidates import find_candidate
from ttt_e2e.evaluation.results import Point, ResultsFile, environment
from ttt_e2e.model_cards import ExportRequest, prepare_export, write_export

from .saved import saved_model

LENGTHS = (128, 1024)
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


@pytest.fixture
def place(tmp_path):
    saved_model(tmp_path / "ours")
    saved_model(tmp_path / "theirs", num_hidden_layers=3)
    return tmp_path


def measure(place, folder, task="context-length", models=("ours", "ours@learning-off", "theirs"), **settings):
    """A results file with a made-up number for every model and length."""
    generator = torch.Generator().manual_seed(len(folder))
    with ResultsFile(place / folder / "results.jsonl") as results:
        for spec in models:
            candidate = find_candidate(str(place / spec), None, needs_tokenizer=task != "latency")
            identity = {"model": candidate.digest(), "data": "d", "settings": "s"}
            for length in LENGTHS:
                loss, speed = (5 * torch.rand(2, generator=generator)).tolist()
                numbers = {"prefill_seconds_per_1k_tokens": speed} if task == "latency" else {"loss": loss}
                if task == "perplexity":
                    numbers["perplexity"] = 2.718281828**loss
                settings = {"dtype": "auto"} | settings
                results.append(
                    Point(task, candidate.label, candidate.spec, length, settings, numbers, environment(), identity)
                )
    return place / folder


def export(place, *results, **options) -> ModelCard:
    request = ExportRequest(str(place / "ours"), place / "hub", results=[str(folder) for folder in results], **options)
    return ModelCard.load(write_export(prepare_export(request)) / "README.md")


def numbers_of(folder) -> list[tuple[str, int, str, float]]:
    """Label, length, name and value of every number in a results file."""
    points = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    return [(p["label"], p["length"], name, value) for p in points for name, value in p["numbers"].items()]


def test_every_number_of_the_evaluation_is_in_a_results_file(place):
    folders = [measure(place, "first"), measure(place, "second", "perplexity"), measure(place, "third", "latency")]
    text = export(place, *folders, name="A model").text
    section = text[text.index("## Evaluation") : text.index("## Limits")]
    measured = [value for folder in folders for *_, value in numbers_of(folder)]
    known = {f"{value:.{decimals}f}" for value in measured for decimals in (2, 3, 4)}
    known |= {f"{length:,}" for length in LENGTHS} | {"1"}  # seconds per 1K tokens
    for words in ("torch", "transformers", "device"):
        section = section.replace(str(environment()[words]), "")
    section = section.replace("float32", "").replace("ttt-e2e", "")
    assert len(NUMBER.findall(section)) > 30 and set(NUMBER.findall(section)) <= known


def test_metadata_holds_the_exact_numbers_of_this_model_alone(place):
    folders = [measure(place, "first"), measure(place, "second", "perplexity"), measure(place, "third", "latency")]
    entries = export(place, f"Some texts={folders[0]}", *folders[1:]).data.eval_results
    measured = {value for folder in folders[:2] for label, _, _, value in numbers_of(folder) if label != "theirs"}
    assert {entry.metric_value for entry in entries} == measured
    assert {entry.dataset_name for entry in entries} == {"Some texts", "second"}
    assert entries[0].dataset_type == "some-texts"
    for label, length, name, value in numbers_of(folders[1])[:4]:
        (entry,) = [entry for entry in entries if entry.metric_value == value]
        assert entry.metric_type == name and f"at {length} tokens" in entry.metric_name
        assert ("learning off" in entry.metric_name) is ("learning off" in label)


def test_numbers_that_are_not_finite_are_shown_as_such_and_left_out_of_the_metadata(place):
    folder = measure(place, "first", models=["ours"])
    path = folder / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["numbers"]["loss"] = None
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    card = export(place, folder)
    assert "not finite" in card.text and len(card.data.eval_results) == len(LENGTHS) - 1


@pytest.mark.parametrize(
    ("measured", "sentence"),
    [
        ("bfloat16", "its weights were bfloat16 as they are here"),
        ("auto", "its weights were float32 then and are bfloat16 here"),
    ],
)
def test_the_card_says_in_which_precision_was_measured(place, measured, sentence):
    folder = measure(place, "first", dtype=measured)
    assert sentence in export(place, folder, dtype="bfloat16").text


def test_which_lines_are_this_model_is_told_by_contents_not_by_labels(place):
    folder = measure(place, "first")
    text = (folder / "results.jsonl").read_text().replace('"ours', '"another name')
    (folder / "results.jsonl").write_text(text.replace('"spec": "another name', '"spec": "ours'))
    assert "Of this model: **another name**, **another name, learning off**" in export(place, folder).text


def with_text(place, text):
    (measure(place, "first") / "results.jsonl").write_text(text)
    return place / "first"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda place: measure(place, "first", models=["theirs"]), "are of 'theirs', none of which is the model in"),
        (lambda place: place / "nothing", "there is no .*results.jsonl"),
        (lambda place: f"={measure(place, 'first')}", "name a folder that ttt-e2e evaluate has written"),
        (lambda place: with_text(place, ""), "no measured point"),
        (lambda place: with_text(place, "{}\n"), "is no point of an evaluation"),
    ],
    ids=["of another model", "no folder", "no name", "empty", "damaged"],
)
def test_results_that_are_not_of_this_model_are_refused(place, change, message):
    with pytest.raises(ValueError, match=message):
        export(place, change(place))
    assert not (place / "hub").exists() and not list(place.glob(".hub*"))


def test_results_from_before_the_weights_changed_are_refused(place):
    folder = measure(place, "first", models=["ours"])
    saved_model(place / "ours", tie_word_embeddings=False)
    with pytest.raises(ValueError, match="its files have changed since"):
        export(place, folder)
