"""TTT-KVB: the analytic inner gradient is autograd's, and the way a text reaches the layer changes nothing."""

from dataclasses import replace

import pytest
import torch

from ttt_e2e.ttt_kvb import (
    KVBRule,
    KVBTokens,
    SwiGLUWeights,
    kvb_initial_state,
    kvb_scan,
    kvb_step,
    row_norms,
    swiglu,
    token_learning_rates,
    unit_view,
)

from .ttt_kvb_reference import kvb_scan_by_autograd, kvb_step_by_autograd

ROWS, HEADS, CHANNELS, VALUE_CHANNELS, HIDDEN, SIZE = 3, 2, 4, 5, 6, 4
LENGTH = 3 * SIZE + 2
PLAIN = KVBRule(SIZE, weight_norm=False)
FULL = KVBRule(SIZE, weight_norm=True, momentum=True)
KEY = KVBRule(SIZE, output_rule="key", weight_norm=True, momentum=True)
RULES = [PLAIN, KVBRule(SIZE), KVBRule(SIZE, weight_norm=False, momentum=True), FULL, KEY]


def random_weights(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(HEADS, HIDDEN, CHANNELS)] * 2 + [(HEADS, VALUE_CHANNELS, HIDDEN)]
    return SwiGLUWeights(*(torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes))


def random_text(rule, length=LENGTH, rows=ROWS, seed=1, dtype=torch.float64):
    """Queries (None where the rule has none) and what there is to learn."""
    generator = torch.Generator().manual_seed(seed)
    widths = (CHANNELS, CHANNELS, VALUE_CHANNELS, 3, 1)
    queries, keys, values, rates, factors = (
        torch.randn(rows, HEADS, length, width, generator=generator, dtype=dtype) for width in widths
    )
    factors = factors.sigmoid() if rule.momentum else None
    return queries if rule.output_rule == "query" else None, KVBTokens(keys, values, 0.2 * rates.exp(), factors)


def columns(text, start, stop, row=slice(None)):
    queries, tokens = text
    return (None if queries is None else queries[row, :, start:stop]), tokens.each(lambda t: t[row, :, start:stop])


def read(rule, text, state=None, **arguments):
    state = state or kvb_initial_state(random_weights(), len(text[1].keys), rule)
    return kvb_scan(state, *text, rule, **arguments)


def assert_close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def assert_same_state(one, other):
    assert one.counts == other.counts
    for kind in ("weights", "momentum", "norms"):
        ours, theirs = getattr(one.memory, kind), getattr(other.memory, kind)
        assert (ours is None) == (theirs is None)
        for a, b in zip(ours or (), theirs or (), strict=True):
            assert_close(a, b)
    for a, b in zip(one.pending, other.pending, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b)


def outer_gradients(function, leaves):
    """Gradients of a fixed random functional of all that `function` returns, None where a leaf is not used."""
    tensors = function(*leaves)
    generator = torch.Generator().manual_seed(9)
    loss = sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in tensors)
    return torch.autograd.grad(loss, leaves)


def all_leaves(rule, length=LENGTH):
    queries, tokens = random_text(rule, length)
    given = [*random_weights(), *(t for t in (queries, *tokens) if t is not None)]
    return [tensor.clone().requires_grad_() for tensor in given]


def split_leaves(rule, leaves):
    weights, rest = SwiGLUWeights(*leaves[:3]), list(leaves[3:])
    queries = rest.pop(0) if rule.output_rule == "query" else None
    return weights, queries, KVBTokens(*rest)


@pytest.mark.parametrize("rule", RULES)
def test_step_equals_autograd_in_outputs_memory_and_outer_gradients(rule):
    def run(step):
        def function(*leaves):
            weights, queries, tokens = split_leaves(rule, leaves)
            memory = kvb_initial_state(weights, ROWS, rule).memory
            outputs, memory = step(memory, queries, tokens, rule)
            outputs_again, memory = step(memory, queries, tokens, rule)  # with a momentum that is not zero
            return outputs, outputs_again, *memory.weights, *(memory.momentum or ())

        return function

    leaves = all_leaves(rule, SIZE)
    for ours, theirs in zip(run(kvb_step)(*leaves), run(kvb_step_by_autograd)(*leaves), strict=True):
        assert_close(ours, theirs)
    ours, theirs = (outer_gradients(run(step), leaves) for step in (kvb_step, kvb_step_by_autograd))
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 1e-3
        assert_close(a, b)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [1, SIZE, 2 * SIZE, LENGTH])
