"""Every family in every mode generates like any other model of transformers, and takes the same arguments."""

import copy
import warnings

import pytest
import torch
from transformers import (
    DynamicCache,
    StaticCache,
)

from .families import IDS, KINDS, LENGTH, NEW, write
from .generating import left_padded
from .tiny_tokenizer import SENTENCES, byte_level_tokenizer

WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "several-beams": {"num_beams": 4, "num_return_sequences": 2},
    "several-samples": {"do_sample": True, "num_return_sequences": 2},
}
EARLIER_NAMES = ("past_key_values", "cache_params")


@pytest.fixture(scope="module")
def model(kind):
    return kind.model()


# ------------------------------------------------------------------------------------------------------ generate


@pytest.mark.parametrize("way", WAYS)
def test_the_cache_changes_nothing_that_is_written(model, way):
    written = write(model, IDS, **WAYS[way])
    assert torch.equal(written, write(model, IDS, use_cache=False, **WAYS[way]))
    assert len(set(written[0].tolist())) > 2


def test_prompts_of_several_lengths(model):
    """Left-padded in one batch, each is continued as alone, also when the prompt is read in pieces."""
    ids, mask, rows = left_padded()
    alone = torch.cat([write(model, row) for row in rows])
    assert torch.equal(write(model, ids, attention_mask=mask), alone)
    for size in (1, 7):
        assert torch.equal(write(model, ids, attention_mask=mask, prefill_chunk_size=size), alone)


@pytest.mark.parametrize("only_new", [False, True])
def test_going_on_from_a_returned_cache(kind, model, only_new):
    ids, mask, _ = left_padded()
    settings = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [0], "return_dict_in_generate": True}
    first = model.generate(ids, attention_mask=mask, **settings)
    cache = first.cache
    assert type(cache) is kind.family.cache_class and cache.get_seq_length() == ids.shape[1] + 4
    longer = torch.cat([mask, mask.new_ones(3, 5)], dim=1)
    given = first.sequences[:, -1:] if only_new else first.sequences
    more = write(model, given, attention_mask=longer, cache=copy.deepcopy(cache), max_new_tokens=NEW - 5)
    expected = write(model, ids, attention_mask=mask)
    assert torch.equal(torch.cat([first.sequences[:, ids.shape[1] :], more], dim=1), expected)


@pytest.mark.parametrize("columns_read", [12, 17])
def test_what_a_cache_holds_is_not_read_again(model, columns_read):
    """`generate` cuts a continued sequence only where the cache's `is_linear` says so."""
    with torch.no_grad():
        cache = model(IDS[:, :columns_read], use_cache=True).cache
    assert len(cache.is_linear) == model.config.num_hidden_layers and not all(cache.is_linear)
    settings = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "suppress_tokens": [0]}
    output = model.generate(IDS[:, :18], cache=cache, **settings)
    assert output.cache.get_seq_length() == 18
    assert torch.equal(output.sequences[:, 18:], write(model, IDS[:, :18], max_new_tokens=1))


@pytest.mark.parametrize("only_new", [False, True])
@pytest.mark.parametrize("chunk", [None, 4])
def test_a_second_turn_of_a_padded_batch(kind, only_new, chunk):
    """Turns of unequal length, padded on the left, after answers to prompts of unequal length: as each row alone."""
    # A sliding window of transformers' cache counts padding.
    model = kind.model(sliding_window=64) if kind.family.cache_class is DynamicCache else kind.model()
    settings = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [0], "return_dict_in_generate": True}
    ids, mask, prompts = left_padded((5, 14))
    turns = left_padded((9, 2))
    first = model.generate(ids, attention_mask=mask, **settings)
    whole = torch.cat([first.sequences, turns[0]], dim=1)
    longer = torch.cat([mask, mask.new_ones(2, 4), turns[1]], dim=1)
    # The last token of an answer is not read yet.
    given = whole[:, first.cache.get_seq_length() :] if only_new else whole
    written = write(model, given, attention_mask=longer, cache=first.cache, prefill_chunk_size=chunk)
    for row, (prompt, turn) in enumerate(zip(prompts, turns[2], strict=True)):
        answer = first.sequences[row : row + 1, ids.shape[1] :]
        assert torch.equal(answer, write(model, prompt, max_new_tokens=4))
        alone = torch.cat([prompt, answer, turn], dim=1)
        assert torch.equal(written[row : row + 1], write(model, alone))


def test_several_answers_from_one_cache(model):
    with torch.no_grad():
        cache = model(IDS[:, :-1], use_cache=True).cache
    beams = copy.deepcopy(cache)
    beams.reorder_cache(torch.arange(3).repeat_interleave(3))  # transformers' recurrent states know no other way
    assert torch.equal(write(model, IDS, cache=beams, num_beams=3), write(model, IDS, num_beams=3))
    assert cache.get_seq_length() == LENGTH - 1


