"""The demo from end to end, at a size of seconds."""

import io
import json
import sysconfig
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM

from ttt_e2e import TTTE2ECache
from ttt_e2e.cli import demo_steps
from ttt_e2e.configuration import load_demo_recipe
from ttt_e2e.configuration.demo_recipe import DEMO_RECIPE
from ttt_e2e.data import sources, standard_library_documents

SMALL = {
    "data": {"training_length": 128, "validation_every": 3},
    "training": {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "warmup_steps": 0},
    "evaluation": {"length": 512, "documents": 2, "batch_size": 2, "bucket_edges": [0, 128, 256]},
    "generation": {
        "prompt_tokens": 100,
        "new_tokens": 4,
        "short_read_tokens": 256,
        "long_read_tokens": 1024,
        "read_step": 512,
    },
}


@pytest.fixture
def recipe(tmp_path):
    fields = yaml.safe_load(DEMO_RECIPE.read_text())
    for section, changes in SMALL.items():
        fields[section] |= changes
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(fields, sort_keys=False))
    return load_demo_recipe(path)


def test_demo_writes_everything_it_promises(tmp_path, recipe, monkeypatch):
    root = Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
    monkeypatch.setattr(sources, "standard_library_documents", lambda: standard_library_documents(root))
    shown = io.StringIO()
    folder = tmp_path / "run"
    demo_steps.run_demo(recipe, folder, Console(file=shown, width=120))

    results = json.loads((folder / "results.json").read_text())
    assert [system["name"] for system in results["systems"]] == [
        "TTT-E2E, learning on",
        "TTT-E2E, learning off",
        "sliding window",
        "full attention",
    ]
    assert results["buckets"] == [[0, 128], [128, 256], [256, 512]]
    parameters = [system["parameters"] for system in results["systems"]]
    assert parameters == pytest.approx([parameters[0]] * 4, rel=1e-3)
    tokens = {run["tokens"] for run in results["training"].values()}
    assert tokens == {2 * 2 * 129}, "all systems are trained on the same number of tokens"
    sizes = results["learned_context"]["bytes_after_tokens"]
    assert sizes["256"] == sizes["1024"] > 0

    assert (folder / "loss_by_position.png").stat().st_size > 10_000
    assert f"{results['systems'][0]['loss']:.3f}" in (folder / "results.md").read_text()
    assert f"{results['systems'][0]['loss']:.3f}" in (folder / "model" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert TTTE2ECache.from_pretrained(folder / "learned_context", model=model).get_seq_length() == 1024
    assert "from the saved context" in shown.getvalue()
    written = {"cache", "learned_context", "loss_by_position.png", "model", "results.json", "results.md"}
    assert {path.name for path in folder.iterdir()} == written, "nothing is left of the training runs"
