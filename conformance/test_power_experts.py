"""Known-wrong layers of experts are caught, and shrink to small cases; the right one passes, in a set of bounds that says something."""

import pytest
import torch

from ref.moe import fused_experts_variant

from . import cell
from .case import read_case
from .experts_case import ExpertsCase
from .moe_case import Route
from .ops import fused_experts
from .ops.experts_data import draw


def run(name, label="int4_g32", examples=400):
    return cell.run(cell.Task(f"conformance.wrong_experts:{name}", "fused_experts", label, (None,), "cpu", examples))[0]


# The layer, and what the case it shrinks to must fulfil.
FOUND = [
    ("weight_twice", lambda c: c.route.n <= 2),
    ("other_ranks_counted", lambda c: c.route.n <= 4 and c.route.ranks > 1),
    ("input_weight_ignored", lambda c: c.route.n <= 2 and c.on_input),
]


@pytest.mark.parametrize(("name", "small"), FOUND, ids=[row[0] for row in FOUND])
def test_wrong_layers_are_found(name, small):
    found = run(name)
    assert found.status == "fail"
    case = read_case(found.case)
    assert small(case), found.case
    assert cell.run_case(case, "conformance.wrong_experts:right", (None,), "cpu")[0].status == "pass"


ROUTE = Route(m=9, t=3, e=3, mixed=True, neg=5)
CAUGHT = {
    "halves_swapped": {},
    "negative_id_wraps": {},
    "limit_ignored": {"limit": 64.0},
    "bias_dropped": {"bias": "bf16"},
    "second_not_quantized": {"x_format": "int8_token", "data": "normal"},
}


@pytest.mark.parametrize("name", CAUGHT)
def test_wrong_layers_are_caught(name):
    case = ExpertsCase(**{"route": ROUTE, "h": 40, "i": 24, "n": 24, "format": "int4_g32", "seed": 4} | CAUGHT[name])
    for layer, status in ((name, "fail"), ("right", "pass")):
        assert cell.run_case(case, f"conformance.wrong_experts:{layer}", (None,), "cpu")[0].status == status


def test_the_right_layer_passes():
    found = run("right", "mxfp4", 25)
    assert (found.status, found.examples) == ("pass", 25), found.error


@pytest.mark.parametrize("x_format", [None, "int8_token"])
@pytest.mark.parametrize("stage", ["stored", "exact"])
def test_the_middle_of_the_bounds_is_the_reference(stage, x_format):
    """The chain of intervals, all of its errors left out, is ref's own layer."""
    route = Route(m=9, t=2, e=4, mixed=True, neg=5)
    case = ExpertsCase(route=route, h=40, i=12, n=7, format="int4_g32", x_format=x_format, data="normal", dtype="fp32", seed=3)
    data = draw(case)
    admissible = fused_experts.Truth(data, torch.device("cpu")).answer(stage, "exact", "exact")
    y = fused_experts_variant(data.x, data.w13, data.w2, data.weights, data.ids, variant=stage, x_format=x_format)
    assert ((y.double() - admissible.middle).abs() <= admissible.half + y.double().abs() * 2.0**-23).all()
    # Sums of 40 and of 12 products in float32, and codes that float32 leaves open.
    assert (admissible.half <= 2.0**-12 * admissible.middle.abs().amax()).all()


@pytest.mark.parametrize(
    "given",
    [{}, {"limit": 64.0}, {"activation": "silu_no_mul"}, {"activation": "relu2_no_mul"}, {"x_format": "int8_token"}, {"x_format": "fp8_e4m3_token"},
     {"on_input": True, "route": Route(m=9, t=1, e=3, mixed=True)}, {"bias": "bf16"}],
    ids=str,
)  # fmt: skip
def test_the_exact_regime_is_reached_and_is_not_trivial(given):
    found = 0
    for seed in range(8):
        route = {"route": Route(m=9, t=3, e=3, mixed=True)}
        data = draw(ExpertsCase(**route | {"h": 40, "i": 24, "n": 24, "format": "int4_g32", "seed": seed} | given))
        if data.exact:
            y = fused_experts_variant(
                data.x, data.w13, data.w2, data.weights, data.ids, variant="stored", activation=data.case.activation,
                x_format=data.case.x_format, bias13=data.bias13, bias2=data.bias2, **data.case.parameters,
            )  # fmt: skip
            found += int((y != 0).sum() > y.numel() // 8)
    assert found >= 4
