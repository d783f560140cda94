"""What a quantizer may legitimately differ in: the last bits of a scale, and codes at ties.

Conditional (judge_codes): codes are held against the candidate's own scale, so a scale that is off by its last bit does not
condemn a row. End to end (hull): every value that such a quantizer can give, for the linear layer behind it.

With u = 2^-24. Scale: raw = amax / MAX by division or by a rounded reciprocal is fl(exact (1 + d)), |d| <= u; under a
second-level scale, which divides once more and may do so by reciprocal, |d| <= 3u. Roundings are monotone, so the scales of
amax (1 - d) and amax (1 + d) bracket it. Codes: t = x / (scale scale_2) takes at most four roundings (the product of the
scales, its reciprocal, the product with x, and one to bring x to float32): t (1 + d), |d| <= gamma(4); with an offset one more, to
subtract it from x in float32. Where all of these are exact (a scale that is a power of two, x as it is), d = 0: ties go where the rule says.
Else a code at the far side of an edge that t is not beyond, an alternate, is legitimate within the band of d only, and there in no more than half
of the elements, give or take 6 sigma: |d| at its largest, of one sign, moves just the half of a band's t across the edge. A rotation in float32 adds (log2 B + 2) u |x|_1 / sqrt(B) over its block, to x and so to amax.
"""

from dataclasses import replace

import torch

from ref import quantize_input
from ref.element import decode, encode
from ref.hadamard import hadamard
from ref.pack import unpack
from ref.scale import decode_scale, tile, times_scale_2, untile

from .accumulators import U, gamma
from .oracle import Disagreement, equal, within

CODE = gamma(4)


def rotated(x, block):
    """x after the rotation, float64, and the error that a float32 rotation may have."""
    x = x.double()
    if not block:
        return x, torch.zeros_like(x)
    return hadamard(x, block), gamma(block.bit_length() + 1) * block_norm(x, block)


def block_norm(x, block):
    """|x|_1 / sqrt(B) of each one's block: the largest magnitude that a rotation's intermediate results can have."""
    total = x.abs().unflatten(-1, (-1, block)).sum(-1, keepdim=True)
    return (total / block**0.5).expand(*total.shape[:-1], block).flatten(-2)


def scale_range(values, error, fmt, x_scale):
    """Stored scales that activations may have: [(scale, scale_2)] for the lowest, the exact and the highest amax."""
    tiles, _ = tile(values.abs(), fmt.group)
    amax = tiles.amax(-1)
    spread = tile(error, fmt.group)[0].amax(-1)
    grouped = fmt.group[1] != 0
    one = replace(fmt, hadamard=0, group=(1, 1) if grouped else fmt.group)
    d = U if fmt.scale_2 is None else 3 * U
    peaks = [p.clamp(min=0) for p in (amax * (1 - d) - spread, amax, amax * (1 + d) + spread)]
    if fmt.group[0] == 0 and x_scale is None:
        return [(q.scale, q.scale_2) for q in (quantize_input(peak, one) for peak in peaks)]
    q = quantize_input(torch.cat(peaks), one, x_scale)
    scales = q.scale.chunk(3) if fmt.group[0] else (q.scale,) * 3
    seconds = q.scale_2.chunk(3) if fmt.scale_2 == "channel" else (q.scale_2,) * 3
    return list(zip(scales, seconds, strict=True))


def step_of(scale, scale_2, fmt, shape):
    """scale * scale_2 for every element, float64."""
    return times_scale_2(untile(decode_scale(scale, fmt.scale), fmt.group, shape), fmt, scale_2)


