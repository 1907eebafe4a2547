"""Arguments that cannot mean what their giver thinks are refused by name, value and remedy, in every family.

Nothing is read before, and a given cache stays as it is.
"""

import copy

import pytest
import torch

from ttt_e2e import (
    TTTE2ECache,
    TTTE2EForQuestionAnswering,
    TTTE2EForSequenceClassification,
    TTTE2EForTokenClassification,
)

from .families import KINDS
from .helpers import VOCAB, random_ids, small_config, small_model

MODELS = ("ttt-e2e learning", "ttt-layers mamba-backbone", "hybrid everything")
LENGTH = 11
IDS = random_ids(2, LENGTH)
ONES = torch.ones(2, LENGTH)
POSITIONS = torch.arange(LENGTH).expand(2, -1)


def changed(tensor: torch.Tensor, value) -> torch.Tensor:
    """A copy with one entry replaced, in row 1, column 4."""
    tensor = tensor.clone()
    tensor[1, 4] = value
    return tensor


FORWARD = {
    "mask of fractions": (
        {"attention_mask": changed(ONES, 0.5)},
        r"`attention_mask` holds 0\.5 \(row 1, column 4\).*1 for",
    ),
    "mask of nan": ({"attention_mask": changed(ONES, float("nan"))}, r"`attention_mask` holds nan"),
    "mask of inf": ({"attention_mask": changed(ONES, float("-inf"))}, r"`attention_mask` holds -inf"),
    "negative mask": ({"attention_mask": changed(ONES.long(), -1)}, r"`attention_mask` holds -1"),
    "mask of twos": ({"attention_mask": changed(ONES.long(), 2)}, r"`attention_mask` holds 2"),
    "mask as a list": ({"attention_mask": ONES.tolist()}, r"`attention_mask` must be a torch\.Tensor, got a list"),
    "nothing but padding": (
        {"attention_mask": 0 * ONES, "use_cache": False},
        r"`attention_mask` is 0 everywhere.*token",
    ),
    "ids as a list": ({"input_ids": IDS.tolist()}, r"`input_ids` must be a torch\.Tensor, got a list"),
    "ids as text": ({"input_ids": "hello"}, r"`input_ids` must be a torch\.Tensor, got a str: 'hello'"),
    "bools as ids": ({"input_ids": IDS > 50}, r"`input_ids` must be integers.*torch\.bool"),
    "ids in one byte": ({"input_ids": IDS.to(torch.uint8)}, r"`input_ids` must be integers.*torch\.uint8"),
    "labels that disagree": (
        {"labels": IDS, "shift_labels": changed(IDS.roll(-1, 1), 7)},
        rf"`labels` and `shift_labels` disagree: after row 1, column 4 .* {int(IDS[1, 5])}, the latter 7\. Give one",
    ),
    "labels as floats": ({"labels": IDS.float()}, r"`labels` must be integers.*float32"),
    "labels as bools": ({"labels": IDS > 50}, r"`labels` must be integers.*bool"),
    "labels as a list": ({"labels": IDS.tolist()}, r"`labels` must be a torch\.Tensor"),
    "shifted labels as floats": ({"shift_labels": IDS.float()}, r"`shift_labels` must be integers.*float32"),
    "shifted labels outside": ({"shift_labels": changed(IDS, VOCAB)}, rf"`shift_labels` holds {VOCAB}"),
    "shifted labels cut": ({"shift_labels": IDS[:, 1:]}, rf"`shift_labels` has shape \(2, {LENGTH - 1}\)"),
    "no items": ({"labels": IDS, "num_items_in_batch": 0}, r"`num_items_in_batch` is 0,.*positive.*leave it out"),
    "negative items": ({"labels": IDS, "num_items_in_batch": -3}, r"`num_items_in_batch` is -3"),
    "no items in a tensor": ({"labels": IDS, "num_items_in_batch": torch.tensor(0)}, r"`num_items_in_batch` is 0"),
    "nan items": ({"labels": IDS, "num_items_in_batch": float("nan")}, r"`num_items_in_batch` is nan"),
    "items as text": ({"labels": IDS, "num_items_in_batch": "12"}, r"`num_items_in_batch` must be a number.*'12'"),
    "items as a bool": ({"labels": IDS, "num_items_in_batch": True}, r"`num_items_in_batch` must be a number.*True"),
    "several items": ({"labels": IDS, "num_items_in_batch": torch.ones(3)}, r"`num_items_in_batch` must be a number"),
    "floating positions": ({"position_ids": POSITIONS.float()}, r"`position_ids` must be integers.*float32"),
    "positions as bools": ({"position_ids": POSITIONS > 3}, r"`position_ids` must be integers.*bool"),
    "overflowing positions": (
        {"position_ids": POSITIONS + 2**60},
        r"`position_ids` holds 1152921504606846976.*2\*\*53",
    ),
    "negative positions": ({"position_ids": POSITIONS - 5}, r"`position_ids` holds -5 \(row 0, column 0\)"),
    "positions as a list": ({"position_ids": POSITIONS.tolist()}, r"`position_ids` must be a torch\.Tensor"),
    "positions of another length": ({"position_ids": POSITIONS[:, 1:]}, r"`position_ids` has shape \(2, 10\)"),
    "use_cache as text": ({"use_cache": "no"}, r"`use_cache` must be True, False or None, got 'no'"),
    "use_cache as a number": ({"use_cache": 1}, r"`use_cache` must be True, False or None, got 1"),
    "hidden states as text": ({"output_hidden_states": "no"}, r"`output_hidden_states` must be .*'no'"),
    "attentions as text": ({"output_attentions": "no"}, r"`output_attentions` must be .*'no'"),
    "skip_logits as text": ({"skip_logits": "no"}, r"`skip_logits` must be .*'no'"),
    "negative number of logits": ({"logits_to_keep": -2}, r"`logits_to_keep` is -2"),
    "a fraction of the logits": ({"logits_to_keep": 1.5}, r"`logits_to_keep` must be an integer.*1\.5"),
    "logits as text": ({"logits_to_keep": "last"}, r"`logits_to_keep` must be an integer.*'last'"),
    "logits of other positions": ({"logits_to_keep": torch.tensor([0, 11])}, r"`logits_to_keep` holds the position 11"),
    "floating logits": ({"logits_to_keep": torch.tensor([0.0])}, r"`logits_to_keep` must be.*float32"),
    "embeddings of another size": (
        {"input_ids": None, "inputs_embeds": torch.zeros(2, LENGTH, 5)},
        r"`inputs_embeds`.*5\)",
    ),
    "embeddings as integers": (
        {"input_ids": None, "inputs_embeds": torch.zeros(2, LENGTH, 32).long()},
        r"`inputs_embeds` must be floating.*int64",
    ),
}
OWN = {
    "learning as text": ({"test_time_training": "no"}, r"`test_time_training` must be True, False or None, got 'no'"),
    "learning as a number": ({"test_time_training": 0}, r"`test_time_training` must be True, False or None, got 0"),
    "reversed span": ({"learning_span": (7, 3)}, r"`learning_span` is \(7, 3\).*0 <= first <= end"),
    "negative span": ({"learning_span": (-2, 3)}, r"`learning_span` is \(-2, 3\)"),
    "half a span": ({"learning_span": (3,)}, r"`learning_span` must be two integers.*\(3,\)"),
    "span as a number": ({"learning_span": 3}, r"`learning_span` must be two integers.*got 3"),
    "span of floats": ({"learning_span": (0.0, 3.0)}, r"`learning_span` must be two integers"),
    "span of bools": ({"learning_span": (False, True)}, r"`learning_span` must be two integers"),
    "span as text": ({"learning_span": "07"}, r"`learning_span` must be two integers.*'07'"),
}
CASES = [(kind, name) for kind in MODELS for name in FORWARD] + [(MODELS[0], name) for name in OWN]


