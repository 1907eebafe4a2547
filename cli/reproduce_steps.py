"""The steps behind `ttt-e2e reproduce`: train every row, measure, compare with the paper."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ttt_e2e.configuration import load_preset, load_systems, system_preset
from ttt_e2e.configuration.experiments import Experiment, Measured
from ttt_e2e.data.corpus import split_documents
from ttt_e2e.data.run_data import DataRequest, prepare_data
from ttt_e2e.data.sources import load_documents
from ttt_e2e.evaluation.experiment_report import TrainedRow, report_text
from ttt_e2e.evaluation.results import Point
from ttt_e2e.evaluation.runs import (
    Evaluation,
    EvaluationRequest,
    measure_missing,
    prepare_evaluation,
    write_comparison,
)
from ttt_e2e.evaluation.tasks import TASKS
from ttt_e2e.evaluation.verdicts import ClaimVerdict, judge_claims, seed_label
from ttt_e2e.evaluation.yardsticks import COMPRESSORS, measure_yardsticks
from ttt_e2e.storage.disk import write_text, written_whole

from .experiment_training import row_recipes, train_rows

VALIDATION = "validation.jsonl"


@dataclass(frozen=True)
class ExperimentRun:
    """What a run of an experiment found: its trained rows, all points, what it says to each claim, and the report."""

    rows: dict[str, TrainedRow]
    points: list[Point]
    verdicts: list[ClaimVerdict]
    report: str


def run_experiment(
    experiment: Experiment,
    folder: Path,
    models_folder: Path,
    cache: Path,
    console: Console,
    processes: int | None = None,
) -> ExperimentRun:
    """Train, measure and compare; what is there already is kept.

    Args:
        folder: of the measurements; models_folder: of the trained models, which experiments share where they train the
            same.
        processes: that train at once; None: as `train_rows` says.
    """
    console.print(f"[bold]{experiment.description}[/bold]", "Paper:", experiment.paper, sep="\n")
    folder.mkdir(parents=True, exist_ok=True)
    rows = train_rows(experiment, models_folder, cache, console, processes)
    held_out = write_held_out(experiment, folder, cache)
    points: list[Point] = []
    for number, measured in enumerate(experiment.measured):
        console.rule(f"Measuring: {measured.task}")
        request = evaluation_request(experiment, measured, rows, held_out, cache)
        request = dataclasses.replace(request, output=folder / f"{number}-{measured.task}")
        evaluation = prepare_evaluation(request)
        measure_missing(evaluation)
        if experiment.yardsticks is not None and evaluation.task.of_losses is not None:
            add_yardsticks(experiment, evaluation, rows[experiment.yardsticks.learning_off].tokens, cache)
        trainings = {seed_label(row, seed): row for row, of in rows.items() for seed in range(len(of.models))}
        for table in write_comparison(evaluation, COMPRESSORS, trainings)[0]:
            console.print(table.rich())
        points += evaluation.results.points
    verdicts = judge_claims(experiment, points)
    report = report_text(experiment, rows, points, verdicts)
    write_text(folder / "report.md", report)
    console.print(report)
    return ExperimentRun(rows, points, verdicts, report)


def add_yardsticks(experiment: Experiment, evaluation: Evaluation, tokens: int, cache: Path) -> None:
    """Measure n-gram models of as much training text as the meta-trained model read, and compressors."""
    assert experiment.yardsticks is not None
    row = next(row for row in experiment.rows.values() if not row.of)
    preset = system_preset(row.system, experiment.size)
    recipe = row_recipes(experiment, row, preset)[0]
    vocabulary_size = load_preset(preset)["vocab_size"]

    def training_tokens() -> np.ndarray:
        request = DataRequest(experiment.data, None, experiment.tokenizer or None, vocabulary_size, recipe.data, cache)
        rows: Any = prepare_data(request, check_tokenizer=lambda tokenizer: None).rows
        count = min(len(rows), -(-tokens // recipe.data.sequence_length))
        chosen = torch.linspace(0, len(rows) - 1, count).long().tolist()  # evenly spread, as shuffled rows are
        return np.concatenate([rows[number]["input_ids"].numpy() for number in chosen])

    measure_yardsticks(evaluation, experiment.yardsticks.n_grams, training_tokens, vocabulary_size)


def write_held_out(experiment: Experiment, folder: Path, cache: Path) -> Path:
    """The documents that no row was trained on, as a file."""
    path = folder / VALIDATION
    if not path.is_file():
        documents = load_documents(experiment.data, cache_folder=cache)
        _, held_out = split_documents(
            documents, experiment.validation_every, experiment.training_only, experiment.whole_folders
        )
        with written_whole(path) as temporary:
            held_out.select_columns(["text"]).to_json(temporary)
    return path


def evaluation_request(
    experiment: Experiment, measured: Measured, rows: dict[str, TrainedRow], held_out: Path, cache: Path
) -> EvaluationRequest:
    """What is to be measured, but for the folder to write to."""
    systems = load_systems()
    specs = {}
    for label, row in experiment.rows.items():
        learning = (systems[row.system].evaluation | row.evaluation).get("test_time_training")
        suffix = "" if learning is None else f"@learning-{'on' if learning else 'off'}"
        for seed, model in enumerate(rows[label].models):
            specs[seed_label(label, seed)] = f"{model}{suffix}"
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
