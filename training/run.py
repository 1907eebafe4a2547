"""One training run from its request to a saved model: what `ttt-e2e train` does.

A run has a folder: `run.json` says what was asked for, `checkpoint-N/` are its checkpoints, and at the end `model/`
holds the model with its tokenizer, `training_log.json` the log, and `training.png` its picture.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, set_seed

from ..configuration import Recipe
from .arguments import MetaTrainingArguments
from .checkpoints import NOT_COMPARED, checkpoint_bytes, last_complete_checkpoint
from .corpus import split_documents
from .data import DocumentRows, PackedRows, PackedStream, collate_rows
from .disk import check_disk_space, write_text
from .lora import add_lora
from .meta_trainer import MetaTrainer
from .models import ModelSource, build_model, changed_config, find_model, fit_to_tokenizer
from .pictures import plot_training
from .sources import load_documents
from .token_store import tokenize_documents
from .tokenizer import load_tokenizer, tokenizer_digest, trained_tokenizer

RECORD, LOG, PICTURE, MODEL = "run.json", "training_log.json", "training.png", "model"


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
        adapter: train adapters only; None for all parameters.
        resume: go on with the run in the folder.
    """

    model: str
    recipe: Recipe
    data: str
    output: Path
    cache: Path
    validation_data: str | None = None
    tokenizer: str | None = None
    adapter: Adapter | None = None
    resume: bool = False


@dataclass(frozen=True)
class TrainingData:
    """Rows for training and validation (None: there is none), their tokenizer, and what identifies them."""

    rows: Dataset
    validation: Dataset | None
    tokenizer: PreTrainedTokenizerBase
    tokenizer_is_trained: bool
    identity: dict


def prepare_run(request: TrainingRequest) -> MetaTrainer:
    """Check a request and make all that training needs; called by every process of the run.

    Returns:
        The trainer, with its model, rows and tokenizer. The run's folder is there, with its record.

    Raises:
        ValueError, OSError: something does not fit; nothing is written to the run's folder then.
    """
    state = PartialState()
    source = find_model(request.model)
    if request.adapter is not None and source.folder is None:
        raise ValueError(f"model={request.model!r}: adapters are trained on a saved model; name its folder")
    config = changed_config(source, request.recipe.model, request.recipe.data.sequence_length)
    arguments = training_arguments(request, state.num_processes)
    check_output(request.output, request.resume)
    data = prepare_data(request, source, config.vocab_size)
    config = fit_to_tokenizer(source, config, data.tokenizer, data.tokenizer_is_trained)
    record = run_record(request, config, data)
    if request.resume:
        check_record(request.output, record)
    set_seed(arguments.seed)
    model = build_model(source, config)
    if request.adapter is not None:
        model = add_lora(model, request.adapter.targets, request.adapter.rank, request.adapter.alpha)
    trainer = MetaTrainer(
        model,
        arguments,
        train_dataset=data.rows,
        eval_dataset=data.validation,
        processing_class=data.tokenizer,
        data_collator=collate_rows,
    )
    if arguments.should_save:
        check_disk_space(request.output, 2 * checkpoint_bytes(model), "a checkpoint and the final model")
    state.wait_for_everyone()
    if state.is_main_process and not request.resume:
        write_text(request.output / RECORD, json.dumps(record, indent=1) + "\n")
    return trainer


def finish_run(trainer: MetaTrainer, resume: bool) -> dict[str, float]:
    """Train to the end, evaluate, and save the model, the log and its picture.

    Args:
        resume: from the run's last complete checkpoint; from the first step where it was interrupted before any.

    Returns:
        The metrics of the last evaluation; empty without validation rows.
    """
    folder = Path(trainer.args.output_dir)
    last = last_complete_checkpoint(folder) if resume else None
    trainer.train(str(last) if last else None)
    metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
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
    fields = defaults | recipe.training | {"per_device_train_batch_size": rows}
    if request.validation_data is None and recipe.data.validation_every is None:
        fields["eval_strategy"] = "no"  # there is nothing to evaluate on
    fields["gradient_accumulation_steps"] = recipe.batch_size // (rows * processes)
    return MetaTrainingArguments(output_dir=str(request.output), **fields)


