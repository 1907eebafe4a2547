"""`MetaTrainer`: transformers' Trainer with what meta-training needs beside it.

The inner loop is the model's own: its loss is taken while it learns, and `loss.backward()` goes through the learning.
"""

import inspect
import math
import resource
import sys
import time
from collections.abc import Sized

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProgressCallback, TrainerCallback
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..causal_lm_loss import NO_TARGET
from ..checks import is_reentrant
from ..storage.machine import device_name
from .arguments import MetaTrainingArguments, check_saves_follow_logs
from .guards import check_arguments, check_collator, check_prepared, check_whole_matrices, learning_models
from .inner_logs import InnerLogs
from .muon import muon_of_model
from .safe_trainer import SafeTrainer

logger = logging.get_logger(__name__)


def inner_warmup_multiplier(step: int, learning_rate: float, init: float, warmup_steps: int) -> float:
    """What the inner learning rate is multiplied by in outer step s: (init + (rate - init) min(1, (s+1)/steps)) / rate.

    Args:
        step: s, counted from 0.
        learning_rate: `config.inner_learning_rate`.
        init: inner learning rate before the first step.
        warmup_steps: outer steps; 0 for no warm-up.
    """
    if warmup_steps == 0 or learning_rate == 0:
        return 1.0
    return (init + (learning_rate - init) * min(1.0, (step + 1) / warmup_steps)) / learning_rate


