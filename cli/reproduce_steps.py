"""The steps behind `ttt-e2e reproduce`: train every row, measure, compare with the paper."""

import dataclasses
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Console

from ttt_e2e.configuration import Recipe, load_recipe, load_systems, system_preset
from ttt_e2e.configuration.experiments import Experiment, Measured, Number, Trained
from ttt_e2e.configuration.strict_yaml import merged
from ttt_e2e.data.corpus import split_documents
from ttt_e2e.data.sources import load_documents, source_state
from ttt_e2e.evaluation.results import Point
from ttt_e2e.evaluation.runs import EvaluationRequest, measure_missing, prepare_evaluation, write_comparison
from ttt_e2e.evaluation.tasks import TASKS
from ttt_e2e.storage.digests import digest
from ttt_e2e.storage.disk import write_text, written_whole
from ttt_e2e.storage.record import RECORD
from ttt_e2e.training.run import MODEL, TrainingRequest, finish_run, prepare_run

VALIDATION = "validation.jsonl"


def run_experiment(
    experiment: Experiment, folder: Path, models_folder: Path, cache: Path, console: Console
) -> list[tuple[str, bool]]:
    """Train, measure and compare; what is there already is kept.

    Args:
        folder: of the measurements; models_folder: of the trained models, which experiments share where they train the
            same.

    Returns:
        Each claim, and whether this run agrees with it.
    """
    console.print(f"[bold]{experiment.description}[/bold]", "Paper:", experiment.paper, sep="\n")
    folder.mkdir(parents=True, exist_ok=True)
    models = {}
    for label, row in experiment.rows.items():
        if not row.of:
            console.rule(f"Training: {label}")
            models[label] = train_row(experiment, row, models_folder, cache)
    models |= {label: models[row.of] for label, row in experiment.rows.items() if row.of}
    held_out = write_held_out(experiment, folder, cache)
    points = []
    for number, measured in enumerate(experiment.measured):
        console.rule(f"Measuring: {measured.task}")
        request = evaluation_request(experiment, measured, models, held_out, cache)
        request = dataclasses.replace(request, output=folder / f"{number}-{measured.task}")
        evaluation = prepare_evaluation(request)
        measure_missing(evaluation)
        for table in write_comparison(evaluation)[0]:
            console.print(table.rich())
        points += evaluation.results.points
    verdicts = [(claim.text, *verdict(claim.smaller, claim.larger, points)) for claim in experiment.claims]
    report = report_text(experiment, verdicts)
    write_text(folder / "report.md", report)
    console.print(report)
    return [(text, agrees) for text, agrees, _ in verdicts]


def train_row(experiment: Experiment, row: Trained, models_folder: Path, cache: Path) -> str:
    """The folder of a row's trained model, or its preset where nothing is trained.

    Each further recipe goes on from the model before.
    """
    preset = system_preset(row.system, experiment.size)
    model, recipes = preset, row_recipes(experiment, row, preset)
    identity: list[Any] = [preset, experiment.data, source_state(experiment.data)]
    for recipe in recipes:
        identity.append(dataclasses.asdict(recipe))
        run = models_folder / f"{preset}-{recipe.name}-{digest(identity)[:8]}"
        models_folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{run}.lock"):  # another experiment may be training the same model
            if not (run / MODEL).is_dir():
                resume = (run / RECORD).is_file()
                request = TrainingRequest(
                    model, recipe, experiment.data, run, cache, tokenizer=experiment.tokenizer or None, resume=resume
                )
                trainer = prepare_run(request)
                finish_run(trainer, trainer.last_whole_checkpoint() if resume else None)
        model = str(run / MODEL)
    return model


def row_recipes(experiment: Experiment, row: Trained, preset: str) -> list[Recipe]:
    """The recipes of a row, one after the other; what the row changes in the model is in the first one."""
    changes, recipes = merged(load_systems()[row.system].training, row.model), []
    for name in experiment.recipes:
        recipe = load_recipe(name, preset, row.overrides)
        data = dataclasses.replace(
            recipe.data, validation_every=experiment.validation_every, training_only=experiment.training_only
        )
        recipes.append(dataclasses.replace(recipe, model=merged(recipe.model, changes), data=data))
        changes = {}
    return recipes


def write_held_out(experiment: Experiment, folder: Path, cache: Path) -> Path:
    """The documents that no row was trained on, as a file."""
    path = folder / VALIDATION
    if not path.is_file():
        documents = load_documents(experiment.data, cache_folder=cache)
        _, held_out = split_documents(documents, experiment.validation_every, experiment.training_only)
        with written_whole(path) as temporary:
            held_out.select_columns(["text"]).to_json(temporary)
    return path


def evaluation_request(
    experiment: Experiment, measured: Measured, models: dict[str, str], held_out: Path, cache: Path
) -> EvaluationRequest:
    """What is to be measured, but for the folder to write to."""
    systems = load_systems()
    specs = {}
    for label, row in experiment.rows.items():
        learning = (systems[row.system].evaluation | row.evaluation).get("test_time_training")
        suffix = "" if learning is None else f"@learning-{'on' if learning else 'off'}"
        specs[label] = f"{models[label]}{suffix}"
    return EvaluationRequest(
        task=measured.task,
        models=[f"{label}={spec}" for label, spec in specs.items() if label != measured.judge],
        lengths=measured.lengths,
        output=held_out.parent,
        cache=cache,
        data=str(held_out) if TASKS[measured.task].needs_data else None,
        documents=measured.documents,
        baseline=experiment.baseline or None,
        judge=specs.get(measured.judge, measured.judge) or None,
        settings=[f"{name}={value}" for name, value in measured.settings.items()],
    )


def verdict(smaller: Number, larger: Number, points: list[Point]) -> tuple[bool, str]:
    """Whether two numbers are in the paper's order, and both in words."""
    low, high = measured_number(smaller, points), measured_number(larger, points)
    return low < high, f"{smaller.row} {_shown(low)}, {larger.row} {_shown(high)}"


def _shown(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def measured_number(number: Number, points: list[Point]) -> float:
    """The number that a claim speaks of."""
    found = next(
        point.numbers[number.name]
        for point in points
        if point.label == number.row and point.length == number.length and number.name in point.numbers
    )
    if isinstance(found, list):
        part = found[number.first : number.end or len(found)]
        return sum(part) / len(part)
    return found


def report_text(experiment: Experiment, verdicts: list[tuple[str, bool, str]]) -> str:
    """What the paper found, what this run found, and whether they agree, as Markdown."""
    lines = [f"# {experiment.description}", "", f"Paper: {experiment.paper.strip()}", ""]
    lines += ["| claim | this run | agrees with the paper |", "| --- | --- | --- |"]
    lines += [f"| {text} | {numbers} | {'yes' if agrees else '**no**'} |" for text, agrees, numbers in verdicts]
    return "\n".join(lines) + "\n"
