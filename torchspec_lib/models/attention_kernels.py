"""Triton kernels of the training-time test's attention, forward and backward; deterministic.

Causal flash attention (Dao, arXiv 2307.08691) of the chains over the depth-0 keys of their
document, in one softmax with each chain's own keys of the later depths; linear in memory. The
forward leaves each softmax's denominator, of both kinds of keys: neither backward needs the other.

Shapes: ``C`` chains in the order of their positions, ``T`` tokens, ``N`` query and ``G`` key-value
heads, ``D`` head size, ``K`` later depths. Scores are in base 2: ``log2(e) * scale * q.k``.
"""

# ruff: noqa: ANN001, ANN201, ANN202, PLR0913 - pointers and sizes, as Triton hands them over
# mypy: ignore-errors
import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_HIDDEN_SCORE = tl.constexpr(-1.0e30)
"""Finite, so that a block without a visible key makes no NaN; the first visible one erases it."""


@triton.jit
def _tile(base, rows, cols, stride, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows of a matrix, [len(rows), D_PAD]; zeros past column D."""
    pointers = base + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if D == D_PAD:
        return tl.load(pointers)
    return tl.load(pointers, mask=cols[None, :] < D, other=0.0)


@triton.jit
def _store(base, rows, cols, stride, values, ok, D: tl.constexpr):
    pointers = base + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=ok[:, None] & (cols[None, :] < D))


@triton.jit
def _key_range(pos_ptr, start_ptr, first, num_rows, BM: tl.constexpr, BN: tl.constexpr):
    """Keys [low, high) that a block of rows sees; [low, middle) are seen by every row of it."""
    last = tl.minimum(first + BM, num_rows) - 1
    low, high = tl.load(start_ptr + first), tl.load(pos_ptr + last) + 1
    seen_by_all = tl.load(pos_ptr + first) + 1 - low
    one_document = tl.load(start_ptr + last) == low
    middle = low + tl.where(one_document, seen_by_all // BN * BN, 0)
    return low, middle, high


@triton.jit
def _attend_keys(
    top, total, out, q, k_ptr, v_ptr, low, high, pos, start, cols, num_keys, scale,
    STRIDE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Few blocks are masked, and loading ahead for them too would leave no registers.
    for first in tl.range(low, high, BN, num_stages=1 if MASKED else None):
        keys = first + tl.arange(0, BN)
        rows = tl.minimum(keys, num_keys - 1) if MASKED else keys
        k = _tile(k_ptr, rows, cols, STRIDE, D, D_PAD)
        # Scaled before the hidden ones are set: -1e30 times the scale, less its own rounded self in
        # one fused operation, would leave the rounding, and 2 to the power of that is infinite.
        scores = tl.dot(q, k.T, input_precision=PRECISION) * scale
        if MASKED:
            visible = (keys[None, :] <= pos[:, None]) & (keys[None, :] >= start[:, None])
            scores = tl.where(visible, scores, _HIDDEN_SCORE)
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - new_top)
        probs = tl.exp2(scores - new_top[:, None])
        total = total * shrink + tl.sum(probs, 1)
        v = _tile(v_ptr, rows, cols, STRIDE, D, D_PAD)
        out = out * shrink[:, None]
        out = tl.dot(probs.to(v.dtype), v, out, input_precision=PRECISION)
        top = new_top
    return top, total, out


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, own_k_ptr, own_v_ptr, pos_ptr, start_ptr, out_ptr, lse_ptr,
    num_rows, num_keys, num_own, scale,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs, and each softmax's denominator as a logarithm to base 2; ``scale`` is in base 2."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    head = tl.program_id(1)
    group = head // (N // G)
    first = block * BM
    ids = first + tl.arange(0, BM)
    rows = tl.minimum(ids, num_rows - 1)
    cols = tl.arange(0, D_PAD)
    pos, start = tl.load(pos_ptr + rows), tl.load(start_ptr + rows)
    q = _tile(q_ptr + head * D, rows, cols, N * D, D, D_PAD)

    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, D_PAD], tl.float32)
    own_k_ptr += group * D
    own_v_ptr += group * D
    for _ in range(num_own):
        k = _tile(own_k_ptr, rows, cols, G * D, D, D_PAD).to(tl.float32)
        score = tl.sum(q.to(tl.float32) * k, 1) * scale
        new_top = tl.maximum(top, score)
        shrink, prob = tl.exp2(top - new_top), tl.exp2(score - new_top)
        v = _tile(own_v_ptr, rows, cols, G * D, D, D_PAD).to(tl.float32)
        total = total * shrink + prob
        out = out * shrink[:, None] + prob[:, None] * v
        top = new_top
        own_k_ptr += num_rows * G * D
        own_v_ptr += num_rows * G * D

    low, middle, high = _key_range(pos_ptr, start_ptr, first, num_rows, BM, BN)
    k_ptr += group * D
    v_ptr += group * D
    top, total, out = _attend_keys(
        top, total, out, q, k_ptr, v_ptr, low, middle, pos, start, cols, num_keys, scale,
        G * D, D, D_PAD, BN, False, PRECISION,
    )  # fmt: skip
    top, total, out = _attend_keys(
        top, total, out, q, k_ptr, v_ptr, middle, high, pos, start, cols, num_keys, scale,
        G * D, D, D_PAD, BN, True, PRECISION,
    )  # fmt: skip
    ok = ids < num_rows
    _store(out_ptr + head * D, rows, cols, N * D, out / total[:, None], ok, D)
    tl.store(lse_ptr + head * num_rows + rows, top + tl.log2(total), mask=ok)


@triton.jit
def own_backward_kernel(
    q_ptr, own_k_ptr, own_v_ptr, out_ptr, lse_ptr, dout_ptr,
    delta_ptr, dq_ptr, down_k_ptr, down_v_ptr, num_rows, num_own, scale,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    H_PAD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Gradients of the own keys and values, their part of dq, and delta = out . dout."""
    heads_per_group: tl.constexpr = N // G
    group = tl.program_id(1)
    pairs = tl.arange(0, BR * H_PAD)
    ids = tl.program_id(0) * BR + pairs // H_PAD
    rows, cols = tl.minimum(ids, num_rows - 1), tl.arange(0, D_PAD)
    member = tl.minimum(pairs % H_PAD, heads_per_group - 1)
    ok = (ids < num_rows) & (pairs % H_PAD < heads_per_group)
    head = group * heads_per_group + member
    heads = rows * N + head
    q = _tile(q_ptr, heads, cols, D, D, D_PAD).to(tl.float32)
    dout = _tile(dout_ptr, heads, cols, D, D, D_PAD).to(tl.float32)
    delta = tl.sum(_tile(out_ptr, heads, cols, D, D, D_PAD).to(tl.float32) * dout, 1)
    tl.store(delta_ptr + head * num_rows + rows, delta, mask=ok)
    lse = tl.load(lse_ptr + head * num_rows + rows)
    key_ids = tl.program_id(0) * BR + tl.arange(0, BR)
    key_rows, key_ok = tl.minimum(key_ids, num_rows - 1), key_ids < num_rows

    dq = tl.zeros([BR * H_PAD, D_PAD], tl.float32)
    own_k_ptr += group * D
    own_v_ptr += group * D
    down_k_ptr += group * D
    down_v_ptr += group * D
    for _ in range(num_own):
        k = _tile(own_k_ptr, rows, cols, G * D, D, D_PAD).to(tl.float32)
        v = _tile(own_v_ptr, rows, cols, G * D, D, D_PAD).to(tl.float32)
        prob = tl.exp2(tl.sum(q * k, 1) * (scale * _LOG2_E) - lse)
        prob = tl.where(ok, prob, 0.0)
        dscore = prob * (tl.sum(dout * v, 1) - delta) * scale
        dq += dscore[:, None] * k
        dk = tl.sum(tl.reshape(dscore[:, None] * q, [BR, H_PAD, D_PAD]), 1)
        dv = tl.sum(tl.reshape(prob[:, None] * dout, [BR, H_PAD, D_PAD]), 1)
        dk += _tile(down_k_ptr, key_rows, cols, G * D, D, D_PAD)
        dv += _tile(down_v_ptr, key_rows, cols, G * D, D, D_PAD)
        _store(down_k_ptr, key_rows, cols, G * D, dk, key_ok, D)
        _store(down_v_ptr, key_rows, cols, G * D, dv, key_ok, D)
        own_k_ptr += num_rows * G * D
        own_v_ptr += num_rows * G * D
        down_k_ptr += num_rows * G * D
        down_v_ptr += num_rows * G * D
    _store(dq_ptr, heads, cols, D, dq, ok, D)


@triton.jit
def _dq_keys(
    dq, q, dout, lse, delta, k_ptr, v_ptr, low, high, pos, start, cols, num_keys, scale,
    STRIDE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for first in tl.range(low, high, BN, num_stages=1 if MASKED else None):
        keys = first + tl.arange(0, BN)
        rows = tl.minimum(keys, num_keys - 1) if MASKED else keys
        k = _tile(k_ptr, rows, cols, STRIDE, D, D_PAD)
        v = _tile(v_ptr, rows, cols, STRIDE, D, D_PAD)
        scores = tl.dot(q, k.T, input_precision=PRECISION) * scale
        probs = tl.exp2(scores - lse[:, None])
        if MASKED:
            visible = (keys[None, :] <= pos[:, None]) & (keys[None, :] >= start[:, None])
            probs = tl.where(visible, probs, 0.0)
        dprobs = tl.dot(dout, v.T, input_precision=PRECISION)
        dscores = (probs * (dprobs - delta[:, None])).to(k.dtype)
        dq = tl.dot(dscores, k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, pos_ptr, start_ptr, lse_ptr, dout_ptr, delta_ptr, dq_own_ptr, dq_ptr,
    num_rows, num_keys, scale,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of q: what depth 0's keys give, added to what the own keys gave."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    group = head // (N // G)
    first = block * BM
    ids = first + tl.arange(0, BM)
    rows = tl.minimum(ids, num_rows - 1)
    cols = tl.arange(0, D_PAD)
    pos, start = tl.load(pos_ptr + rows), tl.load(start_ptr + rows)
    q = _tile(q_ptr + head * D, rows, cols, N * D, D, D_PAD)
    dout = _tile(dout_ptr + head * D, rows, cols, N * D, D, D_PAD)
    at = head * num_rows + rows
    lse, delta = tl.load(lse_ptr + at), tl.load(delta_ptr + at)
    low, middle, high = _key_range(pos_ptr, start_ptr, first, num_rows, BM, BN)
    k_ptr += group * D
    v_ptr += group * D
    dq = tl.zeros([BM, D_PAD], tl.float32)
    dq = _dq_keys(
        dq, q, dout, lse, delta, k_ptr, v_ptr, low, middle, pos, start, cols,
        num_keys, scale * _LOG2_E, G * D, D, D_PAD, BN, False, PRECISION,
    )  # fmt: skip
    dq = _dq_keys(
        dq, q, dout, lse, delta, k_ptr, v_ptr, middle, high, pos, start, cols,
        num_keys, scale * _LOG2_E, G * D, D, D_PAD, BN, True, PRECISION,
    )  # fmt: skip
    dq = dq * scale + _tile(dq_own_ptr + head * D, rows, cols, N * D, D, D_PAD)
    _store(dq_ptr + head * D, rows, cols, N * D, dq, ids < num_rows, D)


@triton.jit
def _dkv_rows(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, pos_ptr, start_ptr,
    low, high, keys, cols, num_rows, scale,
    N: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BM: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for first in tl.range(low, high, BM, num_stages=1 if MASKED else None):
        ids = first + tl.arange(0, BM)
        rows = tl.minimum(ids, num_rows - 1) if MASKED else ids
        q = _tile(q_ptr, rows, cols, N * D, D, D_PAD)
        dout = _tile(dout_ptr, rows, cols, N * D, D, D_PAD)
        lse, delta = tl.load(lse_ptr + rows), tl.load(delta_ptr + rows)
        scores = tl.dot(k, q.T, input_precision=PRECISION) * scale
        probs = tl.exp2(scores - lse[None, :])
        if MASKED:
            pos, start = tl.load(pos_ptr + rows), tl.load(start_ptr + rows)
            visible = (keys[:, None] <= pos[None, :]) & (keys[:, None] >= start[None, :])
            probs = tl.where(visible & (ids < num_rows)[None, :], probs, 0.0)
        dv = tl.dot(probs.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dprobs = tl.dot(v, dout.T, input_precision=PRECISION)
        dscores = (probs * (dprobs - delta[None, :])).to(q.dtype)
        dk = tl.dot(dscores, q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def dkv_kernel(
    q_ptr, k_ptr, v_ptr, pos_ptr, start_ptr, lse_ptr, dout_ptr, delta_ptr, ranges_ptr,
    dk_ptr, dv_ptr, num_rows, num_keys, scale,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to dk and dv. Rows [low, high) see some key of the block, [full, end) every one."""
    block, group = tl.program_id(0), tl.program_id(1)
    keys = block * BN + tl.arange(0, BN)
    key_rows = tl.minimum(keys, num_keys - 1)
    cols = tl.arange(0, D_PAD)
    k = _tile(k_ptr + group * D, key_rows, cols, G * D, D, D_PAD)
    v = _tile(v_ptr + group * D, key_rows, cols, G * D, D, D_PAD)
    low, full = tl.load(ranges_ptr + block * 4), tl.load(ranges_ptr + block * 4 + 1)
    end, high = tl.load(ranges_ptr + block * 4 + 2), tl.load(ranges_ptr + block * 4 + 3)
    full = tl.minimum(low + (full - low + BM - 1) // BM * BM, tl.maximum(high, low))
    end = full + tl.maximum(end - full, 0) // BM * BM
    dk, dv = tl.zeros([BN, D_PAD], tl.float32), tl.zeros([BN, D_PAD], tl.float32)
    for member in range(N // G):
        head = group * (N // G) + member
        q, dout = q_ptr + head * D, dout_ptr + head * D
        lse, delta = lse_ptr + head * num_rows, delta_ptr + head * num_rows
        dk, dv = _dkv_rows(
            dk, dv, k, v, q, dout, lse, delta, pos_ptr, start_ptr, low, full,
            keys, cols, num_rows, scale * _LOG2_E, N, D, D_PAD, BM, True, PRECISION,
        )  # fmt: skip
        dk, dv = _dkv_rows(
            dk, dv, k, v, q, dout, lse, delta, pos_ptr, start_ptr, full, end,
            keys, cols, num_rows, scale * _LOG2_E, N, D, D_PAD, BM, False, PRECISION,
        )  # fmt: skip
        dk, dv = _dkv_rows(
            dk, dv, k, v, q, dout, lse, delta, pos_ptr, start_ptr, end, high,
            keys, cols, num_rows, scale * _LOG2_E, N, D, D_PAD, BM, True, PRECISION,
        )  # fmt: skip
    ok = keys < num_keys
    dk = dk * scale + _tile(dk_ptr + group * D, key_rows, cols, G * D, D, D_PAD)
    dv += _tile(dv_ptr + group * D, key_rows, cols, G * D, D, D_PAD)
    _store(dk_ptr + group * D, key_rows, cols, G * D, dk, ok, D)
    _store(dv_ptr + group * D, key_rows, cols, G * D, dv, ok, D)
