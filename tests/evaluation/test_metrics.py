"""The metric modules load from their folders without a network, and compute what can be computed by hand."""

import math
import os
import subprocess
import sys

import evaluate
import pytest

from ttt_e2e.evaluation import metric_path

ROWS = {"losses": [[1.0, 2.0, 6.0], [3.0]]}


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    """Loads a metric by its name into caches of this test."""
    cache = tmp_path_factory.mktemp("cache")

    def load(name):
        return evaluate.load(metric_path(name), cache_dir=str(cache), experiment_id=name)

    return load


@pytest.fixture(scope="module")
def token_perplexity(metric):
    return metric("token_perplexity")


@pytest.fixture(scope="module")
def loss_by_position(metric):
    return metric("loss_by_position")


@pytest.mark.parametrize("name", ["token_perplexity", "loss_by_position"])
def test_loads_with_empty_caches_and_no_network(tmp_path, name):
    script = (
        "import socket\n"
        "def refuse(*_): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "import evaluate\n"
        f"metric = evaluate.load({metric_path(name)!r})\n"
        "print(metric.compute(losses=[[0.5, 1.5]])['loss'])\n"
        "assert isinstance(metric, evaluate.Metric) and 'mask' in metric.inputs_description\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env=environment | {"HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "1.0"


@pytest.mark.parametrize("name", ["perplexity", "", "..", "metrics/token_perplexity"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=f"name='{name}' .*loss_by_position, token_perplexity"):
        metric_path(name)


def test_perplexity_is_exp_of_the_mean_over_all_tokens(token_perplexity):
    assert token_perplexity.compute(**ROWS) == {"loss": 3.0, "perplexity": math.exp(3.0), "tokens": 4}
    masked = token_perplexity.compute(**ROWS, mask=[[1, 1, 0], [1]])
    assert masked == {"loss": 2.0, "perplexity": math.exp(2.0), "tokens": 3}


def test_log_probabilities_are_losses_with_a_minus(token_perplexity):
    negative = [[-loss for loss in row] for row in ROWS["losses"]]
    assert token_perplexity.compute(losses=negative, log_probabilities=True) == token_perplexity.compute(**ROWS)


def test_batches_are_collected(token_perplexity):
    for row in ROWS["losses"]:
        token_perplexity.add_batch(losses=[row], mask=[[1] * len(row)])
    assert token_perplexity.compute() == {"loss": 3.0, "perplexity": math.exp(3.0), "tokens": 4}


def test_perplexity_beyond_a_float_is_infinite(token_perplexity):
    assert token_perplexity.compute(losses=[[800.0]])["perplexity"] == math.inf


def test_buckets_of_positions(loss_by_position):
    """Entry t of a row is the token at position t + 1: position 1 has 1.0 and 3.0, position 2 has 2.0, 3 has 6.0."""
    assert loss_by_position.compute(**ROWS, edges=[0, 2]) == {
        "loss": 3.0,
        "start": [0, 2],
        "end": [2, 4],
        "loss_by_position": [2.0, 4.0],
        "tokens": [2, 2],
    }
    masked = loss_by_position.compute(**ROWS, mask=[[0, 1, 0], [1]], edges=[1, 2, 3])
    assert masked["loss_by_position"] == [3.0, 2.0, None] and masked["tokens"] == [1, 1, 0]
    assert masked["loss"] == 2.5


def test_default_buckets_hold_each_token_once(loss_by_position):
    computed = loss_by_position.compute(losses=[list(range(1200))])
    assert computed["start"] == [0, 256, 512, 1024] and computed["end"] == [256, 512, 1024, 1201]
    assert computed["tokens"] == [255, 256, 512, 177]
    weighted = [mean * count for mean, count in zip(computed["loss_by_position"], computed["tokens"], strict=True)]
    assert sum(weighted) / 1200 == pytest.approx(computed["loss"])


def test_the_same_as_of_tensors(loss_by_position):
    import torch

    from ttt_e2e.evaluation import bucket_bounds, bucket_means

    losses = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    expected = bucket_means(losses, bucket_bounds([0, 5, 17], 41))
    assert loss_by_position.compute(losses=losses, edges=[0, 5, 17])["loss_by_position"] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["token_perplexity", "loss_by_position"])
def test_mistakes_in_masks(metric, name):
    with pytest.raises(ValueError, match="mask: row 1 has 2 entries, its losses 1"):
        metric(name).compute(**ROWS, mask=[[1, 1, 1], [1, 1]])
    with pytest.raises(ValueError, match="mask: no token counts"):
        metric(name).compute(**ROWS, mask=[[0, 0, 0], [0]])


@pytest.mark.parametrize("edges", [[], [2, 1], [0, 0], [-1, 2], [0, 4]])
def test_edges_that_make_no_buckets(metric, edges):
    with pytest.raises(ValueError, match=r"edges=\["):
        metric("loss_by_position").compute(**ROWS, edges=edges)
