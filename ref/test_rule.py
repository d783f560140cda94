"""Scale rules: by formula over every group, by hand, and by the errors that were published."""

from dataclasses import replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

from .element import Float, max_value, value_list
from .format import parse_format
from .qtensor import validate
from .quantize import dequantize, quantize, with_scales
from .rule import RULES, default_rule
from .scale import decode_scale, encode_scale, tile
from .test_quantize import applies, candidates, codes_of, groups, normal


@pytest.mark.parametrize("rule, formula", [
    ("absmax", lambda v, e: np.abs(v).max() / (max_value(e) or 1)),
    ("full_range", lambda v, e: np.abs(v).max() / ((2**e.bits - 1) / 2)),
    ("minmax", lambda v, e: (max(v.max(), 0) - min(v.min(), 0)) / (2**e.bits - 1)),
])  # fmt: skip
@pytest.mark.parametrize(
    "name",
    [
        "int4",
        "int4_g32",
        "int1_g32",
        "int2_tensor",
        "int3_b4x48",
        "int8_b0x32",
        "fp8_b128x128",
        "nf4_g64",
        "uint4z_g32",
        "uint3_b4x32_zfp16",
    ],
)
def test_scales_by_formula(name, rule, formula):
    """Partial groups and blocks included: 11 x 80 is no multiple of most of these."""
    fmt, w = parse_format(name), normal(11, 80) + 0.3
    if not applies(rule, fmt):
        return
    q = quantize(w, fmt, rule=rule)
    for (i, j), v in groups(w, fmt).items():
        assert q.scale[i, j].item() == np.float32(formula(v, fmt.element)), (i, j)
        if fmt.zero == "int":
            assert q.zero[i, j].item() == np.clip(np.rint(-min(v.min(), 0) / np.float64(q.scale[i, j])), 0, 2**fmt.element.bits - 1)
        elif fmt.zero is not None:
            assert q.zero[i, j].item() == np.float16(-min(v.min(), 0) / np.float64(q.scale[i, j]))


def one_group(w, name, rule=None):
    q = quantize(torch.tensor([w]), name, rule=rule)
    scale = decode_scale(q.scale, q.format.scale)[0, 0].item()
    return scale, [value_list(q.format.element)[c] for c in codes_of(q)[0].tolist()], dequantize(q)[0].tolist()


def test_absmax_by_hand():
    assert one_group([1.0, -2.0, 7.0, 0.4], "int4") == (1.0, [1, -2, 7, 0], [1.0, -2.0, 7.0, 0.0])
    assert one_group([-12.0, 5.0, 1.0], "fp4_e2m1") == (2.0, [-6, 2, 0.5], [-12.0, 4.0, 1.0])
    assert one_group([-3.0, 1.0], "int1") == (3.0, [-1, 0], [-3.0, 0.0])


def test_full_range_by_hand():
    assert one_group([7.5, -7.5, 2.5], "int4", "full_range") == (1.0, [7, -8, 2], [7.0, -8.0, 2.0])  # both ends are half a step off


def test_minmax_by_hand():
    assert one_group([-3.0, 12.0, 0.0, 1.2], "uint4z") == (1.0, [0, 15, 3, 4], [-3.0, 12.0, 0.0, 1.0])
    assert one_group([3.0, 15.0, 6.0], "uint4z") == (1.0, [3, 15, 6], [3.0, 15.0, 6.0])  # the range is widened to hold zero
    q = quantize(torch.tensor([[-3.25, 11.75, 0.25]]), "uint4_zfp16")
    assert (q.zero.dtype, q.zero.item(), q.scale.item(), dequantize(q).tolist()) == (torch.float16, 3.25, 1.0, [[-3.25, 11.75, 0.75]])


