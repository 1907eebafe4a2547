"""The model as a function: causality, any length, padding, dtypes."""

import pytest
import torch

from ttt_e2e import TTTE2ECache

from .helpers import (
    BATCH,
    LENGTH,
    VOCAB,
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
