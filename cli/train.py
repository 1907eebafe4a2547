"""`ttt-e2e train`: from text to a trained model, in one command."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .errors import refuse

if TYPE_CHECKING:
    from ttt_e2e.training.run import TrainingRequest


def train(
    model: Annotated[
        str,
        typer.Option(help="A preset (`ttt-e2e presets`), a YAML file with a configuration, or a saved model's folder."),
    ] = "tiny",
    recipe: Annotated[
        str | None, typer.Option(help="A recipe (`ttt-e2e presets`) or a YAML file. [default: pretrain-tiny or -8k]")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A text file, a folder, .jsonl or .parquet files, the name of a data set, or standard-library "
            "(Python's own sources)."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The run's folder, new or empty.", file_okay=False)] = None,
    validation_data: Annotated[str | None, typer.Option(help="As --data, for the validation loss.")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="A folder or an id of the Hub. [default: the saved model's, else one trained on the data]"),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Override a field of the recipe, as training.learning_rate=1e-3."
        ),
    ] = None,
    trained: Annotated[
        str,
        typer.Option(
            "--train",
            help="What is trained: all, or prime (the prime MLPs of a warm start alone: the result is a small folder "
            "that names the model below).",
        ),
    ] = "all",
    lora: Annotated[
        str | None, typer.Option(help="Train low-rank adapters only: all-linear, or prime (the inner weights').")
    ] = None,
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapters.", min=1)] = 16,
    lora_alpha: Annotated[float, typer.Option(help="Scale of the adapters, divided by their rank.")] = 32,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes, steps and an estimate of the memory, and stop.")
    ] = False,
    cache: options.Cache = options.DEFAULT_CACHE,
) -> None:
    """Meta-train a model: from scratch, from a saved one, or adapters on it.

    Try it (minutes, on a CPU): `ttt-e2e train --data standard-library --output runs/tiny`

    Several processes: `accelerate launch --multi_gpu --num_processes 2 -m ttt_e2e.cli.main train ...`, or with torchrun
    (also on a CPU, where Accelerate starts a single process without `--multi_gpu`). With the same command and
    `--resume` an interrupted run goes on exactly where its last checkpoint was taken. To extend a trained model to
    longer text: `ttt-e2e train --model runs/mine --recipe extend-32k ...`.

    Written to the folder: `model/` (load it with `AutoModelForCausalLM.from_pretrained`), `checkpoint-N/`,
    `training.png`, `training_log.json`, `run.json`.
    """
    from ttt_e2e.configuration import load_recipe
    from ttt_e2e.data.tokenizer import load_tokenizer
    from ttt_e2e.loading import find_model
    from ttt_e2e.training.estimates import estimate_run
    from ttt_e2e.training.lora import check_lora
    from ttt_e2e.training.run import Adapter, TrainingRequest
    from ttt_e2e.training.run_model import changed_config, fit_to_tokenizer

    try:
        source = find_model(model)
        chosen = load_recipe(recipe or default_recipe(source.name, source.folder), source.name, overrides or ())
        if lora is not None:
            check_lora(lora, lora_rank, lora_alpha)
        if dry_run:
            config = changed_config(source, chosen.model, chosen.data.sequence_length)
            if tokenizer is not None:
                config = fit_to_tokenizer(source, config, load_tokenizer(tokenizer), trained=False)
            adapter = None if lora is None else (lora, lora_rank)
            for line in estimate_run(config, chosen, int(os.environ.get("WORLD_SIZE", 1)), adapter, trained).lines():
                typer.echo(line)
            return
        request = TrainingRequest(
            model=model,
            recipe=chosen,
            data=required(data, "--data", "as in --data standard-library"),
            output=required(output, "--output", "as in --output runs/mine"),
            cache=cache,
            validation_data=validation_data,
            tokenizer=tokenizer,
            train=trained,
            adapter=Adapter(lora, lora_rank, lora_alpha) if lora else None,
            resume=resume,
        )
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        refuse(error)
    run(request)


def run(request: "TrainingRequest") -> None:
    """Train as requested, in a folder that no other process writes to meanwhile."""
    from transformers.utils import logging

    from ttt_e2e.training.checkpoints import checkpoint_step
    from ttt_e2e.training.run import finish_run, kept_folder, prepare_run, process_state

    recipe, output = request.recipe, request.output
    with ExitStack() as kept:
        try:
            if not process_state(recipe).is_main_process:
                logging.set_verbosity_error()
            kept.enter_context(kept_folder(request))
            trainer = prepare_run(request)
            checkpoint = trainer.last_whole_checkpoint() if request.resume else None
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            refuse(error)
        if trainer.is_world_process_zero():
            step = 0 if checkpoint is None else checkpoint_step(checkpoint)
            typer.echo(
                f"{f'Going on after step {step}' if request.resume else 'Training'}: "
                f"{trainer.model.num_parameters():,} parameters, {recipe.batch_size} rows of "
                f"{recipe.data.sequence_length} tokens in a step, {trainer.args.world_size} process(es)"
            )
        try:
            metrics = finish_run(trainer, checkpoint)
        except KeyboardInterrupt:
            typer.echo("Interrupted. The same command with --resume goes on from the last checkpoint.", err=True)
            raise typer.Exit(130) from None
        except OSError as error:  # a full disk, or data that is gone
            error.add_note("the same command with --resume goes on from the last checkpoint")
            refuse(error)
    if trainer.is_world_process_zero():
        for name, value in metrics.items():
            typer.echo(f"{name}: {value:.6g}")
        typer.echo(f"The model is in {output / 'model'}; look at {output / 'training.png'}.")


def default_recipe(name: str, folder: str | None) -> str:
    """The recipe of a new model; a saved one needs to be told what for."""
    if folder is not None:
        raise ValueError("--recipe: say what a saved model is trained for, as in --recipe extend-32k")
    return "pretrain-tiny" if name.startswith("tiny") else "pretrain-8k"


def required(value, option: str, example: str):
    """An option that only `--dry-run` does without."""
    if value is None:
        raise ValueError(f"{option} is missing: give it, {example}")
    return value
