"""linear with a quantized weight and x as it is: y = x W^T + bias.

Admissible is the exact answer of any of ref's variants, give or take bounds.product_bound and u (|y| + |bias|) for a bias added in
float32. In the exact regime that is zero. In the one-hot regime, where float32 holds the weight and all on the way to it
(bounds.sums_exactly), too: a single product of at most 22 bits loses nothing in any adder.
"""

import torch

from ref.format import parse_format
from ref.hadamard import hadamard
from ref.linear import VARIANTS, linear_operands

from .. import strategies
from ..accumulators import U
from ..bounds import product_bound, sums_exactly, weight_doubt
from ..case import DTYPES, LinearCase
from ..oracle import Disagreement, compare
from ..quantizer import block_norm, hull
from ..weights import to_device
from . import Problem, parts_of
from .linear_data import LinearData, draw

FUNCTION = "linear"


def labels(formats):
    return list(formats)


def cases(label, config=None):
    return strategies.linear_cases(label, config)


def build(case, device, variants=None):
    device = torch.device(device)
    data = draw(case)
    x, buffer = data.view(device)
    q = to_device(data.q, device)
    given = {"bias": data.bias, "x_scale": data.x_scale}
    given = {name: t.to(device, copy=True) for name, t in given.items() if t is not None}
    if case.pad and data.bias is not None:
        given["bias"] = _spread(given["bias"])
    kwargs = {} if case.x_format is None else {"x_format": case.x_format}
    if case.static:
        kwargs["x_scale"] = given["x_scale"]
    truth = Truth(data, device, variants or tuple(VARIANTS))
    owned = {"x": buffer, **parts_of(q, "w"), **given}
    return Problem((x, q, given.get("bias")), truth.check, device, owned, kwargs, ((*x.shape[:-1], case.n), x.dtype))


def _spread(bias):
    """The same bias as every other element of a buffer, NaN in between."""
    buffer = torch.full((2 * len(bias),), torch.nan, dtype=bias.dtype, device=bias.device)
    buffer[::2] = bias
    return buffer[::2]


def truth_of(x, q, bias, device, x_format=None):
    """The Truth of a call that no strategy drew: x (m, k), q and bias on the CPU; device: where its result is computed."""
    (dtype,) = (name for name, known in DTYPES.items() if known == x.dtype)
    case = LinearCase(n=q.shape[0], k=q.shape[1], format=q.format, lead=(len(x),), dtype=dtype, x_format=x_format, data="normal")
    return Truth(LinearData(case, x, q, bias, None, False), device, tuple(VARIANTS))


class Truth:
    """The exact answers of one case, each worked out when it is first needed."""

    def __init__(self, data, device, variants):
        self.case, self.data, self.device = data.case, data, device
        self.x_format = None if data.case.x_format is None else parse_format(data.case.x_format)
        # Quantized activations are not rounded again where the rotation moves over to them.
        free = data.q.format.hadamard and self.x_format is None
        self.variants = [v for v in variants if free or "input_rotated" not in v] or ["exact"]
        self.answers = {}

    def check(self, y):
        """Agreement with the first variant that accepts y.

        Raises:
            Disagreement: with the first variant, if there is none.
        """
        y = y.reshape(self.case.m, self.case.n)
        ordinary = _check_special(self.data.x, y)
        first = None
        for variant in self.variants:
            exact, error = self.answer(variant)
            try:
                agreement = compare(y[ordinary], exact[ordinary], error[ordinary])
                agreement.variant = variant
                return agreement
            except Disagreement as disagreement:
                first = first or disagreement
        raise first

    def answer(self, variant):
        """The exact y of a variant, and the admissible error: float64 (m, n) each."""
        if variant not in self.answers:
            self.answers[variant] = self._answer(variant)
        return self.answers[variant]

    def _answer(self, variant):
        data, x_format = self.data, self.x_format
        x = torch.where(data.x.isfinite(), data.x, 0)
        if x_format is None:
            a, b = linear_operands(x, data.q, variant=variant)
        else:
            # The quantized x is x itself in the exact regime, and one of many in the others.
            a, b = x.double(), linear_operands(x[:0], data.q, variant=variant)[1]
        bias = 0.0 if data.bias is None else data.bias.double()
        doubt = weight_doubt(data.q, data.x.dtype) if "weight_rounded" in variant else torch.zeros_like(b)
        if data.q.format.hadamard:
            doubt = block_norm(doubt, data.q.format.hadamard)
        if self._loses_nothing(variant, a, b):
            y = a @ b.T
            error = a.abs() @ doubt.T
        else:
            operands = None if variant == "exact" else (a, b)
            if x_format is None:
                y = a @ b.T
                error = product_bound(data.q, x.double().abs(), self.device, self.case.dtype, operands=operands)
                error = error + (block_norm(a.abs(), data.q.format.hadamard) if data.q.format.hadamard else a.abs()) @ doubt.T
            else:
                low, high, step = hull(x, x_format, data.x_scale)
                turned = hadamard(b, x_format.hadamard) if x_format.hadamard else b
                y = (low + high) / 2 @ turned.T
                x = torch.maximum(low.abs(), high.abs())
                error = product_bound(data.q, x, self.device, self.case.dtype, x_format, step, operands and ((x, turned)))
                error = error + (high - low) / 2 @ turned.abs().T + x @ doubt.T
            if data.bias is not None:
                error = error + U * ((y + bias).abs() + bias.abs() + error)
        return y + bias, error

    def _loses_nothing(self, variant, a, b):
        """Whether every correct kernel of this variant gives the same bits."""
        if variant == "exact":
            self.operands = a, b
        if self.data.exact:
            return variant == "exact" or (torch.equal(a, self.operands[0]) and torch.equal(b, self.operands[1]))
        plain = self.case.data == "one_hot" and self.x_format is None and self.data.bias is None
        return plain and not self.data.q.format.hadamard and sums_exactly(self.data.q, b)


def _check_special(x, y):
    """bool (m,): the rows of x without NaN and inf; the others are checked here: no result is finite, and beside NaN all are NaN."""
    finite, nan = x.isfinite().all(1), x.isnan().any(1)
    for rows, wrong, what in ((nan, ~y.isnan(), "NaN"), (~finite & ~nan, y.isfinite(), "inf")):
        if bool(wrong[rows].any()):
            at = (rows[:, None] & wrong).nonzero()[0].tolist()
            admissible = "NaN" if what == "NaN" else "inf or NaN"
            raise Disagreement(
                f"y: {what}", f"y{at} = {y[tuple(at)].item():.9g}, admissible {admissible} only: x has {what} in row {at[0]}"
            )
    return finite
