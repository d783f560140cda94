"""The tensors of an ExpertsCase, on the CPU.

The exact regime reaches through the whole layer by saturated gates. One column of x, the driver, is so large that every gate is at least
128 in magnitude: then silu(g) is g, or zero, in every formulation, and an activation is a product of few bits. The other columns are sparse
small integers, as are the weights (gates: the driver's column only); scales are powers of two, and so are gates. Where x is quantized, each
group of x has a column of the largest code, the peak, and each group of the activation a column that is that peak times its gate; neither
meets a weight that is not zero beyond that, so all scales are powers of two, and codes are certain.
"""

import math
from dataclasses import dataclass, replace

import torch

from ref import Float, Int, QTensor, dequantize, quantize_input
from ref.combine import take_expert
from ref.element import decode, encode, max_value
from ref.format import parse_format
from ref.moe.activation import activate
from ref.moe.check import ACTIVATIONS, check_activation
from ref.pack import pack
from ref.quantize import stored_values
from ref.rounding import round_to

from .. import accumulators
from ..bounds import budget, expand
from ..case import DTYPES
from ..experts_case import PLAIN
from ..regimes import below, draw_x, hashed, view_of
from ..weights import draw_weight, exact_codes
from .moe_sum_data import WEIGHT_DTYPES, draw_weights

# What the exact regime tries: one weight in `sparse` is not zero, of so many bits; scales differ; one x in `thin` is not zero.
LADDER = ((2, 3, True, 2), (4, 2, True, 4), (6, 2, False, 6), (12, 1, False, 12), (40, 1, False, 12))
# A gate is saturated at 32, and gone at -128.
SATURATED = 128.0
# The carrier of exact plain weights.
SMALL = "int4"


@dataclass
class ExpertsData:
    """x (m, h); w13, w2: QTensors or tensors of x's dtype; biases or None; weights, ids (m, t), the map or None.

    live: bool (m, t), the slots that count. exact: every correct kernel gives the same bits. given: the activation's parameters, all four.
    """

    case: object
    x: torch.Tensor
    w13: object
    w2: object
    bias13: torch.Tensor | None
    bias2: torch.Tensor | None
    weights: torch.Tensor
    exact: bool

    def __post_init__(self):
        route, seed = self.case.route, self.case.seed
        self.ids, self.expert_map, self.local = route.ids(seed), route.expert_map(seed), route.local(seed)
        self.live = self.local >= 0
        self.given = parameters(self.case)

    @property
    def x_format(self):
        return None if self.case.x_format is None else parse_format(self.case.x_format)

    def poisoned(self):
        """x and weights, with NaN in rows and slots that nobody may read. What is quantized stays finite: scales may be of all of x."""
        x, weights = torch.where(self.live.any(1)[:, None], self.x, torch.nan), torch.where(self.live, self.weights, torch.nan)
        if self.x_format is None:
            return x, weights
        return self.x, self.weights if self.case.on_input else weights

    def view(self, device):
        """The poisoned x as the case lays it out in memory: (view, buffer)."""
        case = self.case
        return view_of(self.poisoned()[0], (case.route.m,), case.pad, case.offset, case.transposed, device)


def parameters(case):
    like = torch.empty(0, 2 * case.i if ACTIVATIONS[case.activation].gated else case.i)
    return check_activation(like, case.activation, **case.parameters)


def draw(case):
    if case.data == "exact" and case.activation.removesuffix("_no_mul") in ("silu", "relu2") and not (case.x_format and case.bias):
        for rung in LADDER[case.seed % 2 :]:
            data = _draw_exact(case, *rung)
            if data is not None:
                return data
    return _draw_random(case)


def shapes(case):
    """Of w13 and w2."""
    e = case.route.local_experts
    return (e, case.i * (1 + ACTIVATIONS[case.activation].gated), case.h), (e, case.n, case.i)


