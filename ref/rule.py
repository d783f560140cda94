"""Scale rules: which scale a group of weights gets, by name.

A rule takes tiles, float64 (..., a, b, gn * gk): the weights of each group, zeros where a partial group ends; valid, bool,
which of them are weights; and the format. It returns (scale, low), float64 (..., a, b): the scale before it is rounded to
its dtype, and the lowest value to be represented, from which a zero point follows. Every range is widened to hold zero. A
group of zeros takes scale 1 (power-of-two rules: the smallest).
"""

import torch

from .element import Float, Int, decode, encode, largest, max_value, min_value
from .format import SCALE_DTYPES
from .scale import decode_scale, encode_scale

# What the largest first-level scale becomes under a second-level one.
SCALE_2_TOP = {"fp32": 1.0, "fp16": 1.0, "bf16": 1.0, "e8m0": 1.0, "e4m3": 448.0, "e5m2": 57344.0, "ue5m3": 114688.0}

# GPTQ's search: shrink the range by 1 % at a time down to a fifth of it, and weigh errors with this power.
MSE_STEPS, MSE_SHRINK, MSE_NORM = 80, 0.01, 2.4


def absmax(tiles, valid, fmt):
    """scale = max|w| / the largest value (int4: 7, e2m1: 6, e4m3: 448; one-bit integers, {-1, 0}: 1)."""
    return _amax(tiles, largest(fmt.element)), _low(tiles)


def full_range(tiles, valid, fmt):
    """scale = max|w| / ((2^b - 1) / 2), for int4 7.5: compressed-tensors' rule; +max|w| saturates by half a step."""
    _needs(isinstance(fmt.element, Int) and fmt.element.signed, "full_range", fmt, "a signed integer element")
    return _amax(tiles, (2**fmt.element.bits - 1) / 2), _low(tiles)


def minmax(tiles, valid, fmt):
    """scale = (max w - min w) / (2^b - 1), with a zero point, zero = -min w / scale, or an offset: min w - the lowest value * scale.

    Elements that are no integers have their largest value less their lowest in the place of 2^b - 1.
    """
    _needs(fmt.zero is not None or fmt.offset is not None, "minmax", fmt, "a zero point or an offset")
    low, high = tiles.amin(-1).clamp(max=0), tiles.amax(-1).clamp(min=0)
    return _nonzero((high - low) / (max_value(fmt.element) - min_value(fmt.element))), low


def mx_floor(tiles, valid, fmt):
    """scale = 2^(floor(log2 max|w|) - emax), emax the exponent of the largest value (OCP MX 1.0)."""
    return _power_of_two(_floor_log2(_peak(tiles)) - _emax(fmt)), _low(tiles)


def mx_ceil(tiles, valid, fmt):
    """scale = 2^(ceil(log2 max|w|) - emax)."""
    return _power_of_two(_ceil_log2(_peak(tiles)) - _emax(fmt)), _low(tiles)


def mx_rceil(tiles, valid, fmt):
    """scale = 2^ceil(log2(max|w| / the largest value)), the quotient rounded to float32: nothing saturates."""
    return _power_of_two(
        _ceil_log2((_peak(tiles) / largest(fmt.element)).clamp(max=torch.finfo(torch.float32).max).float().double())
    ), _low(tiles)


def mx_even(tiles, valid, fmt):
    """mx_floor of max|w| plus half a unit in the last place of the element's mantissa (Quark's even_round)."""
    _needs(isinstance(fmt.element, Float), "mx_even", fmt, "a float element")
    peak = _peak(tiles)
    half_ulp = torch.ldexp(torch.ones_like(peak), _floor_log2(peak) - fmt.element.mantissa - 1)
    return _power_of_two(_floor_log2(torch.where(peak == 0, peak, peak + half_ulp)) - _emax(fmt)), _low(tiles)


def two_level(tiles, valid, fmt):
    """absmax under a second-level scale: for NVFP4 scale = max|w| / 6 / scale_2, scale_2 = max over the tensor / 2688."""
    _needs(fmt.scale_2 is not None, "two_level", fmt, "a second-level scale")
    return absmax(tiles, valid, fmt)


