"""What the model returns: its fields, logits, hidden states and attentions, with gradients and without."""

import pytest
import torch

from ttt_e2e import TTTE2ECache

from .helpers import (
    BATCH,
    LENGTH,
    VOCAB,
    WINDOW,
    gradients,
    padded,
    random_ids,
    small_model,
)


def test_fields_of_ours_come_last():
    model = small_model()
    ids = random_ids(2, LENGTH)
    outputs = model(ids, labels=ids, use_cache=True, output_hidden_states=True, output_attentions=True)
    names = "loss logits cache hidden_states attentions token_nll inner_loss inner_grad_norm"
    assert list(outputs.keys()) == names.split()
    assert torch.equal(outputs[0], outputs.loss) and torch.equal(outputs[1], outputs.logits)
    as_tuple = model(ids, labels=ids, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 5
    torch.testing.assert_close(as_tuple[:2], (outputs.loss, outputs.logits))
    torch.testing.assert_close(as_tuple[2:], (outputs.token_nll, outputs.inner_loss, outputs.inner_grad_norm))
    ignored = set(model.config.keys_to_ignore_at_inference)
    assert ignored == {"cache", "token_nll", "inner_loss", "inner_grad_norm"}


def test_token_nll_is_the_negative_log_likelihood_of_the_next_label():
    model = small_model()
    ids = random_ids(2, LENGTH)
    labels = random_ids(2, LENGTH, seed=1)
    labels[0, 3:9] = -100
    outputs = model(ids, labels=labels)
    nll = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    ).view(2, LENGTH - 1)
    assert outputs.token_nll.dtype == torch.float32
    torch.testing.assert_close(outputs.token_nll, nll)
    assert outputs.token_nll[0, 2:8].tolist() == [0] * 6
    torch.testing.assert_close(outputs.loss, nll.sum() / (labels[:, 1:] != -100).sum())
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=10).loss, nll.sum() / 10)
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=torch.tensor(10)).loss, nll.sum() / 10)


def test_labels_that_are_already_shifted():
    model = small_model()
    ids = random_ids(2, LENGTH + 1)
    shifted = model(ids[:, :-1], shift_labels=ids[:, 1:])
    assert shifted.token_nll.shape == (2, LENGTH)
    torch.testing.assert_close(shifted.token_nll[:, :-1], model(ids[:, :-1], labels=ids[:, :-1]).token_nll)
    torch.testing.assert_close(shifted.loss, shifted.token_nll.mean())


def test_skipping_the_logits_changes_nothing_else():
    model = small_model()
    ids = random_ids(2, LENGTH)
    full, lean = model(ids, labels=ids), model(ids, labels=ids, skip_logits=True)
    assert lean.logits is None
    torch.testing.assert_close(lean.loss, full.loss)
    torch.testing.assert_close(lean.token_nll, full.token_nll)
    torch.testing.assert_close(lean.inner_loss, full.inner_loss)


def test_skipping_the_logits_never_holds_more_than_a_mini_batch_of_them():
    model = small_model()
    sizes = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[1]))
    ids = random_ids(1, 6 * BATCH + 1)
    for learning in (True, False):
        model(ids, labels=ids, skip_logits=True, test_time_training=learning)
    assert max(sizes) <= BATCH and sum(sizes) <= 2 * ids.shape[1]


@pytest.mark.parametrize("differentiable", [True, False])
@pytest.mark.parametrize("side", ["none", "left"])
def test_logits_to_keep(differentiable, side):
    model = small_model()
    ids, mask, _ = padded("left")
    arguments = {} if side == "none" else {"attention_mask": mask}
    with torch.set_grad_enabled(differentiable):
        logits = model(ids, **arguments).logits
        assert logits.shape == (4, LENGTH, VOCAB)
        for keep in (1, 5, LENGTH, LENGTH + 9):
            torch.testing.assert_close(model(ids, logits_to_keep=keep, **arguments).logits, logits[:, -keep:])
        chosen = torch.tensor([0, BATCH, LENGTH - 1])
        torch.testing.assert_close(model(ids, logits_to_keep=chosen, **arguments).logits, logits[:, chosen])


@pytest.mark.parametrize(
    ("arguments", "returned"),
    [({}, True), ({"use_cache": False}, False), ({"labels": True}, False), ({"labels": True, "use_cache": True}, True)],
)
def test_a_learned_context_is_returned_unless_training_or_scoring(arguments, returned):
    model = small_model()
    ids = random_ids(1, LENGTH)
    arguments = {key: ids if key == "labels" else value for key, value in arguments.items()}
    assert (model(ids, **arguments).cache is not None) == returned
    assert model.train()(ids).cache is None