@pytest.fixture(scope="module")
def models():
    return {kind: KINDS[kind].model(torch.float32) for kind in MODELS}


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_forward_names_the_argument_and_its_value(models, kind, name, monkeypatch):
    model = models[kind]
    arguments, message = (FORWARD | OWN)[name]
    monkeypatch.setattr(model.model.layers[0], "forward", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises((ValueError, TypeError), match=message):
        model(**{"input_ids": IDS} | arguments)


@pytest.mark.parametrize("kind", MODELS)
def test_a_mask_of_exact_zeros_and_ones_may_have_any_dtype(models, kind):
    mask = ONES.clone()
    mask[0, :3] = 0
    logits = [
        models[kind](IDS, attention_mask=mask.to(dtype)).logits for dtype in (torch.long, torch.float, torch.bool)
    ]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("kind", MODELS)
def test_labels_that_agree_may_be_given_both_ways(models, kind):
    labels = changed(IDS, -100)
    shifted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], dim=1)
    both = models[kind](IDS, labels=labels, shift_labels=shifted).loss
    torch.testing.assert_close(both, models[kind](IDS, labels=labels).loss)


@pytest.mark.parametrize("kind", MODELS[:2])
def test_padding_alone_may_be_read_where_something_goes_on(models, kind):
    model = models[kind]
    with torch.no_grad():
        cache = model(IDS, use_cache=True).cache
        model(IDS, attention_mask=0 * ONES, cache=cache)
        assert cache.get_seq_length() == 2 * LENGTH
        assert model(IDS, attention_mask=0 * ONES, use_cache=True).cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_multiplier_that_no_warm_up_sets_is_refused(value):
    model = small_model()
    model.model.inner_learning_rate_multiplier = value
    assert model(IDS).logits.isfinite().all(), "it is applied only while training"
    with pytest.raises(ValueError, match=rf"`inner_learning_rate_multiplier`.*{value}.*finite"):
        model.train()(IDS, labels=IDS)