class MetaTrainer(SafeTrainer):
    """Trains a causal language model with test-time training; any other causal language model as a baseline, too.

    Beyond transformers' Trainer: the inner learning rate's warm-up; weight decay on all parameters; Muon; logs of the
    inner loop (`nll_mini_batch_I`, `inner_grad_norm`, `inner_steps_clipped`), `tokens_per_second`, `cpu_seconds` (of
    all processes since the last log), `peak_memory_mib` (the most of any process: of the GPU's allocator, or resident
    memory), and in `state.log_history` the `processor` that they were measured on; evaluation with learning on
    (`eval_loss`) and off (`eval_loss_learning_off`); checkpoints that are complete or not used; refusals of what would
    be silently wrong; and a stop before a gradient that is not finite reaches the weights.

    Args:
        model: a causal language model, or a model of ours with another head.
        args: the arguments; None for the defaults.
        others, named: as in transformers' Trainer.

    Raises:
        TypeError, ValueError: arguments that do not fit together, before any work.
        FloatingPointError: in training, at a gradient that is not finite.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: MetaTrainingArguments | None = None,
        *others,
        **named,
    ):
        args = MetaTrainingArguments("tmp_trainer") if args is None else args
        if not isinstance(args, MetaTrainingArguments):
            raise TypeError(f"args is a {type(args).__name__}; MetaTrainer needs MetaTrainingArguments.")
        models = learning_models(model) if model is not None else []
        check_arguments(args, models)
        cached = [part.config.use_cache for part in models]
        super().__init__(model, args, *others, **named)
        check_arguments(args, learning_models(self.model))  # again, for a model that `model_init` has made
        check_collator(learning_models(self.model), self.data_collator)
        for part, use_cache in zip(models, cached, strict=True):
            # Trainer turns it off, and it would be saved so. Losses are computed without a cache anyway.
            part.config.use_cache = use_cache
        parts = [part for part in self.model.modules() if isinstance(part, PreTrainedModel)]
        self._can_skip_logits = any("skip_logits" in inspect.signature(part.forward).parameters for part in parts)
        self._inner_logs = InnerLogs()
        self._last_log, self._last_cpu = time.perf_counter(), time.process_time()
        self._learning_off, self._evaluated, self.evaluation_passes = False, None, 1
        if self.compute_metrics is not None:
            args.prediction_loss_only = False  # it asks for the logits
        self.add_callback(_InnerWarmup(self))
        if self.pop_callback(ProgressCallback):
            self.add_callback(_ShortProgress(self))

    def train(self, *others, **named):
        """As transformers' Trainer; `resume_from_checkpoint=True` takes the last checkpoint that is complete.

        Raises:
            ValueError: there are fewer rows than one batch; or what `SafeTrainer.train` raises.
            FloatingPointError: a gradient is not finite.
        """
        self._check_rows()
        try:
            return super().train(*others, **named)
        finally:
            for part in learning_models(self.model):
                part.inner_learning_rate_multiplier = 1.0

    def _check_rows(self) -> None:
        batch = self.args.train_batch_size * self.args.world_size
        if isinstance(self.train_dataset, Sized) and len(self.train_dataset) < batch and self.args.dataloader_drop_last:
            raise ValueError(
                f"train_dataset has {len(self.train_dataset)} rows, fewer than the {batch} that are read at once over "
                "all processes: give more rows, or lower per_device_train_batch_size."
            )

    # ---------------------------------------------------------------------------------------- optimizer and loss

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All of them, norms and embeddings included, as in the papers; but for what a model's class exempts."""
        exempt = {name for part in model.modules() for name in getattr(part, "no_weight_decay", ())}
        return [name for name, _ in model.named_parameters() if name.rpartition(".")[2] not in exempt]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The papers' AdamW, or Muon (`args.optimizer`)."""
        if self.optimizer is None and self.args.optimizer == "muon":
            trained = self.model if model is None else model
            check_whole_matrices(trained)
            self.optimizer = muon_of_model(trained, self.args, self.get_decay_parameter_names(trained))
        return super().create_optimizer(model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ):
        """The model's outer loss, without ever holding a whole sequence's logits where nobody needs them."""
        models = learning_models(model)
        arguments = dict(inputs)
        if models and self._can_skip_logits and self._needs_no_logits(model):
            arguments["skip_logits"] = True
        if self._learning_off:
            arguments["test_time_training"] = False
        loss, outputs = super().compute_loss(
            model, arguments, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if model.training:
            losses = outputs.get("inner_loss")
            if losses is not None and losses.shape[1] == 0:
                logger.warning_once(
                    "No inner step was taken: no row has a whole mini-batch and the token after it. Give longer rows, "
                    "or a smaller `mini_batch_size`."
                )
            if self.args.logging_strategy.value != "no":
                self._inner_logs.add(outputs, inputs, models[0].config.inner_max_grad_norm or 0.0 if models else 0.0)
        elif self._evaluated is not None and outputs.get("token_nll") is not None:
            self._evaluated.add(outputs["token_nll"], inputs["labels"], inputs.get("attention_mask"))
        return (loss, outputs) if return_outputs else loss

    def _needs_no_logits(self, model: nn.Module) -> bool:
        if self.label_smoother is not None or self.compute_loss_func is not None:
            return False
        return model.training or self.args.prediction_loss_only

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        """Stop before a gradient that is not finite ruins the weights."""
        norm = super()._get_grad_norm(model, grad_norm)
        # A gradient scaler (float16) meets infinite gradients on purpose, and skips them itself.
        if self.accelerator.scaler is None and not math.isfinite(norm):
            raise FloatingPointError(
                f"The outer gradient of step {self.state.global_step + 1} is not finite; the weights were not changed. "
                "Begin a new run from the last checkpoint's folder with a lower learning_rate, a longer "
                "inner_lr_warmup_steps, or in float32."
            )
        return norm

    # -------------------------------------------------------------------------------------------- logs, evaluation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the inner loop did since the last log to the logs of training."""
        if "loss" in logs:
            inner, tokens = self._inner_logs.collect()
            now, cpu = time.perf_counter(), time.process_time()
            logs = {
                **logs,
                **inner,
                "tokens_per_second": tokens / (now - self._last_log),
                "cpu_seconds": self._over_processes(cpu - self._last_cpu).sum().item(),
                "peak_memory_mib": self._over_processes(process_peak_memory(self.args.device)).max().item() / 2**20,
            }
            self._last_log, self._last_cpu = now, cpu
        super().log(logs, start_time)
        if "cpu_seconds" in logs:  # a run may go on on another machine
            self.state.log_history[-1]["processor"] = device_name(self.args.device)

    def _over_processes(self, value: float) -> torch.Tensor:
        """A number of every process, float32 [processes]: not every device has float64."""
        return self.accelerator.gather(torch.tensor([value], dtype=torch.float32, device=self.args.device))

    def evaluation_loop(self, dataloader, description: str, *others, metric_key_prefix: str = "eval", **named):
        """Trainer's loop with learning on; in evaluation, for a model that learns, once more with learning off.

        For a model that returns `token_nll` the loss is the mean over all labelled tokens, each row counted once
        however many processes there are.
        """
        started, cpu, name = time.perf_counter(), time.process_time(), f"{metric_key_prefix}_loss"
        learns = any(part.config.test_time_training for part in learning_models(self.model))
        self.evaluation_passes = 2 if learns and description == "Evaluation" else 1
        self._evaluated = _TokenMean(self.accelerator)
        output = super().evaluation_loop(dataloader, description, *others, metric_key_prefix=metric_key_prefix, **named)
        if name in output.metrics:
            output.metrics[name] = self._evaluated.mean(output.metrics[name])
            if self.evaluation_passes == 2:
                output.metrics[f"{name}_learning_off"] = self._loss_without_learning(
                    dataloader, name, metric_key_prefix
                )
                # For the speed in the metrics, which is that of both passes.
                output = output._replace(num_samples=2 * output.num_samples)
        self._evaluated = None
        self._leave_out(started, cpu)
        return output

    def _leave_out(self, started: float, cpu: float) -> None:
        """Take what was done since out of the times of training."""
        self._last_log += time.perf_counter() - started
        self._last_cpu += time.process_time() - cpu

    def _loss_without_learning(self, dataloader, name: str, prefix: str) -> float:
        self._learning_off, self._evaluated = True, _TokenMean(self.accelerator)
        metrics_function, self.compute_metrics = self.compute_metrics, None
        try:
            off = super().evaluation_loop(
                dataloader, "Evaluation, learning off", prediction_loss_only=True, metric_key_prefix=prefix
            )
        finally:
            self._learning_off, self.compute_metrics = False, metrics_function
        return self._evaluated.mean(off.metrics[name])

    def _get_dataloader(self, *others, is_training: bool = False, **named):
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training  # evaluation is on all rows
        try:
            return super()._get_dataloader(*others, is_training=is_training, **named)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _save_checkpoint(self, model: nn.Module, trial: dict | None) -> None:
        started, cpu = time.perf_counter(), time.process_time()
        super()._save_checkpoint(model, trial)
        self._leave_out(started, cpu)


def process_peak_memory(device: torch.device) -> int:
    """Bytes that this process has had at most: of the GPU's allocator, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _TokenMean:
    """Mean negative log-likelihood over the labelled tokens of all rows, over all processes."""

    def __init__(self, accelerator):
        self.accelerator, self.total, self.count = accelerator, 0.0, 0

    def add(self, token_nll: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Note a batch: `token_nll` [rows, length - 1], labels and mask [rows, length]."""
        labelled = labels[:, 1:] != NO_TARGET
        if mask is not None:
            labelled = labelled & mask[:, :-1].bool()
        sums = torch.stack([token_nll.double().sum(dim=1), labelled.sum(dim=1).double()], dim=1)
        total, count = self.accelerator.gather_for_metrics(sums).sum(dim=0).tolist()
        self.total, self.count = self.total + total, self.count + count

    def mean(self, otherwise: float) -> float:
        """The mean; `otherwise` where nothing was noted."""
        return self.total / self.count if self.count else otherwise


class _ShortProgress(ProgressCallback):
    """Shows the logs without one entry for every mini-batch; those go to the log itself and to `report_to`.

    The bar of an evaluation goes on over its passes, with learning on and off.
    """

    def __init__(self, trainer: MetaTrainer):
        super().__init__()
        self.trainer = trainer

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **named):
        if self.prediction_bar is None and state.is_world_process_zero and has_length(eval_dataloader):
            total = self.trainer.evaluation_passes * len(eval_dataloader)
            self.prediction_bar = tqdm(total=total, leave=self.training_bar is None, dynamic_ncols=True)
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **named)

    def on_log(self, args, state, control, logs=None, **named):
        shown = {name: value for name, value in (logs or {}).items() if "nll_mini_batch_" not in name}
        super().on_log(args, state, control, logs=shown, **named)


