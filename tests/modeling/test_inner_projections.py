"""`inner_projections="down"`: the last projection of the inner MLPs learns alone.

That it reads, generates, trains and is saved as the other modes is tested with these (`families`); here is what it is.
"""

import pytest
import torch

from ttt_e2e import TTTE2ECache, TTTE2EConfig

from .helpers import BATCH, random_ids, small_model

IDS = random_ids(2, 3 * BATCH + 2)


@torch.no_grad()
def read(model, **arguments):
    return model(IDS, cache=TTTE2ECache(model.config), use_cache=True, **arguments)


def test_a_third_of_the_fast_weights_is_kept():
    whole, down = (small_model(torch.float64, inner_projections=kind) for kind in ("all", "down"))
    kept = [read(model).cache.context.fast.tensors for model in (whole, down)]
    assert [tensor.shape for tensor in kept[0][2::3]] == [tensor.shape for tensor in kept[1]]
    assert sum(t.numel() for t in kept[0]) == 3 * sum(t.numel() for t in kept[1])


def test_it_learns_something_else_from_the_second_mini_batch_on():
    whole, down = (read(small_model(torch.float64, inner_projections=kind)).logits for kind in ("all", "down"))
    torch.testing.assert_close(whole[:, :BATCH], down[:, :BATCH], rtol=1e-12, atol=1e-13)
    assert (whole - down)[:, BATCH:].abs().max() > 1e-4


def test_all_matrices_are_trained():
    """The outer loop trains gate and up as well: they decide what the last projection learns from."""
    model = small_model(torch.float64, inner_projections="down").train()
    model(IDS, labels=IDS).loss.backward()
    inner = model.model.layers[-1].inner_mlp
    assert all(layer.weight.grad.abs().max() > 0 for layer in (inner.gate_proj, inner.up_proj, inner.down_proj))


def test_a_context_of_the_other_kind_is_refused(tmp_path):
    whole, down = (small_model(inner_projections=kind) for kind in ("all", "down"))
    read(down).cache.save_pretrained(tmp_path / "context")
    with pytest.raises(ValueError, match="config"):
        TTTE2ECache.from_pretrained(tmp_path / "context", model=whole)


def test_configurations_from_before_there_was_a_choice_are_those_of_all():
    fields = TTTE2EConfig().to_dict()
    del fields["inner_projections"]
    assert TTTE2EConfig.from_dict(fields).inner_projections == "all"
    assert "inner_projections" not in TTTE2EConfig().context_settings()


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match=r"`inner_projections` must be one of .*'down'.*'up'"):
        TTTE2EConfig(inner_projections="up")