def negative_scale(tiles, valid, fmt):
    """Humming's: the larger side takes code 0 (value -2^(b-1)), by a negative scale where that side is positive.

    scale = max(M / 2^(b-1), m / (2^(b-1) - 1)), M and m the larger and the smaller of max w and -min w (one bit: divisors
    1.499 and 0.499), negated where max w > -min w. A scale dtype without a sign keeps the scale positive: then +M saturates.
    """
    _needs(isinstance(fmt.element, Int) and fmt.element.signed, "negative_scale", fmt, "a signed integer element")
    half = 2 ** (fmt.element.bits - 1)
    bottom, top = (1.499, 0.499) if half == 1 else (half, half - 1)
    high, low = tiles.amax(-1).clamp(min=0), -tiles.amin(-1).clamp(max=0)
    scale = torch.maximum(torch.maximum(high, low) / bottom, torch.minimum(high, low) / top)
    return _nonzero(torch.where((high > low) & (not _unsigned(fmt.scale)), -scale, scale)), -low


def mse(tiles, valid, fmt):
    """The format's usual rule with the range shrunk by 0 to 79 %, whichever leaves the least sum of |error|^2.4 (GPTQ's search)."""
    scale, low = RULES[default_rule(fmt)](tiles, valid, fmt)
    best = torch.full_like(scale, torch.inf)
    best_scale, best_low = scale, low
    for step in range(MSE_STEPS):
        shrink = 1 - step * MSE_SHRINK
        stored = decode_scale(encode_scale(scale * shrink, fmt.scale), fmt.scale)[..., None]
        stored = torch.where(stored == 0, 1.0, stored)
        zero = 0.0
        if fmt.zero is not None:
            zero = -low[..., None] * shrink / stored
            zero = (
                zero.round().clamp(0, 2**fmt.element.bits - 1)
                if fmt.zero == "int"
                else decode_scale(encode_scale(zero, fmt.zero), fmt.zero)
            )
        elif fmt.offset is not None:
            offset = low[..., None] * shrink - min_value(fmt.element) * stored
            zero = -decode_scale(encode_scale(offset, fmt.offset), fmt.offset) / stored
        values = (decode(encode(tiles / stored + zero, fmt.element), fmt.element) - zero) * stored
        error = torch.where(valid, (values - tiles).abs() ** MSE_NORM, 0.0).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale * shrink, best_scale)
        best_low = torch.where(better, low * shrink, best_low)
    return best_scale, best_low


RULES = {
    "absmax": absmax,
    "full_range": full_range,
    "minmax": minmax,
    "mx_floor": mx_floor,
    "mx_ceil": mx_ceil,
    "mx_rceil": mx_rceil,
    "mx_even": mx_even,
    "two_level": two_level,
    "negative_scale": negative_scale,
    "mse": mse,
}


def default_rule(fmt):
    """The usual rule of a format: minmax with a zero point or an offset, two_level with a second-level scale, mx_floor for e8m0, else absmax."""
    if fmt.zero is not None or fmt.offset is not None:
        return "minmax"
    if fmt.scale_2 is not None:
        return "two_level"
    return "mx_floor" if fmt.scale == "e8m0" else "absmax"


def _peak(tiles):
    return tiles.abs().amax(-1)


def _amax(tiles, limit):
    return _nonzero(_peak(tiles) / limit)


def _nonzero(scale):
    return torch.where(scale == 0, 1.0, scale)


def _low(tiles):
    return tiles.amin(-1).clamp(max=0)


def _floor_log2(x):
    return torch.where(x == 0, -(2**14), torch.frexp(x).exponent - 1)


def _ceil_log2(x):
    mantissa, exponent = torch.frexp(x)
    return torch.where(x == 0, -(2**14), exponent - (mantissa == 0.5).int())


def _emax(fmt):
    return int(_floor_log2(torch.tensor(largest(fmt.element), dtype=torch.float64)))


def _power_of_two(exponent):
    return torch.ldexp(torch.ones(exponent.shape, dtype=torch.float64, device=exponent.device), exponent.clamp(-127, 127))


def _unsigned(scale):
    target = SCALE_DTYPES[scale]
    return isinstance(target, Float) and not target.signed


def _needs(holds, rule, fmt, what):
    if not holds:
        raise ValueError(f"quantize: rule {rule!r} needs {what}, and {fmt} has none")