def test_negative_scale_by_hand():
    assert one_group([8.0, -1.0, 3.0], "int4", "negative_scale") == (-1.0, [-8, 1, -3], [8.0, -1.0, 3.0])
    assert one_group([-8.0, 7.0, 3.0], "int4", "negative_scale") == (1.0, [-8, 7, 3], [-8.0, 7.0, 3.0])
    assert one_group([-8.0, 8.0], "int4", "negative_scale")[0] == np.float32(8 / 7)  # equal sides: positive, and neither saturates
    assert one_group([-3.0, 0.5], "int1", "negative_scale")[:2] == (np.float32(3 / 1.499), [-1, 0])
    assert one_group([3.0, 1.0], "int1", "negative_scale")[:2] == (np.float32(-3 / 1.499), [-1, 0])
    assert one_group([-1.0, 1.0], "int1", "negative_scale")[:2] == (np.float32(1 / 0.499), [0, 0])


@pytest.mark.parametrize("name", ["int2_g16", "int4_g32", "int8_g16", "int4_b2x16"])
def test_negative_scale_gives_the_larger_side_code_0(name):
    q = quantize(w := normal(8, 64), name, rule="negative_scale")
    codes = codes_of(q).numpy()
    for (i, j), v in groups(w, q.format).items():
        ours = groups(torch.from_numpy(codes), q.format)[i, j]
        smaller = min(v.max(), -v.min())
        if np.abs(v).max() / 2 ** (q.format.element.bits - 1) >= smaller / (2 ** (q.format.element.bits - 1) - 1):
            assert ours.flat[np.abs(v).argmax()] == 0
        assert (q.scale[i, j] < 0) == (v.max() > -v.min())


# Root mean square errors on N(0, 1) in groups of 64, as published: bits, and one for each rule.
PUBLISHED = {4: (0.0963, 0.0997, 0.1026, 0.1075), 3: (0.210, 0.215, 0.221, 0.252), 2: (0.600, 0.601, 0.513, 0.720)}
COLUMNS = ("negative_scale", "positive_only", "full_range", "absmax")


@pytest.mark.parametrize("bits", PUBLISHED)
@pytest.mark.parametrize("column", COLUMNS)
def test_errors_as_published(bits, column):
    """Within four standard errors: ours from the spread over 2^14 groups, theirs twice that (2^12 groups or more), and their last digit."""
    fmt, w = parse_format(f"int{bits}_g64"), normal(2**14, 64, dtype=torch.float64)
    if column == "positive_only":  # what Humming does where the scale has no sign to give: the same magnitude, and the top saturates
        scale, _ = RULES["negative_scale"](*tile(w, fmt.group), replace(fmt, scale="ue5m3"))
        q = with_scales(w, fmt, encode_scale(scale, "fp32"))
    else:
        q = quantize(w, fmt, rule=column)
    squares = (dequantize(q) - w).square().mean(1)
    rmse = squares.mean().sqrt().item()
    error = squares.std().item() / len(squares) ** 0.5 / (2 * rmse)
    published = PUBLISHED[bits][COLUMNS.index(column)]
    assert abs(rmse - published) <= 4 * 5**0.5 * error + (0.00005 if bits == 4 else 0.0005)


def exact_log2(v):
    """floor(log2 v) and ceil(log2 v), in integers."""
    a, b = Fraction(v).numerator.bit_length(), Fraction(v).denominator.bit_length()
    low = a - b if Fraction(v) >= Fraction(2) ** (a - b) else a - b - 1
    return low, low + (Fraction(v) != Fraction(2) ** low)


PEAKS = [np.float32(2.0**e) for e in range(-149, 128)]
PEAKS += [np.float32(f * 2.0**e) for e in (-127, -126, -120, -1, 0, 1, 60, 119, 127) for f in (1.125, 1.25, 1.5, 1.75, 1.875)]
PEAKS += [np.nextafter(p, np.float32(d)) for p in PEAKS for d in (0, np.inf)]
PEAKS = np.unique([p for p in PEAKS if np.isfinite(p) and p > 0])


