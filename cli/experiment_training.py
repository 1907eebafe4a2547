"""Training the rows of an experiment, several at once where the machine has room."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ttt_e2e.configuration import Recipe, load_recipe, load_systems, system_preset
from ttt_e2e.configuration.experiments import Experiment, Trained
from ttt_e2e.configuration.strict_yaml import merged
from ttt_e2e.data.sources import source_state
from ttt_e2e.evaluation.experiment_report import UNKNOWN_PROCESSOR, TrainedRow
from ttt_e2e.storage.digests import digest
from ttt_e2e.storage.disk import read_json
from ttt_e2e.storage.record import RECORD
from ttt_e2e.training.run import LOG, MODEL, TrainingRequest, finish_run, prepare_run

WORKERS_LOG = "training.log"

_steps_done: Any = None  # in a process that trains for another one: its count of outer steps


def train_rows(
    experiment: Experiment, models_folder: Path, cache: Path, console: Console, processes: int | None
) -> dict[str, TrainedRow]:
    """Train what an experiment compares, or find what is trained already.

    Args:
        processes: that train at once, each one row with a share of the machine's threads; what they print goes to
            `training.log` in the models' folder then. None: two on a CPU of several cores, otherwise one.

    Returns:
        By label, also of rows that are evaluated of another one.
    """
    wanted = [(label, seed) for label, row in experiment.rows.items() if not row.of for seed in range(row.seeds)]
    models_folder.mkdir(parents=True, exist_ok=True)
    if processes is None:
        processes = 1 if torch.accelerator.is_available() else min(2, os.cpu_count() or 1)
    if processes > 1 and len(wanted) > 1:
        found = _train_at_once(experiment, wanted, models_folder, cache, processes)
    else:
        found = {}
        for label, seed in wanted:
            console.rule(f"Training: {label}" + (f", seed {seed}" if seed else ""))
            found[label, seed] = train_seed(experiment, experiment.rows[label], seed, models_folder, cache)
    rows = {}
    for label, row in experiment.rows.items():
        seeds = [found[row.of or label, seed] for seed in range(experiment.rows[row.of or label].seeds)]
        models, took = zip(*seeds, strict=True)
        whole = Taken.together(took)
        seconds = whole.cpu_seconds / len(seeds) if whole.processors else None
        rows[label] = TrainedRow(list(models), took[0].tokens, seconds, whole.processors)
    return rows


def _train_at_once(
    experiment: Experiment, wanted: Sequence[tuple[str, int]], models_folder: Path, cache: Path, processes: int
) -> dict[tuple[str, int], tuple[str, "Taken"]]:
    context = get_context("spawn")
    steps, threads = context.Value("q", 0), max(1, torch.get_num_threads() // processes)
    todo = {key: _steps_to_do(experiment, experiment.rows[key[0]], key[1], models_folder) for key in wanted}
    started = (models_folder / WORKERS_LOG, steps, threads)
    with (
        ProcessPoolExecutor(processes, mp_context=context, initializer=_begin_to_train, initargs=started) as pool,
        tqdm(total=sum(todo.values()), desc=f"Training {len(wanted)} models", unit=" steps") as progress,
    ):
        futures = {
            key: pool.submit(train_seed, experiment, experiment.rows[key[0]], key[1], models_folder, cache)
            for key in sorted(wanted, key=lambda key: -todo[key])  # the longest first: no process waits at the end
        }
        waiting = set(futures.values())
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=1)
                progress.update(steps.value - progress.n)
                for future in done:
                    future.result()  # raises what went wrong there
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return {key: future.result() for key, future in futures.items()}


def _begin_to_train(log: Path, steps: Any, threads: int) -> None:
    """Let a process that only trains count its steps, and write what it prints to a file."""
    global _steps_done
    _steps_done = steps
    torch.set_num_threads(threads)
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(written, stream)


class _StepCounter(TrainerCallback):
    def __init__(self, steps: Any):
        self.steps = steps

    def on_step_end(self, args, state, control, **named):
        with self.steps.get_lock():
            self.steps.value += 1


def _steps_to_do(experiment: Experiment, row: Trained, seed: int, models_folder: Path) -> int:
    """Outer steps of the recipes of a row that were not trained to their end."""
    runs = _runs_to_do(list(row_runs(experiment, row, seed, models_folder)))
    return sum(max(0, recipe.training.get("max_steps", 0)) for recipe, _ in runs)


def _runs_to_do(runs: Sequence[tuple[Recipe, Path]]) -> Sequence[tuple[Recipe, Path]]:
    """Those behind the last one whose model is there: what it went on from is needed no more, but for its log."""
    done = max((number for number, (_, run) in enumerate(runs, 1) if (run / MODEL).is_dir()), default=0)
    return runs[done:]


@dataclasses.dataclass(frozen=True)
class Taken:
    """What training took.

    Attributes:
        tokens: that were read.
        cpu_seconds: of all processes.
        processors: where; empty where nothing is trained.
    """

    tokens: int
    cpu_seconds: float
    processors: frozenset[str]

    @classmethod
    def together(cls, parts: Sequence["Taken"]) -> "Taken":
        """What several trainings took."""
        processors: frozenset[str] = frozenset().union(*(part.processors for part in parts))
        return cls(sum(part.tokens for part in parts), sum(part.cpu_seconds for part in parts), processors)


def train_seed(experiment: Experiment, row: Trained, seed: int, models_folder: Path, cache: Path) -> tuple[str, Taken]:
    """Train a row once, unless that was done; each further recipe goes on from the model before.

    Returns:
        The folder of the model, or its preset where nothing is trained; what all recipes took.
    """
    model, runs = system_preset(row.system, experiment.size), list(row_runs(experiment, row, seed, models_folder))
    todo = _runs_to_do(runs)
    if len(todo) < len(runs):
        model = str(runs[-1 - len(todo)][1] / MODEL)
    for recipe, run in todo:
        train_recipe(experiment, model, recipe, run, cache)
        model = str(run / MODEL)
    return model, Taken.together([what_it_took(recipe, run) for recipe, run in runs])


def train_recipe(experiment: Experiment, model: str, recipe: Recipe, run: Path, cache: Path) -> None:
    """Train a model by one recipe, unless that was done.

    Args:
        model: a preset, or the folder of a model.
        run: where, as `run_folder` names it.
    """
    run.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{run}.lock"):  # another experiment may be training the same model
        if not (run / MODEL).is_dir():
            resume = (run / RECORD).is_file()
            request = TrainingRequest(
                model, recipe, experiment.data, run, cache, tokenizer=experiment.tokenizer or None, resume=resume
            )
            trainer = prepare_run(request)
            if _steps_done is not None:
                trainer.add_callback(_StepCounter(_steps_done))
            finish_run(trainer, trainer.last_whole_checkpoint() if resume else None)


def what_it_took(recipe: Recipe, run: Path) -> Taken:
    """What a finished run took."""
    log = read_log(run)
    tokens = max(entry["step"] for entry in log) * recipe.batch_size * recipe.data.sequence_length
    timed = [entry for entry in log if "cpu_seconds" in entry]
    processors = frozenset(entry.get("processor", UNKNOWN_PROCESSOR) for entry in timed)
    return Taken(tokens, sum(entry["cpu_seconds"] for entry in timed), processors)


def read_log(run: Path) -> list[dict]:
    """The log of a finished run."""
    return read_json(run / LOG, remedy="remove the folder, to train again")


def row_runs(experiment: Experiment, row: Trained, seed: int, models_folder: Path) -> Iterator[tuple[Recipe, Path]]:
    """The recipes of a row, one after the other, and the folder of each one's run."""
    preset = system_preset(row.system, experiment.size)
    return runs_of(experiment, preset, row_recipes(experiment, row, preset, seed), models_folder)