def _draw_random(case):
    route, seed = case.route, case.seed
    kind = "normal" if case.data == "exact" else case.data
    w13, w2 = (_weight(case, seed + number, shape) for number, shape in enumerate(shapes(case)))
    row = None
    if kind in ("positive", "cancelling") and w13.shape[0]:
        first = take_expert(w13, 0) if isinstance(w13, QTensor) else w13[0].double()
        row = (stored_values(first) if isinstance(first, QTensor) else first)[0]
    # Gates of about one: further out silu is a line.
    x = draw_x(seed, route.m, case.h, "fp32", kind, row) * (0.25 / math.sqrt(case.h)) * 2.0 ** (seed % 4)
    weights = draw_weights(seed, route.m, route.t, case.weights, "normal", torch.ones(route.m, route.t, dtype=torch.bool))
    biases = [None, None]
    if case.bias is not None:
        sizes = [(shape[0], shape[1]) for shape in shapes(case)]
        noise = [hashed(seed, f"bias {number}", *size) for number, size in enumerate(sizes)]
        biases = [((bits & 0xFFFF).float() * 2.0**-16 - 0.5).to(DTYPES[case.bias]) for bits in noise]
    data = None
    while data is None or (case.dtype == "fp16" and _overflows(data)):
        data = ExpertsData(case, round_to(x.double(), DTYPES[case.dtype]), w13, w2, *biases, weights, False)
        x = x / 32
    return data


def _overflows(data):
    """Whether float16 may have no number for an intermediate result."""
    rows, slots = data.live.nonzero(as_tuple=True)
    experts, case = data.local[rows, slots], data.case
    gate_up = product(data.x.double()[rows], data.w13, experts, data.bias13)
    hidden = activate(gate_up, case.activation, **data.given)
    down = product(hidden, data.w2, experts, data.bias2)
    return any(bool((t.abs() > 2.0**12).any()) for t in (gate_up, hidden, down)) and bool(data.x.any())


def _weight(case, seed, shape):
    if case.format in (None, PLAIN):
        values = stored_values(draw_weight(seed, "int8_g32", shape, "normal"))
        return round_to(values * 0.5, DTYPES[case.dtype])
    return draw_weight(seed, case.format, shape, "normal")


def _draw_exact(case, sparse, bits, scales, thin):
    """ExpertsData whose every intermediate result is exact and representable, or None if these would not be."""
    x_format = None if case.x_format is None else parse_format(case.x_format)
    if case.h < 2 or (x_format is not None and (x_format.hadamard or case.activation != "silu" or case.limit)):
        return None
    layer = _Exact(case, sparse, bits, scales and x_format is None, thin, x_format)
    return layer.data() if layer.possible else None


