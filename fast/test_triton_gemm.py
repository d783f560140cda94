"""The general Triton GEMM in the interpreter against ref: bit for bit where every sum is exact, and with one-hot x."""

import dataclasses

import pytest
import torch

import ref
from fast.request import Request
from ref.element import value_list
from ref.format import SCALE_DTYPES, parse_format
from ref.quantize import decode_scale, encode_scale

pytest.importorskip("triton")

from fast.triton import gemm, why_not
from fast.triton.quantize_input import InputQuantizer

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WEIGHTS = [
    "int1_g16", "int2", "int3_g24", "int4_g128", "int5_tensor", "int6_b7x40", "int7_g1", "int8", "uint3z_g32",
    "uint4_g64_zfp16", "uint8_g32_zfp32", "fp8", "fp8_e5m2_g64_e5m2", "fp8_e3m4", "fp8_ue5m3",
    "fp6_e2m3_g32_bf16_channel2", "fp7_e3m3", "fp4_e0m3_g16", "fp8_e7m0", "mxfp4", "nvfp4", "nf4_g64",
    "iq4nl_g32_ue5m3", "uint4_g32_fp16_ofp16", "int8_ofp32", "fp6_e3m2_b5x48_obf16", "nf4_tensor_ofp16", "fp4_e2m1_g16_e4m3_tensor2div",
    "int5_g7_channel2div",
]  # fmt: skip


def weight(name, n, k):
    """Random codes of finite value, scales of small powers of two."""
    fmt = parse_format(name)
    generator = torch.Generator().manual_seed(n * k)
    finite = torch.tensor(value_list(fmt.element)).isfinite().nonzero()[:, 0]
    codes = finite[torch.randint(0, len(finite), (n, k), generator=generator)]
    shape = fmt.scale_shape((n, k))
    scale = encode_scale(2.0 ** torch.randint(-2, 3, shape, generator=generator).double(), fmt.scale)
    zero = None
    if fmt.zero is not None:
        zero = torch.randint(0, 2**fmt.element.bits, shape, generator=generator)
        zero = zero.to(torch.uint8) if fmt.zero == "int" else (zero / 2).to(SCALE_DTYPES[fmt.zero])
    second = None
    if fmt.scale_2 is not None:
        second = torch.full((n if fmt.scale_2.startswith("channel") else 1, 1), 0.25)
    offset = None
    if fmt.offset is not None:
        offset = torch.randint(-16, 17, shape, generator=generator).to(SCALE_DTYPES[fmt.offset]) / 4
    return ref.QTensor(fmt, (n, k), ref.pack(codes, fmt.element.bits), scale, zero, second, offset=offset)


def run(q, x, bias=None, x_format=None, x_scale=None):
    x_format = None if x_format is None else parse_format(x_format)
    request = Request(q.format, q.shape, x.dtype, x.device, x_format, x_scale is not None, True, bias is not None)
    assert why_not(request) is None
    plan = gemm.prepare(q, request)
    out = torch.full((x.shape[0], q.shape[0]), float("nan"), dtype=x.dtype)
    plan.run(x, bias, x_scale, out)
    return out


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_one_hot_x_gives_the_weight(name, dtype):
    q = weight(name, 21, 140)
    x = torch.zeros(9, 140 + 5, dtype=dtype)[:, 3:-2]
    x[torch.arange(9), torch.arange(9) * 15 + 7] = 1
    assert torch.equal(run(q, x), ref.linear(x, q))


