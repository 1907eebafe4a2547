"""Estimates of a run: counts are exact, and the peak is within a factor of two of what torch's allocator hands out."""

import dataclasses

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from ttt_e2e import TTTE2EConfig, TTTE2EForCausalLM
from ttt_e2e.configuration import load_config, load_preset, load_recipe
from ttt_e2e.training.estimates import estimate_run

MINI_BATCH, STEPS = 16, 2
SMALL = {
    "vocab_size": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_suffix_layers": 2,
    "mini_batch_size": MINI_BATCH,
    "sliding_window": 2 * MINI_BATCH,
}
PLAIN = {"num_suffix_layers": 0, "test_time_training": False}


def tiny_recipe(mini_batches=8, checkpointing=False, rows=1, bf16=False):
    overrides = {
        "data.sequence_length": mini_batches * MINI_BATCH,
        "batch_size": 4 * rows,
        "training.per_device_train_batch_size": rows,
        "training.activation_checkpointing": str(checkpointing).lower(),
        "training.bf16": str(bf16).lower(),
    }
    return load_recipe("pretrain-tiny", "tiny", [f"{field}={value}" for field, value in overrides.items()])


def train(config, recipe):
    """Two outer steps, so that the second one has the optimizer's moments beside its activations."""
    training = recipe.training
    model = TTTE2EForCausalLM(config).train()
    if training["activation_checkpointing"]:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters())
    shape = (training["per_device_train_batch_size"], recipe.data.sequence_length + 1)
    for _ in range(STEPS):
        ids = torch.randint(2, config.vocab_size, shape)
        with torch.autocast("cpu", torch.bfloat16, enabled=training["bf16"]):
            loss = model(ids, labels=ids, skip_logits=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def measured_peak(config, recipe):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        train(config, recipe)
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ({}, {"mini_batches": 8}),
        ({}, {"mini_batches": 32}),
        ({}, {"mini_batches": 8, "checkpointing": True}),
        pytest.param({}, {"mini_batches": 32, "checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({}, {"mini_batches": 8, "checkpointing": True, "rows": 2, "bf16": True}, marks=pytest.mark.slow),
        pytest.param(
            {"inner_checkpoint_every": 1}, {"mini_batches": 16, "checkpointing": True}, marks=pytest.mark.slow
        ),
        ({"use_prime_mlp": False}, {"mini_batches": 8}),
        (PLAIN | {"layer_types": ["full_attention"] * 4}, {"mini_batches": 32}),
        (PLAIN | {"layer_types": ["full_attention"] * 4}, {"mini_batches": 32, "checkpointing": True, "rows": 2}),
        (PLAIN, {"mini_batches": 32, "bf16": True}),
    ],
)
def test_peak_is_within_a_factor_of_two_of_the_measured_one(model, settings):
    config, recipe = TTTE2EConfig(**(SMALL | model)), tiny_recipe(**settings)
    estimate, peak = estimate_run(config, recipe).peak_memory_bytes, measured_peak(config, recipe)
    assert peak / 2 <= estimate <= 2 * peak


def test_counts_of_a_recipe_of_the_paper():
    estimate = estimate_run(TTTE2EConfig(**load_preset("125m")), load_recipe("pretrain-8k", "125m"))
    assert estimate.tokens == 4800 * 64 * 8192 and estimate.steps == 4800
    assert estimate.mini_batches_per_sequence == 8
    assert estimate.fast_weight_bytes_per_sequence == 3 * 3 * 768 * 1664 * 4  # blocks, matrices, their sizes, float32


def test_parameters_are_counted_exactly():
    model = TTTE2EForCausalLM(TTTE2EConfig(**SMALL))
    assert estimate_run(model.config, tiny_recipe()).parameters == model.num_parameters()


@pytest.mark.parametrize("length", [8192, 32768, 131072])
def test_boundary_fast_weights_grow_with_the_root_of_the_length(length):
    """About as many copies of the fast weights as the square root of the number of mini-batches."""
    recipe = load_recipe("pretrain-8k", "125m", [f"data.sequence_length={length}"])
    parts = estimate_run(TTTE2EConfig(**load_preset("125m")), recipe).memory_parts
    copies = parts["boundary_fast_weights"] / (4 * 3 * 3 * 768 * 1664)
    assert copies == pytest.approx((length / 1024) ** 0.5, abs=1)


def test_offloaded_boundaries_are_not_on_the_device():
    fields, recipe = load_preset("125m"), load_recipe("extend-32k", "125m")
    kept, offloaded = (
        estimate_run(TTTE2EConfig(**fields, inner_checkpoint_offload=offload), recipe) for offload in (False, True)
    )
    difference = kept.peak_memory_bytes - offloaded.peak_memory_bytes
    assert difference == kept.memory_parts["boundary_fast_weights"] > 0


def test_several_processes_need_gradient_buckets():
    config, recipe = TTTE2EConfig(**SMALL), tiny_recipe()
    one, two = (estimate_run(config, recipe, processes) for processes in (1, 2))
    assert two.peak_memory_bytes - one.peak_memory_bytes == 4 * one.parameters


def test_plain_models_have_no_inner_loop():
    estimate = estimate_run(TTTE2EConfig(**(SMALL | PLAIN)), tiny_recipe(checkpointing=True))
    assert estimate.fast_weight_bytes_per_sequence == estimate.mini_batches_per_sequence == 0
    assert estimate.memory_parts["boundary_fast_weights"] == estimate.memory_parts["boundary_keys"] == 0


def test_lines_have_all_digits_and_say_what_is_unknown():
    recipe = tiny_recipe()
    config = TTTE2EConfig(**load_preset("125m"))
    estimate = estimate_run(config, recipe)
    lines = estimate.lines()
    assert f"parameters: {estimate.parameters}" in lines and estimate.parameters > 10**8
    assert f"tokens: {1000 * 4 * 128}" in lines
    assert sum(int(line.split(": ")[1]) for line in lines if line.startswith("peak_memory_bytes.")) == (
        estimate.peak_memory_bytes
    )
    epochs = dataclasses.replace(recipe, training={"num_train_epochs": 3.0})
    assert {"steps: unknown", "tokens: unknown"} <= set(estimate_run(config, epochs).lines())


def test_models_of_another_kind_have_counts_without_memory():
    config = load_config("tiny-mamba2")
    estimate = estimate_run(config, load_recipe("pretrain-tiny", "tiny-mamba2"))
    with torch.device("meta"):
        assert estimate.parameters == AutoModelForCausalLM.from_config(config).num_parameters()
    assert estimate.fast_weight_bytes_per_sequence == 0 and estimate.tokens == 1000 * 2 * 512
    assert "peak_memory_bytes: unknown" in estimate.lines()


@pytest.mark.parametrize("kind", ["linear", "mlp", "kvb"])
def test_fast_weights_of_ttt_layers_are_as_many_as_their_initial_values(kind):
    config = load_config(f"tiny-ttt-{kind}")
    estimate = estimate_run(config, load_recipe("pretrain-tiny", f"tiny-ttt-{kind}"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    fast = sum(p.numel() for name, p in model.named_parameters() if ".ttt.initial_" in name)
    assert estimate.fast_weight_bytes_per_sequence == 4 * fast
    assert estimate.mini_batches_per_sequence == 512 // config.mini_batch_size


def test_muon_keeps_one_moment_of_a_matrix():
    config, recipe = TTTE2EConfig(**SMALL), tiny_recipe()
    parts = estimate_run(config, recipe).memory_parts
    adamw = dataclasses.replace(recipe, training=recipe.training | {"optimizer": "adamw"})
    saved = estimate_run(config, adamw).memory_parts["optimizer_moments"] - parts["optimizer_moments"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name]
    assert recipe.training["optimizer"] == "muon" and saved == 4 * sum(m.weight.numel() for m in linear) > 0