def test_scan_equals_a_loop_of_reference_steps(rule, length):
    text = random_text(rule, length)
    outputs, state = read(rule, text)
    memory = kvb_initial_state(random_weights(), ROWS, rule).memory
    expected, memory = kvb_scan_by_autograd(memory, *text, rule)
    assert_close(outputs, expected.detach())
    for ours, theirs in zip(state.memory.weights, memory.weights, strict=True):
        assert_close(ours, theirs.detach())
    assert state.counts == ((length - 1) % SIZE + 1,) * ROWS


@pytest.mark.parametrize("rule", [FULL, KEY])
@pytest.mark.parametrize("every", [None, 1, 2, 100])
def test_outer_gradients_of_a_scan_with_and_without_checkpointing(rule, every):
    def ours(*leaves):
        weights, queries, tokens = split_leaves(rule, leaves)
        outputs, state = kvb_scan(kvb_initial_state(weights, ROWS, rule), queries, tokens, rule, checkpoint_every=every)
        return outputs, *state.memory.weights

    def theirs(*leaves):
        weights, queries, tokens = split_leaves(rule, leaves)
        memory = kvb_initial_state(weights, ROWS, rule).memory
        outputs, memory = kvb_scan_by_autograd(memory, queries, tokens, rule)
        return outputs, *memory.weights

    leaves = all_leaves(rule)
    for a, b in zip(outer_gradients(ours, leaves), outer_gradients(theirs, leaves), strict=True):
        assert_close(a, b)


def test_checkpointing_keeps_fewer_tensors():
    def stored(every):
        sizes = []
        leaves = all_leaves(FULL, 8 * SIZE)
        weights, queries, tokens = split_leaves(FULL, leaves)
        state = kvb_initial_state(weights, ROWS, FULL)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            kvb_scan(state, queries, tokens, FULL, checkpoint_every=every)
        return sum(sizes)

    assert stored(2) < stored(None) / 4


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("borders", [[5], [SIZE], [1, 4, 5, 8], [2, 3, 12], [0, 13], list(range(1, LENGTH))])
def test_any_split_into_calls_equals_one_call(rule, borders):
    text = random_text(rule)
    expected, expected_state = read(rule, text)
    outputs, state = [], None
    for start, stop in zip([0, *borders], [*borders, LENGTH], strict=True):
        output, state = read(rule, columns(text, start, stop), state)
        outputs.append(output)
    assert_close(torch.cat(outputs, dim=2), expected)
    assert_same_state(state, expected_state)


def test_outer_gradients_pass_through_a_state_between_calls():
    def run(*borders):
        def function(*leaves):
            weights, queries, tokens = split_leaves(FULL, leaves)
            state, outputs = kvb_initial_state(weights, ROWS, FULL), []
            for start, stop in zip([0, *borders], [*borders, LENGTH], strict=True):
                output, state = read(FULL, columns((queries, tokens), start, stop), state)
                outputs.append(output)
            return torch.cat(outputs, dim=2), *state.memory.weights

        return function

    leaves = all_leaves(FULL)
    for one, split in zip(outer_gradients(run(), leaves), outer_gradients(run(3, 9), leaves), strict=True):
        assert_close(one, split)


@pytest.mark.parametrize("rule", [FULL, KEY])
def test_each_row_equals_the_row_alone_whatever_its_fill_and_padding(rule):
    """Three calls whose rows bring 0..9 real tokens each; what stands at padding is NaN."""
    plan = [(3, 0, 5), (9, 4, 0), (1, 8, 7)]
    lengths = [sum(call[row] for call in plan) for row in range(ROWS)]
    text, state, done = random_text(rule, max(lengths)), None, [0] * ROWS
    outputs = [[] for _ in range(ROWS)]
    for counts in plan:
        width = max(counts) + 1
        queries, tokens = columns(text, 0, width)

        def placed(tensor, whole, counts=counts, width=width):
            tensor = torch.full_like(tensor.expand(-1, -1, width, -1), torch.nan)
            for row, count in enumerate(counts):
                tensor[row, :, :count] = whole[row, :, done[row] : done[row] + count]
            return tensor

        call = (
            None if queries is None else placed(queries, text[0]),
            KVBTokens(*(placed(t, whole) for t, whole in zip(tokens, text[1], strict=True))),
        )
        output, state = read(rule, call, state, counts=counts)
        for row, count in enumerate(counts):
            outputs[row].append(output[row, :, :count])
            assert not output[row, :, count:].any()
            done[row] += count
    for row, length in enumerate(lengths):
        expected, expected_state = read(rule, columns(text, 0, length, slice(row, row + 1)))
        assert_close(torch.cat(outputs[row], dim=1), expected[0])
        assert_same_state(state.select([row]), expected_state)


