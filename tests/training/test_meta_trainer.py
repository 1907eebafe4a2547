"""MetaTrainer: the official outer optimizer, the inner learning rate's warm-up, logs, evaluation and refusals."""

import math

import pytest
import torch
from tqdm.auto import tqdm
from transformers import (
    DataCollatorWithFlattening,
    MistralConfig,
    MistralForCausalLM,
    TrainerCallback,
    TrainingArguments,
)

from ttt_e2e.training import MetaTrainer, MetaTrainingArguments
from ttt_e2e.training.guards import check_arguments
from ttt_e2e.training.meta_trainer import inner_warmup_multiplier

from ..modeling.golden import Golden
from .helpers import ARGUMENTS, MINI_BATCH, easy_rows, meta_trainer, random_rows, tiny_model


class Recorder(TrainerCallback):
    """Copies of the parameters, and the inner learning rate, of every outer step."""

    def __init__(self, stop_after=None):
        self.parameters, self.multipliers, self.stop_after = [], [], stop_after

    def on_pre_optimizer_step(self, args, state, control, model=None, **named):
        self.multipliers.append(model.model.inner_learning_rate_multiplier)

    def on_step_end(self, args, state, control, model=None, **named):
        self.parameters.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        if state.global_step == self.stop_after:
            control.should_training_stop = True


class OfficialLoss(MetaTrainer):
    """With the official outer loss, the mean of the mini-batches' masked means, instead of the mean over all tokens."""

    golden: Golden

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.golden.loss(model(**inputs).token_nll).mean()


