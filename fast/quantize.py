"""Weights quantized in plain torch: float32 arithmetic, as many rows at a time as stay in a cache."""

import functools
import importlib
import importlib.util
import itertools
import math

import torch

from ref.element import Codebook, Float, Int, max_value, min_value, value_list
from ref.format import parse_format
from ref.qtensor import QTensor

from .codes import pack
from .hadamard import hadamard
from .quantize_input import _decoded, _stored

# Weights at a time: on a CPU what its cache holds with all that is computed from it, on a GPU what keeps it busy.
CHUNK = {"cpu": 2**18, "cuda": 2**26}
# A grid has at most 65535 blocks along its second axis, and where there are several, each has 2048 columns of a row or more.
KERNEL_COLUMNS = 65535 * 2048
# What the largest first-level scale becomes under a second-level one.
SCALE_2_TOP = {"e4m3": 448.0, "e5m2": 57344.0, "ue5m3": 114688.0}


def quantize(w, format, *, rule=None, rounding="nearest_even", generator=None):
    """ref.quantize by the format's usual rule, by code of its own: in float32 (float64 for float64), so that scales are within a few
    roundings of ref's, and codes the nearest for the scales as they are stored.

    Args:
        w: (..., n, k), float16, bfloat16, float32 or float64, finite; any strides.
        rule, rounding, generator: None, "nearest_even" and None are all that there is here.

    Raises:
        TypeError, ValueError: as ref.quantize. NotImplementedError: another rule or rounding.

    >>> quantize(torch.tensor([[1.0, -2.0, 7.0, 0.4]]), "int4").packed
    tensor([[36713]], dtype=torch.int32)
    """
    fmt = parse_format(format)
    if not isinstance(w, torch.Tensor) or w.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        got = w.dtype if isinstance(w, torch.Tensor) else type(w).__name__
        raise TypeError(f"quantize: w is {got}, expected a float16, bfloat16, float32 or float64 tensor")
    if w.dim() < 2:
        raise ValueError(f"quantize: w has shape {tuple(w.shape)}, expected (..., n, k)")
    if rule not in (None, _rule_of(fmt)) or rounding != "nearest_even":
        raise NotImplementedError(
            f"quantize: rule {rule!r} and rounding {rounding!r} for {fmt}; here are {_rule_of(fmt)!r} and 'nearest_even'"
        )
    if fmt.hadamard and w.shape[-1] % fmt.hadamard:
        raise ValueError(f"quantize: k={w.shape[-1]} is no multiple of the rotation's block {fmt.hadamard} in {fmt}")
    *lead, n, k = w.shape
    count = torch.Size(lead).numel()
    # No weight at all has parts, too.
    made = [_quantized(one, fmt) for one in (w.detach().reshape(-1, n, k) if count * n * k else w.new_zeros(max(count, 1), n, k))]
    parts = made[0]
    if lead:
        parts = (None if of[0] is None else torch.stack(of)[:count].reshape(*lead, *of[0].shape) for of in zip(*made, strict=True))
    return QTensor(fmt, tuple(w.shape), **dict(zip(("packed", "scale", "zero", "scale_2", "offset"), parts, strict=True)))


def _rule_of(fmt):
    """The name of a format's usual rule."""
    if fmt.zero is not None or fmt.offset is not None:
        return "minmax"
    if fmt.scale_2 is not None:
        return "two_level"
    return "mx_floor" if fmt.scale == "e8m0" else "absmax"