class _Exact:
    """One rung of the ladder for one case."""

    def __init__(self, case, sparse, bits, scales, thin, x_format):
        self.case, self.sparse, self.bits, self.thin, self.x_format = case, sparse, bits, thin, x_format
        self.seed, self.dtype = case.seed, DTYPES[case.dtype]
        self.fmt = parse_format(SMALL if case.format in (None, PLAIN) else case.format)
        self.described = ACTIVATIONS[case.activation]
        self.silu = case.activation.startswith("silu")
        self.driver = self.seed % case.h
        self.carriers = [
            draw_weight(self.seed + number, self.fmt, shape, "exact", False, bits, scales) for number, shape in enumerate(shapes(case))
        ]
        zero = self.carriers[0].zero
        for quantum in (self.seed % 64, 1):
            self.table = decode(exact_codes(self.fmt.element, bits, quantum), self.fmt.element)
            if zero is not None:
                self.table = torch.arange(-(2**bits), 2**bits + 1, dtype=torch.float64)
            powers = self.table[(self.table > 0) & (torch.frexp(self.table).mantissa == 0.5)]
            if powers.numel():
                break
        self.possible = powers.numel() > 0 and self.fmt.offset is None
        self.one = float(powers.min()) if self.possible else 1.0

    def data(self):
        w13, w2 = self._first(), self._second()
        if w13 is None or w2 is None:
            return None
        x = self._x(w13)
        case, route = self.case, self.case.route
        quarters = (1, 2, 4) if case.on_input else (1, 2, 3, 4)
        bits = hashed(self.seed, "weights", route.m, route.t)
        weights = (torch.tensor(quarters)[below(bits, len(quarters))] / 4.0).to(WEIGHT_DTYPES[case.weights])
        if x is None or not torch.equal(round_to(x, self.dtype).double(), x):
            return None
        data = ExpertsData(case, x.to(self.dtype), *map(self._given, (w13, w2)), *self._biases(w13, w2), weights, True)
        return data if lossless(data) else None

    def _given(self, q):
        return q if self.case.format not in (None, PLAIN) else stored_values(q).to(self.dtype)

    def _with(self, carrier, values):
        """The carrier with other codes: values (e, n, k) as they are before scales, after zero points; None if there is no such code."""
        if carrier.zero is not None:
            zero = expand(carrier.zero.double(), carrier)
            top = 2.0**self.fmt.element.bits - 1
            values = (zero + values).clamp(0, top)
        codes = encode(values, self.fmt.element)
        if not torch.equal(decode(codes, self.fmt.element), values):
            return None
        return replace(carrier, packed=pack(codes, self.fmt.element.bits))

    def _sparse(self, name, *shape):
        bits = hashed(self.seed, name, *shape)
        kept = below(bits >> 40, self.sparse) == 0
        return self.table[below(bits >> 8, len(self.table))] * kept

    def _first(self):
        """w13: gates meet the driver's column only, the rest all but that and the peaks'."""
        case, (e, n, h) = self.case, shapes(self.case)[0]
        values = self._sparse("up", e, n, h)
        values[:, :, self.driver] = 0
        if self.silu:
            sign = torch.where(below(hashed(self.seed, "gate", e, case.i), 3) == 0, -1.0, 1.0)
            values[:, : case.i] = 0
            if self.x_format is not None:
                sign[:, self._peaks(case.i)] = 1
                values[:, :, self._peaks(h, self.driver)] = 0
                values[:, case.i :][:, self._peaks(case.i)] = 0
                values[:, case.i + torch.tensor(self._peaks(case.i)), self._peaks(h, self.driver)[0]] = self.one
            if not bool((self.table < 0).any()):
                sign = sign.abs()
            values[:, : case.i, self.driver] = sign * self.one
        return self._with(self.carriers[0], values)

    def _second(self):
        values = self._sparse("down", *shapes(self.case)[1])
        if self.x_format is not None:
            values[:, :, self._peaks(self.case.i)] = 0
        return self._with(self.carriers[1], values)

    def _peaks(self, size, avoided=None):
        """One column in each group of a row."""
        group = self.x_format.group[1] or size
        found = []
        for start in range(0, size, group):
            free = [c for c in range(start, min(start + group, size)) if c != avoided]
            found += free[self.seed // 7 % len(free) :][:1] if free else []
        return found

    def _x(self, w13):
        """float64 (m, h)."""
        case, route = self.case, self.case.route
        bits = hashed(self.seed, "x", route.m, case.h)
        x = (below(bits >> 32, 3) + 1).double() * torch.where(bits < 0, -1.0, 1.0) * (below(bits >> 20, self.thin) == 0)
        if not self.silu or not w13.shape[0]:
            return x
        gates = stored_values(w13)[:, : case.i, self.driver].abs()
        gates = gates[gates > 0]
        if not gates.numel():
            return None
        size = SATURATED * (4 if case.on_input else 1) / float(gates.min())
        if self.x_format is None:
            size = 2.0 ** math.ceil(math.log2(size))
            x[:, self.driver] = torch.where(below(hashed(self.seed, "driver", route.m), 3) == 0, -size, size)
            return x
        top = 2.0 ** (self.x_format.element.bits - 1) - 1 if isinstance(self.x_format.element, Int) else max_value(self.x_format.element)
        # The driver is at most half of the peak, so that the peak decides.
        unit = 2.0 ** math.ceil(math.log2(size / (top / 2)))
        driver = 2.0 ** math.floor(math.log2(top / 2))
        columns = self._peaks(case.h, self.driver)
        if len(columns) < -(-case.h // (self.x_format.group[1] or case.h)):
            return None
        x[:, self.driver], x[:, columns] = driver, top
        return x * unit

    def _biases(self, w13, w2):
        """Small multiples of the smallest weight; none for gates, which stay powers of two."""
        if self.case.bias is None:
            return None, None
        biases = []
        for name, w in (("bias 0", w13), ("bias 1", w2)):
            bits = hashed(self.seed, name, *w.shape[:2])
            unit = float(torch.nan_to_num(accumulators.quantum(stored_values(w).flatten()), posinf=1.0)) if w.packed.numel() else 1.0
            biases.append((below(bits, 3) - 1).double() * min(unit, 1.0))
        if self.silu:
            biases[0][:, : self.case.i] = 0
        return [bias.to(DTYPES[self.case.bias]) for bias in biases]


def lossless(data):
    """Whether every sum is exact in every adder, and every intermediate result representable, in the order that engines store them in."""
    case, dtype, x_format = data.case, data.x.dtype, data.x_format
    fp8 = x_format is not None and isinstance(x_format.element, Float)
    rows, slots = data.live.nonzero(as_tuple=True)
    experts = data.local[rows, slots]
    x = data.x.double()
    if case.on_input:
        x = x * data.weights.double()
    if not _kept(x, dtype) or (x_format is not None and not _quantizes(x, dtype, x_format)):
        return False
    a = x[rows]
    gate_up = product(a, data.w13, experts, data.bias13)
    if not sums_exactly(a, data.w13, experts, data.bias13, fp8) or not _kept(gate_up, dtype):
        return False
    hidden = activate(gate_up, case.activation, **data.given)
    # What float32 has no number for.
    hidden = torch.where(hidden.abs() < accumulators.ETA, 0, hidden)
    if not _kept(hidden, dtype) or (x_format is not None and not _quantizes(hidden, dtype, x_format)):
        return False
    down = product(hidden, data.w2, experts, data.bias2)
    if not sums_exactly(hidden, data.w2, experts, data.bias2, fp8) or not _kept(down, dtype):
        return False
    weighed = torch.zeros(*data.ids.shape, case.n, dtype=torch.float64)
    weighed[rows, slots] = down if case.on_input else down * data.weights[rows, slots, None].double()
    total, quantum = weighed.abs().sum(1), accumulators.quantum(weighed.transpose(1, 2))
    return accumulators.exact(total, quantum) and (dtype != torch.float16 or bool((total < 2.0**15).all()))


def _kept(values, dtype):
    """Whether values are numbers of the dtype, well inside its range."""
    inside = bool((values.abs() < (2.0**15 if dtype == torch.float16 else 2.0**60)).all())
    return inside and torch.equal(round_to(values, dtype).double(), values)


def _quantizes(values, dtype, x_format):
    return torch.equal(dequantize(quantize_input(values.to(dtype), x_format)), values)


def product(a, w, experts, bias):
    """Rows times their experts' weights, float64."""
    y = a.new_zeros(a.shape[0], w.shape[1])
    for expert in experts.unique().tolist():
        here = experts == expert
        b = stored_values(take_expert(w, expert)) if isinstance(w, QTensor) else w[expert].double()
        y[here] = a[here] @ b.T + (0 if bias is None else bias[expert].double())
    return y


def sums_exactly(a, w, experts, bias, fp8):
    """Whether no adder rounds in that product."""
    for expert in experts.unique().tolist():
        here = experts == expert
        if isinstance(w, QTensor):
            s, quantum, chunk = budget(take_expert(w, expert), a[here], fp8)
        else:
            b, chunk = w[expert].double(), None
            s, quantum = a[here].abs() @ b.abs().T, accumulators.quantum(a[here])[:, None] * accumulators.quantum(b)
        if bias is not None:
            addend = bias[expert].double()
            s, quantum = s + addend.abs(), torch.minimum(quantum, accumulators.quantum(addend[:, None]))
        if not accumulators.exact(s, quantum, chunk):
            return False
    return True
