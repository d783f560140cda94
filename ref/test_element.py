"""Elements: decode over every code of every float of up to 8 bits, encode over every bf16 and fp16 number."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
import torch

from .element import NAMED, ROUNDINGS, Codebook, Float, Int, decode, encode, max_value, min_value, parse_element, value_list, values

FLOATS = [
    Float(e, m, signed, specials, subnormal)
    for e, m, signed, specials, subnormal in itertools.product(range(9), range(9), (True, False), ("finite", "fn", "ieee"), (True, False))
    if 1 <= signed + e + m <= 8 and not (specials == "ieee" and e == 0) and not (specials == "fn" and e == m == 0)
]
INTS = [Int(bits, signed) for bits in range(1, 9) for signed in (True, False)]
NAMES = [*NAMED, "e2m1", "e2m3", "e3m2", "e3m4fn", "e4m3finite", "e4m3ieee"]
GENERIC = ["e0m3", "e0m7", "ue4m4", "e1m2", "ue0m1", "e4m0", "e2m5ieee", "e7m0", "ue6m2fn", "ue3m2n", "e0m0"]
ENCODED = [parse_element(name) for name in NAMES + GENERIC] + INTS
ML_DTYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m4": ml_dtypes.float8_e3m4,
    "e4m3ieee": ml_dtypes.float8_e4m3,
    "e8m0": ml_dtypes.float8_e8m0fnu,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
TORCH_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e8m0": torch.float8_e8m0fnu}


def all_16_bit(dtype):
    """Every number of a 16-bit dtype, NaN and inf included, as float64."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).double()


INPUTS = torch.cat([all_16_bit(torch.bfloat16), all_16_bit(torch.float16)])


