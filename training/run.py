"""One training run from its request to a saved model: what `ttt-e2e train` does.

A run has a folder: `run.json` says what was asked for, `checkpoint-N/` are its checkpoints, and at the end `model/`
holds the model with its tokenizer, `training_log.json` the log, and `training.png` its picture.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedConfig, set_seed

from ..configuration import Recipe
from ..data.rows import collate_rows
from ..data.run_data import DataRequest, TrainingData, prepare_data
from ..loading import ModelSource, find_model, load_model
from ..storage.claims import RUN_LOCK, claimed_run
from ..storage.disk import check_disk_space, follow_umask, write_json, written_whole
from ..storage.record import MODEL, check_output, check_record, write_record
from .agreement import of_one_process
from .arguments import MetaTrainingArguments
from .checkpoints import compared_settings
from .lora import add_lora, check_lora
from .meta_trainer import MetaTrainer
from .pictures import plot_training
from .prime_trainer import ALL, TRAINED, PrimeTrainer, base_of
from .run_model import changed_config, fit_to_tokenizer

LOG, PICTURE = "training_log.json", "training.png"


@dataclass(frozen=True)
class Adapter:
    """Train low-rank adapters only: on which modules ("all-linear" or "prime"), of which rank and scale."""

    targets: str
    rank: int
    alpha: float


@dataclass(frozen=True)
class TrainingRequest:
    """What to train, on what, and where to write.

    Attributes:
        model: as `find_model` takes it.
        recipe: how.
        data: as `load_documents` takes it; validation_data: the same, or None.
        tokenizer: a folder or an id of the Hub; None for the saved model's own, or one trained on the data.
        output: the run's folder; cache: where prepared data is kept.
        train: "all" parameters, or the "prime" MLPs of a warm start alone.
        adapter: train adapters only; None for what `train` says.
        resume: go on with the run in the folder.
    """

    model: str
    recipe: Recipe
    data: str
    output: Path
    cache: Path
    validation_data: str | None = None
    tokenizer: str | None = None
    train: str = ALL
    adapter: Adapter | None = None
    resume: bool = False


@contextmanager
def kept_folder(request: TrainingRequest) -> Iterator[None]:
    """Keep the run's folder for this run, all its processes, until the end of the block.

    Raises:
        ValueError: another run is there, or is writing there.
    """
    state = process_state(request.recipe)
    check_output(request.output, request.resume, besides={RUN_LOCK})
    state.wait_for_everyone()  # each has looked before one makes the folder
    with ExitStack() as kept:
        of_one_process(state.is_main_process, lambda: kept.enter_context(claimed_run(request.output)))
        yield


def prepare_run(request: TrainingRequest) -> MetaTrainer:
    """Check a request and make all that training needs; called by every process of the run.

    Returns:
        The trainer, with its model, rows and tokenizer. The run's folder is there, with its record.

    Raises:
        ValueError, OSError: something does not fit; nothing is written to the run's folder then.
    """
    recipe = request.recipe
    state = process_state(recipe)
    source = find_model(request.model)
    config = changed_config(source, recipe.model, recipe.data.sequence_length)
    arguments = training_arguments(request, state.num_processes)
    check_output(request.output, request.resume, besides={RUN_LOCK})
    check_start(request, source)
    data = prepare_data(
        DataRequest(
            data=request.data,
            validation_data=request.validation_data,
            tokenizer=request.tokenizer or source.folder,
            vocabulary_size=config.vocab_size,
            recipe=recipe.data,
            cache=request.cache,
        ),
        check_tokenizer=lambda tokenizer: fit_to_tokenizer(source, config, tokenizer, trained=False),
    )
    trained = request.tokenizer is None and source.folder is None
    config = fit_to_tokenizer(source, config, data.tokenizer, trained)
    record = run_record(request, source, config, data)
    if request.resume:
        check_record(request.output, record)
    set_seed(arguments.seed)
    model = load_model(source, config, torch.float32)
    if request.adapter is not None:
        model = add_lora(model, request.adapter.targets, request.adapter.rank, request.adapter.alpha)
    trainer = (MetaTrainer if request.train == ALL else partial(PrimeTrainer, base=base_of(source.folder)))(
        model,
        arguments,
        train_dataset=data.rows,
        eval_dataset=data.validation,
        processing_class=data.tokenizer,
        data_collator=collate_rows,
    )
    kept = 1 + (arguments.save_total_limit or 1)
    check_disk_space(request.output, kept * trainer.checkpoint_bytes(), "room for checkpoints and the final model")
    state.wait_for_everyone()
    if state.is_main_process and not request.resume:
        asked = {"model": request.model, "data": request.data, "validation_data": request.validation_data}
        write_record(request.output, record, asked | {"tokenizer": request.tokenizer})
    return trainer


def process_state(recipe: Recipe) -> PartialState:
    """The processes of this run; on the CPU as well, where they are started by torchrun."""
    return PartialState(cpu=recipe.training.get("use_cpu", not torch.accelerator.is_available()))


def check_start(request: TrainingRequest, source: ModelSource) -> None:
    """Check that the model is one that the recipe and the adapter can start from.

    Raises:
        ValueError: a saved model is needed, or the adapter's settings are out of range.
    """
    if source.folder is None and request.recipe.starts_from_saved:
        raise ValueError(
            f"recipe={request.recipe.name!r} goes on with a saved model, but model={request.model!r} is a preset with "
            "random weights: name a folder"
        )
    if request.train not in TRAINED:
        raise ValueError(f"train={request.train!r}: choose one of {', '.join(TRAINED)}")
    if request.train != ALL and request.adapter is not None:
        raise ValueError(f"train={request.train!r} and an adapter: give one or the other")
    if request.train != ALL and source.folder is None:
        raise ValueError(
            f"train={request.train!r} trains what is new of a saved model, but {request.model!r} is a preset"
        )
    if request.train != ALL and not getattr(source.config, "use_prime_mlp", False):
        raise ValueError(
            f"train={request.train!r}: model={request.model!r} has no prime MLPs; train all of it, or convert a "
            "transformer with --prime"
        )
    if request.adapter is not None:
        if source.folder is None:
            raise ValueError(f"model={request.model!r}: adapters are trained on a saved model; name its folder")
        check_lora(request.adapter.targets, request.adapter.rank, request.adapter.alpha)


def last_evaluation(trainer: MetaTrainer) -> dict[str, float]:
    """Metrics after the last step, evaluated now unless they were then; empty without validation rows."""
    if trainer.eval_dataset is None:
        return {}
    for entry in reversed(trainer.state.log_history):
        if "eval_loss" in entry and entry["step"] == trainer.state.global_step:
            return {name: value for name, value in entry.items() if name.startswith("eval_")}
    return trainer.evaluate()


def finish_run(trainer: MetaTrainer, checkpoint: Path | None) -> dict[str, float]:
    """Train to the end, evaluate, and save the model, the log and its picture.

    Args:
        checkpoint: to go on from, as the trainer's `last_whole_checkpoint` gives it; None for the first step.

    Returns:
        The metrics of the last evaluation; empty without validation rows.
    """
    folder = Path(trainer.args.output_dir)
    trainer.train(None if checkpoint is None else str(checkpoint))
    metrics = last_evaluation(trainer)
    save_run(trainer, folder)
    return metrics


def training_arguments(request: TrainingRequest, processes: int) -> MetaTrainingArguments:
    """The trainer's arguments for a recipe, its batch spread over the processes and accumulation steps.

    Raises:
        ValueError: the batch cannot be spread evenly, or an argument is refused.
    """
    recipe = request.recipe
    # No logs to services that nobody named, and no memory pinned for a GPU that is not there.
    defaults = {
        "report_to": "none",
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }
    rows = recipe.rows_at_once(processes)
    defaults["per_device_eval_batch_size"] = rows
    fields = defaults | recipe.training | {"per_device_train_batch_size": rows}
    if request.validation_data is None and recipe.data.validation_every is None:
        fields["eval_strategy"] = "no"  # there is nothing to evaluate on
    fields["gradient_accumulation_steps"] = recipe.batch_size // (rows * processes)
    arguments = MetaTrainingArguments(output_dir=str(request.output), **fields)
    started = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    if started != recipe.batch_size:
        raise ValueError(
            f"batch_size={recipe.batch_size}, but {started} rows would be read per step: the devices of this machine "
            "are not one process each; start the run with torchrun or accelerate launch, or hide devices from it"
        )
    return arguments


def run_record(request: TrainingRequest, source: ModelSource, config: PreTrainedConfig, data: TrainingData) -> dict:
    """All that decides what a run computes, as plain values."""
    recipe = asdict(request.recipe)
    del recipe["description"]
    trained = {} if request.train == ALL else {"train": request.train}
    return trained | {
        "model": compared_settings(config),
        "start": source.folder,
        "recipe": recipe,
        "adapter": None if request.adapter is None else asdict(request.adapter),
        "data": data.identity,
    }


def save_run(trainer: MetaTrainer, folder: Path) -> None:
    """Save model and tokenizer, the log and its picture, each whole or not at all."""
    part = folder / f".{MODEL}.part"
    if trainer.args.should_save:
        shutil.rmtree(part, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(part))
    trainer.accelerator.wait_for_everyone()
    if not trainer.args.should_save:
        return
    follow_umask(part)
    (part / "training_args.bin").unlink(missing_ok=True)  # a pickle, of use to nobody who loads the model
    shutil.rmtree(folder / MODEL, ignore_errors=True)
    os.replace(part, folder / MODEL)
    write_json(folder / LOG, trainer.state.log_history)
    with written_whole(folder / PICTURE) as temporary:
        plot_training(trainer.state.log_history, temporary)
