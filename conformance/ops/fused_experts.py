"""fused_experts: bit for bit where every intermediate result is exact (experts_data), else an interval carried through all the stages.

With g, u the gate and up of a slot, E the admissible error of what stands before it, all in float64, and STAGES what is rounded between:
    gate_up   +- E_1 = bounds.product_bound (and what x's codes may differ by, and U (|y| + |b|) for a bias)
    a         +- E_a = L E_g (|u'| + E_u) + |s| E_u + the activation's own error in float32, a = s(g) u', |s'| <= L
    h = RN(a) +- half the width of [RN(a - E_a), RN(a + E_a)], or of the codes that these may be quantized to
    down      +- E_2 = |W2| E_h + product_bound
    y         +- sum |w| E_2 + gamma(T + 1) sum |w| (|down| + E_2)
Slots that do not count, and x of tokens without any other, are NaN.
"""

from dataclasses import dataclass

import torch

from ref import QTensor
from ref.combine import take_expert
from ref.linear import VARIANTS, linear_operands
from ref.moe import fused_experts_variant
from ref.moe.activation import FUNCTIONS
from ref.moe.check import ACTIVATIONS
from ref.rounding import round_to

from .. import accumulators
from ..accumulators import ETA, U, gamma
from ..bounds import TINY, product_bound, weight_doubt
from ..experts_case import PLAIN, experts_cases, pool
from ..formats import GENERATED
from ..oracle import Disagreement, compare
from ..quantizer import hull
from ..weights import to_device
from . import Problem, accepted, parts_of
from .experts_data import draw

__all__ = ["FUNCTION", "SHARE", "Truth", "build", "cases", "labels", "pool"]

FUNCTION = "fused_experts"
SHARE = 0.3
FORMATS = ("int4_g32", "int4_g128_bf16", "mxfp4", "fp8_e4m3_b128x128", GENERATED)
# What engines round to x's dtype between the stages: ref's variants, and the activation quantized as it is.
STAGES = {"stored": ("gate_up", "hidden", "down"), "exact": (), "activation_fused": ("gate_up", "down")}
# |s'| of a gate's function, at most: x sigmoid(x) has 1.0998, x Phi(x) 1.129, beta tanh(x / beta) sigmoid(x) 1 + 0.2239.
SLOPE = {"gelu": 1.13, "gelu_tanh": 1.13, "situ": 1.23}


def labels(formats):
    return [PLAIN, *FORMATS] if GENERATED in formats else list(formats)


def cases(label, config=None):
    return experts_cases(label, config)


def build(case, device, declared=None):
    device = torch.device(device)
    data = draw(case)
    x, buffer = data.view(device)
    weights = data.poisoned()[1].to(device, copy=True)
    w13, w2 = (to_device(w, device) if isinstance(w, QTensor) else w.to(device, copy=True) for w in (data.w13, data.w2))
    owned = {"x": buffer, "topk_weights": weights, "topk_ids": data.ids.to(device)}
    for name, w in (("w13", w13), ("w2", w2)):
        owned |= parts_of(w, name) if isinstance(w, QTensor) else {name: w}
    kwargs = {"activation": case.activation, **case.parameters}
    for name, given in (("bias13", data.bias13), ("bias2", data.bias2), ("expert_map", data.expert_map)):
        if given is not None:
            kwargs[name] = owned[name] = given.to(device, copy=True)
    if case.x_format is not None:
        kwargs["x_format"] = case.x_format
    if case.on_input:
        kwargs["apply_router_weight_on_input"] = True
    truth = Truth(data, device, declared)
    return Problem((x, w13, w2, weights, owned["topk_ids"]), truth.check, device, owned, kwargs, ((case.route.m, case.n), x.dtype))


@dataclass
class Interval:
    """middle +- half, float64."""

    middle: torch.Tensor
    half: torch.Tensor

    def rounded(self, dtype):
        """What it may be rounded to."""
        low, high = (round_to(edge, dtype).double() for edge in (self.middle - self.half, self.middle + self.half))
        return between(low, high)

    def largest(self):
        return self.middle.abs() + self.half


