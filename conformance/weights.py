"""Weights from a seed: every code, scale and zero point that a format can hold, not only those that a quantizer would make."""

import functools
import math
from dataclasses import replace

import torch

from ref.element import Float, Int, encode, max_value, min_value, value_list
from ref.format import SCALE_DTYPES, parse_format
from ref.pack import pack
from ref.qtensor import TENSORS, QTensor
from ref.rounding import round_to
from ref.scale import encode_scale

from .regimes import below, hashed, normal

TABLE = 1024

# Scales times two to this are around the smallest normal one of their dtype.
SMALLEST = {"fp32": -122, "bf16": -122, "e8m0": -122, "fp16": -12, "e4m3": -5, "e5m2": -12, "ue5m3": -12}


def draw_weight(seed, fmt, shape, data="normal", order=False, bits=7, scales=True, positive=False):
    """A QTensor on the CPU, without any quantization.

    Args:
        data: "exact": codes whose values are multiples of one power of two and at most 2^bits times it, scales that are powers of
            two, integer zero points. Other regimes: half of the seeds have normally distributed values, half have all finite
            codes alike; scales of any mantissa over some octaves (negative in an eighth of the groups where the dtype has a
            sign), any zero point. "subnormal_scale": scales around and below the smallest normal one. "unique": all codes alike, and
            scales that differ from group to group, of 8 bits.
        order: with a group_index.
        scales: False makes all scales of "exact" one and the same.
        positive: no negative weights, as far as codes decide that.
    """
    fmt = parse_format(fmt)
    *lead, n, k = shape
    table = exact_codes(fmt.element, bits, seed % 64) if data == "exact" else _codes(fmt.element, data == "unique" or seed % 2 == 0)
    if positive and fmt.zero is None:
        table = _without_negative(fmt.element, table)
    codes = table[below(hashed(seed, "code", *shape), len(table))]
    scale_shape = fmt.scale_shape(shape)
    noise = hashed(seed, "scale", *scale_shape)
    if data == "exact":
        # Weights of about one, as far as the scale's dtype reaches.
        largest = max(abs(value_list(fmt.element)[c]) for c in table.tolist())
        shift = -min(math.frexp(largest)[1], -SMALLEST[fmt.scale], 60)
        scale = torch.ldexp(torch.ones(scale_shape, dtype=torch.float64), shift + (below(noise, 3) - 1) * scales)
    else:
        octaves = below(noise >> 33, 4) - _log2_top(fmt.element) - 1
        scale = torch.ldexp(1 + (noise & 0xFFFFFF).double() * 2.0**-24, octaves)
    if data == "unique":
        # A different one for each of 1024 groups in a row, where the dtype has so many.
        place = torch.arange(scale.numel()).view(scale_shape) * 395 + seed
        scale = torch.ldexp(1 + (place % 128).double() / 128, place // 128 % 8 - _log2_top(fmt.element) - 2)
    signed = _signed(fmt.scale) and data != "unique"
    if signed and seed % 4 == 0:
        scale = torch.where(below(noise >> 40, 8) == 0, -scale, scale)
    if fmt.scale == "ue5m3" or fmt.scale in ("e4m3", "e5m2"):
        scale = scale * 2.0 ** min(4, _log2_top(fmt.element)) if data != "exact" else scale
    if data == "subnormal_scale":
        scale = scale * 2.0 ** (SMALLEST[fmt.scale] - 4 * (seed // 8 % 2))
    zero = None
    if fmt.zero is not None:
        noise = hashed(seed, "zero", *scale_shape)
        zero = below(noise, 2**fmt.element.bits)
        if fmt.zero != "int":
            zero = zero.double() if data == "exact" else zero + below(noise >> 32, 64).double() / 64
        zero = zero.to(torch.uint8) if fmt.zero == "int" else round_to(zero, SCALE_DTYPES[fmt.zero])
    scale_2 = None
    if fmt.scale_2 is not None:
        noise = hashed(seed, "scale_2", *lead, n if fmt.scale_2.startswith("channel") else 1, 1)
        scale_2 = torch.ldexp(torch.ones(noise.shape), below(noise, 3) - 1)
        scale_2 = scale_2 if data == "exact" else scale_2 * (1 + (noise >> 32 & 0x7FFFFF).float() * 2.0**-23) * 0.25
    group_index = None
    if order and fmt.group[1] and k:
        noise = hashed(seed, "order", *lead, k)
        # A permutation, as act-order makes them, or for every fourth seed any map: groups of all sizes, and empty ones.
        columns = torch.argsort(noise, stable=True).div(fmt.group[1], rounding_mode="floor")
        group_index = (below(noise, scale_shape[-1]) if seed % 4 == 3 else columns).int()
    offset = None
    if fmt.offset is not None:
        noise = hashed(seed, "offset", *scale_shape)
        steps = below(noise, 33) - 16
        offset = steps.double() * 2.0**shift if data == "exact" else (steps + (noise >> 33 & 0xFFFFFF).double() * 2.0**-24) * scale
        offset = encode_scale(offset, fmt.offset)
    return QTensor(fmt, tuple(shape), pack(codes, fmt.element.bits), encode_scale(scale, fmt.scale), zero, scale_2, group_index, offset)


def to_device(q, device):
    """The QTensor on another device (a new QTensor, with tensors of its own)."""
    parts = {name: getattr(q, name) for name in TENSORS}
    return replace(q, **{name: t.to(device, copy=True) for name, t in parts.items() if t is not None})


@functools.cache
def _codes(element, alike):
    """A table of codes: every finite code alike, or as often as a normal variable over a third of the range has it."""
    if alike or max_value(element) == min_value(element):
        return torch.tensor([c for c, v in enumerate(value_list(element)) if math.isfinite(v)])
    x = normal(hashed(0, "table", TABLE)).double() * max(max_value(element), -min_value(element)) / 3
    return encode(x, element).long()


@functools.cache
def exact_codes(element, bits, seed):
    """Codes whose values are multiples of one power of two q, at most 2^bits q in magnitude; the seed chooses q."""
    values = [(c, v) for c, v in enumerate(value_list(element)) if math.isfinite(v)]
    quanta = sorted({lowest_bit(v) for _, v in values if v != 0 and abs(v) <= lowest_bit(v) * 2**bits})
    start = 0 if seed % 2 and abs(min_value(element)) <= 2**bits else seed // 2
    for step in range(len(quanta)):
        q = quanta[(start + step) % len(quanta)]
        codes = [c for c, v in values if v % q == 0 and abs(v) <= q * 2**bits]
        if any(v != 0 for c, v in values if c in codes):
            return torch.tensor(codes)
    return torch.tensor([c for c, v in values if v == 0] or [values[0][0]])  # no such value but zero


def _without_negative(element, table):
    kept = table[torch.tensor(value_list(element), dtype=torch.float64)[table] >= 0]
    return kept if kept.numel() else table


def lowest_bit(value):
    """The largest power of two that divides a float.

    >>> lowest_bit(-0.75)
    0.25
    """
    mantissa, exponent = math.frexp(abs(value))
    integer = int(mantissa * 2**53)
    return math.ldexp(integer & -integer, exponent - 53) if integer else 0.0


@functools.cache
def _log2_top(element):
    return math.ceil(math.log2(max(abs(min_value(element)), abs(max_value(element)), 1e-9)))


def _signed(name):
    target = SCALE_DTYPES[name]
    return isinstance(target, torch.dtype) or (isinstance(target, (Float, Int)) and target.signed)
