"""fast.linear on the CPU: the same bits as ref, every kind of input, every refusal before anything runs."""

import math
from dataclasses import replace

import pytest
import torch

import fast
import fast.eager
import ref
from ref.format import FORMATS

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
NAMES = [*FORMATS, "int1_g32", "int2_tensor", "uint3z_b8x16_bf16", "fp4_e0m3_g64_h16", "uint5_g32_zfp32", "int4_g32_ue5m3", "iq4nl_g32_fp16", "int6_g7",
         "int8_channel2_g16_e5m2", "fp6_e2m3_b0x32", "fp8_tensor", "int7_g30", "fp8_e4m3_channel2_bf16_g48", "uint8_zbf16", "fp8_ue5m3_g16", "fp5_e2m2ieee", "int6_g24_obf16",
         "uint2_b8x16_ofp32_h16", "nf4_g64_ofp16", "fp4_e2m1_g16_e4m3_tensor2div", "int8_channel2div"]  # fmt: skip


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight(name, n=21, k=208):
    return ref.quantize(normal(n, k, seed=9), name)


def same(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.nan_to_num(nan=1e9), b.nan_to_num(nan=1e9))
        and torch.equal(a.isnan(), b.isnan())
    )


@pytest.mark.parametrize("name", NAMES)
def test_as_ref(name):
    q, bias = weight(name), normal(21, seed=4)
    for dtype in DTYPES:
        for m in (0, 1, 2, 7, 33):
            x = normal(m, 208, seed=m, dtype=dtype)
            assert same(fast.linear(x, q), ref.linear(x, q))
        assert same(fast.linear(x, q, bias), ref.linear(x, q, bias))
        assert same(fast.linear(x, q, bias, impl="torch"), ref.linear(x, q, bias))


@pytest.mark.parametrize("n, k", [(1, 1), (3, 1), (1, 31), (5, 33), (2, 95), (130, 257), (64, 576), (0, 8), (4, 0), (0, 0)])
def test_any_n_and_k(n, k):
    for name in ("int4_g32", "int3_g7", "uint5z_b8x16", "nvfp4", "mxfp6_e3m2", "fp8_e4m3_b128x128", "nf4_tensor", "int7"):
        q = ref.quantize(normal(n, k), name)
        for shape in ((3, k), (k,), (0, k)):
            x = normal(*shape, seed=1, dtype=torch.bfloat16)
            assert same(fast.linear(x, q, torch.ones(n)), ref.linear(x, q, torch.ones(n)))


@pytest.mark.parametrize("shape", [(40,), (1, 40), (0, 40), (2, 3, 40), (2, 0, 40), (1, 2, 3, 4, 40)])
def test_leading_dimensions(shape):
    q, x = weight("int4_g16", 5, 40), normal(*shape)
    assert same(fast.linear(x, q), ref.linear(x, q)) and fast.linear(x, q).shape == (*shape[:-1], 5)


def test_any_strides():
    q, base = weight("int4_g16", 5, 40), normal(7, 90, dtype=torch.bfloat16)
    views = {
        "columns": base[:, 3:43],
        "offset": base.flatten()[5:45].view(1, 40),
        "every other": base[:, 1:81:2],
        "rows": base[::3, :40],
        "transposed": normal(40, 7).T,
        "expanded": base[:1, :40].expand(4, 40),
        "expanded k": base[:3, :1].expand(3, 40),
        "permuted": normal(3, 40, 2).permute(2, 0, 1),
        "leading": normal(4, 6, 40)[:, ::2],
        "backwards batch": normal(2, 3, 40).transpose(0, 1),
    }
    for name, x in views.items():
        before = x.clone()
        assert same(fast.linear(x, q), ref.linear(x.contiguous(), q)), name
        assert same(x, before)
    one = normal(5, 8)[:, ::8]
    assert same(fast.linear(one, weight("int8", 3, 1)), ref.linear(one, weight("int8", 3, 1)))


