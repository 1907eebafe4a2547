"""A model and rows that a trainer gets through in a second."""

import torch
from datasets import Dataset
from transformers import set_seed

from ttt_e2e import TTTE2EConfig, TTTE2EForCausalLM
from ttt_e2e.training import MetaTrainer, MetaTrainingArguments

VOCAB, MINI_BATCH = 32, 4
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_suffix_layers": 2,
    "mini_batch_size": MINI_BATCH,
    "sliding_window": 8,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
}
ARGUMENTS = {
    "max_steps": 12,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.02,
    "logging_steps": 3,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}
# What the wall clock or the machine decides.
MEASURED = {
    "tokens_per_second",
    "cpu_seconds",
    "processor",
    "peak_memory_mib",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
}


def tiny_model(dtype: torch.dtype = torch.float32, **fields) -> TTTE2EForCausalLM:
    set_seed(0)
    return TTTE2EForCausalLM(TTTE2EConfig(**(SIZES | fields))).to(dtype)


def easy_rows(count: int = 16, mini_batches: int = 4) -> Dataset:
    """Five tokens of thirty-two, the same one in every second place: learned within a few steps."""
    ids = [[row % 4, 4] * (2 * mini_batches) + [row % 4] for row in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def random_rows(count: int = 16, mini_batches: int = 4, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (count, mini_batches * MINI_BATCH + 1), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def meta_trainer(folder, model=None, rows=None, evaluation=None, callbacks=None, **arguments) -> MetaTrainer:
    return MetaTrainer(
        model=tiny_model() if model is None else model,
        args=MetaTrainingArguments(str(folder), **(ARGUMENTS | arguments)),
        train_dataset=easy_rows() if rows is None else rows,
        eval_dataset=evaluation,
        callbacks=callbacks,
    )


def repeatable(history: list[dict]) -> list[dict]:
    """A log without what the wall clock or the machine decides."""
    return [{name: value for name, value in entry.items() if name not in MEASURED} for entry in history]
