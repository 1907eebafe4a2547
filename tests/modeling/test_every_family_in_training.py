"""Every family in every mode trains with transformers' Trainer, with adapters, and with weights on the disk."""

import pytest
import torch
from accelerate import disk_offload
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    Trainer,
    TrainingArguments,
)

from ttt_e2e.training import MetaTrainer, MetaTrainingArguments

from .families import IDS, KINDS, LENGTH, write
from .helpers import VOCAB

TRAINING = {
    "max_steps": 12,
    "per_device_train_batch_size": 3,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def rows() -> Dataset:
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in IDS.tolist()])


def trained(folder, model, **arguments):
    """A stock trainer after training, and the losses that it logged."""
    arguments = TrainingArguments(str(folder), **TRAINING | arguments)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(), eval_dataset=rows())
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_lowers_the_loss_and_evaluates(kind, tmp_path):
    model = kind.fresh(initializer_range=0.02)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer, losses = trained(tmp_path, model)
    assert losses[-1] < losses[0] - 0.5
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []
    loss = trainer.evaluate()["eval_loss"]
    assert loss < losses[0] - 0.5
    predictions = trainer.predict(rows()).predictions
    assert predictions.shape == (3, LENGTH, VOCAB), "logits alone: the other outputs are left out"
    meta = MetaTrainer(model=model, args=MetaTrainingArguments(str(tmp_path), **TRAINING), eval_dataset=rows())
    assert meta.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "apart"),
    [
        ({"bf16": True}, 0.1),
        ({"activation_checkpointing": True}, 1e-4),
        pytest.param(
            {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1}, 1e-4, marks=pytest.mark.slow
        ),
        pytest.param({"label_smoothing_factor": 0.1}, None, marks=pytest.mark.slow),
    ],
    ids=["bf16", "checkpointing", "accumulation", "label-smoothing"],
)
def test_trainer_in_other_ways(family, arguments, apart, tmp_path):
    """Each lowers the loss and evaluates; all but label smoothing log the same losses."""
    kind = next(kind for kind in KINDS.values() if kind.family is family and kind.mode == family.some_mode)
    (_, plain), (trainer, losses) = (
        trained(
            tmp_path, kind.fresh(initializer_range=0.02), eval_strategy="steps", eval_steps=3, max_steps=6, **changes
        )
        for changes in ({}, arguments)
    )
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 6 and len(evaluations) == 2 and evaluations[1] < evaluations[0]
    assert losses[-1] < losses[0] - 0.1
    assert apart is None or losses == pytest.approx(plain, abs=apart)


def test_low_rank_adapters_learn(kind):
    model = kind.model(torch.float32)
    before = model(IDS).logits
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted(IDS, labels=IDS).loss.backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all(p.grad.any() for p in trained.values())
    with torch.no_grad():
        expected = adapted.eval()(IDS).logits
        merged = adapted.merge_and_unload()(IDS).logits
    torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-3)
    assert (expected - before).abs().max() > 1e-2


def test_weights_on_disk(family, one_of, tmp_path):
    """Offloading loads parameters when their module is called: none may be read beside a call."""
    expected = write(one_of, IDS)
    offloaded = disk_offload(one_of, tmp_path, execution_device="cpu")
    assert all(p.is_meta for p in offloaded.model.layers.parameters())
    assert torch.equal(write(offloaded, IDS), expected)