def test_parts_of_the_weight_may_be_views():
    q = weight("uint4z_g16", 6, 48)

    def view(t):
        wide = torch.empty(t.shape[0] * 2 + 1, t.shape[1] + 3, dtype=t.dtype)
        wide[1::2, 2:-1] = t
        return wide[1::2, 2:-1]

    w = ref.validate(replace(q, packed=view(q.packed), scale=view(q.scale), zero=view(q.zero)))
    x = normal(3, 48)
    assert not w.packed.is_contiguous() and same(fast.linear(x, w), ref.linear(x, q))


def test_group_index():
    for name in ("int4_g16", "uint4z_g16", "nvfp4", "uint4_g16_ofp32", "int4_g16_h16"):
        index = torch.randint(3, (2, 48), generator=torch.Generator().manual_seed(0)).int()
        q = ref.validate(replace(weight(name, 6, 48), group_index=index[0]))
        x = normal(3, 48)
        assert same(fast.linear(x, q), ref.linear(x, q))
        experts = ref.validate(replace(ref.quantize(normal(2, 6, 48), name), group_index=index))
        assert torch.equal(fast.dequantize(experts), ref.dequantize(experts))
    with pytest.raises(ValueError, match="reaches outside of its 3 groups"):
        fast.linear(x, replace(q, group_index=index[0] + 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_rounding(dtype):
    """Sums a hair from a midpoint of x's dtype, too near for float32 to tell them from it."""
    half = 2.0**-11 if dtype == torch.float16 else 2.0**-8
    q = ref.quantize(torch.tensor([[1.0, half, 2.0**-16]]), "fp8_e5m2")
    codes = torch.tensor([[0x3C, 0x30 if dtype == torch.float16 else 0x1C, 0x01]])
    values = ref.decode(codes, q.format.element)
    q = replace(q, packed=ref.pack(codes, 8), scale=torch.ones(1, 1))
    x = torch.tensor([[1.0, half / values[0, 1].item(), 2.0**-24], [1.0, 3 * half / values[0, 1].item(), -(2.0**-24)]]).to(dtype)
    assert (x.double() @ values.T).flatten().tolist() == [1 + half + 2.0**-40, 1 + 3 * half - 2.0**-40]
    assert ref.linear(x, q).flatten().tolist() == [1 + 2 * half] * 2
    assert fast.linear(x, q).flatten().tolist() == [1 + 2 * half] * 2
    w = ref.quantize(normal(8, 128), "int4_g32")
    trap = replace(w, scale=torch.full_like(w.scale, 1 + half + 2.0**-23))
    assert torch.equal(fast.dequantize(trap, dtype), ref.dequantize(trap, dtype))


def test_one_rounding_at_random():
    """So many sums that rounding to float32 on the way would change some of them."""
    q, x = weight("nf4_g64", 1024, 256), normal(33, 256, dtype=torch.float16)
    exact = x.double() @ ref.dequantize(q).T
    y = ref.linear(x, q)
    assert (exact.float().half() != y).any() and same(fast.linear(x, q), y)


def test_bias_of_any_float_dtype():
    q, x = weight("int4_g16", 5, 40), normal(3, 40, dtype=torch.bfloat16)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for bias in (normal(5).to(dtype), normal(10).to(dtype)[::2], torch.ones(1, dtype=dtype).expand(5)):
            assert same(fast.linear(x, q, bias), ref.linear(x, q, bias))


def test_special_values_stay_in_their_row():
    q, x = weight("int4_g16", 5, 40), normal(4, 40, dtype=torch.bfloat16)
    x[1, 3], x[2, 4], x[3] = math.nan, -math.inf, 3e38
    assert same(fast.linear(x, q), ref.linear(x, q))


def test_out():
    q, x = weight("int4_g16", 5, 40), normal(2, 3, 40, dtype=torch.bfloat16)
    out = torch.full((2, 3, 5), math.nan, dtype=torch.bfloat16)
    y = fast.linear(x, q, out=out)
    assert y.data_ptr() == out.data_ptr() and y.shape == out.shape and same(out, ref.linear(x, q))
    row = torch.full((5,), math.nan, dtype=torch.bfloat16)
    fast.linear(x[0, 0], q, out=row)
    assert same(row, ref.linear(x[0, 0], q))
    assert fast.linear(x[:0], q, out=out[:0]).shape == (0, 3, 5)
    guarded = torch.full((8, 5), 7.0, dtype=torch.bfloat16)
    fast.linear(x, q, out=guarded[1:7].view(2, 3, 5))
    assert (guarded[[0, 7]] == 7).all() and same(guarded[1:7].view(2, 3, 5), ref.linear(x, q))
    w = normal(5, 40, dtype=torch.bfloat16)
    with torch.no_grad():
        assert same(fast.linear(x, w, out=out), torch.nn.functional.linear(x, w)) and out[0, 0, 0] == fast.linear(x, w)[0, 0, 0]


@pytest.mark.parametrize(
    "out, message",
    [
        (torch.empty(2, 5), r"out is \(2, 5\) torch.float32 on cpu, expected \(3, 5\)"),
        (torch.empty(3, 5, dtype=torch.float64), r"torch.float64 on cpu, expected \(3, 5\) torch.float32"),
        (torch.empty(3, 5, device="meta"), "on meta, expected"),
        (torch.empty(5, 3).T, "out is not contiguous"),
        ("out", "out is str"),
    ],
)
def test_out_that_does_not_fit(out, message):
    with pytest.raises(ValueError, match=f"linear: .*{message}"):
        fast.linear(normal(3, 40), weight("int4_g16", 5, 40), out=out)


def exact_input(name, m=6, k=208):
    """An x whose scales are powers of two and whose codes are exact: no rounding anywhere, so no tie to fall either way."""
    fmt = ref.parse_format(name)
    g = torch.Generator().manual_seed(3)
    top = (
        2 ** (fmt.element.bits - 1) - 1
        if isinstance(fmt.element, ref.Int)
        else max(v for v in ref.decode(torch.arange(2**fmt.element.bits), fmt.element).tolist() if math.isfinite(v))
    )
    values = ref.decode(torch.arange(2**fmt.element.bits), fmt.element)
    values = values[values.isfinite() & (values.abs() <= top)]
    x = values[torch.randint(len(values), (m, k), generator=g)]
    x[:, :: fmt.group[1] or k] = top  # the largest of every group
    return x.float()


X_FORMATS = ["int8_token", "int4_token", "fp8_e4m3_token", "fp8_e5m2_token", "fp4_e2m1_g32_e8m0", "fp8_e4m3_g128", "int8_g64_fp16", "fp4_e2m1_token",
             "int8_tensor", "fp4_e2m1_g16_e4m3_tensor2", "fp8_e4m3_tensor", "fp8_e4m3_g48", "fp4_e2m1_g16_e4m3_channel2"]  # fmt: skip


@pytest.mark.parametrize("name", X_FORMATS)
def test_quantized_activations(name):
    x_scale = torch.tensor(0.25) if "tensor" in name else None
    for wname in ("int4_g16", "nvfp4", "fp8_e4m3_b128x128"):
        q, x = weight(wname), exact_input(name)
        for dtype in (torch.float32, torch.bfloat16):
            y = ref.linear(x.to(dtype), q, normal(21), x_format=name, x_scale=x_scale)
            assert same(fast.linear(x.to(dtype), q, normal(21), x_format=name, x_scale=x_scale), y)
            assert same(fast.linear(x.to(dtype), q, normal(21), x_format=ref.parse_format(name), x_scale=x_scale), y)
    for rows in (0, 1):
        assert same(fast.linear(x[:rows], q, x_format=name, x_scale=x_scale), ref.linear(x[:rows], q, x_format=name, x_scale=x_scale))


@pytest.mark.parametrize(
    "name", [*X_FORMATS, "int8_token_h16", "fp8_e3m4_token_bf16", "fp4_e0m3_g16_ue5m3", "fp8_e4m3_g32_e5m2", "int8_token_fp16"]
)
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-4, 1.0, 1e9, 3e38])
def test_quantize_input_as_ref(name, size):
    """The same scales; codes but for ties, which float32 quotients may hit where float64 ones do not: neighbours, and few."""
    x = normal(16, 96).clamp(-1, 1) * (1e36 if "_h" in name and size == 3e38 else size)  # a rotation in float32 overflows
    x_scale = torch.tensor(0.01) if "tensor2" in name else None
    a, b = ref.quantize_input(x, name, x_scale), ref.validate(fast.quantize_input(x, name, x_scale))
    assert b.format == a.format and b.shape == a.shape
    if "_h" not in name:
        assert torch.equal(a.scale, b.scale) and (a.scale_2 is None or torch.equal(a.scale_2, b.scale_2))
        difference = (ref.dequantize(a) - ref.dequantize(b)).abs()
        exact = (ref.dequantize(a) - x.double()).abs()
        # Where the codes differ x lies in the middle, but for one float32 rounding of the quotient.
        assert (difference <= 2 * exact + 2.0**-23 * x.abs()).all() and (difference > 0).double().mean() < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_dequantize_as_ref(name):
    q = weight(name, 11, 64)
    for dtype in (torch.float64, *DTYPES):
        assert torch.equal(fast.dequantize(q, dtype), ref.dequantize(q, dtype))
    experts = ref.quantize(normal(2, 3, 4, 64), name)
    assert torch.equal(fast.dequantize(experts), ref.dequantize(experts))


