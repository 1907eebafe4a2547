"""Perplexity and loss against context length are means of the losses of the tokens."""

import math

import pytest
import torch

from ttt_e2e.evaluation import loss_by_context_length, loss_by_position, perplexity

from .subjects import losses_by_hand, random_documents, subject

KINDS = ["ours", "hybrid", "mistral"]
MEASURES = [perplexity, loss_by_context_length]


@pytest.mark.parametrize("kind", KINDS)
def test_perplexity_is_exp_of_the_mean_loss(kind):
    tested, documents = subject(kind), random_documents(3, 30)
    measured = perplexity(tested, documents, length=21, batch_size=2)
    expected = losses_by_hand(tested.model, documents[:, :21]).mean().item()
    assert measured["loss"] == pytest.approx(expected, rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert measured["tokens"] == 3 * 20


def test_perplexity_of_a_model_that_knows_nothing_is_the_size_of_its_vocabulary():
    tested = subject("mistral")
    torch.nn.init.zeros_(tested.model.lm_head.weight)
    assert perplexity(tested, random_documents(2, 9), length=9)["perplexity"] == pytest.approx(40)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_by_position_averages_to_the_loss(kind):
    tested, documents = subject(kind), random_documents(3, 30)
    by_position = loss_by_position(tested, documents, batch_size=2).mean(dim=0)
    assert by_position.mean().item() == pytest.approx(loss_by_context_length(tested, documents, 30)["loss"], rel=1e-6)


def test_arguments_come_over_those_of_the_subject():
    off, documents = subject("ours", test_time_training=False), random_documents(2, 30)
    expected = losses_by_hand(off.model, documents, test_time_training=True)
    losses = loss_by_position(off, documents, batch_size=2, test_time_training=True)
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=1e-4)


def test_loss_at_a_context_length_by_hand():
    tested, documents = subject("ours"), random_documents(3, 30)
    measured = loss_by_context_length(tested, documents, length=21)
    a, b, c = losses_by_hand(tested.model, documents[:, :21]).mean(dim=1).tolist()
    mean = (a + b + c) / 3
    error = math.sqrt(((a - mean) ** 2 + (b - mean) ** 2 + (c - mean) ** 2) / 2) / math.sqrt(3)
    assert measured["loss_by_document"] == pytest.approx([a, b, c], rel=1e-5)
    assert measured["loss"] == pytest.approx(mean, rel=1e-5)
    assert measured["standard_error"] == pytest.approx(error, rel=1e-4)
    assert measured["tokens"] == 3 * 20


def test_one_document_has_no_standard_error():
    assert loss_by_context_length(subject("mistral"), random_documents(1, 9), 9)["standard_error"] is None


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("length", [-3, 0, 1])
def test_a_length_without_a_next_token_is_an_error(measure, length):
    with pytest.raises(ValueError, match=f"length={length}: must be at least 2"):
        measure(subject("mistral"), random_documents(2, 9), length)


@pytest.mark.parametrize("measure", MEASURES)
def test_documents_shorter_than_the_context_are_an_error(measure):
    with pytest.raises(ValueError, match=r"documents: shape \[2, 9\], but length=10"):
        measure(subject("mistral"), random_documents(2, 9), 10)


def test_a_batch_of_no_documents_is_an_error():
    with pytest.raises(ValueError, match="batch_size=0"):
        perplexity(subject("mistral"), random_documents(2, 9), 9, batch_size=0)
