"""`ttt-e2e lm-eval` is lm_eval's own command line, with our models and tasks in it."""

import json
import math
import sys
from runpy import run_path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, set_seed
from typer.testing import CliRunner

from ttt_e2e import TTTE2EConfig, TTTE2EForCausalLM
from ttt_e2e.cli import harness
from ttt_e2e.cli.main import app
from ttt_e2e.model_cards import ExportRequest, prepare_export, write_export

TEXTS = ["the old house stood by the river, and the river ran by the mill. ", "nobody had seen the end of it. Ü "]
LONG = [text * 3 for text in TEXTS]


def run(*arguments):
    return CliRunner().invoke(app, ["lm-eval", *arguments], env={"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture
def seen(monkeypatch):
    """Stands in for lm_eval; holds the command lines that reached it."""
    lines = []
    module = SimpleNamespace(cli_evaluate=lambda: lines.append(list(sys.argv)))
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", module)
    return lines


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["-h"],
        ["ls", "tasks"],
        ["run", "--model", "hf", "--model_args", "pretrained=a,b=1", "--limit", "0.5", "-x", "word"],
        ["--tasks", "wikitext", "lambada", "--include_path", "folder"],
        ["run", "--config", "mine.yaml", "--tasks", "wikitext"],
        ["validate", "--include_path=folder", "--tasks=wikitext"],
    ],
)
def test_arguments_are_passed_on_in_their_order(seen, arguments):
    before = list(sys.argv)
    assert run(*arguments).exit_code == 0
    assert seen == [["lm-eval", *arguments]] and sys.argv == before


@pytest.mark.parametrize("arguments", [["--tasks", "local_text"], ["run", "-t", "a,b"], ["run", "--tasks=local_text"]])
def test_our_task_files_are_there_when_tasks_are_named(seen, arguments):
    run(*arguments)
    folder = harness.task_folder()
    assert seen == [["lm-eval", *arguments, "--include_path", str(folder)]]
    assert (folder / "local_text.yaml").is_file()


def test_the_exit_status_is_the_harness_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", SimpleNamespace(cli_evaluate=lambda: sys.exit(3)))
    before = list(sys.argv)
    assert run("run").exit_code == 3 and sys.argv == before


