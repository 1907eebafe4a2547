"""Which inner steps are taken: none on which nothing depends."""

import pytest
import torch

from .helpers import (
    BATCH,
    random_ids,
    small_model,
)


class Counter:
    """How often the last block's prime MLP ran, and how many inner gradients were taken."""

    def __init__(self, model, monkeypatch):
        self.passes = self.steps = 0
        model.model.layers[-1].prime_mlp.register_forward_hook(self._count_pass)
        monkeypatch.setattr(torch.autograd, "grad", self._count_step(torch.autograd.grad))

    def _count_pass(self, *args):
        self.passes += 1

    def _count_step(self, grad):
        def counted(*args, **kwargs):
            self.steps += 1
            return grad(*args, **kwargs)

        return counted


@pytest.mark.parametrize(
    ("length", "arguments", "passes", "steps"),
    [
        (3 * BATCH + 1, {"skip_logits": True}, 3, 2),
        (3 * BATCH + 1, {}, 4, 3),
        (3 * BATCH + 2, {"skip_logits": True}, 4, 3),
        (3 * BATCH, {"skip_logits": True}, 3, 2),
        (3 * BATCH + 1, {"skip_logits": True, "use_cache": True}, 4, 3),
    ],
    ids=["rows of T+1 tokens", "its logits returned", "one more label", "T tokens", "learned context returned"],
)
def test_no_step_is_taken_on_which_nothing_depends(length, arguments, passes, steps, monkeypatch):
    model = small_model().train()
    counter = Counter(model, monkeypatch)
    ids = random_ids(2, length)
    outputs = model(ids, labels=ids, **arguments)
    assert (counter.passes, counter.steps) == (passes, steps)
    assert outputs.inner_loss.shape == (2, (length - 1) // BATCH) and not outputs.inner_loss.isnan().any()
    assert (~outputs.inner_grad_norm.isnan()).sum(dim=1).tolist() == [steps, steps]


def test_reading_stops_after_the_last_label(monkeypatch):
    model = small_model().train()
    counter = Counter(model, monkeypatch)
    ids = random_ids(1, 4 * BATCH + 1)
    labels = ids.clone()
    labels[:, BATCH + 1 :] = -100
    outputs = model(ids, labels=labels, skip_logits=True)
    assert (counter.passes, counter.steps) == (1, 0)
    torch.testing.assert_close(outputs.loss, model(ids, labels=labels).loss)
