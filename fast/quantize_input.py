"""Quantized activations in plain torch: float32 arithmetic, no table, no look-up."""

import torch

from ref.element import Int, max_value
from ref.format import SCALE_DTYPES, check_input_format, parse_format
from ref.qtensor import QTensor

from .codes import pack
from .hadamard import hadamard

SMALLEST_SCALE = 1e-30


def quantize_input(x, format, x_scale=None):
    """ref.quantize_input, by code of its own; x is not checked for NaN, which gives a NaN scale to its group.

    Scales are within one float32 rounding of ref's, codes equal to ref's but for ties.
    """
    fmt = parse_format(format)
    check_input_format(fmt, x_scale, "quantize_input")
    if not isinstance(x, torch.Tensor) or x.dtype not in (torch.float16, torch.bfloat16, torch.float32) or x.dim() < 1:
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"quantize_input: x is {got}, expected float16, bfloat16 or float32 of shape (..., k)")
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(x.shape[:-1].numel(), 0)
    turned = _rotated(rows, fmt)
    steps, scale, scale_2 = _scales(turned, fmt, x_scale)
    units, exponent = _round(turned / steps, fmt.element)
    return QTensor(fmt, tuple(rows.shape), pack(_codes(units, exponent, fmt.element), fmt.element.bits), scale, None, scale_2)


def quantized_values(x, fmt, x_scale):
    """What the quantized x (m, k) stands for: float64 (m, k)."""
    rows = _rotated(x, fmt)
    steps, scale, scale_2 = _scales(rows, fmt, x_scale)
    units, exponent = _round(rows / steps, fmt.element)
    gk = fmt.group[1] or max(x.shape[1], 1)
    step = _decoded(scale, fmt.scale) if scale_2 is None else _decoded(scale, fmt.scale) * scale_2.double()
    y = torch.ldexp(units.double(), exponent) * step.repeat_interleave(gk, 1)[:, : x.shape[1]]
    return hadamard(y, fmt.hadamard) if fmt.hadamard else y


def _rotated(x, fmt):
    return hadamard(x.float(), fmt.hadamard) if fmt.hadamard else x.float()


def _scales(x, fmt, x_scale):
    """The step of each x, float32, broadcastable to (m, k); scale as stored; scale_2 or None."""
    m, k = x.shape
    top = 2 ** (fmt.element.bits - 1) - 1 if isinstance(fmt.element, Int) else max_value(fmt.element)
    gk = fmt.group[1] or max(k, 1)
    groups = -(-k // gk) if fmt.group[1] else 1
    if fmt.group[0] == 0 and x_scale is not None:
        raw = x_scale.float().reshape(1, 1)
        stored = _stored(raw, fmt.scale, up=False)
        return _decoded(stored, fmt.scale).float(), stored, None
    padded = torch.nn.functional.pad(x, (0, groups * gk - k)).view(m, groups, gk)
    amax = padded.abs().amax(-1)
    if fmt.group[0] == 0:
        amax = amax.amax(0, keepdim=True) if m else amax.new_zeros(1, groups)
    raw = (amax / top).clamp(min=SMALLEST_SCALE)
    scale_2 = None
    if fmt.scale_2 == "tensor":
        scale_2 = x_scale.float().reshape(1, 1)
        raw = raw / scale_2
    elif fmt.scale_2 == "channel":
        mantissa, exponent = torch.frexp(raw)
        raw = torch.ldexp(torch.ceil(mantissa * 16), exponent - 4)
        peak = raw.amax(-1, keepdim=True) if groups else raw.new_ones(m, 1)
        mantissa, exponent = torch.frexp(peak / 448)
        scale_2 = torch.ldexp(torch.ones_like(peak), exponent - (mantissa == 0.5).int())
        raw = raw / scale_2
    stored = _stored(raw, fmt.scale, up=True)
    step = _decoded(stored, fmt.scale).float()
    step = step if scale_2 is None else step * scale_2
    return step.repeat_interleave(gk, 1)[:, :k], stored, scale_2


def _stored(scale, name, up):
    """float32 scales as stored, rounded up or to nearest even."""
    target = SCALE_DTYPES[name]
    if isinstance(target, torch.dtype):
        near = scale.clamp(-torch.finfo(target).max, torch.finfo(target).max).to(target)
        if not up:
            return near
        integer = near.view({4: torch.int32, 2: torch.int16}[near.element_size()])
        return torch.where((near.float() < scale) & (near < torch.finfo(target).max), (integer + 1).view(target), near)
    units, exponent = _round(scale, target, torch.ceil if up else torch.round)
    return _codes(units, exponent, target)


def _decoded(stored, name):
    """float64 scales: the bits of an 8-bit float read as an integer times a power of two."""
    target = SCALE_DTYPES[name]
    if isinstance(target, torch.dtype):
        return stored.double()
    code = stored.int() & (2 ** (target.exponent + target.mantissa) - 1)
    field, fraction = code >> target.mantissa, code & (2**target.mantissa - 1)
    normal = (field > 0) | (not target.subnormal)
    unit = torch.where(normal, fraction + 2**target.mantissa, fraction).double()
    value = torch.ldexp(unit, torch.where(normal, field, 1) - (2 ** (target.exponent - 1) - 1) - target.mantissa)
    value = torch.where(code == 2 ** (target.exponent + target.mantissa) - 1, torch.nan, value)
    return torch.where((stored > code) & target.signed, -value, value)


def _round(t, element, to_integer=torch.round):
    """t as an integer number of units in the last place, saturated: (units float32, exponent int32), t ~ units * 2^exponent."""
    if isinstance(element, Int):
        return to_integer(t).clamp(-(2 ** (element.bits - 1)), 2 ** (element.bits - 1) - 1), torch.zeros_like(t, dtype=torch.int32)
    top = max_value(element)
    bias = 2 ** (element.exponent - 1) - 1 if element.exponent else 0
    lowest = (1 - bias if element.subnormal else -bias) if element.exponent else element.mantissa
    t = t.clamp(-top, top)
    exponent = (torch.frexp(t).exponent - 1).clamp(min=lowest) - element.mantissa
    units = to_integer(torch.ldexp(t, -exponent))
    if not element.subnormal:
        units = units.clamp(min=1)
    grown = units.abs() == 2 ** (element.mantissa + 1)
    return torch.where(grown, units / 2, units), exponent + grown.int()


def _codes(units, exponent, element):
    """uint8 codes of units * 2^exponent."""
    if isinstance(element, Int):
        return (units + 2 ** (element.bits - 1)).to(torch.uint8)
    bias = 2 ** (element.exponent - 1) - 1 if element.exponent else 0
    magnitude = units.abs().nan_to_num(0).int()
    implied = 2**element.mantissa if element.exponent else 0
    normal = (magnitude >= 2**element.mantissa) & (element.exponent > 0)
    code = torch.where(normal, ((exponent + element.mantissa + bias) << element.mantissa) + magnitude - implied, magnitude)
    code = torch.where(units.isnan(), 2 ** (element.exponent + element.mantissa) - 1, code)
    sign = units.signbit().int() << (element.bits - 1) if element.signed else 0
    return (code | sign).to(torch.uint8)
