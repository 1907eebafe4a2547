"""Loss by position is the cross-entropy of each next token, whatever the batch."""

import pytest
import torch

from ttt_e2e import TTTE2EConfig, TTTE2EForCausalLM
from ttt_e2e.evaluation import bucket_bounds, bucket_means, loss_by_position


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = TTTE2EConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_suffix_layers=2,
        sliding_window=8,
        mini_batch_size=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    return TTTE2EForCausalLM(config)


@pytest.fixture(scope="module")
def documents():
    return torch.randint(40, (5, 23), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("learn", [True, False])
def test_equals_the_cross_entropy_of_the_logits(model, documents, learn):
    losses = loss_by_position(model, documents, batch_size=5, test_time_training=learn)
    with torch.no_grad():
        logits = model(documents, test_time_training=learn).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].mT, documents[:, 1:], reduction="none")
    torch.testing.assert_close(losses, expected)


def test_batch_size_changes_nothing(model, documents):
    one = loss_by_position(model, documents, batch_size=1)
    torch.testing.assert_close(loss_by_position(model, documents, batch_size=3), one)
    assert one.shape == (5, 22) and one.dtype == torch.float32 and not one.requires_grad


def test_learning_changes_losses_only_after_the_first_mini_batch(model, documents):
    learning = loss_by_position(model, documents, batch_size=5)
    plain = loss_by_position(model, documents, batch_size=5, test_time_training=False)
    torch.testing.assert_close(learning[:, :4], plain[:, :4])
    assert (learning[:, 4:] != plain[:, 4:]).any()


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_documents_without_a_next_token_are_an_error(model, shape):
    with pytest.raises(ValueError, match=r"documents: shape \["):
        loss_by_position(model, torch.zeros(shape, dtype=torch.long), batch_size=1)


def test_buckets_hold_each_predicted_token_once():
    losses = torch.arange(1.0, 8.0).repeat(2, 1)  # the loss of the token at position p is p
    bounds = bucket_bounds([0, 2, 4], length=8)
    assert bounds == [(0, 2), (2, 4), (4, 8)]
    assert bucket_means(losses, bounds) == [1.0, 2.5, 5.5]
