"""What a Hub folder holds, and everything that is refused before any of it is written."""

import json
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    MistralConfig,
    MistralForCausalLM,
    pipeline,
)
from transformers.generation import stopping_criteria
from typer.testing import CliRunner

import ttt_e2e
from ttt_e2e import TTTE2EConfig
from ttt_e2e.cli.export import export
from ttt_e2e.data.tokenizer import PLAIN_END
from ttt_e2e.model_cards import ExportRequest, TrainingHistory, prepare_export, write_export
from ttt_e2e.model_cards.export import length_for_tools
from ttt_e2e.serving import Conversation, load_text_model

from .saved import KINDS, model_of, saved_model

OURS = [cls for cls in vars(ttt_e2e).values() if isinstance(cls, type) and cls in MODEL_FOR_CAUSAL_LM_MAPPING.values()]


def exported(model, output, **options) -> Path:
    return write_export(prepare_export(ExportRequest(str(model), output, **options)))


def run(*options):
    """The command; its own application has no other one."""
    app = typer.Typer()
    app.command()(export)
    return CliRunner().invoke(app, options, env={"COLUMNS": "400", "TERM": "dumb", "NO_COLOR": "1"})


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_holds_what_is_needed_and_nothing_else(tmp_path, kind):
    hub = exported(saved_model(tmp_path / "saved", kind), tmp_path / "hub")
    names = {path.name for path in hub.iterdir()}
    code = {name for name in names if name.endswith(".py")}
    assert names - code == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert {f"modeling_{kind}.py", f"configuration_{kind}.py"} <= code
    assert len(code) <= 12 and not code & {"registration.py", "__init__.py", "official_layout.py"}
    settings = json.loads((hub / "config.json").read_text())
    heads = {"QuestionAnswering", "SequenceClassification", "TokenClassification"} if kind == "ttt_e2e" else set()
    tasks = {f"AutoModelFor{task}" for task in heads | {"CausalLM"}}
    assert settings["auto_map"].keys() == {"AutoConfig", "AutoModel"} | tasks
    for entry in settings["auto_map"].values():
        module, name = entry.split(".")
        assert f"class {name}" in (hub / f"{module}.py").read_text()
    assert str(tmp_path) not in "".join(path.read_text() for path in hub.glob("*[!s]"))
    assert AutoTokenizer.from_pretrained(hub).padding_side == "left"
    assert not list(tmp_path.glob(".hub*"))


def test_the_examples_of_the_card_run(tmp_path, monkeypatch, capsys):
    hub = exported(saved_model(tmp_path / "saved"), tmp_path / "hub")
    monkeypatch.chdir(hub)
    examples = re.findall(r"```python\n(.+?)```", (hub / "README.md").read_text(), flags=re.DOTALL)
    names = {}
    for example in examples:
        exec(example, names)
    assert len(examples) == 2 and "import os" in capsys.readouterr().out
    assert (hub / "learned_context").is_dir() and names["cache"].has_learned


def test_messages_are_the_same_text_to_a_pipeline_and_to_a_conversation(tmp_path):
    saved = saved_model(tmp_path / "saved")
    (saved / "chat_template.jinja").unlink()
    hub = exported(saved, tmp_path / "hub")
    message = {"role": "user", "content": "where does the water go?"}
    answers, ids = [], []
    for folder in (saved, hub):
        text_model = load_text_model(str(folder))
        conversation = Conversation(text_model, do_sample=False, max_new_tokens=8)
        answers.append(conversation.answer(message["content"]).text)
        ids.append(conversation.turns.first(message["content"], begin=True))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(hub), AutoTokenizer.from_pretrained(hub)
    assert ids[0] == ids[1] == tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    [written] = generator([message], do_sample=False, max_new_tokens=8, stop_sequence=PLAIN_END)
    assert written["generated_text"][-1]["content"] == answers[0] == answers[1]
    assert "chat_template" not in (saved / "tokenizer_config.json").read_text()


def test_a_chat_template_of_its_own_is_kept(tmp_path):
    saved = saved_model(tmp_path / "saved")
    template = "chat_template.jinja"
    assert (exported(saved, tmp_path / "hub") / template).read_text() == (saved / template).read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_is_too_long_for_an_exported_model(tmp_path, kind, monkeypatch):
    said = []
    monkeypatch.setattr(stopping_criteria.logger, "warning_once", said.append)
    hub = exported(saved_model(tmp_path / "saved", kind, max_position_embeddings=6), tmp_path / "hub")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(hub), AutoTokenizer.from_pretrained(hub)
    ids = tokenizer("the old house stood by the river", return_tensors="pt").input_ids
    assert model.config.max_position_embeddings == 6 < ids.shape[1]
    assert model.generate(ids, do_sample=False).shape[1] == ids.shape[1] + 20
    assert model.generate(ids, do_sample=False, max_new_tokens=3).shape[1] == ids.shape[1] + 3
    assert said == []


@pytest.mark.parametrize("given, exported_length", [(131072, 8192), (4096, 4096)])
def test_the_length_that_tools_try_out(tmp_path, given, exported_length):
    hub = exported(saved_model(tmp_path / "saved", max_position_embeddings=given), tmp_path / "hub")
    assert json.loads((hub / "config.json").read_text())["max_position_embeddings"] == exported_length


