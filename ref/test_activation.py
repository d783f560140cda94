"""Quantized activations: every mode against a model in loops, by hand, and what is refused."""

import math

import numpy as np
import pytest
import torch

from .activation import quantize_input
from .element import Int, encode, max_value, value_list
from .format import SCALE_DTYPES, parse_format
from .hadamard import hadamard
from .pack import unpack
from .qtensor import validate
from .quantize import dequantize
from .scale import decode_scale
from .test_quantize import assert_nearest, normal

TOKEN = [
    "int8_token",
    "int4_token",
    "fp8_e4m3_token",
    "fp8_e5m2_token",
    "fp4_e2m1_token",
    "fp8_e3m4_token",
    "fp4_e0m3_token",
    "int8_token_bf16",
]
GROUP = ["int8_g64", "int4_g32_bf16", "fp8_e4m3_g128", "fp8_e5m2_g32_e8m0", "fp4_e2m1_g32_e8m0", "fp4_e2m1_g16_e4m3", "int8_g16_fp16",
         "fp4_g16_ue5m3", "int8_g48_e5m2"]  # fmt: skip
TENSOR = ["int8_tensor", "int4_tensor", "fp8_e4m3_tensor", "fp8_e5m2_tensor", "fp4_e2m1_tensor"]
TENSOR_GROUP = ["fp4_e2m1_g16_e4m3_tensor2", "fp8_e4m3_g128_tensor2", "int8_g32_tensor2_e8m0", "int4_g64_tensor2_bf16"]
GROUP_TOKEN = ["fp4_e2m1_g16_e4m3_channel2", "int4_g32_e4m3_channel2", "fp8_g16_e4m3_channel2"]

f32 = np.float32


def up(v, name):
    """v (float64) to the next number of a scale's dtype that is not below it; the largest where there is none."""
    target = SCALE_DTYPES[name]
    if not isinstance(target, torch.dtype):
        finite = sorted({t for t in value_list(target) if math.isfinite(t) and t >= 0})
        return next((t for t in finite if t >= v), finite[-1])
    near = torch.tensor(v, dtype=torch.float64).to(target)
    if near.double() < v:
        near = torch.nextafter(near, torch.tensor(math.inf, dtype=target))
    return min(near.double().item(), torch.finfo(target).max)


def model(x, fmt, x_scale):
    """(scale, scale_2) as float64 lists of lists, by the rules as they are written."""
    top = 2 ** (fmt.element.bits - 1) - 1 if isinstance(fmt.element, Int) else max_value(fmt.element)
    k = x.shape[1]
    gk = fmt.group[1] or k
    smallest = float(f32(1e-30))

    def raw(values):
        return max(float(f32(float(np.abs(values).max()) / top)), smallest)

    if fmt.group == (0, 0):
        s = raw(x) if x_scale is None else x_scale
        return [[up(s, fmt.scale)]], None
    rows = [[raw(row[j : j + gk]) for j in range(0, k, gk)] for row in x]
    if fmt.scale_2 == "tensor":
        return [[up(float(f32(r / float(f32(x_scale)))), fmt.scale) for r in row] for row in rows], [[float(f32(x_scale))]]
    if fmt.scale_2 == "channel":
        second = []
        for row in rows:
            for j, r in enumerate(row):
                unit = 2.0 ** (math.floor(math.log2(r)) - 3)  # four significant bits
                row[j] = math.ceil(r / unit) * unit
            second.append([2.0 ** max(math.ceil(math.log2(max(row) / 448)), -127)])
        return [[up(r / s[0], "e4m3") for r in row] for row, s in zip(rows, second, strict=True)], second
    return [[up(r, fmt.scale) for r in row] for row in rows], None


def inputs(dtype):
    """Ordinary rows, a zero row, a row with one element, tiny rows, an outlier."""
    x = normal(8, 200, seed=2)
    x[1] = 0
    x[2] = 0
    x[2, 77] = -3.0
    x[3] *= 1e-6
    x[4, 5] = 300.0
    x[5, 64:128] = 0
    x[6] = 2.0**-24
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", TOKEN + GROUP + TENSOR + TENSOR_GROUP + GROUP_TOKEN)
def test_scales_and_codes(name, dtype):
    fmt, x = parse_format(name), inputs(dtype)
    for x_scale in [0.03, 7e-4] if name in TENSOR_GROUP else [None, 0.03] if name in TENSOR else [None]:
        given = None if x_scale is None else torch.tensor(x_scale)
        q = validate(quantize_input(x, fmt, given))
        assert (q.format, q.shape) == (fmt, tuple(x.shape))
        values = x.double().numpy()
        scale, second = model(values, fmt, None if given is None else given.item())
        assert decode_scale(q.scale, fmt.scale).tolist() == scale
        assert (q.scale_2 is None) == (second is None) and (second is None or q.scale_2.tolist() == second)
        assert_nearest(q, x)
        steps = np.repeat(np.array(scale), fmt.group[1] or 200, 1)[:, :200] * (1 if second is None else np.array(second))
        codes = encode(torch.from_numpy(values / steps), fmt.element)
        assert torch.equal(unpack(q.packed, fmt.element.bits, 200), codes)


