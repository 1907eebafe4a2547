"""The small trained model of the repository: small, and it has learned to learn."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ttt_e2e  # noqa: F401  the Auto classes learn the model

from .clean_environment import CleanEnvironment

FOLDER = Path(__file__).parents[2] / "model_cards" / "checkpoints" / "tiny-standard-library"


def test_it_is_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8_000_000


def test_its_folder_holds_no_code():
    """`make checkpoint-code` writes what the Hub needs; a copy in the repository would grow old."""
    tracked = subprocess.run(["git", "ls-files", FOLDER], cwd=FOLDER, capture_output=True, text=True)
    assert not [name for name in tracked.stdout.splitlines() if name.endswith(".py")]


@pytest.mark.slow  # it runs make and a process without the package
def test_its_code_is_written_by_make(tmp_path):
    """Nothing else of the folder changes, and then transformers alone can use it."""
    folder = shutil.copytree(FOLDER, tmp_path / FOLDER.name, ignore=shutil.ignore_patterns("*.py"))
    tracked = {path: path.read_bytes() for path in folder.iterdir()}
    # Installed already: the interpreter of this test.
    given = [f"CHECKPOINT_FOLDER={tmp_path}", f"BIN={Path(sys.executable).parent}", "INSTALLED="]
    subprocess.run(["make", "checkpoint-code", *given], cwd=Path(__file__).parents[2], check=True)
    assert tracked == {path: path.read_bytes() for path in folder.iterdir() if path.suffix != ".py"}
    script = (
        "from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer\n"
        f"tokenizer, known = AutoTokenizer.from_pretrained({str(folder)!r}), {{'trust_remote_code': True}}\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, **known)\n"
        "ids = tokenizer('class Reader:', return_tensors='pt').input_ids\n"
        "written = model.generate(ids, max_new_tokens=8, do_sample=False).shape[1] - ids.shape[1]\n"
        f"classifier = AutoModelForSequenceClassification.from_pretrained({str(folder)!r}, **known)\n"
        "print(written, type(classifier).__name__)\n"
    )
    printed = CleanEnvironment(tmp_path / "clean").run("-c", script)
    assert printed.splitlines()[-1] == "8 TTTE2EForSequenceClassification"


@torch.no_grad()
def test_it_reads_better_with_learning():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
    # Any long file of the library shows it; a model that was not meta-trained gains about nothing.
    text = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :2048]
    on, off = (model(ids, labels=ids, test_time_training=learning).loss.item() for learning in (True, False))
    assert on < off - 0.1
    written = model.generate(ids[:, :300], max_new_tokens=20, do_sample=False)
    assert written.shape == (1, 320)


def test_its_card_has_numbers():
    card = (FOLDER / "README.md").read_text()
    assert "model-index" in card and "learning off" in card and "No results came" not in card
