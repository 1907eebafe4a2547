"""The trainers that people already use: transformers' Trainer (and MetaTrainer beside it) and trl's SFTTrainer."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from ttt_e2e.training import MetaTrainer, MetaTrainingArguments

from ..modeling.tiny_tokenizer import CHAT_TEMPLATE, SENTENCES, byte_level_tokenizer
from ..modeling.ttt_layers import layers_model
from .adapters import fill
from .helpers import ARGUMENTS, MINI_BATCH, tiny_model

STOCK = {"stock": (Trainer, TrainingArguments), "meta": (MetaTrainer, MetaTrainingArguments)}
both_trainers = pytest.mark.parametrize("kind", STOCK)
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1e6}


def train(kind, folder, rows, collator=None, dtype=torch.float32, model=None, **arguments):
    """A trained trainer; what it logged is in `trainer.state.log_history`."""
    trainer_class, arguments_class = STOCK[kind]
    trainer = trainer_class(
        model=tiny_model(dtype) if model is None else model,
        args=arguments_class(str(folder), **(ARGUMENTS | {"logging_steps": 1} | arguments)),
        train_dataset=rows,
        data_collator=collator,
    )
    trainer.train()
    return trainer


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def parameters(trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def rows_of(*lengths: int) -> Dataset:
    """Rows that repeat two tokens; the first third of each has no labels."""
    ids = [[3 + row, 4 + row] * (length // 2) + [3 + row] * (length % 2) for row, length in enumerate(lengths)]
    labels = [[-100] * (len(row) // 3) + row[len(row) // 3 :] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


UNEQUAL = (17, 5, 11, 14, 4, 9, 17, 7)  # some shorter than a mini-batch and its next token


class Pad:
    """Pads on one side; ids of padding are those of a real token."""

    def __init__(self, side: str):
        self.side = side

    def __call__(self, rows):
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(values, padding):
            rest = [padding] * (longest - len(values))
            return rest + values if self.side == "left" else values + rest

        return {
            "input_ids": torch.tensor([padded(row["input_ids"], 7) for row in rows]),
            "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
            "labels": torch.tensor([padded(row["labels"], -100) for row in rows]),
        }


# ------------------------------------------------------------------------------------------------ transformers' Trainer


@both_trainers
def test_label_smoothing_shifts_the_labels_and_has_the_right_gradient(tmp_path, kind):
    """One step of SGD against autograd on the loss written out."""
    rows, smoothing, rate = rows_of(13, 13, 13, 13), 0.2, 0.1
    ids, labels = torch.tensor(rows["input_ids"]), torch.tensor(rows["labels"])
    arguments = {"max_steps": 1, "per_device_train_batch_size": 4, "label_smoothing_factor": smoothing}
    trainer = train(kind, tmp_path, rows, dtype=torch.float64, learning_rate=rate, **SGD, **arguments)
    model = tiny_model(torch.float64)
    log_p = model(ids).logits[:, :-1].log_softmax(dim=-1)
    real = labels[:, 1:] != -100
    nll = -log_p.gather(2, labels[:, 1:, None].clamp_min(0))[..., 0]
    loss = ((1 - smoothing) * nll - smoothing * log_p.mean(dim=-1))[real].mean()
    loss.backward()
    assert losses(trainer)[0] == pytest.approx(loss.item(), rel=1e-6)
    expected = {name: parameter.detach() - rate * parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close(parameters(trainer), expected, rtol=1e-9, atol=1e-10)


@both_trainers
@pytest.mark.parametrize(
    ("shape", "dtype", "close"),
    [("unequal", torch.float32, 1e-6), ("unequal", torch.float64, 1e-10), ("equal", torch.float64, 1e-10)],
)
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, kind, shape, dtype, close):
    """The outer loss counts the labelled tokens of all parts, wherever they are."""
    rows = rows_of(*(UNEQUAL if shape == "unequal" else [17] * 8))
    results = []
    for parts in (1, 4):
        arguments = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts, "max_steps": 3}
        results.append(train(kind, tmp_path, rows, Pad("right"), dtype, learning_rate=0.01, **SGD, **arguments))
    assert losses(results[0]) == pytest.approx(losses(results[1]), rel=1e-6)
    assert losses(results[0])[-1] < losses(results[0])[0] - 0.02
    torch.testing.assert_close(parameters(results[0]), parameters(results[1]), rtol=0, atol=close)


@both_trainers
def test_padding_changes_no_gradient(tmp_path, kind):
    """On the left, on the right, and not at all (rows one by one) are the same step."""
    rows = rows_of(*UNEQUAL)
    results = {}
    for side, size in (("left", 8), ("right", 8), ("none", 1)):
        arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 1}
        collator = Pad("right" if side == "none" else side)
        results[side] = train(kind, tmp_path, rows, collator, torch.float64, learning_rate=1.0, **SGD, **arguments)
    start = dict(tiny_model(torch.float64).named_parameters())
    for side in ("left", "right"):
        assert losses(results[side]) == pytest.approx(losses(results["none"]), rel=1e-6)
        torch.testing.assert_close(parameters(results[side]), parameters(results["none"]), rtol=0, atol=1e-10)
    moved = [name for name, value in parameters(results["none"]).items() if (value - start[name]).abs().max() > 1e-6]
    assert moved == list(start)


@both_trainers
def test_bf16_keeps_float32_weights(tmp_path, kind):
    rows = rows_of(*[17] * 8)
    arguments = {"per_device_train_batch_size": 8, "max_steps": 12, "learning_rate": 0.01}
    full, half = (train(kind, tmp_path, rows, bf16=enabled, **arguments) for enabled in (False, True))
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    moments = [value for state in half.optimizer.state.values() for value in state.values() if value.dim()]
    assert {value.dtype for value in moments} == {torch.float32}
    assert losses(half)[0] != losses(full)[0], "it computes in bfloat16"
    assert losses(half)[0] == pytest.approx(losses(full)[0], rel=1e-2)
    assert losses(half)[-1] < losses(half)[0] - 0.5
    falls = [losses(trainer)[0] - losses(trainer)[-1] for trainer in (full, half)]
    assert falls[1] > 0.8 * falls[0], "as well as in float32, apart from what rounding does within twelve steps"


def test_checkpointing_changes_no_training(tmp_path):
    rows = rows_of(*[17] * 8)
    arguments = {"per_device_train_batch_size": 4, "max_steps": 4, "dtype": torch.float64}
    results = []
    for enabled in (False, True):
        model = tiny_model(torch.float64, inner_checkpoint_every=1)
        results.append(train("meta", tmp_path, rows, model=model, activation_checkpointing=enabled, **arguments))
    assert results[1].model.model.gradient_checkpointing
    assert losses(results[0]) == pytest.approx(losses(results[1]), rel=1e-6)
    torch.testing.assert_close(parameters(results[0]), parameters(results[1]), rtol=0, atol=1e-7)


@both_trainers
def test_the_stock_collator_pads_texts(tmp_path, kind):
    """Texts of unequal lengths, padded on the left by a tokenizer; its padding has no labels and is not learned."""
    tokenizer = byte_level_tokenizer()
    rows = [{"input_ids": tokenizer(text).input_ids} for text in (*SENTENCES, "the river")]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batch = collator([dict(row) for row in rows])
    assert (batch["attention_mask"][:, 0] == 0).any() and (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    model = tiny_model(vocab_size=len(tokenizer))
    arguments = {"per_device_train_batch_size": 4, "learning_rate": 0.02}
    trainer = train(kind, tmp_path, Dataset.from_list(rows), collator, model=model, **arguments)
    assert losses(trainer)[-1] < losses(trainer)[0] - 1.0


# ----------------------------------------------------------------------------------------------------- trl's SFTTrainer

GENERATION = "{% generation %}{{ message['content'] }}<end>{% endgeneration %}"
ASSISTANT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['role'] == 'assistant' %}" + GENERATION +
    "{% else %}{{ message['content'] }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)  # fmt: skip
QUESTION, ANSWER = " ".join(SENTENCES), "the water goes by the old mill."
MESSAGES = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
DATA = {
    "text": ({"text": f"{QUESTION} {ANSWER}"}, {}),
    "chat": ({"messages": MESSAGES}, {}),
    "assistant only": ({"messages": MESSAGES}, {"assistant_only_loss": True}),
    "completion only": ({"prompt": QUESTION, "completion": ANSWER}, {"completion_only_loss": True}),
    "chat completion": ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, {"completion_only_loss": True}),
}
ADAPTER = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
FEW_STEPS = {"mini_batch_size": 8}  # inner ones
PROMPTED = [name for name in DATA if "only" in name or "completion" in name]


def sft_trainer(
    folder, data: str, dtype=torch.float32, adapter=None, fields=None, model=None, **arguments
) -> SFTTrainer:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = ASSISTANT_TEMPLATE if data == "assistant only" else CHAT_TEMPLATE
    row, settings = DATA[data]
    fields = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **(fields or {})}
    model = tiny_model(dtype, **fields) if model is None else model
    defaults = {"max_length": 256, "bf16": False, "logging_steps": 1, "warmup_steps": 0}
    return SFTTrainer(
        model=model,
        args=SFTConfig(str(folder), **(ARGUMENTS | defaults | settings | arguments)),
        train_dataset=Dataset.from_list([row] * 4),
        processing_class=tokenizer,
        peft_config=adapter,
    )


def batch_of(trainer) -> dict[str, torch.Tensor]:
    return {name: value for name, value in next(iter(trainer.get_train_dataloader())).items() if torch.is_tensor(value)}


@pytest.mark.parametrize("data", ["text", "assistant only"])
def test_sft_trains(tmp_path, data):
    trainer = sft_trainer(tmp_path, data, fields=FEW_STEPS, max_steps=7, learning_rate=0.03)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.7


def test_sft_trains_adapters_alone(tmp_path):
    fields = FEW_STEPS | {"initializer_range": 0.3}  # the head is frozen and must be able to tell tokens apart
    trainer = sft_trainer(tmp_path, "chat", adapter=ADAPTER, fields=fields, max_steps=8, learning_rate=0.03)
    before = parameters(trainer)
    trainer.train()
    moved = {name for name, value in parameters(trainer).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5


@pytest.mark.parametrize(
    ("data", "checkpointing", "adapter"),
    [*((data, False, None) for data in DATA), ("chat completion", True, None), ("chat", False, ADAPTER)],
)
def test_sft_has_the_meta_gradient(tmp_path, data, checkpointing, adapter):
    """SFTTrainer calls the model within and has a head of its own; its gradient is that of the model's outer loss."""
    trainer = sft_trainer(tmp_path, data, torch.float64, adapter, FEW_STEPS, gradient_checkpointing=checkpointing)
    model = trainer.model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    if adapter is not None:
        fill(model)
    batch = batch_of(trainer)
    gradients, found = {}, {}
    for order in ("second_order", "first_order"):
        model.config.meta_gradient = order
        for way in ("sft", "own"):
            model.zero_grad()
            loss = trainer.compute_loss(model, dict(batch)) if way == "sft" else model(**batch).loss
            loss.backward()
            found[way] = loss.item()
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            gradients[order, way] = torch.cat([parameter.grad.flatten() for parameter in trained])
    assert found["sft"] == pytest.approx(found["own"], rel=1e-5)
    exact = gradients["second_order", "own"]
    error = {
        order: ((gradients[order, "sft"] - exact).norm() / exact.norm()).item()
        for order in ("second_order", "first_order")
    }
    assert error["second_order"] < 1e-5 and error["first_order"] > 1e-2