def test_padding_takes_no_gradient():
    queries, tokens = random_text(FULL)
    queries.requires_grad_()
    keys = tokens.keys.requires_grad_()
    outputs, _ = read(FULL, (queries, tokens), counts=(LENGTH, 5, 9))
    outputs.sum().backward()
    for gradient in (queries.grad, keys.grad):
        assert not gradient[1, :, 5:].any() and not gradient[2, :, 9:].any()
    assert queries.grad[1, :, :5].all() and queries.grad[2, :, :9].all()


@pytest.mark.parametrize("changed", [0, SIZE - 1, SIZE, 2 * SIZE + 1])
def test_a_token_reaches_nothing_before_the_next_mini_batch(changed):
    queries, tokens = random_text(FULL)
    moved = tokens.each(lambda tensor: tensor.index_add(2, torch.tensor([changed]), tensor[:, :, :1] + 0.5))
    before, after = (read(FULL, (queries, learned))[0] for learned in (tokens, moved))
    border = (changed // SIZE + 1) * SIZE
    assert torch.equal(before[:, :, :border], after[:, :, :border])
    assert ((before - after)[:, :, border:].abs().amax(dim=-1) > 0).all()


@pytest.mark.parametrize("rule", [FULL, KEY])
def test_what_is_read_reaches_only_its_own_output(rule):
    queries, tokens = random_text(rule, SIZE)
    reads = tokens.keys if queries is None else queries
    reads.requires_grad_()
    outputs, _ = read(rule, (queries, tokens))
    (gradient,) = torch.autograd.grad(outputs[:, :, 1].sum(), reads)
    assert gradient[:, :, 1].abs().min() > 0
    assert not gradient[:, :, [0, 2, 3]].any()


def test_simplified_output_is_the_prediction_of_the_value():
    text = random_text(KEY)
    by_query = KVBRule(SIZE, weight_norm=True, momentum=True)
    assert_close(read(KEY, text)[0], read(by_query, (text[1].keys, text[1]))[0])


def test_learning_lowers_the_loss_of_what_was_read():
    queries, tokens = random_text(PLAIN, SIZE)
    tokens = tokens._replace(learning_rates=torch.full_like(tokens.learning_rates, 1e-3))
    memory = kvb_initial_state(random_weights(), ROWS, PLAIN).memory
    _, learned = kvb_step(memory, queries, tokens, PLAIN)

    def loss(weights):
        return -(swiglu(weights, tokens.keys) * tokens.values).sum(dim=(1, 2, 3))

    assert (loss(learned.weights) < loss(memory.weights)).all()


def test_zero_learning_rates_leave_the_weights_exactly_or_within_rounding():
    for rule, exact in ((PLAIN, True), (KVBRule(SIZE), False)):
        queries, tokens = random_text(rule)
        state = kvb_initial_state(random_weights(), ROWS, rule)
        _, after = kvb_scan(
            state, queries, tokens._replace(learning_rates=torch.zeros_like(tokens.learning_rates)), rule
        )
        for old, new in zip(state.memory.weights, after.memory.weights, strict=True):
            assert torch.equal(old, new) if exact else True
            assert_close(old, new)


def test_weight_normalisation_keeps_row_norms_and_off_does_not():
    for rule in (KVBRule(SIZE), PLAIN):
        _, state = read(rule, random_text(rule))
        pairs = zip(row_norms(state.memory.weights), state.memory.norms, strict=True)
        kept = [torch.allclose(now, first, rtol=1e-12) for now, first in pairs]
        assert all(kept) if rule.weight_norm else not any(kept)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_zero_rows_of_weights_stay_zero_with_finite_gradients(rate):
    weights = SwiGLUWeights(*(tensor.clone() for tensor in random_weights()))
    weights.down[:, 1].zero_()
    leaves = [tensor.requires_grad_() for tensor in weights]
    queries, tokens = random_text(FULL)
    tokens = tokens._replace(learning_rates=torch.full_like(tokens.learning_rates, rate))
    outputs, state = kvb_scan(kvb_initial_state(weights, ROWS, FULL), queries, tokens, FULL)
    assert not state.memory.weights.down[:, :, 1].any()
    gradients = torch.autograd.grad(outputs.sum() + sum(w.sum() for w in state.memory.weights), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_state_does_not_grow_and_holds_no_memory_of_the_text():
    def bytes_held(length):
        _, state = read(FULL, random_text(FULL, length))
        return sum(tensor.untyped_storage().nbytes() for tensor in state.pending)

    assert bytes_held(SIZE) == bytes_held(20 * SIZE) > 0


def test_half_precision_is_computed_in_float32_under_autocast_too():
    queries, tokens = random_text(PLAIN, dtype=torch.float32)
    queries, tokens = queries.bfloat16(), tokens.each(torch.Tensor.bfloat16)
    state = kvb_initial_state(random_weights(dtype=torch.bfloat16), ROWS, PLAIN)
    assert state.memory.weights.gate.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, after = kvb_scan(state, queries, tokens, PLAIN)
    wide = SwiGLUWeights(*(w.to(torch.bfloat16).double() for w in random_weights(dtype=torch.bfloat16)))
    expected, _ = kvb_scan(
        kvb_initial_state(wide, ROWS, PLAIN), queries.double(), tokens.each(torch.Tensor.double), PLAIN
    )
    assert outputs.dtype == after.memory.weights.down.dtype == torch.float32
    assert expected.dtype == torch.float64
    torch.testing.assert_close(outputs.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_selected_rows_are_continued_as_their_originals():
    text, more = random_text(FULL), random_text(FULL, 6, seed=5)
    _, state = read(FULL, text, counts=(LENGTH, 3, 6))
    chosen = [2, 1, 2]
    expected, expected_state = read(FULL, more, state)
    outputs, after = read(FULL, (more[0][chosen], more[1].each(lambda t: t[chosen])), state.select(chosen))
    assert_close(outputs, expected[chosen])
    assert_same_state(after, expected_state.select(chosen))


def test_detached_state_has_no_graph():
    leaves = all_leaves(FULL)
    weights, queries, tokens = split_leaves(FULL, leaves)
    _, state = kvb_scan(kvb_initial_state(weights, ROWS, FULL), queries, tokens, FULL)
    assert state.memory.weights.gate.requires_grad and state.pending.keys.requires_grad
    detached = state.detach()
    tensors = [*detached.memory.weights, *detached.memory.norms, *detached.memory.momentum, *detached.pending]
    assert not any(tensor.requires_grad for tensor in tensors)
    assert_same_state(detached, state)


def test_no_tokens_at_all_change_nothing():
    state = kvb_initial_state(random_weights(), ROWS, FULL)
    outputs, after = kvb_scan(state, *random_text(FULL, 3), FULL, counts=(0, 0, 0))
    assert outputs.shape == (ROWS, HEADS, 3, VALUE_CHANNELS) and not outputs.any()
    assert_same_state(after, state)


def test_views_and_learning_rates():
    projected = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    view = unit_view(projected)
    assert_close(view.norm(dim=-1), torch.ones(2, 3, 4, dtype=torch.float64))
    assert_close(
        view * torch.nn.functional.silu(projected).norm(dim=-1, keepdim=True), torch.nn.functional.silu(projected)
    )
    assert unit_view(torch.zeros(1, 4)).isfinite().all()
    rates = token_learning_rates(torch.tensor([-50.0, 0.0, 5.0]).bfloat16(), 1e-3)
    assert rates.dtype == torch.float32 and rates[0] >= 0 and rates[2] > rates[1]
    assert abs(rates[1].item() - 1e-3) < 1e-8


def test_contradictions_raise_before_any_work():
    text = random_text(FULL)
    state = kvb_initial_state(random_weights(), ROWS, FULL)
    queries, tokens = text
    cases = [
        ("queries", (None, tokens), FULL, {}),
        ("queries", text, KEY, {}),
        ("momentum", text, KVBRule(SIZE), {}),
        ("momentum_factors", (queries, tokens._replace(momentum_factors=None)), FULL, {}),
        ("learning_rates", (queries, tokens._replace(learning_rates=tokens.learning_rates[..., :1])), FULL, {}),
        ("counts", text, FULL, {"counts": (1, 2)}),
        ("counts", text, FULL, {"counts": (1, 2, LENGTH + 1)}),
        ("checkpoint_every", text, FULL, {"checkpoint_every": 0}),
    ]
    for word, arguments, rule, options in cases:
        with pytest.raises(ValueError, match=word):
            kvb_scan(state, *arguments, rule, **options)
    with pytest.raises(ValueError, match="batch"):
        kvb_step(state.memory, *text, FULL)
    with pytest.raises(ValueError, match="output_rule"):
        replace(FULL, output_rule="value")
    with pytest.raises(ValueError, match="mini_batch_size"):
        replace(FULL, mini_batch_size=0)
    wrong = random_weights()._replace(up=torch.randn(HEADS, HIDDEN, CHANNELS + 1))
    with pytest.raises(ValueError, match="weights"):
        kvb_initial_state(wrong, ROWS, FULL)