def test_by_hand():
    q = quantize_input(torch.tensor([[254.0, -127.0, 3.0], [0.5, 0.25, -1.0]]), "int8_token")
    assert q.scale.flatten().tolist() == [2.0, f32(1 / 127)]
    assert dequantize(q)[0].tolist() == [254, -128, 4]  # -63.5 and 1.5 are ties: to even
    q = quantize_input(torch.tensor([[7.0, -7.0, 2.5, 0.0]]), "int4_token")
    assert q.scale.item() == 1 and dequantize(q).tolist() == [[7, -7, 2, 0]]
    q = quantize_input(torch.tensor([[448.0, 17.0, -0.0009]]), "fp8_e4m3_token")
    assert q.scale.item() == 1 and dequantize(q).tolist() == [[448, 16, 0]]  # half the smallest subnormal is 0.00098
    q = quantize_input(torch.tensor([[6.0] * 16 + [0.6] * 16]), "fp4_e2m1_g16_e4m3")
    assert decode_scale(q.scale, "e4m3").tolist() == [[1.0, 0.1015625]]  # 0.1, rounded up
    q = quantize_input(torch.tensor([[6.5] + [0.0] * 31]), "fp4_e2m1_g32_e8m0")
    assert q.scale.item() == 128 and dequantize(q)[0, 0] == 6  # 6.5 / 6 rounded up to 2; 3.25 is nearer to 3
    q = quantize_input(torch.tensor([[1000.0, 3.0, -1000.0]]), "int8_tensor", torch.tensor(2.0))
    assert q.scale.item() == 2 and dequantize(q).tolist() == [[254, 4, -256]]  # static: what is out of range saturates
    q = quantize_input(torch.tensor([[3.0] * 16 + [6.0] * 16]), "fp4_e2m1_g16_e4m3_tensor2", torch.tensor(0.5))
    assert q.scale_2.item() == 0.5 and decode_scale(q.scale, "e4m3").tolist() == [[1.0, 2.0]]
    q = quantize_input(torch.tensor([[6.0 * 448] * 16 + [6.0] * 16, [0.0] * 16 + [6.0 * 449] * 16]), "fp4_e2m1_g16_e4m3_channel2")
    assert q.scale_2.tolist() == [[1.0], [2.0]]  # 449 in four significant bits is 480, more than 448
    assert decode_scale(q.scale, "e4m3").tolist() == [[448, 1], [2.0**-9, 240]]


@pytest.mark.parametrize("name", TOKEN + GROUP + TENSOR + GROUP_TOKEN)
def test_dynamic_scales_never_saturate(name):
    """A scale rounded up keeps max|x| / scale at or below the largest value, but for the float32 rounding of the quotient."""
    x = normal(64, 192, seed=5) * normal(64, 1, seed=6).exp()
    q = quantize_input(x, name)
    top = 2 ** (q.format.element.bits - 1) - 1 if isinstance(q.format.element, Int) else max_value(q.format.element)
    step = decode_scale(q.scale, q.format.scale) * (1 if q.scale_2 is None else q.scale_2.double())
    step = step.repeat_interleave(q.format.group[1] or 192, 1)[:, :192]
    assert (x.double().abs() <= top * step * (1 + 2.0**-24)).all()


def test_leading_dimensions_strides_and_empty_inputs():
    x = normal(2, 3, 32)
    q = quantize_input(x, "int8_token")
    assert q.shape == (6, 32) and torch.equal(q.packed, quantize_input(x.reshape(6, 32), "int8_token").packed)
    assert quantize_input(x[0, 0], "int8_token").shape == (1, 32)
    assert torch.equal(quantize_input(x.mT.contiguous().mT, "int8_token").packed, q.packed)
    for shape in ((0, 32), (2, 0, 32), (3, 0), (0,), (0, 0)):
        for name in ("int8_token", "fp8_e4m3_g128", "int8_tensor", "fp4_e2m1_g16_e4m3_channel2"):
            q = validate(quantize_input(torch.zeros(shape), name))
            assert q.shape == (math.prod(shape[:-1]), shape[-1])


def test_experts_of_the_input_are_its_rows():
    """Dynamic scales of a row do not depend on other rows; a dynamic tensor scale does."""
    x = normal(4, 64)
    for name in ("int8_token", "fp4_e2m1_g16_e4m3_channel2", "fp8_e4m3_g32"):
        assert torch.equal(quantize_input(x, name).packed[2:], quantize_input(x[2:], name).packed)


