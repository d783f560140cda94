"""Quantize takes the nearest code whatever the rule, dequantize is exact, and what is no weight is refused."""

import importlib
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .element import NAMED, Codebook, Float, Int, encode, value_list, values
from .format import FORMATS, SCALE_DTYPES, Format, parse_format
from .hadamard import hadamard
from .pack import pack, unpack, words_per_row
from .qtensor import TENSORS, QTensor, validate
from .quantize import dequantize, quantize, stored_values
from .rounding import round_to
from .rule import RULES
from .scale import decode_scale, encode_scale

NAMES = [*(n for n in FORMATS if n != "fp8_e4m3_b128x128"), "fp8_e4m3_b8x32", "int1_g32", "int2_tensor", "uint3z_b8x16_bf16", "fp4_e0m3_g64_h8", "uint5_g32_zfp32", "int4_g32_ue5m3", "iq4nl_g32_fp16",
         "int8_channel2_g16_e5m2", "fp6_e2m3_b0x32", "fp8_tensor", "int7_g24", "fp8_e4m3_channel2_bf16_g48", "uint8_zbf16", "fp4_g16_ue5m3",
         "int5_g32_ofp32", "fp4_e2m1_b4x32_obf16", "nf4_g64_fp16_ofp16", "fp4_e2m1_g16_e4m3_tensor2div", "int8_channel2div"]  # fmt: skip


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def codes_of(q):
    return unpack(q.packed, q.format.element.bits, q.shape[-1])


def applies(rule, fmt):
    signed_int = isinstance(fmt.element, Int) and fmt.element.signed
    needs = {"full_range": signed_int, "negative_scale": signed_int, "minmax": fmt.zero is not None or fmt.offset is not None,
             "mx_even": isinstance(fmt.element, Float), "two_level": fmt.scale_2 is not None}  # fmt: skip
    return needs.get(rule, True)


def candidates(q):
    """float64 (n, k, 2^bits): the weight that each code would stand for, with the scales that q stores."""
    n, k = q.shape
    gn, gk = q.format.group
    row, column = torch.arange(n) // (gn or max(n, 1)), torch.arange(k) // (gk or max(k, 1))

    def spread(t):
        return t[row][:, column][..., None]

    grid = values(q.format.element).expand(n, k, -1)
    grid = grid - (0 if q.zero is None else spread(q.zero.double()))
    grid = grid * spread(decode_scale(q.scale, q.format.scale))
    if q.scale_2 is not None:
        grid = grid / q.scale_2.double()[..., None] if q.format.scale_2.endswith("divisor") else grid * q.scale_2.double()[..., None]
    return grid if q.offset is None else grid + spread(q.offset.double())


def assert_nearest(q, w):
    """No other code comes closer to w; exact but for the eight float64 roundings on the way (w / step, + zero, and these distances)."""
    x = (hadamard(w.double(), q.format.hadamard) if q.format.hadamard else w.double())[..., None]
    grid = candidates(q)
    distance = (grid - x).abs().nan_to_num(math.inf)
    chosen = distance.gather(-1, codes_of(q).long()[..., None])
    size = x.abs() + grid.abs().nan_to_num(0, 0, 0).amax(-1, keepdim=True)
    assert (chosen <= distance.amin(-1, keepdim=True) + 8 * 2.0**-53 * size).all()


