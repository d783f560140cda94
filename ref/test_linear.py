"""The linear layer against rational arithmetic; its variants; its errors."""

import math
from fractions import Fraction

import pytest
import torch

from .activation import quantize_input
from .hadamard import hadamard
from .linear import VARIANTS, linear, linear_operands, linear_variant
from .quantize import dequantize, quantize
from .rounding import round_to
from .test_quantize import normal
from .test_rounding import LIMITS, rounded

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def rational(a, b, bias):
    """a b^T + bias in Fractions, and sum |a b| + |bias|."""
    a, b = a.double().tolist(), b.double().tolist()
    bias = [0.0] * len(b) if bias is None else bias.double().tolist()
    y = [
        [sum((Fraction(p) * Fraction(q) for p, q in zip(r, c, strict=True)), Fraction(z)) for c, z in zip(b, bias, strict=True)] for r in a
    ]
    size = [
        [sum((abs(Fraction(p) * Fraction(q)) for p, q in zip(r, c, strict=True)), abs(Fraction(z))) for c, z in zip(b, bias, strict=True)]
        for r in a
    ]
    return y, size


def assert_rounded_once(y, exact, size, k):
    """y lies between the roundings of exact -+ the error of a float64 sum of k products and a bias, in any order."""
    for row, wanted, sizes in zip(y.tolist(), exact, size, strict=True):
        for got, e, s in zip(row, wanted, sizes, strict=True):
            error = s * (k + 1) * Fraction(2) ** -53
            assert rounded(e - error, y.dtype) <= got <= rounded(e + error, y.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["int4_g16", "uint4z_g16", "uint3_g16_zfp16", "fp8_b2x16", "mxfp4", "nvfp4", "nf4_g16", "int2_tensor", "int4_g16_h4", "int8"]
)
def test_against_rational_arithmetic(name, dtype):
    m, n, k = 3, 5, 40
    x, bias, q = normal(m, k, seed=1).to(dtype), normal(n, seed=2), quantize(normal(n, k), name)
    for b in (None, bias):
        exact, size = rational(x, dequantize(q), b)
        assert_rounded_once(linear(x, q, b), exact, size, k)


@pytest.mark.parametrize(
    "name", ["int8_token", "int4_token", "fp8_e4m3_g16", "fp4_e2m1_g16_e4m3_channel2", "int8_tensor", "fp4_e2m1_g16_e4m3_tensor2"]
)
def test_quantized_activations(name):
    x, q = normal(2, 3, 40, seed=1).bfloat16(), quantize(normal(5, 40), "int4_g16")
    x_scale = torch.tensor(0.02) if "tensor" in name else None
    y = linear(x, q, x_format=name, x_scale=x_scale)
    exact, size = rational(dequantize(quantize_input(x, name, x_scale)), dequantize(q), None)
    assert y.dtype == x.dtype
    assert_rounded_once(y.reshape(6, 5), exact, size, 40)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_one_rounding(dtype):
    """Exact sums a hair from a midpoint: a second rounding on the way would go the other way."""
    precision = LIMITS[dtype][0]
    half, hair = 2.0**-precision, 2.0**-40
    x = torch.tensor([[1.0, 1.0, 2.0**-20], [1.0, 3.0, -(2.0**-20)]]).to(dtype)
    w = torch.tensor([[1.0, half, hair * 2.0**20]], dtype=torch.float64)
    exact, _ = rational(x, w, None)
    assert exact[0][0] == 1 + Fraction(half) + Fraction(hair) and linear(x, w).flatten().tolist() == [1 + 2 * half, 1 + 2 * half]


