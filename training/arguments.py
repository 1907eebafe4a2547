"""Arguments of the outer loop, with the papers' recipe as their defaults (arXiv 2512.23675, Table 3)."""

import difflib
import inspect
import math
from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

DEFAULT_FLOOR = 1e-5
# Which numbers fit, in words, and for which arguments. None, where an argument admits it, is left alone.
RANGES = (
    (
        lambda value: 0 <= value < math.inf,
        "finite and not negative",
        "learning_rate weight_decay adam_epsilon max_grad_norm warmup_steps inner_lr_init inner_lr_warmup_steps "
        "neftune_noise_alpha eval_delay dataloader_num_workers muon_learning_rate",
    ),
    (
        lambda value: 0 < value < math.inf,
        "finite and above 0",
        "num_train_epochs logging_steps save_steps eval_steps ddp_timeout ddp_bucket_cap_mb",
    ),
    (lambda value: 0 <= value < 1, "at least 0 and below 1", "adam_beta1 adam_beta2 label_smoothing_factor"),
    (
        lambda value: 1 <= value < math.inf,
        "at least 1",
        "save_total_limit per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
        "eval_accumulation_steps dataloader_prefetch_factor torch_empty_cache_steps",
    ),
    (lambda value: value == -1 or 1 <= value < math.inf, "at least 1, or -1 for whole epochs", "max_steps"),
    (lambda value: 0 <= value < 2**32, "at least 0 and below 2**32", "seed data_seed"),
)


@dataclass
class MetaTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with the papers' outer optimizer and the inner learning rate's warm-up.

    AdamW with betas 0.9 and 0.95, weight decay 0.1 on all parameters, gradients clipped to norm 1, a learning rate that
    rises linearly from 0 over the first tenth of the steps and falls along a cosine to 1e-5.

    Args:
        inner_lr_init: inner learning rate before the first outer step; `config.inner_learning_rate` is where it goes.
        inner_lr_warmup_steps: outer steps over which it goes there, linearly; below 1 a share of all steps, 0 for no
            warm-up. In outer step s, counted from 0, the inner learning rate is
            `init + (rate - init) * min(1, (s + 1) / warmup_steps)`; in evaluation it is `rate`.
        optimizer: "adamw" is the papers' (or what `optim` names); "muon" takes orthogonal steps for the matrices of
            linear layers, and AdamW's for all else (`training.muon`).
        muon_learning_rate: peak learning rate of these matrices; None for `learning_rate`.
        muon_excludes: regular expressions; a matrix whose name one of them fits is trained by AdamW.

    Raises:
        ValueError: a value is out of range, an argument belongs to another optimizer, or checkpoints would be saved
            between two logs (a resumed run could not repeat the log that the interrupted one had begun).
    """

    learning_rate: float = field(default=4e-4, metadata={"help": "Peak learning rate of the outer loop."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay, on all parameters."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Decay of AdamW's second moments."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of linear warm-up; below 1 a share of all."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "Schedule of the learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Outer steps between two logs."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Evaluation returns losses, never logits."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide losses that are not finite."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Search the graph for unused parameters, which is slow at second order."}
    )
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Leave out the last rows of an epoch that do not fill a batch."}
    )
    inner_lr_init: float = field(default=0.1, metadata={"help": "Inner learning rate at which its warm-up begins."})
    inner_lr_warmup_steps: float = field(
        default=0, metadata={"help": "Outer steps of the inner learning rate's warm-up; below 1 a share of all."}
    )

    optimizer: Literal["adamw", "muon"] = field(default="adamw", metadata={"help": "Outer optimizer."})
    muon_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the matrices that Muon trains."}
    )
    muon_excludes: list[str] = field(
        default_factory=list, metadata={"help": "Patterns of names of matrices that AdamW trains beside Muon."}
    )

    def __post_init__(self):
        self._check_ranges()  # before transformers computes with the numbers
        super().__post_init__()
        if self.data_seed is None:
            # Otherwise the order of rows would follow whatever was seeded last before training.
            self.data_seed = self.seed
        if self.lr_scheduler_type == "cosine_with_min_lr" and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {"min_lr": min(DEFAULT_FLOOR, self.learning_rate)}
        self._check_schedule()
        self._check_rates()
        self._check_optimizer()
        check_saves_follow_logs(self, self.save_steps, self.logging_steps, self.eval_steps)

    def inner_warmup(self, total_steps: int) -> int:
        """Outer steps of the inner learning rate's warm-up in a run of `total_steps`."""
        share = self.inner_lr_warmup_steps < 1
        return round(self.inner_lr_warmup_steps * total_steps) if share else int(self.inner_lr_warmup_steps)

    def _check_schedule(self) -> None:
        make = TYPE_TO_SCHEDULER_FUNCTION[self.lr_scheduler_type]
        known = inspect.signature(make).parameters  # type: ignore[arg-type]  # declared as no callable
        for name in self.lr_scheduler_kwargs or {}:
            if name not in known:
                similar = difflib.get_close_matches(name, known, n=1)
                raise ValueError(
                    f"lr_scheduler_kwargs: the schedule {str(self.lr_scheduler_type.value)!r} has no {name!r}"
                    + (f"; did you mean {similar[0]!r}?" if similar else f", but {', '.join(known)}")
                )

    def _check_optimizer(self) -> None:
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer={self.optimizer!r}: choose adamw or muon.")
        if self.optimizer == "adamw":
            for name in ("muon_learning_rate", "muon_excludes"):
                if getattr(self, name) not in (None, []):
                    raise ValueError(f"{name}={getattr(self, name)!r} needs optimizer='muon'; leave it out.")
        elif self.fsdp or self.deepspeed:
            raise ValueError(
                "optimizer='muon' needs whole matrices, but FSDP and DeepSpeed cut them: run one process per device "
                "with a whole model each (DDP), or use optimizer='adamw'."
            )

    def _check_ranges(self) -> None:
        for fits, words, names in RANGES:
            for name in names.split():
                value = getattr(self, name)
                if isinstance(value, int | float) and not fits(value):
                    raise ValueError(f"{name}={value}: must be {words}.")

    def _check_rates(self) -> None:
        floor = (self.lr_scheduler_kwargs or {}).get("min_lr")
        if floor is not None and not 0 <= floor < math.inf:
            raise ValueError(f"lr_scheduler_kwargs={self.lr_scheduler_kwargs}: min_lr must be finite and not negative.")
        if floor is not None and floor > self.learning_rate:
            raise ValueError(
                f"lr_scheduler_kwargs={self.lr_scheduler_kwargs}: the floor lies above learning_rate="
                f"{self.learning_rate}; lower it."
            )
        if self.inner_lr_warmup_steps >= 1 and self.inner_lr_warmup_steps != int(self.inner_lr_warmup_steps):
            raise ValueError(
                f"inner_lr_warmup_steps={self.inner_lr_warmup_steps}: give whole steps, or a share of all below 1."
            )


