"""The model inside the tools around it: Auto classes, saving, embeddings, PEFT, torch.compile, the stock Trainer."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from ttt_e2e import TTTE2EConfig, TTTE2EForCausalLM, TTTE2EModel

from .helpers import BATCH, SMALL, VOCAB, gradients, random_ids, small_model

LENGTH = 3 * BATCH + 2


# ------------------------------------------------------------------------------------------- classes and folders


def test_auto_classes_know_the_model():
    config = AutoConfig.for_model("ttt_e2e", **SMALL)
    assert isinstance(config, TTTE2EConfig)
    assert type(AutoModel.from_config(config)) is TTTE2EModel
    assert type(AutoModelForCausalLM.from_config(config)) is TTTE2EForCausalLM


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"use_prime_mlp": False}])
def test_a_saved_model_is_the_same_after_loading(changes, tmp_path):
    model = small_model(**changes, inner_learning_rate=0.25, meta_gradient_horizon=3)
    model.model.inner_learning_rate_multiplier = 0.5
    ids = random_ids(2, LENGTH)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("model.lm_head.weight" in file.keys()) == (not model.config.tie_word_embeddings)  # noqa: SIM118
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is TTTE2EForCausalLM and not loaded.training
    assert {**loaded.config.to_dict(), "_name_or_path": ""} == {**model.config.to_dict(), "_name_or_path": ""}
    assert torch.equal(loaded(ids).logits, expected)
    assert loaded.model.inner_learning_rate_multiplier == 1.0, "a trainer's warm-up is not part of the model"
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is TTTE2EModel
    assert torch.equal(base.lm_head(base(ids).last_hidden_state), expected), "the base model owns the head"


def test_the_head_is_one_module_under_every_name():
    model = small_model()
    assert model.lm_head is model.model.lm_head is model.get_output_embeddings()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not [name for name in model.state_dict() if name.startswith("lm_head")]
    untied = small_model(tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [VOCAB + 7, VOCAB - 10])
def test_the_vocabulary_can_be_resized(tied, size):
    model = small_model(tie_word_embeddings=tied)
    ids = random_ids(2, LENGTH, high=VOCAB - 10)
    with torch.no_grad():
        before = model(ids).logits
    model.resize_token_embeddings(size)
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert outputs.logits.shape[-1] == model.config.vocab_size == model.lm_head.out_features == size
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    # The first mini-batch is read with the slow weights, so that only the sum over the vocabulary has changed.
    kept = min(size, VOCAB)
    torch.testing.assert_close(outputs.logits[:, :BATCH, :kept], before[:, :BATCH, :kept])
    new = torch.full((2, LENGTH), size - 1)
    assert model(new, labels=new).loss.isfinite()
    with pytest.raises(ValueError, match=rf"input_ids.*{size}"):
        model(new + 1)


# --------------------------------------------------------------------------------------------------------- PEFT


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


# ------------------------------------------------------------------------------------------------ torch.compile


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


# ------------------------------------------------------------------------------------------------------ Trainer


def rows() -> Dataset:
    """Texts that repeat a few tokens of their own."""
    ids = torch.cat([random_ids(1, BATCH, seed=seed).repeat(1, 4)[:, : 3 * BATCH + 1] for seed in range(8)])
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"bf16": True},
        {"activation_checkpointing": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"label_smoothing_factor": 0.1},
    ],
    ids=["plain", "bf16", "checkpointing", "accumulation", "label-smoothing"],
)
def test_the_stock_trainer_meta_trains_and_evaluates(arguments, tmp_path):
    model = small_model(initializer_range=0.02)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fields = {
        "max_steps": 6,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "seed": 0,
        "disable_tqdm": True,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), **(fields | arguments)),
        train_dataset=rows(),
        eval_dataset=rows(),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 6 and len(evaluations) == 2
    assert losses[-1] < losses[0] - 0.1 and evaluations[1] < evaluations[0]
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []
    predictions = trainer.predict(rows()).predictions
    assert predictions.shape == (8, 3 * BATCH + 1, VOCAB), "logits alone: the other outputs are left out"


def test_the_stock_trainer_repeats_itself_with_checkpointing(tmp_path):
    """Checkpointing changes no logged loss."""
    logs = []
    for enabled in (False, True):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            logging_steps=1,
            activation_checkpointing=enabled,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=small_model(), args=arguments, train_dataset=rows())
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(logs[0]) == 3
    assert logs[0] == pytest.approx(logs[1], abs=1e-4)
