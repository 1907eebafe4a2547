"""The model as a function: causality, any length, padding, its outputs, and the architectures it covers."""

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

# -------------------------------------------------------------------------------------------- causality, lengths


@pytest.mark.parametrize("differentiable", [True, False])
def test_no_prediction_depends_on_a_later_token(differentiable):
    """Row t differs from the last row in token t only; mini-batch and segment borders lie inside the text."""
    model = small_model(torch.float64)
    ids = random_ids(1, LENGTH).repeat(LENGTH + 1, 1)
    every = torch.arange(LENGTH)
    ids[every, every] = (ids[every, every] - 3 + 40) % (VOCAB - 3) + 3
    with torch.set_grad_enabled(differentiable):
        logits = model(ids).logits
    moved = (logits[:-1] - logits[-1]).abs().amax(dim=-1)  # [changed token, position]
    before = every[None, :] < every[:, None]
    assert moved[before].max() < 1e-12
    assert moved.diagonal().min() > 1e-6, "each changed token is seen at once"


def test_a_target_is_learned_only_once_it_is_read():
    """The first token of a mini-batch is the last target of the one before: it changes the weights from there on."""
    model = small_model(torch.float64)
    ids = random_ids(1, LENGTH)
    other = ids.clone()
    other[0, BATCH] = ids[0, BATCH] + 1
    steps = []
    for text in (ids, other):
        cache = TTTE2ECache(model.config)
        with torch.no_grad():
            model(text[:, :BATCH], cache=cache)
            assert not cache.has_learned
            model(text[:, BATCH : BATCH + 1], cache=cache)
        steps.append(cache.context.fast.own_copies().tensors)
    assert all((one - two).abs().max() > 1e-6 for one, two in zip(*steps, strict=True))


