"""Several processes measure what one process measures, number for number, into one file of results."""

import json

import pytest
import torch

from ttt_e2e.evaluation.runs import EvaluationRequest, measure_missing, prepare_evaluation
from ttt_e2e.evaluation.shares import measure_together, own_share, running_processes
from ttt_e2e.evaluation.subject import Subject
from ttt_e2e.evaluation.tasks import TASKS, TaskData, task_settings

from ..serving.small import BOOK, save_text_model, small_text_model
from ..training.processes import WORLD, run_together
from .subjects import random_documents, subject

SETTINGS = {"decoding": ["new_tokens=3"], "needle": ["samples=5", "answer_tokens=4", "distractors=2"]}
SHARED = [name for name in TASKS if name != "latency"]
LENGTHS = (24, 16)


def measured(name, processes=None):
    """The numbers of a task on five documents, two side by side."""
    task, tested, length = TASKS[name], subject("ours"), 8
    data = TaskData(random_documents(5, 12), judge=subject("mistral"), batch_size=2)
    if task.own_tokens or task.takes_haystack:
        text_model, length = small_text_model(), 16 if task.own_tokens else 600
        tested = Subject("ours", text_model.model, text_model.tokenizer)
        data = TaskData(texts=[BOOK[n:] for n in range(5)] if task.own_tokens else None, batch_size=2)
    settings = task_settings(task, SETTINGS.get(name, []))
    if processes is None:
        return task.measure(tested, data, length, settings)
    return measure_together(processes, task, tested, data, length, settings)


def request(folder, output, lengths=LENGTHS):
    options = {"models": [str(folder / "model")], "data": str(folder / "texts"), "cache": folder / "cache"}
    return EvaluationRequest(task="context-length", lengths=lengths, output=folder / output, documents=3, **options)


def worker(folder):
    processes = running_processes()
    found = {name: measured(name, processes) for name in SHARED}
    torch.save(found, folder / f"numbers-{processes.process_index}.pt")
    counts = [measure_missing(prepare_evaluation(request(folder, "two", n)), processes) for n in (LENGTHS[:1], LENGTHS)]
    torch.save(counts, folder / f"counts-{processes.process_index}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shares")
    save_text_model(small_text_model(), folder / "model")
    (folder / "texts").mkdir()
    for number in range(3):
        (folder / "texts" / f"{number}.txt").write_text(BOOK[number:])
    run_together(worker, folder)
    return folder


@pytest.mark.parametrize("name", SHARED)
def test_each_number_is_that_of_one_process(folder, name):
    expected = measured(name)
    for process in range(WORLD):
        assert torch.load(folder / f"numbers-{process}.pt")[name] == expected


def test_one_file_of_results_that_goes_on(folder):
    assert measure_missing(prepare_evaluation(request(folder, "one"))) == len(LENGTHS)
    files = [folder / name / "results.jsonl" for name in ("one", "two")]
    one, two = (sorted(path.read_text().splitlines()) for path in files)
    points = [[json.loads(line)["numbers"] for line in lines] for lines in (one, two)]
    assert points[0] == points[1] and len(points[1]) == len(LENGTHS)
    for process in range(WORLD):  # the first length was not measured again
        assert torch.load(folder / f"counts-{process}.pt") == [1, 1]


@pytest.mark.parametrize(("count", "batch_size"), [(0, 1), (1, 4), (7, 1), (7, 2), (9, 4)])
def test_shares_are_whole_batches_and_all_of_them(count, batch_size):
    shares = [own_share(count, batch_size, process, 3) for process in range(3)]
    assert sorted(number for share in shares for number in share) == list(range(count))
    batches = [list(part) for part in torch.arange(count).split(batch_size)] if count else []
    for share in shares:
        parts = [list(part) for part in torch.tensor(share, dtype=torch.long).split(batch_size)] if share else []
        assert all(part in batches for part in parts)
