"""Modules in the place of embeddings, head and linear layers: PEFT's wrappers, quantised layers, one's own."""

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, TrainableTokensConfig, get_peft_model
from torch import nn
from transformers import set_seed

from ttt_e2e import TTTE2ECache

from .helpers import LENGTH, VOCAB, gradients, random_ids, small_model
from .recurrent import hybrid
from .ttt_layers import layers_model

FAMILIES = {
    "ttt_e2e": lambda **changes: small_model(torch.float64, **changes),
    "recurrent_hybrid": lambda **changes: hybrid("everything", **changes),
    "ttt_layers": lambda **changes: layers_model("everything", **changes),
}
NEW = VOCAB + 7
TOKENS = [5, 6, NEW - 2]
CONFIGS = {
    "trainable tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=TOKENS),
    "trainable tokens alone": TrainableTokensConfig(token_indices=TOKENS),
    "embeddings": LoraConfig(r=2, target_modules=["embed_tokens"]),
    "embeddings and head": LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"]),
    "whole head": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "whole embeddings": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "linear layers and head": LoraConfig(r=2, target_modules=r".*(_proj|lm_head)$"),
    "magnitudes": LoraConfig(r=2, target_modules=r".*(_proj|lm_head|embed_tokens)$", use_dora=True),
    "scaled activations": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "adaptive ranks": AdaLoraConfig(target_modules=["q_proj", "down_proj"], total_step=10),
}
GENERATED = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def with_merged_adapters(model, stays_tied: bool):
    """The same weights without adapters. One on the embeddings or the head alone leaves the other as it was."""
    model = copy.deepcopy(model)
    if not stays_tied:
        head = model.get_base_model().get_output_embeddings()
        head = head.get_base_layer() if hasattr(head, "get_base_layer") else getattr(head, "original_module", head)
        head.weight = nn.Parameter(head.weight.detach().clone())
    return model.merge_and_unload()


def adapted(family, config, **changes):
    """A model with new tokens in its vocabulary and adapters that are no longer neutral."""
    model = FAMILIES[family](**changes)
    set_seed(1)
    model.resize_token_embeddings(NEW)
    config = copy.deepcopy(config)
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(model, config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_in_any_place_read_train_and_write(family, kind, tied):
    """As the same model with the adapters merged into its weights."""
    if family == "recurrent_hybrid" and kind == "magnitudes":
        pytest.skip("PEFT's magnitudes cannot lie on a fused projection of Mamba 2")
    model = adapted(family, CONFIGS[kind], tie_word_embeddings=tied)
    merged = with_merged_adapters(model, stays_tied="tokens" in kind)
    ids = random_ids(2, LENGTH)
    ids[:, 3] = NEW - 2
    outputs = model(input_ids=ids, labels=ids)
    close = {"rtol": 1e-3, "atol": 1e-3} if family == "recurrent_hybrid" else {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(outputs.logits, merged(ids).logits, **close)
    outputs.loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = gradients(model)
    assert found.keys() == trained and all(gradient.isfinite().all() for gradient in found.values())
    assert torch.equal(model.generate(input_ids=ids, **GENERATED), merged.generate(ids, **GENERATED))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["trainable tokens", "embeddings and head", "whole head", "whole embeddings"])
def test_checkpointing_and_meta_gradients_reach_adapters_around_the_head(kind, tied):
    """The slope of the loss along a random direction, with and without recomputation."""
    model, ids = adapted("ttt_e2e", CONFIGS[kind], tie_word_embeddings=tied), random_ids(2, LENGTH)
    ids[:, [2, 9, 20]] = torch.tensor(TOKENS)

    def loss():
        return model(input_ids=ids, labels=ids).loss

    found = {}
    for checkpointing in (False, True):
        if checkpointing:
            model.train().base_model.model.activation_checkpointing_enable()
        model.zero_grad()
        loss().backward()
        found[checkpointing] = gradients(model)
    torch.testing.assert_close(found[True], found[False], rtol=1e-8, atol=1e-11)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    generator, step, values = torch.Generator().manual_seed(0), 1e-6, []
    moves = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in parameters.items()}
    for sign in (1, -2):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter += sign * step * moves[name]
            values.append(loss().item())
    slope = sum((found[False][name] * moves[name]).sum().item() for name in parameters)
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


# ------------------------------------------------------------------------------------------------ quantised and others


class OnlyComputes(nn.Module):
    """A linear layer that has neither sizes nor a weight to look at."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layers = nn.ModuleList([layer])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x)


class PassesNoGradient(OnlyComputes):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return super().forward(x)


def replaced(model, kind, wanted=lambda name: True):
    """The model with its linear layers, those that are wanted, in another module."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and wanted(name):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, kind(layer))
    return model


