"""One rounding from float64: every midpoint of fp16 and bf16 with its two neighbours, and rational arithmetic."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .rounding import round_to

# Significant bits, exponent of the smallest normal, exponent above the largest.
LIMITS = {torch.float16: (11, -14, 16), torch.bfloat16: (8, -126, 128), torch.float32: (24, -126, 128)}


def rounded(x, dtype):
    """x (a finite float, or a Fraction) to the nearest number of dtype, ties to even, in rational arithmetic."""
    if x == 0:
        return float(x)
    precision, smallest, above = LIMITS[dtype]
    exact = abs(Fraction(x))
    exponent = math.frexp(float(x))[1] - 1
    unit = Fraction(2) ** (max(exponent, smallest) - precision + 1)
    result = round(exact / unit) * unit  # Python's round is to even
    return math.copysign(math.inf if result >= Fraction(2) ** above else float(result), float(x))


def identical(a, b):
    return a == b and math.copysign(1, a) == math.copysign(1, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_every_midpoint_and_its_neighbours(dtype, sign):
    inf = torch.tensor(math.inf).to(dtype).view(torch.int16).item()
    codes = torch.arange(inf, dtype=torch.int16)  # from 0 to the largest finite
    below, above = codes.view(dtype).double(), (codes + 1).view(dtype).double()
    above[-1] = 2.0 ** LIMITS[dtype][2]  # what stands in for inf: half-way to it is where overflow begins
    middle = (below + above) / 2
    lower, upper = codes.view(dtype), (codes + 1).view(dtype)
    infinity = torch.tensor(math.inf, dtype=torch.float64)
    even = torch.where(codes % 2 == 0, lower, upper)
    for x, want in (
        (middle, even),
        (torch.nextafter(middle, -infinity), lower),
        (torch.nextafter(middle, infinity), upper),
        (below, lower),
    ):
        got = round_to(sign * x, dtype)
        assert got.dtype == dtype
        assert torch.equal(got.view(torch.int16), (sign * want).view(torch.int16))


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@given(x=st.floats(allow_nan=False, allow_infinity=False) | st.floats(-100, 100) | st.floats(-1e-37, 1e-37) | st.floats(-1e-4, 1e-4))
def test_against_rational_rounding(dtype, x):
    assert identical(round_to(torch.tensor(x, dtype=torch.float64), dtype).item(), rounded(x, dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@given(code=st.integers(0, 2**15 - 1), tail=st.integers(25, 52), up=st.booleans())
def test_double_rounding_traps(dtype, code, tail, up):
    """A midpoint and a little more or less, too little for float32 to see."""
    a = torch.tensor(code, dtype=torch.int16).view(dtype).double().item()
    if not math.isfinite(a) or a == 0:
        return
    precision, smallest, _ = LIMITS[dtype]
    unit = 2.0 ** (max(math.frexp(a)[1] - 1, smallest) - precision + 1)
    x = a + unit / 2 + (1 if up else -1) * math.ldexp(a, -tail)
    assert identical(round_to(torch.tensor(x, dtype=torch.float64), dtype).item(), rounded(x, dtype))


def test_traps_by_hand():
    """torch's own conversion, by way of float32, takes these for ties."""
    for dtype, half in ((torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)):
        x = torch.tensor([1 + half + 2.0**-40, 1 + 3 * half - 2.0**-40], dtype=torch.float64)
        assert round_to(x, dtype).tolist() == [1 + 2 * half, 1 + 2 * half]


def test_special_values():
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e300, -1e300, 5e-324, -5e-324], dtype=torch.float64)
    for dtype in LIMITS:
        got = round_to(x, dtype)
        assert got[2].isnan() and got[[0, 1, 5, 6]].tolist() == [math.inf, -math.inf, math.inf, -math.inf]
        assert got[[3, 4, 7, 8]].tolist() == [0] * 4 and got[[3, 4, 7, 8]].signbit().tolist() == [False, True, False, True]


def test_shapes_and_dtypes():
    x = torch.randn(2, 0, 3, dtype=torch.float64)
    assert round_to(x, torch.bfloat16).shape == (2, 0, 3) and round_to(torch.tensor(1.5, dtype=torch.float64), torch.float16).shape == ()
    x = torch.randn(5, dtype=torch.float64)
    assert torch.equal(round_to(x, torch.float64), x)
    for dtype in (torch.int32, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match="expected float64, float32, float16 or bfloat16"):
            round_to(x, dtype)
