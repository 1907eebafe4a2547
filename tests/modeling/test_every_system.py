"""Every system of the comparison, as its preset builds it, is a causal language model like any other."""

import pytest
import torch
from transformers import AutoModelForCausalLM, set_seed

from ttt_e2e.configuration import load_config, load_systems, system_preset

LENGTH, PADDING = 21, 4
# Of the preset `tiny`, but with windows and mini-batches that so short a text leaves behind.
SHORT = {"sliding_window": 16, "mini_batch_size": 8, "mamba_chunk_size": 8, "initializer_range": 0.1}
CLOSE = {"rtol": 1e-8, "atol": 1e-8}
# transformers' recurrent mixers compute their states in float32, whatever the model's dtype.
CLOSE_IN_FLOAT32 = {"rtol": 1e-3, "atol": 1e-4}


# TTT-naive differs from TTT-E2E in training only.
@pytest.fixture(scope="module", params=[name for name in load_systems() if name != "ttt-naive"])
def model(request):
    set_seed(0)
    config = load_config(system_preset(request.param, "tiny"))
    for name in SHORT.keys() & config.to_dict().keys():
        setattr(config, name, SHORT[name])
    return AutoModelForCausalLM.from_config(config).double().eval()


def tolerance(model) -> dict:
    return CLOSE_IN_FLOAT32 if model.config.model_type == "recurrent_hybrid" else CLOSE


def random_ids(rows: int) -> torch.Tensor:
    return torch.randint(3, 1024, (rows, LENGTH), generator=torch.Generator().manual_seed(0))


def test_backward_reaches_every_parameter(model):
    ids = random_ids(1)
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


@torch.no_grad()
def test_decoding_with_the_cache_is_the_full_forward(model):
    ids = random_ids(2)
    whole = model(ids, use_cache=False).logits
    first = model(ids[:, : LENGTH - 12], use_cache=True)
    parts, cache = [first.logits], first.cache
    for column in range(LENGTH - 12, LENGTH):
        output = model(ids[:, column : column + 1], cache=cache, use_cache=True)
        parts.append(output.logits)
        cache = output.cache
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **tolerance(model))


@torch.no_grad()
def test_left_padding_and_other_rows_change_nothing(model):
    ids = random_ids(2)
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    together = model(ids, attention_mask=mask).logits[0, PADDING:]
    alone = model(ids[:1, PADDING:]).logits[0]
    torch.testing.assert_close(together, alone, **tolerance(model))


def test_generation_is_the_likeliest_token_again_and_again(model):
    ids, mask = random_ids(2), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :PADDING] = 0
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    written = model.generate(ids, attention_mask=mask, **settings)
    running, running_mask = ids, mask
    for _ in range(3):
        with torch.no_grad():
            logits = model(running, attention_mask=running_mask, use_cache=False).logits[:, -1]
        running = torch.cat([running, logits.argmax(-1, keepdim=True)], dim=1)
        running_mask = torch.cat([running_mask, running_mask.new_ones(2, 1)], dim=1)
    assert torch.equal(written, running)


@torch.no_grad()
def test_saved_and_loaded_is_kept(model, tmp_path):
    ids = random_ids(1)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(again) is type(model)
    torch.testing.assert_close(again(ids).logits, model(ids).logits, **CLOSE)