def runs_of(
    experiment: Experiment, preset: str, recipes: Sequence[Recipe], models_folder: Path
) -> Iterator[tuple[Recipe, Path]]:
    """Recipes, each of which goes on from the one before, and the folder of each one's run."""
    before: list[dict] = []
    for recipe in recipes:
        yield recipe, run_folder(experiment, preset, recipe, before, models_folder)
        before.append(deciding_fields(recipe))


def run_folder(experiment: Experiment, preset: str, recipe: Recipe, before: Sequence[Any], models_folder: Path) -> Path:
    """Where a model is trained: named by all that decides what comes out."""
    identity = [preset, experiment.data, source_state(experiment.data), *before, deciding_fields(recipe)]
    return models_folder / f"{preset}-{recipe.name}-{digest(identity)[:8]}"


def deciding_fields(recipe: Any) -> dict:
    """What decides a training: the fields of a recipe that are not at their defaults, without what is only told.

    A field that a later version adds changes nothing as long as it has its default.
    """
    found = {}
    for each in dataclasses.fields(recipe):
        value = getattr(recipe, each.name)
        default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
        if each.name != "description" and value != default:
            found[each.name] = deciding_fields(value) if dataclasses.is_dataclass(value) else value
    return found


def row_recipes(experiment: Experiment, row: Trained, preset: str, seed: int = 0) -> list[Recipe]:
    """The recipes of a row, one after the other; what is the row's own is in the first one."""
    changes, recipes = merged(load_systems()[row.system].training, row.model), []
    before, after = experiment.overrides, row.overrides
    seeded = [f"training.seed={seed}"] if seed else []
    for name in experiment.system_recipes(row.system):
        suited = experiment.by_recipe.get(name, {}).get(row.system, ())
        recipe = load_recipe(name, preset, [*before, *suited, *after, *seeded])
        data = dataclasses.replace(
            recipe.data,
            validation_every=experiment.validation_every,
            training_only=experiment.training_only,
            whole_folders=experiment.whole_folders,
        )
        recipes.append(dataclasses.replace(recipe, model=merged(recipe.model, changes), data=data))
        changes, before, after = {}, [], []
    return recipes