def hull(x, fmt, x_scale, spread=0.0):
    """The lowest and the highest value that a quantizer may make of each x, and their scale: float64 (m, k), as rotated by fmt.

    Args:
        spread: how far x itself may be off, where fmt does not rotate and its scales are float32.
    """
    values, error = rotated(x, fmt.hadamard)
    error = error + spread
    choices = scale_range(values, error, fmt, x_scale)
    slack = CODE
    if fmt.scale == "fp32" and fmt.scale_2 != "channel":
        # Scales differ in their last bits: the exact one stands for all, with its range as a relative error.
        low, _, high = (decode_scale(scale, fmt.scale) for scale, _ in choices)
        width = untile(high / low - 1, fmt.group, values.shape)
        choices, slack = choices[1:2], CODE + width
    else:
        width = 0.0
        same = all(torch.equal(a, choices[1][0]) and _same(b, choices[1][1]) for a, b in choices)
        choices = choices[1:2] if same else choices
    bounds = []
    for scale, scale_2 in choices:
        step = step_of(scale, scale_2, fmt, values.shape)
        for sign in (-1, 1):
            t = (values + sign * (slack * values.abs() + error)) / step
            bounds.append(decode(encode(t, fmt.element), fmt.element) * step)
    low, high = torch.stack(bounds).amin(0), torch.stack(bounds).amax(0)
    step = step_of(*choices[len(choices) // 2], fmt, values.shape)
    return low - width * low.abs(), high + width * high.abs(), step.expand(values.shape)


def _same(a, b):
    return a is b or torch.equal(a, b)


def judge_codes(q, values, error, zero=None, rounding="nearest_even", offset=None):
    """Hold a QTensor's codes against its own scale, zero and scale_2.

    Args:
        q: on the CPU, validated. values: float64, what was quantized (rotated). error: float64, of values.
        zero, offset: float64, for every element, or None.

    Raises:
        Disagreement: a code that no rounding of t (1 + d) + zero gives.
    """
    fmt, element = q.format, q.format.element
    step = step_of(q.scale, q.scale_2, fmt, values.shape)
    safe = torch.where(step == 0, 1.0, step)
    if offset is not None:
        # Bringing x to float32, too, goes before the difference.
        error, values = error + U * (values.abs() + (values - offset).abs()), values - offset
    t = torch.where(step == 0, 0.0, values / safe)
    slack = torch.where(_powers(q, values.shape), 0.0, CODE * t.abs()) + torch.where(step == 0, 0.0, error / safe.abs())
    if zero is not None:
        t, slack = t + zero, slack + U * (t.abs() + zero.abs())
    codes = unpack(q.packed, element.bits, values.shape[-1])
    low, high = encode(t - slack, element, rounding), encode(t + slack, element, rounding)
    low_value, high_value, got = (decode(c, element) for c in (low, high, codes))
    within(got, low_value, high_value, "code value", got)
    settled = (low_value == high_value) & (slack == 0) | (low == high)
    wrong = settled & (codes != low)
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise Disagreement(
            "code: bits", f"code{list(at)} = {codes[at].item()}, admissible {low[at].item()} only (value {got[at].item():.9g})"
        )
    _judge_alternates(t, slack, low_value < high_value, got != decode(encode(t, element, rounding), element))


def _powers(q, shape):
    """bool, broadcastable to shape: where a division by the scales is exact."""
    power = torch.frexp(decode_scale(q.scale, q.format.scale)).mantissa == 0.5
    power = untile(power, q.format.group, shape)
    return power if q.scale_2 is None else power & (torch.frexp(q.scale_2.double()).mantissa == 0.5)


def _judge_alternates(t, slack, open_, other):
    """Of the elements that are open to two codes, hardly more than half may have the one that t does not round to.

    A t that comes again counts once, as its elements share their fate.
    """
    t, slack, other = t[open_], slack[open_], other[open_]
    size, order = t.abs().sort()
    first = torch.ones_like(other)
    first[1:] = size[1:] != size[:-1]
    count, alternates = int(first.sum()), int((other[order] & first).sum())
    if alternates > count / 2 + 3 * count**0.5:
        raise Disagreement(
            "code: ties",
            f"{alternates} of {count} values near an edge have the code beyond it, admissible {count / 2 + 3 * count**0.5:.0f}",
        )


def judge_scale(got, low, high, name, fmt):
    """A stored scale between two stored scales, as values; equal bits where these two are one."""
    if got.shape != low.shape or got.dtype != low.dtype:
        raise Disagreement(f"{name}: shape", f"{name} is {tuple(got.shape)} {got.dtype}, expected {tuple(low.shape)} {low.dtype}")
    if torch.equal(low, high):
        equal(got, low, name)
        return
    a, b = decode_scale(low, fmt), decode_scale(high, fmt)
    within(decode_scale(got, fmt), torch.minimum(a, b), torch.maximum(a, b), name)
