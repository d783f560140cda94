"""The interval test, the data from seeds, and cases as text."""

import math

import pytest
import torch
from hypothesis import given, settings

from ref.format import FORMATS, parse_format
from ref.qtensor import validate

from . import formats, strategies
from .case import LinearCase, UnpackCase, read_case, reproduction
from .ops import operations
from .ops.linear_data import draw
from .oracle import Disagreement, compare, equal, within
from .quantizer import hull
from .regimes import DATA, draw_x, hashed, view_of
from .weights import draw_weight, exact_codes, lowest_bit

LIGHT = settings(max_examples=25, deadline=None, database=None, derandomize=True)


def test_the_interval_test_has_no_slack_of_its_own():
    y = torch.tensor([1.0 + 2.0**-9], dtype=torch.float64)  # halfway between two bf16 numbers
    low, high = (torch.tensor([v], dtype=torch.bfloat16) for v in (1.0, 1.0 + 2.0**-7))
    assert compare(low, y, 0.0).elements == 0  # to even
    with pytest.raises(Disagreement, match=r"y\[0\] = 1.0078125, admissible 1 only, exact 1.00195312"):
        compare(high, y, 0.0)
    agreement = compare(high, y + 2.0**-9, torch.tensor([2.0**-20]))
    assert agreement.elements == 1 and 0 <= agreement.worst <= 1
    with pytest.raises(Disagreement):
        compare(torch.tensor([float("nan")], dtype=torch.bfloat16), y, 1.0)
    compare(torch.tensor([float("nan")]), torch.tensor([float("nan")], dtype=torch.float64), 0.0)
    compare(torch.tensor([float("inf")], dtype=torch.float16), torch.tensor([70000.0], dtype=torch.float64), 0.0)


def test_rounding_twice_is_not_rounding_once():
    y = torch.tensor([1.0 + 2.0**-11 + 2.0**-40], dtype=torch.float64)
    compare(torch.tensor([1.0 + 2.0**-10], dtype=torch.float16), y, 0.0)
    with pytest.raises(Disagreement):
        compare(y.float().half(), y, 0.0)


def test_wide_elements_are_counted():
    y = torch.ones(4, dtype=torch.float64)
    assert compare(torch.ones(4, dtype=torch.bfloat16), y, torch.tensor([0.0, 2.0**-9, 0.5, 0.5])).wide == 2


def test_bit_equality_and_ranges():
    equal(torch.tensor([float("nan")]), torch.tensor([-float("nan")]), "w")
    with pytest.raises(Disagreement, match=r"w\[1\] = -0, admissible 0 only"):
        equal(torch.tensor([1.0, -0.0]), torch.tensor([1.0, 0.0]), "w")
    with pytest.raises(Disagreement, match=r"scale\[0\] = 3, admissible \[1, 2\]"):
        within(torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([2.0]), "scale")


def test_data_depends_on_seed_name_and_coordinates_only():
    assert torch.equal(hashed(7, "x", 3, 5), hashed(7, "x", 6, 9)[:3, :5])
    assert not torch.equal(hashed(7, "x", 4), hashed(8, "x", 4))
    assert not torch.equal(hashed(7, "x", 4), hashed(7, "y", 4))
    assert hashed(1, "x", 400, 300).unique().numel() == 400 * 300
    share = (hashed(1, "x", 100_000) & 1).double().mean().item()
    assert abs(share - 0.5) < 4 * math.sqrt(0.25 / 100_000)


@pytest.mark.parametrize("data", DATA)
def test_x_is_finite_but_where_it_says_so(data):
    w = draw_weight(1, "int4", (1, 40)).scale.double().expand(1, 40)[0]
    for dtype in ("fp32", "fp16", "bf16"):
        x = draw_x(5, 9, 40, dtype, data, w)
        assert x.shape == (9, 40)
        bad = (~x.isfinite()).any(1).sum().item()
        assert bad == (data in ("nan", "inf"))


@pytest.mark.parametrize("name", [*FORMATS, "int1_g3", "uint8_b5x7_zbf16_channel2", "fp8_e2m5_tensor_ue5m3_h4"])
@pytest.mark.parametrize("data", ["exact", "normal", "subnormal_scale"])
def test_weights_are_valid(name, data):
    for seed in range(3):
        validate(draw_weight(seed, name, (6, 140), data, order=seed == 1))
        validate(draw_weight(seed, name, (2, 3, 40), data))


def test_exact_codes_share_a_quantum():
    for element in (*formats.floats(), *formats.CODEBOOKS):
        for seed in range(4):
            from ref.element import values

            found = values(element)[exact_codes(element, 5, seed)]
            q = min((lowest_bit(v) for v in found.tolist() if v), default=1.0)
            assert found.abs().max() <= 2**5 * q or found.numel() == 1
    assert lowest_bit(0.0) == 0.0


def test_views_have_the_data_and_nan_around_it():
    x = torch.arange(12.0).view(4, 3)
    for transposed in (False, True):
        view, buffer = view_of(x, (2, 2), 5, 3, transposed, "cpu")
        assert torch.equal(view.reshape(4, 3), x)
        assert int(buffer.isnan().sum()) == buffer.numel() - 12
    assert view_of(x[:1], (), 0, 1, False, "cpu")[0].shape == (3,)


@pytest.mark.parametrize("label", [*FORMATS, "generated"])
def test_exact_cases_are_exact(label):
    """By construction for every main format; generated ones may have no exact numbers (a rotation by an odd power of two)."""
    for quantized in (False, True):

        @LIGHT
        @given(strategies.linear_cases(label, quantized=quantized))
        def check(case):
            if case.data == "exact":
                drawn = draw(case)
                rotated = quantized and parse_format(case.x_format).hadamard
                assert drawn.exact or label == "generated" or rotated

        check()


def test_every_case_prints_and_reads_back():
    for op in operations().values():
        for label in op.labels([*formats.MAIN])[-2:]:

            @LIGHT
            @given(op.cases(label))
            def check(case):
                assert read_case(repr(case)) == case
                assert case.op == op.FUNCTION

            check()
    assert reproduction(LinearCase(n=3), "fast", "triton", "cuda:0") == (
        "python -m conformance --candidate fast --impl triton --device cuda:0 --case 'LinearCase(n=3)'"
    )
    assert repr(UnpackCase()) == "UnpackCase()"


@pytest.mark.parametrize("text", ["LinearCase(", "1", "LinearCase(format='int9')", "__import__('os')", "Foo()"])
def test_bad_cases_are_refused(text):
    with pytest.raises(ValueError, match="case: "):
        read_case(text)


@pytest.mark.parametrize("name", formats.ACTIVATIONS)
def test_the_hull_holds_what_ref_quantizes(name):
    from ref import dequantize, quantize_input
    from ref.hadamard import hadamard

    fmt = parse_format(name)
    x = draw_x(3, 7, 96, "bf16", "normal")
    x_scale = torch.tensor([0.01]) if fmt.scale_2 == "tensor" else None
    low, high, step = hull(x, fmt, x_scale)
    values = dequantize(quantize_input(x, fmt, x_scale))
    values = hadamard(values, fmt.hadamard) if fmt.hadamard else values
    assert bool(((low <= values) & (values <= high)).all())
    assert step.shape == x.shape
    ordinary = (high - low) <= 2.0**-20 * high.abs()  # not at a tie
    assert ordinary.double().mean() > 0.9
