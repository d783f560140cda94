"""The interval test, the data from seeds, and cases as text."""

import math

import pytest
import torch
from hypothesis import given, settings

from ref.format import FORMATS, parse_format
from ref.qtensor import validate
from ref.rounding import round_to

from . import accumulators as acc
from . import formats, strategies, wrong
from .case import LinearCase, UnpackCase, read_case, reproduction
from .emulate import block_sum, ieee_sum, tree_sum
from .ops import operations
from .ops.linear_data import draw
from .oracle import Disagreement, admitted, compare, equal, interval, rounded_away, within
from .quantizer import hull
from .regimes import DATA, draw_x, hashed, view_of
from .test_accumulators import data as sums_of
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_at_every_midpoint_only_what_is_rounded_once_is_admissible(dtype):
    """Just beside the midpoint of every two numbers, by less than float32 can tell, and on it."""
    infinity = torch.tensor(math.inf).to(dtype).view(torch.int16).item()
    codes = torch.arange(0, infinity - 1, dtype=torch.int16)
    below, above = codes.view(dtype), (codes + 1).view(dtype)
    middle = (below.double() + above.double()) / 2
    even = torch.where(codes % 2 == 0, below, above)
    for y, want in ((middle, even), (middle * (1 - 2.0**-50), below), (middle * (1 + 2.0**-50), above)):
        for sign in (1.0, -1.0):
            compare(sign * want, sign * y, 0.0)
            other = torch.where(want == below, above, below)
            assert not bool(admitted(sign * other, sign * y, torch.tensor(0.0)).any())
    # With a bound both neighbours are.
    assert bool((admitted(below, middle, middle * 2.0**-30) & admitted(above, middle, middle * 2.0**-30))[1:].all())


def test_what_an_agreement_counts():
    y = torch.tensor([1.0, 1.0, 1.0, 1.0, 3.0], dtype=torch.float64)
    error = torch.tensor([0.0, 2.0**-12, 2.0**-7, 2.0**-3, 2.0**-2])
    got = torch.tensor([1.0, 1.0, 1.0 + 2.0**-7, 1.0, 2.875], dtype=torch.bfloat16)
    agreement = compare(got, y, error)
    assert (agreement.elements, agreement.wide, agreement.matches) == (4, 2, 2)
    # One value; 3 of them; 24 below 1 and 16 above; 32.
    assert sum(agreement.widths) == 4 and agreement.widths[0] == 1 and agreement.widths[1] == 1 and sum(agreement.widths[4:6]) == 2
    assert sum(agreement.errors) == 4 and agreement.errors[0] == 2 and agreement.worst < 0.75
    assert len(agreement.widths) == 16 and len(agreement.errors) == 10


def leaning(kernel, unit, dtype, store=round_to, kinds=("normal", "positive", "heavy")):
    """(away, toward) of a kernel's results under the bound of its adder, in order where it keeps 13 bits."""
    total = [0, 0]
    for kind in kinds:
        for seed, k in enumerate((64, 200, 400)):
            x, w = sums_of(kind, k, seed, torch.float8_e4m3fn if unit != "ieee" and unit.kept < 16 else torch.bfloat16, 24, 24)
            y, s = x @ w.T, x.abs() @ w.abs().T
            error = (
                acc.coefficient(torch.tensor(k), 1, "cpu", False, False, unit) * s
                if unit in ("ieee", acc.MMA_16)
                else acc.running(x, w, unit)
            )
            got = store(kernel(x, w, y, error), dtype)
            counts = rounded_away(got, y, error, *interval(y, error, dtype))
            total = [a + b for a, b in zip(total, counts, strict=True)]
    return total


def sigmas(counts):
    return (counts[0] - counts[1]) / math.sqrt(max(sum(counts), 1))


def chain(x, w, y, error):
    return ieee_sum(x, w, torch.arange(x.shape[1]))


UNITS = {
    "ascending": (chain, "ieee"),
    "pairs": (lambda x, w, y, error: tree_sum(x, w), "ieee"),
    "16 bits": (lambda x, w, y, error: block_sum(x, w, acc.MMA_16), acc.MMA_16),
    "fp8": (lambda x, w, y, error: block_sum(x, w, acc.MMA_FP8), acc.MMA_FP8),
    "fp8 not promoted": (lambda x, w, y, error: block_sum(x, w, acc.Block(32, 13, 13)), acc.Block(32, 13, 13)),
}


@pytest.mark.parametrize("name", UNITS)
def test_truncating_adders_do_not_lean_and_truncated_results_do(name):
    kernel, unit = UNITS[name]
    dtype = torch.bfloat16 if name.startswith("fp8") else torch.float16
    right = leaning(kernel, unit, dtype)
    assert sum(right) > 200 and abs(sigmas(right)) < 4
    assert sigmas(leaning(kernel, unit, dtype, wrong.truncating_store.store)) < -8


def test_sums_that_are_always_off_by_most_of_the_bound_lean():
    """Such a kernel passes the interval test everywhere; so does one that is off by less than half, and that does not lean."""

    def off(part):
        return lambda x, w, y, error: y - torch.sign(y) * error * part

    assert sigmas(leaning(off(0.98), "ieee", torch.float16)) < -8
    assert abs(sigmas(leaning(off(0.49), "ieee", torch.float16))) < 4


def test_one_number_in_many_places_is_one_throw():
    y = torch.full((100, 100), 1 + 2.0**-8 + 2.0**-18, dtype=torch.float64)
    error = torch.full_like(y, 2.0**-17.5)
    assert compare(round_to(y, torch.bfloat16), y, error).signed == (1, 0)


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


def test_an_interval_that_reaches_infinity_is_wide():
    found = compare(
        torch.tensor([60000.0], dtype=torch.float16), torch.tensor([60000.0], dtype=torch.float64), torch.tensor([50000.0]).double()
    )
    assert found.wide == 1