class _InnerWarmup(TrainerCallback):
    """Sets the inner learning rate of each outer step; also the last checks, once the model is wrapped."""

    def __init__(self, trainer: MetaTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **named):
        check_prepared(self.trainer.model_wrapped)
        check_saves_follow_logs(args, state.save_steps, state.logging_steps, state.eval_steps)
        parts = list(self.trainer.model.modules())
        if not any(is_reentrant(getattr(part, "_gradient_checkpointing_func", None)) for part in parts):
            # Trainer lets the embeddings' outputs take gradients, which only reentrant checkpointing needs: frozen
            # blocks before the first trained weight would keep a graph and be computed twice.
            for part in parts:
                if isinstance(part, PreTrainedModel):
                    part.disable_input_require_grads()
        self.trainer._last_log, self.trainer._last_cpu = time.perf_counter(), time.process_time()

    def on_step_begin(self, args, state, control, **named):
        for part in learning_models(self.trainer.model):
            part.inner_learning_rate_multiplier = inner_warmup_multiplier(
                state.global_step,
                part.config.inner_learning_rate,
                args.inner_lr_init,
                args.inner_warmup(state.max_steps),
            )

    def on_step_end(self, args, state, control, **named):
        # The last steps are logged even where they are fewer than `logging_steps`.
        if state.global_step >= state.max_steps and args.logging_strategy.value == "steps":
            control.should_log = True