@pytest.mark.parametrize("learning", [True, False])
def test_hidden_states_are_those_between_the_blocks(learning):
    model = small_model(torch.float64)
    ids = random_ids(2, LENGTH)
    outputs = model(ids, output_hidden_states=True, test_time_training=learning)
    states = outputs.hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    assert all(state.shape == (2, LENGTH, 32) for state in states)
    torch.testing.assert_close(states[0], model.model.embed_tokens(ids))
    torch.testing.assert_close(model.lm_head(states[-1]), outputs.logits)
    base = model.model(ids, test_time_training=learning)
    torch.testing.assert_close(base.last_hidden_state, states[-1])
    model.train().activation_checkpointing_enable()
    again = model(ids, output_hidden_states=True, test_time_training=learning).hidden_states
    torch.testing.assert_close(again, states)
    model.eval()
    # the plain prefix again, block by block
    seen = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
        for layer in model.model.layers[:2]
    ]
    model(ids, test_time_training=learning)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(torch.stack(states[1:3]), torch.stack(seen))


def test_attentions_are_those_of_the_whole_call():
    """Every block, the suffix too: rows sum to one, and only the window is seen."""
    model = small_model(torch.float64, num_key_value_heads=2)
    ids = random_ids(2, LENGTH)
    outputs = model(ids, output_attentions=True)
    query, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    visible = (key <= query) & (key > query - WINDOW)
    assert len(outputs.attentions) == 4
    for weights in outputs.attentions:
        assert weights.shape == (2, 4, LENGTH, LENGTH)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, LENGTH, dtype=torch.float64))
        assert (weights[..., visible] > 0).all() and (weights[..., ~visible] == 0).all()
    torch.testing.assert_close(outputs.logits, model(ids).logits)


def test_attentions_of_padded_rows_and_of_later_calls():
    model = small_model(torch.float64)
    ids, mask, lengths = padded("left")
    batch = model(ids, attention_mask=mask, output_attentions=True).attentions
    for row, length in enumerate(lengths):
        alone = model(ids[row, -length:][None], output_attentions=True).attentions
        for together, own in zip(batch, alone, strict=True):
            torch.testing.assert_close(together[row, :, -length:, -length:], own[0])
            assert not together[row, :, :-length].any() and not together[row, :, :, :-length].any()
    mask = torch.ones_like(ids)
    mask[1] = 0  # a row without any token
    for weights, own in zip(model(ids, attention_mask=mask, output_attentions=True).attentions, batch, strict=True):
        assert not weights[1].any() and weights[0].any() and weights.shape == own.shape
    whole, cache, split = model(ids, output_attentions=True).attentions, TTTE2ECache(model.config), BATCH + 3
    model(ids[:, :split], cache=cache)
    rest = model(ids[:, split:], cache=cache, output_attentions=True).attentions
    for weights, later in zip(whole, rest, strict=True):
        torch.testing.assert_close(later, weights[:, :, split:])


@pytest.mark.parametrize("differentiable", [True, False])
def test_inputs_embeds_beside_their_ids_are_learned_from(differentiable):
    model = small_model()
    ids = random_ids(2, LENGTH)
    embeddings = model.get_input_embeddings()(ids)
    with torch.set_grad_enabled(differentiable):
        expected = model(ids, labels=ids)
        outputs = model(ids, inputs_embeds=embeddings, labels=ids)
        plain = model(inputs_embeds=embeddings, test_time_training=False)
        expected_plain = model(ids, test_time_training=False)
    torch.testing.assert_close(outputs.logits, expected.logits)
    torch.testing.assert_close(outputs.inner_loss, expected.inner_loss)
    torch.testing.assert_close(plain.logits, expected_plain.logits)
    other = model(ids, inputs_embeds=embeddings + 0.1).logits
    assert (other - expected.logits).abs().max() > 1e-3


def test_every_parameter_receives_gradient():
    for changes in ({}, {"tie_word_embeddings": False, "attention_bias": True}, {"use_prime_mlp": False}):
        model = small_model(**changes)
        ids = random_ids(2, LENGTH)
        model(ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_gradient_accumulation_is_the_gradient_of_the_whole_batch():
    model = small_model(torch.float64)
    ids = random_ids(4, LENGTH)
    labels = ids.clone()
    labels[0, 5:] = -100
    items = (labels[:, 1:] != -100).sum()
    model(ids, labels=labels).loss.backward()
    together = gradients(model)
    model.zero_grad()
    for part in (slice(0, 1), slice(1, 4)):
        model(ids[part], labels=labels[part], num_items_in_batch=items).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, together[name], rtol=1e-9, atol=1e-11)


def test_the_same_call_twice_is_bit_identical():
    results = []
    for _ in range(2):
        model = small_model().train()
        ids = random_ids(2, LENGTH)
        outputs = model(ids, labels=ids)
        outputs.loss.backward()
        results.append([outputs.logits, outputs.token_nll, *gradients(model).values()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_reading_leaves_the_slow_weights_alone():
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model(random_ids(2, 5 * BATCH))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
