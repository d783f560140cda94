"""fast.quantize: against ref's scales and codes, every granularity and edge shape; the bitstream."""

import importlib
import math

import pytest
import torch

import fast
import ref
from conformance.case import QuantizeCase
from conformance.ops import quantize as op
from conformance.regimes import draw_x
from ref.element import encode, max_value, parse_element, value_list
from ref.format import FORMATS

from .codes import pack

MORE = (
    *("int4_tensor", "fp8_e4m3_tensor", "uint4z_g64_bf16", "uint4_g64_bf16_zbf16", "int8_channel2div", "fp4_e2m1_g16_e4m3_tensor2div"),
    *("int4_g128_bf16_h64", "nf4_b4x7", "int1_g32", "fp4_e0m3_g16", "int4_b64x64_e8m0"),
)
# Every float of up to 8 bits, and some integers and codebooks.
FLOATS = [
    *(
        f"{'' if signed else 'u'}e{exponent}m{mantissa}{end}"
        for exponent in range(9)
        for mantissa in range(8)
        for signed in (True, False)
        for end in ("finite", "fn", "ieee", "n")
        if 0 < signed + exponent + mantissa <= 8 and (exponent or end == "finite")
    ),
    *("int1", "int4", "uint8", "nf4", "iq4nl"),
]
SHAPES = ((7, 256), (3, 33, 192), (0, 64), (2, 5, 0), (0, 4, 64), (1, 130, 64))


@pytest.mark.parametrize("bits", range(1, 9))
def test_pack(bits):
    for shape in ((5, 77), (0, 8), (3, 0), (1, 64)):
        codes = torch.randint(2**bits, shape, dtype=torch.uint8)
        assert torch.equal(pack(codes, bits), ref.pack(codes, bits))


@pytest.mark.parametrize("name", [*FORMATS, *MORE])
def test_weights_are_what_a_quantizer_may_make_of_them(name, monkeypatch):
    monkeypatch.setitem(importlib.import_module("fast.quantize").CHUNK, "cpu", 2048)  # several chunks
    for experts, n, k in ((None, 33, 192), (3, 5, 64), (1, 130, 64)):
        for dtype in ("fp32", "bf16", "fp16"):
            for data in ("normal", "heavy", "tiny"):
                problem = op.build(QuantizeCase(n=n, k=k, experts=experts, format=name, dtype=dtype, data=data, seed=n), "cpu")
                problem.check(fast.quantize(*problem.args))


@pytest.mark.parametrize("name", [*FORMATS, *MORE])
def test_every_shape_has_the_parts_that_it_should(name):
    for shape in SHAPES:
        if name.endswith("h64") and shape[-1] % 64:
            continue
        q, want = fast.quantize(torch.ones(shape), name), ref.quantize(torch.ones(shape), name)
        ref.validate(q)
        assert ref.equal(q, want)


@pytest.mark.parametrize("name", [*FORMATS, *MORE, "fp4_e3m0_g32", "fp4_e2m1n_g16", "uint3z", "int6_g32", "int7_g48"])
def test_the_kernel_makes_the_same_codes(name, monkeypatch):
    """In the interpreter: where a weight's codes begin in which word, and which edge they fall on."""
    module, fmt = importlib.import_module("fast.quantize"), ref.parse_format(name)
    for n, k, dtype in ((5, 192, "bf16"), (3, 130, "fp32"), (33, 64, "fp16"), (1, 1, "fp32"), (2, 2112, "bf16")):
        w = draw_x(n, n, k, dtype, "heavy")
        w[n // 2] = 0
        if (fmt.hadamard and k % fmt.hadamard) or not module._suits_kernel(w, fmt):
            continue
        expected = fast.quantize(w, name)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_has_kernel", lambda w, fmt: True)
            assert ref.equal(fast.quantize(w, name), expected)
            w[n // 2, k // 2] = math.nan if k % 2 else -math.inf
            with pytest.raises(ValueError, match=r"w holds (nan|-inf), expected finite"):
                fast.quantize(w, name)


def test_rows_that_are_too_long_for_a_grid_have_no_kernel():
    module = importlib.import_module("fast.quantize")
    for k, suits in ((module.KERNEL_COLUMNS, True), (module.KERNEL_COLUMNS + 1, False)):
        w = torch.empty(1, k, dtype=torch.bfloat16, device="meta")
        assert module._suits_kernel(w, ref.parse_format("int4_g128")) == suits


@pytest.mark.parametrize("name", FLOATS)
def test_every_value_and_every_midpoint(name):
    element = parse_element(name)
    dtype = torch.float32 if max_value(element) <= 2.0**100 else torch.float64
    values = torch.tensor(sorted({v for v in value_list(element) if math.isfinite(v)}), dtype=torch.float64)
    middle = ((values[1:] + values[:-1]) / 2).to(dtype)
    beside = [torch.nextafter(middle, middle.new_tensor(end)) for end in (-math.inf, math.inf)]
    t = torch.cat([values.to(dtype), middle, *beside, 3 * values[-1:].to(dtype), 3 * values[:1].to(dtype) - 1])
    encoded = importlib.import_module("fast.quantize")._encoded
    assert torch.equal(encoded(t.clone(), element), encode(t, element))


def test_float64_keeps_its_bits():
    w = torch.tensor([[1.0, 1 + 2.0**-40]], dtype=torch.float64) * 3.5
    assert ref.equal(fast.quantize(w, "int8"), ref.quantize(w, "int8"))


@pytest.mark.parametrize("name", ["uint4z_g128", "uint4_g32_ofp32", "uint4_g32_fp16_ofp16", "int8"])
@pytest.mark.parametrize("size", [1e6, 3e38])
def test_large_weights(name, size):
    w = torch.randn(4, 128, generator=torch.Generator().manual_seed(1)).clamp(-1, 1) * size
    ours, theirs = fast.quantize(w, name), ref.quantize(w, name)
    assert (ref.dequantize(ours) - ref.dequantize(theirs)).abs().max() <= 2.0**-20 * size
    assert all(t is None or not t.is_floating_point() or bool(t.isfinite().all()) for t in (ours.scale, ours.offset))


def test_refusals():
    w = torch.ones(2, 64)
    for error, match, call in (
        (TypeError, "int64", lambda: fast.quantize(w.long(), "int4")),
        (ValueError, "shape", lambda: fast.quantize(w[0], "int4")),
        (ValueError, "nearest is 'int4'", lambda: fast.quantize(w, "innt4")),
        (ValueError, "nan, expected finite", lambda: fast.quantize(w * torch.nan, "int4")),
        (ValueError, "inf, expected finite", lambda: fast.quantize(w * torch.inf, "uint4z_g128")),
        (ValueError, "multiple of the rotation", lambda: fast.quantize(w[:, :60], "int4_h64")),
        (NotImplementedError, "'mse'", lambda: fast.quantize(w, "int4", rule="mse")),
        (NotImplementedError, "'stochastic'", lambda: fast.quantize(w, "int4", rounding="stochastic")),
    ):
        with pytest.raises(error, match=match):
            call()
    assert ref.equal(fast.quantize(w, "int4", rule="absmax"), fast.quantize(w, "int4"))
