"""TTT-KVB: fast weights that learn to bind values to keys (the baseline of arXiv 2512.23675, Table 1).

The layer is that of LaCT (arXiv 2505.23884). The fast weights of a head are a SwiGLU MLP,

    f_W(x) = W_down (silu(W_gate x) * (W_up x)),

trained while reading on the dot-product loss l_t(W) = -<f_W(k_t), v_t>. After mini-batch i, for each matrix m,

    D_m = - sum over t in i of eta_{t,m} grad_{W_m} l_t(W_i)       one learning rate per token and matrix, no 1/b
    M_m' = D_m + (mean of mu_t over i) M_m                          with momentum; otherwise M_m' = D_m
    W_m' = W_m + M_m', each row scaled to the norm it had at first  the scaling only with weight normalisation

The output at token t is f_W(q_t) under the weights at the beginning of t's mini-batch: nothing inside a mini-batch
reaches its own tokens, so that a sliding window of at least a mini-batch has to stand beside this layer.

The simplified output rule of Table 1 is read here as follows, which is an interpretation: the prediction of v_t that
the loss makes is the output as well, z_t = f_W(k_t), again under the weights before the update; there is no query.

Inner gradients are written out, so that autograd differentiates a step once for the outer loss and
`torch.utils.checkpoint` applies. `tests/modeling/ttt_kvb_reference.py` states the same with `torch.autograd.grad`.

The update runs when the first token of the next mini-batch arrives: floor((N - 1) / b) updates after N tokens.
Everything is computed in the dtype of the fast weights, which is at least float32, autocast or not.

Axis letters: B batch rows, N heads, T tokens, C channels of a key (or of a value), H hidden channels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

SMALLEST_NORM = 1e-5  # divisors below this are raised to it


@dataclass(frozen=True)
class KVBRule:
    """How a layer learns and answers.

    Attributes:
        mini_batch_size: tokens b per step.
        output_rule: "query" for z_t = f_W(q_t); "key" for z_t = f_W(k_t), the simplified output rule.
        weight_norm: after each step, scale every row of every matrix (one output channel) to its initial L2 norm; a row
            that begins as zeros then stays so.
        momentum: add the decayed earlier steps to each step.

    Raises:
        ValueError: a value is out of range.
    """

    mini_batch_size: int
    output_rule: Literal["query", "key"] = "query"
    weight_norm: bool = True
    momentum: bool = False

    def __post_init__(self):
        if self.mini_batch_size < 1:
            raise ValueError(f"`mini_batch_size` must be at least 1, got {self.mini_batch_size}.")
        if self.output_rule not in ("query", "key"):
            raise ValueError(f"`output_rule` must be 'query' or 'key', got {self.output_rule!r}.")


class SwiGLUWeights(NamedTuple):
    """One tensor for each matrix: the weights themselves, their momentum, or the norms of their rows.

    Attributes:
        gate, up: [..., N, H, C] ([..., N, H, 1] for norms).
        down: [..., N, C, H] ([..., N, C, 1] for norms).
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


class KVBTokens(NamedTuple):
    """What there is to learn from a stretch of tokens.

    Attributes:
        keys, values: [B, N, T, C].
        learning_rates: [B, N, T, 3], those of gate, up and down.
        momentum_factors: [B, N, T, 1], their mean over a mini-batch decays the momentum; None without momentum.
    """

    keys: torch.Tensor
    values: torch.Tensor
    learning_rates: torch.Tensor
    momentum_factors: torch.Tensor | None = None

    def each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "KVBTokens":
        """`function` of each tensor."""
        return KVBTokens(*(None if tensor is None else function(tensor) for tensor in self))


@dataclass(frozen=True)
class KVBMemory:
    """What steps of learning change, and the norms they keep to; at least float32.

    Attributes:
        weights: fast weights, [B, N, out, in] each.
        norms: L2 norms of the rows of the initial weights, [B, N, out, 1] each.
        momentum: as `weights`; None without momentum.
    """

    weights: SwiGLUWeights
    norms: SwiGLUWeights
    momentum: SwiGLUWeights | None = None