def _quantized(w, fmt):
    """packed, scale, zero, scale_2 and offset (None where there is none) of one weight (n, k)."""
    if _has_kernel(w, fmt):
        return _at_once(w, fmt)
    n, k = w.shape
    gn = fmt.group[0] or 1
    # Whole groups of rows at a time; if all rows share one scale, their range comes first.
    step = max(gn, CHUNK.get(w.device.type, CHUNK["cuda"]) // max(k, 1) // gn * gn)
    scale_2 = None
    if fmt.scale_2 is not None:
        peaks = [_values(w[i : i + step], fmt).abs().amax(1, keepdim=True) for i in range(0, n, step)] if k else []
        scale_2 = _second_scale(torch.cat(peaks) if peaks else w.new_zeros(n, 1), fmt)
    ranges = _ranges_of_all(w, fmt, scale_2, step) if fmt.group[0] == 0 and n > step else None
    found = [_rows(w[start : start + step], fmt, _rows_of(scale_2, start, step), ranges) for start in range(0, max(n, 1), step)]
    packed, *rest = zip(*found, strict=True)
    if ranges is not None:
        return torch.cat(packed), *(of[0] for of in rest[:2]), scale_2, rest[2][0]
    scale, zero, offset = (None if of[0] is None else torch.cat(of) for of in rest)
    return torch.cat(packed), scale, zero, scale_2, offset


def _rows_of(scale_2, start, step):
    return scale_2 if scale_2 is None or len(scale_2) == 1 else scale_2[start : start + step]


def _values(w, fmt):
    """w in the dtype that is computed in, rotated. Differences from an offset may be too large for float32, and so may units of an element."""
    x = w.double() if w.dtype == torch.float64 or fmt.offset or max_value(fmt.element) > 2.0**100 else w.float()
    return hadamard(x, fmt.hadamard) if fmt.hadamard else x


def _second_scale(peaks, fmt):
    """The float32 that brings the largest first-level scale to the top of its dtype, (1, 1) or (n, 1), from the largest magnitudes (n, 1)."""
    if fmt.scale_2.startswith("tensor"):
        peaks = peaks.amax(0, keepdim=True) if len(peaks) else peaks.new_zeros(1, 1)
    amax = peaks.double()
    scale_2 = amax / (_top(fmt.element) * SCALE_2_TOP.get(fmt.scale, 1.0))
    if fmt.scale_2.endswith("divisor"):
        scale_2 = 1 / scale_2
    return torch.where(amax == 0, 1.0, scale_2.clamp(2.0**-149, torch.finfo(torch.float32).max)).float()


def _scaled(x, fmt, scale_2):
    """x as the first-level scales see it."""
    if scale_2 is None:
        return x
    return x * scale_2 if fmt.scale_2.endswith("divisor") else x / scale_2


def _ranges(x, fmt):
    """The least and the largest number of each group: (a, b) each."""
    tiles = _tiles(x, fmt)
    # Two reductions: on a CPU aminmax takes five times as long.
    low, high = tiles.amin(-1), tiles.amax(-1)
    if tiles.dim() == 4:
        low, high = low.amin(1), high.amax(1)
    return low, high


def _ranges_of_all(w, fmt, scale_2, step):
    parts = [_ranges(_scaled(_values(w[i : i + step], fmt), fmt, _rows_of(scale_2, i, step)), fmt) for i in range(0, len(w), step)]
    return torch.cat([low for low, _ in parts]).amin(0, keepdim=True), torch.cat([high for _, high in parts]).amax(0, keepdim=True)


def _tiles(x, fmt):
    """(a, b, gk), or (a, gn, b, gk) where rows share scales; zeros where a partial group ends."""
    n, k = x.shape
    gn, gk = fmt.group[0] or max(n, 1), fmt.group[1] or max(k, 1)
    b = -(-k // gk) if fmt.group[1] else 1
    a = -(-n // gn) if fmt.group[0] else 1
    if (a * gn, b * gk) != (n, k):
        x = torch.nn.functional.pad(x, (0, b * gk - k, 0, a * gn - n))
    return x.view(a, b, gk) if gn == 1 else x.view(a, gn, b, gk)


def _rows(w, fmt, scale_2, ranges):
    """packed, scale, zero and offset of some rows."""
    n, k = w.shape
    x = _values(w, fmt)
    seen = _scaled(x, fmt, scale_2)
    low, high = _ranges(seen, fmt) if ranges is None else ranges
    _check_finite(x, low, high)
    scale, zero, offset = _first_scales(low, high, fmt)
    step = _decoded(scale, fmt.scale).to(x.dtype)
    tiles = _tiles(seen, fmt)

    def spread(t):
        return t[..., None] if tiles.dim() == 3 else t[:, None, :, None]

    if offset is not None:
        tiles = tiles - spread(offset.to(x.dtype))
    nothing = step == 0
    t = tiles / spread(step)
    if bool(nothing.any()):
        # A scale of zero leaves zeros, none of them negative.
        t = torch.where(spread(nothing), 0.0, t)
    if zero is not None:
        t += spread(zero.to(x.dtype))
    t = t.flatten(-2).flatten(0, -2)[:n, :k]
    return pack(_encoded(t, fmt.element), fmt.element.bits), scale, zero, offset


def _check_finite(x, low, high):
    if not bool((low.isfinite() & high.isfinite()).all()):
        _refuse(x)


def _refuse(x):
    raise ValueError(f"quantize: w holds {x[~x.isfinite()][0].item()}, expected finite numbers")


def _has_kernel(w, fmt):
    """Whether a Triton kernel makes the codes."""
    return w.device.type == "cuda" and importlib.util.find_spec("triton") is not None and _suits_kernel(w, fmt)


def _suits_kernel(w, fmt):
    """Whether float32 is enough, every group has one second-level scale, and a row is not too long for a grid."""
    enough = w.dtype != torch.float64 and fmt.offset is None and max_value(fmt.element) <= 2.0**100
    fits = w.numel() > 0 and w.shape[1] <= KERNEL_COLUMNS
    return enough and fits and (fmt.group[0] == 1 or not (fmt.scale_2 or "").startswith("channel"))


def _at_once(w, fmt):
    """What _quantized gives, without a float32 copy of w but for a rotated one."""
    scales, encode = (importlib.import_module(f"fast.triton.{name}") for name in ("scales", "encode"))
    x = (hadamard(w.float(), fmt.hadamard) if fmt.hadamard else w).contiguous()
    if scales.takes(fmt):
        scale, zero, step, subtracted, bad = scales.first_scales(x, fmt)
        packed = encode.encode(x, fmt, step, subtracted, None)
        if int(bad):
            _refuse(x)
        return packed, scale, zero, None, None
    low, high = (t.float() for t in _ranges(x, fmt))
    scale_2 = None if fmt.scale_2 is None else _second_scale(torch.maximum(high, -low).amax(1, keepdim=True), fmt)
    # The order of the numbers stays when they are scaled.
    low, high = (_scaled(t, fmt, scale_2) for t in (low, high))
    _check_finite(x, low, high)
    scale, zero, _ = _first_scales(low, high, fmt)
    step = _decoded(scale, fmt.scale).float()
    return encode.encode(x, fmt, step, None if zero is None else zero.float(), scale_2), scale, zero, scale_2, None


def _first_scales(low, high, fmt):
    """scale, zero and offset as they are stored, from the range of each group."""
    element = fmt.element
    low, high = low.clamp(max=0), high.clamp(min=0)
    zero = offset = None
    if fmt.zero is None and fmt.offset is None:
        peak, top = torch.maximum(high, -low), _top(element)
        if fmt.scale == "e8m0" and fmt.scale_2 is None:
            exponent = torch.where(peak == 0, -127, torch.frexp(peak).exponent - 1 - _exponent(top))
            return (exponent.clamp(-127, 127) + 127).to(torch.uint8), None, None
        raw = peak.double() / top
    else:
        raw = (high.double() - low.double()) / (max_value(element) - min_value(element))
    scale = _stored(torch.where(raw == 0, 1.0, raw), fmt.scale, up=False)
    if fmt.zero is not None:
        step = _decoded(scale, fmt.scale)
        zero = torch.where(step == 0, 0.0, (0 - low) / torch.where(step == 0, 1.0, step))
        zero = zero.round().clamp(0, 2**element.bits - 1).to(torch.uint8) if fmt.zero == "int" else _stored(zero, fmt.zero, up=False)
    if fmt.offset is not None:
        offset = _stored(low - min_value(element) * _decoded(scale, fmt.scale), fmt.offset, up=False)
    return scale, zero, offset


def _top(element):
    """The magnitude that a scale is made for."""
    return max_value(element) or -min_value(element)


def _exponent(top):
    """floor(log2(top))."""
    return math.frexp(top)[1] - 1


def _encoded(t, element):
    """Codes of the element's values nearest to t, ties to the even code, uint8. t may be overwritten."""
    if not isinstance(element, Int) and (isinstance(element, Codebook) or not (element.subnormal and element.mantissa)):
        edges, codes, by_magnitude = table(element, t.dtype)
        found = torch.bucketize(t.abs() if by_magnitude else t.contiguous(), edges.to(t.device))
        code = codes.to(t.device)[found]
        return code | t.signbit().to(torch.uint8) << (element.bits - 1) if by_magnitude else code
    # Added to 1.5 * 2^mantissa units, t is rounded to whole units, and their number stands in the lowest bits.
    mantissa, integer, bias = {torch.float32: (23, torch.int32, 127), torch.float64: (52, torch.int64, 1023)}[t.dtype]
    if isinstance(element, Int):
        lowest = -(2 ** (element.bits - 1)) if element.signed else 0
        t = t.clamp_(lowest, lowest + 2**element.bits - 1).add_(1.5 * 2**mantissa)
        return t.view(integer).to(torch.uint8).sub_(lowest % 256)
    # The exponent of the lowest binade; below it units stay as they are.
    lowest = bias + (2 - 2 ** (element.exponent - 1) if element.exponent else element.mantissa)
    half = 1 << (mantissa - 1)
    size = (t.abs() if element.signed else t.clamp_(min=min_value(element))).clamp_(max=max_value(element))
    field = (size.view(integer) >> mantissa).clamp_(min=lowest)
    unit = ((field + (mantissa - element.mantissa)) << mantissa) | half
    units = size.add_(unit.view(t.dtype)).view(integer) & (half - 1)
    code = (field.sub_(lowest) << element.mantissa).add_(units)
    return (code | (t.view(integer) < 0).to(integer) << (element.bits - 1) if element.signed else code).to(torch.uint8)


@functools.cache
def table(element, dtype):
    """The largest t of a dtype that each of an element's values, in ascending order, is nearest to, but for the last; and their codes.

    Of codes with one value the first stands for all. Floats with a sign and a zero are searched by magnitude (the third result says so): the
    sign of a negative zero stays.
    """
    values = value_list(element)
    by_magnitude = isinstance(element, Float) and element.signed and 0.0 in values
    if by_magnitude:
        values = values[: len(values) // 2]
    pairs = sorted((v, code) for code, v in enumerate(values) if math.isfinite(v) and v not in values[:code])
    edges = []
    for (v0, code), (v1, above) in itertools.pairwise(pairs):
        middle = torch.tensor((v0 + v1) / 2, dtype=torch.float64)
        edge = middle.to(dtype)
        # A tie goes up where only the upper code is even.
        if edge.double() > middle or (edge.double() == middle and code % 2 and not above % 2):
            edge = torch.nextafter(edge, edge.new_tensor(-torch.inf))
        edges.append(edge)
    codes = torch.tensor([code for _, code in pairs], dtype=torch.uint8)
    return torch.stack(edges) if edges else torch.empty(0, dtype=dtype), codes, by_magnitude
