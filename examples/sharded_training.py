"""Meta-training with FSDP2: what is trained lies in shards, over the processes of one machine or of several.

    torchrun --nproc-per-node 8 examples/sharded_training.py --model models/start --data texts/ --output runs/sharded

Every process holds its part of the parameters, gradients and moments, gathers a prefix block when it is at work, and
the suffix blocks, which learn while they read, as a whole. Without torchrun it trains in one process, unsharded.
"""

import argparse
import os
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from ttt_e2e.data import PackedRows, collate_rows, load_documents, load_tokenizer, tokenize_documents
from ttt_e2e.training import MetaTrainer, MetaTrainingArguments


def train(model: str, rows: Dataset, output: Path, batch_size: int, **arguments) -> MetaTrainer:
    """Train a saved model with the papers' AdamW and save it.

    Args:
        model: its folder.
        rows: `input_ids` and `labels`, [T + 1] each.
        output: gets the trained model.
        batch_size: rows of a step, over all processes.
        arguments: further ones of `MetaTrainingArguments`.
    """
    processes, on_gpu = int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.is_available()
    sharding = {}
    if processes > 1:
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
        sharding["distributed_config"] = DistributedConfig(fsdp_size=processes)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **sharding).train()
    settings = MetaTrainingArguments(
        output_dir=str(output / "log"),
        per_device_train_batch_size=batch_size // processes,
        save_strategy="no",  # transformers cannot resume a run of this kind
        report_to="none",
        use_cpu=not on_gpu,
        **arguments,
    )
    trainer = MetaTrainer(loaded, settings, train_dataset=rows, data_collator=collate_rows)
    trainer.train()
    trainer.model.save_pretrained(output)  # every process gives its part, the first one writes
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a saved TTT-E2E model with its tokenizer")
    parser.add_argument("--data", required=True, help="as ttt-e2e train takes it")
    parser.add_argument("--output", required=True, type=Path, help="gets the trained model")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/ttt-e2e").expanduser(), help="for prepared data")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a row")
    parser.add_argument("--batch-size", type=int, default=64, help="rows of a step, over all processes")
    parser.add_argument("--steps", type=int, default=4800)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16; parameters stay float32")
    parser.add_argument("--activation-checkpointing", action="store_true", help="memory for a third more time")
    asked = parser.parse_args()
    tokenizer = load_tokenizer(asked.model)
    documents = load_documents(asked.data, cache_folder=asked.cache)
    rows = PackedRows(tokenize_documents(documents, tokenizer, asked.cache), asked.length)
    trainer = train(
        asked.model,
        rows,
        asked.output,
        asked.batch_size,
        max_steps=asked.steps,
        learning_rate=asked.learning_rate,
        bf16=asked.bf16,
        activation_checkpointing=asked.activation_checkpointing,
    )
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(asked.output)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
