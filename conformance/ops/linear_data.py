"""The tensors of a LinearCase, on the CPU."""

import math
from dataclasses import dataclass

import torch

from ref import dequantize, quantize_input
from ref.element import Float, Int, max_value, value_list
from ref.format import parse_format
from ref.qtensor import QTensor
from ref.quantize import stored_values
from ref.scale import untile

from .. import accumulators
from ..bounds import budget
from ..case import DTYPES
from ..regimes import below, draw_x, hashed, view_of
from ..weights import draw_weight, exact_codes

# What the exact regime tries until the adders' budget holds: one x in `sparsity` is not zero; bits of x and of the weight's values.
LADDER = ((1, 7), (4, 7), (16, 7), (4, 5), (16, 5), (16, 3), (64, 1))
LADDER_FP8 = ((16, 7), (8, 6), (2, 5), (16, 6), (1, 4), (2, 4), (4, 3), (16, 3), (64, 1))


@dataclass
class LinearData:
    """x (m, k), the weight, bias and x_scale (or None), and whether every correct kernel gives the same bits (exact)."""

    case: object
    x: torch.Tensor
    q: QTensor
    bias: torch.Tensor | None
    x_scale: torch.Tensor | None
    exact: bool

    def view(self, device):
        """x as the case lays it out in memory: (view, buffer)."""
        case = self.case
        return view_of(self.x, case.lead, case.pad, case.offset, case.transposed, device)


def draw(case):
    """LinearData of a case: by construction exact in the exact regime, for all but a few formats without exact values."""
    fmt = parse_format(case.format)
    x_format = None if case.x_format is None else parse_format(case.x_format)
    if case.data == "exact" and exact_possible(fmt, x_format):
        ladder = LADDER_FP8 if _is_fp8(x_format) else LADDER
        for sparsity, bits in ladder[case.seed % 3 :]:
            data = _draw_exact(case, fmt, x_format, sparsity, bits)
            if data is not None:
                return data
    q = draw_weight(case.seed, fmt, (case.n, case.k), case.data, case.order)
    row = _row(q) if case.data in ("positive", "cancelling") else None
    kind = "normal" if case.data == "exact" else case.data
    x = draw_x(case.seed, case.m, case.k, case.dtype, kind, row)
    noise = hashed(case.seed, "bias", case.n)
    bias = None if case.bias is None else ((noise & 0xFFFF).float() * 2.0**-14 - 2).to(DTYPES[case.bias])
    return LinearData(case, x, q, bias, static_scale(case, x_format, x), False)


def _row(q):
    """The first row of the weight, float64 (k,), still rotated."""
    return stored_values(q)[0]


def exact_possible(fmt, x_format):
    """Rotations have to be by a square number, whose root is a power of two; a rotated x cannot be laid out for exact codes."""
    square = fmt.hadamard.bit_length() % 2 == 1 or not fmt.hadamard
    return square and (x_format is None or not x_format.hadamard)


def static_scale(case, x_format, x):
    """The static scale: a third of what the largest x asks for, so that some saturate."""
    if not case.static:
        return None
    top = max_value(x_format.element) * (448.0 if x_format.scale_2 else 1.0)
    amax = torch.nan_to_num(x.float(), 0, 0, 0).abs().max() if x.numel() else torch.tensor(1.0)
    share = 0.3 + (case.seed % 1024) / 1024
    return (amax * share / top).clamp(2.0**-100, 2.0**100).reshape(1)


