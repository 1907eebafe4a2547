"""The inner loop of TTT-Linear and TTT-MLP: both forms, hand-written gradients, and what it is in simple cases."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import gelu, layer_norm

from ttt_e2e.tokens import MiniBatchGrid
from ttt_e2e.ttt_linear_mlp import (
    InnerLearner,
    LearnerState,
    Views,
    default_checkpoint_every,
    dual_step,
    inner_gradients,
    learn_slots,
    primal_step,
)

ROWS, HEADS, CHANNELS, WIDTH, SIZE = 2, 2, 4, 6, 3
CLOSE = {"rtol": 1e-9, "atol": 1e-10}
LEARNERS = ["linear", "linear-plain", "linear-without-bias", "mlp", "mlp-plain"]


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Problem:
    """A random inner loop over `tokens` tokens, in float64, whose every tensor takes a gradient."""

    def __init__(self, kind: str, tokens: int):
        sizes = [CHANNELS, WIDTH, CHANNELS] if kind.startswith("mlp") else [CHANNELS, CHANNELS]
        self.weights = []
        for index, (ins, outs) in enumerate(pairwise(sizes)):
            bias = random(ROWS, HEADS, 1, outs, seed=20 + index) * (kind != "linear-without-bias")
            self.weights += [random(ROWS, HEADS, ins, outs, seed=10 + index) * 0.5, bias]
        norm = tuple(1 + random(HEADS, 1, CHANNELS, seed=seed) * 0.3 for seed in (1, 2))
        self.learner = InnerLearner(None if kind.endswith(("plain", "bias")) else norm, kind != "linear-without-bias")
        self.tokens = {name: random(ROWS, tokens, HEADS, CHANNELS, seed=seed) for seed, name in enumerate("qkv", 30)}
        self.rate = 0.2 * random(ROWS, tokens, HEADS, seed=40).sigmoid()
        self.scale = random(SIZE, seed=41).sigmoid()
        self.leaves = [*self.weights, *self.tokens.values(), self.rate, self.scale, *(self.learner.norm or ())]
        for leaf in self.leaves:
            leaf.requires_grad_()

    def read(self, start: int, end: int, state: LearnerState | None, **how):
        """Outputs [rows, tokens, heads, channels] of some tokens, and the state after them."""
        grid = MiniBatchGrid.of((start,) * ROWS, (end - start,) * ROWS, end - start, SIZE, torch.device("cpu"))
        place = lambda x: grid.place(x[:, start:end]).permute(0, 3, 1, 2, 4)  # noqa: E731
        rate = grid.place(self.rate[:, start:end])
        if grid.slot_mask is not None:
            rate = rate.masked_fill(~grid.slot_mask.unflatten(1, grid.shape)[..., None], 0)
        scale = self.scale[grid.positions.unflatten(1, grid.shape)].unsqueeze(1)
        views = Views(*map(place, self.tokens.values()), rate.permute(0, 3, 1, 2), scale, self.scale[-1])
        state = state or LearnerState(tuple(self.weights), None)
        z, state = learn_slots(views, state, self.learner, grid.complete, **how)
        return grid.take(z.permute(0, 2, 3, 1, 4)), state

    def gradients(self, outputs, state):
        values = [outputs, *state.weights, *(state.sums or ())]
        total = sum((value * random(*value.shape, seed=7)).sum() for value in values)
        # Biases that are not learned are never differentiated.
        found = torch.autograd.grad(total, self.leaves, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(self.leaves, found, strict=True)]


@pytest.fixture(params=LEARNERS)
def kind(request):
    return request.param


def token_by_token(problem: Problem, tokens: int):
    """The definition: one inner gradient by automatic differentiation per token, and weights of its own."""
    outputs = []
    for row in range(ROWS):
        for head in range(HEADS):
            starts = [weight[row, head].detach() for weight in problem.weights]
            sums = [torch.zeros_like(start) for start in starts]
            norm = problem.learner.norm and [part[head, 0] for part in problem.learner.norm]

            def f(x, weights, norm=norm, residual=True):
                y = x @ weights[0] + weights[1][0]
                if len(weights) == 4:
                    y = gelu(y, approximate="tanh") @ weights[2] + weights[3][0]
                if norm:
                    y = layer_norm(y, y.shape[-1:], *norm, eps=1e-6) + (x if residual else 0)
                return y

            for token in range(tokens):
                q, k, v = (problem.tokens[name][row, token, head].detach() for name in "qkv")
                leaves = [start.clone().requires_grad_() for start in starts]
                loss = (f(k, leaves) - v).square().sum() / 2
                for index, gradient in enumerate(torch.autograd.grad(loss, leaves)):
                    if index % 2 == 0 or problem.learner.learn_bias:
                        sums[index] = sums[index] + problem.rate[row, token, head].detach() * gradient
                scale = problem.scale[token % SIZE].detach()
                current = [start - scale * total for start, total in zip(starts, sums, strict=True)]
                outputs.append(f(q, current).detach())
                if token % SIZE == SIZE - 1:
                    starts, sums = current, [torch.zeros_like(start) for start in starts]
    return torch.stack(outputs).view(ROWS, HEADS, tokens, CHANNELS).transpose(1, 2)


@pytest.mark.parametrize("step", [dual_step, primal_step])
def test_both_forms_are_the_definition(kind, step):
    problem = Problem(kind, 8)
    outputs, _ = problem.read(0, 8, None, step=step)
    torch.testing.assert_close(outputs.detach(), token_by_token(problem, 8), **CLOSE)


@pytest.mark.parametrize(("start", "end"), [(0, 2), (0, 3), (0, 8), (1, 3), (1, 8), (2, 9), (2, 3)])
def test_dual_form_is_the_primal_form(kind, start, end):
    """Outputs, last state and all gradients, whatever part of a mini-batch the call begins and ends with."""
    problem = Problem(kind, end)
    results = []
    for step in (dual_step, primal_step):
        state = problem.read(0, start, None, step=step)[1] if start else None
        outputs, state = problem.read(start, end, state, step=step)
        results.append([outputs, *state.weights, *(state.sums or ()), *problem.gradients(outputs, state)])
    torch.testing.assert_close(*results, **CLOSE)


def test_written_gradients_are_those_of_automatic_differentiation(kind):
    problem = Problem(kind, 5)
    key, value = (problem.tokens[name].transpose(1, 2).detach() for name in "kv")
    target = value if problem.learner.norm is None else value - key
    rate = torch.ones(ROWS, HEADS, 5, 1, dtype=torch.float64)
    layers = inner_gradients(key, target, rate, problem.weights, problem.learner)
    y = key
    for index in range(0, len(problem.weights), 2):
        y = gelu(y, approximate="tanh") if index else y
        y = y @ problem.weights[index] + problem.weights[index + 1]
    if problem.learner.norm is not None:
        weight, bias = problem.learner.norm
        y = layer_norm(y, y.shape[-1:], eps=1e-6) * weight + bias
    loss = (y - target).square().sum() / 2
    for index, (x, gradient) in enumerate(layers):
        expected = torch.autograd.grad(loss, problem.weights[2 * index : 2 * index + 2], retain_graph=True)
        torch.testing.assert_close((x.mT @ gradient, gradient.sum(-2, keepdim=True)), expected, **CLOSE)


def test_second_derivatives(kind):
    """Finite differences of the outputs, through the inner gradients."""
    problem = Problem(kind, 4)

    def outputs(*weights):
        return problem.read(0, 4, LearnerState(weights, None))[0]

    weights = [weight.detach().clone().requires_grad_() for weight in problem.weights]
    assert torch.autograd.gradcheck(outputs, weights, atol=1e-6)


@pytest.mark.parametrize("sizes", [[1] * 8, [2, 5, 1], [3, 4, 1], [7, 1]], ids=str)
def test_any_split_into_calls_is_one_call(kind, sizes):
    problem = Problem(kind, 8)
    whole, last = problem.read(0, 8, None)
    state, parts, start = None, [], 0
    for size in sizes:
        output, state = problem.read(start, start + size, state)
        parts.append(output)
        start += size
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **CLOSE)
    torch.testing.assert_close(state, last, **CLOSE)


@pytest.mark.parametrize("every", [1, 2, 10])
def test_checkpointing_through_time_changes_nothing(kind, every):
    problem = Problem(kind, 11)
    expected = problem.read(0, 11, None)
    again = problem.read(0, 11, None, checkpoint_every=every)
    torch.testing.assert_close(again, expected, rtol=0, atol=0)
    torch.testing.assert_close(problem.gradients(*again), problem.gradients(*expected), **CLOSE)


def test_checkpointing_through_time_keeps_less():
    """Between forward and backward: one state per group instead of the graphs of all mini-batches."""

    def kept(**how):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            problem.read(0, 48, None, **how)
        return sum(sizes)

    problem = Problem("linear", 48)
    assert kept(checkpoint_every=4) < 0.3 * kept()


def test_groups_of_checkpointing_grow_with_the_root():
    assert [default_checkpoint_every(count) for count in (1, 16, 128)] == [1, 4, 11]


def test_one_step_from_zero_is_causal_linear_attention():
    """Descent of 1/2 |W k - v|^2 from W = 0 adds v k^T per token at rate 1 (at 1/2 for the paper's |W k - v|^2)."""
    tokens = 7
    q, k, v = (random(ROWS, HEADS, 1, tokens, CHANNELS, seed=seed) for seed in range(3))
    zeros = LearnerState((torch.zeros_like(q[:, :, 0, :CHANNELS]), torch.zeros_like(q[:, :, 0, :1])), None)
    ones = torch.ones(ROWS, HEADS, 1, tokens, dtype=torch.float64)
    views = Views(q, k, v, ones, ones[:1, :1], ones[0, 0, 0, 0])
    attention = (q @ k.mT).tril() @ v
    complete = [[True] * ROWS]
    for step in (dual_step, primal_step):
        z, state = learn_slots(views, zeros, InnerLearner(None, learn_bias=False), complete, step=step)
        torch.testing.assert_close(z, attention, rtol=0, atol=1e-12)
        torch.testing.assert_close(state.weights[0], (k.mT @ v)[:, :, 0], rtol=0, atol=1e-12)
    # A bias is one more channel that is 1 in every key and query.
    z, _ = learn_slots(views, zeros, InnerLearner(None, learn_bias=True), complete)
    torch.testing.assert_close(z, (q @ k.mT + 1).tril() @ v, rtol=0, atol=1e-12)


class TestGrid:
    """Slots of tokens."""

    @pytest.mark.parametrize("before", [(0, 0), (4, 4), (1, 5), (2, 2)])
    @pytest.mark.parametrize("counts", [(5, 5), (5, 2), (0, 1), (1, 1)])
    def test_every_token_has_a_slot_at_its_position(self, before, counts):
        tokens = max(counts)
        grid = MiniBatchGrid.of(before, counts, tokens, 4, torch.device("cpu"))
        values = torch.arange(1, 2 * tokens + 1).view(2, tokens)
        placed = grid.place(values)
        assert placed.shape == (2, *grid.shape)
        assert torch.equal(grid.take(placed), values) or min(counts) < tokens
        positions = grid.positions.expand(2, -1)
        real = torch.ones_like(positions).bool() if grid.slot_mask is None else grid.slot_mask.expand(2, -1)
        for row, (first, count) in enumerate(zip(before, counts, strict=True)):
            assert placed.flatten(1)[row][real[row]].tolist() == values[row, :count].tolist()
            expected = [(first + token) % 4 for token in range(count)]
            assert positions[row][real[row]].tolist() == expected
            ends = (first + count) // 4 - first // 4
            assert sum(full[row] for full in grid.complete) == ends

    def test_a_single_token_takes_a_single_slot(self):
        assert MiniBatchGrid.of((3, 6), (1, 1), 1, 4, torch.device("cpu")).shape == (1, 1)
