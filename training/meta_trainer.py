"""`MetaTrainer`: transformers' Trainer with what meta-training needs beside it.

The inner loop is the model's own: its loss is taken while it learns, and `loss.backward()` goes through the learning.
"""

import math
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from .arguments import MetaTrainingArguments, check_saves_follow_logs
from .checkpoints import (
    BASE_CONFIG,
    check_same_model,
    checkpoint_bytes,
    is_complete,
    last_complete_checkpoint,
    write_manifest,
)
from .disk import check_disk_space
from .guards import check_arguments, check_collator, check_prepared, learning_models
from .inner_logs import InnerLogs


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


class MetaTrainer(Trainer):
    """Trains a causal language model with test-time training; any other causal language model as a baseline, too.

    Beyond transformers' Trainer: the inner learning rate's warm-up; weight decay on all parameters; logs of the inner
    loop (`nll_mini_batch_I`, `inner_grad_norm`, `inner_steps_clipped`), `tokens_per_second` and `peak_memory_mib` (the
    most of any process: of the GPU's allocator, or resident memory); evaluation with learning on (`eval_loss`) and off
    (`eval_loss_learning_off`); checkpoints that are complete or not used; refusals of what would be silently wrong; and
    a stop before a gradient that is not finite reaches the weights.

    Args:
        model: a causal language model.
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
        self._inner_logs = InnerLogs()
        self._last_log = time.perf_counter()
        self._learning_off = False
        self.add_callback(_InnerWarmup(self))
        if self.pop_callback(ProgressCallback):
            self.add_callback(_ShortProgress)

    def train(self, resume_from_checkpoint: str | bool | None = None, *others, **named):
        """As transformers' Trainer; `resume_from_checkpoint=True` takes the last checkpoint that is complete.

        Raises:
            ValueError: there is nothing to resume from, the checkpoint is incomplete or of another model, or the output
                folder holds checkpoints of a run that is not resumed.
            OSError: the disk has no room for a checkpoint.
        """
        folder = self._checkpoint_to_resume(resume_from_checkpoint)
        if self.args.save_strategy.value != "no":
            self._check_disk_space("a checkpoint")
        try:
            return super().train(None if folder is None else str(folder), *others, **named)
        finally:
            for part in learning_models(self.model):
                part.inner_learning_rate_multiplier = 1.0

    def _checkpoint_to_resume(self, asked: str | bool | None) -> Path | None:
        output = Path(self.args.output_dir)
        own = bool(asked) and (asked is True or Path(asked).resolve().parent == output.resolve())
        other = last_complete_checkpoint(output)
        if not own and self.args.save_strategy.value != "no" and other is not None:
            raise ValueError(
                f"output_dir={self.args.output_dir!r} holds {other.name} of another run: "
                "resume it with resume_from_checkpoint=True, or choose another folder. Nothing was overwritten."
            )
        if not asked:
            return None
        folder = last_complete_checkpoint(output) if asked is True else Path(asked)
        if folder is None:
            raise ValueError(f"output_dir={self.args.output_dir!r} holds no complete checkpoint: start a new run.")
        if not is_complete(folder):
            raise ValueError(
                f"resume_from_checkpoint={asked!r}: the checkpoint is incomplete or damaged; give an earlier one, or "
                "True for the last complete one."
            )
        check_same_model(folder, self.model)
        return folder

    # ---------------------------------------------------------------------------------------- optimizer and loss

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All of them, norms and embeddings included, as in the papers."""
        return [name for name, _ in model.named_parameters()]

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
        if models and self._needs_no_logits(model):
            arguments["skip_logits"] = True
        if self._learning_off:
            arguments["test_time_training"] = False
        loss, outputs = super().compute_loss(
            model, arguments, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if model.training:
            self._inner_logs.add(outputs, inputs, models[0].config.inner_max_grad_norm or 0.0 if models else 0.0)
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
                "Go on from the last checkpoint with a lower learning_rate, a longer inner_lr_warmup_steps, or float32."
            )
        return norm

    # -------------------------------------------------------------------------------------------- logs, evaluation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the inner loop did since the last log to the logs of training."""
        if "loss" in logs:
            inner, tokens = self._inner_logs.collect()
            now = time.perf_counter()
            logs = {
                **logs,
                **inner,
                "tokens_per_second": tokens / (now - self._last_log),
                "peak_memory_mib": self._peak_memory() / 2**20,
            }
            self._last_log = now
        super().log(logs, start_time)

    def _peak_memory(self) -> int:
        if self.args.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:
            # Linux counts in KiB, macOS in bytes.
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return int(self.accelerator.gather(torch.tensor([peak], device=self.args.device)).max())

    def evaluation_loop(self, dataloader, description: str, *others, metric_key_prefix: str = "eval", **named):
        """Trainer's loop with learning on, then, for a model that learns, once more with learning off."""
        output = super().evaluation_loop(dataloader, description, *others, metric_key_prefix=metric_key_prefix, **named)
        name = f"{metric_key_prefix}_loss"
        learns = any(part.config.test_time_training for part in learning_models(self.model))
        if learns and name in output.metrics:
            with self._without_learning():
                off = super().evaluation_loop(
                    dataloader, f"{description}, learning off", *others, metric_key_prefix=metric_key_prefix, **named
                )
            output.metrics[f"{name}_learning_off"] = off.metrics[name]
        return output

    @contextmanager
    def _without_learning(self) -> Iterator[None]:
        self._learning_off = True
        try:
            yield
        finally:
            self._learning_off = False

    # ------------------------------------------------------------------------------------------------- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and hasattr(self.model, "peft_config"):
            # An adapter does not say under which settings of its model it was trained.
            folder = Path(output_dir or self.args.output_dir)
            self.model.config.to_json_file(folder / BASE_CONFIG, use_diff=False)

    def _save_checkpoint(self, model: nn.Module, trial: dict | None) -> None:
        run_folder = Path(self._get_output_dir(trial))
        folder = run_folder / f"checkpoint-{self.state.global_step}"
        self._check_disk_space(folder.name)
        if self.args.should_save:
            # What an interrupted run left of the same step must not mix with the files of this one.
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(folder)
            # Only now: until the new checkpoint is complete, an older one must not go.
            rotate_checkpoints(
                output_dir=str(run_folder),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _check_disk_space(self, what: str) -> None:
        """Every process stops where the one that saves has no room."""
        problem = [None]
        if self.args.should_save:
            try:
                check_disk_space(Path(self.args.output_dir), checkpoint_bytes(self.model), what)
            except OSError as error:
                problem = [str(error)]
        broadcast_object_list(problem)
        if problem[0] is not None:
            raise OSError(problem[0])


class _ShortProgress(ProgressCallback):
    """Shows the logs without one entry for every mini-batch; those go to the log itself and to `report_to`."""

    def on_log(self, args, state, control, logs=None, **named):
        shown = {name: value for name, value in (logs or {}).items() if "nll_mini_batch_" not in name}
        super().on_log(args, state, control, logs=shown, **named)


class _InnerWarmup(TrainerCallback):
    """Sets the inner learning rate of each outer step; also the last checks, once the model is wrapped."""

    def __init__(self, trainer: MetaTrainer):
        self.trainer = trainer
        self.warmup_steps = 0

    def on_train_begin(self, args, state, control, **named):
        check_prepared(self.trainer.model_wrapped)
        check_saves_follow_logs(args, state.save_steps, state.logging_steps, state.eval_steps)
        self.warmup_steps = args.inner_warmup(state.max_steps)
        self.trainer._last_log = time.perf_counter()

    def on_step_begin(self, args, state, control, **named):
        for part in learning_models(self.trainer.model):
            part.inner_learning_rate_multiplier = inner_warmup_multiplier(
                state.global_step, part.config.inner_learning_rate, args.inner_lr_init, self.warmup_steps
            )

    def on_step_end(self, args, state, control, **named):
        # The last steps are logged even where they are fewer than `logging_steps`.
        if state.global_step >= state.max_steps and args.logging_strategy.value == "steps":
            control.should_log = True