@pytest.mark.parametrize(("learning", "reentrant"), [(True, False), (False, False), (False, True)])
def test_blocks_before_the_first_trained_weight_keep_no_graph(tmp_path, learning, reentrant):
    """Trainer makes the embeddings' outputs take gradients, which reentrant checkpointing alone needs."""
    model = tiny_model(test_time_training=learning)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("prime" in name)
    seen = []
    model.model.layers[0].register_forward_hook(lambda block, inputs, output: seen.append(output[0].requires_grad))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    checkpointing = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    meta_trainer(tmp_path, model, max_steps=2, **checkpointing).train()
    assert seen[-1] == reentrant
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    assert changed == {name for name in before if "prime" in name}


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
def test_three_outer_steps_are_the_official_ones(tmp_path, optimizer):
    """The official optimizer's arguments are the defaults; its schedule has ten steps, of which three are stored."""
    golden, recorder = Golden("micro_adamw_steps"), Recorder(stop_after=3)
    rows = [{"input_ids": ids, "labels": ids} for ids in golden.ids]
    arguments = MetaTrainingArguments(
        str(tmp_path),
        learning_rate=1e-3,
        warmup_steps=1,
        max_steps=10,
        per_device_train_batch_size=len(rows),
        optim=optimizer,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = OfficialLoss(golden.model, arguments, train_dataset=rows, callbacks=[recorder])
    trainer.golden = golden
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    torch.testing.assert_close(
        torch.tensor([entry["loss"] for entry in history]), golden["adamw.loss_before_update"], rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        torch.tensor([entry["learning_rate"] for entry in history]), golden["adamw.lr"], rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        torch.tensor([entry["grad_norm"] for entry in history]),
        golden["adamw.outer_grad_norm_metric"],
        rtol=1e-4,
        atol=0,
    )
    for step, parameters in enumerate(recorder.parameters, start=1):
        expected = golden.converted(f"adamw.step{step}.param.")
        assert parameters.keys() == expected.keys()
        torch.testing.assert_close(parameters, expected, rtol=0, atol=5e-5)


def test_weight_decay_reaches_norms_and_embeddings(tmp_path):
    """With a learning rate and no gradient only the decay moves a parameter, by the same factor everywhere."""
    model = tiny_model()
    trainer = meta_trainer(tmp_path, model)
    trainer.create_optimizer()
    decayed = [p for group in trainer.optimizer.param_groups if group["weight_decay"] == 0.1 for p in group["params"]]
    assert {id(p) for p in decayed} == {id(p) for p in model.parameters()}


# ------------------------------------------------------------------------------------------------------ inner warm-up


def test_inner_learning_rate_warms_up_with_the_step(tmp_path):
    recorder = Recorder()
    trainer = meta_trainer(
        tmp_path,
        tiny_model(inner_learning_rate=0.5),
        callbacks=[recorder],
        max_steps=6,
        inner_lr_init=0.1,
        inner_lr_warmup_steps=4,
    )
    trainer.train()
    rates = [0.1 + 0.4 * min(1, (step + 1) / 4) for step in range(6)]
    assert [0.5 * multiplier for multiplier in recorder.multipliers] == pytest.approx(rates, rel=1e-12)
    assert trainer.model.model.inner_learning_rate_multiplier == 1.0, "nothing is left behind"


def test_inner_warm_up_may_be_a_share_of_all_steps(tmp_path):
    recorder = Recorder()
    meta_trainer(tmp_path, callbacks=[recorder], max_steps=8, inner_lr_init=0, inner_lr_warmup_steps=0.25).train()
    assert recorder.multipliers == [0.5] + [1.0] * 7


def test_inner_warm_up_is_off_in_evaluation(tmp_path):
    rows, losses = easy_rows(4), []
    for warmup in (0, 1000):
        trainer = meta_trainer(
            tmp_path, evaluation=rows, max_steps=1, learning_rate=0.0, inner_lr_warmup_steps=warmup, eval_on_start=True,
            lr_scheduler_type="constant",
        )  # fmt: skip
        trainer.train()
        losses.append([entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry])
    assert losses[0] == losses[1]


def test_no_warm_up_is_a_multiplier_of_one():
    assert inner_warmup_multiplier(0, 1.0, 0.1, 0) == inner_warmup_multiplier(3, 0.0, 0.1, 10) == 1.0


# --------------------------------------------------------------------------------------------------- logs, evaluation


def test_logs_are_the_means_of_what_the_model_returned(tmp_path):
    model, rows, limit = tiny_model(inner_max_grad_norm=4.0), random_rows(4), 4.0
    ids = torch.tensor(rows["input_ids"])
    outputs = model.train()(ids, labels=ids, skip_logits=True)
    norms = outputs.inner_grad_norm[~outputs.inner_grad_norm.isnan()]
    trainer = meta_trainer(
        tmp_path,
        model,
        rows,
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(outputs.loss.item(), rel=1e-6)
    nll = [log[f"nll_mini_batch_{index}"] for index in range(4)]
    assert nll == pytest.approx(outputs.inner_loss.mean(dim=0).tolist(), rel=1e-6)
    assert "nll_mini_batch_4" not in log
    assert log["inner_grad_norm"] == pytest.approx(norms.mean().item(), rel=1e-6)
    clipped = (norms > limit).float().mean().item()
    assert 0 < clipped < 1 and log["inner_steps_clipped"] == pytest.approx(clipped)
    assert log["tokens_per_second"] > 0 and log["peak_memory_mib"] > 0 and log["cpu_seconds"] > 0


def test_the_last_steps_are_logged(tmp_path):
    trainer = meta_trainer(tmp_path, max_steps=5, logging_steps=3)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [3, 5]


def test_evaluation_reports_learning_on_and_off(tmp_path):
    model, rows = tiny_model(), random_rows(6)
    ids = torch.tensor(rows["input_ids"])
    metrics = meta_trainer(tmp_path, model, evaluation=rows, per_device_eval_batch_size=4).evaluate()
    with torch.no_grad():
        on = model.eval()(ids, labels=ids).loss.item()
        off = model(ids, labels=ids, test_time_training=False).loss.item()
    assert abs(on - off) > 1e-3
    assert metrics["eval_loss"] == pytest.approx(on, rel=1e-5)
    assert metrics["eval_loss_learning_off"] == pytest.approx(off, rel=1e-5)


@pytest.mark.parametrize("learns, passes", [(True, 2), (False, 1)])
def test_the_bar_of_an_evaluation_counts_to_its_end_once(tmp_path, monkeypatch, learns, passes):
    bars = []

    class Bar(tqdm):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            bars.append(self)

    monkeypatch.setattr(f"{MetaTrainer.__module__}.tqdm", Bar)
    model = tiny_model() if learns else tiny_model(test_time_training=False, num_suffix_layers=0)
    arguments = {"disable_tqdm": False, "per_device_eval_batch_size": 2}
    trainer = meta_trainer(tmp_path, model, evaluation=random_rows(6), **arguments)
    for _ in range(2):
        trainer.evaluate()
    trainer.predict(random_rows(6))
    assert [(bar.n, bar.total) for bar in bars] == [(3 * passes, 3 * passes)] * 2 + [(3, 3)]


def test_metrics_function_gets_the_logits(tmp_path):
    seen = []
    trainer = meta_trainer(tmp_path, evaluation=random_rows(4))
    trainer.compute_metrics = lambda prediction: seen.append(prediction.predictions.shape) or {"seen": 1.0}
    trainer.args.prediction_loss_only = False
    metrics = trainer.evaluate()
    assert seen == [(4, 17, 32)], "once, with learning on"
    assert metrics["eval_seen"] == 1.0 and "eval_loss_learning_off" in metrics
    arguments = MetaTrainingArguments(str(tmp_path), **ARGUMENTS)
    asking = MetaTrainer(tiny_model(), arguments, eval_dataset=random_rows(4), compute_metrics=trainer.compute_metrics)
    assert asking.evaluate()["eval_seen"] == 1.0
    assert asking.predict(random_rows(4)).predictions.shape == (4, 17, 32)


def test_fewer_rows_than_a_batch_are_refused(tmp_path):
    with pytest.raises(ValueError, match="train_dataset has 3 rows, fewer than the 4"):
        meta_trainer(tmp_path, rows=random_rows(3), per_device_train_batch_size=4).train()


def test_misspelt_argument_of_the_schedule_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'cosine_with_min_lr' has no 'min_rl'; did you mean 'min_lr'"):
        MetaTrainingArguments(str(tmp_path), **ARGUMENTS, lr_scheduler_kwargs={"min_rl": 1e-5})


@pytest.mark.parametrize("kind", ["plain", "mistral"])
def test_models_that_do_not_learn_are_trained_too(tmp_path, kind):
    if kind == "plain":
        model = tiny_model(test_time_training=False, num_suffix_layers=0)
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = MistralForCausalLM(MistralConfig(vocab_size=32, num_key_value_heads=2, **sizes))
    trainer = meta_trainer(tmp_path, model, evaluation=easy_rows(4))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    assert "eval_loss_learning_off" not in trainer.evaluate()
    assert not any(name.startswith(("nll_mini_batch", "inner")) for name in trainer.state.log_history[0])


def test_training_holds_no_logits_of_a_whole_sequence(tmp_path, monkeypatch):
    seen = []
    model = tiny_model()
    head = model.model.lm_head.forward
    monkeypatch.setattr(model.model.lm_head, "forward", lambda hidden: seen.append(hidden.shape[1]) or head(hidden))
    meta_trainer(tmp_path, model, max_steps=1).train()
    assert seen and max(seen) <= MINI_BATCH


def test_saved_model_generates_with_its_cache(tmp_path):
    trainer = meta_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    assert type(trainer.model).from_pretrained(tmp_path / "model").config.use_cache


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_gradient_that_is_not_finite_does_not_reach_the_weights(tmp_path, max_grad_norm):
    model = tiny_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.model.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(FloatingPointError, match="outer gradient of step 1 is not finite"):
        meta_trainer(tmp_path, model, max_grad_norm=max_grad_norm).train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"save_strategy": "steps", "save_steps": 5, "logging_steps": 2}, "make save_steps=5 a multiple of logging_st"),
        ({"save_strategy": "epoch", "logging_steps": 2}, "between two logs"),
        ({"save_strategy": "steps", "save_steps": 5, "logging_strategy": "epoch"}, "between two logs"),
        ({"inner_lr_init": -0.1}, "inner_lr_init=-0.1"),
        ({"inner_lr_warmup_steps": 2.5}, "inner_lr_warmup_steps=2.5: give whole steps"),
        ({"inner_lr_warmup_steps": math.nan}, "inner_lr_warmup_steps=nan"),
        ({"learning_rate": 1e-4, "lr_scheduler_kwargs": {"min_lr": 1e-3}}, "the floor lies above learning_rate=0.0001"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        MetaTrainingArguments(str(tmp_path), **(ARGUMENTS | arguments))


def test_a_share_of_all_steps_is_checked_when_their_number_is_known(tmp_path):
    trainer = meta_trainer(tmp_path, save_strategy="steps", save_steps=0.5, logging_steps=4, max_steps=12)
    with pytest.raises(ValueError, match="make save_steps=6 a multiple of logging_steps=4"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_stock_arguments_are_refused(tmp_path):
    with pytest.raises(TypeError, match="needs MetaTrainingArguments"):
        MetaTrainer(tiny_model(), TrainingArguments(str(tmp_path)))


class ZeroThree:
    zero_stage = 3


class ContextParallel:
    cp_size, sp_size = 2, 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("torch_compile", True, "torch_compile=True"),
        ("use_liger_kernel", True, "use_liger_kernel=True"),
        ("deepspeed_plugin", ZeroThree(), "ZeRO stage 3"),
        ("parallelism_config", ContextParallel(), "cp_size=2"),
    ],
)
def test_what_would_be_silently_wrong_is_refused(tmp_path, monkeypatch, field, value, message):
    arguments = MetaTrainingArguments(str(tmp_path), **ARGUMENTS)
    setattr(arguments, field, value)
    # Trainer itself would look for libraries that need not be here.
    monkeypatch.setattr("transformers.Trainer.create_accelerator_and_postprocess", no_accelerator)
    with pytest.raises(ValueError, match=message):
        MetaTrainer(tiny_model(), arguments, train_dataset=easy_rows())


