"""The bounds of a whole layer of experts hold for layers whose every sum is in float32, in several orders, and are narrow enough to say something."""

import pytest
import torch

from ref import QTensor, dequantize, quantize_input
from ref.combine import take_expert
from ref.moe import activation
from ref.quantize import stored_values
from ref.rounding import round_to

from .emulate import ieee_sum, tree_sum
from .experts_case import ExpertsCase
from .moe_case import Route
from .ops import fused_experts
from .ops.experts_data import draw
from .oracle import compare


def order_of(kind, k, seed):
    if kind == "backward":
        return torch.arange(k).flip(0)
    return torch.randperm(k, generator=torch.Generator().manual_seed(seed))


def total(kind, a, b, seed):
    """a (m, k) times b (n, k), in float32."""
    return tree_sum(a, b) if kind == "pairs" else ieee_sum(a, b, order_of(kind, a.shape[1], seed))


def layer(data, stage, kind):
    """y (m, n) in float32, with what `stage` stores rounded to x's dtype."""
    case, dtype = data.case, data.x.dtype
    kept = fused_experts.STAGES[stage]

    def stored(name, t):
        return round_to(t, dtype).double() if name in kept else t

    def operand(t):
        return t.double() if case.x_format is None else dequantize(quantize_input(t, case.x_format))

    rows, slots = data.live.nonzero(as_tuple=True)
    y = torch.zeros(case.route.m, case.n)
    x = operand(data.x)
    for number, (row, slot) in enumerate(zip(rows.tolist(), slots.tolist(), strict=True)):
        expert = int(data.local[row, slot])
        w13, w2 = (stored_values(take_expert(w, expert)) if isinstance(w, QTensor) else w[expert].double() for w in (data.w13, data.w2))
        gate_up = stored("gate_up", total(kind, x[row : row + 1], w13, number))
        hidden = activation.activate(gate_up.float(), case.activation, **data.given).double()
        hidden = operand(round_to(hidden, dtype)) if "hidden" in kept else operand(hidden.float())
        down = stored("down", total(kind, hidden, w2, number + 1))
        y[row] += (data.weights[row, slot].float() * down[0].float()).float()
    return y


@pytest.mark.parametrize("kind", ["random", "backward", "pairs"])
@pytest.mark.parametrize("stage", ["stored", "exact"])
@pytest.mark.parametrize(
    "given", [{}, {"format": "int4_g32"}, {"format": "int4_g32", "x_format": "int8_token"}, {"activation": "gelu_tanh"}], ids=str
)
def test_float32_layers_stay_within_the_bounds(given, stage, kind):
    decided = elements = 0
    for seed, regime in enumerate(("normal", "positive", "heavy", "cancelling", "outlier")):
        route = Route(m=5, t=2, e=3, mixed=True)
        case = ExpertsCase(**{"route": route, "h": 40, "i": 12, "n": 8, "dtype": "bf16", "data": regime, "seed": seed} | given)
        data = draw(case)
        admissible = fused_experts.Truth(data, torch.device("cpu")).answer(stage, "exact", "exact")
        y = layer(data, stage, kind)
        # Before the last rounding, and after it.
        assert bool(((y.double() - admissible.middle).abs() <= admissible.half).all())
        agreement = compare(round_to(y.double(), data.x.dtype), admissible.middle, admissible.half, fair=False)
        decided, elements = decided + sum(agreement.widths[:3]), elements + agreement.elements
    assert decided > elements / 3
