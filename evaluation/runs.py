"""An evaluation from its request to tables and a picture: what `ttt-e2e evaluate` does.

Its folder holds `results.jsonl` (the points, as `ResultsFile` keeps them), `results.md` (tables), `results.png` and
`results.svg`. A point that is there already is not measured again, so that the same request goes on after an
interruption, and one with further models or lengths measures only those.
"""

import dataclasses
import difflib
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..data.needles import documentation_texts, ruler_essays
from ..data.rows import document_prefixes
from ..data.sources import load_documents
from ..data.texts import text_batches
from ..data.token_store import tokenize_documents
from ..storage.digests import digest
from ..storage.disk import write_text
from ..storage.dtypes import dtype_named
from ..storage.record import check_output
from ..training.agreement import of_one_process
from .bits_per_byte import first_bytes
from .candidates import Candidate, find_candidates, find_judge, load_candidate
from .comparison import comparison_panels, comparison_tables
from .plots import plot_panels
from .results import Point, ResultsFile, environment, lock_path, tokens_digest
from .shares import measure_together
from .subject import Subject
from .tables import Table
from .tasks import Task, TaskData, find_task, task_settings

RESULTS, RULER_ESSAYS = "results", "ruler-essays"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """On what to measure, how, and where to write.

    Attributes:
        output: the folder, new or of the same run; cache: where prepared data is kept.
        data: as `load_documents` takes it; `text_column` and `split` of it. "ruler-essays" for a haystack of RULER.
        documents: how many of those that are long enough; batch_size: read side by side.
        tokenizer: a folder or an id of the Hub, for models that have none of their own.
        dtype: of the weights; "auto" is the one they were saved in.
        split_special_tokens: as in `encode_texts`.
    """

    output: Path
    cache: Path
    data: str | None = None
    documents: int = 16
    batch_size: int = 1
    tokenizer: str | None = None
    dtype: str = "auto"
    text_column: str = "text"
    split: str = "train"
    split_special_tokens: bool = True


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest(Measurement):
    """What to measure, of what.

    Attributes:
        task: a name out of `TASKS`; settings: of it, each "FIELD=VALUE".
        models: each as `load_subject` takes it, or "LABEL=SPEC".
        lengths: tokens of context.
        baseline: the label to which differences are shown.
        judge: scores what the models write; as a model.
    """

    task: str
    models: Sequence[str]
    lengths: Sequence[int]
    baseline: str | None = None
    judge: str | None = None
    settings: Sequence[str] = ()


@dataclass(frozen=True)
class Evaluation:
    """A request that has been checked, with its data and the points that are there already."""

    request: EvaluationRequest
    task: Task
    settings: object
    recorded: dict
    candidates: list[Candidate]
    digests: dict[str, str]
    judge: Candidate | None
    data: TaskData
    data_digest: str
    results: ResultsFile

    def missing(self) -> list[tuple[Candidate, list[int]]]:
        """The models that are not yet measured at all lengths, with those lengths."""
        lengths = sorted(set(self.request.lengths))
        todo = [(model, [n for n in lengths if not self.results.has(model.label, n)]) for model in self.candidates]
        return [(model, lengths) for model, lengths in todo if lengths]


def prepare_evaluation(request: EvaluationRequest) -> Evaluation:
    """Check a request and read its data. Nothing is written to the output's folder.

    Raises:
        ValueError, OSError: something does not fit.
    """
    task = find_task(request.task)
    settings = task_settings(task, request.settings)
    check_numbers(request, task)
    candidates = find_candidates(request.models, request.tokenizer, task)
    judge = find_judge(request.judge, request.tokenizer, task)
    results = open_results(request.output, task)
    check_baseline(request, candidates, results)
    data, data_digest = read_data(request, task, candidates)
    recorded = dataclasses.asdict(settings) | {"dtype": request.dtype}
    if not request.split_special_tokens:
        recorded["split_special_tokens"] = False
    if judge is not None:
        recorded["judge"] = judge.digest()
    digests = {candidate.label: candidate.digest() for candidate in candidates}
    device = str(environment()["device"]) if task.depends_on_device else None
    results.check(task.name, recorded, data_digest, digests, device)
    return Evaluation(request, task, settings, recorded, candidates, digests, judge, data, data_digest, results)


