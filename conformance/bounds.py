"""The admissible error of a linear layer's product, from its operands.

error =  c S + gamma(r) S     c: the adders' loss (accumulators.coefficient); r: further float32 roundings of a term (roundings)
       + k 2^-53 S            the exact answer's own, in float64
       + ETA ...              underflow of any product
with S = |x| @ ((|value| + |zero|) |scale scale_2| + |offset|)^T: zero points and offsets count absolutely, since they may be multiplied
and summed apart. Where a candidate declares blocks along k in ascending order, accumulators.running takes the place of c S, if that is less.
Under a rotation over blocks of B, w (or x) is replaced by |w|_1 / sqrt(B) of its block, which no intermediate result exceeds.
"""

import functools

import torch

from ref.element import Float, decode, value_list
from ref.pack import unpack
from ref.quantize import stored_values
from ref.rounding import round_to
from ref.scale import decode_scale, times_scale_2

from . import accumulators
from .emulate import block_sum
from .quantizer import block_norm

TINY = {"fp16": 2.0**-14, "bf16": 2.0**-126, "fp32": 2.0**-126}


@functools.lru_cache(maxsize=2)
def weight_parts(q):
    """value, zero (or None), scale * scale_2 and offset (or None) of every weight: float64 (..., n, k), all but the first broadcastable."""
    value = decode(unpack(q.packed, q.format.element.bits, q.shape[-1]), q.format.element)
    scale = times_scale_2(expand(decode_scale(q.scale, q.format.scale), q), q.format, q.scale_2)
    return value, None if q.zero is None else expand(q.zero.double(), q), scale, None if q.offset is None else expand(q.offset.double(), q)


def magnitude(q):
    """(|value| + |zero|) |scale scale_2| + |offset|, all that may be multiplied and summed apart: float64 (..., n, k)."""
    value, zero, scale, offset = weight_parts(q)
    w = (value.abs() if zero is None else value.abs() + zero.abs()) * scale.abs()
    return w if offset is None else w + offset.abs()


def divides(fmt):
    """Whether weights are divided by their second-level scale."""
    return (fmt.scale_2 or "").endswith("divisor")


def sums_exactly(q, w):
    """Whether every correct kernel forms each weight w (float64, none rotated) without rounding, given that float32 holds w.

    Products are exact on the way to w, for the odd parts of their factors divide its own; but a product may be longer than its sum
    with an offset, and a quotient is not exact by way of a reciprocal, unless that is a power of two.
    """
    if divides(q.format) and not bool((torch.frexp(q.scale_2).mantissa.abs() == 0.5).all()):
        return False
    if q.offset is not None:
        value, _, scale, _ = weight_parts(q)
        product = value * scale
        if not torch.equal(product.float().double(), product):
            return False
    return torch.equal(w.float().double(), w)


def expand(t, q):
    """A value per group as a value per weight (..., n, k); a dimension of one group stays 1."""
    (gn, gk), (n, k) = q.format.group, q.shape[-2:]
    if gn > 1:
        t = t.repeat_interleave(gn, -2)[..., :n, :]
    if q.group_index is not None:
        return t.gather(-1, q.group_index.long()[..., None, :].expand(*t.shape[:-1], k))
    return t.repeat_interleave(gk, -1)[..., :k] if gk else t


def roundings(q, groups, x_dtype, x_format):
    """r: the float32 roundings that one term may go through besides the adders', by the most roundabout correct kernel.

    The scale 1; scale_2 1, a divisor 2 (its reciprocal); a zero point 3 (value - zero; or zero times the sum of x, and one
    subtraction); an offset 2 (value * scale + offset; or offset times the sum of x, and one addition); a float32 x 1 (the product);
    x's scales 1 each; one addition for each group's partial sum; a rotation's log2 B additions and 2 for 1 / sqrt(B).
    """
    r = 1 + (q.scale_2 is not None) + divides(q.format) + 3 * (q.zero is not None) + 2 * (q.offset is not None) + groups
    r += (x_dtype == "fp32") if x_format is None else 1 + (x_format.scale_2 is not None)
    blocks = (q.format.hadamard, 0 if x_format is None else x_format.hadamard)
    return r + sum(block.bit_length() + 1 for block in blocks if block)


