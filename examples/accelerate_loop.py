"""Meta-training in a plain Accelerate loop, to copy and to change. It gives the losses of `MetaTrainer`.

    python examples/accelerate_loop.py
    torchrun --nproc_per_node 2 examples/accelerate_loop.py    (accelerate launch, on GPUs)

The model does what is special: its loss is taken while it learns, and `backward` goes through the learning. The loop
only adds the inner learning rate's warm-up.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import get_scheduler

from ttt_e2e import TTTE2EConfig, TTTE2EForCausalLM
from ttt_e2e.configuration import load_preset
from ttt_e2e.data import PackedRows, collate_rows, load_documents, tokenize_documents, trained_tokenizer
from ttt_e2e.training.meta_trainer import inner_warmup_multiplier

CACHE = Path("runs/cache")


def train(
    model: TTTE2EForCausalLM,
    rows: Dataset,
    steps: int,
    batch_size: int,
    learning_rate: float,
    inner_lr_init: float = 0.1,
    inner_lr_warmup_steps: int = 0,
    mixed_precision: str = "no",
    seed: int = 42,
) -> Iterator[float]:
    """Train a model in place with the papers' AdamW, and yield the loss of each step.

    Args:
        rows: `input_ids` and `labels`, [T + 1] each.
        steps: outer steps.
        batch_size: rows per step and process.
        learning_rate: its peak; it rises over the first tenth of the steps and falls to 1e-5.
        inner_lr_init: inner learning rate before the first step; inner_lr_warmup_steps: outer steps to its full size.
        mixed_precision: "no" or "bf16"; parameters and fast weights stay float32.
    """
    set_seed(seed)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else several processes on the CPU would not know of one another
        mixed_precision=mixed_precision,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = get_scheduler(
        "cosine_with_min_lr",
        optimizer,
        num_warmup_steps=-(-steps // 10),
        num_training_steps=steps,
        scheduler_specific_kwargs={"min_lr": 1e-5},
    )
    batches = DataLoader(rows, batch_size, shuffle=True, drop_last=True, collate_fn=collate_rows)
    decoder = model.model  # the TTTE2EModel inside, before anything is wrapped around it
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    model.train()
    for step, batch in enumerate(tqdm(endless(batches, steps), total=steps, disable=not accelerator.is_main_process)):
        decoder.inner_learning_rate_multiplier = inner_warmup_multiplier(
            step, decoder.config.inner_learning_rate, inner_lr_init, inner_lr_warmup_steps
        )
        # The mean over the labelled tokens of all processes; each of them contributes its sum.
        labelled = accelerator.reduce((batch["labels"][:, 1:] != -100).sum())
        loss = model(**batch, num_items_in_batch=labelled, skip_logits=True).loss
        accelerator.backward(loss * accelerator.num_processes)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        yield accelerator.reduce(loss.detach()).item()
    decoder.inner_learning_rate_multiplier = 1.0


def endless(batches: DataLoader, steps: int) -> Iterator[dict[str, torch.Tensor]]:
    """So many batches, over as many epochs as that takes."""
    given = 0
    while given < steps:
        for batch in batches:
            if given == steps:
                return
            given += 1
            yield batch


def main() -> None:
    config = TTTE2EConfig(**load_preset("tiny"))
    documents = load_documents("standard-library", cache_folder=CACHE)
    tokenizer = trained_tokenizer(documents, config.vocab_size, CACHE)
    rows = PackedRows(tokenize_documents(documents, tokenizer, CACHE), sequence_length=512)
    set_seed(42)
    model = TTTE2EForCausalLM(config)
    for step, loss in enumerate(train(model, rows, steps=60, batch_size=8, learning_rate=6e-3), start=1):
        if step % 10 == 0:
            print(f"step {step}: loss {loss:.4f}")
    if int(os.environ.get("RANK", 0)) == 0:
        model.save_pretrained("runs/accelerate_loop")
        tokenizer.save_pretrained("runs/accelerate_loop")


if __name__ == "__main__":
    main()
