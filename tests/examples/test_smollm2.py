"""What `make smollm2` measures and publishes, on models of seconds."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from ttt_e2e.cli.main import app
from ttt_e2e.conversion import PrimeWeights

from ..conversion.test_prime_weights import saved

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"
SHORT, LONG = 48, 96
NO_NEEDLES = ("no document", "meta-trained, learning off")
WORDS = "the old mill by the river turned its wheel while the miller counted sacks of grain and sang "


@pytest.fixture
def measure(monkeypatch):
    """The script, with passages of few tokens."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in ("measure", "publish", "ask"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import measure

    for name, value in {"SHORT": SHORT, "LONG": LONG, "EDGES": (0, 24, 48, 96), "NGRAM": 5, "SEGMENT": 20}.items():
        monkeypatch.setattr(measure, name, value)
    for system in measure.SYSTEMS.values():
        if "lengths" in system:
            system["lengths"] = [LONG]
        if "full_attention_layers" in system:
            system["full_attention_layers"] = [0]
        if "rope" in system:
            system["rope"] |= {"original_max_position_embeddings": SHORT}
    yield measure
    monkeypatch.delitem(sys.modules, "measure", raising=False)


@pytest.fixture
def place(tmp_path):
    saved(tmp_path)
    for length, count in ((SHORT, 2), (LONG, 1)):
        lines = [json.dumps({"path": f"text/{n}", "text": WORDS * (9 + n)}) for n in range(count)]
        (tmp_path / f"evaluation-{length}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def run(measure, place, monkeypatch, *options):
    line = ["--texts", place, "--output", place / "out", "--released", place / "source", "--converted", place / "start"]
    monkeypatch.setattr(sys, "argv", ["measure.py", *map(str, line), "--trained", str(place / "new"), *options])
    measure.main()
    return measure.measured(place / "out" / "passages.jsonl")


def test_every_system_is_measured_once_and_what_is_there_is_kept(measure, place, monkeypatch):
    first = run(measure, place, monkeypatch, "--system", "window and sinks")
    lines = run(measure, place, monkeypatch)
    assert lines[: len(first)] == first == run(measure, place, monkeypatch)[: len(first)]
    places = [(line["system"], line["passage"]) for line in lines]
    named = set(measure.SYSTEMS) - {"trained without inner loop"}
    assert len(set(places)) == len(places) and {system for system, _ in places} == named
    shown = (place / "out" / "results.md").read_text()
    assert all(f"| {name} |" in shown for name in named) and (place / "out" / "results.png").is_file()
    kept = {(line["system"], line["length"]): line["bytes"] for line in lines}
    assert kept["full attention", LONG] > kept["full attention", SHORT]


def test_the_losses_are_those_of_the_models(measure, place, monkeypatch):
    """Of the released one in one call, and of the new one on its base; the buckets add up to them."""
    lines = {(line["system"], line["length"]): line for line in run(measure, place, monkeypatch)}
    tokenizer = measure.find_source(str(place / "source"), measure.check_convertible).contents().tokenizer
    [(_, ids)] = measure.passages(place, tokenizer, LONG)
    released = measure.load({"source": "released"}, {"released": str(place / "source")})
    trained = PrimeWeights.from_pretrained(place / "new").on_base(dtype=torch.bfloat16)
    with torch.no_grad():
        plain = released(ids).logits[0, :-1].float()
        expected = {
            "full attention": torch.nn.functional.cross_entropy(plain, ids[0, 1:], reduction="sum").item(),
            "meta-trained, learning on": trained(ids, labels=ids).token_nll.sum().item(),
        }
    for system, total in expected.items():
        buckets = lines[system, LONG]["buckets"]
        assert sum(bucket[kind][1] for bucket in buckets for kind in bucket) == pytest.approx(total, rel=2e-3)
        assert sum(bucket[kind][0] for bucket in buckets for kind in bucket) == LONG - 1


def test_a_token_is_repeated_where_its_last_tokens_stood_before(measure):
    ids = torch.tensor([1, 2, 3, 9, 1, 2, 3, 1, 2])
    assert measure.repeated(ids, 2).tolist() == [False, False, False, False, True, True, False, True]
    assert measure.repeated(ids, 3).tolist() == [False] * 5 + [True, False, False]


def test_differences_are_paired_by_passage(measure):
    def line(system, passage, loss):
        buckets = [{"new": [10, 10 * loss], "repeated": [0, 0.0]}] * 2
        return {"system": system, "passage": passage, "length": SHORT, "buckets": buckets}

    lines = [line(measure.BASELINE, name, loss) for name, loss in (("a", 1.0), ("b", 3.0), ("c", 9.0))]
    lines += [line("full attention", name, loss) for name, loss in (("a", 0.9), ("b", 2.7))]
    assert measure.cell(lines, "full attention", 0) == "1.800 (-0.200 ± 0.100)"
    assert measure.cell(lines, measure.BASELINE, 0) == "4.333" and measure.cell(lines, "full attention", 2) == ""


@pytest.mark.slow
def test_answers_are_greedy_and_their_losses_are_the_models(measure, place, monkeypatch):
    import ask

    tokenizer = AutoTokenizer.from_pretrained(place / "source")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %} Answer:"
    tokenizer.save_pretrained(place / "source")
    one = {"question": "What turned?", "answer": " The wheel.", "found": "nothing like it"}
    monkeypatch.setattr(ask, "QUESTIONS", {"text/0": [one], "text/1": [one | {"question": "Who sang?", "found": ""}]})
    small = {"DOCUMENT_TOKENS": 70, "ANSWER_TOKENS": 9, "SEGMENT": 20, "NEEDLE_LENGTHS": (700,), "NEEDLES": 1}
    for name, value in small.items():
        monkeypatch.setattr(ask, name, value)
    line = ["--texts", place, "--output", place / "out", "--released", place / "source", "--converted", place / "start"]
    monkeypatch.setattr(sys, "argv", ["ask.py", *map(str, line), "--trained", str(place / "new")])
    ask.main()
    ask.main()
    lines = measure.measured(place / "out" / "answers.jsonl")
    looked = [line["system"] for line in lines if line["group"] != "documents"]
    assert sorted(looked) == sorted(name for name in ask.ASKED if name not in NO_NEEDLES for _ in range(3))
    lines = [line for line in lines if line["group"] == "documents"]
    assert [line["system"] for line in lines] == [name for name in ask.ASKED for _ in range(2)]
    assert [line["found"] for line in lines] == [False, True] * len(ask.ASKED)
    shown = (place / "out" / "answers.md").read_text()
    assert "| full attention | 1 of 2 | 0 of 1 |" in shown and "S-NIAH-3" in shown
    documents = {f"text/{n}": WORDS * (9 + n) for n in range(2)}
    prompt = next(ask.about_documents(tokenizer, documents)).ids
    assert prompt.shape[1] > 70
    answer = tokenizer(one["answer"], return_tensors="pt", add_special_tokens=False).input_ids
    ids = torch.cat([prompt, answer], 1)
    models = {
        "full attention": measure.load({"source": "released"}, {"released": str(place / "source")}),
        "meta-trained, learning on": PrimeWeights.from_pretrained(place / "new").on_base(dtype=torch.bfloat16),
    }
    for name, model in models.items():
        with torch.no_grad():
            logits = model(ids).logits[0, prompt.shape[1] - 1 : -1].float()
            written = model.generate(prompt, max_new_tokens=9, do_sample=False)[0, prompt.shape[1] :]
        [own] = [line for line in lines if line["system"] == name and line["name"] == one["question"]]
        assert own["nll"] == pytest.approx(torch.nn.functional.cross_entropy(logits, answer[0]).item(), rel=2e-2)
        assert own["written"] == tokenizer.decode(written, skip_special_tokens=True).strip()


