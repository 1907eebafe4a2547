"""`ttt-e2e export --push`: one commit with everything, checked against a stand-in of the Hub's HTTP API."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from ttt_e2e.model_cards import check_push

from . import pushing
from .clean_environment import CleanEnvironment
from .hub_stand_in import READ_ONLY, TOKEN, Hub, Repository, hub_stand_in
from .saved import saved_model

CASES = {
    "new": ("somebody/model", TOKEN, "--private", "--commit-message", "The first one"),
    "replaced": ("somebody/old", TOKEN),
    "already public": ("somebody/old", TOKEN, "--private"),
    "without a token": ("somebody/other", None),
    "may only read": ("somebody/other", READ_ONLY),
    "unknown token": ("somebody/other", "hf_of_nobody"),
    "malformed": ("some body/other", TOKEN),
    "too many parts": ("a/b/c", TOKEN),
    "refused": ("somebody/closed", TOKEN),
}
OLD = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("somebody/model", trust_remote_code=True)
torch.save(model(torch.arange(3, 40)[None]).logits, sys.argv[1])
model.save_pretrained(sys.argv[2])
"""


@dataclass
class Pushed:
    """What the commands answered, and where everything is."""

    place: Path
    hub: Hub
    answers: dict[str, dict]

    def output(self, case: str) -> Path:
        return self.place / case.replace(" ", "-")


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """Every case of CASES, pushed one after the other by one process."""
    place = tmp_path_factory.mktemp("pushed")
    model = saved_model(place / "saved")
    with hub_stand_in() as hub:
        hub.repositories["somebody/old"] = Repository(False, dict.fromkeys([*OLD, "notes.md"], b"old"))
        hub.refused = {"somebody/closed"}
        cases = []
        for case, (repository, token, *options) in CASES.items():
            output = str(place / case.replace(" ", "-"))
            arguments = ["--model", str(model), "--output", output, "--push", repository, *options]
            cases.append({"arguments": arguments, "token": token})
        (place / "cases.json").write_text(json.dumps(cases))
        subprocess.run(
            [sys.executable, pushing.__file__, str(place / "cases.json"), str(place / "answers.json")],
            env=os.environ | hub.environment(None) | {"HF_HOME": str(place / "home"), "OMP_NUM_THREADS": "1"},
            check=True,
            timeout=300,
        )
        answers = json.loads((place / "answers.json").read_text())
        yield Pushed(place, hub, dict(zip(CASES, answers, strict=True)))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_everything_arrives_in_one_commit(pushed):
    repository = pushed.hub.repositories["somebody/model"]
    assert pushed.answers["new"]["status"] == 0, pushed.answers["new"]["output"]
    assert f"{pushed.hub.address}/somebody/model/commit/{repository.sha}" in pushed.answers["new"]["output"]
    (commit,) = repository.commits
    assert commit[0]["value"]["summary"] == "The first one" and repository.private
    sent = {name: data for name, data in repository.files.items() if name != ".gitattributes"}
    assert (
        sent == contents(pushed.output("new"))
        and {"model.safetensors", "README.md", "modeling_ttt_e2e.py"} <= sent.keys()
    )


@pytest.mark.slow
def test_someone_else_loads_it_by_its_name(pushed, tmp_path):
    arguments = str(tmp_path / "logits.pt"), str(tmp_path / "again")
    CleanEnvironment(tmp_path).run("-c", LOAD, *arguments, **pushed.hub.environment())
    model = AutoModelForCausalLM.from_pretrained(pushed.output("new"))
    expected = model(torch.arange(3, 40)[None]).logits
    torch.testing.assert_close(torch.load(arguments[0]), expected, rtol=1e-5, atol=1e-5)
    code = {name for name in contents(pushed.output("new")) if name.endswith(".py")}
    assert code == {path.name for path in (tmp_path / "again").glob("*.py")}


def test_weights_of_an_earlier_commit_go_and_other_files_stay(pushed):
    repository = pushed.hub.repositories["somebody/old"]
    assert pushed.answers["replaced"]["status"] == 0, pushed.answers["replaced"]["output"]
    assert len(repository.commits) == 1 and not OLD & repository.files.keys()
    assert repository.files["notes.md"] == b"old" and not repository.private
    weights = contents(pushed.output("new"))["model.safetensors"]
    assert repository.files["model.safetensors"] == weights


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("already public", "there already and public, so that --private would not hold"),
        ("without a token", "there is no token of the Hub; run `hf auth login`"),
        ("may only read", "the token may only read"),
        ("unknown token", "does not accept the token"),
        ("malformed", "push='some body/other'"),
        ("too many parts", "push='a/b/c'"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_any_work(pushed, case, message):
    answer = pushed.answers[case]
    assert answer["status"] == 2 and message in answer["output"], answer["output"]
    assert not pushed.output(case).exists() and "somebody/other" not in pushed.hub.repositories


def test_a_hub_that_does_not_answer_is_noticed_before_any_work(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(OSError, match="cannot be reached"):
        check_push("somebody/model")


def test_after_a_refused_upload_the_folder_is_there(pushed):
    answer, output = pushed.answers["refused"], pushed.output("refused")
    assert answer["status"] == 2 and "the upload failed" in answer["output"], answer["output"]
    assert f"hf upload somebody/closed {output} ." in answer["output"]
    assert contents(output).keys() == contents(pushed.output("new")).keys()
