"""Routing: the best experts of some tokens by repeated maximum, in float32."""

import triton.language as tl

from .decode import to_float32
from .jit import Launcher, device_function, interprets, kernel, multiple_of_16, stride_kind


@device_function
def ordered(v):
    """float32 as int32 of the same order; NaN below all numbers."""
    u = v.to(tl.int32, bitcast=True)
    u = tl.where(v == 0.0, 0, u)  # -0 is 0
    u = tl.where(u < 0, u ^ 0x7FFFFFFF, u)
    return tl.where(v == v, u, -0x7FFFFFFF)


@device_function
def first_best(key, lane, EXPERTS: tl.constexpr):
    """Of each row the lane with the largest key, the lowest of equals."""
    # The lane counts backwards in the low bits, so that of equals the lower is larger.
    joined = (key.to(tl.int64) << 32) | (EXPERTS - 1 - lane)[None, :].to(tl.int64)
    best = tl.reduce(joined, 1, tl.standard._elementwise_max)
    return EXPERTS - 1 - (best & 0xFFFFFFFF).to(tl.int32)


@device_function
def log1p(z):
    """log(1 + z) of 0 <= z <= 1, to a few units in the last place: 2 atanh(z / (2 + z)) by its series. 1 + z would lose the low bits of z."""
    s = z / (2.0 + z)
    s2 = s * s
    tail = 1.0 / 11 + s2 * (1.0 / 13 + s2 * (1.0 / 15))
    return 2.0 * s * (1.0 + s2 * (1.0 / 3 + s2 * (1.0 / 5 + s2 * (1.0 / 7 + s2 * (1.0 / 9 + s2 * tail)))))