@pytest.mark.parametrize("block", [1, 4, 16, 64])
def test_hadamard_as_ref(block):
    x = torch.randint(-100, 100, (2, 3, 128), generator=torch.Generator().manual_seed(0)).float()
    for dtype in (torch.float64, *DTYPES):
        assert same(fast.hadamard(x.to(dtype), block), ref.hadamard(x.to(dtype), block))
    for wrong in (0, 3, 256):
        with pytest.raises(ValueError, match=f"hadamard: got block={wrong} and k=128"):
            fast.hadamard(x, wrong)


def test_large_weights_are_taken_in_chunks(monkeypatch):
    monkeypatch.setattr(fast.eager, "CHUNK", 1000)
    for name in ("int4_g16", "uint3z_b8x16_bf16", "nvfp4", "fp8_channel2_g16", "int4_h16"):
        q, x = weight(name), normal(3, 208)
        assert same(fast.linear(x, q, normal(21)), ref.linear(x, q, normal(21))) and torch.equal(fast.dequantize(q), ref.dequantize(q))


def test_a_plain_weight_is_a_drop_in():
    for dtype in DTYPES:
        x, w, bias = normal(2, 3, 40, dtype=dtype), normal(5, 40, dtype=dtype), normal(5, dtype=dtype)
        assert same(fast.linear(x, w), torch.nn.functional.linear(x, w))
        assert same(fast.linear(x, w, bias), torch.nn.functional.linear(x, w, bias))
        assert same(fast.linear(x, w, bias, impl="torch"), torch.nn.functional.linear(x, w, bias))
    w = torch.nn.Parameter(normal(5, 40))
    fast.linear(normal(2, 40), w).sum().backward()
    assert w.grad.shape == (5, 40)
    for kwargs in ({"x_format": "int8_token"}, {"impl": "triton"}, {"x_scale": torch.tensor(1.0)}):
        with pytest.raises(NotImplementedError, match="w is a plain tensor"):
            fast.linear(normal(2, 40), w, **kwargs)


