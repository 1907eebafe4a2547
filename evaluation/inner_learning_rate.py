"""The inner learning rate of a model, chosen by measurement: a sweep over a grid, against learning off.

The step that suits a meta-learned model harms one that was not trained for it, so that a warm start has to find its
own. The sweep's folder holds `results.jsonl` (the points, as `ResultsFile` keeps them; a point that is there is not
measured again), `results.md`, `results.png`, `results.svg` and `best.json`.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm
from transformers import AutoConfig

from ..conversion.prime_weights import PRIME_CONFIG
from ..data.tokenizer import tokenizer_digest
from ..loading import check_saved, weight_files
from ..storage.claims import claimed
from ..storage.digests import digest, file_digest
from ..storage.disk import read_json, write_json, write_text
from ..training.checkpoints import MANIFEST
from .candidates import Candidate, find_candidate, load_candidate, with_tokenizer
from .comparison import difference_to, measured, standard_errors
from .plots import Panel, plot_panels
from .results import Point, ResultsFile, environment
from .runs import RESULTS, EvaluationRequest, Measurement, check_numbers, open_results, read_data
from .subject import Subject
from .tables import Table
from .tasks import TASKS, TaskData

SWEEP = dataclasses.replace(TASKS["context-length"], name="inner-learning-rate")
LOSS = SWEEP.quantities[0]
LEARNING_OFF, BEST = "learning off", "best.json"
DEFAULT_GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
DEFAULT_MINI_BATCHES = 8  # of a document, where no length is given
# A difference of fewer standard errors may be chance.
CERTAIN = 2.0


@dataclass(frozen=True, kw_only=True)
class SweepRequest(Measurement):
    """What to sweep over.

    Attributes:
        model: a saved model's folder, that of a run or of one of its checkpoints, or an id of the Hub.
        learning_rates: 0 among them is learning off, which is always measured.
        mini_batch_sizes: to combine with each learning rate (default: the model's own).
        length: tokens of each document (default: 8 of the largest mini-batches).
        write: write the best into the model's configuration.
    """

    model: str
    learning_rates: Sequence[float] = DEFAULT_GRID
    mini_batch_sizes: Sequence[int] = ()
    length: int | None = None
    write: bool = False


@dataclass(frozen=True)
class Setting:
    """One point of the grid; both None for learning off."""

    learning_rate: float | None = None
    mini_batch_size: int | None = None

    @property
    def label(self) -> str:
        """Of its point."""
        if self.learning_rate is None:
            return LEARNING_OFF
        return f"{self.learning_rate:g}, mini-batch {self.mini_batch_size}"


@dataclass(frozen=True)
class Sweep:
    """A request that has been checked, with its data and the points that are there already."""

    request: SweepRequest
    candidate: Candidate
    grid: list[Setting]
    length: int
    data: TaskData
    identity: dict[str, str]
    results: ResultsFile


@dataclass(frozen=True)
class Verdict:
    """What a sweep says.

    Attributes:
        best: the setting with the lowest loss of all that learn.
        loss: under it; reference: with learning off; both in nats per token.
        standard_error: of their difference over documents; None for a single document.
        at_the_end: which end of the measured learning rates the best one is, "lowest" or "highest", or None.
    """

    best: Setting
    loss: float
    reference: float
    standard_error: float | None
    at_the_end: str | None

    @property
    def helps(self) -> bool:
        """Whether the best setting is better than learning off."""
        return self.loss < self.reference

    def lines(self) -> list[str]:
        """In words."""
        error = "" if self.standard_error is None else f" ± {self.standard_error:.4f}"
        change = f"{self.loss - self.reference:+.4f}{error} nats per token against learning off"
        if not self.helps:
            return [
                f"No inner learning rate of the grid helps: the best, {self.best.label}, gives {change}. Use the model "
                "with learning off, or meta-train it (ttt-e2e train --recipe warm-start)."
            ]
        lines = [f"Best inner learning rate: {self.best.label} ({change})."]
        if self.standard_error is not None and self.reference - self.loss < CERTAIN * self.standard_error:
            lines.append("The difference is within the noise: measure more documents.")
        if self.at_the_end is not None:
            lines.append(f"It is the {self.at_the_end} of the grid: measure beyond it as well.")
        return lines


def prepare_sweep(request: SweepRequest) -> Sweep:
    """Check a request and read its data. Nothing is written to the output's folder.

    Raises:
        ValueError, OSError: something does not fit.
    """
    candidate = find_candidate(request.model, None, needs_tokenizer=False)
    if candidate.learning is not None:
        raise ValueError(f"model={request.model!r}: leave the suffix out; learning on and off are both measured")
    check_model(candidate, request.write)
    grid = sweep_grid(candidate, request.learning_rates, request.mini_batch_sizes)
    candidate = with_tokenizer(candidate, request.tokenizer)
    largest = max(setting.mini_batch_size for setting in grid[1:])
    length = DEFAULT_MINI_BATCHES * largest if request.length is None else request.length
    if length < largest + 2:
        raise ValueError(
            f"length={length}: no token would be predicted after an inner step, because a mini-batch has {largest} "
            f"tokens; give at least {largest + 2}, better several mini-batches"
        )
    shared = {field.name: getattr(request, field.name) for field in dataclasses.fields(Measurement)}
    evaluation = EvaluationRequest(task=SWEEP.name, models=[request.model], lengths=[length], **shared)
    check_numbers(evaluation, SWEEP)
    results = open_results(request.output, SWEEP)
    data, data_digest = read_data(evaluation, SWEEP, [candidate])
    settings = {"dtype": request.dtype}
    identity = {"model": model_digest(candidate), "data": data_digest, "settings": digest(settings)}
    models = {setting.label: identity["model"] for setting in grid}
    results.check(SWEEP.name, settings, data_digest, models, None)
    return Sweep(request, candidate, grid, length, data, identity, results)


def measure_sweep(sweep: Sweep) -> int:
    """Measure the points that are not there yet, each written as soon as it is there.

    Returns:
        How many were measured.
    """
    missing = [setting for setting in sweep.grid if not sweep.results.has(setting.label, sweep.length)]
    if not missing:
        return 0
    done = len(sweep.grid) - len(missing)
    with sweep.results, tqdm(total=len(sweep.grid), initial=done, desc=SWEEP.name, unit=" points") as progress:
        subject = load_candidate(sweep.candidate, sweep.request.dtype)
        for setting in missing:
            sweep.results.append(_measure(sweep, subject, setting))
            progress.update()
    return len(missing)


def write_sweep(sweep: Sweep) -> tuple[Verdict, Table, list[Path]]:
    """Write table, picture and verdict of all points in the results' file; with `write` also the model's settings.

    Returns:
        The verdict, the table, and the files that were written, the model's configuration among them.

    Raises:
        ValueError: no point of the sweep is finite.
    """
    request, points = sweep.request, sweep.results.points
    verdict, table = judge(points), sweep_table(points)
    write_text(request.output / f"{RESULTS}.md", f"{table.title}\n\n{table.markdown()}")
    files = [request.output / f"{RESULTS}.md", *plot_panels([sweep_panels(points)], request.output / RESULTS)]
    report = dataclasses.asdict(verdict) | {"helps": verdict.helps, "written": request.write and verdict.helps}
    write_json(request.output / BEST, report)
    files.append(request.output / BEST)
    if report["written"]:
        files.append(write_settings(Path(sweep.candidate.folder), verdict.best))
    return verdict, table, files


def check_model(source: Candidate, write: bool) -> None:
    """Check that a model can learn, has weights and, to be written to, is a folder that no run goes on from.

    Raises:
        ValueError: it does not.
    """
    check_saved(source)
    if not hasattr(source.config_class, "check_can_learn"):
        raise ValueError(
            f"model={source.folder!r}: a {source.config_class.model_type} model has no inner learning rate; make a "
            "TTT-E2E model of it with ttt-e2e convert transformer"
        )
    if not write:
        return
    folder = Path(source.folder)
    if not folder.is_dir():
        raise ValueError(f"--write: {source.folder!r} is on the Hub; download it, or leave --write out")
    if (folder / MANIFEST).is_file():
        raise ValueError(
            f"--write: {folder} is a checkpoint of a run, which could not be resumed from it afterwards; leave --write "
            "out, and give the value to a new run, as in --set model.inner_learning_rate=0.1"
        )
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--write: {folder} cannot be written to; copy the model, or leave --write out")


def sweep_grid(source: Candidate, learning_rates: Sequence[float], mini_batch_sizes: Sequence[int]) -> list[Setting]:
    """Learning off, then every learning rate under every mini-batch size, in order.

    Raises:
        ValueError: a value is out of range or does not fit the model, or there is none besides 0.
    """
    for rate in learning_rates:
        if not 0 <= rate < math.inf:
            raise ValueError(f"learning_rates: {rate} must be finite and not negative")
    rates = sorted({float(rate) for rate in learning_rates if rate})
    if not rates:
        raise ValueError("learning_rates: give at least one besides 0, as in 0.01,0.1,1")
    sizes = sorted(set(mini_batch_sizes)) or [source.fields["mini_batch_size"]]
    for size in sizes:
        changed = source.fields | {"mini_batch_size": size}
        source.config_class.from_dict(changed).check_can_learn()
    return [Setting(), *(Setting(rate, size) for size in sizes for rate in rates)]


def model_digest(candidate: Candidate) -> str:
    """SHA-256 of all that decides the numbers, but what is swept: a sweep goes on after its result was written."""
    folder = Path(candidate.folder)
    if folder.is_dir():
        weights = [file_digest(path) for path in weight_files(folder)]
    else:  # on the Hub, where a commit names the contents
        weights = [candidate.folder, AutoConfig.from_pretrained(candidate.folder)._commit_hash]
    swept = ("inner_learning_rate", "mini_batch_size", "_name_or_path")
    fields = {name: value for name, value in candidate.fields.items() if name not in swept}
    return digest([weights, fields, tokenizer_digest(candidate.tokenizer)])


def judge(points: Sequence[Point]) -> Verdict:
    """The best of all points.

    Raises:
        ValueError: none that learns has a finite loss, or learning off has none.
    """
    losses = {point.label: point.numbers["loss"] for point in points}
    learning = [point for point in points if point.label != LEARNING_OFF and point.numbers["loss"] is not None]
    reference = losses[LEARNING_OFF]
    if reference is None or not learning:
        raise ValueError(
            f"model: its loss is not finite {'with learning off' if reference is None else 'at any learning rate'}; "
            "try --dtype float32, or smaller learning rates"
        )
    best = min(learning, key=lambda point: point.numbers["loss"])
    setting = _setting(best)
    rates = [_setting(point).learning_rate for point in points if point.label != LEARNING_OFF]
    ends = {min(rates): "lowest", max(rates): "highest"} if len(set(rates)) > 1 else {}
    errors = standard_errors(points, LOSS, LEARNING_OFF).get(best.label, {})
    return Verdict(setting, best.numbers["loss"], reference, errors.get(best.length), ends.get(setting.learning_rate))


def sweep_table(points: Sequence[Point]) -> Table:
    """A row per setting: its loss, and the difference to learning off with its standard error over documents."""
    series = measured(points, LOSS)
    differences, errors = difference_to(series, LEARNING_OFF), standard_errors(points, LOSS, LEARNING_OFF)
    rows = []
    for point in sorted(points, key=_order):
        value, difference = series[point.label][point.length], differences[point.label][point.length]
        error = errors.get(point.label, {}).get(point.length)
        setting = _setting(point)
        rows.append(
            [
                LEARNING_OFF if setting.learning_rate is None else f"{setting.learning_rate:g}",
                "" if setting.mini_batch_size is None else f"{setting.mini_batch_size:,}",
                _shown(value, "", absent="not finite"),
                "" if setting.learning_rate is None else _shown(difference, "+", absent="not finite"),
                _shown(error, "", absent=""),
            ]
        )
    header = ["inner learning rate", "mini-batch", LOSS.title.lower(), f"minus {LEARNING_OFF}", "± standard error"]
    return Table(f"Loss ({LOSS.unit}) over the first {points[0].length:,} tokens", header, rows)


def sweep_panels(points: Sequence[Point]) -> list[Panel]:
    """Loss against the learning rate, a curve per mini-batch size; and beside it the differences that matter."""
    learning = sorted((point for point in points if point.label != LEARNING_OFF), key=_order)
    reference = next(point for point in points if point.label == LEARNING_OFF).numbers["loss"]
    rates = sorted({_setting(point).learning_rate for point in learning})
    ticks = [int(rate) if rate.is_integer() else rate for rate in rates]
    losses = {}
    for point in learning:
        loss = point.numbers["loss"]
        where, values = losses.setdefault(f"mini-batch {_setting(point).mini_batch_size:,}", ([], []))
        where.append(_setting(point).learning_rate)
        values.append(math.nan if loss is None else loss)
    best = min(value for _, values in losses.values() for value in values if not math.isnan(value))
    # A step that is far too large would hide all others.
    limit = max(3 * abs(best - reference), 0.05)
    differences = {
        name: (where, [value - reference if value - reference <= limit else math.nan for value in values])
        for name, (where, values) in losses.items()
    }
    x_label = "inner learning rate"
    curves = losses | {LEARNING_OFF: (rates, [reference] * len(rates))}
    zero = {LEARNING_OFF: (rates, [0.0] * len(rates))}
    return [
        Panel(LOSS.title, x_label, LOSS.unit, curves, ticks=ticks),
        Panel(f"Minus {LEARNING_OFF}, up to {limit:+.3f}", x_label, LOSS.unit, differences | zero, ticks=ticks),
    ]


def write_settings(folder: Path, setting: Setting) -> Path:
    """Write a learning rate and its mini-batch size into a model's configuration, whose file is replaced whole."""
    is_prime = (folder / PRIME_CONFIG).is_file()
    path = folder / (PRIME_CONFIG if is_prime else "config.json")
    with claimed(folder):  # nobody changes the file between reading and writing
        fields = read_json(path, "save the model again")
        config = fields["config"] if is_prime else fields
        config |= {"inner_learning_rate": setting.learning_rate, "mini_batch_size": setting.mini_batch_size}
        write_json(path, fields, indent=2)
    return path


def _measure(sweep: Sweep, subject: Subject, setting: Setting) -> Point:
    learning = setting.learning_rate is not None
    if learning:
        subject.model.config.inner_learning_rate = setting.learning_rate
        subject.model.config.mini_batch_size = setting.mini_batch_size
    subject = dataclasses.replace(subject, label=setting.label, arguments={"test_time_training": learning})
    try:
        numbers = SWEEP.measure(subject, sweep.data, sweep.length, None)
    except Exception as error:
        error.add_note(f"while measuring {setting.label}")
        raise
    settings = {"dtype": sweep.request.dtype}
    numbers |= dataclasses.asdict(setting)
    spec = sweep.request.model
    return Point(SWEEP.name, setting.label, spec, sweep.length, settings, numbers, environment(), sweep.identity)


def _setting(point: Point) -> Setting:
    return Setting(point.numbers["learning_rate"], point.numbers["mini_batch_size"])


def _order(point: Point) -> tuple[int, float]:
    setting = _setting(point)
    return setting.mini_batch_size or 0, setting.learning_rate or 0.0


def _shown(value: float | None, sign: str, absent: str) -> str:
    return absent if value is None or math.isnan(value) else f"{value:{sign},.4f}"
