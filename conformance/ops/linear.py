"""linear with a quantized weight and x as it is: y = x W^T + bias.

Admissible is the exact answer of any of ref's variants, give or take bounds.product_bound and u (|y| + |bias|) for a bias added in
float32; or what a unit that is declared exact makes of it (bounds.modelled), give or take what float32 loses behind it: wherever all
operands are certain. In the exact regime that is zero. In the one-hot regime, where float32 holds the weight and all on the way to it
(bounds.sums_exactly), too: a single product of at most 22 bits loses nothing in any adder.
"""

import torch

from ref.element import Float, decode, encode
from ref.format import parse_format
from ref.hadamard import hadamard
from ref.linear import VARIANTS, linear_operands

from .. import strategies
from ..accumulators import ETA, U, accumulator_of, gamma, kind_of, parse_accumulator
from ..bounds import (
    TINY,
    cuts_of,
    modelled,
    plain,
    product_bound,
    roundings,
    smallest_normal,
    sums_exactly,
    weight_doubt,
    weight_parts,
)
from ..case import DTYPES, LinearCase
from ..oracle import Disagreement, admitted, compare
from ..probes import describe, guess
from ..quantizer import block_norm, hull
from ..weights import to_device
from . import Problem, parts_of
from .linear_data import LinearData, draw

FUNCTION = "linear"


def labels(formats):
    return list(formats)


def cases(label, config=None):
    return strategies.linear_cases(label, config)


def build(case, device, declared=None):
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
    truth = Truth(data, device, declared)
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
    return Truth(LinearData(case, x, q, bias, None, False), device)


class Truth:
    """The exact answers of one case, each worked out when it is first needed."""

    def __init__(self, data, device, declared=None):
        """declared: a Declaration, names of variants, or None."""
        self.case, self.data, self.device = data.case, data, device
        self.x_format = None if data.case.x_format is None else parse_format(data.case.x_format)
        variants = getattr(declared, "variants", declared) or tuple(VARIANTS)
        # Quantized activations are not rounded again where the rotation moves over to them.
        free = data.q.format.hadamard and self.x_format is None
        self.variants = [v for v in variants if free or "input_rotated" not in v] or ["exact"]
        form = parse_accumulator(getattr(declared, "accumulator", None))
        self.accumulator = accumulator_of(form, kind_of(data.case.dtype, self.x_format), torch.device(device).type, data.q.format)
        if getattr(self.accumulator, "exact", False) and self.x_format is not None and "exact" in self.variants:
            # Such a unit takes codes.
            self.variants = ["exact"]
        self.answers = {}
        # Rows without a code that may be one of two: that moves all of a row's results at once.
        self.fair = torch.ones(data.case.m, dtype=torch.bool)

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
                agreement = compare(y[ordinary], exact[ordinary], error[ordinary], fair=self.fair[ordinary])
                agreement.variant = variant
                return agreement
            except Disagreement as disagreement:
                first = first or disagreement
        first.hint = lambda: self._guess(y[ordinary], ordinary)
        raise first

    def _guess(self, y, ordinary):
        """What the result looks like, by the first variant."""
        variant = self.variants[0]
        exact, error = (t[ordinary] for t in self.answer(variant))
        fits = admitted(y, exact, error)
        # Of an x that is quantized, the exact codes; a rotated weight is not read element by element.
        a = linear_operands(
            torch.where(self.data.x.isfinite(), self.data.x, 0), self.data.q, x_format=self.x_format, x_scale=self.data.x_scale
        )[0]
        bias = 0.0 if self.data.bias is None else self.data.bias.double()
        found = "" if self.data.q.format.hadamard or bool(fits.all()) else guess(y, a[ordinary], self.data.q, bias, fits, error, variant)
        return "; ".join(part for part in (describe(y, exact, fits), found) if part)

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
                given = self.case.dtype, None, None, operands, self.accumulator, (a, b, 0.0)
                error = product_bound(data.q, x.double().abs(), self.device, *given)
                error = error + (block_norm(a.abs(), data.q.format.hadamard) if data.q.format.hadamard else a.abs()) @ doubt.T
                certain, step = torch.ones(len(a), dtype=torch.bool), torch.ones_like(a)
            else:
                low, high, step = hull(x, x_format, data.x_scale)
                turned = hadamard(b, x_format.hadamard) if x_format.hadamard else b
                y, off = (low + high) / 2 @ turned.T, (high - low) / 2 @ turned.abs().T
                x = torch.maximum(low.abs(), high.abs())
                signed = (low + high) / 2, turned, off
                given = self.case.dtype, x_format, step, operands and (x, turned), self.accumulator, signed
                error = product_bound(data.q, x, self.device, *given) + off + x @ doubt.T
                certain = self.fair = (high - low <= 2.0**-16 * x).all(1)
                a = decode(encode((low + high) / 2 / step, x_format.element), x_format.element)
            if getattr(self.accumulator, "exact", False) and plain(data.q, x_format):
                exact = self._modelled(variant, a, b, step)
                if exact is not None:
                    certain = certain[:, None] & (doubt == 0).all(1)
                    lost = exact[1] if x_format is None else exact[1] + off
                    y, error = torch.where(certain, exact[0], y), torch.where(certain, lost, error)
            if data.bias is not None:
                error = error + U * ((y + bias).abs() + bias.abs() + error)
        return y + bias, error

    def _modelled(self, variant, a, b, step):
        """What a unit that is declared exact gives for x's values or codes a, (m, k), and what float32 may lose behind it.

        None where its operands would not be numbers of its kind.
        """
        q, x_format = self.data.q, self.x_format
        if "weight_rounded" in variant and x_format is None:
            smallest = (TINY[self.case.dtype],) * 2
            y, size = modelled(a, b, self.accumulator, torch.ones_like(a), torch.ones_like(b), smallest)
            return y, ETA * (1 + (size > 0) * q.shape[1])
        if variant != "exact":
            return None
        value, _, scale, _ = weight_parts(q)
        smallest = self._smallest(value)
        if smallest is None:
            return None
        cuts = cuts_of(q.format, x_format, q.shape[1])
        y, size = modelled(a, value, self.accumulator, step, scale.expand(value.shape), smallest, cuts)
        terms = torch.full((len(a), 1), max(len(cuts), 1))
        return y, gamma(roundings(q, terms, self.case.dtype, x_format)) * size + ETA * (q.shape[1] + size / size.clamp(min=ETA))

    def _smallest(self, value):
        """The smallest normal numbers of the unit's operands; None where the weights' values are no such numbers."""
        if self.x_format is None:
            dtype = DTYPES[self.case.dtype]
            return (TINY[self.case.dtype],) * 2 if torch.equal(value.to(dtype).double(), value) else None
        if kind_of(self.case.dtype, self.x_format) == "float" and self.accumulator.kept < 16:
            element = self.data.q.format.element
            # Shorter elements become normal numbers of 8 bits.
            least = smallest_normal(element) if isinstance(element, Float) and element.bits == 8 else 0.0
            holds = any(torch.equal(value.to(dtype).double(), value) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2))
            return (smallest_normal(self.x_format.element), least) if holds else None
        # Codes widened to 16 bits, where they are normal numbers.
        return 0.0, 0.0

    def _loses_nothing(self, variant, a, b):
        """Whether every correct kernel of this variant gives the same bits."""
        if variant == "exact":
            self.operands = a, b
        if self.data.exact:
            return variant == "exact" or (torch.equal(a, self.operands[0]) and torch.equal(b, self.operands[1]))
        plain = self.case.data in ("one_hot", "unique") and self.x_format is None and self.data.bias is None
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