def check_output(folder: Path, resume: bool) -> None:
    """Check the run's folder: empty for a new run, with a record for one that is resumed.

    Raises:
        ValueError: it is not.
    """
    if resume and not (folder / RECORD).is_file():
        raise ValueError(f"output={str(folder)!r} holds no run to resume (no {RECORD}): start one without --resume")
    if not resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "another run" if (folder / RECORD).is_file() else "other files"
        raise ValueError(
            f"output={str(folder)!r} holds {what}: choose another folder, or go on with the run there with --resume. "
            "Nothing was overwritten."
        )


def prepare_data(request: TrainingRequest, source: ModelSource, vocabulary_size: int) -> TrainingData:
    """Documents, tokenizer and rows of a run; from the cache what is there already.

    Raises:
        ValueError, OSError: there is too little data, it cannot be read, or the recipe asks for what it has not.
    """
    settings = request.recipe.data
    if settings.streaming and settings.validation_every is not None:
        raise ValueError(
            "data.validation_every cannot split data.streaming documents: set it to null, and give --validation-data"
        )

    def load(name: str, streaming: bool):
        return load_documents(
            name,
            cache_folder=request.cache,
            text_column=settings.text_column,
            split=settings.split if name == request.data else "train",
            configuration=settings.configuration if name == request.data else None,
            streaming=streaming,
        )

    documents, held_out = load(request.data, settings.streaming), None
    if request.validation_data is not None:
        held_out = load(request.validation_data, False)
    elif settings.validation_every is not None:
        documents, held_out = split_documents(documents, settings.validation_every)
    named = request.tokenizer or source.folder
    if named is None and settings.streaming:
        raise ValueError("tokenizer: one cannot be trained on data.streaming documents; name one with --tokenizer")
    tokenizer = load_tokenizer(named) if named else trained_tokenizer(documents, vocabulary_size, request.cache)
    rows_of = DocumentRows if settings.one_document_per_row else PackedRows
    identity = {"tokenizer": tokenizer_digest(tokenizer)}
    if settings.streaming:
        rows = PackedStream(documents, tokenizer, settings.sequence_length)
    else:
        store = tokenize_documents(documents, tokenizer, request.cache)
        rows, identity["data"] = rows_of(store, settings.sequence_length), store.folder.name
    validation = None
    if held_out is not None:
        store = tokenize_documents(held_out, tokenizer, request.cache)
        validation, identity["validation"] = rows_of(store, settings.sequence_length), store.folder.name
        if settings.validation_rows is not None:
            validation = Subset(validation, range(min(settings.validation_rows, len(validation))))
    return TrainingData(rows, validation, tokenizer, named is None, identity)


def run_record(request: TrainingRequest, config: PreTrainedConfig, data: TrainingData) -> dict:
    """All that decides what a run computes, as plain values."""
    settings = json.loads(config.to_json_string(use_diff=False))
    return {
        "model": {"source": request.model, **{k: v for k, v in settings.items() if k not in NOT_COMPARED}},
        "recipe": asdict(request.recipe),
        "adapter": None if request.adapter is None else asdict(request.adapter),
        "data": {"source": request.data, "validation_source": request.validation_data, **data.identity},
    }


def check_record(folder: Path, record: dict) -> None:
    """Check that a run is resumed as it was begun.

    Raises:
        ValueError: naming the first difference.
    """
    begun = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    now = json.loads(json.dumps(record))
    difference = first_difference(begun, now)
    if difference is not None:
        name, before, after = difference
        raise ValueError(
            f"output={str(folder)!r}: its run was begun with {name}={before!r}, but now it is {after!r}. Resume it as "
            "it was begun, or start a new run in another folder. Nothing was overwritten."
        )


def first_difference(one: dict, other: dict, above: str = "") -> tuple[str, object, object] | None:
    """Where two nested mappings differ first: the dotted name and both values, None for a missing one."""
    for name in sorted(one.keys() | other.keys()):
        before, after = one.get(name), other.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found = first_difference(before, after, f"{above}{name}.")
            if found is not None:
                return found
        elif before != after:
            return f"{above}{name}", before, after
    return None


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
    (part / "training_args.bin").unlink(missing_ok=True)  # a pickle, of use to nobody who loads the model
    shutil.rmtree(folder / MODEL, ignore_errors=True)
    os.replace(part, folder / MODEL)
    write_text(folder / LOG, json.dumps(trainer.state.log_history, indent=1) + "\n")
    temporary = folder / f".{PICTURE}.part"
    plot_training(trainer.state.log_history, temporary)
    os.replace(temporary, folder / PICTURE)
