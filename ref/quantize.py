"""Quantize and dequantize."""

import functools
import math
from dataclasses import replace

import torch

from .element import decode, encode, largest, min_value, value_list
from .format import SCALE_DTYPES, parse_format
from .hadamard import hadamard
from .pack import pack, unpack
from .qtensor import TENSORS, QTensor, check_parts
from .rounding import round_to
from .rule import RULES, SCALE_2_TOP, default_rule
from .scale import decode_scale, encode_scale, tile, times_scale_2, untile

# Weights that dequantize works on at a time: few enough to stay in a cache and take little memory with all intermediate results,
# enough that starting an operation costs nothing beside it.
CHUNK = 2**19


def dequantize(q, dtype=torch.float64):
    """The numbers that a QTensor stands for.

    w[n, k] = (value[code] - zero) * scale * scale_2 + offset, then the inverse rotation. In float64 this is exact whenever the
    factors have at most 53 significant bits between them (all formats here but those with an 8-bit element and two
    float32 scales), and rounded once in a division by scale_2. A sum with an offset is rounded once where it has more.

    Args:
        q: QTensor of logical shape (..., n, k).
        dtype: of the result; float64, or one rounding from it to float32, float16 or bfloat16.

    Returns:
        dtype (..., n, k).

    Raises:
        TypeError, ValueError: parts of q that disagree, or another dtype.
    """
    check_parts(q, "dequantize")
    if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"dequantize: got {dtype}, expected float64, float32, float16 or bfloat16")
    w = torch.empty(q.shape, dtype=dtype, device=q.packed.device)
    _write_weights(w, q, q.format.hadamard)
    return w


def stored_values(q):
    """dequantize before the inverse rotation: float64 (..., n, k), what the codes and scales say by themselves."""
    w = torch.empty(q.shape, dtype=torch.float64, device=q.packed.device)
    _write_weights(w, q, 0)
    return w


