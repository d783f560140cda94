"""Codes of weights and their bitstream, in one launch: each weight over its step, rounded to the nearest element, and packed."""

import functools

import torch
import triton.language as tl

from ref.element import Int, min_value

from ..quantize import table
from .decode import to_float32
from .jit import Launcher, kernel, multiple_of_16, stride_kind

CODES = 2048  # of one block


@kernel(do_not_specialize=["n"])
def encode_kernel(
    packed, w, step, zero, scale_2, edges, codes, n, k, words, groups, stride_w, stride_2,
    GN: tl.constexpr, GK: tl.constexpr, ZERO: tl.constexpr, SECOND: tl.constexpr, INTEGER: tl.constexpr, LOW: tl.constexpr, LEVELS: tl.constexpr,
    BY_MAGNITUDE: tl.constexpr, BITS: tl.constexpr, RUN: tl.constexpr, OUT: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """RUNS runs of RUN codes of a row a block, OUT words each.

    GN, GK: rows and columns of a group, 0: all. SECOND: what x is to scale_2 first: "times", "over" or "none". INTEGER: codes count from LOW; else
    they are looked up between 2^LEVELS - 1 edges, the last ones infinite.
    """
    row = tl.program_id(0)
    run = tl.program_id(1) * RUNS + tl.arange(0, RUNS)[:, None]
    column = run * RUN + tl.arange(0, RUN)[None, :]
    inside = column < k
    t = to_float32(tl.load(w + row.to(tl.int64) * stride_w + column, mask=inside, other=0))
    if SECOND == "times":
        t = t * tl.load(scale_2 + row * stride_2)
    elif SECOND == "over":
        t = tl.div_rn(t, tl.load(scale_2 + row * stride_2))
    first = (row // GN).to(tl.int64) * groups if GN else 0
    group = tl.full((RUNS, RUN), 0, tl.int32)
    if GK:
        group += column // GK
    s = tl.load(step + first + group, mask=inside, other=0)
    nothing = s == 0
    t = tl.where(nothing, 0.0, tl.div_rn(t, tl.where(nothing, 1.0, s)))
    if ZERO:
        t += tl.load(zero + first + group, mask=inside, other=0)
    if INTEGER:
        # The sum with 1.5 * 2^23 is rounded to an integer, which stands in its lowest bits.
        t = tl.minimum(tl.maximum(t, LOW), LOW + ((1 << BITS) - 1)) + 12582912.0
        code = t.to(tl.int32, bitcast=True) - (0x4B400000 + LOW)
    else:
        size = tl.abs(t) if BY_MAGNITUDE else t
        found = tl.full((RUNS, RUN), 0, tl.int32)
        for level in tl.static_range(LEVELS):
            next = found + (1 << (LEVELS - 1 - level))
            found = tl.where(tl.load(edges + next - 1) < size, next, found)
        code = tl.load(codes + found).to(tl.int32)
        if BY_MAGNITUDE:
            code = code | (((t.to(tl.int32, bitcast=True) >> 31) & 1) << (BITS - 1))
    code = tl.where(inside, code, 0)
    for j in tl.static_range(OUT):
        # Where in word j a code begins; less than zero, or 32 and more, where another word has it or a part of it.
        at = tl.arange(0, RUN)[None, :] * BITS - 32 * j
        here = (at >= 0) & (at < 32)
        before = (at < 0) & (at > -BITS)
        part = tl.where(here, code << tl.where(here, at, 0), tl.where(before, code >> tl.where(before, -at, 0), 0))
        word = tl.reduce(part, 1, tl.standard._sum_combine, keep_dims=True)
        number = run * OUT + j
        tl.store(packed + row.to(tl.int64) * words + number, word, mask=number < words)


_LAUNCH = Launcher(encode_kernel)


def encode(w, fmt, step, zero, scale_2):
    """The bitstream of w's codes: int32 (n, words).

    Args:
        w: (n, k), float16, bfloat16 or float32, columns adjacent. step: float32 (a, b), the scale of each group as it is stored. zero: float32
            (a, b), or None. scale_2: float32 (1, 1) or (n, 1), or None.
    """
    n, k = w.shape
    bits, element = fmt.element.bits, fmt.element
    words = -(-k * bits // 32)
    packed = torch.empty(n, words, dtype=torch.int32, device=w.device)
    if not packed.numel():
        return packed
    run, out = (32 // bits, 1) if 32 % bits == 0 else (32, bits)
    integer = isinstance(element, Int)
    edges, codes, by_magnitude, levels = (step, step, False, 0) if integer else _table(element, w.device)
    second = "none" if scale_2 is None else "times" if fmt.scale_2.endswith("divisor") else "over"
    gn, gk = fmt.group
    runs = min(CODES // run, 1 << max(-(-k // run) - 1, 0).bit_length())
    constants = {
        "GN": gn,
        "GK": gk,
        "ZERO": zero is not None,
        "SECOND": second,
        "INTEGER": integer,
        "LOW": int(min_value(element)) if integer else 0,
    }
    constants |= {"LEVELS": levels, "BY_MAGNITUDE": by_magnitude, "BITS": bits, "RUN": run, "OUT": out, "RUNS": runs}
    step, zero, scale_2 = (step if t is None else t.contiguous() for t in (step, zero, scale_2))
    stride_2 = int(scale_2.shape[0] > 1)
    args = (packed, w, step, zero, scale_2, edges, codes, n, k, words, step.shape[1], w.stride(0), stride_2)
    sizes = k, words, step.shape[1], stride_2
    aligned = tuple(multiple_of_16(t) for t in (w, step, zero, scale_2, edges, codes))
    kind = (w.device.index, w.dtype, stride_kind(w.stride(0)), aligned, sizes, *constants.values())
    _LAUNCH(kind, (n, -(-k // (run * runs)), 1), args, constants, {"num_warps": 4})
    return packed


@functools.cache
def _table(element, device):
    """The element's edges, as many as a power of two less one, codes and the rest of fast.quantize.table."""
    edges, codes, by_magnitude = table(element, torch.float32)
    levels = len(edges).bit_length()
    size = 2**levels
    edges = torch.nn.functional.pad(edges, (0, size - 1 - len(edges)), value=torch.inf)
    codes = torch.nn.functional.pad(codes, (0, size - len(codes)))
    return edges.to(device), codes.to(device), by_magnitude, levels
