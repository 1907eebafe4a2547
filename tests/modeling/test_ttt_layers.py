"""TTT-Linear and TTT-MLP models compute the same whichever way a text is read, and train."""

import math
import pickle

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from ttt_e2e import TTTLayersCache
from ttt_e2e.ttt_linear_mlp import primal_step
from ttt_e2e.ttt_mixers import TTTMixer

from .helpers import loss_and_gradients, random_ids
from .ttt_layers import CLOSE, LENGTH, MIXES, SIZE, VOCAB, WINDOW, layers_config, layers_model, padded, read

IDS = random_ids(3, LENGTH)
SIDES = ["left", "right", "between"]


@pytest.fixture(scope="module", params=MIXES)
def mix(request):
    return request.param


@pytest.fixture(scope="module")
def model(mix):
    return layers_model(mix)


@pytest.fixture(scope="module")
def logits(model):
    with torch.no_grad():
        return model(IDS).logits


# ------------------------------------------------------------------------------------------------------- reading


def test_a_token_depends_on_all_before_it_and_on_none_after(model, logits):
    changed = IDS.clone()
    changed[:, 2] = (changed[:, 2] + 1) % VOCAB
    with torch.no_grad():
        other = model(changed).logits
    torch.testing.assert_close(other[:, :2], logits[:, :2], **CLOSE)
    assert (other[:, 2 + WINDOW :] - logits[:, 2 + WINDOW :]).abs().amax(dim=(0, 2)).min() > 1e-6


@pytest.mark.parametrize("sizes", [1, SIZE, [3, 1, 6, 9], [LENGTH - 1, 1], [2, LENGTH - 2]], ids=str)
def test_pieces_are_read_as_the_whole(model, logits, sizes):
    """Any number of tokens goes onto a cache at any place of a mini-batch, convolutions included."""
    torch.testing.assert_close(read(model, IDS, sizes)[0], logits, **CLOSE)