def _write_weights(out, q, block):
    """out[...] = the weights of q, rotated back in blocks of that size, by as many rows at a time as fit a cache."""
    if out.dim() > 2:
        for index, expert in enumerate(out):
            parts = {name: getattr(q, name)[index] for name in TENSORS if getattr(q, name) is not None}
            _write_weights(expert, replace(q, shape=tuple(q.shape[1:]), **parts), block)
        return
    n, k = out.shape
    step = max(1, CHUNK // max(k, 1))
    working = _working_dtype(q.format, out.dtype)
    for start in range(0, n, step):
        w = _stored_rows(q, start, min(start + step, n), working)
        if working == torch.float64:
            w = round_to(hadamard(w, block) if block else w, out.dtype)
        out[start : start + step] = w


def _stored_rows(q, start, stop, working):
    """stored_values of the rows from start to stop of a weight (n, k), computed in the working dtype."""
    fmt, (n, k) = q.format, q.shape
    group_row = torch.arange(start, stop, device=q.packed.device) // (fmt.group[0] or n)
    width = 1 if q.group_index is not None else max(min(fmt.group[1] or k, k), 1)

    def spread(t):
        """A value per group, of these rows: (rows, groups) as (rows, groups, 1); by group_index, a group is one column."""
        return (t if q.group_index is None else t.index_select(1, q.group_index))[..., None]

    codes = unpack(q.packed[start:stop], fmt.element.bits, k)
    codes = torch.nn.functional.pad(codes, (0, -k % width)) if k % width else codes
    w = decode(codes.unflatten(-1, (-1, width)), fmt.element, working)
    scale, zero, offset = (t if t is None else t.index_select(0, group_row) for t in (q.scale, q.zero, q.offset))
    if zero is not None:
        w -= spread(zero.to(working))
    w *= spread(decode_scale(scale, fmt.scale).to(working))
    w = times_scale_2(w, fmt, None if q.scale_2 is None else q.scale_2.expand(n, 1)[start:stop, None])
    if offset is not None:
        w += spread(offset.to(working))
    return w.flatten(-2)[:, :k]


def _working_dtype(fmt, dtype):
    """float32 where it gives the same bits as float64 would, else float64.

    It does where a weight is one product, value times scale. A float32 result rounds that once either way. For a 16-bit result
    float32 must hold the product itself: at most 24 significant bits, none below 2^-149; what overflows it overflows the result.
    """
    if dtype == torch.float64 or fmt.zero not in (None, "int") or fmt.scale_2 or fmt.offset or fmt.hadamard:
        return torch.float64
    bits, lowest, top = _precision(fmt.element)
    if dtype != torch.float32:
        scale_bits, scale_lowest, _ = _precision(SCALE_DTYPES[fmt.scale])
        bits, lowest = bits + scale_bits, lowest * scale_lowest
    return torch.float32 if bits <= 24 and lowest >= 2.0**-149 and top < 2.0**128 else torch.float64


@functools.cache
def _precision(numbers):
    """Of an element's finite values, or a dtype's: the most significant bits, the lowest bit, the largest magnitude."""
    if isinstance(numbers, torch.dtype):
        info = torch.finfo(numbers)
        return round(1 - math.log2(info.eps)), info.smallest_normal * info.eps, info.max
    magnitudes = [abs(v) for v in value_list(numbers) if v and math.isfinite(v)] or [1.0]
    lowest = [(n & -n) / d for n, d in map(float.as_integer_ratio, magnitudes)]
    return max(int(v / low).bit_length() for v, low in zip(magnitudes, lowest, strict=True)), min(lowest), max(magnitudes)


def quantize(w, format, *, rule=None, rounding="nearest_even", generator=None):
    """The nearest weight in a format.

    The scale of each group follows a rule, is rounded to the scale's dtype, and the codes are those of w over the scale as
    it is stored: code = round((w - offset) / (scale * scale_2) + zero), saturated. A scale that rounds to zero leaves zeros.

    Args:
        w: (..., n, k), float16, bfloat16, float32 or float64, finite.
        format: a format name or a Format.
        rule: the name of a scale rule (ref.rule.RULES); None takes the format's usual one (default_rule).
        rounding: of the codes (ref.element.ROUNDINGS).
        generator: torch.Generator for rounding="stochastic".

    Returns:
        QTensor of shape w.shape.

    Raises:
        TypeError: w is not floating-point.
        ValueError: unknown format or rule, w has NaN or inf, or the rule does not apply to the format.

    >>> q = quantize(torch.tensor([[1.0, -2.0, 7.0, 0.4]]), "int4")
    >>> dequantize(q)
    tensor([[ 1., -2.,  7.,  0.]], dtype=torch.float64)
    """
    fmt = parse_format(format)
    check_values("quantize", "w", w)
    rule = default_rule(fmt) if rule is None else rule
    if rule not in RULES:
        raise ValueError(f"quantize: unknown rule {rule!r}, expected one of {', '.join(RULES)}")
    x = w.detach().to(torch.float64)
    if fmt.hadamard:
        x = hadamard(x, fmt.hadamard)
    scale_2 = second_scale(x, fmt)
    tiles, valid = tile(x / times_scale_2(torch.ones_like(x[..., :1]), fmt, scale_2), fmt.group)
    scale, low = RULES[rule](tiles, valid, fmt)
    scale = encode_scale(scale, fmt.scale)
    zero = offset = None
    if fmt.zero is not None:
        zero = _ratio(-low, decode_scale(scale, fmt.scale))
        zero = zero.round().clamp(0, 2**fmt.element.bits - 1).to(torch.uint8) if fmt.zero == "int" else encode_scale(zero, fmt.zero)
    if fmt.offset is not None:
        offset = encode_scale(low - min_value(fmt.element) * decode_scale(scale, fmt.scale), fmt.offset)
    return with_scales(x, fmt, scale, zero, scale_2, offset, rounding, generator)


def with_scales(x, fmt, scale, zero=None, scale_2=None, offset=None, rounding="nearest_even", generator=None):
    """The QTensor of x (float64, already rotated) with the given stored scale, zero, scale_2 and offset."""
    step = times_scale_2(untile(decode_scale(scale, fmt.scale), fmt.group, x.shape), fmt, scale_2)
    codes = _ratio(x if offset is None else x - untile(offset.to(torch.float64), fmt.group, x.shape), step)
    if zero is not None:
        codes = codes + untile(zero.to(torch.float64), fmt.group, x.shape)
    codes = encode(codes, fmt.element, rounding, generator)
    return QTensor(fmt, tuple(x.shape), pack(codes, fmt.element.bits), scale, zero, scale_2, offset=offset)


def second_scale(x, fmt):
    """The second-level scale, or None: the float32 that brings the largest first-level scale to the top of its dtype.

    scale_2 = amax / (largest element value * largest scale), for NVFP4 amax / 2688; a divisor is one over that; where x is all
    zero, 1.
    """
    if fmt.scale_2 is None:
        return None
    by_tensor = fmt.scale_2.startswith("tensor")
    axes = (-2, -1) if by_tensor else (-1,)
    amax = x.abs().amax(axes, keepdim=True) if x.numel() else x.new_zeros(*x.shape[:-2], 1 if by_tensor else x.shape[-2], 1)
    scale_2 = amax / (largest(fmt.element) * SCALE_2_TOP[fmt.scale])
    if fmt.scale_2.endswith("divisor"):
        scale_2 = 1 / scale_2
    # Bounded on both sides, as x may be: scale_2 is a finite float32 and not zero.
    scale_2 = scale_2.clamp(2.0**-149, torch.finfo(torch.float32).max)
    return torch.where(amax == 0, 1.0, scale_2).to(torch.float32)


def _ratio(x, step):
    return torch.where(step == 0, 0.0, x / torch.where(step == 0, 1.0, step))


def check_values(operation, name, x):
    if not isinstance(x, torch.Tensor) or not x.dtype.is_floating_point or x.dtype.itemsize < 2:
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{operation}: {name} is {got}, expected a float16, bfloat16, float32 or float64 tensor")
    if x.dim() < 2:
        raise ValueError(f"{operation}: {name} has shape {tuple(x.shape)}, expected (..., n, k)")
    if not bool(x.isfinite().all()):
        raise ValueError(
            f"{operation}: {name} is {x[~x.isfinite()][0].item()} at {tuple((~x.isfinite()).nonzero()[0].tolist())}, expected finite numbers"
        )