def check_saves_follow_logs(
    args: TrainingArguments, save_steps: float, logging_steps: float, eval_steps: float | None
) -> None:
    """Check that every checkpoint is saved at a step that is also logged.

    Losses are summed up between two logs, and a checkpoint does not hold such sums. Steps given as a share of all
    (below 1) are left to the call that knows the number of all steps.

    Raises:
        ValueError: naming the arguments, their values and the remedy.
    """
    saving, logging = str(args.save_strategy.value), str(args.logging_strategy.value)
    if "no" in (saving, logging) or (logging == "steps" and logging_steps == 1):
        return
    every = {"steps": save_steps, "best": eval_steps if args.eval_strategy.value == "steps" else None}.get(saving)
    name = "eval_steps" if saving == "best" else "save_steps"
    if logging == "epoch":
        fits = saving == "epoch" or (saving == "best" and args.eval_strategy.value == "epoch")
        remedy = 'set both strategies to "epoch", or both to "steps"'
    elif every is None:
        fits, remedy = False, f'set logging_steps=1, or save_strategy="steps" (logging_steps is {logging_steps:g})'
    elif every < 1 or logging_steps < 1:
        return
    else:
        fits = every % logging_steps == 0
        remedy = f"make {name}={every:g} a multiple of logging_steps={logging_steps:g}"
    if not fits:
        raise ValueError(
            f"save_strategy={saving!r} with logging_strategy={logging!r}: checkpoints would be saved between two logs, "
            f"and a resumed run could not repeat them; {remedy}."
        )