def no_accelerator(self):
    raise AssertionError("refused too late")


def test_fsdp_classes_must_leave_the_suffix_whole(tmp_path):
    arguments = MetaTrainingArguments(str(tmp_path), **ARGUMENTS)
    arguments.fsdp = True
    for classes in (None, ["TTTE2ESuffixLayer"], ["TTTE2EDecoderLayer", "TTTE2ESuffixLayer"]):
        arguments.fsdp_config = {"transformer_layer_cls_to_wrap": classes}
        with pytest.raises(ValueError, match="set it to \\['TTTE2EDecoderLayer'\\]"):
            check_arguments(arguments, [tiny_model().model])
    arguments.fsdp_config = {"transformer_layer_cls_to_wrap": ["TTTE2EDecoderLayer"]}
    check_arguments(arguments, [tiny_model().model])


def test_model_of_model_init_is_checked_too(tmp_path):
    arguments = MetaTrainingArguments(str(tmp_path), **ARGUMENTS)
    with pytest.raises(ValueError, match="DataCollatorWithFlattening"):
        MetaTrainer(None, arguments, DataCollatorWithFlattening(), easy_rows(), model_init=lambda: tiny_model())
    trainer = MetaTrainer(None, arguments, None, easy_rows(), model_init=lambda: tiny_model())
    trainer.train()
    assert trainer.state.global_step == ARGUMENTS["max_steps"]


def test_packing_collator_is_refused(tmp_path):
    with pytest.raises(ValueError, match="DataCollatorWithFlattening"):
        MetaTrainer(
            tiny_model(), MetaTrainingArguments(str(tmp_path), **ARGUMENTS), data_collator=DataCollatorWithFlattening()
        )


def test_position_ids_that_start_again_are_refused_before_the_first_step(tmp_path):
    rows = easy_rows(4).add_column("position_ids", [[*range(8), *range(9)]] * 4)
    model = tiny_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match="start again inside a row"):
        meta_trainer(tmp_path, model, rows).train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_compiled_model_is_refused_before_the_first_step(tmp_path):
    model = tiny_model()
    trainer = meta_trainer(tmp_path, model)
    model.model.layers[0] = torch.compile(model.model.layers[0])
    with pytest.raises(ValueError, match=r"compiled by torch\.compile"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_plain_baseline_may_be_compiled(tmp_path):
    arguments = MetaTrainingArguments(str(tmp_path), **ARGUMENTS)
    arguments.torch_compile = True
    check_arguments(arguments, [tiny_model(test_time_training=False).model])