@dataclass(frozen=True)
class KVBState:
    """All that one layer keeps of what it has read. Its size does not grow with the number of tokens.

    Attributes:
        memory: after all steps so far.
        pending: tokens not learned yet, at most a mini-batch, aligned right: row r's are the last `counts[r]`.
        counts: number of pending tokens of each row.
    """

    memory: KVBMemory
    pending: KVBTokens
    counts: tuple[int, ...]

    def select(self, indices: Sequence[int]) -> "KVBState":
        """The state of the rows `indices`, in that order; a row may be taken several times."""
        counts = tuple(self.counts[index] for index in indices)
        unused = self.pending.keys.shape[2] - max(counts, default=0)
        rows = self._map(lambda tensor: tensor[list(indices)])
        return KVBState(rows.memory, rows.pending.each(lambda tensor: tensor[:, :, unused:]), counts)

    def detach(self) -> "KVBState":
        """The same values without their graph."""
        return self._map(torch.Tensor.detach)

    def _map(self, function) -> "KVBState":
        weights, norms = (SwiGLUWeights(*map(function, own)) for own in (self.memory.weights, self.memory.norms))
        momentum = self.memory.momentum and SwiGLUWeights(*map(function, self.memory.momentum))
        return KVBState(KVBMemory(weights, norms, momentum), self.pending.each(function), self.counts)


def kvb_initial_state(weights: SwiGLUWeights, rows: int, rule: KVBRule) -> KVBState:
    """The state before the first token: `rows` rows that start from the same slow `weights`.

    Args:
        weights: gate and up [N, H, C], down [N, C, H]; half precisions are raised to float32.

    Raises:
        ValueError: the shapes do not form a SwiGLU.
    """
    heads, hidden, channels = weights.gate.shape
    if weights.up.shape != weights.gate.shape or weights.down.shape[::2] != (heads, hidden):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in weights._asdict().items())
        raise ValueError(f"`weights` must be gate and up [N, H, C] and down [N, C, H], got {shapes}.")
    dtype = torch.promote_types(weights.gate.dtype, torch.float32)
    # Copies: a cache must not change with the slow weights.
    own = SwiGLUWeights(*(tensor.to(dtype).repeat(rows, 1, 1, 1) for tensor in weights))
    momentum = SwiGLUWeights(*map(torch.zeros_like, own)) if rule.momentum else None
    widths = (channels, weights.down.shape[1], 3) + (1,) * rule.momentum
    pending = KVBTokens(*(own.gate.new_empty(rows, heads, 0, width) for width in widths))
    return KVBState(KVBMemory(own, row_norms(own), momentum), pending, (0,) * rows)


def row_norms(weights: SwiGLUWeights) -> SwiGLUWeights:
    """L2 norm of every row (over input channels) of [..., out, in]: [..., out, 1]."""
    return SwiGLUWeights(*(torch.linalg.vector_norm(tensor, dim=-1, keepdim=True) for tensor in weights))


def unit_view(projected: torch.Tensor) -> torch.Tensor:
    """Queries or keys [..., C] as LaCT feeds them to the fast weights: silu, then unit L2 norm."""
    return F.normalize(F.silu(projected), dim=-1, eps=SMALLEST_NORM)


def token_learning_rates(projected: torch.Tensor, base: float) -> torch.Tensor:
    """softplus(x + softplus^-1(base)), at least float32: `base` (LaCT: 0.001) where x is 0, and never negative."""
    wide = projected.to(torch.promote_types(projected.dtype, torch.float32))
    return F.softplus(wide + base + math.log(-math.expm1(-base)))


def swiglu(weights: SwiGLUWeights, inputs: torch.Tensor) -> torch.Tensor:
    """f_W(x) = W_down (silu(W_gate x) * (W_up x)): [B, N, T, C] -> [B, N, T, C]."""
    return _activate(weights, inputs).hidden @ weights.down.mT


