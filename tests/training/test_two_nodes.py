"""Two groups of torchrun, as on two machines, over the loopback: they train what one process trains."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ttt_e2e import TTTE2EForCausalLM
from ttt_e2e.data import PackedRows, load_documents, load_tokenizer, tokenize_documents

from ..cli.train_runs import SETTINGS, fill_place, train
from ..scripts import load_script
from .two_processes import assert_close

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parents[2] / "examples" / "sharded_training.py"
STEPS, LENGTH, ROWS, RATE = 4, 16, 4, 1e-4
# At a low rate, because AdamW turns the smallest of gradients into a whole step.
ADAMW = {"training.optimizer": "adamw", "training.muon_learning_rate": "null", "training.learning_rate": RATE}


def two_nodes(*command):
    """Run a command as one process on each of two nodes; as the page on scaling says."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    rendezvous = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", port, "--nproc-per-node", "1"]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    nodes = []
    for rank in range(2):
        line = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--node-rank", rank, *command]
        nodes.append(
            subprocess.Popen(list(map(str, line)), env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    outputs = [node.communicate()[0].decode() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)


@pytest.fixture
def place(tmp_path):
    return fill_place(tmp_path)


def weights(folder):
    """As they are loaded: what is gathered from shards holds a tied head once more."""
    return TTTE2EForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def test_ddp_by_the_command(place):
    assert train(place, **{name.replace(".", "__"): value for name, value in ADAMW.items()}).exit_code == 0
    settings = SETTINGS | ADAMW
    options = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    command = ["-m", "ttt_e2e.cli.main", "train", "--model", place / "small.yaml", "--recipe", "pretrain-tiny"]
    two_nodes(*command, "--data", place / "texts", "--output", place / "two", "--cache", place / "cache", *options)
    assert_close(weights(place / "two" / "model"), weights(place / "run" / "model"), 1e-6)
    logs = [json.loads((place / name / "training_log.json").read_text()) for name in ("run", "two")]
    losses = [[entry["loss"] for entry in log if "learning_rate" in entry] for log in logs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and len(losses[1]) == SETTINGS["training.max_steps"]


def test_fsdp2_by_the_example(place):
    assert train(place, training__max_steps=1, training__save_steps=1).exit_code == 0  # a model and its tokenizer
    options = ["--data", place / "texts", "--cache", place / "cache", "--length", LENGTH, "--batch-size", ROWS]
    options += ["--steps", STEPS, "--learning-rate", RATE]
    two_nodes(EXAMPLE, "--model", place / "run" / "model", "--output", place / "two", *options)
    example = load_script(EXAMPLE)
    tokenizer = load_tokenizer(place / "run" / "model")
    store = tokenize_documents(
        load_documents(place / "texts", cache_folder=place / "cache"), tokenizer, place / "cache"
    )
    start, rows = place / "run" / "model", PackedRows(store, LENGTH)
    trainer = example.train(str(start), rows, place / "one", ROWS, max_steps=STEPS, learning_rate=RATE)
    assert trainer.args.world_size == 1
    one, two, before = (weights(folder) for folder in (place / "one", place / "two", start))
    assert_close(two, one, 1e-6)
    assert not any(torch.equal(weight, before[name]) for name, weight in one.items())
    assert load_tokenizer(place / "two").vocab_size == tokenizer.vocab_size