def _draw_exact(case, fmt, x_format, sparsity, bits):
    """LinearData whose sums are exact in every correct adder, or None if these would not be."""
    seed, m, k = case.seed, case.m, case.k
    dtype = DTYPES[case.dtype]
    noise = hashed(seed, "x", m, k)
    kept = below(noise >> 20, sparsity) == 0
    x_scale = None
    if x_format is None:
        sign = torch.where(noise < 0, -1.0, 1.0) if seed % 5 else 1.0
        x = (below(noise >> 32, 4) * kept * sign).double() * 2.0 ** -(seed // 8 % 8)
    else:
        x, x_scale = _exact_input(case, x_format, noise, kept, bits)
    if not torch.equal(x.to(dtype).double(), x):
        return None
    if _is_fp8(x_format):
        # Not worth trying: with weights of an eighth of the largest the budget would be exceeded.
        chunk = torch.stack([part.abs().sum(1) for part in x.split(accumulators.MMA_FP8.promote, 1)]).amax(0)
        if bool((chunk * 2.0 ** (bits - 3) > accumulators.BUDGET_FP8 * accumulators.quantum(x)).any()):
            return None
    positive = seed % 3 == 0  # products are positive (with row 0, at least): partial sums reach S, as far as the budget allows
    q = draw_weight(seed, fmt, (case.n, k), "exact", case.order, bits, bits > 1, positive)
    if positive:
        x = torch.where(_row(q) < 0, -x.abs(), x.abs())
    s, quantum, chunk = budget(q, x, _is_fp8(x_format))
    bias = None
    if case.bias is not None:
        unit = torch.nan_to_num(quantum, posinf=1.0).amin(0).clamp(2.0**-14, 1.0) if m else quantum.new_ones(case.n)
        bias = (below(hashed(seed, "bias", case.n), 129) - 64).double() * unit
        s, quantum = s + bias.abs(), torch.minimum(quantum, unit)
        bias = bias.to(DTYPES[case.bias])
    if not accumulators.exact(s, quantum, chunk) or (case.dtype == "fp16" and bool((s > 2.0**15).any())):
        return None
    x_given = x.to(dtype)
    if x_format is not None and not torch.equal(dequantize(quantize_input(x_given, x_format, x_scale)), x):
        return None
    return LinearData(case, x_given, q, bias, x_scale, True)


def _is_fp8(x_format):
    return x_format is not None and isinstance(x_format.element, Float)


def _exact_input(case, fmt, noise, kept, bits):
    """x that quantizes without error: codes times powers of two, and in each group one value of MAX times its power."""
    seed, m, k = case.seed, case.m, case.k
    top = 2 ** (fmt.element.bits - 1) - 1 if isinstance(fmt.element, Int) else max_value(fmt.element)
    exponent = math.frexp(top)[1]
    single = case.static and fmt.group == (0, 0)
    quantum = 2.0 ** (exponent - bits)
    table = torch.tensor([v for v in value_list(fmt.element) if abs(v) <= top and v % quantum == 0] or [0.0], dtype=torch.float64)
    if single:
        table = torch.tensor(value_list(fmt.element), dtype=torch.float64)[exact_codes(fmt.element, bits, seed % 64)]
    # Scales in an 8-bit dtype by themselves have to stay near one.
    base = 0 if fmt.scale in ("e4m3", "e5m2", "ue5m3") and fmt.scale_2 is None else -exponent
    power = below(hashed(seed, "power", *fmt.scale_shape((m, k))), 3) * (bits > 1)
    scale = torch.ldexp(torch.ones(power.shape, dtype=torch.float64), base - power)
    x_scale = torch.tensor([2.0 ** (base - 2)]) if case.static else None
    if single:
        return table[below(noise >> 32, len(table))] * kept * 2.0 ** (base - 2), x_scale
    x = torch.where(_peaks(seed, m, k, fmt), torch.where(noise < 0, -top, top), table[below(noise >> 32, len(table))] * kept)
    return x * untile(scale, fmt.group, (m, k)), x_scale


def _peaks(seed, m, k, fmt):
    """bool (m, k): one element in each group."""
    gk = fmt.group[1] or max(k, 1)
    column = torch.arange(k)
    length = torch.clamp(k - column // gk * gk, max=gk)
    at = below(hashed(seed, "peak", m if fmt.group[0] else 1, -(-k // gk)), 2**20).repeat_interleave(gk, 1)[:, :k]
    hit = column % gk == at % length
    return hit if fmt.group[0] else hit & (torch.arange(m)[:, None] == seed % max(m, 1))