def groups(w, fmt):
    """The weights of each group, written as loops: {(i, j): float64 numpy}."""
    n, k = w.shape
    gn, gk = fmt.group[0] or n, fmt.group[1] or k
    return {
        (i, j): w[i * gn : (i + 1) * gn, j * gk : (j + 1) * gk].double().numpy() for i in range(-(-n // gn)) for j in range(-(-k // gk))
    }


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NAMES)
def test_every_rule_on_every_format(rule, name):
    fmt, w = parse_format(name), normal(5, 80)
    if not applies(rule, fmt):
        with pytest.raises(ValueError, match=f"quantize: rule '{rule}' needs .*, and {fmt} has none"):
            quantize(w, fmt, rule=rule)
        return
    q = validate(quantize(w, fmt, rule=rule))
    assert q.format == fmt and q.shape == (5, 80)
    assert_nearest(q, w)


def test_experts_have_their_own_second_scale():
    w = normal(3, 8, 64) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    for name in ("nvfp4", "int4_g128", "mxfp4", "fp8_e4m3_b128x128", "uint4z_g128", "fp8_tensor"):
        whole = validate(quantize(w, name))
        assert whole.shape == (3, 8, 64)
        for e in range(3):
            alone = quantize(w[e], name)
            for part in TENSORS[:4]:
                if getattr(alone, part) is not None:
                    assert torch.equal(getattr(whole, part)[e], getattr(alone, part)), part
            assert torch.equal(dequantize(whole)[e], dequantize(alone))


QUICK_RULES = [rule for rule in RULES if rule != "mse"]


@pytest.mark.parametrize("rule", QUICK_RULES)
@pytest.mark.parametrize("name", NAMES)
def test_zeros(name, rule):
    """A group of zeros takes scale 1, or the smallest power of two, and stays zero."""
    fmt = parse_format(name)
    if not applies(rule, fmt):
        return
    q = validate(quantize(torch.zeros(4, 64), fmt, rule=rule))
    power = rule.startswith("mx_")
    assert torch.equal(q.scale, encode_scale(torch.full_like(q.scale, 2.0**-127 if power else 1.0, dtype=torch.float64), fmt.scale))
    w = normal(4, 96)
    w[:, 32:] = 0
    partly = validate(quantize(w, fmt, rule=rule))
    assert dequantize(partly).isfinite().all()
    if 0 in value_list(fmt.element):
        assert not dequantize(q).any()
        if fmt.group[0] == 1 and 0 < fmt.group[1] <= 32:
            assert not dequantize(partly)[:, 64:].any()


SIZES = [2.0**-149, 1e-38, 65504.0, 3e38, 1e-300, 1e300]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_tiny_and_huge_weights(name, size, rules=QUICK_RULES):
    """Finite weights stay finite, whatever their size; what is out of reach of the scale's dtype saturates."""
    fmt = parse_format(name)
    w = normal(2, 64).clamp(-1, 1).double() * size
    w = w.float() if w.float().isfinite().all() and w.float().any() else w
    for rule in rules:
        if applies(rule, fmt):
            q = validate(quantize(w, fmt, rule=rule))
            assert q.scale_2 is None or q.scale_2.isfinite().all(), rule
            assert dequantize(q).isfinite().all(), rule


@pytest.mark.parametrize("size", [2.0**-149, 3e38, 1e300])
@pytest.mark.parametrize("name", ["int4_g32", "uint4z_g32", "uint4_g64_zfp16", "mxfp4", "nvfp4"])
def test_tiny_and_huge_weights_under_mse(name, size):
    test_tiny_and_huge_weights(name, size, rules=["mse"])


@pytest.mark.parametrize("name", ["int4_g32", "uint4z_g32", "fp8", "nf4_g64", "mxfp4", "nvfp4"])
def test_a_scale_that_is_a_power_of_two_changes_nothing_else(name):
    w = normal(8, 64)
    a, b = quantize(w, name), quantize(w * 2.0**-90, name)
    assert torch.equal(a.packed, b.packed) and torch.equal(dequantize(a) * 2.0**-90, dequantize(b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_of_any_float_dtype(dtype):
    w = normal(4, 64).to(dtype)
    a, b = quantize(w, "int4_g32"), quantize(w.double(), "int4_g32")
    assert torch.equal(a.packed, b.packed) and torch.equal(a.scale, b.scale)


def test_weights_are_left_alone_and_carry_no_gradient():
    w = normal(8, 64).T.requires_grad_()
    before = w.detach().clone()
    q = quantize(w, "int4_h4")
    assert torch.equal(w.detach(), before) and not q.scale.requires_grad
    assert torch.equal(q.packed, quantize(before.contiguous(), "int4_h4").packed)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused(bad):
    w = normal(3, 8)
    w[2, 5] = bad
    with pytest.raises(ValueError, match=rf"quantize: w is {bad} at \(2, 5\), expected finite numbers"):
        quantize(w, "int4")


def test_quantize_errors():
    w = normal(4, 8)
    for wrong in (w.int(), w.to(torch.float8_e4m3fn), [[1.0]], None):
        with pytest.raises(TypeError, match="quantize: w is"):
            quantize(wrong, "int4")
    with pytest.raises(ValueError, match=r"w has shape \(8,\), expected"):
        quantize(w[0], "int4")
    with pytest.raises(ValueError, match=r"unknown name 'int44'.*the nearest is 'int4'"):
        quantize(w, "int44")
    with pytest.raises(ValueError, match="quantize: unknown rule 'maxabs', expected one of absmax"):
        quantize(w, "int4", rule="maxabs")
    with pytest.raises(ValueError, match="unknown rounding"):
        quantize(w, "int4", rounding="up")
    with pytest.raises(ValueError, match="generator"):
        quantize(w, "int4", rounding="stochastic")
    with pytest.raises(ValueError, match="block=16 and k=8"):
        quantize(w, "int4_h16")


def test_rounding_of_the_codes():
    w = torch.tensor([[6.0, 2.5, -2.5, 0.25]])
    q = {
        r: dequantize(quantize(w, "fp4_e2m1", rounding=r))[0].tolist() for r in ("nearest_even", "nearest_zero", "nearest_away", "truncate")
    }
    assert q == {"nearest_even": [6, 2, -2, 0], "nearest_zero": [6, 2, -2, 0], "nearest_away": [6, 3, -3, 0.5], "truncate": [6, 2, -2, 0]}
    a, b = (quantize(normal(8, 8), "int4", rounding="stochastic", generator=torch.Generator().manual_seed(s)) for s in (1, 1))
    assert torch.equal(a.packed, b.packed)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0), (1, 1), (2, 3, 40), (0, 4, 8)])