def test_gradients_are_refused():
    q, x = weight("int4_g16", 5, 40), normal(2, 40).requires_grad_()
    with pytest.raises(NotImplementedError, match="linear: x requires a gradient"):
        fast.linear(x, q)
    with torch.no_grad():
        assert same(fast.linear(x, q), ref.linear(x, q))


Q, X, ONE = weight("int4_g16", 5, 40), normal(2, 40), torch.tensor(1.0)
NV = weight("nvfp4", 5, 48)
REFUSED = [
    ((X[:, :39], Q), {}, ValueError, r"linear: x has k=39, weight int4_g16 has k=40 \(both must match\)"),
    ((ONE, Q), {}, ValueError, "linear: x has no axis, weight int4_g16 has k=40"),
    ((X.int(), Q), {}, TypeError, "linear: x is torch.int32, expected a float16, bfloat16 or float32 tensor"),
    ((X.double(), Q), {}, TypeError, "linear: x is torch.float64"),
    (([1.0], Q), {}, TypeError, "linear: x is list"),
    ((X, "int4"), {}, TypeError, "linear: w is str, expected a QTensor, a Prepared or a tensor"),
    ((X, None), {}, TypeError, "linear: w is NoneType"),
    ((X, ref.quantize(normal(2, 5, 40), "int4")), {}, ValueError, r"linear: weight int4 has shape \(2, 5, 40\), expected \(n, k\)"),
    ((X, Q, torch.ones(4)), {}, ValueError, r"linear: bias has shape \(4,\), weight int4_g16 has n=5 \(expected \(5,\)\)"),
    ((X, Q, torch.ones(1, 5)), {}, ValueError, r"linear: bias has shape \(1, 5\)"),
    ((X, Q, torch.ones(5).int()), {}, TypeError, "linear: bias is torch.int32"),
    ((X, Q, 1.0), {}, TypeError, "linear: bias is float"),
    ((X.to("meta"), Q), {}, ValueError, r"linear: x is on meta, weight is on cpu \(all must match\)"),
    ((X, Q, torch.ones(5, device="meta")), {}, ValueError, "linear: x is on cpu, weight is on cpu, bias on meta"),
    ((X, Q), {"x_format": "int9"}, ValueError, "format: unknown name 'int9'.* the nearest is"),
    ((X, Q), {"x_format": 8}, TypeError, "format: got int"),
    ((X, Q), {"x_format": "uint8z"}, ValueError, "linear: x cannot be quantized to uint8z: expected signed integers of 2 bits or more, or signed floats"),
    ((X, Q), {"x_format": "nf4_token"}, ValueError, "linear: x cannot be quantized to nf4: expected signed integers of 2 bits or more, or signed floats"),
    ((X, Q), {"x_format": "fp8_e4m3_b128x128"}, ValueError, "linear: x cannot be quantized to fp8_e4m3_b128x128: expected scales by tensor, token or group"),
    ((X, Q), {"x_format": "fp4_e2m1_g16_channel2"}, ValueError, "linear: x cannot be quantized to fp4_e2m1_g16_channel2: expected .* e4m3 under a token's"),
    ((X, Q), {"x_format": "fp4_e2m1_g16_e4m3_tensor2"}, ValueError, "linear: nvfp4 needs x_scale, the static scale of the tensor"),
    ((X, Q), {"x_format": "int8_token", "x_scale": ONE}, ValueError, "linear: got x_scale, but the scales of int8 are dynamic"),
    ((X, Q), {"x_format": "int8_token_h16"}, ValueError, "k=40 is no multiple of the rotation's block 16"),
    ((X, Q), {"x_scale": ONE}, ValueError, "linear: got x_scale without x_format"),
    ((X, Q), {"x_format": "int8_tensor", "x_scale": torch.ones(2)}, ValueError, r"linear: x_scale has shape \(2,\), expected one value"),
    ((X, Q), {"x_format": "int8_tensor", "x_scale": 0.5}, TypeError, "linear: x_scale is float, expected a floating-point tensor with one value"),
    ((X, Q), {"x_format": "int8_tensor", "x_scale": torch.tensor(1)}, TypeError, "linear: x_scale is torch.int64, expected a floating-point tensor"),
    ((X, Q), {"x_format": "int8_tensor", "x_scale": ONE.to("meta")}, ValueError, r"linear: x is on cpu, weight is on cpu, x_scale on meta \(all must match\)"),
    ((X, Q), {"impl": "cuda"}, ValueError, "linear: unknown impl 'cuda', expected one of torch, triton, humming, cublas"),
    ((X, replace(Q, packed=Q.packed[:3])), {}, ValueError, r"linear: packed of int4_g16 has shape \(3, 5\), expected \(5, 5\)"),
    ((X, replace(Q, scale=Q.scale[:, :2])), {}, ValueError, r"linear: scale of int4_g16 has shape \(5, 2\), expected \(5, 3\)"),
    ((X, replace(Q, zero=Q.scale)), {}, ValueError, "linear: weight int4_g16 has a zero, expected none"),
    ((X, replace(Q, scale=Q.scale.to("meta"))), {}, ValueError, r"linear: packed of int4_g16 is on cpu, scale on meta \(both must match\)"),
    ((X, replace(Q, scale=Q.scale.half())), {}, TypeError, "linear: scale of int4_g16 has dtype torch.float16, expected torch.float32"),
    ((X, replace(Q, packed=Q.packed.long())), {}, TypeError, "linear: packed of int4_g16 has dtype torch.int64, expected torch.int32"),
    ((X, replace(Q, group_index=torch.zeros(39, dtype=torch.int32))), {}, ValueError, r"linear: group_index of int4_g16 has shape \(39,\), expected \(40,\)"),
    ((X, replace(Q, group_index=torch.zeros(40))), {}, TypeError, "linear: group_index of int4_g16 has dtype torch.float32, expected torch.int32"),
    ((X, replace(weight("int4_h8", 5, 40), format=ref.parse_format("int4_h16"))), {}, ValueError, "linear: k=40 is no multiple of the rotation's block 16 in int4_h16"),
    ((normal(2, 48), replace(NV, scale_2=None)), {}, ValueError, "linear: weight nvfp4 has no scale_2, expected one"),
    ((normal(2, 48), replace(NV, scale=torch.ones(5, 3))), {}, TypeError, "linear: scale of nvfp4 has dtype torch.float32, expected torch.uint8"),
]  # fmt: skip


