"""Where a model comes to lie, and whether its dtype is fast there."""

import pytest
import torch

from ttt_e2e.loading import in_fast_dtype, on_device, weights
from ttt_e2e.serving import load_text_model

from ..modeling.helpers import small_model
from ..serving.small import save_text_model, small_text_model

FAST, SLOW = {"architecture": "x86_64", "amx_bf16": True}, {"architecture": "x86_64", "avx512_bf16": False}


@pytest.fixture
def warned(monkeypatch):
    found = []
    monkeypatch.setattr(weights.logger, "warning_once", found.append)
    return found


@pytest.mark.parametrize(
    ("dtype", "capabilities", "slow"),
    [
        (torch.bfloat16, SLOW, True),
        (torch.bfloat16, FAST, False),
        (torch.bfloat16, {"architecture": "aarch64"}, False),
        (torch.bfloat16, {}, False),
        (torch.float32, SLOW, False),
    ],
)
def test_a_dtype_that_is_slow_on_this_cpu_is_told(monkeypatch, warned, dtype, capabilities, slow):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    model = on_device(small_model(dtype), "cpu")
    assert model.dtype == dtype and model.device.type == "cpu"
    assert len(warned) == slow and all("--dtype float32" in text for text in warned)
    model = in_fast_dtype(model, "cpu")
    assert model.dtype == (torch.float32 if slow else dtype)
    assert len(warned) == 2 * slow and all("--dtype bfloat16" in text for text in warned[1:])


def test_text_is_read_in_float32_where_bfloat16_is_slow_unless_it_is_asked_for(monkeypatch, warned, tmp_path):
    small = small_text_model()
    small.model.bfloat16()
    save_text_model(small, tmp_path)
    for capabilities, expected in ((SLOW, torch.float32), (FAST, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert load_text_model(str(tmp_path), device="cpu").model.dtype == expected
        assert load_text_model(str(tmp_path), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_an_earlier_torch_that_does_not_know_is_left_in_peace(monkeypatch, warned):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    on_device(small_model(torch.bfloat16), "cpu")
    assert not warned
