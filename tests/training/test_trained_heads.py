"""The heads that judge a text, in the trainers that people use for them."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer, TrainingArguments, set_seed
from trl import RewardConfig, RewardTrainer

from ttt_e2e import (
    TTTE2EConfig,
    TTTE2EForQuestionAnswering,
    TTTE2EForSequenceClassification,
    TTTE2EForTokenClassification,
)
from ttt_e2e.training import MetaTrainer, MetaTrainingArguments

from ..modeling.tiny_tokenizer import byte_level_tokenizer
from .helpers import ARGUMENTS, SIZES

LENGTHS = (17, 6, 11, 14, 4, 9, 17, 8)
MARK, OTHER = 5, 6  # the token that a row is judged by: it stands at the beginning, out of the last token's window
HEADS = {
    "sequence": TTTE2EForSequenceClassification,
    "token": TTTE2EForTokenClassification,
    "answer": TTTE2EForQuestionAnswering,
}
TRAINERS = {"stock": (Trainer, TrainingArguments), "meta": (MetaTrainer, MetaTrainingArguments)}


def head(kind, dtype=torch.float32, **changes):
    set_seed(0)
    fields = SIZES | {"num_labels": 2, "pad_token_id": 2, "eos_token_id": 2, "classifier_dropout": 0.0} | changes
    return HEADS[kind](TTTE2EConfig(**fields)).to(dtype)


def rows(kind) -> Dataset:
    """Texts that begin with one of two tokens, which decides every label."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(8, 30, (length,), generator=generator).tolist() for length in LENGTHS]
    ids = [[MARK if row % 2 else OTHER, *text] for row, text in enumerate(ids)]
    labels = {
        "sequence": {"labels": [row % 2 for row in range(len(ids))]},
        "token": {"labels": [[row % 2] * len(text) for row, text in enumerate(ids)]},
        "answer": {"start_positions": [row % 2 for row in range(len(ids))], "end_positions": [2] * len(ids)},
    }
    return Dataset.from_dict({"input_ids": ids} | labels[kind])


def pad(batch):
    """On the right, with the id of the end of a text."""
    longest = max(len(row["input_ids"]) for row in batch)
    padded = {"input_ids": [row["input_ids"] + [2] * (longest - len(row["input_ids"])) for row in batch]}
    padded["attention_mask"] = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch]
    for name in batch[0].keys() - {"input_ids"}:
        values = [row[name] for row in batch]
        if isinstance(values[0], list):
            values = [value + [-100] * (longest - len(value)) for value in values]
        padded[name] = values
    return {name: torch.tensor(values) for name, values in padded.items()}


def trained(kind, folder, trainer="stock", dtype=torch.float32, **arguments):
    trainer_class, arguments_class = TRAINERS[trainer]
    done = trainer_class(
        model=head(kind, dtype),
        args=arguments_class(str(folder), **ARGUMENTS | {"logging_steps": 1} | arguments),
        train_dataset=rows(kind),
        eval_dataset=rows(kind),
        data_collator=pad,
    )
    done.train()
    return done


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("kind", HEADS)
def test_heads_are_trained_and_evaluated(tmp_path, kind, trainer):
    done = trained(kind, tmp_path, trainer, max_steps=15, learning_rate=0.03, per_device_train_batch_size=8)
    losses = [entry["loss"] for entry in done.state.log_history if "loss" in entry]
    metrics = done.evaluate()
    assert metrics["eval_loss"] < losses[-1] + 0.05 < losses[0] - 0.3
    if trainer == "stock":
        assert len(done.predict(rows(kind)).label_ids) == (2 if kind == "answer" else len(LENGTHS))


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, kind):
    results = []
    for parts in (1, 4):
        arguments = {"optim": "sgd", "max_grad_norm": 1e6, "learning_rate": 0.1, "weight_decay": 0.0, "max_steps": 2}
        arguments |= {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
        done = trained(kind, tmp_path, dtype=torch.float64, **arguments)
        results.append({name: parameter.detach() for name, parameter in done.model.named_parameters()})
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")])
def test_a_reward_model_is_trained(tmp_path, adapter):
    """Whose padding is the end of a text, as that of most language models."""
    tokenizer = byte_level_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = head("sequence", num_labels=1, vocab_size=len(tokenizer), pad_token_id=None)
    answers = Dataset.from_list(
        [{"chosen": f"{text} the mill is old.", "rejected": f"{text} no."} for text in ("the river", "a house", "it")]
    )
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            str(tmp_path), **ARGUMENTS | {"max_steps": 12, "learning_rate": 0.02, "logging_steps": 1, "bf16": False}
        ),
        train_dataset=answers,
        eval_dataset=answers,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == 1 and metrics["eval_margin"] > 0.5