def test_static_scales_of_any_shape_and_dtype():
    x = normal(2, 32)
    for scale in (
        torch.tensor(0.25),
        torch.tensor([0.25]),
        torch.tensor([[0.25]]),
        torch.tensor(0.25).bfloat16(),
        torch.tensor(0.25).double(),
    ):
        assert torch.equal(quantize_input(x, "int8_tensor", scale).packed, quantize_input(x, "int8_tensor", torch.tensor(0.25)).packed)


def test_rotation():
    x = normal(3, 64)
    rotated, plain = quantize_input(x, "int8_token_h16"), quantize_input(hadamard(x.double(), 16), "int8_token")
    assert torch.equal(rotated.packed, plain.packed) and torch.equal(dequantize(rotated), hadamard(dequantize(plain), 16))


X, S = torch.ones(2, 32), torch.tensor(0.5)


@pytest.mark.parametrize(
    "x, name, x_scale, error, message",
    [
        (X.int(), "int8_token", None, TypeError, "quantize_input: x is torch.int32"),
        ([1.0], "int8_token", None, TypeError, "quantize_input: x is list"),
        (torch.tensor(1.0), "int8_token", None, ValueError, "quantize_input: x has shape"),
        (torch.tensor([[1.0, math.nan]]), "int8_token", None, ValueError, r"quantize_input: x is nan at \(0, 1\)"),
        (torch.tensor([[math.inf, 1.0]]), "int8_token", None, ValueError, r"quantize_input: x is inf at \(0, 0\)"),
        (X, "int9_token", None, ValueError, "format: unknown name 'int9_token'"),
        (
            X,
            "uint8z_token",
            None,
            ValueError,
            "quantize_input: x cannot be quantized to uint8z: expected signed integers of 2 bits or more, or signed floats",
        ),
        (
            X,
            "nf4_token",
            None,
            ValueError,
            "quantize_input: x cannot be quantized to nf4: expected signed integers of 2 bits or more, or signed floats",
        ),
        (
            X,
            "iq4nl_g32",
            None,
            ValueError,
            "quantize_input: x cannot be quantized to iq4nl_g32: expected signed integers of 2 bits or more, or signed floats",
        ),
        (
            X,
            "fp8_e4m3_b128x128",
            None,
            ValueError,
            "quantize_input: x cannot be quantized to fp8_e4m3_b128x128: expected scales by tensor, token or group",
        ),
        (
            X,
            "int8_b0x32",
            None,
            ValueError,
            "quantize_input: x cannot be quantized to int8_b0x32: expected scales by tensor, token or group",
        ),
        (X, "int8_token", S, ValueError, "quantize_input: got x_scale, but the scales of int8 are dynamic"),
        (X, "fp8_e4m3_g128", S, ValueError, "are dynamic"),
        (X, "fp4_e2m1_g16_e4m3_channel2", S, ValueError, "are dynamic"),
        (X, "fp4_e2m1_g16_e4m3_tensor2", None, ValueError, "needs x_scale, the static scale of the tensor"),
        (X, "fp4_e2m1_g16_channel2", None, ValueError, "x cannot be quantized to fp4_e2m1_g16_channel2: expected .* e4m3 under a token's"),
        (X, "int8_tensor", torch.ones(2), ValueError, r"quantize_input: x_scale has shape \(2,\), expected one value"),
        (X, "int8_tensor", 0.5, TypeError, "quantize_input: x_scale is float, expected a floating-point tensor with one value"),
        (
            X,
            "int8_tensor",
            torch.tensor(1),
            TypeError,
            "quantize_input: x_scale is torch.int64, expected a floating-point tensor with one value",
        ),
        (X, "int8_tensor", torch.tensor(0.0), ValueError, "x_scale is 0.0, expected a positive number"),
        (X, "int8_tensor", torch.tensor(-1.0), ValueError, "x_scale is -1.0, expected a positive number"),
        (X, "int8_tensor", torch.tensor(math.nan), ValueError, "x_scale is nan, expected a positive number"),
        (X, "int8_token_h64", None, ValueError, "block=64 and k=32"),
    ],
)
def test_what_is_refused(x, name, x_scale, error, message):
    with pytest.raises(error, match=message):
        quantize_input(x, name, x_scale)


@pytest.mark.parametrize(
    "name",
    [
        "uint8_token",
        "nf4_token",
        "iq4nl_token",
        "ue4m3_token",
        "int1_token",
        "fp8_e4m3_tensor_tensor2",
        "fp8_e4m3_tensor_e4m3_channel2",
        "fp8_ue5m3_token",
    ],
)
def test_formats_that_cannot_be(name):
    """Activations have signs and steps of one size; one bit has no largest positive value; and one tensor has one tensor scale."""
    wanted = "scales by group under scale_2" if name.endswith("2") else "signed integers of 2 bits or more, or signed floats"
    with pytest.raises(ValueError, match=f"quantize_input: x cannot be quantized to .*: expected {wanted}"):
        quantize_input(X, name, S if "tensor2" in name else None)
