"""Scales and zero points of weights, in one launch: the range of each group of a row, and what follows from it."""

import torch
import triton.language as tl

from ref.element import max_value, min_value
from ref.format import SCALE_DTYPES

from ..quantize import _exponent, _top
from .decode import round_to_output, to_float32
from .jit import Launcher, kernel, multiple_of_16, stride_kind

COLUMNS = 4096  # of one block


@kernel(do_not_specialize=["n"])
def scale_kernel(
    scale, step, zero, subtracted, bad, w, n, k, groups, stride_w,
    GK: tl.constexpr, FLOOR: tl.constexpr, MINMAX: tl.constexpr, RANGE: tl.constexpr, LARGEST: tl.constexpr, ZERO: tl.constexpr,
    LARGEST_ZERO: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """GROUPS groups of a row a block. FLOOR: the exponent that is taken off a power-of-two scale, else None. ZERO: "none", "int" or "float".

    step, subtracted: scale and zero as they are stored, in float32. bad: becomes 1 where a weight is no finite number.
    """
    row = tl.program_id(0)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    low = tl.full((GROUPS,), 0, tl.float32)
    high = tl.full((GROUPS,), 0, tl.float32)
    field = tl.full((GROUPS,), 0, tl.int32)
    for start in range(0, GK if GK else k, COLUMNS):
        within = start + tl.arange(0, COLUMNS)[None, :]
        column = group[:, None] * GK + within
        inside = (column < k) & (group < groups)[:, None]
        if GK:
            inside = inside & (within < GK)
        v = to_float32(tl.load(w + row.to(tl.int64) * stride_w + column, mask=inside, other=0))
        field = tl.maximum(field, tl.reduce((v.to(tl.int32, bitcast=True) >> 23) & 255, 1, tl.standard._elementwise_max))
        low = tl.minimum(low, tl.reduce(v, 1, tl.standard._elementwise_min))
        high = tl.maximum(high, tl.reduce(v, 1, tl.standard._elementwise_max))
    at = row.to(tl.int64) * groups + group
    there = group < groups
    tl.store(bad + group * 0, 1, mask=there & (field == 255))
    if FLOOR is not None:
        peak = tl.maximum(high, 0.0 - low).to(tl.int32, bitcast=True)
        code = tl.where(peak == 0, 0, tl.maximum((peak >> 23) - FLOOR, 0))
        tl.store(scale + at, code.to(tl.uint8), mask=there)
        tl.store(step + at, tl.where(code == 0, 0x00400000, code << 23).to(tl.float32, bitcast=True), mask=there)
    else:
        if MINMAX:
            raw = high.to(tl.float64) - low.to(tl.float64)
        else:
            raw = tl.maximum(high, 0.0 - low).to(tl.float64)
        raw = raw / tl.full((GROUPS,), RANGE, tl.float64)
        raw = tl.minimum(tl.where(raw == 0, 1.0, raw), tl.full((GROUPS,), LARGEST, tl.float64))
        stored = round_to_output(raw.to(tl.float32), scale.dtype.element_ty)
        tl.store(scale + at, stored, mask=there)
        s = to_float32(stored)
        tl.store(step + at, s, mask=there)
        if ZERO != "none":
            z = (0.0 - low).to(tl.float64) / tl.where(s == 0, 1.0, s).to(tl.float64)
            z = tl.where(s == 0, 0.0, z)
            z = tl.minimum(tl.maximum(z, 0.0), tl.full((GROUPS,), LARGEST_ZERO, tl.float64))
            if ZERO == "int":
                whole = tl.full((GROUPS,), 6755399441055744.0, tl.float64)  # 1.5 * 2^52 leaves no bit below one
                z = (z + whole) - whole
                tl.store(zero + at, z.to(tl.int32).to(tl.uint8), mask=there)
                tl.store(subtracted + at, z.to(tl.float32), mask=there)
            else:
                stored = round_to_output(z.to(tl.float32), zero.dtype.element_ty)
                tl.store(zero + at, stored, mask=there)
                tl.store(subtracted + at, to_float32(stored), mask=there)


_LAUNCH = Launcher(scale_kernel)


def takes(fmt):
    """Whether a format's scales are made here: of groups of a row, in 16 or 32 bits, or powers of two without a zero point."""
    whole = fmt.group[0] == 1 and fmt.scale_2 is None and fmt.offset is None
    return whole and (
        fmt.scale in ("fp32", "fp16", "bf16") or (fmt.scale == "e8m0" and fmt.zero is None and _exponent(_top(fmt.element)) >= 0)
    )


def first_scales(w, fmt):
    """scale, zero (or None) as they are stored, both in float32, and whether some weight is no finite number: int32 (1,), on w's device.

    Args:
        w: (n, k), float16, bfloat16 or float32, columns adjacent; neither n nor k is 0.
    """
    (n, k), element, gk = w.shape, fmt.element, fmt.group[1]
    groups = -(-k // gk) if gk else 1
    dtype = SCALE_DTYPES[fmt.scale] if isinstance(SCALE_DTYPES[fmt.scale], torch.dtype) else torch.uint8
    scale, step = (torch.empty(n, groups, dtype=of, device=w.device) for of in (dtype, torch.float32))
    zero, subtracted, largest = step, step, 0.0
    if fmt.zero is not None:
        kept = torch.uint8 if fmt.zero == "int" else SCALE_DTYPES[fmt.zero]
        largest = float(2**element.bits - 1) if fmt.zero == "int" else torch.finfo(kept).max
        zero, subtracted = (torch.empty(n, groups, dtype=of, device=w.device) for of in (kept, torch.float32))
    bad = torch.zeros(1, dtype=torch.int32, device=w.device)
    columns = min(COLUMNS, 1 << ((gk or k) - 1).bit_length())
    constants = {
        "GK": gk,
        "FLOOR": _exponent(_top(element)) if fmt.scale == "e8m0" else None,
        "MINMAX": fmt.zero is not None,
        "RANGE": max_value(element) - min_value(element) if fmt.zero is not None else _top(element),
        "LARGEST": torch.finfo(dtype).max if dtype.is_floating_point else 0.0,
        "ZERO": "none" if fmt.zero is None else "int" if fmt.zero == "int" else "float",
        "LARGEST_ZERO": largest,
        "GROUPS": max(1, min(COLUMNS // columns, 1 << (groups - 1).bit_length())),
        "COLUMNS": columns,
    }
    args = (scale, step, zero, subtracted, bad, w, n, k, groups, w.stride(0))
    kind = (w.device.index, w.dtype, scale.dtype, zero.dtype, stride_kind(w.stride(0)), multiple_of_16(w), k, groups, *constants.values())
    _LAUNCH(kind, (n, -(-groups // constants["GROUPS"]), 1), args, constants, {"num_warps": 4})
    return scale, None if fmt.zero is None else zero, step, None if fmt.zero is None else subtracted, bad
