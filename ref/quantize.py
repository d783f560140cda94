"""Quantize and dequantize."""

import torch

from .element import decode, encode, largest, min_value
from .format import parse_format
from .hadamard import hadamard
from .pack import pack, unpack
from .qtensor import QTensor, check_parts
from .rounding import round_to
from .rule import RULES, SCALE_2_TOP, default_rule
from .scale import decode_scale, encode_scale, tile, times_scale_2, untile


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
    w = stored_values(q)
    return round_to(hadamard(w, q.format.hadamard) if q.format.hadamard else w, dtype)


def stored_values(q):
    """dequantize before the inverse rotation: float64 (..., n, k), what the codes and scales say by themselves."""
    codes = unpack(q.packed, q.format.element.bits, q.shape[-1])
    w = decode(codes, q.format.element)
    if q.zero is not None:
        w = w - _expand(q.zero.to(torch.float64), q)
    w = times_scale_2(w * _expand(decode_scale(q.scale, q.format.scale), q), q.format, q.scale_2)
    return w if q.offset is None else w + _expand(q.offset.to(torch.float64), q)


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


def _expand(t, q):
    """A value per group as a value per weight, by group_index where there is one."""
    if q.group_index is None:
        return untile(t, q.format.group, q.shape)
    n, gn = q.shape[-2], q.format.group[0]
    rows = torch.arange(n, device=t.device) // gn if gn else torch.zeros(n, dtype=torch.long, device=t.device)
    columns = q.group_index.long()[..., None, :].expand(*q.shape)
    return t.index_select(-2, rows).gather(-1, columns)


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