@pytest.mark.parametrize("differentiable", [True, False])
def test_any_length_reads_as_the_beginning_of_a_longer_text(differentiable):
    model = small_model(torch.float64)
    ids = random_ids(2, LENGTH)
    with torch.set_grad_enabled(differentiable):
        whole = model(ids, labels=ids)
        for length in range(1, LENGTH):
            part = model(ids[:, :length], labels=ids[:, :length])
            torch.testing.assert_close(part.logits, whole.logits[:, :length], rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(part.token_nll, whole.token_nll[:, : length - 1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("length", [1, BATCH, LENGTH])
def test_nothing_to_predict_is_loss_zero_and_has_a_gradient(length, checkpointing):
    model = small_model().train()
    if checkpointing:
        model.activation_checkpointing_enable()
    ids = random_ids(2, length)
    labels = ids if length == 1 else torch.full_like(ids, -100)
    outputs = model(ids, labels=labels)
    outputs.loss.backward()
    assert outputs.loss == 0 and outputs.token_nll.shape == (2, length - 1)
    assert all(not gradient.any() for gradient in gradients(model).values())


# ------------------------------------------------------------------------------------------------------ padding


@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 13}, {"layer_types": ["full_attention"] * 4}])
def test_a_padded_row_reads_as_it_would_alone(side, changes):
    model = small_model(torch.float64, **changes)
    ids, mask, lengths = padded(side)
    for differentiable in (True, False):
        with torch.set_grad_enabled(differentiable):
            batch = model(ids, attention_mask=mask, output_hidden_states=True)
            for row, length in enumerate(lengths):
                real = mask[row].bool()
                alone = model(ids[row, real][None], output_hidden_states=True)
                torch.testing.assert_close(batch.logits[row, real], alone.logits[0], rtol=1e-9, atol=1e-10)
                for states, own in zip(batch.hidden_states, alone.hidden_states, strict=True):
                    torch.testing.assert_close(states[row, real], own[0], rtol=1e-9, atol=1e-10)
                count = (length - 1) // BATCH
                assert batch.inner_loss[row].isnan().tolist() == [False] * count + [True] * (3 - count)
                if count:
                    torch.testing.assert_close(batch.inner_loss[row, :count], alone.inner_loss[0])
                    torch.testing.assert_close(batch.inner_grad_norm[row, :count], alone.inner_grad_norm[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_trains_as_its_rows_would_alone(side):
    """Same loss, nll and gradient as the rows one by one, whose losses are accumulated."""
    model = small_model(torch.float64)
    ids, mask, lengths = padded(side)
    labels = ids.masked_fill(mask == 0, -100)
    if side == "left":  # the first real token is nobody's next token
        labels = labels.scatter(1, mask.argmax(dim=1, keepdim=True), -100)
    outputs = model(ids, attention_mask=mask, labels=labels)
    outputs.loss.backward()
    together = gradients(model)
    model.zero_grad()
    items, total = sum(lengths) - len(lengths), 0.0
    for row, length in enumerate(lengths):
        own = ids[row, mask[row].bool()][None]
        alone = model(own, labels=own, num_items_in_batch=items)
        alone.loss.backward()
        total += alone.loss.item()
        start = mask[row].argmax().item()
        torch.testing.assert_close(outputs.token_nll[row, start : start + length - 1], alone.token_nll[0])
    assert outputs.loss.item() == pytest.approx(total, rel=1e-10)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("learning", [True, False])
def test_padding_predicts_nothing_even_where_its_label_is_set(learning):
    """Left padding: the last padded column would predict the first token. It is neither scored nor counted."""
    model = small_model()
    ids, mask, _ = padded("left")
    outputs = model(ids, attention_mask=mask, labels=ids, test_time_training=learning)
    real = mask[:, :-1].bool()
    assert not outputs.token_nll[~real].any() and outputs.token_nll[real].all()
    torch.testing.assert_close(outputs.loss, outputs.token_nll[real].mean())


@pytest.mark.parametrize("rows", [1, 2], ids=["one-row", "every-row"])
@pytest.mark.parametrize("differentiable", [True, False])
def test_a_row_of_nothing_but_padding_gives_nothing(rows, differentiable):
    model = small_model(torch.float64).train()
    ids = random_ids(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[:rows] = 0
    with torch.set_grad_enabled(differentiable):
        outputs = model(ids, attention_mask=mask, labels=ids, use_cache=True)
        assert not outputs.token_nll[:rows].any() and outputs.loss.isfinite()
        if rows == 1:
            torch.testing.assert_close(outputs.logits[1:], model(ids[1:]).logits, rtol=1e-9, atol=1e-10)
        after = model(ids, cache=outputs.cache).logits
        torch.testing.assert_close(after[:1], model(ids[:1]).logits, rtol=1e-9, atol=1e-10)
    if differentiable:
        outputs.loss.backward()
        assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_a_mask_of_ones_is_no_mask():
    model = small_model()
    ids = random_ids(2, LENGTH)
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, model(ids).logits)


# ------------------------------------------------------------------------------------------------------ outputs


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


# ------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_half_precision_stays_close_and_learns_in_float32(dtype, how, checkpointing):
    model = small_model().train()
    ids = random_ids(2, LENGTH)
    exact = model(ids, labels=ids)
    if how == "weights":
        model = model.to(dtype)
    if checkpointing:
        model.activation_checkpointing_enable()
    with torch.autocast("cpu", dtype=dtype, enabled=how == "autocast"):
        outputs = model(ids, labels=ids)
        cache = model.eval()(ids, cache=TTTE2ECache(model.config)).cache
    outputs.loss.backward()
    assert outputs.loss.dtype == outputs.token_nll.dtype == outputs.inner_loss.dtype == torch.float32
    assert {tensor.dtype for tensor in cache.context.fast.tensors} == {torch.float32}
    # bfloat16 keeps 8 bits: 0.4 % of logits whose size is about 3, more where rounding is learned from.
    torch.testing.assert_close(outputs.token_nll, exact.token_nll, rtol=0, atol=0.15)
    torch.testing.assert_close(outputs.loss, exact.loss, rtol=0, atol=0.03)
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in model.parameters())


def test_float64_stays_float64():
    model = small_model(torch.float64)
    ids = random_ids(1, LENGTH)
    outputs = model(ids, labels=ids)
    narrow = small_model()(ids, labels=ids)
    assert outputs.loss.dtype == outputs.token_nll.dtype == outputs.inner_loss.dtype == torch.float64
    torch.testing.assert_close(outputs.token_nll.float(), narrow.token_nll, rtol=0, atol=1e-4)
    assert (outputs.token_nll - narrow.token_nll).abs().max() > 0


def test_inference_mode_equals_no_grad():
    model = small_model()
    ids = random_ids(2, LENGTH)
    with torch.no_grad():
        expected = model(ids, labels=ids, use_cache=True)
    with torch.inference_mode():
        made_inside = ids + 0
        outputs = model(made_inside, labels=made_inside, use_cache=True)
        again = model(made_inside[:, :3], cache=outputs.cache)
    with torch.no_grad():
        expected_again = model(ids[:, :3], cache=expected.cache)
    assert torch.equal(outputs.logits, expected.logits) and torch.equal(outputs.inner_loss, expected.inner_loss)
    assert torch.equal(again.logits, expected_again.logits)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-8)])
def test_positions_are_exact_at_ten_million(dtype, tolerance):
    """Only distances matter. Angles in float32 would be off by 0.5 rad there."""
    model = small_model(dtype)
    ids = random_ids(2, LENGTH)
    positions = torch.arange(LENGTH).expand(2, -1)
    far = model(ids, position_ids=positions + 10_000_000).logits
    torch.testing.assert_close(far, model(ids).logits, rtol=0, atol=tolerance)
    gap = positions + 5 * (positions > 3)
    assert (model(ids, position_ids=gap).logits - model(ids).logits).abs().max() > 1e-3, "positions do matter"


# ------------------------------------------------------------------------------------------------ architectures