@pytest.mark.parametrize("name", FORMATS)
def test_any_shape(name, shape):
    q = validate(quantize(torch.ones(shape), name))
    assert dequantize(q).shape == shape and unpack(q.packed, q.format.element.bits, shape[-1]).shape == shape


def random_qtensor(fmt, n, k, seed, group_index=False):
    """Every code at random, with scales and zero points that no rule would choose."""
    g = torch.Generator().manual_seed(seed)
    shape, target = fmt.scale_shape((n, k)), SCALE_DTYPES[fmt.scale]

    def floats(shape, dtype):
        return (torch.randn(shape, generator=g) * torch.randn(shape, generator=g).mul(3).exp()).to(dtype)

    scale = floats(shape, target) if isinstance(target, torch.dtype) else encode(floats(shape, torch.float64).abs(), target)
    zero = None
    if fmt.zero is not None:
        zero = (
            torch.randint(2**fmt.element.bits, shape, generator=g).to(torch.uint8)
            if fmt.zero == "int"
            else floats(shape, SCALE_DTYPES[fmt.zero])
        )
    second = fmt.scale_2 and {"tensor": (1, 1), "channel": (n, 1)}[fmt.scale_2.removesuffix("_divisor")]
    finite = torch.tensor([c for c, v in enumerate(value_list(fmt.element)) if math.isfinite(v)])
    codes = finite[torch.randint(len(finite), (n, k), generator=g)]
    index = torch.randint(shape[-1], (k,), generator=g).int() if group_index else None
    scale_2 = None if second is None else floats(second, torch.float32)
    offset = None if fmt.offset is None else floats(shape, SCALE_DTYPES[fmt.offset])
    return QTensor(fmt, (n, k), pack(codes, fmt.element.bits), scale, zero, scale_2, index, offset)


