"""quantize_input: scales within the rounding of a division, codes conditional on the candidate's own scales."""

import torch

from ref.format import parse_format
from ref.qtensor import QTensor, validate

from .. import strategies
from ..oracle import Agreement, Disagreement, equal
from ..quantizer import judge_codes, judge_scale, rotated, scale_range
from ..regimes import draw_x, view_of
from . import Problem, on_cpu
from .linear_data import static_scale

FUNCTION = "quantize_input"


def labels(formats):
    return strategies.activation_labels(formats)


def cases(label, config=None):
    return strategies.quantize_input_cases(label)


def build(case, device, declared=None):
    device = torch.device(device)
    fmt = parse_format(case.format)
    x = draw_x(case.seed, case.m, case.k, case.dtype, case.data)
    x_scale = static_scale(case, fmt, x)
    view, buffer = view_of(x, case.lead, case.pad, case.offset, False, device)
    owned = {"x": buffer}
    kwargs = {}
    if x_scale is not None:
        kwargs["x_scale"] = owned["x_scale"] = x_scale.to(device, copy=True)

    def check(result):
        q = checked(result, fmt, (case.m, case.k))
        values, error = rotated(x, fmt.hadamard)
        lowest, _, highest = scale_range(values, error, fmt, x_scale)
        if fmt.scale_2 == "tensor":
            equal(q.scale_2, lowest[1], "scale_2")
        elif fmt.scale_2 == "channel":
            judge_scale(q.scale_2, lowest[1], highest[1], "scale_2", "fp32")
        if fmt.scale_2 == "channel" and not torch.equal(lowest[1], highest[1]):
            # A row's scale_2 sits on an edge: its scales are held against its own.
            ratio = [(s2.double() / q.scale_2.double()) for s2 in (lowest[1], highest[1])]
            lowest, highest = [(_rescaled(s, r, fmt), None) for (s, _), r in zip((lowest, highest), ratio, strict=True)]
        judge_scale(q.scale, lowest[0], highest[0], "scale", fmt.scale)
        judge_codes(q, values, error)
        return Agreement()

    return Problem((view, case.format), check, device, owned, kwargs)


def _rescaled(scale, ratio, fmt):
    from ref.scale import decode_scale, round_up

    return round_up(decode_scale(scale, fmt.scale) * ratio, fmt.scale)


def checked(result, fmt, shape):
    """The candidate's QTensor on the CPU, valid, and of the format and shape that were asked for."""
    if not isinstance(result, QTensor):
        raise Disagreement("result: type", f"the result is a {type(result).__name__}, expected a QTensor")
    if result.format != fmt or tuple(result.shape) != tuple(shape):
        raise Disagreement("result: shape", f"the result is {result.format} {tuple(result.shape)}, expected {fmt} {tuple(shape)}")
    try:
        return validate(on_cpu(result))
    except (TypeError, ValueError) as error:
        raise Disagreement("result: invalid", str(error)) from None
