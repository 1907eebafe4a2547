"""A learned context belongs to the adapters that were at work while it was read."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ttt_e2e import TTTE2ECache

from .helpers import BATCH, random_ids, small_model

IDS = random_ids(1, 2 * BATCH + 3)


def adapted():
    """A model with adapters "a" (active) and "b" that change something, in attention and in prime MLPs."""
    settings = {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
    torch.manual_seed(0)
    model = get_peft_model(small_model(), LoraConfig(r=2, lora_alpha=4, **settings), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=4, lora_alpha=2, **settings))
    return model.eval()


def read(model):
    with torch.no_grad():
        return model(IDS, use_cache=True).cache


def scale(model, factor):
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(factor)


CHANGES = {
    "another one": (lambda model: model.set_adapter("b"), r"then: a \(scaling 2.0\); now: b \(scaling 0.5\)"),
    "both": (
        lambda model: model.base_model.set_adapter(["a", "b"]),
        r"then: a \(scaling 2.0\); now: a \(scaling 2.0\) and b \(scaling 0.5\)",
    ),
    "none": (lambda model: model.base_model.disable_adapter_layers(), r"then: a \(scaling 2.0\); now: none active"),
    "scaled": (lambda model: scale(model, 3.0), r"then: a \(scaling 2.0\); now: a \(scaling 6.0\)"),
    "merged": (lambda model: model.merge_adapter(), r"then: a \(scaling 2.0\); now: a \(scaling 2.0, merged\)"),
    "scaled in one layer": (
        lambda model: model.base_model.model.model.layers[0].self_attn.q_proj.scale_layer(3.0),
        r"then: a \(scaling 2.0\); now: a \(scaling 2.0\); a \(scaling 6.0\)",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_other_adapters_at_work_are_named(change, message, tmp_path):
    """When loading, and when saving after they changed."""
    model = adapted()
    cache = read(model)
    cache.save_pretrained(tmp_path / "context")
    assert TTTE2ECache.from_pretrained(tmp_path / "context", model).has_learned
    change(model)
    with pytest.raises(ValueError, match=rf"other adapters at work.*{message}"):
        TTTE2ECache.from_pretrained(tmp_path / "context", model)
    with pytest.raises(ValueError, match=rf"adapters changed after.*{message}"):
        cache.save_pretrained(tmp_path / "later")
    assert not (tmp_path / "later").exists()


def test_a_context_read_without_adapters_is_refused_with_them_and_the_other_way_round(tmp_path):
    model = adapted()
    read(model).save_pretrained(tmp_path / "with")
    merged = adapted().merge_and_unload()
    with pytest.raises(ValueError, match=r"other adapters at work.*then: a \(scaling 2.0\); now: none"):
        TTTE2ECache.from_pretrained(tmp_path / "with", merged)
    read(merged).save_pretrained(tmp_path / "merged")
    with pytest.raises(ValueError, match=r"other adapters at work.*then: none; now: a \(scaling 2.0\)"):
        TTTE2ECache.from_pretrained(tmp_path / "merged", model)
    with pytest.raises(ValueError, match="other weights"):
        TTTE2ECache.from_pretrained(tmp_path / "merged", small_model())


def test_adapters_that_come_back_are_the_same(tmp_path):
    model = adapted()
    cache = read(model)
    cache.save_pretrained(tmp_path / "context")
    model.set_adapter("b")
    model.set_adapter("a")
    with model.disable_adapter():
        read(model).save_pretrained(tmp_path / "disabled")
        assert TTTE2ECache.from_pretrained(tmp_path / "disabled", model).has_learned
    with pytest.raises(ValueError, match=r"then: none active; now: a \(scaling 2.0\)"):
        TTTE2ECache.from_pretrained(tmp_path / "disabled", model)
    loaded = TTTE2ECache.from_pretrained(tmp_path / "context", model)
    with torch.no_grad():
        assert torch.equal(model(IDS, cache=loaded).logits, model(IDS, cache=cache).logits)
