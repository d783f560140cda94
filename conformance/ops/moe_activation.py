"""moe_activation: act(gate) * up within what float32 may be off (see gates), rounded once.

Variant "gate rounded": act(gate) is rounded to x's dtype before it is multiplied, as some engines do. With a format the result is judged as
quantize_input's is: scales within a rounding, codes conditional on the candidate's own scales.
"""

import torch

from ref.format import parse_format
from ref.moe import ACTIVATIONS
from ref.rounding import round_to

from .. import moe_strategies
from ..accumulators import U
from ..case import DTYPES
from ..gates import gates, product
from ..oracle import Agreement, Disagreement, compare
from ..quantizer import judge_codes, judge_scale, scale_range
from ..regimes import below, hashed, normal, view_of
from . import Problem, accepted
from .quantize_input import checked

FUNCTION = "moe_activation"
VARIANTS = ("exact", "gate rounded")
# Powers of two of the regime "mixed"; the first is zero in float16.
SIZES = (-50, -12, -4, -2, 0, 0, 2, 5)


def labels(formats):
    return ["all"]


def cases(label, config=None):
    return moe_strategies.activation_cases()


def draw_x(case):
    """(m, columns) of a regime: normal, wide, far (saturated), huge (to the largest number), small, mixed (elements of all sizes, one NaN), nan, inf."""
    columns = case.n * (2 if ACTIVATIONS[case.activation].gated else 1)
    bits = hashed(case.seed, "x", case.m, columns)
    x = normal(bits).double()
    if case.data == "wide":
        # gelu's tail is absolutely small only, and that soon.
        x = x * (3 if "gelu" in case.activation else 20)
    elif case.data == "far":
        x = torch.where(x < 0, -128 - x.abs() * 256, 32 + x * 64)
    elif case.data == "huge":
        x = x * (2.0**13 if case.dtype == "fp16" else 2.0**125)
    elif case.data == "small":
        x = x * (2.0**-10 if case.dtype == "fp16" else 2.0**-50)
    elif case.data == "mixed":
        x = torch.ldexp(x, torch.tensor(SIZES)[below(hashed(case.seed, "sizes", case.m, columns), len(SIZES))])
    if case.data in ("mixed", "nan", "inf") and x.numel():
        x[case.seed % case.m, (case.seed // 64) % columns] = float("inf") * (-1) ** (case.seed % 2) if case.data == "inf" else float("nan")
    return round_to(x, DTYPES[case.dtype])


def build(case, device, declared=None):
    device, x = torch.device(device), draw_x(case)
    view, buffer = view_of(x, case.lead, case.pad, case.offset, case.transposed, device)
    given = {name: getattr(case, name) for name in ("limit", "alpha", "beta", "up_beta") if getattr(case, name) is not None}
    a, off, u, u_off, silent = gates(x, case.activation, given)
    shape = (case.m, case.n)
    kwargs = {"activation": case.activation, **given}
    if case.format is not None:
        y, error = product(a, off, u, u_off)
        check = _quantized(parse_format(case.format), y, error + U * (y.abs() + error), shape)
        return Problem((view,), check, device, {"x": buffer}, kwargs | {"format": case.format})

    def check(result):
        got, first = result.reshape(shape), None
        for variant in accepted(declared, VARIANTS):
            y, error = product(*(_rounded(a, off, result.dtype) if variant == "gate rounded" else (a, off)), u, u_off)
            try:
                agreement = compare(torch.where(silent, 0, got), torch.where(silent, 0.0, y), torch.where(silent, 0.0, error))
                agreement.variant = variant
                return agreement
            except Disagreement as disagreement:
                first = first or disagreement
        raise first

    return Problem((view,), check, device, {"x": buffer}, kwargs, ((*case.lead, case.n), DTYPES[case.dtype]))


def _rounded(a, off, dtype):
    """The gate after a rounding to dtype: the middle of what it may be, and how far it may be from there."""
    low, high = round_to(a - off, dtype).double(), round_to(a + off, dtype).double()
    return (low + high) / 2, (high - low) / 2


def _quantized(fmt, y, error, shape):
    def check(result):
        q = checked(result, fmt, shape)
        lowest, _, highest = scale_range(y, error, fmt, None)
        judge_scale(q.scale, lowest[0], highest[0], "scale", fmt.scale)
        judge_codes(q, y, error)
        return Agreement(variant="exact")

    return check