def test_segments_without_gradients_change_nothing(model, logits, monkeypatch):
    monkeypatch.setattr("ttt_e2e.modeling_ttt_layers.SEGMENT_TOKENS", SIZE + 1)
    columns, mask = padded(IDS, "between")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, logits, **CLOSE)
        found = model(columns, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(found, logits.flatten(0, 1), **CLOSE)


@pytest.mark.parametrize("mix", ["everything", "attention-only"])
def test_a_text_of_many_windows_is_attended_to_block_by_block(mix):
    model, ids = layers_model(mix), random_ids(2, 6 * WINDOW)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    whole = read(model, ids, 6 * WINDOW, mask)[0]
    for sizes in ([1] * 6 * WINDOW, [5, 6 * WINDOW - 5]):
        torch.testing.assert_close(read(model, ids, sizes, mask)[0][mask.bool()], whole[mask.bool()], **CLOSE)


def test_a_row_of_a_batch_is_the_row_alone(model, logits):
    with torch.no_grad():
        torch.testing.assert_close(model(IDS[1:2]).logits, logits[1:2], **CLOSE)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("sizes", [LENGTH + 9, 1, [4, 12, 12]], ids=["whole", "tokens", "pieces"])
def test_padding_changes_nothing(model, logits, side, sizes):
    """Whatever stands in it, wherever it stands, and in whichever pieces it is read."""
    columns, mask = padded(IDS, side)
    found, cache = read(model, columns, sizes, mask)
    torch.testing.assert_close(found[mask.bool()], logits.flatten(0, 1), **CLOSE)
    assert cache.tokens == (LENGTH,) * 3 and cache.get_seq_length() == LENGTH + 9


@pytest.mark.parametrize("sizes", [LENGTH, 1, [5, 6, 8]], ids=["whole", "tokens", "pieces"])
def test_rows_of_unequal_length(model, logits, sizes):
    mask = torch.ones_like(IDS)
    mask[0, : SIZE + 1], mask[1, 2:7], mask[2, 5:] = 0, 0, 0
    found, cache = read(model, IDS, sizes, mask)
    assert cache.tokens == tuple(mask.sum(dim=1).tolist())
    for row in range(3):
        own = mask[row].bool()
        with torch.no_grad():
            alone = model(IDS[row : row + 1, own]).logits[0]
        torch.testing.assert_close(found[row, own], alone, **CLOSE)


def test_padding_changes_no_gradient(model):
    columns, mask = padded(IDS, "between")
    labels = torch.cat([IDS[:, 1:], IDS[:, :1]], dim=1)
    spread = torch.full_like(columns, -100)
    spread[mask.bool()] = labels.flatten()
    plain = loss_of_gradients(model, IDS, labels, None)
    torch.testing.assert_close(loss_of_gradients(model, columns, spread, mask), plain, **CLOSE)


def loss_of_gradients(model, ids, labels, mask):
    model.zero_grad()
    loss = model(ids, attention_mask=mask, shift_labels=labels).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def test_reading_on_after_the_longest_pause(model):
    """A call in which a row has nothing but padding leaves it as it was."""
    cache = read(model, IDS[:, :6], 6)[1]
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[1, 6:] = 0
    with torch.no_grad():
        model(IDS[:, 6:11], attention_mask=mask, cache=cache)
        after = model(IDS[:, 11:12], cache=cache).logits
        skipped = torch.cat([IDS[1:2, :6], IDS[1:2, 11:12]], dim=1)
        torch.testing.assert_close(after[1:2], model(skipped).logits[:, -1:], **CLOSE)
        torch.testing.assert_close(after[:1], model(IDS[:1, :12]).logits[:, -1:], **CLOSE)
        empty = model(IDS[:, :2], attention_mask=torch.zeros(3, 2)).logits
    assert empty.isfinite().all()


def test_logits_to_keep_hidden_states_and_embeddings(model, logits, mix):
    columns, mask = padded(IDS, "left")
    with torch.no_grad():
        output = model(IDS, logits_to_keep=2, output_hidden_states=True, use_cache=False)
        shifted = model(columns, attention_mask=mask, output_hidden_states=True)
        embedded = model(inputs_embeds=model.get_input_embeddings()(IDS)).logits
        as_tuple = model(IDS, return_dict=False, use_cache=False)
    torch.testing.assert_close(output.logits, logits[:, -2:], **CLOSE)
    torch.testing.assert_close(embedded, logits, **CLOSE)
    assert output.cache is None and torch.equal(as_tuple[0], logits)
    assert [list(state.shape) for state in output.hidden_states] == [[3, LENGTH, 24]] * (len(model.model.layers) + 1)
    for plain, other in zip(output.hidden_states, shifted.hidden_states, strict=True):
        torch.testing.assert_close(other[:, 9:], plain, **CLOSE)


def test_attention_weights_come_from_the_attention_blocks(mix):
    model = layers_model(mix, attn_implementation="eager")
    columns, mask = padded(IDS, "between")
    with torch.no_grad():
        attentions = model(columns, attention_mask=mask, output_attentions=True).attentions
    attending = ("sliding_attention", "full_attention", "ttt_kvb")
    assert len(attentions) == sum(name in attending for name in MIXES[mix]["mixer_types"])
    for weights in attentions:
        assert list(weights.shape) == [3, 3, LENGTH + 9, LENGTH + 9]
        torch.testing.assert_close(weights.sum(-1)[:, 0], mask.double(), **CLOSE)


def test_positions_may_be_given(model, logits):
    """They turn attention's queries and keys, which see only differences; TTT blocks count tokens themselves.

    Only the fast weights of TTT-KVB see positions themselves, as in LaCT.
    """
    with torch.no_grad():
        moved = model(IDS, position_ids=torch.arange(LENGTH)[None] + 1000).logits
    if "ttt_kvb" in model.config.mixer_types:
        assert (moved - logits).abs().max() > 1e-3
    else:
        torch.testing.assert_close(moved, logits, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- the cache


def test_the_cache_does_not_grow(mix):
    if "full_attention" in MIXES[mix]["mixer_types"]:
        mix = "mamba-backbone"
    model, cache, sizes = layers_model(mix), None, []
    for _ in range(9):
        cache = model(random_ids(2, SIZE + 1), cache=cache, use_cache=True).cache
        sizes.append(cache.nbytes)
    assert sizes[1:5] == sizes[5:9]  # at the same places of a mini-batch
    assert cache.nbytes == sum(t.untyped_storage().nbytes() for t in tensors_of(cache.states))


def tensors_of(states):
    if torch.is_tensor(states):
        return [states]
    return [] if states is None else [tensor for part in states for tensor in tensors_of(part)]


def test_backward_through_a_call_that_fills_a_cache(model):
    """Nothing in a cache is written in place, and nothing in it holds a graph."""
    loss, expected = loss_and_gradients(model, IDS, use_cache=False)
    again, gradients = loss_and_gradients(model, IDS, use_cache=True)
    assert again == loss
    torch.testing.assert_close(gradients, expected, rtol=0, atol=0)
    model.zero_grad()
    first = model(IDS[:, :6], labels=IDS[:, :6], use_cache=True)
    cache = first.cache
    assert not any(tensor.requires_grad for tensor in tensors_of(cache.states))
    second = model(IDS[:, 6:], labels=IDS[:, 6:], cache=cache)
    (first.loss + second.loss).backward()


def test_a_cache_that_is_read_without_being_used_stays_as_it_is(model, logits):
    cache = read(model, IDS[:, :6], 6)[1]
    for _ in range(2):
        with torch.no_grad():
            output = model(IDS[:, 6:], cache=cache, use_cache=False)
        assert output.cache is None and cache.get_seq_length() == 6
        torch.testing.assert_close(output.logits, logits[:, 6:], **CLOSE)


def test_a_fork_and_a_change_of_weights_leave_a_cache_alone(mix):
    model = layers_model(mix)
    cache = read(model, IDS[:, :2], 2)[1]
    fork, copies = cache.fork(), [tensor.clone() for tensor in tensors_of(cache.states)]
    read_on = model(IDS[:, 2:9], cache=fork)
    assert read_on.cache is fork and (cache.get_seq_length(), fork.get_seq_length()) == (2, 9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert all(torch.equal(*pair) for pair in zip(tensors_of(cache.states), copies, strict=True))
    fork.reset()
    assert (fork.get_seq_length(), fork.is_initialized, fork.batch_size) == (0, False, -1)


def test_a_cache_from_inference_mode_can_be_trained_on(model, logits):
    with torch.inference_mode():
        cache = model(IDS[:, :6], use_cache=True).cache
    output = model(IDS[:, 6:], labels=IDS[:, 6:], cache=cache)
    output.loss.backward()
    torch.testing.assert_close(output.logits, logits[:, 6:], **CLOSE)


def test_a_pickled_cache_holds_no_more_than_it_shows(model):
    """Neither what a fork has read since, nor what happened to be in memory."""
    ids = torch.cat([IDS, IDS], dim=1)
    cache = read(model, ids, ids.shape[1])[1]
    for _ in range(2):
        with torch.no_grad():  # makes free places, and takes some of them
            model(IDS[:, :1], cache=cache.fork(), use_cache=True)
            model(IDS[:, :1], cache=cache, use_cache=True)
    again = pickle.loads(pickle.dumps(cache))
    for own, other in zip(tensors_of(again.states), tensors_of(cache.states), strict=True):
        assert torch.equal(own, other) and own.untyped_storage().nbytes() == own.nbytes


@pytest.mark.parametrize("how", ["reorder", "repeat", "select", "mask"])
def test_rows_of_a_cache_can_be_chosen(model, how):
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    cache = read(model, IDS[:, :-1], LENGTH - 1, mask)[1]
    order = {"reorder": [2, 0, 0], "repeat": [0, 0, 1, 1, 2, 2], "select": [1, 0], "mask": [0, 2]}[how]
    if how == "reorder":
        cache.reorder_cache(torch.tensor(order))
    elif how == "repeat":
        cache.batch_repeat_interleave(2)
    else:
        cache.batch_select_indices(torch.tensor(order if how == "select" else [True, False, True]))
    order = torch.tensor(order)
    with torch.no_grad():
        after = model(IDS[order, -1:], cache=cache).logits
        expected = model(IDS[order], attention_mask=mask[order]).logits[:, -1:]
    torch.testing.assert_close(after, expected, **CLOSE)


# ------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_gets_a_gradient(mix, tied):
    model = layers_model(mix, torch.float32, tie_word_embeddings=tied, attention_bias=True).train()
    output = model(IDS, labels=IDS)
    assert output.cache is None, "a cache would only cost memory while training"
    output.loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("skip_logits", [False, True])
def test_loss_is_the_mean_over_labelled_tokens(model, logits, skip_logits, monkeypatch):
    monkeypatch.setattr("ttt_e2e.causal_lm_loss.LOSS_SEGMENT", 5)
    labels = IDS.clone()
    labels[0, :8] = -100
    expected = cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
    count = (labels[:, 1:] != -100).sum()
    with torch.no_grad():
        output = model(IDS, labels=labels, skip_logits=skip_logits)
        scaled = model(IDS, labels=labels, skip_logits=skip_logits, num_items_in_batch=2 * count).loss
        shifted = model(IDS[:, :-1], shift_labels=labels[:, 1:], skip_logits=skip_logits)
        nothing = model(IDS[:, :1], labels=IDS[:, :1], skip_logits=skip_logits)
    assert (output.logits is None) == skip_logits
    torch.testing.assert_close(output.token_nll, expected, **CLOSE)
    torch.testing.assert_close(output.loss, expected.sum() / count, **CLOSE)
    torch.testing.assert_close(scaled, expected.sum() / count / 2, **CLOSE)
    torch.testing.assert_close(shifted.token_nll, expected, **CLOSE)
    assert (nothing.loss, list(nothing.token_nll.shape)) == (0.0, [3, 0])


@pytest.mark.parametrize(("every", "reentrant"), [(None, False), (2, False), (2, True)])
def test_activation_checkpointing_changes_no_gradient(mix, every, reentrant):
    model = layers_model(mix, inner_checkpoint_every=every).train()
    loss, expected = loss_and_gradients(model, IDS, skip_logits=True)
    calls = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    again, gradients = loss_and_gradients(model, IDS, skip_logits=True)
    assert len(calls) == 2, "the block is computed once more in the backward pass"
    assert again == loss
    torch.testing.assert_close(gradients, expected, **CLOSE)


def test_primal_form_is_the_same_model(mix, monkeypatch):
    model = layers_model(mix)
    loss, expected = loss_and_gradients(model, IDS)
    monkeypatch.setattr(TTTMixer, "form", staticmethod(primal_step))
    again, gradients = loss_and_gradients(model, IDS)
    torch.testing.assert_close(again, loss, **CLOSE)
    torch.testing.assert_close(gradients, expected, rtol=1e-7, atol=1e-9)


def test_bfloat16_autocast(mix):
    model = layers_model(mix, torch.float32, initializer_range=0.1).train()
    expected, exact = loss_and_gradients(model, IDS)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(model, IDS)
        written = model.eval().generate(IDS, max_new_tokens=3, do_sample=False)
    assert loss == pytest.approx(expected.item(), rel=0.02)
    assert gradients.keys() == exact.keys() and all(g.isfinite().all() for g in gradients.values())
    assert written.shape == (3, LENGTH + 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision(mix, dtype):
    """The inner loop runs in float32, also what the cache keeps of it."""
    model = layers_model(mix, dtype, initializer_range=0.1)
    written = model.generate(IDS, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert written.sequences.shape == (3, LENGTH + 3)
    for mixer, (_, state) in zip(model.config.mixer_types, written.cache.states, strict=True):
        if mixer.startswith("ttt"):
            weights = state.weights if mixer == "ttt_kvb" else state.inner.weights
            assert all(weight.dtype == torch.float32 for weight in weights)
    with torch.no_grad():
        exact = layers_model(mix, initializer_range=0.1)(IDS, labels=IDS).loss
        assert model(IDS, labels=IDS).loss == pytest.approx(exact.item(), rel=0.03)


# ------------------------------------------------------------------------------------------------------ refusals


class TestRefusals:
    def test_neither_ids_nor_embeddings(self, model):
        with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
            model()

    def test_packed_documents(self, model):
        positions = torch.cat([torch.arange(10), torch.arange(LENGTH - 10)])[None]
        with pytest.raises(ValueError, match="`position_ids` start again inside a row"):
            model(IDS, position_ids=positions)
        with pytest.raises(ValueError, match="documents are packed into a row"):
            model(IDS, cu_seq_lens_q=torch.tensor([0, 5]))

    def test_unknown_arguments(self, model):
        with pytest.raises(TypeError, match="token_type_ids"):
            model(IDS, token_type_ids=IDS)

    def test_caches_of_others(self, model):
        with pytest.raises(TypeError, match="`cache` is a DynamicCache; this model needs a TTTLayersCache"):
            model(IDS, cache=DynamicCache())
        cache = read(model, IDS, LENGTH)[1]
        with pytest.raises(ValueError, match="holds 3 rows but the inputs have 2"):
            model(IDS[:2], cache=cache)
        cache.config = layers_config("linear", rms_norm_eps=1e-5)
        with pytest.raises(ValueError, match="another configuration"):
            model(IDS, cache=cache)
        with pytest.raises(NotImplementedError, match="cannot be rolled back"):
            cache.crop(-1)

    def test_shapes_and_ids(self, model):
        with pytest.raises(ValueError, match=r"`attention_mask` has shape \(3, 4\)"):
            model(IDS, attention_mask=torch.ones(3, 4))
        with pytest.raises(ValueError, match="outside the vocabulary of 97"):
            model(IDS + VOCAB)
        with pytest.raises(ValueError, match="`labels` holds 97"):
            model(IDS, labels=torch.full_like(IDS, VOCAB))


def test_an_empty_cache_is_a_fresh_start(model, logits):
    cache = TTTLayersCache(model.config)
    with torch.no_grad():
        output = model(IDS, cache=cache)
    assert output.cache is cache and len(cache) == len(model.model.layers)
    torch.testing.assert_close(output.logits, logits, **CLOSE)
    assert math.isclose(cache.nbytes, cache.fork().nbytes)