def product_bound(q, x, device, x_dtype, x_format=None, x_step=None, operands=None, accumulator=None, signed=None):
    """The admissible error of x w^T, float64 (m, n).

    Args:
        q: the weight. x: magnitudes of x, float64 (m, k): as given, or as quantized (in its rotation, where x_format has one).
        x_dtype: "fp32", "fp16" or "bf16". x_step: scale of each quantized x.
        operands: the two factors of the variant in question, where they are not x and the weight.
        accumulator: what is declared for this kind of x ("ieee" or a Block), or None. signed: the factors with their signs, (m, k) and (n, k),
            and by how much sums of their products may be off; without them an order that is declared does not count.
    """
    k, fmt = x.shape[1], q.format
    value, _, scale, offset = weight_parts(q)
    w = magnitude(q)
    fp8 = x_format is not None and isinstance(x_format.element, Float)
    if device.type == "cuda" or isinstance(accumulator, accumulators.Block):
        x, w = _aligned(x, w, value, scale, offset, fmt, x_dtype, x_format if fp8 else None, x_step)
    sizes = x, w
    if x_format is not None and x_format.hadamard:
        x = block_norm(x, x_format.hadamard)
    used = block_norm(x, fmt.hadamard) if fmt.hadamard else x
    w = block_norm(w, fmt.hadamard) if fmt.hadamard else w
    terms = (used != 0).sum(1, keepdim=True)
    groups = -(-k // fmt.group[1]) if fmt.group[1] else 1
    groups = k if q.group_index is not None else groups
    groups += -(-k // x_format.group[1]) if x_format is not None and x_format.group[1] else 0
    s = x @ w.T
    if operands is not None:
        s = torch.maximum(s, operands[0].abs() @ operands[1].abs().T)
    c = accumulators.coefficient(terms, groups, device, fp8, x_dtype == "fp32" and x_format is None, accumulator)
    r = roundings(q, terms.clamp(max=groups), x_dtype, x_format)
    underflow = x.sum(1, keepdim=True) + scale.abs().expand(w.shape).sum(1) + (2 + (offset is not None)) * terms
    if fmt.scale_2 is not None:
        underflow = underflow + x @ value.abs().T
    if divides(fmt):
        # Whatever vanished before the division.
        underflow = underflow + terms / q.scale_2.double().abs()[:, 0]
    lost = c * (1 + c) * s
    if signed is not None and getattr(accumulator, "order", "any") == "ascending" and plain(q, x_format):
        lost = torch.minimum(lost, _in_order(*signed, sizes, accumulator, cuts_of(fmt, x_format, k)))
    return lost + accumulators.gamma(r) * (s + lost) + (k + 8) * 2.0**-53 * s + accumulators.ETA * underflow


def plain(q, x_format):
    """Whether all of a sum is products of x and the weight, in the order of k: no zero points, offsets, rotations or orders of groups."""
    rotated = q.format.hadamard or (x_format is not None and x_format.hadamard)
    return q.zero is None and q.offset is None and q.group_index is None and not rotated


def cuts_of(fmt, x_format, k):
    """The columns where a scale changes: there a kernel may begin anew."""
    groups = {fmt.group[1], x_format.group[1] if x_format is not None else 0}
    return sorted({column for group in groups if group for column in range(0, k, group)})


def _in_order(x, w, doubt, sizes, unit, cuts):
    """accumulators.running, whether scales are multiplied into the weights or into the sums of their groups."""
    bound = accumulators.running(x, w, unit, (), sizes)
    if len(cuts) > 1:
        bound = torch.maximum(bound, accumulators.running(x, w, unit, cuts, sizes))
    # Sums that are off by doubt lose so much more.
    return bound + doubt * (-(-x.shape[1] // unit.length) + len(cuts)) * unit.step


def modelled(x, w, unit, x_scale, w_scale, smallest, cuts=()):
    """A5: what the unit gives for x (m, k) times w (n, k), numbers that it takes, scales (m, k) and (n, k) applied to the sums between cuts.

    Returns:
        (y, size): float64 (m, n) each; size: the sum of the parts' magnitudes, of which float32 may lose gamma(roundings + parts).
    """
    y = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float64)
    size, starts = torch.zeros_like(y), sorted({0, *cuts})
    for start, end in zip(starts, [*starts[1:], x.shape[1]], strict=True):
        part = block_sum(x[:, start:end], w[:, start:end], unit, smallest=smallest)
        part = part * x_scale[:, start, None] * w_scale[None, :, start]
        y, size = y + part, size + part.abs()
    return y, size


def weight_doubt(q, dtype):
    """How far a weight rounded to dtype may be from ref's, float64 (n, k): mostly 0, an ulp beside a midpoint.

    ref rounds code * scale * scale_2 + offset once. A kernel forms it in float32 (a rounding for each factor, two for a divisor, one
    for a float zero point, and one for the sum with an offset) and rounds that, which may fall on the other side of a midpoint.
    """
    w = stored_values(q)
    offset = weight_parts(q)[3]
    size = w.abs() if offset is None else (w - offset).abs() + offset.abs()
    roundings = 1 + (q.scale_2 is not None) + divides(q.format) + (q.format.zero not in (None, "int")) + (offset is not None)
    error = accumulators.gamma(roundings) * size
    here, low, high = (round_to(v, dtype).double() for v in (w, w - error, w + error))
    return torch.maximum((high - here).abs(), (low - here).abs()).nan_to_num(0.0, 0.0, 0.0)


def _aligned(x, w, value, scale, offset, fmt, x_dtype, x_fp8, x_step):
    """Magnitudes as a matrix unit aligns them: no operand is smaller than the smallest normal number of its dtype."""
    offset = 0.0 if offset is None else offset.abs()
    if x_fp8 is None:
        tiny = TINY[x_dtype]
        x = torch.where(x != 0, x.clamp(min=tiny), 0.0)
        return x, torch.where(w != 0, torch.maximum(w.clamp(min=tiny), value.abs().clamp(min=tiny) * scale.abs() + offset), 0.0)
    x = torch.where(x != 0, torch.maximum(x, smallest_normal(x_fp8.element) * x_step.abs()), 0.0)
    if isinstance(fmt.element, Float):
        w = torch.where(w != 0, torch.maximum(w, smallest_normal(fmt.element) * scale.abs() + offset), 0.0)
    return x, w


def smallest_normal(element):
    """The smallest value of a float element that is no subnormal."""
    return abs(value_list(element)[2**element.mantissa]) if element.exponent else 1.0


def budget(q, x, fp8=False):
    """What the exact regime has to keep within: (S, quantum, S in the fullest chunk of an fp8 unit, or None), (m, n) each.

    All products that make up a result, x (m, k) times the weight, those of a zero point and of an offset apart, are multiples of its
    quantum.
    """
    value, zero, scale, offset = weight_parts(q)
    w = magnitude(q)
    unit = accumulators.quantum(value)
    unit = unit if zero is None else torch.minimum(unit, accumulators.quantum(zero))
    unit = (unit * accumulators.quantum(scale)).expand(q.shape[0])
    unit = unit if offset is None else torch.minimum(unit, accumulators.quantum(offset))
    if q.format.hadamard:
        w, unit = block_norm(w, q.format.hadamard), unit / q.format.hadamard**0.5
    s = x.abs() @ w.T
    chunk = None
    if fp8:
        chunk = torch.zeros_like(s)
        for part, other in zip(x.split(accumulators.MMA_FP8.promote, 1), w.split(accumulators.MMA_FP8.promote, 1), strict=True):
            chunk = torch.maximum(chunk, part.abs() @ other.T)
    return s, accumulators.quantum(x)[:, None] * unit, chunk
