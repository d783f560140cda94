"""Elements: what one code of up to 8 bits means.

An element is a finite map from code to real number. Decoding is a table look-up; encoding is a search in the same
table, so no cast of any library has a say in it.
"""

import functools
import math
import re
from dataclasses import dataclass

import torch

ROUNDINGS = ("nearest_even", "nearest_zero", "nearest_away", "truncate", "stochastic")


@dataclass(frozen=True)
class Int:
    """An integer of 1 to 8 bits.

    Signed codes are offset binary: value = code - 2^(bits-1), so one bit means {-1, 0}. Unsigned: value = code.
    """

    bits: int
    signed: bool = True

    def __post_init__(self):
        if not 1 <= self.bits <= 8:
            raise ValueError(f"Int: got {self.bits} bits, expected 1 to 8")

    def __str__(self):
        return f"{'' if self.signed else 'u'}int{self.bits}"


@dataclass(frozen=True)
class Float:
    """A float of up to 8 bits: sign, exponent field e, mantissa field m (most significant first).

    With bias B = 2^(exponent-1) - 1 and M = mantissa: value = m * 2^(1-B-M) where e = 0, else (1 + m/2^M) * 2^(e-B).
    With exponent = 0 the element is a sign-magnitude integer: value = m.

    specials: "finite": every code is a number. "fn": the code with every bit but the sign set is NaN.
        "ieee": the top exponent holds inf (m = 0) and NaN.
    subnormal: False reads e = 0 like every other exponent (e8m0, which has no zero).

    Source: OCP OFP8 and MX 1.0 for the named ones; the generic map equals gfloat's.
    """

    exponent: int
    mantissa: int
    signed: bool = True
    specials: str = "finite"
    subnormal: bool = True

    def __post_init__(self):
        if self.exponent < 0 or self.mantissa < 0 or not 1 <= self.bits <= 8:
            raise ValueError(
                f"Float: got exponent={self.exponent}, mantissa={self.mantissa}, signed={self.signed}: expected 1 to 8 bits in all"
            )
        if self.specials not in ("finite", "fn", "ieee"):
            raise ValueError(f"Float: got specials={self.specials!r}, expected 'finite', 'fn' or 'ieee'")
        if self.specials == "ieee" and self.exponent == 0:
            raise ValueError("Float: specials='ieee' needs an exponent: inf and NaN live in its top value")
        if self.specials == "fn" and self.exponent == self.mantissa == 0:
            raise ValueError("Float: with no exponent and no mantissa, specials='fn' leaves no number")

    @property
    def bits(self):
        return self.signed + self.exponent + self.mantissa

    def __str__(self):
        for name, element in NAMED.items():
            if element == self:
                return name
        stem = f"{'' if self.signed else 'u'}e{self.exponent}m{self.mantissa}"
        normal = "" if self.subnormal else "n"
        suffix = {"finite": "finite" if stem in NAMED and not normal else "", "fn": "fn", "ieee": "ieee"}[self.specials]
        return stem + normal + suffix


@dataclass(frozen=True)
class Codebook:
    """A table of 2^bits values that is looked up by code, as nf4."""

    name: str
    values: tuple

    def __post_init__(self):
        if len(self.values) not in (2, 4, 8, 16, 32, 64, 128, 256):
            raise ValueError(f"Codebook {self.name}: got {len(self.values)} values, expected a power of two up to 256")
        if not all(math.isfinite(v) for v in self.values):
            raise ValueError(f"Codebook {self.name}: every value must be finite")

    @property
    def bits(self):
        return len(self.values).bit_length() - 1

    def __str__(self):
        return self.name


# Names by convention. All other floats are spelled [u]eXmY (every code a number), eXmYfn or eXmYieee.
NAMED = {
    "e4m3": Float(4, 3, specials="fn"),
    "e5m2": Float(5, 2, specials="ieee"),
    "e3m4": Float(3, 4, specials="ieee"),
    "ue5m3": Float(5, 3, signed=False, specials="fn"),
    "e8m0": Float(8, 0, signed=False, specials="fn", subnormal=False),
    # bitsandbytes: the quantiles of a normal distribution, and its 4-bit float; values as float32 holds them.
    "nf4": Codebook("nf4", (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)),
    "iq4nl": Codebook("iq4nl", (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)),
}  # fmt: skip