def measure_missing(evaluation: Evaluation, processes: PartialState | None = None) -> int:
    """Measure the points that are not there yet, one model in memory at a time, each written as soon as it is there.

    Args:
        processes: that have all prepared the same request and measure together, as `running_processes` gives them; the
            first of them writes. None: this process alone.

    Returns:
        How many were measured.

    Raises:
        ValueError: another evaluation is writing the results, or has done so since they were read.
    """
    missing, request = evaluation.missing(), evaluation.request
    count, total = sum(len(lengths) for _, lengths in missing), len(evaluation.candidates) * len(set(request.lengths))
    if not count:
        return 0
    data, first = evaluation.data, processes is None or processes.is_main_process
    with (
        ExitStack() as kept,
        tqdm(total=total, initial=total - count, desc=request.task, unit=" points", disable=not first) as progress,
    ):
        claim_results(evaluation.results, kept, processes)
        if evaluation.judge is not None:
            judge = load_candidate(evaluation.judge, request.dtype, request.split_special_tokens)
            data = dataclasses.replace(data, judge=judge)
        for candidate, lengths in missing:
            subject = load_candidate(candidate, request.dtype, request.split_special_tokens)
            for length in lengths:
                point = measure_point(evaluation, candidate, subject, data, length, processes)
                if first:
                    evaluation.results.append(point)
                progress.update()
            del subject  # before the next one is loaded
    return count


def claim_results(results: ResultsFile, kept: ExitStack, processes: PartialState | None) -> None:
    """Claim the results for this evaluation, all its processes, until `kept` is closed."""
    if processes is None:
        kept.enter_context(results)
        return
    processes.wait_for_everyone()  # each has read them before one writes
    of_one_process(processes.is_main_process, lambda: kept.enter_context(results) and None)


def measure_point(
    evaluation: Evaluation,
    candidate: Candidate,
    subject: Subject,
    data: TaskData,
    length: int,
    processes: PartialState | None = None,
) -> Point:
    """One model at one length."""
    task = evaluation.task
    try:
        if processes is None:
            numbers = task.measure(subject, data, length, evaluation.settings)
        else:
            numbers = measure_together(processes, task, subject, data, length, evaluation.settings)
    except Exception as error:
        error.add_note(f"while measuring {task.name} of {candidate.label!r} at length {length}")
        raise
    identity = {
        "model": evaluation.digests[candidate.label],
        "data": evaluation.data_digest,
        "settings": digest(evaluation.recorded),
    }
    return Point(
        task.name, candidate.label, candidate.spec, length, evaluation.recorded, numbers, environment(), identity
    )


def write_comparison(
    evaluation: Evaluation, tables_only: Collection[str] = (), trainings: Mapping[str, str] | None = None
) -> tuple[list[Table], list[Path]]:
    """Write the tables and the picture of all points in the results' file, each file whole or not at all.

    Args:
        tables_only: labels that are not drawn: so far from the others that their curves would flatten.
        trainings: by label, the row of which it is a training; a row is drawn as one curve.

    Returns:
        The tables, and the files that were written.
    """
    request, points, quantities = evaluation.request, evaluation.results.points, evaluation.task.quantities
    tables = comparison_tables(points, quantities, request.baseline)
    text = "\n".join(f"{table.title}\n\n{table.markdown()}" for table in tables)
    write_text(request.output / f"{RESULTS}.md", text)
    drawn = [point for point in points if point.label not in tables_only]
    panels = comparison_panels(drawn, quantities, request.baseline, trainings)
    return tables, [request.output / f"{RESULTS}.md", *plot_panels(panels, request.output / RESULTS, request.task)]


def check_numbers(request: EvaluationRequest, task: Task) -> None:
    """Check lengths, counts and the data type.

    Raises:
        ValueError: one is out of range.
    """
    if not request.lengths:
        raise ValueError("--lengths is missing: give at least one, as in --lengths 1024,4096")
    for length in request.lengths:
        if length < task.least:
            raise ValueError(f"--lengths: {length} is too small; the task {task.name!r} needs at least {task.least}")
    for name in ("documents", "batch_size"):
        if getattr(request, name) < 1:
            raise ValueError(f"{name}={getattr(request, name)}: must be at least 1")
    dtype_named(request.dtype)


