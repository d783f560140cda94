"""Stacks of weights and the rows that they are multiplied by: a LinearCase of one tall weight, cut into experts.

What is admissible for a row is what linear's Truth says of it and of its expert's weight. Rows of x that no expert has are NaN (or, where x is
quantized, large numbers), and must have no influence.
"""

from dataclasses import dataclass

import torch

from ref.combine import take_expert
from ref.format import parse_format
from ref.qtensor import QTensor

from ..accumulators import ETA, U
from ..case import LinearCase
from ..oracle import Disagreement, compare
from ..regimes import below, hashed, normal
from ..weights import to_device
from . import parts_of
from .linear import Truth, _check_special
from .linear_data import LinearData
from .linear_data import draw as draw_linear
from .moe_sum_data import WEIGHT_DTYPES

POISON = 30000.0


@dataclass
class GroupedData:
    """x (rows, k), w (e, n, k), bias (e, n) or None, x_scale or None, weights of slots or None; exact: as LinearData's."""

    case: object
    x: torch.Tensor
    w: QTensor
    bias: torch.Tensor | None
    x_scale: torch.Tensor | None
    exact: bool

    def poisoned(self, used):
        """x with what must have no influence in the rows that are not used, bool (rows,)."""
        return torch.where(used[:, None], self.x, torch.nan if self.case.x_format is None else POISON)


def draw(case, experts, rows):
    """GroupedData of a case."""
    fmt = parse_format(case.format)
    gn = fmt.group[0]
    # Blocks of rows that share a scale do not straddle experts.
    tall = -(-case.n // gn) * gn if gn else case.n
    names = ("k", "format", "x_format", "static", "dtype", "bias", "data", "seed")
    linear = draw_linear(LinearCase(n=experts * tall, lead=(rows,), **{name: getattr(case, name) for name in names}))
    # Scales that all rows of an expert share differ from expert to expert by a power of two, and so does the bias.
    powers = torch.ldexp(torch.ones(experts), -(torch.arange(experts) % 3)) if _shared(fmt) else torch.ones(experts)
    bias = linear.bias
    if bias is not None:
        bias = (bias.view(experts, tall)[:, : case.n].double() * powers[:, None]).to(bias.dtype)
    return GroupedData(case, linear.x, _stack(linear.q, experts, tall, case.n, powers), bias, linear.x_scale, linear.exact)


def _shared(fmt):
    """Which part of the weights all rows of an expert share: "scale_2", "scale" (a float one), or None."""
    if (fmt.scale_2 or "").startswith("tensor"):
        return "scale_2"
    return "scale" if fmt.group[0] == 0 and fmt.scale in ("fp32", "fp16", "bf16") and fmt.offset is None else None


def _stack(q, experts, tall, n, powers):
    """A weight (experts * tall, k) as a stack of the first n of each `tall` rows."""

    def cut(part, rows):
        """part: a row of it for so many of an expert's; rows of 0: one for all."""
        if part is None:
            return None
        if not rows:
            return part.expand(experts, *part.shape).contiguous()
        return part.view(experts, tall // rows, -1)[:, : -(-n // rows)].contiguous()

    gn, second = q.format.group[0], 1 if (q.format.scale_2 or "").startswith("channel") else 0
    parts = {name: cut(getattr(q, name), gn) for name in ("scale", "zero", "offset")}
    parts |= {"packed": cut(q.packed, 1), "scale_2": cut(q.scale_2, second)}
    shared = _shared(q.format)
    if shared:
        divided = shared == "scale_2" and q.format.scale_2.endswith("divisor")
        factor = (1 / powers if divided else powers)[:, None, None]
        parts[shared] = (parts[shared].double() * factor).to(parts[shared].dtype)
    return QTensor(q.format, (experts, n, q.shape[1]), **parts)


def draw_weights(case, slots):
    """topk_weights (slots,), powers of two of either sign where results are (nearly) exact; None without any."""
    if getattr(case, "weights", None) is None:
        return None
    noise = hashed(case.seed, "topk_weights", slots)
    w = torch.ldexp(1.0 - 2.0 * (below(noise >> 32, 4) == 0), below(noise, 4) - 2)
    return (w if case.data in ("exact", "one_hot") else normal(noise)).to(WEIGHT_DTYPES[case.weights])


class GroupedTruth:
    """The exact answers of one case: those of linear, for each expert and its rows."""

    def __init__(self, data, device, declared, source, owner, weights=None, count=None):
        """
        Args:
            source, owner: int64 (slots,): of each row of the result the row of x, and the expert, -1 for zeros.
            weights: what rows of the result are multiplied by, (slots,), or None.
            count: bool (slots,): the rows that are judged; None: all.
        """
        case = data.case
        self.case, self.data, self.device, self.owner, self.weights, self.count = case, data, device, owner, weights, count
        self.x = torch.where((owner >= 0)[:, None], data.x[source], 0)
        self.experts = {}
        for expert in owner[owner >= 0].unique().tolist():
            rows = owner == expert
            names = ("n", "k", "format", "x_format", "static", "dtype", "bias", "data", "seed")
            linear = LinearCase(lead=(int(rows.sum()),), **{name: getattr(case, name) for name in names})
            bias = None if data.bias is None else data.bias[expert]
            one = LinearData(linear, self.x[rows], take_expert(data.w, expert), bias, data.x_scale, data.exact)
            self.experts[expert] = Truth(one, device, declared)
        self.variants = next(iter(self.experts.values())).variants if self.experts else ["exact"]

    def check(self, y):
        """Agreement with the first variant that accepts y (slots, n).

        Raises:
            Disagreement: with the first variant, if there is none.
        """
        ordinary = _check_special(self.x, y)
        ordinary &= True if self.count is None else self.count
        first = None
        for variant in self.variants:
            exact, error = self.answer(variant)
            try:
                agreement = compare(y[ordinary], exact[ordinary], error[ordinary], fair=self.case.x_format is None)
                agreement.variant = variant
                return agreement
            except Disagreement as disagreement:
                first = first or disagreement
        raise first

    def answer(self, variant):
        """The exact y of a variant, and the admissible error: float64 (slots, n) each."""
        y = torch.zeros(len(self.owner), self.case.n, dtype=torch.float64)
        error = torch.zeros_like(y)
        for expert, truth in self.experts.items():
            y[self.owner == expert], error[self.owner == expert] = truth.answer(variant)
        if self.weights is None:
            return y, error
        w = self.weights.double()[:, None]
        # A product of powers of two and of what is exact is exact; else the product is rounded, and a weight of float64 is.
        lossless = (error == 0) & (torch.frexp(w).mantissa.abs() == 0.5)
        rounded = (1 + (self.weights.dtype == torch.float64)) * U * (y.abs() + error) * w.abs() + ETA
        return y * w, torch.where(lossless, 0.0, error * w.abs() + 1.01 * rounded)


def of_case(case, data, device):
    """The arguments of a case that are as linear's, on a device: w, the keyword arguments, and all tensors by name."""
    w = to_device(data.w, device)
    owned = parts_of(w, "w")
    kwargs = {} if case.x_format is None else {"x_format": case.x_format}
    if data.bias is not None:
        kwargs["bias"] = owned["bias"] = data.bias.to(device, copy=True)
    if data.x_scale is not None:
        kwargs["x_scale"] = owned["x_scale"] = data.x_scale.to(device, copy=True)
    return w, kwargs, owned