def test_the_length_that_tools_try_out_is_that_of_training():
    config = model_of("ttt_e2e").config
    assert length_for_tools(config, TrainingHistory("", row_length=32768)) == 32768


def test_the_length_that_tools_try_out_changes_no_angles():
    config = TTTE2EConfig(rope_parameters={"rope_type": "yarn", "factor": 4.0}, max_position_embeddings=131072)
    assert length_for_tools(config, TrainingHistory("", row_length=512)) == 131072


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_are_converted_on_request(tmp_path, dtype):
    saved = saved_model(tmp_path / "saved")
    hub = exported(saved, tmp_path / "hub", dtype=dtype)
    before, after = load_file(saved / "model.safetensors"), load_file(hub / "model.safetensors")
    assert all(torch.equal(weight, before[name].to(getattr(torch, dtype))) for name, weight in after.items())
    assert AutoModelForCausalLM.from_pretrained(hub).dtype == getattr(torch, dtype)


def test_an_exported_folder_can_be_exported_again(tmp_path):
    first = exported(saved_model(tmp_path / "saved"), tmp_path / "hub", name="A model")
    second = exported(first, tmp_path / "again", name="A model")
    assert {path.name: path.read_bytes() for path in first.iterdir()} == {
        path.name: path.read_bytes() for path in second.iterdir()
    }


def test_the_command_takes_a_run_s_folder(tmp_path):
    (tmp_path / "tiny").mkdir()  # also the name of a preset
    saved_model(tmp_path / "tiny" / "model")
    done = run("--model", str(tmp_path / "tiny"), "--output", str(tmp_path / "hub"), "--license", "mit")
    assert done.exit_code == 0, done.output
    assert "\n# tiny\n" in (tmp_path / "hub" / "README.md").read_text()


def foreign(folder):
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    MistralForCausalLM(MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).save_pretrained(folder)


def without(name):
    return lambda folder: (folder / name).unlink()


def changed_weight(change):
    def apply(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def contradictory_generation(folder):
    settings = json.loads((folder / "generation_config.json").read_text()) | {"temperature": 0.5, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(settings))


def another_head(folder):
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).save_pretrained(folder)


NORM = "model.norm.weight"
BAD_MODELS = {
    "no such folder": (shutil.rmtree, "there is no such folder"),
    "no config": (without("config.json"), "no config.json in it"),
    "no weights": (without("model.safetensors"), "there are no weights in it"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "there is no tokenizer in it"),
    "larger tokenizer": (lambda f: model_of("ttt_e2e", vocab_size=50).save_pretrained(f), "the model knows only 50"),
    "foreign": (foreign, "is a 'mistral' model, which is not one of this package"),
    "missing weight": (changed_weight(lambda w: w.pop(NORM)), f"{NORM} is missing from its weights"),
    "another head": (another_head, "score.weight among its weights is not of a TTTE2EForCausalLM and would be lost"),
    "not finite": (changed_weight(lambda w: w[NORM].fill_(torch.nan)), f"{NORM} has values that are not finite"),
    "generation": (contradictory_generation, "generation_config.json: repair it first"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_what_is_no_whole_model_of_ours_is_refused(tmp_path, case):
    spoil, message = BAD_MODELS[case]
    spoil(saved_model(tmp_path / "saved"))
    refused = run("--model", str(tmp_path / "saved"), "--output", str(tmp_path / "hub"))
    assert refused.exit_code == 2 and message in refused.output, refused.output
    assert not list(tmp_path.glob("*hub*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "float16"], "dtype='float16': choose one of float32, bfloat16"),
        (["--private"], "--private is for an upload: name a repository with --push"),
        (["--commit-message", "First"], "--commit-message is for an upload"),
        (["--results", "nowhere"], "results='nowhere': there is no nowhere/results.jsonl"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, message):
    model = saved_model(tmp_path / "saved")
    refused = run("--model", str(model), "--output", str(tmp_path / "hub"), *options)
    assert refused.exit_code == 2 and message in refused.output, refused.output
    assert not (tmp_path / "hub").exists()


def test_other_files_are_never_overwritten(tmp_path):
    model, hub = saved_model(tmp_path / "saved"), tmp_path / "hub"
    hub.mkdir()
    (hub / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match="holds other files: choose another folder"):
        exported(model, hub)
    assert [path.name for path in hub.iterdir()] == ["notes.md"]


def test_a_folder_below_the_home_is_written_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert exported(saved_model(tmp_path / "saved"), Path("~/hub")) == tmp_path / "hub"
    assert (tmp_path / "hub" / "model.safetensors").is_file()


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    model = saved_model(tmp_path / "saved")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(1000))
    with pytest.raises(OSError, match="has only 1000 left"):
        exported(model, tmp_path / "hub")
    assert not list(tmp_path.glob("*hub*"))


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError("disk full")])
def test_after_an_interruption_nothing_half_written_is_left(tmp_path, monkeypatch, interruption):
    prepared = prepare_export(ExportRequest(str(saved_model(tmp_path / "saved")), tmp_path / "hub"))

    def interrupted(*_):
        raise interruption

    monkeypatch.setattr(GenerationConfig, "save_pretrained", interrupted)
    with pytest.raises(interruption if isinstance(interruption, type) else OSError):
        write_export(prepared)
    assert not list(tmp_path.glob("*hub*"))
