"""Tasks and their settings, and what they hand on to the measuring functions."""

import pytest
import torch

from ttt_e2e.cli.measure import TASK_LINES
from ttt_e2e.configuration.experiments import LOSS_TASKS
from ttt_e2e.data.tokenizer import train_tokenizer
from ttt_e2e.evaluation.results import finite
from ttt_e2e.evaluation.subject import Subject, token_losses
from ttt_e2e.evaluation.tasks import TASKS, TaskData, find_task, task_settings

from .subjects import mistral, random_documents, subject


def test_every_task_is_described_on_the_command_line():
    assert list(TASK_LINES) == list(TASKS)


def test_experiments_know_which_tasks_are_of_losses_alone():
    assert set(LOSS_TASKS) == {name for name, task in TASKS.items() if task.of_losses is not None}


def test_an_unknown_task_names_the_nearest():
    assert find_task("needle").name == "needle"
    with pytest.raises(ValueError, match="did you mean 'perplexity'"):
        find_task("perplexty")
    with pytest.raises(ValueError, match="choose one of loss-by-position"):
        find_task("zzz")


def test_settings_are_overridden_and_a_whole_number_will_do_for_a_fraction():
    settings = task_settings(TASKS["decoding"], ["new_tokens=8", "temperature=2"])
    assert (settings.new_tokens, settings.temperature, settings.top_p) == (8, 2.0, 0.95)
    assert task_settings(TASKS["needle"], ["depth=0"]).depth == 0.0


@pytest.mark.parametrize(
    ("task", "override", "message"),
    [
        ("decoding", "new_token=8", "did you mean 'new_tokens'"),
        ("decoding", "new_tokens=many", "new_tokens"),
        ("decoding", "new_tokens=0", "must be at least 1"),
        ("decoding", "temperature=-1", "must be at least 0"),
        ("decoding", "new_tokens", "must be FIELD=VALUE"),
        ("perplexity", "new_tokens=8", "has no settings"),
    ],
)
def test_wrong_settings_are_refused(task, override, message):
    with pytest.raises(ValueError, match=message):
        task_settings(TASKS[task], [override])


def test_temperature_zero_is_greedy():
    assert task_settings(TASKS["decoding"], ["temperature=0"]).sampling()["do_sample"] is False
    assert task_settings(TASKS["decoding"], []).sampling()["temperature"] == 1.0


@pytest.mark.parametrize("name", [name for name in TASKS if name != "needle"])
def test_every_task_gives_the_numbers_that_it_shows(name):
    task, small = TASKS[name], {"decoding": ["new_tokens=3"], "latency": ["new_tokens=3", "repeats=1"]}
    data = TaskData(random_documents(3, 12), ["some text"] * 3, judge=subject("ours"), batch_size=2)
    tested = subject("mistral")
    if task.own_tokens:
        tokenizer = train_tokenizer(["some text"], 280)
        tested = Subject("mistral", mistral(vocab_size=len(tokenizer)), tokenizer)
    numbers = task.measure(tested, data, 8, task_settings(task, small.get(name, [])))
    assert finite(numbers) == numbers
    for quantity in task.quantities:
        assert isinstance(numbers[quantity.key], list if quantity.by_position else float | int)
        if quantity.by_document is not None:
            assert len(numbers[quantity.by_document]) == 3


def test_loss_by_position_averages_documents_and_then_to_the_loss():
    documents, model = random_documents(3, 12), subject("ours")
    numbers = TASKS["loss-by-position"].measure(model, TaskData(documents, batch_size=2), 8, None)
    expected = token_losses(Subject("whole", model.model), documents[:, :8]).double()
    torch.testing.assert_close(torch.tensor(numbers["loss_by_position"]).double(), expected.mean(0))
    assert numbers["loss"] == pytest.approx(expected.mean().item()) and numbers["tokens"] == 21


def test_decoding_has_a_loss_for_every_written_token():
    task = TASKS["decoding"]
    data = TaskData(random_documents(2, 8), judge=subject("ours"))
    numbers = task.measure(subject("mistral"), data, 8, task_settings(task, ["new_tokens=20"]))
    assert len(numbers["loss_by_position"]) == 20
    assert sum(numbers["loss_by_position"]) / 20 == pytest.approx(numbers["loss"])
