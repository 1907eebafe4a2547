"""The Triton kernels of `triton_attention`, where their mathematics stands; imported only where Triton is installed.

A kernel runs one program for each block of ROWS queries of a query head, or of COLUMNS keys of a key/value head, and
goes through the blocks of the other kind that take part. All matrices are contiguous, [heads, length, CHANNELS]; WIDTH
is the power of two that CHANNELS are filled up to. GROUPS query heads share a key/value head.
"""

import math
import os

try:  # so that transformers, which looks for what a Hub folder needs, does not ask for it
    import triton
    from triton import language as tl
except ImportError as error:
    raise ImportError("The package `triton` is not installed.") from error

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2_E = tl.constexpr(math.log2(math.e))
HIDDEN = tl.constexpr(-1.0e30)  # finite, so that a row of a block that sees nothing stays a number

# ------------------------------------------------------------------------------------------- parts of kernels


@triton.jit
def _dot(left, right, PRECISION: tl.constexpr):
    """Product, added up in float32."""
    if INTERPRETED:  # takes bfloat16 for integers
        return tl.dot(left.to(tl.float32), right.to(tl.float32))
    return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def _load_tile(matrix, first, length, CHANNELS: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Places first, first + 1, ... of a matrix [length, CHANNELS], as [COUNT, WIDTH] with zeros around."""
    places, channels = first + tl.arange(0, COUNT), tl.arange(0, WIDTH)
    there = (places < length)[:, None] & (channels < CHANNELS)[None, :]
    return tl.load(matrix + places[:, None] * CHANNELS + channels[None, :], mask=there, other=0.0)


@triton.jit
def _store_tile(matrix, tile, first, length, CHANNELS: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    places, channels = first + tl.arange(0, COUNT), tl.arange(0, WIDTH)
    there = (places < length)[:, None] & (channels < CHANNELS)[None, :]
    target = matrix + places[:, None] * CHANNELS + channels[None, :]
    tl.store(target, tile.to(matrix.dtype.element_ty), mask=there)


@triton.jit
def _load_rows(vector, first, length, COUNT: tl.constexpr):
    places = first + tl.arange(0, COUNT)
    return tl.load(vector + places, mask=places < length, other=0.0)


@triton.jit
def _load_pair(one, other, before, first, length, CHANNELS: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Tiles of two matrices alike, `before` places after their beginning."""
    start = before * CHANNELS
    left = _load_tile(one + start, first, length, CHANNELS, COUNT, WIDTH)
    return left, _load_tile(other + start, first, length, CHANNELS, COUNT, WIDTH)


@triton.jit
def _load_row_pair(one, other, before, first, length, COUNT: tl.constexpr):
    return _load_rows(one + before, first, length, COUNT), _load_rows(other + before, first, length, COUNT)


@triton.jit
def _store_rows(vector, values, first, length, COUNT: tl.constexpr):
    places = first + tl.arange(0, COUNT)
    tl.store(vector + places, values, mask=places < length)


@triton.jit
def _visible(
    first_row, first_column, read, num_queries, num_past, num_sinks, window, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] bool; see `VisibleKeys`."""
    row = (first_row + tl.arange(0, ROWS))[:, None]
    column = (first_column + tl.arange(0, COLUMNS))[None, :]
    token = column - num_sinks
    distance = num_past + row - token
    in_window = (token >= 0) & (token >= num_past - read) & (distance >= 0) & (distance < window)
    sinks = (token < 0) & (read + row - column >= window)
    return (in_window | sinks) & (row < num_queries)


@triton.jit
def _key_blocks(first_row, read, num_queries, num_past, num_sinks, window, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Blocks of keys that a block of queries sees: the first so many, for sinks, and those from `begin` to `end`."""
    last_row = tl.minimum(first_row + ROWS, num_queries) - 1
    oldest = tl.maximum(tl.maximum(num_past + first_row - window + 1, num_past - read), 0)
    begin = (num_sinks + oldest) // COLUMNS
    end = tl.cdiv(num_sinks + num_past + last_row + 1, COLUMNS)
    of_sinks = tl.where(read + last_row >= window, tl.minimum(tl.cdiv(num_sinks, COLUMNS), begin), 0)
    return of_sinks, begin, end


@triton.jit
def _key_block(step, of_sinks, begin):
    """The block of `_key_blocks` that is next after `step` blocks."""
    return tl.where(step < of_sinks, step, begin - of_sinks + step)


@triton.jit
def _query_blocks(
    first_column, read, num_queries, num_past, num_sinks, window, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Blocks of queries, from `begin` to `end`, that see one of a block of keys."""
    first_token = first_column - num_sinks
    begin = tl.maximum(first_token - num_past, 0)
    end = tl.minimum(first_token + COLUMNS - 1 - num_past + window, num_queries)
    holds_sinks = first_column < num_sinks
    begin = tl.where(holds_sinks, tl.minimum(begin, tl.maximum(window + first_column - read, 0)), begin)
    end = tl.where(holds_sinks, num_queries, end)
    return begin // ROWS, tl.cdiv(tl.maximum(end, 0), ROWS)


@triton.jit
def _probabilities(query, key, log_sums, visible, scale, PRECISION: tl.constexpr):
    scores = _dot(query, tl.trans(key), PRECISION) * (scale * LOG2_E)
    return tl.where(visible, tl.exp2(scores - log_sums[:, None]), 0.0)


@triton.jit
def _second_scores(query, key, value, grad, query_bar, key_bar, value_bar, dots, scale, PRECISION: tl.constexpr):
    """dP - D, G, and dO v^T of a block."""
    centred = _dot(grad, tl.trans(value), PRECISION) - dots[:, None]
    pulled = _dot(query_bar, tl.trans(key), PRECISION)
    pulled += _dot(query, tl.trans(key_bar), PRECISION)
    return centred, pulled * scale, _dot(grad, tl.trans(value_bar), PRECISION)


@triton.jit
def _first_derivative(query, key, value, grad, log_sums, dots, visible, scale, PRECISION: tl.constexpr):
    """P and scale dS of a block."""
    p = _probabilities(query, key, log_sums, visible, scale, PRECISION)
    return p, p * (_dot(grad, tl.trans(value), PRECISION) - dots[:, None]) * scale


@triton.jit
def _second_derivative(p, centred, pulled, of_p, row_sums, products, scale):
    """scale dS, and the gradients of dP and of S, of a block."""
    pulled -= row_sums[:, None]
    return p * centred * scale, p * pulled, p * (of_p + pulled * centred - products[:, None]) * scale


# ---------------------------------------------------------------------------------------------------- kernels


@triton.jit
def forward_kernel(
    query, key, value, output, log_sums, tokens_read, scale, num_queries, num_past, num_sinks, window,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first_row, head = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64)
    num_keys, read = num_sinks + num_past + num_queries, tl.load(tokens_read + head // HEADS)
    of_queries, of_keys = head * num_queries, head // GROUPS * num_keys
    q = _load_tile(query + of_queries * CHANNELS, first_row, num_queries, CHANNELS, ROWS, WIDTH)
    most = tl.full([ROWS], HIDDEN, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDTH], tl.float32)
    of_sinks, begin, end = _key_blocks(first_row, read, num_queries, num_past, num_sinks, window, ROWS, COLUMNS)
    for step in range(0, of_sinks + end - begin):
        column = _key_block(step, of_sinks, begin) * COLUMNS
        k, v = _load_pair(key, value, of_keys, column, num_keys, CHANNELS, COLUMNS, WIDTH)
        seen = _visible(first_row, column, read, num_queries, num_past, num_sinks, window, ROWS, COLUMNS)
        scores = _dot(q, tl.trans(k), PRECISION) * (scale * LOG2_E)
        highest = tl.maximum(most, tl.max(tl.where(seen, scores, HIDDEN), 1))
        p = tl.where(seen, tl.exp2(scores - highest[:, None]), 0.0)
        fading = tl.exp2(most - highest)
        total = total * fading + tl.sum(p, 1)
        mixed = mixed * fading[:, None] + _dot(p.to(v.dtype), v, PRECISION)
        most = highest
    total = tl.where(total > 0, total, 1.0)  # of places beyond the last query
    _store_tile(output + of_queries * CHANNELS, mixed / total[:, None], first_row, num_queries, CHANNELS, ROWS, WIDTH)
    _store_rows(log_sums + of_queries, most + tl.log2(total), first_row, num_queries, ROWS)


@triton.jit
def query_gradient_kernel(
    query, key, value, grad_output, log_sums, dots, query_grad, tokens_read, scale,
    num_queries, num_past, num_sinks, window,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first_row, head = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64)
    num_keys, read = num_sinks + num_past + num_queries, tl.load(tokens_read + head // HEADS)
    of_queries, of_keys = head * num_queries, head // GROUPS * num_keys
    q, do = _load_pair(query, grad_output, of_queries, first_row, num_queries, CHANNELS, ROWS, WIDTH)
    log_sum, dot = _load_row_pair(log_sums, dots, of_queries, first_row, num_queries, ROWS)
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    of_sinks, begin, end = _key_blocks(first_row, read, num_queries, num_past, num_sinks, window, ROWS, COLUMNS)
    for step in range(0, of_sinks + end - begin):
        column = _key_block(step, of_sinks, begin) * COLUMNS
        k, v = _load_pair(key, value, of_keys, column, num_keys, CHANNELS, COLUMNS, WIDTH)
        seen = _visible(first_row, column, read, num_queries, num_past, num_sinks, window, ROWS, COLUMNS)
        _, ds = _first_derivative(q, k, v, do, log_sum, dot, seen, scale, PRECISION)
        dq += _dot(ds.to(k.dtype), k, PRECISION)
    _store_tile(query_grad + of_queries * CHANNELS, dq, first_row, num_queries, CHANNELS, ROWS, WIDTH)


@triton.jit
def key_gradient_kernel(
    query, key, value, grad_output, log_sums, dots, key_grad, value_grad, tokens_read, scale,
    num_queries, num_past, num_sinks, window,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column, key_head = tl.program_id(0) * COLUMNS, tl.program_id(1).to(tl.int64)
    num_keys = num_sinks + num_past + num_queries
    read = tl.load(tokens_read + key_head // (HEADS // GROUPS))
    of_keys = key_head * num_keys
    k, v = _load_pair(key, value, of_keys, column, num_keys, CHANNELS, COLUMNS, WIDTH)
    dk = tl.zeros([COLUMNS, WIDTH], tl.float32)
    dv = tl.zeros([COLUMNS, WIDTH], tl.float32)
    begin, end = _query_blocks(column, read, num_queries, num_past, num_sinks, window, ROWS, COLUMNS)
    for step in range(0, GROUPS * (end - begin)):
        of_queries = (key_head * GROUPS + step // (end - begin)) * num_queries
        first_row = (begin + step % (end - begin)) * ROWS
        q, do = _load_pair(query, grad_output, of_queries, first_row, num_queries, CHANNELS, ROWS, WIDTH)
        log_sum, dot = _load_row_pair(log_sums, dots, of_queries, first_row, num_queries, ROWS)
        seen = _visible(first_row, column, read, num_queries, num_past, num_sinks, window, ROWS, COLUMNS)
        p, ds = _first_derivative(q, k, v, do, log_sum, dot, seen, scale, PRECISION)
        dk += _dot(tl.trans(ds.to(q.dtype)), q, PRECISION)
        dv += _dot(tl.trans(p.to(do.dtype)), do, PRECISION)
    _store_tile(key_grad + of_keys * CHANNELS, dk, column, num_keys, CHANNELS, COLUMNS, WIDTH)
    _store_tile(value_grad + of_keys * CHANNELS, dv, column, num_keys, CHANNELS, COLUMNS, WIDTH)


@triton.jit
def row_sums_kernel(
    query, key, value, grad_output, query_bars, key_bars, value_bars, log_sums, dots, sums, products,
    tokens_read, scale, num_queries, num_past, num_sinks, window,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first_row, head = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64)
    num_keys, read = num_sinks + num_past + num_queries, tl.load(tokens_read + head // HEADS)
    of_queries, of_keys = head * num_queries, head // GROUPS * num_keys
    q, do = _load_pair(query, grad_output, of_queries, first_row, num_queries, CHANNELS, ROWS, WIDTH)
    q_bar = _load_tile(query_bars + of_queries * CHANNELS, first_row, num_queries, CHANNELS, ROWS, WIDTH)
    log_sum, dot = _load_row_pair(log_sums, dots, of_queries, first_row, num_queries, ROWS)
    row_sum = tl.zeros([ROWS], tl.float32)
    product = tl.zeros([ROWS], tl.float32)
    of_sinks, begin, end = _key_blocks(first_row, read, num_queries, num_past, num_sinks, window, ROWS, COLUMNS)
    for step in range(0, of_sinks + end - begin):
        column = _key_block(step, of_sinks, begin) * COLUMNS
        k, v = _load_pair(key, value, of_keys, column, num_keys, CHANNELS, COLUMNS, WIDTH)
        k_bar, v_bar = _load_pair(key_bars, value_bars, of_keys, column, num_keys, CHANNELS, COLUMNS, WIDTH)
        seen = _visible(first_row, column, read, num_queries, num_past, num_sinks, window, ROWS, COLUMNS)
        p = _probabilities(q, k, log_sum, seen, scale, PRECISION)
        centred, pulled, of_p = _second_scores(q, k, v, do, q_bar, k_bar, v_bar, dot, scale, PRECISION)
        row_sum += tl.sum(p * pulled, 1)
        product += tl.sum(p * (of_p + pulled * centred), 1)
    _store_rows(sums + of_queries, row_sum, first_row, num_queries, ROWS)
    _store_rows(products + of_queries, product, first_row, num_queries, ROWS)


@triton.jit
def second_query_kernel(
    query, key, value, grad_output, query_bars, key_bars, value_bars, log_sums, dots, sums, products,
    of_query, of_grad, tokens_read, scale, num_queries, num_past, num_sinks, window,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first_row, head = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64)
    num_keys, read = num_sinks + num_past + num_queries, tl.load(tokens_read + head // HEADS)
    of_queries, of_keys = head * num_queries, head // GROUPS * num_keys
    q, do = _load_pair(query, grad_output, of_queries, first_row, num_queries, CHANNELS, ROWS, WIDTH)
    q_bar = _load_tile(query_bars + of_queries * CHANNELS, first_row, num_queries, CHANNELS, ROWS, WIDTH)
    log_sum, dot = _load_row_pair(log_sums, dots, of_queries, first_row, num_queries, ROWS)
    row_sum, product = _load_row_pair(sums, products, of_queries, first_row, num_queries, ROWS)
    dq = tl.zeros([ROWS, WIDTH], tl.float32)
    ddo = tl.zeros([ROWS, WIDTH], tl.float32)
    of_sinks, begin, end = _key_blocks(first_row, read, num_queries, num_past, num_sinks, window, ROWS, COLUMNS)
    for step in range(0, of_sinks + end - begin):
        column = _key_block(step, of_sinks, begin) * COLUMNS
        k, v = _load_pair(key, value, of_keys, column, num_keys, CHANNELS, COLUMNS, WIDTH)
        k_bar, v_bar = _load_pair(key_bars, value_bars, of_keys, column, num_keys, CHANNELS, COLUMNS, WIDTH)
        seen = _visible(first_row, column, read, num_queries, num_past, num_sinks, window, ROWS, COLUMNS)
        p = _probabilities(q, k, log_sum, seen, scale, PRECISION)
        centred, pulled, of_p = _second_scores(q, k, v, do, q_bar, k_bar, v_bar, dot, scale, PRECISION)
        ds, dp, of_scores = _second_derivative(p, centred, pulled, of_p, row_sum, product, scale)
        dq += _dot(of_scores.to(k.dtype), k, PRECISION)
        dq += _dot(ds.to(k.dtype), k_bar, PRECISION)
        ddo += _dot(p.to(v.dtype), v_bar, PRECISION)
        ddo += _dot(dp.to(v.dtype), v, PRECISION)
    _store_tile(of_query + of_queries * CHANNELS, dq, first_row, num_queries, CHANNELS, ROWS, WIDTH)
    _store_tile(of_grad + of_queries * CHANNELS, ddo, first_row, num_queries, CHANNELS, ROWS, WIDTH)


@triton.jit
def second_key_kernel(
    query, key, value, grad_output, query_bars, key_bars, value_bars, log_sums, dots, sums, products,
    of_key, of_value, tokens_read, scale, num_queries, num_past, num_sinks, window,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column, key_head = tl.program_id(0) * COLUMNS, tl.program_id(1).to(tl.int64)
    num_keys = num_sinks + num_past + num_queries
    read = tl.load(tokens_read + key_head // (HEADS // GROUPS))
    of_keys = key_head * num_keys
    k, v = _load_pair(key, value, of_keys, column, num_keys, CHANNELS, COLUMNS, WIDTH)
    k_bar, v_bar = _load_pair(key_bars, value_bars, of_keys, column, num_keys, CHANNELS, COLUMNS, WIDTH)
    dk = tl.zeros([COLUMNS, WIDTH], tl.float32)
    dv = tl.zeros([COLUMNS, WIDTH], tl.float32)
    begin, end = _query_blocks(column, read, num_queries, num_past, num_sinks, window, ROWS, COLUMNS)
    for step in range(0, GROUPS * (end - begin)):
        of_queries = (key_head * GROUPS + step // (end - begin)) * num_queries
        first_row = (begin + step % (end - begin)) * ROWS
        q, do = _load_pair(query, grad_output, of_queries, first_row, num_queries, CHANNELS, ROWS, WIDTH)
        q_bar = _load_tile(query_bars + of_queries * CHANNELS, first_row, num_queries, CHANNELS, ROWS, WIDTH)
        log_sum, dot = _load_row_pair(log_sums, dots, of_queries, first_row, num_queries, ROWS)
        row_sum, product = _load_row_pair(sums, products, of_queries, first_row, num_queries, ROWS)
        seen = _visible(first_row, column, read, num_queries, num_past, num_sinks, window, ROWS, COLUMNS)
        p = _probabilities(q, k, log_sum, seen, scale, PRECISION)
        centred, pulled, of_p = _second_scores(q, k, v, do, q_bar, k_bar, v_bar, dot, scale, PRECISION)
        ds, dp, of_scores = _second_derivative(p, centred, pulled, of_p, row_sum, product, scale)
        dk += _dot(tl.trans(of_scores.to(q.dtype)), q, PRECISION)
        dk += _dot(tl.trans(ds.to(q.dtype)), q_bar, PRECISION)
        dv += _dot(tl.trans(dp.to(do.dtype)), do, PRECISION)
    _store_tile(of_key + of_keys * CHANNELS, dk, column, num_keys, CHANNELS, COLUMNS, WIDTH)
    _store_tile(of_value + of_keys * CHANNELS, dv, column, num_keys, CHANNELS, COLUMNS, WIDTH)


KERNELS = {
    "forward": forward_kernel,
    "query_gradient": query_gradient_kernel,
    "key_gradient": key_gradient_kernel,
    "row_sums": row_sums_kernel,
    "second_query": second_query_kernel,
    "second_key": second_key_kernel,
}