@pytest.mark.parametrize(
    "name, emax", [("mxfp4", 2), ("mxfp6_e2m3", 2), ("mxfp6_e3m2", 4), ("mxfp8", 8), ("mxfp8_e5m2", 15), ("int8_g32_e8m0", 6)]
)
def test_mx_rules_by_formula(name, emax):
    """Exact powers of two, their neighbours and the thresholds of each element, from the smallest subnormal to the largest float32."""
    fmt = parse_format(name)
    w = torch.zeros(len(PEAKS), 32)
    w[:, 7] = torch.from_numpy(PEAKS) * torch.tensor([1.0, -1.0]).repeat(len(PEAKS) // 2 + 1)[: len(PEAKS)]
    floor, ceil = np.array([exact_log2(float(p)) for p in PEAKS]).T
    quotient = PEAKS / np.float32(max_value(fmt.element))  # float32
    smallest = -10000
    rceil = np.array([exact_log2(float(v))[1] if v > 0 else smallest for v in quotient])
    want = {"mx_floor": floor - emax, "mx_ceil": ceil - emax, "mx_rceil": rceil}
    if isinstance(fmt.element, Float):
        half = [Fraction(2) ** (int(f) - fmt.element.mantissa - 1) for f in floor]
        want["mx_even"] = np.array([exact_log2(Fraction(float(p)) + h)[0] for p, h in zip(PEAKS, half, strict=True)]) - emax
        bits = (PEAKS.view(np.int32) + (1 << (22 - fmt.element.mantissa))) >> 23  # Quark's, good for normal numbers below the last
        normal_only = (PEAKS >= 2.0**-126) & (bits < 255)
        assert np.array_equal((bits - 127 - emax)[normal_only], want["mx_even"][normal_only])
    for rule, exponent in want.items():
        q = quantize(w, fmt, rule=rule)
        assert np.array_equal(q.scale[:, 0].numpy(), np.clip(exponent, -127, 127) + 127), rule
    assert torch.equal(quantize(w, fmt).scale, quantize(w, fmt, rule="mx_floor").scale)


def test_mx_rules_by_hand():
    for peak, scales in ((6.0, (1, 2, 1, 1)), (7.0, (1, 2, 2, 2)), (4.0, (1, 1, 1, 1)), (6.5, (1, 2, 2, 1)), (8.0, (2, 2, 2, 2))):
        got = tuple(one_group([peak] + [0.0] * 31, "mxfp4", rule)[0] for rule in ("mx_floor", "mx_ceil", "mx_rceil", "mx_even"))
        assert got == scales, peak
    assert one_group([7.0, -7.0], "mxfp4")[2] == [6.0, -6.0]  # mx_floor saturates


def test_mx_rules_beyond_float32():
    """float64 weights may be larger and smaller than any scale."""
    for rule in ("mx_floor", "mx_ceil", "mx_rceil", "mx_even"):
        q = quantize(torch.tensor([[1e300], [1e-300]], dtype=torch.float64), "mxfp4", rule=rule)
        assert q.scale.tolist() == [[254], [0]], rule


def test_mx_rules_on_one_bit():
    """{-1, 0}: as for absmax the largest value is 1."""
    for rule in ("mx_floor", "mx_ceil", "mx_rceil"):
        assert one_group([-4.0, 0.0, -1.0], "int1_g32_e8m0", rule) == (4.0, [-1, 0, 0], [-4.0, 0.0, 0.0]), rule


def test_one_bit_does_not_collapse_to_zero():
    w = normal(16, 64)
    q = quantize(w, "int1_g32_e8m0")
    assert (dequantize(q).reshape(16, 2, 32).amin(-1) < 0).all()
    for (i, j), v in groups(w, q.format).items():
        assert q.scale[i, j].item() == exact_log2(float(np.abs(v).max()))[0] + 127


def test_mx_rceil_never_saturates():
    w = normal(64, 64) * normal(64, 1, seed=1).exp()
    for name in ("mxfp4", "mxfp6_e2m3", "mxfp8"):
        top = candidates(quantize(w, name, rule="mx_rceil")).nan_to_num(0, 0, 0).amax(-1)
        assert (w.abs() <= top * (1 + 2.0**-24)).all()  # the quotient is rounded to float32, which may hide half a unit of it


def test_nvfp4_by_formula():
    w = normal(16, 200, seed=3)
    q = quantize(w, "nvfp4")
    second = np.float32(float(w.abs().max()) / 2688)
    assert q.scale_2.shape == (1, 1) and q.scale_2.item() == second
    for (i, j), v in groups(w, q.format).items():
        scale = (np.abs(v).max() / 6 / np.float64(second)).astype(ml_dtypes.float8_e4m3fn)
        assert q.scale[i, j].item() == scale.view(np.uint8)
        step = np.float64(scale) * np.float64(second)
        want = np.clip(v / step, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * step
        assert np.array_equal(dequantize(q)[i : i + 1, j * 16 : j * 16 + 16].numpy(), want)


@pytest.mark.parametrize(
    "name",
    [
        "nvfp4",
        "fp4_e2m1_g16_e4m3_channel2",
        "int4_g16_e4m3_tensor2",
        "int8_g16_e5m2_channel2",
        "fp8_g32_bf16_tensor2",
        "iq4nl_g16_e4m3_tensor2",
        "nf4_g16_e4m3_tensor2",
    ],
)
def test_second_scale_by_formula(name):
    """scale_2 = amax / (largest element value * largest scale): the largest first-level scale is then at the top of its dtype."""
    fmt, w = parse_format(name), normal(8, 64)
    q = quantize(w, fmt)
    top = {"e4m3": 448.0, "e5m2": 57344.0, "bf16": 1.0}[fmt.scale]
    amax = w.double().abs().amax() if fmt.scale_2 == "tensor" else w.double().abs().amax(1, keepdim=True)
    assert torch.equal(q.scale_2, (amax / (max_value(fmt.element) * top)).float().reshape(q.scale_2.shape))
    assert decode_scale(q.scale, fmt.scale).max() == top


@pytest.mark.parametrize("name", ["int4_g16_e4m3_tensor2", "int8_g16_e5m2_channel2", "int2_g16_e4m3_channel2", "nvfp4"])
def test_the_largest_group_under_a_second_scale_is_not_saturated(name):
    w = normal(8, 64)
    error = (dequantize(quantize(w, name)) - w).abs()
    assert error.flatten()[w.abs().argmax()] <= w.abs().max() * 2.0**-23  # it takes the largest value, but for the rounding of scale_2


@pytest.mark.parametrize("size", [2.0**-149, 1e-40, 1e-38, 3e38, torch.finfo(torch.float32).max])
@pytest.mark.parametrize("name", ["nvfp4", "fp4_e2m1_g16_e4m3_channel2", "int4_g16_e4m3_tensor2"])
def test_tiny_and_huge_weights_under_a_second_scale(name, size):
    """scale_2 neither vanishes nor overflows, and the weights survive: e2m1 is off by one step at most (between 4 and 6), a sixth of max|w|."""
    w = (normal(8, 64).clamp(-1, 1).double() * size).float().double()
    q = validate(quantize(w.float(), name))
    assert (q.scale_2 > 0).all() and q.scale_2.isfinite().all()
    assert ((dequantize(q) - w).abs() <= w.abs().max() / 6 * (1 + 2.0**-4)).all()  # and the e4m3 scale rounds by 1/16 of itself


@pytest.mark.parametrize("name", ["int4_g32", "int2_g64", "uint4z_g32", "mxfp4", "nvfp4", "fp8", "uint3_g32_zfp16", "nf4_g64"])
def test_mse_is_never_worse_and_often_better(name):
    w = normal(32, 64)
    power = [(dequantize(quantize(w, name, rule=rule)) - w).abs() ** 2.4 for rule in ("mse", default_rule(parse_format(name)))]
    by_group = [torch.tensor([v.sum() for v in groups(p, parse_format(name)).values()]) for p in power]
    assert (by_group[0] <= by_group[1]).all() and (name == "mxfp4" or by_group[0].sum() < by_group[1].sum())


def test_default_rules():
    rules = {
        "int4": "absmax",
        "uint4z": "minmax",
        "uint4_zfp16": "minmax",
        "nvfp4": "two_level",
        "mxfp4": "mx_floor",
        "fp8": "absmax",
        "nf4": "absmax",
    }
    for name, rule in rules.items():
        assert default_rule(parse_format(name)) == rule
        a, b = quantize(normal(4, 64), name), quantize(normal(4, 64), name, rule=rule)
        assert torch.equal(a.packed, b.packed) and torch.equal(a.scale, b.scale)
