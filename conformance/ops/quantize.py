"""quantize: scales by the rule within rounding; zero points, offsets and codes conditional on the candidate's own scales.

u = 2^-24. A scale takes a division (or a rounded reciprocal) and perhaps a rounding to float32 before that to its dtype: the
rule's result for amax (1 + d), |d| <= 2u, plus u where minmax subtracts and 2u under a second-level scale. The power-of-two
rules read amax's exponent, exactly: d = 0. zero = -low / scale within (1 + 2u) of exact. offset = low - lowest * scale, lowest the
element's least value: a product and a difference, off by at most gamma(2) (|low| + |lowest * scale|). Codes: quantizer.judge_codes.
"""

import torch

from ref.element import min_value
from ref.format import parse_format
from ref.quantize import second_scale
from ref.rule import RULES, default_rule
from ref.scale import decode_scale, encode_scale, tile, times_scale_2, untile

from .. import strategies
from ..accumulators import U, gamma
from ..oracle import Agreement, within
from ..quantizer import judge_codes, judge_scale, rotated
from ..regimes import draw_x, hashed
from . import Problem
from .quantize_input import checked

FUNCTION = "quantize"
EXACT_RULES = ("mx_floor", "mx_ceil", "mx_even")


def labels(formats):
    return list(formats)


def cases(label, config=None):
    return strategies.quantize_cases(label)


def draw(case):
    """The weight (..., n, k): x's regimes serve; a few rows are zero."""
    rows = (case.experts or 1) * case.n
    w = draw_x(case.seed, rows, case.k, case.dtype, case.data)
    w[hashed(case.seed, "zero rows", rows) % 16 == 0] = 0
    return w.reshape(*(() if case.experts is None else (case.experts,)), case.n, case.k)


def build(case, device, declared=None):
    device = torch.device(device)
    fmt = parse_format(case.format)
    w = draw(case)
    given = w.to(device, copy=True)
    kwargs = {name: getattr(case, name) for name in ("rule", "rounding") if getattr(case, name) is not None}
    rule = case.rule or default_rule(fmt)

    def check(result):
        q = checked(result, fmt, w.shape)
        values, error = rotated(w, fmt.hadamard)
        if fmt.scale_2 is not None:
            ends = [second_scale(_widened(values, error, sign * 2 * U), fmt) for sign in (-1, 1)]
            judge_scale(q.scale_2, *ends, "scale_2", "fp32")
            second = times_scale_2(torch.ones_like(q.scale_2.double()), fmt, q.scale_2)
            values, error = values / second, error / second.abs()
        d = U * (2 + (rule == "minmax") + 2 * (fmt.scale_2 is not None))
        d = 0.0 if rule in EXACT_RULES and fmt.scale_2 is None else d
        ends = []
        for sign in (-1, 1):
            tiles, valid = tile(_widened(values, error, sign * d), fmt.group)
            scale, low = RULES[rule](tiles, valid, fmt)
            ends.append((encode_scale(scale, fmt.scale), low))
        judge_scale(q.scale, ends[0][0], ends[1][0], "scale", fmt.scale)
        zero = offset = None
        if fmt.zero is not None:
            _judge_zero(q, fmt, [low for _, low in ends])
            zero = untile(q.zero.double(), fmt.group, w.shape)
        if fmt.offset is not None:
            _judge_offset(q, fmt, [low for _, low in ends])
            offset = untile(q.offset.double(), fmt.group, w.shape)
        if fmt.scale_2 is not None:
            values, error = values * second, error * second.abs()
        judge_codes(q, values, error, zero, case.rounding or "nearest_even", offset)
        return Agreement()

    return Problem((given, case.format), check, device, {"w": given}, kwargs)


def _widened(values, error, d):
    """values with every magnitude grown (d > 0) or shrunk (d < 0) by |d| and the error."""
    magnitude = values.abs() * (1 + d) + (error if d >= 0 else -error)
    return torch.copysign(magnitude.clamp(min=0), values)


def _judge_zero(q, fmt, lows):
    """zero between the roundings of -low / scale, low a bit smaller and a bit larger."""
    scale = decode_scale(q.scale, fmt.scale)
    safe = torch.where(scale == 0, 1.0, scale)
    ends = [torch.where(scale == 0, 0.0, -low / safe * (1 + sign * 2 * U)) for low, sign in zip(lows, (-1, 1), strict=True)]
    if fmt.zero == "int":
        low, high = (end.round().clamp(0, 2**fmt.element.bits - 1) for end in ends)
    else:
        low, high = (encode_scale(end, fmt.zero).double() for end in ends)
    within(q.zero.double(), low, high, "zero", q.zero)


def _judge_offset(q, fmt, lows):
    """offset between the roundings of low - lowest * scale, low a bit smaller and a bit larger."""
    product = min_value(fmt.element) * decode_scale(q.scale, fmt.scale)
    error = gamma(2) * (torch.maximum(lows[0].abs(), lows[1].abs()) + product.abs())
    ends = [encode_scale(end, fmt.offset).double() for low in lows for end in (low - product - error, low - product + error)]
    within(q.offset.double(), torch.stack(ends).amin(0), torch.stack(ends).amax(0), "offset", q.offset)
