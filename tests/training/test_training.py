"""Training lowers the loss, moves every parameter, and repeats exactly."""

import pytest
import torch
from datasets import Dataset
from transformers import set_seed

from ttt_e2e import TTTE2EConfig, TTTE2EForCausalLM
from ttt_e2e.data import collate_rows
from ttt_e2e.training import MetaTrainer, MetaTrainingArguments

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SPECIAL = {"bos_token_id": None, "eos_token_id": None}
ARGUMENTS = {
    "max_steps": 12,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.02,
    "logging_steps": 3,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
}


def train(folder, **fields):
    set_seed(0)
    model = TTTE2EForCausalLM(TTTE2EConfig(**SIZES, **SPECIAL, sliding_window=8, **fields))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    # Five tokens of thirty-two, the same one in every second place: learned within a few steps.
    ids = [[row % 4, 4] * 8 + [row % 4] for row in range(16)]
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    arguments = MetaTrainingArguments(str(folder), **ARGUMENTS)
    trainer = MetaTrainer(model, arguments, train_dataset=rows.with_format("torch"), data_collator=collate_rows)
    trainer.train()
    assert model.config.use_cache, "a trained model generates with its cache"
    unchanged = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    log = trainer.state.log_history
    return [(entry["step"], entry["loss"]) for entry in log if "loss" in entry], unchanged


@pytest.mark.parametrize(
    "fields",
    [{"mini_batch_size": 4, "num_suffix_layers": 1}, {"test_time_training": False, "num_suffix_layers": 0}],
    ids=["learning", "plain"],
)
def test_training_lowers_the_loss_and_moves_every_parameter(tmp_path, fields):
    losses, unchanged = train(tmp_path, **fields)
    assert [step for step, _ in losses] == [3, 6, 9, 12]
    assert losses[-1][1] < losses[0][1] - 0.5
    assert unchanged == []
    assert not list(tmp_path.rglob("*.safetensors")), "nothing is saved unless asked for"


def test_training_repeats_exactly(tmp_path):
    fields = {"mini_batch_size": 4, "num_suffix_layers": 1}
    assert train(tmp_path, **fields)[0] == train(tmp_path, **fields)[0]