@kernel(do_not_specialize=["m", "num_valid"])
def topk_kernel(
    ids, weights, logits, bias, table, tokens, m, num_valid, e, vocabulary, stride_m, epsilon, factor, shared_weight,
    TOP_K: tl.constexpr, SHARED: tl.constexpr, SCORING: tl.constexpr, BIAS: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr,
    HASH: tl.constexpr, RENORMALIZE: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """ids and weights of ROWS tokens a program; see fast.moe.topk."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, EXPERTS)
    inside = (row < m)[:, None] & (lane < e)[None, :]
    v = to_float32(tl.load(logits + row.to(tl.int64)[:, None] * stride_m + lane[None, :], mask=inside, other=0.0))
    # Not by other=: bfloat16 that is seen as int16 has no infinity.
    v = tl.where(inside, v, float("-inf"))
    if SCORING == "softmax":
        top = tl.reduce(tl.where(v == v, v, float("-inf")), 1, tl.standard._elementwise_max)
        power = tl.where(inside, tl.exp(v - top[:, None]), 0.0)
        score = power / tl.reduce(power, 1, tl.standard._sum_combine)[:, None]
    elif SCORING == "sigmoid":
        score = 1.0 / (1.0 + tl.exp(-v))
    else:
        score = tl.sqrt(tl.where(v > 0, v, 0.0) + log1p(tl.exp(-tl.abs(v))))
        score = tl.where(v == v, score, v)

    worth = score
    if SCORING == "softmax" and not BIAS:
        worth = v  # of the same order, and without its rounding
    if BIAS:
        worth = score + to_float32(tl.load(bias + lane, mask=lane < e, other=0.0))[None, :]
    key = tl.where(inside, ordered(worth), -0x80000000)
    if GROUPS > 0:
        group = (lane // (e // GROUPS))[None, :]
        worth = tl.where(worth == worth, worth, float("-inf"))
        mine = tl.full((ROWS, EXPERTS), 0, tl.float32)
        for g in tl.static_range(GROUPS):
            member = inside & (group == g)
            w = tl.where(member, worth, float("-inf"))
            best = tl.reduce(w, 1, tl.standard._elementwise_max)
            if BIAS:
                at = first_best(tl.where(member, ordered(w), -0x80000000), lane, EXPERTS)
                others = member & (lane[None, :] != at[:, None])
                second = tl.reduce(tl.where(others, worth, float("-inf")), 1, tl.standard._elementwise_max)
                best = tl.where(e // GROUPS > 1, best + second, best)
            mine = tl.where(group == g, best[:, None], mine)
        ahead = tl.full((ROWS, EXPERTS), 0, tl.int32)
        for g in tl.static_range(GROUPS):
            theirs = tl.reduce(tl.where(inside & (group == g), mine, float("-inf")), 1, tl.standard._elementwise_max)[:, None]
            ahead += ((theirs > mine) | ((theirs == mine) & (g < group))).to(tl.int32)
        # Experts of other groups come behind all of these, before the lanes that are no experts.
        key = tl.where(inside & (ahead >= KEPT), -0x7FFFFFFF, key)
        key = tl.where(inside & (ahead < KEPT), tl.maximum(key, -0x7FFFFFFE), key)

    total = tl.full((ROWS,), 0, tl.float32)
    valid = row < tl.minimum(m, num_valid)
    out = row.to(tl.int64) * (TOP_K + SHARED)
    if HASH:
        token = tl.load(tokens + row, mask=row < m, other=0).to(tl.int64)
        legal = (token >= 0) & (token < vocabulary)
    for t in tl.static_range(TOP_K):
        if HASH:
            at = tl.load(table + token * TOP_K + t, mask=(row < m) & legal, other=-1).to(tl.int32)
            at = tl.where((at >= 0) & (at < e), at, -1)
        else:
            at = first_best(key, lane, EXPERTS)
            key = tl.where(lane[None, :] == at[:, None], -0x80000000, key)
        weight = tl.reduce(tl.where(lane[None, :] == at[:, None], score, 0.0), 1, tl.standard._sum_combine)
        total += weight
        tl.store(ids + out + t, tl.where(valid, at, -1), mask=row < m)
        tl.store(weights + out + t, tl.where(valid, weight, 0.0), mask=row < m)
    # The chosen scores are divided by their sum once it is known.
    tl.debug_barrier()
    for t in tl.static_range(TOP_K):
        weight = tl.load(weights + out + t, mask=row < m, other=0.0)
        if RENORMALIZE:
            # With a table all slots of a row may be without an expert: 0 / 0 is 0 there.
            weight = tl.where(HASH & (total == 0.0), 0.0, weight / (total + epsilon))
        tl.store(weights + out + t, tl.where(valid, weight * factor, 0.0), mask=row < m)
    for t in tl.static_range(SHARED):
        tl.store(ids + out + TOP_K + t, tl.where(valid, e + t, -1), mask=row < m)
        tl.store(weights + out + TOP_K + t, tl.where(valid, shared_weight, 0.0), mask=row < m)


_launch = Launcher(topk_kernel)


def fused_topk(
    logits, top_k, ids, weights, *, scoring_func, bias, groups, kept, epsilon, factor, shared, shared_weight, num_valid, table, tokens
):
    """Fill ids and weights (m, top_k + shared); epsilon None: no renormalization; table and tokens: hash routing, or None."""
    m, e = logits.shape
    if m == 0:
        return
    experts = 1 << (e - 1).bit_length()
    interpret = interprets(logits.device)
    rows = 1 << (m - 1).bit_length() if interpret else max(1, min(4, 512 // experts))
    constants = {
        "TOP_K": top_k, "SHARED": shared, "SCORING": scoring_func, "BIAS": bias is not None, "GROUPS": groups or 0, "KEPT": kept or 0,
        "HASH": table is not None, "RENORMALIZE": epsilon is not None, "ROWS": rows, "EXPERTS": experts,
    }  # fmt: skip
    args = (
        ids, weights, logits, logits if bias is None else bias, ids if table is None else table, ids if tokens is None else tokens, m,
        m if num_valid is None else num_valid, e, 0 if table is None else table.shape[0], logits.stride(0), float(epsilon or 0.0),
        float(factor), float(shared_weight),
    )  # fmt: skip
    kind = (
        *(t.dtype for t in args[:6]), *map(multiple_of_16, args[:6]), e, args[9], stride_kind(logits.stride(0)), *constants.values(),
    )  # fmt: skip
    _launch(kind, (-(-m // rows), 1, 1), args, constants, {"num_warps": 4 if rows * experts >= 512 else 1})
