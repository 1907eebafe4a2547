"""Writes the table of sizes into docs/scaling.md, between its `scaling` marks.

    python tools/scaling_table.py [--check]

Memory is what `ttt-e2e train --dry-run` says. Where the time goes is a count of the multiplications in one row's step,
on models without memory (torch's meta device): with learning on, and with learning off, which leaves the same model
without its inner loop. It takes a few minutes.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ttt_e2e.configuration import Recipe, load_recipe
from ttt_e2e.evaluation.tables import Table, between_marks
from ttt_e2e.loading import find_model
from ttt_e2e.training.estimates import FLOAT32, RunEstimate, estimate_run
from ttt_e2e.training.run_model import changed_config

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
# Of rows of 128K tokens, whose inner steps are sixteen times as many, no operations are counted.
RECIPES, SIZES = {"pretrain-8k": True, "extend-128k": False}, ("125m", "350m", "760m", "1b", "3b")
GPU, MOST_GPUS = 80 * 2**30, 4096
# What FSDP2 shares out.
SHARED = ("parameters", "gradients", "optimizer_moments")
GIB = 2**30
HEADER = (
    "model, tokens of a row",
    "rows of a batch",
    "GPUs",
    "GiB, DDP",
    "weights, gradients, moments",
    "border states",
    "graph, logits, scores",
    "fast weights of a row, MiB",
    "PFLOP of a row",
    "learning's share of them",
)


def model_of(config: PreTrainedConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def step_flops(model: torch.nn.Module, length: int, learning: bool) -> int:
    """Floating-point operations of all matrix products in one row's forward and backward pass.

    Without what activation checkpointing computes again, where the counter cannot look.
    """
    model.train()
    ids = torch.zeros(1, length + 1, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, skip_logits=True, test_time_training=learning).loss.backward()
    return counter.get_total_flops()


def root_bytes(model: torch.nn.Module, config: PreTrainedConfig) -> int:
    """Of the unit that FSDP2 gathers as a whole: all but the prefix blocks."""
    prefix = model.model.layers[: config.num_prefix_layers]
    return FLOAT32 * (model.num_parameters() - sum(p.numel() for layer in prefix for p in layer.parameters()))


def fewest_gpus(estimate: RunEstimate, gathered: int, rows: int) -> str:
    """How many GPUs hold the training, one row at a time on each, and by which way."""
    parts = estimate.memory_parts
    if sum(parts.values()) - parts["gradient_buckets"] <= GPU:
        return "1"
    if sum(parts.values()) <= GPU:
        return "2"
    rest = sum(count for name, count in parts.items() if name not in (*SHARED, "gradient_buckets"))
    shared, gpus = sum(parts[name] for name in SHARED), 2
    while gpus <= rows and shared / gpus + 2 * gathered + rest > GPU:  # the unit and its gradient
        gpus *= 2
    return f"{gpus}, FSDP2" if gpus <= rows else "does not fit"


def table_row(size: str, recipe_name: str, counted: bool) -> list[str]:
    recipe: Recipe = load_recipe(recipe_name, size, ())
    config = changed_config(find_model(size), recipe.model, recipe.data.sequence_length)
    length, model = recipe.data.sequence_length, model_of(config)
    estimate = estimate_run(config, recipe, processes=recipe.batch_size)
    parts = estimate.memory_parts
    weights = sum(parts[name] for name in (*SHARED, "gradient_buckets", "bfloat16_copies", "gradients_in_transit"))
    border = parts["boundary_fast_weights"] + parts["boundary_keys"] + parts["saved_activations"]
    graph = parts["graph"] + parts["logits"] + parts["attention"]
    assert math.isclose(weights + border + graph, estimate.peak_memory_bytes)
    operations = ["", ""]
    if counted:
        on, off = (step_flops(model_of(config), length, learning) for learning in (True, False))
        operations = [f"{on / 1e15:.3g}", f"{1 - off / on:.0%}"]
    return [
        f"{size}, {length // 1024}K",
        f"{recipe.batch_size}",
        fewest_gpus(estimate, root_bytes(model, config), recipe.batch_size),
        f"{estimate.peak_memory_bytes / GIB:.1f}",
        *(f"{part / GIB:.1f}" for part in (weights, border, graph)),
        f"{estimate.fast_weight_bytes_per_sequence / 2**20:.0f}",
        *operations,
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page says something else")
    check = parser.parse_args().check
    rows = []
    for recipe, counted in RECIPES.items():
        for size in SIZES:
            rows.append(table_row(size, recipe, counted))
            print(rows[-1], file=sys.stderr)
    block = Table("", list(HEADER), rows).markdown()
    text = PAGE.read_text(encoding="utf-8")
    new = between_marks(text, "scaling", block)
    if new != text and check:
        print("docs/scaling.md does not say what the estimator says: run `python tools/scaling_table.py`.")
        return 1
    if new != text:
        PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