@pytest.mark.parametrize("data", PROMPTED)
def test_sft_learns_from_a_prompt_that_has_no_labels(tmp_path, data):
    """What attention cannot reach, because three windows end before it, comes through the fast weights."""
    trainer = sft_trainer(tmp_path, data)
    model, batch = trainer.model.eval(), batch_of(trainer)
    labelled = (batch["labels"] != -100).nonzero()[:, 1]
    first, reach = labelled.min().item(), 3 * (model.config.sliding_window - 1)
    changed = 2 * MINI_BATCH
    assert changed + reach + 2 * MINI_BATCH < first, "the prompt is long enough"
    other = dict(batch) | {"input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, :changed] = 5 + other["input_ids"][:, :changed].flip(1) % 200
    sft = {}
    for learning in (True, False):
        model.config.test_time_training = learning
        with torch.no_grad():
            sft[learning] = [trainer.compute_loss(model, dict(part)).item() for part in (batch, other)]
    assert abs(sft[True][0] - sft[True][1]) > 1e-4
    assert sft[False][0] == pytest.approx(sft[False][1], abs=1e-7)
    model.config.test_time_training = True
    in_prompt = model(**batch).inner_loss[:, : first // MINI_BATCH - 1]
    assert in_prompt.shape[1] > 5 and in_prompt.isfinite().all() and (in_prompt > 0).all()


@pytest.mark.parametrize("arguments", [{"packing": True}, {"padding_free": True}], ids=["packing", "padding-free"])
@pytest.mark.parametrize("family", ["ttt_e2e", "ttt_layers"])
def test_sft_packing_is_refused(tmp_path, arguments, family):
    length, model = 512 if "packing" in arguments else None, None
    if family == "ttt_layers":
        model = layers_model("everything", torch.float32, vocab_size=len(byte_level_tokenizer()))
    trainer = sft_trainer(tmp_path, "text", model=model, max_length=length, **arguments)
    before = parameters(trainer)
    with pytest.raises(ValueError, match=r"documents.*Give each document a row of its own: set packing=False"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in parameters(trainer).items())