def between(low, high):
    return Interval((low + high) / 2, (high - low) / 2)


class Truth:
    """The admissible results of one case; the variants one after the other, each worked out when it is needed."""

    def __init__(self, data, device, declared=None):
        self.data, self.case, self.device, self.dtype = data, data.case, device, data.x.dtype
        self.rows, self.slots = data.live.nonzero(as_tuple=True)
        self.experts = data.local[self.rows, self.slots]
        self.x_format = data.x_format
        plain = not isinstance(data.w13, QTensor)
        products = ["exact"] if plain else [v for v in VARIANTS if "input_rotated" not in v]
        stages = [s for s in accepted(declared, STAGES) if s in STAGES and (s != "activation_fused" or self.x_format is not None)]
        stages = stages or ["stored"]
        # On a GPU kernels of different kinds may follow each other.
        pairs = [(a, b) for a in products for b in products if a == b or device.type == "cuda"]
        self.variants = [(stage, *pair) for pair in sorted(pairs, key=lambda pair: pair[0] != pair[1]) for stage in stages]
        self.firsts = {}

    def check(self, y):
        """Agreement with the first variant that accepts y.

        Raises:
            Disagreement: with the first variant, if there is none.
        """
        data, case = self.data, self.case
        if data.exact:
            # Of the variants, which agree but for silu(-128) = -3e-54 in float64.
            exact = fused_experts_variant(
                data.x, data.w13, data.w2, data.weights, data.ids, variant="stored", activation=case.activation,
                expert_map=data.expert_map, bias13=data.bias13, bias2=data.bias2, apply_router_weight_on_input=case.on_input,
                x_format=case.x_format, **case.parameters,
            )  # fmt: skip
            return compare(y, exact.double(), 0.0)
        first = None
        for variant in self.variants:
            admissible = self.answer(*variant)
            try:
                # One intermediate result that may be rounded either way moves a whole row.
                agreement = compare(y, admissible.middle, admissible.half, fair=False)
                agreement.variant = variant[0] if variant[1] == variant[2] == "exact" else ", ".join(variant)
                return agreement
            except Disagreement as disagreement:
                first = first or disagreement
        raise first

    def answer(self, stage, first, second):
        """y (m, n) before it is rounded."""
        data, case, kept = self.data, self.case, STAGES[stage]
        if first not in self.firsts:
            x, step = self._x()
            x = Interval(x.middle[self.rows], x.half[self.rows])
            self.firsts[first] = self._product(x, step, data.w13, data.bias13, first)
        gate_up = self.firsts[first]
        gate_up = gate_up.rounded(self.dtype) if "gate_up" in kept else gate_up
        hidden = activated(gate_up, case.activation, data.given)
        hidden = hidden.rounded(self.dtype) if "hidden" in kept else hidden
        hidden, step = self._quantized(hidden)
        down = self._product(hidden, step, data.w2, data.bias2, second)
        down = down.rounded(self.dtype) if "down" in kept else down
        weights = (torch.ones_like(data.weights) if case.on_input else data.weights)[self.rows, self.slots, None].double()
        y, error, size = (down.middle.new_zeros(case.route.m, case.n) for _ in range(3))
        y.index_add_(0, self.rows, weights * down.middle)
        error.index_add_(0, self.rows, weights.abs() * down.half)
        size.index_add_(0, self.rows, weights.abs() * down.largest())
        return Interval(y, error + gamma(case.route.t + 1) * size + 2 * case.route.t * ETA)

    def _x(self):
        """x as the first product sees it, and the steps of its codes."""
        x = Interval(self.data.x.double(), torch.zeros_like(self.data.x, dtype=torch.float64))
        if self.case.on_input:
            product = x.middle * self.data.weights.double()
            # In float64 or in float32, and then to x's dtype.
            x = Interval(product, U * product.abs()).rounded(self.dtype)
        x, step = self._quantized(x)
        return x, None if step is None else step[self.rows]

    def _quantized(self, x):
        if self.x_format is None:
            return x, None
        low, high, step = hull(x.middle, self.x_format, None, x.half)
        return between(low, high), step

    def _product(self, a, step, w, bias, variant):
        """Rows times their experts' weights, and what a correct kernel may lose."""
        y = Interval(*(a.middle.new_zeros(len(a.middle), w.shape[1]) for _ in range(2)))
        for expert in self.experts.unique().tolist():
            here = self.experts == expert
            part = Interval(a.middle[here], a.half[here])
            one = self._one(part, None if step is None else step[here], w, expert, variant)
            if bias is not None:
                addend = bias[expert].double()
                one = Interval(one.middle + addend, one.half + U * ((one.middle + addend).abs() + addend.abs() + one.half))
            y.middle[here], y.half[here] = one.middle, one.half
        return y

    def _one(self, a, step, w, expert, variant):
        if not isinstance(w, QTensor):
            b, size = w[expert].double(), a.largest()
            terms = (size != 0).sum(1, keepdim=True)
            if self.device.type == "cuda":
                # As a matrix unit aligns subnormal operands.
                size = torch.where(size != 0, size.clamp(min=TINY[self.case.dtype]), 0.0)
            c = accumulators.coefficient(terms, 1, self.device, False, self.dtype == torch.float32)
            # Products of float32 numbers are rounded, too.
            return Interval(a.middle @ b.T, (c + U) * (size @ b.abs().T) + a.half @ b.abs().T + terms * ETA)
        q, size = take_expert(w, expert), a.largest()
        b = linear_operands(self.data.x.new_empty(0, q.shape[1]), q, variant=variant)[1]
        operands = None if variant == "exact" else (size, b)
        error = product_bound(q, size, self.device, self.case.dtype, self.x_format, step, operands) + a.half @ b.abs().T
        if "weight_rounded" in variant:
            error = error + size @ weight_doubt(q, self.dtype).T
        return Interval(a.middle @ b.T, error)


