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

SHORT = ["data.sequence_length=128", "training.max_steps=2", "training.logging_steps=1", "training.eval_strategy=no"]
SYSTEMS = ("full-attention", "sliding-window", "static-twin", "ttt-e2e")
ROWS = (
    "full attention",
    "sliding window",
    "static twin",
    "TTT-E2E",
    "TTT-E2E, learning off",
    "sliding window, equal time",
)
GENERATION = {
    "prompt_tokens": 100,
    "new_tokens": 4,
    "short_read_tokens": 256,
    "long_read_tokens": 1024,
    "read_step": 512,
}


@pytest.fixture
def recipe(tmp_path):
    experiment = {
        "base": "demo",
        "validation_every": 3,
        "by_recipe": {"pretrain-tiny": dict.fromkeys(SYSTEMS, SHORT)},
        "rows": {"sliding window, equal time": {"overrides": ["training.max_steps=3"]}},
        "measured": [{"task": "loss-by-position", "lengths": [512], "documents": 2}],
        "claims": [],
    }
    (tmp_path / "small.yaml").write_text("# Small\n" + yaml.safe_dump(experiment, sort_keys=False))
    fields = yaml.safe_load(DEMO_RECIPE.read_text())
    fields |= {"experiment": str(tmp_path / "small.yaml"), "generation": GENERATION}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields, sort_keys=False))
    return load_demo_recipe(path)


def test_demo_writes_everything_it_promises(tmp_path, recipe, monkeypatch):
    root = Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
    monkeypatch.setattr(sources, "standard_library_documents", lambda: standard_library_documents(root))
    shown = io.StringIO()
    folder = tmp_path / "run"
    demo_steps.run_demo(recipe, folder, Console(file=shown, width=120), processes=1)

    results = json.loads((folder / "results.json").read_text())
    tokens = {label: facts["tokens"] for label, facts in results["training"].items()}
    assert tokens.pop("sliding window, equal time") == 3 * 2 * 128
    assert set(tokens.values()) == {2 * 2 * 128}, "all other systems are trained on the same number of tokens"
    sizes = results["learned_context"]["bytes_after_tokens"]
    assert sizes["256"] == sizes["1024"] > 0

    report = (folder / "report.md").read_text()
    assert all(f"| {row} |" in report for row in (*ROWS, "3-gram", "5-gram", "gzip", "zstd"))
    assert (folder / "0-loss-by-position" / "results.png").stat().st_size > 10_000
    [row] = [line for line in report.splitlines() if line.startswith("| TTT-E2E |")]
    assert row in (folder / "model" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert TTTE2ECache.from_pretrained(folder / "learned_context", model=model).get_seq_length() == 1024
    assert "from the saved context" in shown.getvalue()


def test_demo_is_an_experiment_of_its_own(recipe):
    assert tuple(recipe.compared().rows) == ROWS
    assert tuple(load_demo_recipe().compared().rows) == ROWS