def test_rows_of_beams_follow_their_states(kind, model):
    """A reordered cache continues the rows in their new order."""
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        cache = model(IDS[:, :-1], use_cache=True).cache
        cache.reorder_cache(order)
        after = model(IDS[order, -1:], cache=cache).logits
        torch.testing.assert_close(after, model(IDS[order]).logits[:, -1:], **kind.tolerance)


def test_embeddings_as_a_prompt(model):
    embeddings = {"inputs_embeds": model.get_input_embeddings()(IDS)}
    if getattr(model.config, "test_time_training", False):
        embeddings["input_ids"] = IDS  # what is learned from
    settings = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": [0]}
    assert torch.equal(model.generate(**embeddings, **settings)[:, -NEW:], write(model, IDS))


def test_stop_strings_bring_their_tokenizer(family):
    tokenizer = byte_level_tokenizer()
    model = next(kind for kind in KINDS.values() if kind.family is family).model(vocab_size=len(tokenizer))
    ids = tokenizer(SENTENCES[0], return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=5, stop_strings=["§"], tokenizer=tokenizer)
    assert written.shape[1] <= ids.shape[1] + 5


# ------------------------------------------------------------------------------------------- arguments of a call


@pytest.mark.parametrize("name", EARLIER_NAMES)
def test_earlier_names_of_the_cache(one_of, name):
    """forward, the base model and `generate` take them with one warning; outputs answer to them."""

    @torch.no_grad()
    def once(function, **arguments):
        cache = one_of(IDS[:, :12], use_cache=True).cache
        expected = function(cache=copy.deepcopy(cache), **arguments)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = function(**{name: cache}, **arguments)
        messages = [str(warning.message) for warning in caught if warning.category is FutureWarning]
        assert len(messages) == 1 and f"`{name}` is deprecated" in messages[0] and "`cache`" in messages[0]
        assert cache.get_seq_length() >= 18
        return expected, found

    expected, found = once(one_of, input_ids=IDS[:, 12:18])
    assert torch.equal(found.logits, expected.logits)
    assert getattr(found, name) is found[name] is found.cache is found["cache"]
    assert name in found and type(found)(**{name: found.cache}).cache is found.cache
    expected, found = once(one_of.model, input_ids=IDS[:, 12:18])
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert getattr(found, name) is found.cache
    settings = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [0], "return_dict_in_generate": True}
    expected, found = once(one_of.generate, inputs=IDS[:, :18], **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert found.cache.get_seq_length() == expected.cache.get_seq_length() == 20
    assert getattr(found, name) is found.cache


def test_unknown_arguments_are_refused(one_of):
    for call in (one_of, one_of.model):
        with pytest.raises(TypeError, match=r"does not know the arguments \['attention_masks', 'labls'\]"):
            call(IDS, labls=IDS, attention_masks=torch.ones_like(IDS), head_mask=None)
        with pytest.raises(TypeError, match=r"does not know the arguments \['is_causal'\]"):
            call(IDS, is_causal=False)
    with pytest.raises(ValueError, match=r"`model_kwargs` are not used by the model: \['cach'\]"):
        one_of.generate(IDS, max_new_tokens=2, cach=1)


def test_arguments_that_transformers_hands_to_any_model(one_of):
    expected = one_of(IDS, labels=IDS)
    given = one_of(
        input_ids=IDS,
        labels=IDS,
        num_items_in_batch=torch.tensor(2 * IDS[:, 1:].numel()),
        output_router_logits=False,
        is_causal=True,
        seq_idx=None,
        cu_seq_lens_q=None,
        max_length_q=None,
        output_hidden_states=False,
        return_dict=False,
    )
    assert isinstance(given, tuple)
    torch.testing.assert_close(given[0], expected.loss / 2)
    assert torch.equal(given[1], expected.logits)
    assert write(one_of, IDS, output_router_logits=False, output_hidden_states=False).shape == (3, NEW)
    shifted = one_of(IDS[:, :-1], labels=IDS[:, :-1], shift_labels=IDS[:, 1:])
    torch.testing.assert_close(shifted.loss, expected.loss)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt_lookup_num_tokens": 2}, ValueError, "stateful|takes back tokens"),
        ({"cache_implementation": "static"}, ValueError, "`cache_implementation='static'` is not possible"),
        ({"attention_mask": (torch.arange(LENGTH) < 5).long()[None]}, ValueError, "padded on the right"),
        ({"cache": "static"}, TypeError, "this model needs a TTT"),
    ],
)
def test_what_generate_refuses(family, one_of, arguments, error, message):
    if family.cache_class is DynamicCache and "prompt_lookup_num_tokens" not in arguments:
        pytest.skip("transformers' caches are those of this family")
    if arguments.get("cache") == "static":
        arguments = {"cache": StaticCache(config=one_of.config, max_cache_len=40)}
    with pytest.raises(error, match=message):
        one_of.generate(IDS[:1], max_new_tokens=5, **arguments)