def quantised(model, wanted=lambda name: True):
    names = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and wanted(name)}
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model).float(), names)


@pytest.mark.parametrize("family", ["ttt_e2e", "ttt_layers"])
def test_layers_are_called_and_never_looked_at(family):
    model, ids = FAMILIES[family](), random_ids(2, LENGTH)
    expected = model(ids, labels=ids)
    written = model.generate(ids, **GENERATED)
    model = replaced(model, OnlyComputes)
    found = model(ids, labels=ids)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-9)
    assert torch.equal(model.generate(ids, **GENERATED), written)
    found.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("learning", [True, False])
def test_what_is_outside_the_inner_loop_can_be_quantised(learning):
    """All that is quantised but the suffix blocks and the head; the differences are float32 beside it."""
    model, ids = small_model(), random_ids(2, LENGTH)
    outside = ("model.layers.0.", "model.layers.1.")
    less = quantised(model, (lambda name: name.startswith(outside)) if learning else (lambda name: True))
    with torch.no_grad():
        found, whole = (part(ids, test_time_training=learning, use_cache=True) for part in (less, model))
    assert 0 < (found.logits - whole.logits).norm() < 0.3 * whole.logits.norm()
    if learning:
        assert {tensor.dtype for tensor in found.cache.context.fast.tensors} == {torch.float32}
    written = less.generate(ids, test_time_training=learning, **GENERATED)
    assert written.shape == (2, LENGTH + 9)


@pytest.mark.parametrize("family", ["recurrent_hybrid", "ttt_layers"])
def test_the_other_families_can_be_quantised_whole(family):
    ids = random_ids(2, LENGTH)
    model = FAMILIES[family]().float()
    with torch.no_grad():
        found, whole = quantised(model)(ids).logits, model(ids).logits
    assert 0 < (found - whole).norm() < 0.4 * whole.norm()


def test_quantised_layers_that_would_cut_the_inner_gradient_are_named():
    less, ids = quantised(small_model()), random_ids(1, LENGTH)
    message = (
        r"'layers\.2\.self_attn\.q_proj' .*quantised.*\['layers\.2', 'layers\.3'\] and 'lm_head'.*test_time_training"
    )
    for call in (less, lambda ids: less.generate(ids, max_new_tokens=2)):
        with pytest.raises(ValueError, match=message):
            call(ids)


def test_generation_is_refused_before_anything_is_written():
    """Also behind a prompt that is shorter than a mini-batch, from which nothing is learned at first."""
    less, written = quantised(small_model()), []

    class Streamer:
        put, end = written.append, lambda self: None

    with pytest.raises(ValueError, match="quantised"):
        less.generate(random_ids(1, 2), max_new_tokens=2 * LENGTH, streamer=Streamer())
    assert not written
    with torch.no_grad():
        less.generate(random_ids(1, 2), max_new_tokens=2, learn_from="none")


@pytest.mark.parametrize(
    ("place", "learns", "refused"),
    [("layers.3.self_attn.k_proj", True, True), ("lm_head", True, True), ("layers.2.prime_mlp.down_proj", True, True),
     ("layers.3.self_attn.k_proj", False, False), ("layers.1.mlp.up_proj", True, False)],
)  # fmt: skip
def test_a_layer_that_passes_no_gradient_is_never_learned_through(place, learns, refused):
    """Whatever kind it is: the inner gradient would be wrong without a word."""
    model = replaced(small_model(), PassesNoGradient, lambda name: name.endswith(place))
    message = r"PassesNoGradient passes no gradient on.*lm_head.*test_time_training"
    with torch.no_grad(), pytest.raises(ValueError, match=message) if refused else nullcontext():
        model(random_ids(1, LENGTH), test_time_training=learns)


def test_what_a_quantised_model_has_learned_is_kept(tmp_path):
    """The fingerprint tells its weights from others."""
    model = quantised(FAMILIES["ttt_e2e"](), lambda name: "layers.0" in name)
    ids = random_ids(1, LENGTH)
    with torch.no_grad():
        cache = model(ids, use_cache=True).cache
        cache.save_pretrained(tmp_path / "context")
        loaded = TTTE2ECache.from_pretrained(tmp_path / "context", model)
        more = random_ids(1, 5, seed=1)
        assert torch.equal(model(more, cache=loaded).logits, model(more, cache=cache).logits)
    other = FAMILIES["ttt_e2e"]()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(ValueError, match="other weights"):
        TTTE2ECache.from_pretrained(tmp_path / "context", quantised(other, lambda name: "layers.0" in name))