def parse_element(name):
    """The element called `name`: int4, uint4, e2m1, e4m3 (also e4m3fn), e3m4ieee, ue4m3fn, nf4.

    Raises:
        ValueError: no element has this name.

    >>> parse_element("e2m1")
    Float(exponent=2, mantissa=1, signed=True, specials='finite', subnormal=True)
    """
    if name in NAMED:
        return NAMED[name]
    if match := re.fullmatch(r"(u?)int([1-8])", name):
        return Int(int(match[2]), signed=not match[1])
    if match := re.fullmatch(r"(u?)e(\d)m(\d)(n?)(finite|fn|ieee|)", name):
        return Float(int(match[2]), int(match[3]), not match[1], match[5] or "finite", not match[4])
    raise ValueError(
        f"element: unknown name {name!r}: expected int1..int8, uint1..uint8, [u]eXmY[fn|ieee|finite] or one of {', '.join(NAMED)}"
    )


@functools.cache
def value_list(element):
    """The real value of every code, in code order, as a tuple of Python floats (inf and NaN included)."""
    if isinstance(element, Int):
        offset = 2 ** (element.bits - 1) if element.signed else 0
        return tuple(float(code - offset) for code in range(2**element.bits))
    if isinstance(element, Codebook):
        return tuple(float(v) for v in element.values)
    magnitudes = [_magnitude(element, code) for code in range(2 ** (element.exponent + element.mantissa))]
    return tuple(magnitudes + [-v for v in magnitudes] if element.signed else magnitudes)


def _magnitude(element, code):
    field, fraction = code >> element.mantissa, code & (2**element.mantissa - 1)
    if element.exponent == 0:
        top = 2**element.mantissa - 1
        return math.nan if element.specials == "fn" and code == top else float(fraction)
    bias, top = 2 ** (element.exponent - 1) - 1, 2**element.exponent - 1
    if element.specials == "fn" and field == top and fraction == 2**element.mantissa - 1:
        return math.nan
    if element.specials == "ieee" and field == top:
        return math.nan if fraction else math.inf
    if field == 0 and element.subnormal:
        return math.ldexp(fraction, 1 - bias - element.mantissa)
    return math.ldexp(2**element.mantissa + fraction, field - bias - element.mantissa)


def values(element, device=None):
    """The decode table: float64 (2^bits,), the real value of every code."""
    return torch.tensor(value_list(element), dtype=torch.float64, device=device)


def max_value(element):
    """The largest finite value. For one-bit signed integers, whose values are -1 and 0, it is 0."""
    return max(v for v in value_list(element) if math.isfinite(v))


def min_value(element):
    """The lowest finite value."""
    return min(v for v in value_list(element) if math.isfinite(v))


def largest(element):
    """The magnitude that a scale is made for: max_value, or 1 for one-bit signed integers."""
    return max_value(element) or -min_value(element)


def decode(codes, element, dtype=torch.float64):
    """values(element)[codes], exactly.

    Args:
        codes: any shape, any integer dtype, 0 <= code < 2^bits.
        dtype: of the result: float64, or float32 where every value of the element is a float32.

    Returns:
        dtype, shape of codes.
    """
    if isinstance(element, Int):  # a difference is quicker than a look-up
        return codes.to(dtype).sub_(2 ** (element.bits - 1) if element.signed else 0)
    # So is index_select in one dimension, several times, than values[codes].
    return values(element, codes.device).to(dtype).index_select(0, codes.flatten().int()).view(codes.shape)