@pytest.mark.parametrize("args, kwargs, error, message", REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_refused_before_anything_runs(args, kwargs, error, message, monkeypatch):
    def run(*_):
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(fast.eager.Plan, "run", run)
    with pytest.raises(error, match=message):
        fast.linear(*args, **kwargs)


@pytest.mark.parametrize(
    "name",
    ["uint8_token", "nf4_token", "iq4nl_g8", "ue4m3_token", "int1_token", "fp8_e4m3_tensor_tensor2", "fp8_e4m3_tensor_e4m3_channel2"],
)
def test_activation_formats_that_cannot_be(name):
    """The same refusals as ref's, whoever quantizes x."""
    x_scale = ONE if "tensor2" in name else None
    for operation in (ref.quantize_input, fast.quantize_input):
        with pytest.raises(ValueError, match=f"quantize_input: x cannot be quantized to {ref.parse_format(name)}: expected"):
            operation(X, name, x_scale)
    with pytest.raises(ValueError, match=f"linear: x cannot be quantized to {ref.parse_format(name)}: expected"):
        fast.linear(X, Q, x_format=name, x_scale=x_scale)


@pytest.mark.parametrize("impl", ["torch", "triton", "humming", "cublas"])
def test_why_not_agrees_with_linear(impl):
    for q in (Q, NV, weight("fp8", 16, 48)):
        for kwargs in ({}, {"x_format": "int8_token"}, {"x_format": "fp8_e4m3_token"}):
            x = normal(2, q.shape[1], dtype=torch.bfloat16)
            reason = fast.why_not("linear", x, q, impl=impl, **kwargs)
            if reason is None:
                assert fast.linear(x, q, impl=impl, **kwargs).shape == (2, q.shape[0])
            else:
                assert isinstance(reason, str) and str(q.format) in reason
                with pytest.raises(NotImplementedError, match=f"linear: impl '{impl}' cannot run .*bfloat16.* x {q.format}"):
                    fast.linear(x, q, impl=impl, **kwargs)
    assert impl != "torch" or reason is None


@pytest.mark.parametrize("args, kwargs, error, message", REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_why_not_refuses_what_linear_refuses(args, kwargs, error, message):
    assert fast.why_not("linear", X, Q, x_format="int8_tensor", x_scale=ONE, impl="torch") is None  # a good call before makes no difference
    with pytest.raises(error, match=message):
        fast.why_not("linear", *args, **{"impl": "torch", **kwargs})


def test_why_not_refuses_as_linear_does():
    with pytest.raises(ValueError, match="why_not: unknown operation 'matmul', expected 'linear'"):
        fast.why_not("matmul", X, Q, impl="torch")
    with pytest.raises(ValueError, match="unknown impl 'cuda'"):
        fast.why_not("linear", X, Q, impl="cuda")
    with pytest.raises(ValueError, match="x has k=39"):
        fast.why_not("linear", X[:, :39], Q, impl="torch")
    with pytest.raises(ValueError, match="x_scale without x_format"):
        fast.why_not("linear", X, Q, x_scale=ONE, impl="torch")
    assert fast.why_not("linear", X, normal(5, 40), impl="torch") is None
    assert "plain tensor" in fast.why_not("linear", X, normal(5, 40), impl="triton")