def kvb_step(
    memory: KVBMemory, queries: torch.Tensor | None, batch: KVBTokens, rule: KVBRule
) -> tuple[torch.Tensor, KVBMemory]:
    """One mini-batch of every row: answer under the old weights, then learn.

    With the output rule "key" the forward pass of the loss is the output, and `queries` is None.

    Args:
        queries: [B, N, b, C].
        batch: b tokens per row.

    Returns:
        outputs [B, N, b, C] in the dtype of the weights, and the memory after the step.

    Raises:
        ValueError: the arguments contradict the rule.
    """
    _check_rule(memory, queries, batch, rule)
    if batch.keys.shape[2] != rule.mini_batch_size:
        raise ValueError(f"`batch` has {batch.keys.shape[2]} tokens; the rule says {rule.mini_batch_size} per step.")
    dtype = memory.weights.gate.dtype
    with torch.autocast(batch.keys.device.type, enabled=False):
        reads = None if queries is None else queries.to(dtype)
        return _step(memory, reads, batch.each(lambda tensor: tensor.to(dtype)), rule)


def kvb_scan(
    state: KVBState,
    queries: torch.Tensor | None,
    tokens: KVBTokens,
    rule: KVBRule,
    counts: Sequence[int] | None = None,
    checkpoint_every: int | None = None,
) -> tuple[torch.Tensor, KVBState]:
    """Read any number of tokens, on from `state`. Any split of a text into calls gives the same as one call.

    Args:
        queries: [B, N, T, C]; None if and only if the output rule is "key".
        tokens: T positions; row r's tokens are the first `counts[r]`, and what follows is never looked at.
        counts: tokens of each row; None when nothing is padded.
        checkpoint_every: keep the graph of no more than this many mini-batches at a time, and compute the others again
            in the backward pass; None keeps them all.

    Returns:
        outputs [B, N, T, C] in the dtype of the fast weights, zero at padding, and the next state. Both are
        differentiable; `state.detach()` for a cache.

    Raises:
        ValueError: shapes, counts and the rule contradict each other.
    """
    counts = (tokens.keys.shape[2],) * len(state.counts) if counts is None else tuple(counts)
    _check_scan(state, queries, tokens, counts, checkpoint_every)
    _check_rule(state.memory, queries, tokens, rule)
    scan = _Scan(state, tokens.keys if queries is None else queries, tokens, rule, counts)
    every, memory, outputs = checkpoint_every or scan.mini_batches, state.memory, []
    with torch.autocast(tokens.keys.device.type, enabled=False):
        for first in range(0, scan.mini_batches, every):
            group = range(first, min(first + every, scan.mini_batches))
            if checkpoint_every and torch.is_grad_enabled():
                memory, new = checkpoint(scan.run, memory, group, use_reentrant=False, preserve_rng_state=False)
            else:
                memory, new = scan.run(memory, group)
            outputs.extend(new)
    return scan.joined(outputs), KVBState(memory, *scan.pending())


class _Activations(NamedTuple):
    """Of inputs [B, N, T, C], each [B, N, T, H]: W_gate x, W_up x, and silu(W_gate x) * (W_up x)."""

    gate: torch.Tensor
    up: torch.Tensor
    hidden: torch.Tensor


def _activate(weights: SwiGLUWeights, inputs: torch.Tensor) -> _Activations:
    gate, up = inputs @ weights.gate.mT, inputs @ weights.up.mT
    return _Activations(gate, up, F.silu(gate) * up)


def _step(memory, queries, batch, rule) -> tuple[torch.Tensor, KVBMemory]:
    activations = _activate(memory.weights, batch.keys)
    if rule.output_rule == "key":
        outputs = activations.hidden @ memory.weights.down.mT
    else:
        outputs = swiglu(memory.weights, queries)
    return outputs, _learned(memory, activations, batch, rule)


def _learned(memory: KVBMemory, activations: _Activations, batch: KVBTokens, rule: KVBRule) -> KVBMemory:
    """The memory after one step on `batch`, whose keys gave `activations`."""
    steps, momentum = _descent_steps(memory.weights, activations, batch), None
    if rule.momentum:
        decay = batch.momentum_factors.mean(dim=2, keepdim=True)
        steps = momentum = SwiGLUWeights(*(s + decay * m for s, m in zip(steps, memory.momentum, strict=True)))
    weights = SwiGLUWeights(*map(torch.add, memory.weights, steps))
    if rule.weight_norm:
        norms = (norm.clamp_min(SMALLEST_NORM) for norm in row_norms(weights))
        weights = SwiGLUWeights(*map(torch.mul, weights, map(torch.div, memory.norms, norms)))
    return KVBMemory(weights, memory.norms, momentum)