def test_integers_are_exact():
    """Products that cancel: float32 sums would lose them."""
    x = torch.tensor([[2.0**20, 1.0, -(2.0**20)]])
    w = torch.tensor([[2.0**20, 1.0, 2.0**20]])
    assert linear(x, w).item() == 1 and linear(x, w, torch.tensor([0.5])).item() == 1.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_weights(dtype):
    x, w, bias = normal(2, 3, 7).to(dtype), normal(4, 7, seed=1).to(dtype), normal(4, seed=2).to(dtype)
    y = linear(x, w, bias)
    assert torch.equal(y, round_to(torch.nn.functional.linear(x.double(), w.double(), bias.double()), dtype))
    assert torch.equal(
        linear(x, w, x_format="int8_token"), round_to((dequantize(quantize_input(x, "int8_token")) @ w.double().T).reshape(2, 3, 4), dtype)
    )


@pytest.mark.parametrize("shape", [(40,), (1, 40), (0, 40), (3, 40), (2, 0, 40), (2, 3, 4, 40)])
def test_shapes(shape):
    q = quantize(normal(5, 40), "int4_g16")
    x = normal(math.prod(shape), seed=1).reshape(shape)
    y = linear(x, q)
    assert y.shape == (*shape[:-1], 5)
    assert torch.equal(y.reshape(-1, 5), linear(x.reshape(-1, 40), q))


def test_empty_and_strided():
    assert linear(torch.ones(2, 0), quantize(torch.ones(3, 0), "int4"), torch.arange(3.0)).tolist() == [[0, 1, 2]] * 2
    assert linear(torch.ones(2, 8), quantize(torch.ones(0, 8), "int4")).shape == (2, 0)
    q, x = quantize(normal(5, 40), "nvfp4"), normal(40, 6, seed=1)
    assert torch.equal(linear(x.T[::2], q), linear(x.T.contiguous()[::2], q))


def test_bias_of_any_float_dtype():
    x, q = normal(2, 40).bfloat16(), quantize(normal(5, 40), "int4_g16")
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        bias = normal(5).to(dtype)
        assert torch.equal(linear(x, q, bias), linear(x, q, bias.double()))


def test_special_values_stay_in_their_row():
    x, q = normal(3, 40), quantize(normal(5, 40), "int4_g16")
    clean = linear(x, q)
    x[1, 3], x[2, 4] = math.nan, math.inf
    y = linear(x, q)
    assert torch.equal(y[0], clean[0]) and y[1].isnan().all() and not y[2].isfinite().any()


def test_variants_by_their_definitions():
    x = normal(3, 64, seed=1).bfloat16()
    q = quantize(normal(5, 64), "int4_g16_h16")
    stored = hadamard(dequantize(q), 16)  # before the rotation, but for float64 roundings that vanish in bf16
    weight = round_to(stored, torch.bfloat16).double()
    rotated = round_to(hadamard(x.double(), 16), torch.bfloat16).double()
    want = {
        "exact": x.double() @ dequantize(q).T,
        "weight_rounded": x.double() @ hadamard(weight, 16).T,
        "input_rotated": rotated @ stored.T,
        "weight_rounded+input_rotated": rotated @ weight.T,
    }
    assert want.keys() == VARIANTS.keys()
    got = {v: linear_variant(x, q, variant=v) for v in VARIANTS}
    for variant, y in want.items():
        assert torch.equal(got[variant], round_to(y, torch.bfloat16)), variant
    assert torch.equal(got["exact"], linear(x, q))
    operands = {v: linear_operands(x, q, variant=v) for v in VARIANTS}
    assert len({(a.sum().item(), b.sum().item()) for a, b in operands.values()}) == 4  # they differ, every one from every other


def test_variants_agree_where_nothing_is_rounded():
    """Few-bit weights without a rotation; float32 x, whose weights need no rounding."""
    x, bf16 = normal(3, 64), quantize(torch.randint(-7, 8, (5, 64)).float(), "int4_tensor")
    for w in (bf16, quantize(normal(5, 64), "mxfp4"), quantize(normal(5, 64), "int4_g16_bf16")):
        assert len({linear_variant(x, w, variant=v).sum().item() for v in VARIANTS}) == 1
    w = quantize(normal(5, 64), "int4_g16")
    x = x.bfloat16()
    assert torch.equal(linear_variant(x, w, variant="input_rotated"), linear(x, w))
    assert not torch.equal(linear_operands(x, w, variant="weight_rounded")[1], dequantize(w))