def encode(x, element, rounding="nearest_even", generator=None):
    """The code of each x, rounded and saturated to the finite range.

    A value beyond the range, inf included, takes the largest (lowest) finite code. NaN takes the NaN code. A negative x that
    rounds to zero takes -0 where the element has one.

    Args:
        x: any shape, any float dtype; every comparison is exact in float64.
        rounding: between the two neighbours v0 <= x < v1 in the table:
            "nearest_even": the nearer; at the midpoint the one whose code is even (for Int: whose value is even); where both
                or neither are (codebooks), the lower one.
            "nearest_zero": the nearer; at the midpoint the one nearer to zero.
            "nearest_away": the nearer; at the midpoint the one farther from zero.
            "truncate": the one nearer to zero.
            "stochastic": v1 with probability (x - v0) / (v1 - v0); draws from generator.
        generator: torch.Generator on x's device, for "stochastic" only.

    Returns:
        uint8, shape of x.

    Raises:
        ValueError: unknown rounding, "stochastic" without a generator (or the reverse), or NaN for an element without a NaN code.

    >>> encode(torch.tensor([2.5, -7.0, 0.25]), parse_element("e2m1"))
    tensor([ 4, 15,  0], dtype=torch.uint8)
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"encode: unknown rounding {rounding!r}, expected one of {', '.join(ROUNDINGS)}")
    if (rounding == "stochastic") != (generator is not None):
        raise ValueError(f"encode: rounding {rounding!r} with generator={generator}: stochastic rounding, and no other, needs a generator")
    table, codes, nan_code, negative_zero = _search_table(element)
    x = x.to(torch.float64)
    is_nan = x.isnan()
    if nan_code is None and bool(is_nan.any()):
        raise ValueError(f"encode: x has NaN and {element} has no code for it")
    table = torch.tensor(table, dtype=torch.float64, device=x.device)
    codes = torch.tensor(codes, dtype=torch.uint8, device=x.device)
    clamped = torch.where(is_nan, table[0], x).clamp(table[0], table[-1])
    if len(table) > 1:
        lower = (torch.searchsorted(table, clamped.contiguous(), right=True) - 1).clamp(max=len(table) - 2)
        v0, v1 = table[lower], table[lower + 1]
        parity = codes if not isinstance(element, Int) else table.long()
        even0, even1 = (parity % 2 == 0)[lower], (parity % 2 == 0)[lower + 1]
        # Midpoints are exact: neighbours differ by far less than the 29 bits that float64 has beyond float32.
        middle = (v0 + v1) / 2
        upper = {
            "nearest_even": lambda: (clamped > middle) | ((clamped == middle) & even1 & ~even0),
            "nearest_zero": lambda: (clamped > middle) | ((clamped == middle) & (v1.abs() < v0.abs())),
            "nearest_away": lambda: (clamped > middle) | ((clamped == middle) & (v1.abs() > v0.abs())),
            "truncate": lambda: (clamped > v0) & (v1.abs() < v0.abs()),
            "stochastic": lambda: torch.rand(x.shape, dtype=torch.float64, generator=generator, device=x.device) * (v1 - v0) < clamped - v0,
        }[rounding]()
        index = lower + (upper | (clamped >= v1))
    else:
        index = torch.zeros_like(clamped, dtype=torch.long)
    out = codes[index]
    if negative_zero is not None:
        out = torch.where((table[index] == 0) & x.signbit(), negative_zero, out)
    return torch.where(is_nan, 0 if nan_code is None else nan_code, out).to(torch.uint8)


@functools.cache
def _search_table(element):
    """Sorted distinct finite values, a code for each (+0 before -0, else the lowest), the NaN code, the code of -0."""
    best = {}
    nan_code = negative_zero = None
    for code, value in enumerate(value_list(element)):
        if math.isnan(value):
            nan_code = code if nan_code is None else nan_code
        elif value == 0 and math.copysign(1, value) < 0:
            negative_zero = code
        elif math.isfinite(value):
            best.setdefault(value, code)
    table = sorted(best)
    return table, [best[v] for v in table], nan_code, negative_zero
