"""Exact gradients of TTT-E2E under PEFT's adapters and torch.compile, and its head under every name."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, set_seed

from .helpers import BATCH, gradients, random_ids, small_model

LENGTH = 3 * BATCH + 2


def test_the_head_is_one_module_under_every_name():
    model = small_model()
    assert model.lm_head is model.model.lm_head is model.get_output_embeddings()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not [name for name in model.state_dict() if name.startswith("lm_head")]
    untied = small_model(tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_holds_the_head_once_and_no_state_of_a_trainer(tied, tmp_path):
    model = small_model(tie_word_embeddings=tied, inner_learning_rate=0.25, meta_gradient_horizon=3)
    model.model.inner_learning_rate_multiplier = 0.5
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert [name for name in file.keys() if "lm_head" in name] == [] if tied else ["model.lm_head.weight"]  # noqa: SIM118
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.config.inner_learning_rate, loaded.config.meta_gradient_horizon) == (0.25, 3)
    assert loaded.model.inner_learning_rate_multiplier == 1.0, "a trainer's warm-up is not part of the model"


@pytest.mark.parametrize("changes", [{}, {"use_prime_mlp": False}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_on_every_linear_layer_train_and_merge(changes, checkpointing):
    """LoRA lies on the prime MLPs too: the fast weights are learned beside the adapted slow ones."""
    ids = random_ids(2, LENGTH)
    set_seed(1)
    adapted = get_peft_model(
        small_model(torch.float64, **changes), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ).double()
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert any("lora" in name and ("prime_mlp" in name or changes) for name, _ in adapted.named_parameters())
    if checkpointing:
        adapted.train()
        adapted.base_model.model.activation_checkpointing_enable()
    outputs = adapted(input_ids=ids, labels=ids)
    expected = merged(ids, labels=ids)
    torch.testing.assert_close(outputs.token_nll, expected.token_nll, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(outputs.inner_grad_norm, expected.inner_grad_norm, rtol=1e-8, atol=1e-10)
    outputs.loss.backward()
    found = gradients(adapted)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert found.keys() == trained and all(gradient.abs().max() > 0 for gradient in found.values())
    # Chain rule through W + B A / r * alpha: the gradient of B is that of W times the scaled A^T.
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    merged.zero_grad()
    merged(ids, labels=ids).loss.backward()
    whole = dict(merged.named_parameters())
    for name in trained:
        if "lora_B" not in name:
            continue
        target = name.removeprefix("base_model.model.").replace(".lora_B.default", "")
        a = adapted.get_parameter(name.replace("lora_B", "lora_A"))
        scaling = adapted.get_submodule(name.split(".lora_B")[0]).scaling["default"]
        torch.testing.assert_close(found[name], whole[target].grad @ a.mT * scaling, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_model_has_exact_second_order_gradients(checkpointing):
    """The inner loop steps out of the compiled graph, which has no second derivative."""
    ids = random_ids(2, LENGTH)
    results = []
    for compiled in (False, True):
        model = small_model(torch.float64, num_hidden_layers=3).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        call = torch.compile(model, backend="aot_eager") if compiled else model
        outputs = call(ids, labels=ids)
        outputs.loss.backward()
        results.append((outputs.loss, gradients(model)))
    (loss, exact), (compiled_loss, compiled_gradients) = results
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-10, atol=0)
    assert exact.keys() == compiled_gradients.keys()
    for name in exact:
        torch.testing.assert_close(compiled_gradients[name], exact[name], rtol=1e-8, atol=1e-11)