def test_a_missing_harness_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.__main__", raising=False)
    refused = run("--tasks", "local_text")
    assert refused.exit_code == 2 and "pip install lm_eval" in refused.output


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny random model that learns, one token per byte, and the file of texts."""
    folder = tmp_path_factory.mktemp("saved")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {name: index for index, name in enumerate([*alphabet, "<pad>", "<begin>", "<end>"])}
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    begin = ("<begin>", words["<begin>"])
    backend.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[begin])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<begin>", eos_token="<end>"
    )
    set_seed(0)
    config = TTTE2EConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_suffix_layers=1,
        sliding_window=32,
        mini_batch_size=16,
        initializer_range=0.2,
        max_position_embeddings=32,
        bos_token_id=words["<begin>"],
        eos_token_id=words["<end>"],
        pad_token_id=words["<pad>"],
    )
    model = TTTE2EForCausalLM(config).eval()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in LONG))
    return SimpleNamespace(folder=folder, model=model, tokenizer=tokenizer, begin=words["<begin>"])


def evaluated(saved, task, add_bos_token) -> dict:
    """What lm_eval itself writes about a task on the saved model."""
    output = saved.folder / f"{task}.json"
    model = f"pretrained={saved.folder / 'model'},dtype=float32,max_length=512,add_bos_token={add_bos_token}"
    ran = run(
        "run",
        *("--model", "hf", "--model_args", model),
        *("--tasks", task, "--metadata", json.dumps({"file": str(saved.folder / "texts.jsonl")})),
        *("--device", "cpu", "--batch_size", "1", "--output_path", str(output)),
    )
    assert ran.exit_code == 0, (ran.output, ran.exception)
    written = next(saved.folder.glob(f"{task}_*.json"))
    return json.loads(written.read_text())["results"][task]


@pytest.fixture
def local_text():
    """The module beside the task files, which is no part of the package."""
    return SimpleNamespace(**run_path(str(harness.task_folder() / "local_text.py")))


def losses(saved, text) -> torch.Tensor:
    """Nats of each byte of the text behind the token that begins it."""
    ids = torch.tensor([[saved.begin, *saved.tokenizer(text, add_special_tokens=False).input_ids]])
    with torch.no_grad():
        return saved.model(ids, labels=ids).token_nll[0]


def test_bits_per_byte_are_the_models_own(saved):
    pytest.importorskip("lm_eval")
    result = evaluated(saved, "local_text", add_bos_token=False)
    nats = sum(losses(saved, text).sum().item() for text in LONG)
    count = sum(len(text.encode()) for text in LONG)
    assert result["bits_per_byte,none"] == pytest.approx(nats / count / math.log(2), rel=1e-4)
    assert result["byte_perplexity,none"] == pytest.approx(math.exp(nats / count), rel=1e-4)


def test_a_batch_size_is_found_for_an_exported_model(saved, monkeypatch):
    """Without `max_length`: lm_eval tries out texts of the length that the exported configuration names."""
    models = pytest.importorskip("lm_eval.models.huggingface")
    hub = write_export(prepare_export(ExportRequest(str(saved.folder / "model"), saved.folder / "hub")))
    tried, call = [], models.HFLM._model_call

    def watch(harness_model, ids, *arguments, **named):
        tried.append(tuple(ids.shape))
        return call(harness_model, ids, *arguments, **named)

    monkeypatch.setattr(models.HFLM, "_model_call", watch)
    output = saved.folder / "auto.json"
    ran = run(
        "run",
        *("--model", "hf", "--model_args", f"pretrained={hub},dtype=float32"),
        *("--tasks", "local_text", "--metadata", json.dumps({"file": str(saved.folder / "texts.jsonl")})),
        *("--device", "cpu", "--batch_size", "auto", "--output_path", str(output)),
    )
    assert ran.exit_code == 0, (ran.output, ran.exception)
    assert tried[0] == (64, 32)


def test_quarters_are_those_of_one_reading(saved, local_text):
    """Each quarter's loss is that of its bytes when the text is read from its beginning."""
    pytest.importorskip("lm_eval")
    result = evaluated(saved, "local_text_by_position", add_bos_token=True)
    by_quarter = [result[f"bits_per_byte_quarter_{quarter},none"] for quarter in range(1, 5)]
    parts = list(local_text.quarters(file=str(saved.folder / "texts.jsonl"))["test"])
    assert "".join(part["part"] for part in parts) == "".join(LONG)
    assert all(part["quarter"] == 1 or part["part"][0] == " " for part in parts)
    expected = {quarter: [0.0, 0] for quarter in range(1, 5)}
    for part in parts:
        behind = len(part["part"].encode())
        nats = losses(saved, part["before"] + part["part"])[-behind:].sum().item()
        expected[part["quarter"]][0] += nats / math.log(2)
        expected[part["quarter"]][1] += behind
    assert by_quarter == pytest.approx([bits / count for bits, count in expected.values()], rel=1e-4)


def test_our_tasks_name_what_is_missing(tmp_path, local_text):
    with pytest.raises(ValueError, match="file: not given; name one: --metadata"):
        local_text.texts()
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        local_text.texts(file=str(tmp_path / "none.jsonl"))
    path = tmp_path / "short.jsonl"
    path.write_text('{"text": "four"}\n\n{"text": "longer"}\n')
    assert list(local_text.texts(file=str(path), characters=5)["test"]["text"]) == ["longe"]
    with pytest.raises(ValueError, match="none of its 2 texts has 7 characters"):
        local_text.texts(file=str(path), characters=7)


def test_help_is_the_harness_own():
    pytest.importorskip("lm_eval")
    shown = run("--help")
    assert shown.exit_code == 0 and "Language Model Evaluation Harness" in shown.output