def significant_bits(v):
    return (abs(v.numerator) // (abs(v.numerator) & -abs(v.numerator) or 1)).bit_length()


@pytest.mark.parametrize("group_index", [False, True])
@pytest.mark.parametrize("name", [n for n in NAMES if "_h" not in n])
def test_dequantize_is_exact(name, group_index):
    fmt, n, k = parse_format(name), 5, 70
    q = validate(random_qtensor(fmt, n, k, seed=1, group_index=group_index))
    gn, gk = fmt.group[0] or n, fmt.group[1] or k
    scale, codes = decode_scale(q.scale, fmt.scale), codes_of(q).tolist()
    got, inexact = dequantize(q).tolist(), 0
    for i in range(n):
        for j in range(k):
            g = (i // gn, int(q.group_index[j]) if group_index else j // gk)
            value = Fraction(value_list(fmt.element)[codes[i][j]]) - (0 if q.zero is None else Fraction(q.zero[g].item()))
            second = Fraction(1) if q.scale_2 is None else Fraction(q.scale_2[i if len(q.scale_2) > 1 else 0, 0].item())
            divided = fmt.scale_2 is not None and fmt.scale_2.endswith("divisor")
            factors = (value, Fraction(scale[g].item()), 1 / second if divided else second)
            exact = factors[0] * factors[1] * factors[2]
            size, exact = abs(exact), exact + (0 if q.offset is None else Fraction(q.offset[g].item()))
            if sum(map(significant_bits, factors)) <= 53 and not divided and significant_bits(exact) <= 53:
                assert Fraction(got[i][j]) == exact
            else:  # a difference and two products, and the sum with an offset, each rounded
                inexact += 1
                assert abs(Fraction(got[i][j]) - exact) <= (size * 3 + abs(exact)) * Fraction(2) ** -53
    assert not inexact or fmt.scale_2 or fmt.offset or fmt.zero not in (None, "int")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dequantize_rounds_once(dtype):
    for name in ("int4_g32", "nvfp4", "uint4_g64_zfp16", "fp4_e0m3_g64_h8"):
        q = quantize(normal(8, 128), name)
        assert torch.equal(dequantize(q, dtype), round_to(dequantize(q), dtype))
    trap = QTensor(parse_format("int8"), (1, 1), pack(torch.tensor([[128 + 3]]), 8), torch.tensor([[(1 + 2.0**-11 + 2.0**-23) / 3]]))
    assert dequantize(trap, dtype).item() == round_to(dequantize(trap), dtype).item()


# What each element can be, with scales of every dtype: elements whose values float32 does not hold are among them.
ELEMENTS = [Int(b) for b in range(1, 9)] + [Int(b, signed=False) for b in range(1, 9)] + [*NAMED.values(), Float(2, 1), Float(3, 2), Float(2, 3),
            Float(0, 3), Float(8, 0, signed=False), Codebook("far", (2.0**200, -(2.0**-200), 0.0, 1.0)), Codebook("long", (0.1, -1.0))]  # fmt: skip
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@st.composite
def any_format(draw):
    element = draw(st.sampled_from(ELEMENTS))
    zero = scale_2 = offset = None
    if isinstance(element, Int) and not element.signed:
        zero = draw(st.sampled_from([None, "int", "fp32", "fp16", "bf16"]))
    if zero is None:
        offset = draw(st.sampled_from([None, None, "fp32", "fp16", "bf16"]))
    if offset is None:
        scale_2 = draw(st.sampled_from([None, None, "tensor", "channel", "tensor_divisor", "channel_divisor"]))
    group = draw(st.sampled_from([(0, 0), (1, 0), (1, 1), (1, 8), (1, 12), (4, 8), (3, 0), (0, 5), (1, 2**40)]))
    return Format(element, draw(st.sampled_from(list(SCALE_DTYPES))), group, zero, scale_2, draw(st.sampled_from([0, 0, 0, 4])), offset)


def any_qtensor(fmt, shape, seed, wild, order):
    """Every code; scales, zeros and offsets of any bits (subnormals, -0, inf, NaN) if wild, else around one."""
    g = torch.Generator().manual_seed(seed)
    *lead, n, k = shape

    def words(*shape, dtype=torch.int32):
        return torch.randint(-(2**31), 2**31, shape, generator=g).to(dtype)

    def part(shape, target):
        if not isinstance(target, torch.dtype):
            return words(*shape).to(torch.uint8)
        moderate = torch.randn(shape, generator=g, dtype=torch.float64) * 2.0 ** torch.randint(-8, 8, shape, generator=g)
        return words(*shape, dtype=BITS[target.itemsize]).view(target) if wild else moderate.to(target)

    scale = part(fmt.scale_shape(shape), SCALE_DTYPES[fmt.scale])
    zero = offset = second = index = None
    if fmt.zero is not None:
        zero = part(scale.shape, SCALE_DTYPES.get(fmt.zero))
    if fmt.offset is not None:
        offset = part(scale.shape, SCALE_DTYPES[fmt.offset])
    if fmt.scale_2 is not None:
        second = part((*lead, n if fmt.scale_2.startswith("channel") else 1, 1), torch.float32)
    if order:
        index = torch.randint(scale.shape[-1] or 1, (*lead, k), generator=g).int()
    return QTensor(fmt, shape, words(*lead, n, words_per_row(k, fmt.element.bits)), scale, zero, second, index, offset)


def definition(q, rotated=True):
    """What q stands for, float64, all at once: one look-up or operation of the formula after another."""
    fmt, (*lead, n, k) = q.format, q.shape
    row = torch.arange(n) // (fmt.group[0] or max(n, 1))
    column = torch.arange(k) // (fmt.group[1] or max(k, 1)) if q.group_index is None else q.group_index.long()
    column = column.expand(*lead, k)[..., None, :].expand(*lead, n, k)

    def spread(t):
        return t.double()[..., row, :].gather(-1, column)

    w = values(fmt.element)[codes_of(q).long()]
    if q.zero is not None:
        w = w - spread(q.zero)
    target = SCALE_DTYPES[fmt.scale]
    w = w * spread(q.scale if isinstance(target, torch.dtype) else values(target)[q.scale.long()])
    if q.scale_2 is not None:
        w = w / q.scale_2.double() if fmt.scale_2.endswith("divisor") else w * q.scale_2.double()
    if q.offset is not None:
        w = w + spread(q.offset)
    return hadamard(w, fmt.hadamard) if rotated and fmt.hadamard else w


def assert_same_bits(got, expected):
    """The same bits, -0 apart from 0, or NaN in the same places."""
    assert got.dtype == expected.dtype and got.shape == expected.shape and torch.equal(got.isnan(), expected.isnan())
    a, b = (t.nan_to_num(0, torch.inf, -torch.inf).view(BITS[t.itemsize]) for t in (got, expected))
    assert torch.equal(a, b)


@settings(deadline=None)
@given(any_format(), st.lists(st.integers(0, 3), max_size=2), st.integers(0, 9), st.integers(0, 20), st.integers(0, 2**32), st.booleans(), st.booleans(), st.sampled_from([1, 40, 2**18]))  # fmt: skip
def test_dequantize_has_the_bits_of_its_definition(fmt, lead, n, k, seed, wild, order, chunk):
    k = k // (fmt.hadamard or 1) * (fmt.hadamard or 1)
    q = any_qtensor(fmt, (*lead, n, k), seed, wild, order and fmt.scale_shape((n, k))[-1] > 0)
    expected = definition(q)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("ref.quantize"), "CHUNK", chunk)
        for dtype in DTYPES:
            assert_same_bits(dequantize(q, dtype), round_to(expected, dtype))
        assert_same_bits(stored_values(q), definition(q, rotated=False))


@pytest.mark.parametrize("scale", ["fp16", "bf16"])
@pytest.mark.parametrize("element", [Int(4), Int(8), Float(2, 1), NAMED["e4m3"], NAMED["e5m2"], NAMED["e8m0"], NAMED["iq4nl"]], ids=str)
def test_every_code_times_every_scale(element, scale):
    """All products that 16-bit scales can make (for 8-bit elements an eighth of the scales): the same bits by way of float32."""
    codes = torch.arange(2**element.bits)
    words = torch.arange(-(2**15), 2**15, 8 if element.bits == 8 else 1).to(torch.int16)
    packed = pack(codes, element.bits).expand(len(words), -1)
    q = QTensor(Format(element, scale), (len(words), len(codes)), packed, words.view(SCALE_DTYPES[scale])[:, None])
    product = values(element) * q.scale.double()
    for dtype in DTYPES[1:]:
        assert_same_bits(dequantize(q, dtype), round_to(product, dtype))


def test_stacks_of_any_strides():
    stack = quantize(normal(4, 6, 24), "int3_g128")
    parts = {name: getattr(stack, name).transpose(0, 1).contiguous().transpose(0, 1) for name in ("packed", "scale")}
    assert not parts["packed"].is_contiguous() and torch.equal(dequantize(QTensor(stack.format, stack.shape, **parts)), dequantize(stack))


def test_dequantize_leaves_its_parts_alone():
    for name in ("int8", "uint8_zbf16", "fp8", "int4_g32"):
        q = quantize(normal(8, 64), name)
        before = [t.clone() for t in (q.packed, q.scale)]
        dequantize(q, torch.float32).zero_()
        assert torch.equal(q.packed, before[0]) and torch.equal(q.scale, before[1])


def test_dequantize_refuses_other_dtypes():
    for shape in ((4, 32), (0, 32)):
        q = quantize(torch.ones(shape), "int4_g32")
        for dtype in (torch.int8, torch.float8_e4m3fn):
            with pytest.raises(TypeError, match=f"dequantize: got {dtype}, expected float64, float32, float16 or bfloat16"):
                dequantize(q, dtype)
