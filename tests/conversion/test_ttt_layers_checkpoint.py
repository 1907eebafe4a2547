"""Official TTT-Linear and TTT-MLP checkpoints: the folder computes what the official code computed, or is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ttt_e2e.cli.main import app
from ttt_e2e.data.tokenizer import train_tokenizer

from ..modeling.ttt_layers_golden import FOLDER, VARIANTS, OfficialRun


def official_folder(folder, variant="linear_tied", binary=False, **changes):
    """A checkpoint as the official code saves it."""
    run = OfficialRun(variant)
    folder.mkdir()
    parameters = run.under("param.")
    if binary:
        torch.save(
            parameters | {"model.layers.0.seq_modeling_block.token_idx": torch.ones(4)}, folder / "pytorch_model.bin"
        )
    else:
        names = list(parameters)
        for number, part in enumerate((names[::2], names[1::2])):
            save_file({name: parameters[name].contiguous() for name in part}, folder / f"model-{number}.safetensors")
    (folder / "config.json").write_text(json.dumps(run.description["config"] | {"model_type": "ttt"} | changes))
    return run


def convert(place, *options):
    line = ["convert", "ttt-layers", "--checkpoint", str(place / "official"), "--output", str(place / "ours"), *options]
    return CliRunner().invoke(app, line, env={"COLUMNS": "400", "TERM": "dumb", "NO_COLOR": "1"})


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "1layer" not in name])
@pytest.mark.parametrize("binary", [False, True])
def test_the_folder_computes_what_the_official_code_computed(tmp_path, variant, binary):
    run = official_folder(tmp_path / "official", variant, binary)
    result = convert(tmp_path)
    assert result.exit_code == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        logits = model(run.ids()).logits
    torch.testing.assert_close(logits, run["logits.full"], rtol=0, atol=5e-5)


def test_tokenizer_and_dtype_come_along(tmp_path):
    official_folder(tmp_path / "official", tie_word_embeddings=True)
    large = train_tokenizer(["some text some text"], 280)
    large.save_pretrained(tmp_path / "large")
    assert "its ids go up to" in convert(tmp_path, "--tokenizer", str(tmp_path / "large")).output
    assert not (tmp_path / "ours").exists()
    assert convert(tmp_path, "--dtype", "bfloat16").exit_code == 0
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda place: (place / "official" / "config.json").unlink(), "holds no config.json"),
        (lambda place: (place / "official" / "config.json").write_text("{"), "is no JSON"),
        (lambda place: (place / "official" / "config.json").write_text('{"model_type": "llama"}'), "only 'ttt'"),
        (lambda place: [p.unlink() for p in (place / "official").glob("*.safetensors")], "holds neither .safetensors"),
        (lambda place: (place / "official" / "model-1.safetensors").unlink(), "The parameters lack"),
        (lambda place: save_file({"odd": torch.ones(1)}, place / "official" / "odd.safetensors"), "hold ['odd']"),
        (lambda place: (place / "ours").mkdir() or (place / "ours" / "mine.txt").write_text(""), "holds other files"),
    ],
)
def test_what_cannot_be_converted_is_refused_and_leaves_nothing(tmp_path, spoil, message):
    official_folder(tmp_path / "official")
    spoil(tmp_path)
    result = convert(tmp_path)
    assert result.exit_code == 2 and message in result.output
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"official", "ours"} and not (tmp_path / "ours" / "config.json").exists()


def test_golden_files_are_there():
    assert FOLDER.is_dir() and len(VARIANTS) == 9