def open_results(folder: Path, task: Task) -> ResultsFile:
    """The results in a folder, which may be new.

    Raises:
        ValueError: the folder holds other files, cannot be written to, or its results are of another task.
    """
    path = folder / f"{RESULTS}.jsonl"
    if not path.is_file():
        check_output(folder, resume=False, besides={lock_path(path).name})
    results = ResultsFile(path)
    if results.points and results.points[0].task != task.name:
        results.check(task.name, {}, "", {}, None)  # raises: before any data is read
    return results


def check_baseline(request: EvaluationRequest, candidates: Sequence[Candidate], results: ResultsFile) -> None:
    """Check that there is a model of the baseline's label, in the request or among the results.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    labels = dict.fromkeys([*(c.label for c in candidates), *(point.label for point in results.points)])
    if request.baseline not in (None, *labels):
        nearest = difflib.get_close_matches(request.baseline, labels, n=1, cutoff=0.0)[0]
        raise ValueError(f"--baseline {request.baseline!r}: no model has this label; did you mean {nearest!r}?")


def read_data(request: EvaluationRequest, task: Task, candidates: Sequence[Candidate]) -> tuple[TaskData, str]:
    """What a task reads, and its digest.

    Raises:
        ValueError, OSError: it is missing, cannot be read, or no document is as long as the longest length.
    """
    if task.takes_haystack:
        texts = haystack(request)
        contents = documentation_texts() if texts is None else texts
        return TaskData(haystack=texts, batch_size=request.batch_size), digest(contents)
    if not task.needs_data:
        if request.data is not None:
            raise ValueError(f"--data: the task {task.name!r} makes its own text; leave it out")
        return TaskData(batch_size=request.batch_size), digest(None)
    if request.data is None:
        raise ValueError(f"--data is missing: the task {task.name!r} reads documents, as in --data standard-library")
    if task.own_tokens:
        texts = read_texts(request)
        return TaskData(texts=texts), digest(texts)
    documents = evaluated_documents(request, candidates[0].tokenizer)
    for candidate in candidates:
        known, highest = candidate.fields.get("vocab_size"), int(documents.max())
        if known is not None and highest >= known:
            raise ValueError(
                f"model={candidate.spec!r} knows {known} tokens, but the data has token {highest}: its tokenizer is "
                "not the one that it was made for"
            )
    return TaskData(documents=documents, batch_size=request.batch_size), tokens_digest(documents)


def requested_documents(request: EvaluationRequest) -> Dataset:
    """The documents that a request names."""
    return load_documents(
        request.data, cache_folder=request.cache, text_column=request.text_column, split=request.split
    )


def haystack(request: EvaluationRequest) -> list[str] | None:
    """Texts to hide needles in; None for those that are built in."""
    if request.data in (None, RULER_ESSAYS):
        return None if request.data is None else ruler_essays()
    return requested_documents(request)["text"][: request.documents]


def read_texts(request: EvaluationRequest) -> list[str]:
    """The beginnings of the first documents that are as long as the longest length, which counts bytes."""
    documents = requested_documents(request)
    longest, available, texts = max(request.lengths), 0, []
    for batch in text_batches(documents):
        sizes = [len(text.encode()) for text in batch]
        available = max([available, *sizes])
        texts += [first_bytes(text, longest) for text, size in zip(batch, sizes, strict=True) if size >= longest]
        if len(texts) >= request.documents:
            return texts[: request.documents]
    if not texts:
        raise ValueError(
            f"--lengths: {longest} is beyond the data, whose longest document has {available} bytes; give smaller "
            "lengths or longer documents"
        )
    return texts


def evaluated_documents(request: EvaluationRequest, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The beginnings of the first documents that are as long as the longest length, int64 [documents, length]."""
    texts = requested_documents(request)
    store = tokenize_documents(texts, tokenizer, request.cache, request.split_special_tokens)
    longest = max(request.lengths)
    available = int(store.lengths().max())
    if longest > available:
        raise ValueError(
            f"--lengths: {longest} is beyond the data, whose longest document has {available} tokens; give smaller "
            "lengths or longer documents"
        )
    return document_prefixes(store, longest, request.documents)[1]