def _descent_steps(weights: SwiGLUWeights, activations: _Activations, batch: KVBTokens) -> SwiGLUWeights:
    """-sum_t eta_t grad l_t for each matrix. With a = W_gate k, u = W_up k, e = W_down^T v and s the logistic function,

    gate: sum eta (e * u * silu'(a)) k^T,   up: sum eta (e * silu(a)) k^T,   down: sum eta v (silu(a) * u)^T,
    silu'(a) = s(a) (1 + a (1 - s(a))).
    """
    for_gate, for_up, for_down = batch.learning_rates.split(1, dim=-1)
    error = batch.values @ weights.down
    logistic = torch.sigmoid(activations.gate)
    slope = logistic * (1 + activations.gate * (1 - logistic))
    return SwiGLUWeights(
        gate=(error * activations.up * slope).mT @ (batch.keys * for_gate),
        up=(error * activations.gate * logistic).mT @ (batch.keys * for_up),
        down=(batch.values * for_down).mT @ activations.hidden,
    )


class _Scan:
    """One call of `kvb_scan`: which positions each mini-batch reads and learns from.

    Pending tokens are aligned right and new ones left, so each row's own tokens are contiguous in their concatenation.
    Counts are plain integers, so that no step waits for the device.
    """

    def __init__(self, state, reads, tokens, rule, counts):
        self.reads, self.rule, self.counts = reads, rule, counts
        self.old_counts, self.length = state.counts, reads.shape[2]
        self.old_positions = state.pending.keys.shape[2]
        pairs = zip(state.pending, tokens, strict=True)
        self.tokens = tokens
        if self.old_positions:
            self.tokens = KVBTokens(*(None if new is None else torch.cat([old, new], dim=2) for old, new in pairs))
        self.totals = [old + new for old, new in zip(state.counts, counts, strict=True)]
        self.mini_batches = max(1, math.ceil(max(self.totals) / rule.mini_batch_size))

    def run(self, memory: KVBMemory, group: Sequence[int]) -> tuple[KVBMemory, list[torch.Tensor]]:
        """The memory after the mini-batches `group`, and the outputs of each, aligned left over the rows."""
        outputs = []
        for index in group:
            output, memory = self._mini_batch(memory, index)
            outputs.append(output)
        return memory, outputs

    def joined(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        """[B, N, T, C] from the outputs of all mini-batches."""
        if len(set(self.counts)) == len(set(self.old_counts)) == 1:
            return F.pad(torch.cat(outputs, dim=2), (0, 0, 0, self.length - self.counts[0]))
        rows = [[] for _ in self.counts]
        for index, output in enumerate(outputs):
            for own, values, (start, stop) in zip(rows, output, self._positions_read(index), strict=True):
                own.append(values[:, : stop - start])
        joined = (torch.cat(own, dim=1) for own in rows)
        return torch.stack([F.pad(own, (0, 0, 0, self.length - own.shape[1])) for own in joined])

    def pending(self) -> tuple[KVBTokens, tuple[int, ...]]:
        """The tokens no step has used, in memory of their own, and how many there are in each row."""
        steps = [max(0, total - 1) // self.rule.mini_batch_size for total in self.totals]
        left = [total - done * self.rule.mini_batch_size for total, done in zip(self.totals, steps, strict=True)]
        starts = [self.old_positions + new - own for new, own in zip(self.counts, left, strict=True)]
        return self.tokens.each(lambda tensor: _cut(tensor, starts, left, align="right").clone()), tuple(left)

    def _positions_read(self, index: int) -> list[tuple[int, int]]:
        """For each row, the new positions [start, stop) that lie in mini-batch `index`."""
        first = index * self.rule.mini_batch_size
        borders = (first, first + self.rule.mini_batch_size)
        rows = zip(self.old_counts, self.counts, strict=True)
        return [tuple(min(max(border - old, 0), new) for border in borders) for old, new in rows]

    def _mini_batch(self, memory: KVBMemory, index: int) -> tuple[torch.Tensor, KVBMemory]:
        size, dtype = self.rule.mini_batch_size, memory.weights.gate.dtype
        read = self._positions_read(index)
        widths = [stop - start for start, stop in read]
        reads = _cut(self.reads, [start for start, _ in read], widths).to(dtype)
        learns = [total > (index + 1) * size for total in self.totals]
        if not any(learns):
            return swiglu(memory.weights, reads), memory
        used = [size if own else 0 for own in learns]
        first = [self.old_positions - old + index * size for old in self.old_counts]
        first = [start if own else 0 for start, own in zip(first, learns, strict=True)]
        batch = self.tokens.each(lambda tensor: _cut(tensor, first, used).to(dtype))
        if min(widths) == size and all(learns):  # what is read and learned are the same positions
            return _step(memory, reads, batch, self.rule)
        new = _learned(memory, _activate(memory.weights, batch.keys), batch, self.rule)
        return swiglu(memory.weights, reads), _where(learns, new, memory)


def _cut(
    tensor: torch.Tensor, starts: Sequence[int], counts: Sequence[int], align: Literal["left", "right"] = "left"
) -> torch.Tensor:
    """Columns [start, start + count) of each row of [B, N, T, C], aligned to one side; what is left is zero.

    A view where the rows agree.
    """
    if len(set(starts)) == len(set(counts)) == 1:
        return tensor.narrow(2, starts[0], counts[0])
    rows, width = [], max(counts)
    for row, start, count in zip(tensor, starts, counts, strict=True):
        padding = (width - count, 0) if align == "right" else (0, width - count)
        rows.append(F.pad(row.narrow(1, start, count), (0, 0, *padding)))
    return torch.stack(rows)


def _where(rows: Sequence[bool], new: KVBMemory, old: KVBMemory) -> KVBMemory:
    """`new` for the rows that are True, `old` for the others."""
    if all(rows):
        return new
    mask = torch.tensor(rows, device=old.weights.gate.device)[:, None, None, None]

    def chosen(new: SwiGLUWeights, old: SwiGLUWeights) -> SwiGLUWeights:
        return SwiGLUWeights(*(torch.where(mask, *pair) for pair in zip(new, old, strict=True)))

    weights, momentum = chosen(new.weights, old.weights), new.momentum and chosen(new.momentum, old.momentum)
    return KVBMemory(weights, old.norms, momentum)


def _check_rule(memory: KVBMemory, queries: torch.Tensor | None, tokens: KVBTokens, rule: KVBRule) -> None:
    for name, tensor, wanted, why in (
        ("queries", queries, rule.output_rule == "query", f"`output_rule` is {rule.output_rule!r}"),
        ("momentum_factors", tokens.momentum_factors, rule.momentum, f"the rule's `momentum` is {rule.momentum}"),
        ("memory.momentum", memory.momentum, rule.momentum, f"the rule's `momentum` is {rule.momentum}"),
    ):
        if (tensor is not None) != wanted:
            raise ValueError(f"`{name}` must {'be given' if wanted else 'be None'}, because {why}.")


def _check_scan(state, queries, tokens, counts, checkpoint_every) -> None:
    rows, length = len(state.counts), tokens.keys.shape[2]
    weights = state.memory.weights
    widths = {"keys": weights.gate.shape[3], "values": weights.down.shape[2]}
    widths |= {"learning_rates": 3, "momentum_factors": 1, "queries": widths["keys"]}
    for name, tensor in {**tokens._asdict(), "queries": queries}.items():
        wanted = (*weights.gate.shape[:2], length, widths[name])
        if tensor is not None and tuple(tensor.shape) != wanted:
            raise ValueError(f"`{name}` has shape {tuple(tensor.shape)}; with this state it must be {wanted}.")
    if len(counts) != rows or not all(0 <= count <= length for count in counts):
        raise ValueError(f"`counts` must be {rows} numbers of tokens between 0 and {length}, got {counts}.")
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ValueError(f"`checkpoint_every` must be at least 1, or None, got {checkpoint_every}.")
