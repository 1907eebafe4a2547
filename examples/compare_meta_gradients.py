"""What meta-learning is worth: train `tiny` in three ways and compare how each learns while it reads.

    python examples/compare_meta_gradients.py          (a quarter of an hour on two CPU cores)

Second order differentiates through the inner gradients, first order takes them for constants, and TTT-naive is trained
without the inner loop, which only runs when it is tested. Each is one `ttt-e2e train` over two processes; the first run
is killed half-way and resumed. Written to the folder: the three runs, `loss_by_position.png` and `table.md`.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM

from ttt_e2e.data import (
    document_prefixes,
    load_documents,
    load_tokenizer,
    split_documents,
    tokenize_documents,
)
from ttt_e2e.evaluation import Table, bucket_bounds, bucket_means, loss_by_position, plot_loss_by_position
from ttt_e2e.training.checkpoints import last_complete_checkpoint

RUNS = {
    "second order": [],
    "first order": ["--set", "model.meta_gradient=first_order"],
    "TTT-naive": ["--set", "model.test_time_training=false"],
}
TRAINING_LENGTH, LENGTH, DOCUMENTS, EDGES = 512, 2048, 48, (0, 128, 256, 512, 1024)


def launch(folder: Path, arguments: list[str], cache: Path) -> subprocess.Popen:
    """Start `ttt-e2e train` over two processes."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]
    command = ["-m", "ttt_e2e.cli.main", "train", "--model", "tiny", "--data", "standard-library"]
    options = ["--output", str(folder), "--cache", str(cache), *arguments]
    return subprocess.Popen([sys.executable, *launcher, *command, *options], start_new_session=True)


def train(folder: Path, arguments: list[str], cache: Path, kill: bool) -> None:
    """Run to the end; if asked, after a SIGKILL to all processes once there is a checkpoint."""
    if (folder / "model").is_dir():
        return
    if kill:
        process = launch(folder, arguments, cache)
        while last_complete_checkpoint(folder) is None and process.poll() is None:
            time.sleep(1)
        time.sleep(20)  # a few steps beyond the checkpoint, which are lost
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait()
    resume = ["--resume"] if (folder / "run.json").is_file() else []
    if launch(folder, [*arguments, *resume], cache).wait() != 0:
        raise SystemExit(f"{folder}: training failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/meta-gradients"))
    folder = parser.parse_args().folder
    cache = folder / "cache"
    for number, (name, arguments) in enumerate(RUNS.items()):
        train(folder / name.replace(" ", "-"), arguments, cache, kill=number == 0)

    tokenizer = load_tokenizer(folder / "second-order" / "model")
    documents = load_documents("standard-library", cache_folder=cache)
    _, validation = split_documents(documents, 8)
    # A hundred tables of characters, near-copies of one another, are on both sides of the split.
    validation = validation.filter(lambda path: not path.startswith("encodings/"), input_columns="path")
    _, tokens = document_prefixes(tokenize_documents(validation, tokenizer, cache), LENGTH, DOCUMENTS)
    losses = {}
    for name in RUNS:
        model = AutoModelForCausalLM.from_pretrained(folder / name.replace(" ", "-") / "model", dtype=torch.float32)
        for learning in (True, False):
            shown = f"{name}, learning {'on' if learning else 'off'}"
            losses[shown] = loss_by_position(model, tokens, 8, shown, test_time_training=learning)
    bounds = bucket_bounds(EDGES, LENGTH)
    means = {name: bucket_means(nll, bounds) for name, nll in losses.items()}
    rows = [
        [f"positions {start}-{end}", *(f"{means[name][bucket]:.3f}" for name in losses)]
        for bucket, (start, end) in enumerate(bounds)
    ]
    rows.append(["all positions", *(f"{nll.mean().item():.3f}" for nll in losses.values())])
    title = f"Loss in nats per token, first {LENGTH} tokens of {len(tokens)} validation files"
    table = Table(title, ["", *losses], rows)
    (folder / "table.md").write_text(f"{title}\n\n{table.markdown()}", encoding="utf-8")
    plot_loss_by_position(losses, TRAINING_LENGTH, folder / "loss_by_position.png", title=title)
    print(title, table.markdown(), sep="\n\n")


if __name__ == "__main__":
    main()