def same(a, b):
    """Equal as numbers with their zero's sign, NaN equal to NaN."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.array_equal(a, b, equal_nan=True) and np.array_equal(np.signbit(a)[~np.isnan(a)], np.signbit(b)[~np.isnan(b)])


def counted_up(element):
    """The value table by counting: each magnitude is the one before plus a step that doubles with the exponent."""
    bias = 2 ** (element.exponent - 1) - 1 if element.exponent else 0
    magnitudes, v = [], 0.0 if element.subnormal or element.exponent == 0 else 2.0**-bias
    for code in range(2 ** (element.exponent + element.mantissa)):
        magnitudes.append(v)
        field = code >> element.mantissa
        v += 1.0 if element.exponent == 0 else 2.0 ** ((max(field, 1) if element.subnormal else field) - bias - element.mantissa)
    if element.specials == "fn":
        magnitudes[-1] = math.nan
    if element.specials == "ieee":
        top = 2**element.mantissa
        magnitudes[-top:] = [math.inf] + [math.nan] * (top - 1)
    return magnitudes + [-v for v in magnitudes] if element.signed else magnitudes


def test_every_float_is_covered():
    shapes = 36 + 44  # signed: exponent + mantissa from 0 to 7; unsigned: from 1 to 8
    assert len(set(FLOATS)) == 2 * (3 * shapes - 16 - 1)  # no inf without an exponent, no NaN in a single code


def test_decode_every_code_of_every_float():
    for element in FLOATS:
        codes = torch.arange(2**element.bits)
        assert same(decode(codes, element), counted_up(element)), element


@pytest.mark.parametrize("name", ML_DTYPES)
def test_decode_as_ml_dtypes(name):
    element = parse_element(name)
    theirs = np.arange(2**element.bits, dtype=np.uint8).view(ML_DTYPES[name]).astype(np.float64)
    assert same(values(element), theirs)


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_decode_as_torch(name):
    assert same(values(NAMED[name]), torch.arange(256, dtype=torch.uint8).view(TORCH_DTYPES[name]).double())


def test_decode_integers():
    assert values(Int(1)).tolist() == [-1, 0]
    assert values(Int(4)).tolist() == list(range(-8, 8))
    assert values(Int(3, signed=False)).tolist() == list(range(8))
    for element in INTS:
        assert values(element).tolist() == [c - element.signed * 2 ** (element.bits - 1) for c in range(2**element.bits)]


def test_decode_keeps_shape_and_takes_any_integer_dtype():
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        assert decode(torch.tensor([[[7, 2]]], dtype=dtype), parse_element("e2m1")).tolist() == [[[6.0, 1.0]]]


@pytest.mark.parametrize(
    "name, top", [("e4m3", 448), ("e3m4", 15.5), ("e3m4fn", 30), ("e5m2", 57344), ("e2m1", 6), ("e2m3", 7.5), ("e3m2", 28), ("ue5m3", 114688),
                  ("e8m0", 2.0**127), ("e0m3", 7), ("int8", 127), ("int4", 7), ("int1", 0), ("uint4", 15)]
)  # fmt: skip
def test_published_maxima(name, top):
    assert max_value(parse_element(name)) == top


def test_published_specials_and_smallest_values():
    e4m3, e5m2, e3m4, e8m0, ue5m3 = (value_list(NAMED[name]) for name in ("e4m3", "e5m2", "e3m4", "e8m0", "ue5m3"))
    assert [c for c in range(256) if math.isnan(e4m3[c])] == [0x7F, 0xFF] and not any(map(math.isinf, e4m3))
    assert [c for c in range(256) if math.isnan(e5m2[c])] == [0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]
    assert (e5m2[0x7C], e5m2[0xFC], e3m4[0x70], e3m4[0xF0]) == (math.inf, -math.inf, math.inf, -math.inf)
    assert math.isnan(e8m0[255]) and e8m0[0] == 2.0**-127 and e8m0[127] == 1 and 0 not in e8m0
    assert math.isnan(ue5m3[255]) and ue5m3[0xFE] == 114688 and ue5m3[1] == 2.0**-17
    assert (e4m3[1], e5m2[1], value_list(parse_element("e2m1"))[1]) == (2.0**-9, 2.0**-16, 0.5)


def expected(element, x, rounding):
    """The value that each x has to round to: the sets on either side of the midpoints, then the rule for ties."""
    table = np.unique([v for v in value_list(element) if math.isfinite(v)])  # -0 and 0 are one
    low = np.maximum(np.searchsorted(table, x, "right") - 1, 0)
    high = np.minimum(np.searchsorted(table, x, "left"), len(table) - 1)
    if rounding == "truncate":
        return np.where(np.abs(table[high]) < np.abs(table[low]), table[high], table[low])
    middles = (table[1:] + table[:-1]) / 2
    low, high = np.searchsorted(middles, x, "left"), np.searchsorted(middles, x, "right")  # differ at a tie only
    a, b = table[low], table[high]
    if rounding == "nearest_even":
        if isinstance(element, Int):
            even = b % 2 == 0
        elif isinstance(element, Codebook):
            even = np.array([element.values.index(v) % 2 == 0 for v in table])[high]
        else:  # the position of the magnitude: the last bit of the code
            even = np.searchsorted(np.unique(np.abs(table)), np.abs(b)) % 2 == 0
        return np.where(even, b, a)
    nearer = np.where(np.abs(b) < np.abs(a), b, a)
    return nearer if rounding == "nearest_zero" else np.where(nearer == a, b, a)


def check_encode(element, x, rounding):
    codes = encode(x, element, rounding)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape and int(codes.max()) < 2**element.bits
    got, want = decode(codes, element).numpy(), expected(element, x.numpy(), rounding)
    wrong = (got != want).nonzero()[0]
    assert not len(wrong), f"{element} {rounding}: {x[wrong[0]].item()} gave {got[wrong[0]]}, expected {want[wrong[0]]}"
    has_negative_zero = any(v == 0 and math.copysign(1, v) < 0 for v in value_list(element))
    zero = got == 0
    assert np.array_equal(np.signbit(got[zero]), np.signbit(x.numpy()[zero]) & has_negative_zero)


@pytest.mark.parametrize("rounding", [r for r in ROUNDINGS if r != "stochastic"])
@pytest.mark.parametrize("element", ENCODED, ids=str)
def test_encode_every_16_bit_number(element, rounding):
    check_encode(element, INPUTS[~INPUTS.isnan()], rounding)


@pytest.mark.parametrize("rounding", [r for r in ROUNDINGS if r != "stochastic"])
@pytest.mark.parametrize("element", ENCODED, ids=str)
def test_encode_values_midpoints_and_their_neighbours(element, rounding):
    table = np.unique([v for v in value_list(element) if math.isfinite(v)])
    points = np.concatenate([table, (table[1:] + table[:-1]) / 2, [0.0, -0.0]])
    points = np.concatenate([points, np.nextafter(points, np.inf), np.nextafter(points, -np.inf)])
    check_encode(element, torch.from_numpy(points), rounding)


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e3m4", "e4m3ieee", "e2m3", "e3m2", "e2m1"])
def test_encode_as_ml_dtypes_within_range(name):
    element = parse_element(name)
    x = INPUTS[INPUTS.abs() <= max_value(element)]
    theirs = x.numpy().astype(np.float32).astype(ML_DTYPES[name]).view(np.uint8)
    assert np.array_equal(encode(x, element).numpy(), theirs)


def test_ties_by_hand():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    e2m1 = parse_element("e2m1")
    for sign in (1, -1):
        results = {r: (decode(encode(sign * ties, e2m1, r), e2m1) * sign).tolist() for r in ROUNDINGS[:4]}
        assert results["nearest_even"] == [0, 1, 1, 2, 2, 4, 4]
        assert results["nearest_zero"] == [0, 0.5, 1, 1.5, 2, 3, 4]
        assert results["nearest_away"] == [0.5, 1, 1.5, 2, 3, 4, 6]
        assert results["truncate"] == [0, 0.5, 1, 1.5, 2, 3, 4]
    assert decode(encode(torch.tensor([-8.5, -1.5, -0.5, 0.5, 1.5, 2.5, 7.5]), Int(4)), Int(4)).tolist() == [-8, -2, 0, 0, 2, 2, 7]


def test_truncation_between_neighbours_of_both_signs():
    iq4nl = NAMED["iq4nl"]  # ... -10, 1, 13 ...: no zero, and the neighbour nearer to zero is 1 on either side of it
    assert decode(encode(torch.tensor([-9.0, -0.5, 0.0, 0.5]), iq4nl, "truncate"), iq4nl).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("element", ENCODED, ids=str)
def test_saturation(element):
    huge = torch.tensor([math.inf, 1e300, -1e300, -math.inf], dtype=torch.float64)
    for rounding in ROUNDINGS:
        generator = torch.Generator().manual_seed(0) if rounding == "stochastic" else None
        got = decode(encode(huge, element, rounding, generator), element).tolist()
        assert got == [max_value(element)] * 2 + [min_value(element)] * 2, rounding


@pytest.mark.parametrize("element", ENCODED, ids=str)
def test_nan(element):
    x = torch.tensor([1.0, math.nan, -math.nan])
    if any(math.isnan(v) for v in value_list(element)):
        assert decode(encode(x, element), element).isnan().tolist() == [False, True, True]
    else:
        with pytest.raises(ValueError, match=f"x has NaN and {element} has no code for it"):
            encode(x, element)


@pytest.mark.parametrize("name", ["int4", "uint3", "e2m1", "e4m3", "e8m0", "nf4"])
def test_stochastic_is_unbiased_and_takes_only_neighbours(name):
    element, draws = parse_element(name), 10_000
    table = np.unique([v for v in value_list(element) if math.isfinite(v)])
    table = table[np.abs(table) <= 16]  # of e8m0 and e4m3, enough cells
    v0, v1 = torch.from_numpy(table[:-1]), torch.from_numpy(table[1:])
    for share in (0.0, 0.1, 0.5, 0.9):
        x = v0 + share * (v1 - v0)
        generator = torch.Generator().manual_seed(1)
        got = decode(encode(x.expand(draws, -1), element, "stochastic", generator), element)
        assert ((got == v0) | (got == v1)).all()
        up = (got == v1).double().mean(0)
        probability = (x - v0) / (v1 - v0)  # share, after the rounding of x
        # Six standard errors of a proportion: over all cells here fewer than one false alarm in 10^5.
        assert ((up - probability).abs() <= 6 * (probability * (1 - probability) / draws).sqrt()).all()


def test_stochastic_follows_its_generator():
    x = torch.rand(1000)
    once, again, other = (encode(x * 8, Int(4), "stochastic", torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(once, again) and not torch.equal(once, other)


@pytest.mark.parametrize("element", [*FLOATS, *INTS, *NAMED.values()], ids=str)
def test_names_parse_and_print(element):
    assert parse_element(str(element)) == element


def test_errors():
    x = torch.zeros(1)
    with pytest.raises(ValueError, match="unknown rounding 'up', expected one of nearest_even"):
        encode(x, Int(4), "up")
    with pytest.raises(ValueError, match="needs a generator"):
        encode(x, Int(4), "stochastic")
    with pytest.raises(ValueError, match="needs a generator"):
        encode(x, Int(4), "nearest_even", torch.Generator())
    for name in ("int9", "int0", "e9", "float", "e4m4", "e0m0ieee", "ue0m0", ""):
        with pytest.raises(ValueError):
            parse_element(name)
    for build in (lambda: Int(0), lambda: Int(9), lambda: Float(5, 3), lambda: Float(-1, 3), lambda: Float(4, 3, specials="inf"),
                  lambda: Codebook("c", (1.0, 2.0, 3.0)), lambda: Codebook("c", (1.0, math.nan))):  # fmt: skip
        with pytest.raises(ValueError):
            build()