@pytest.mark.parametrize(
    "name",
    [
        "int3_g24",
        "int4_g128",
        "uint4_g64_zfp16",
        "mxfp4",
        "nvfp4",
        "fp4_e0m3_g16",
        "uint4_g32_fp16_ofp16",
        "int3_b5x48_obf16",
        "fp8_ofp32",
        "int4_g32_channel2div",
    ],
)
def test_exact_sums_give_the_same_bits(name):
    q = weight(name, 33, 200)
    x = torch.randint(-2, 3, (5, 200), generator=torch.Generator().manual_seed(1)).to(BF16)
    bias = torch.arange(33).to(BF16)
    assert torch.equal(run(q, x, bias), ref.linear(x, q, bias))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_codebooks_of_every_width(bits):
    book = ref.Codebook("odd", tuple(float((3 * i + 1) % 2**bits - 2**bits // 3) for i in range(2**bits)))
    for group in ((1, 24), (1, 0)):
        q = weight(ref.Format(book, group=group), 20, 100)
        x = torch.randint(-1, 2, (5, 100), generator=torch.Generator().manual_seed(1)).to(BF16)
        assert torch.equal(run(q, x), ref.linear(x, q))


def test_a_divisor_is_divided_by_once():
    """Not multiplied by its rounded reciprocal, which would change some of these."""
    q = weight("int8_channel2div", 60, 16)
    q = dataclasses.replace(q, scale=torch.ones_like(q.scale), scale_2=torch.arange(1.0, 61)[:, None])
    x = torch.eye(16)
    quotient = ref.decode(ref.unpack(q.packed, 8, 16), q.format.element).float() / q.scale_2
    assert torch.equal(run(q, x), quotient.T) and not torch.equal((quotient * q.scale_2) * (1 / q.scale_2), quotient)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("size", [2.0**-100, 2.0**-20, 2.0**90])
def test_far_offsets_neither_vanish_nor_overflow(size, dtype):
    """With scales as far, and far apart from them; with values that are moved to fill fp16, too."""
    for element in (ref.Int(4), ref.Codebook("tiny", (0.0, 2.0**-40, -(2.0**-40), 2.0**-39))):
        for scale in (1.0, size):
            q = weight(ref.Format(element, group=(1, 32), offset="fp32"), 8, 64)
            q = dataclasses.replace(q, scale=torch.full_like(q.scale, scale), offset=q.offset * size)
            x = torch.zeros(8, 64, dtype=dtype)
            x[torch.arange(8), torch.arange(8) * 7] = 0.5
            assert torch.equal(run(q, x), ref.linear(x, q))


@pytest.mark.parametrize("x_format", ["int8_token", "fp8_e4m3_g64", "fp4_e2m1_g32_e8m0", "fp4_e2m1_g16_e4m3_channel2", "fp8_e4m3_tensor"])
@pytest.mark.parametrize("name", ["int4_g128", "uint4z_g32", "fp8", "mxfp4", "uint4_g32_ofp16"])
def test_quantized_x(name, x_format):
    q = weight(name, 20, 200)
    x = torch.randint(-3, 4, (4, 200), generator=torch.Generator().manual_seed(2)).float()
    top = {"int8": 127, "fp8": 448, "fp4": 6}[x_format[:3] if x_format[:2] == "fp" else "int8"]
    x[:, :: parse_format(x_format).group[1] or 200] = top / 32
    x = x.to(BF16)
    assert torch.equal(run(q, x, x_format=x_format), ref.linear(x, q, x_format=x_format))


@pytest.mark.parametrize(
    "name", ["int8_token", "int4_g64_bf16", "fp8_e4m3_g24_ue5m3", "fp8_e5m2_token_e8m0", "fp4_e2m1_g16_e4m3_channel2", "int8_tensor"]
)
def test_codes_and_scales_of_x_are_those_of_ref(name):
    fmt = parse_format(name)
    x = torch.randn(6, 100, generator=torch.Generator().manual_seed(3)) * torch.logspace(-6, 4, 6)[:, None]
    x[2] = 0
    want = ref.quantize_input(x, fmt)
    numbers, scale, scale_2, _ = InputQuantizer(fmt, torch.float32)(x, None)
    assert torch.equal(numbers[:, :100].double(), ref.decode(ref.unpack(want.packed, fmt.element.bits, 100), fmt.element))
    assert torch.equal(scale.double().reshape(-1), decode_scale(want.scale, fmt.scale).double().reshape(-1))
    if fmt.scale_2:
        assert torch.equal(scale_2, want.scale_2[:, 0])


@pytest.mark.parametrize("byte", [0, 1, 60, 200, 254])
@pytest.mark.parametrize("name", ["mxfp4", "int4_e8m0", "int8_g128_e8m0"])
def test_far_scales_neither_vanish_nor_overflow(name, byte):
    q = weight(name, 8, 256)
    q = dataclasses.replace(q, scale=torch.full_like(q.scale, byte))
    x = torch.zeros(8, 256, dtype=FP32)
    x[torch.arange(8), torch.arange(8) * 31] = 2.0 ** (-10 if byte > 127 else 1)
    assert torch.equal(run(q, x), ref.linear(x, q))


def test_a_last_group_that_steps_do_not_fill(monkeypatch):
    monkeypatch.setattr(gemm.GemmPlan, "_tile", lambda self, m: gemm.Tile(16, 16, 32))
    q = weight("int4_g128", 40, 160)
    x = torch.randint(-2, 3, (16, 192), generator=torch.Generator().manual_seed(1)).to(BF16)
    # Whatever lies behind the rows must not be read.
    x[:, 160:] = float("nan")
    assert torch.equal(run(q, x[:, :160]), ref.linear(x[:, :160], q))


def test_elements_that_fill_the_range_of_float32_are_refused():
    request = Request(parse_format("e8m0_g32"), (8, 64), BF16, torch.device("cpu"), None, False, True, False)
    assert "e8m0" in gemm.why_not(request)


def test_nan_and_infinity_stay_in_their_rows():
    q = weight("int8", 12, 96)
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(4)).to(BF16)
    clean = {x_format: run(q, x, x_format=x_format) for x_format in (None, "int8_token", "fp8_e4m3_g32")}
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    for x_format, want in clean.items():
        y = run(q, x, x_format=x_format)
        assert torch.equal(y[[0, 3]], want[[0, 3]])
        assert not y[[1, 2]].isfinite().any()