def activated(x, name, given):
    """The activation of an interval, and of what float32 may lose in it."""
    described, function = ACTIVATIONS[name], FUNCTIONS[name]
    g, u, eg, eu = x.middle, None, x.half, 0.0
    if described.gated:
        parts = [(t[:, ::2], t[:, 1::2]) if described.interleaved else t.tensor_split(2, 1) for t in (x.middle, x.half)]
        (g, u), (eg, eu) = parts
    y = function(g, u, given)
    # y = s(g) u': with u' a function of u that changes no faster than u.
    s, factor = (y, torch.ones_like(g)) if u is None else split(g, u, name, given)
    slope = 2 * (g.abs() + eg) if name.startswith("relu2") else SLOPE.get(name.removesuffix("_no_mul"), 1.1)
    error = slope * eg * (factor.abs() + eu) + s.abs() * eu
    # exp of a float32 argument is off by its rounding, times two; erf and tanh end in a difference from one.
    size = g.abs() + eg
    relative, absolute = 16 + 4 * size * (given["alpha"] or 1.0), 0.0
    if name.startswith("gelu"):
        relative, absolute = relative + 4 * 0.8 * (size + 0.045 * size**3).clamp(max=128), 4 * size
    if name == "situ":
        relative = relative + 16
    # At the ends of the interval as in its middle.
    factor = factor.abs() + eu
    own = U * (relative * (y.abs() + error) + absolute * factor) + 2.0**-120 * (1 + size) * (1 + factor)
    return Interval(y, (error + own) * (1 + 2.0**-20))


def split(g, u, name, given):
    """s and u' of act(g, u) = s(g) u'(u)."""
    limit, beta, up = given["limit"], given["beta"], given["up_beta"]
    one = torch.ones_like(u)
    factor = u if limit is None else u.clamp(-limit, limit)
    if name.startswith("swigluoai"):
        factor, scale = factor + beta, one.clamp(max=limit) + beta
    elif name == "situ" and up is not None:
        factor, scale = up * torch.tanh(u / up), up * torch.tanh(one / up)
    else:
        scale = one if limit is None else one.clamp(max=limit)
    return FUNCTIONS[name](g, one, given) / scale, factor
