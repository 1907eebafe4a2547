"""Glue around the stock `transformers.Trainer`."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments, default_data_collator


@dataclass
class TrainingRun:
    """What a training run measured.

    Attributes:
        seconds: wall-clock time of all steps.
        tokens: tokens trained on.
        losses: (step, mean loss in nats since the last entry) at every logging step.
    """

    seconds: float
    tokens: int
    losses: list[tuple[int, float]]


def train_model(model: PreTrainedModel, rows: Dataset, arguments: dict, folder: Path, seed: int) -> TrainingRun:
    """Train a causal language model in place, with a progress bar; nothing is saved.

    For TTT-E2E this is meta-training: the loss that the model returns is taken after its own inner steps, and its
    gradient goes through them.

    Args:
        rows: `input_ids` and `labels`, all of one length.
        arguments: fields of `TrainingArguments`.
        folder: where the trainer may write.
        seed: of the order of the rows. (The weights are the caller's.)
    """
    defaults = {"save_strategy": "no", "report_to": "none", "dataloader_pin_memory": torch.cuda.is_available()}
    use_cache = model.config.use_cache
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), seed=seed, **(defaults | arguments)),
        train_dataset=rows,
        data_collator=default_data_collator,
    )
    metrics = trainer.train().metrics
    model.config.use_cache = use_cache  # the trainer turns it off, and it would be saved so
    steps = trainer.state.global_step
    rows_per_step = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
    return TrainingRun(
        seconds=metrics["train_runtime"],
        tokens=steps * rows_per_step * len(rows[0]["input_ids"]),
        losses=[(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
    )