def test_quantized_activations_are_rotated_exactly():
    x, w = normal(3, 64).bfloat16(), quantize(normal(5, 64), "int4_g16_h16")
    for variant in VARIANTS:
        a, b = linear_operands(x, w, x_format="int8_token", variant=variant)
        plain = dequantize(quantize_input(x, "int8_token"))
        assert torch.equal(a, hadamard(plain, 16) if "input" in variant else plain) and b.shape == (5, 64)


Q, X = quantize(normal(5, 40), "int4_g16"), normal(2, 40)


@pytest.mark.parametrize(
    "args, kwargs, error, message",
    [
        ((X[:, :39], Q), {}, ValueError, r"linear: x has k=39, weight int4_g16 has k=40 \(both must match\)"),
        ((X[:, :39], torch.ones(5, 40)), {}, ValueError, r"linear: x has k=39, weight has k=40 \(both must match\)"),
        ((torch.tensor(1.0), Q), {}, ValueError, "linear: x has k=no axis"),
        ((X.int(), Q), {}, TypeError, "linear: x is torch.int32, expected a floating-point tensor"),
        ((X.to(torch.float8_e4m3fn), Q), {}, TypeError, "linear: x is torch.float8_e4m3fn"),
        (([1.0], Q), {}, TypeError, "linear: x is list"),
        ((X, "int4"), {}, TypeError, "linear: w is str, expected a QTensor or a tensor"),
        ((X, quantize(normal(2, 5, 40), "int4")), {}, ValueError, r"linear: weight int4 has shape \(2, 5, 40\), expected \(n, k\)"),
        ((X, Q, torch.ones(4)), {}, ValueError, r"linear: bias has shape \(4,\), expected \(5,\) as weight int4_g16 has n=5"),
        ((X, Q, torch.ones(5, 1)), {}, ValueError, r"linear: bias has shape \(5, 1\)"),
        ((X, Q, torch.ones(5).int()), {}, TypeError, "linear: bias is torch.int32, expected a floating-point tensor"),
        ((X, Q, 1.0), {}, TypeError, "linear: bias is float"),
        ((X.to("meta"), Q), {}, ValueError, r"linear: x is on meta, w is on cpu \(both must match\)"),
        ((X, Q, torch.ones(5, device="meta")), {}, ValueError, r"linear: x is on cpu, bias is on meta \(both must match\)"),
        ((X, Q), {"x_format": "int9"}, ValueError, "format: unknown name 'int9'"),
        (
            (X, Q),
            {"x_format": "uint8z"},
            ValueError,
            "x cannot be quantized to uint8z: expected signed integers of 2 bits or more, or signed floats",
        ),
        (
            (X, Q),
            {"x_format": "nf4_token"},
            ValueError,
            "x cannot be quantized to nf4: expected signed integers of 2 bits or more, or signed floats",
        ),
        ((X, Q), {"x_format": "fp4_e2m1_g16_e4m3_tensor2"}, ValueError, "needs x_scale"),
        ((X, Q), {"x_format": "int8_token", "x_scale": torch.tensor(1.0)}, ValueError, "are dynamic"),
        ((X, Q), {"x_scale": torch.tensor(1.0)}, ValueError, "linear: got x_scale without x_format"),
        ((X, torch.ones(5, 40)), {"x_scale": torch.tensor(1.0)}, ValueError, "linear: got x_scale without x_format"),
    ],
)
def test_errors(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        linear(*args, **kwargs)


def test_unknown_variant():
    with pytest.raises(ValueError, match="linear: unknown variant 'fast', expected one of exact, weight_rounded"):
        linear_variant(X, Q, variant="fast")
