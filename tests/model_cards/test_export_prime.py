"""New weights alone as a folder for others: small, on the base that is named, refused before anything is written."""

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ttt_e2e.cli.main import app
from ttt_e2e.conversion import PrimeWeights
from ttt_e2e.conversion.prime_weights import PRIME_WEIGHTS

from ..conversion.test_prime_weights import IDS, saved

BASE = "somebody/some-model"


@pytest.fixture
def folder(tmp_path):
    saved(tmp_path)
    return tmp_path / "new"


def export(*options):
    return CliRunner().invoke(app, ["export", *map(str, options)], env={"COLUMNS": "400", "TERM": "dumb"})


def test_it_holds_the_new_weights_and_names_the_base(folder, tmp_path):
    output = tmp_path / "hub"
    options = ("--dtype", "bfloat16", "--base", BASE, "--name", "Small", "--license", "apache-2.0")
    done = export("--model", folder, "--output", output, *options)
    assert done.exit_code == 0, done.output
    names = {path.name for path in output.iterdir()}
    assert {"README.md", "prime_config.json", PRIME_WEIGHTS, "base_sketches.safetensors", "tokenizer.json"} <= names
    assert not {"config.json", "model.safetensors"} & names
    kept, given = load_file(folder / PRIME_WEIGHTS), load_file(output / PRIME_WEIGHTS)
    assert all(torch.equal(given[name], kept[name].bfloat16()) for name in kept) and len(given) == len(kept)
    card = ModelCard.load(output / "README.md")
    assert card.data.base_model == BASE and card.data.license == "apache-2.0"
    new = sum(tensor.numel() for tensor in given.values())
    assert f"new parameters: {new:,}, saved in bfloat16" in card.text and f"`{BASE}`" in card.text


@torch.no_grad()
def test_it_computes_what_was_trained_where_the_base_is_named(folder, tmp_path):
    assert export("--model", folder, "--output", tmp_path / "hub", "--base", BASE).exit_code == 0
    base = PrimeWeights.from_pretrained(folder).base
    before, after = (PrimeWeights.from_pretrained(own).on_base(base) for own in (folder, tmp_path / "hub"))
    assert torch.equal(before(IDS).logits, after(IDS).logits)


def damage(folder):
    tensors = load_file(folder / PRIME_WEIGHTS)
    next(iter(tensors.values())).fill_(torch.nan)
    save_file(tensors, folder / PRIME_WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage, "not finite"),
        (lambda folder: [path.unlink() for path in folder.glob("*token*")], "no tokenizer"),
        (lambda folder: (folder / PRIME_WEIGHTS).write_bytes(b"none"), "is damaged"),
    ],
)
def test_what_cannot_be_used_is_refused(folder, tmp_path, change, message):
    change(folder)
    done = export("--model", folder, "--output", tmp_path / "hub")
    assert done.exit_code == 2 and message in done.output
    assert not (tmp_path / "hub").exists()


def test_a_whole_model_has_no_base(tmp_path):
    saved(tmp_path)
    done = export("--model", tmp_path / "start", "--output", tmp_path / "hub", "--base", BASE)
    assert done.exit_code == 2 and "a whole model, without a base" in done.output
