"""On a GPU no call waits for the device: nothing looks at a value, but for one look at a mask.

The meta device has no values, so that every look at one raises there.
"""

import pytest
import torch

from .helpers import BATCH, padded, small_model
from .test_architectures import ARCHITECTURES


def read_and_decode(model, ids, **arguments):
    with torch.no_grad():
        output = model(ids, use_cache=True, **arguments)
        mask = arguments.pop("attention_mask", None)
        for _ in range(BATCH + 2):
            if mask is not None:
                mask = arguments["attention_mask"] = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)
            output = model(ids[:, :1], cache=output.cache, use_cache=True, **arguments)


QUICK = ("sliding", "sinks of a hybrid", "no attention")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(own, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, own in ARCHITECTURES.items()
    ],
)
def test_training_reading_and_decoding_look_at_no_value(changes):
    model = small_model(**changes).to("meta")
    ids = torch.zeros(2, 3 * BATCH + 1, dtype=torch.long, device="meta")
    learns = model.config.test_time_training
    model.train()
    model(ids, labels=ids).loss.backward()
    model.activation_checkpointing_enable()
    model.config.meta_gradient = "first_order"
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    for learning in {learns, False}:
        read_and_decode(model, ids, test_time_training=learning)


def test_a_look_at_a_value_is_seen():
    for look in (bool, int, torch.Tensor.tolist, torch.Tensor.nonzero):
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            look(torch.zeros(1, device="meta"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_call_with_a_mask_looks_once(monkeypatch, side):
    model = small_model().to("meta")
    ids, mask, _ = padded(side)
    looks = []

    def copy_of(tensor):
        looks.append(tensor)
        given = torch.cat([mask, mask.new_ones(len(ids), len(looks) - 1)], dim=1)
        return given[:, -tensor.shape[1] :].bool()

    monkeypatch.setattr(torch.Tensor, "cpu", copy_of)
    ids, mask_there = ids.to("meta"), mask.to("meta")
    read_and_decode(model, ids, attention_mask=mask_there)
    assert len(looks) == 1 + BATCH + 2
    looks.clear()
    model.train()
    model(ids, attention_mask=mask_there, labels=ids).loss.backward()
    assert len(looks) == 1