HEADS = (TTTE2EForSequenceClassification, TTTE2EForTokenClassification, TTTE2EForQuestionAnswering)


@pytest.mark.parametrize("head", HEADS)
def test_heads_refuse_as_the_language_model_does(head):
    model = head(small_config()).eval()
    for name in ("negative items", "mask of twos", "use_cache as text", "floating positions", "ids as a list"):
        arguments, message = FORWARD[name]
        with pytest.raises((ValueError, TypeError), match=message):
            model(**{"input_ids": IDS} | {key: value for key, value in arguments.items() if key != "labels"})


ROWS = {
    "too large": (torch.tensor([0, 2]), r"`indices` holds 2; the cache holds the rows 0 to 1"),
    "negative": (torch.tensor([-1]), r"`indices` holds -1"),
    "no row": (torch.tensor([], dtype=torch.long), r"`indices` asks for no row"),
    "no row of bools": (torch.tensor([False, False]), r"`indices` asks for no row"),
    "three bools": (torch.tensor([True, False, True]), r"`indices` has 3 bools.*2 rows"),
    "floats": (torch.tensor([0.0]), r"`indices` must be integers or bools.*float32"),
    "two dimensions": (torch.tensor([[0]]), r"`indices` must be integers or bools.*\(1, 1\)"),
    "no dimension": (torch.tensor(0), r"`indices` must be integers or bools.*\(\)"),
    "a list": ([0], r"`indices` must be a torch\.Tensor, got a list"),
    "a number": (0, r"`indices` must be a torch\.Tensor, got a int"),
}
REPEATS = {0: "`repeats` is 0", -1: "`repeats` is -1", 1.5: "integer, got 1.5", "2": "integer, got '2'", None: "None"}


@pytest.mark.parametrize("kind", MODELS[:2])
def test_a_cache_names_rows_that_it_does_not_hold(models, kind):
    with torch.no_grad():
        cache = models[kind](IDS, use_cache=True).cache
    before = copy.copy(vars(cache))
    for indices, message in ROWS.values():
        for method in (cache.batch_select_indices, cache.reorder_cache):
            with pytest.raises((ValueError, TypeError), match=message):
                method(indices)
    for repeats, message in REPEATS.items():
        with pytest.raises((ValueError, TypeError), match=message):
            cache.batch_repeat_interleave(repeats)
    assert all(vars(cache)[name] is value for name, value in before.items())


def test_a_refused_call_leaves_the_cache_as_it_is(models):
    model = models[MODELS[0]]
    cache = TTTE2ECache(model.config)
    with torch.no_grad():
        model(IDS, cache=cache)
    before = (cache.context, cache.columns)
    for arguments, _ in (FORWARD | OWN).values():
        if arguments.get("use_cache") is False or "position_ids" in arguments:
            continue
        with pytest.raises((ValueError, TypeError)):
            model(**{"input_ids": IDS, "cache": cache} | arguments)
        assert (cache.context, cache.columns) == before
