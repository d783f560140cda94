"""dequantize: w = (value - zero) * scale * scale_2 + offset, rounded once.

Where float32 holds w itself and every step towards it is exact (bounds.sums_exactly), bits have to agree. Else each of at most
r = 1 + [zero] + 2 [scale_2] + [offset] roundings to float32 (float64 for a float64 result) may lose u of w's magnitude, and a rotation
over B log2 B + 2 more of |w|_1 / sqrt(B) of its block. An offset counts absolutely, and in float32 a zero point, too, as in
value * scale - zero * scale; in float64 that difference is exact.
"""

import torch

from ref.format import parse_format
from ref.quantize import dequantize

from .. import strategies
from ..accumulators import ETA, U
from ..bounds import sums_exactly, weight_parts
from ..oracle import compare, equal
from ..quantizer import block_norm
from ..weights import draw_weight, to_device
from . import Problem, parts_of

FUNCTION = "dequantize"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}


def labels(formats):
    return list(formats)


def cases(label, config=None):
    return strategies.dequantize_cases(label)


def build(case, device, declared=None):
    device = torch.device(device)
    fmt = parse_format(case.format)
    lead = () if case.experts is None else (case.experts,)
    w = draw_weight(case.seed, fmt, (*lead, case.n, case.k), case.data, case.order)
    q = to_device(w, device)
    dtype = DTYPES[case.dtype]

    def check(result):
        exact = dequantize(w)
        if not fmt.hadamard and dtype != torch.float64 and sums_exactly(w, exact):
            if fmt.zero is None and fmt.scale_2 is None and fmt.offset is None:
                equal(result, dequantize(w, dtype), "w")
            return compare(result, exact, 0.0, "w")
        unit, eta = (2.0**-53, 0.0) if dtype == torch.float64 else (U, ETA)
        r = 1 + (fmt.zero is not None) + 2 * (fmt.scale_2 is not None) + (fmt.offset is not None)
        r += fmt.hadamard.bit_length() + 1 if fmt.hadamard else 0
        error = r * unit / (1 - r * unit) * _magnitude(w, fmt, dtype != torch.float64) + r * eta
        return compare(result, exact, error, "w")

    return Problem((q, dtype), check, device, parts_of(q, "q"), {}, ((*lead, case.n, case.k), dtype))


def _magnitude(q, fmt, apart):
    """|value - zero| |scale scale_2| + |offset|, |value| + |zero| with apart, and under a rotation its block's norm: float64 (..., n, k)."""
    value, zero, scale, offset = weight_parts(q)
    if zero is not None:
        value = value.abs() + zero.abs() if apart else value - zero
    w = (value * scale).abs() if offset is None else (value * scale).abs() + offset.abs()
    return block_norm(w, fmt.hadamard) if fmt.hadamard else w