def test_what_is_published_has_the_table_and_names_the_base(measure, place, monkeypatch):
    run(measure, place, monkeypatch, "--system", "window and sinks", "--system", "meta-trained, learning on")
    import publish

    options = {"--run": place / "new", "--measured": place / "out", "--output": place / "hub"}
    monkeypatch.setattr(sys, "argv", ["publish.py", *(str(part) for pair in options.items() for part in pair)])
    publish.main()
    card = (place / "hub" / "README.md").read_text()
    assert f"`{publish.BASE}`" in card and "| meta-trained, learning on |" in card and "results.png" in card
    earlier = (place / "hub" / "README.md").read_text()
    start, end = earlier.index("## Training"), earlier.index("## Evaluation")
    (place / "hub" / "README.md").write_text(f"{earlier[:start]}## Training\n\nFor an hour.\n\n{earlier[end:]}")
    options |= {"--run": place / "hub", "--output": place / "again"}
    monkeypatch.setattr(sys, "argv", ["publish.py", *(str(part) for pair in options.items() for part in pair)])
    publish.main()
    again = (place / "again" / "README.md").read_text()
    assert again == (place / "hub" / "README.md").read_text(), "without the run what was said of training stays"
    merged = ["merge", "--adapter", place / "hub", "--base", place / "source", "--output", place / "merged"]
    done = CliRunner().invoke(app, list(map(str, merged)))
    assert done.exit_code == 0, done.output
