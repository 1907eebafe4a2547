"""The small trained model of the repository: small, and it has learned to learn."""

import subprocess
import sysconfig
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parents[2] / "model_cards" / "checkpoints" / "tiny-standard-library"


def test_it_is_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8_000_000


def test_its_folder_holds_no_code():
    """`make checkpoint-code` writes what the Hub needs; a copy in the repository would grow old."""
    tracked = subprocess.run(["git", "ls-files", FOLDER], cwd=FOLDER, capture_output=True, text=True)
    assert not [name for name in tracked.stdout.splitlines() if name.endswith(".py")]


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
