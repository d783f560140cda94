"""Device functions: packed codes to numbers, scales to numbers, and the roundings that the interpreter does not do."""

import triton.language as tl

from .jit import device_function


@device_function
def to_float32(v):
    """A float as float32; int16 stands for bfloat16."""
    if v.dtype == tl.int16:
        return ((v.to(tl.int32) & 0xFFFF) << 16).to(tl.float32, bitcast=True)
    else:
        return v.to(tl.float32)


@device_function
def round_to_output(v, dtype: tl.constexpr):
    """float32 rounded once to nearest even; int16 stands for bfloat16."""
    if dtype == tl.int16:
        u = v.to(tl.int32, bitcast=True)
        rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        return tl.where(v == v, rounded, 0x7FC0).to(tl.int16)
    else:
        return v.to(dtype)


@device_function
def load_scale(pointers, table, mask):
    """Scales as float32: numbers as they are, codes of an 8-bit element (uint8) through its table of 256 values."""
    stored = tl.load(pointers, mask=mask, other=0)
    if stored.dtype == tl.uint8:
        return tl.load(table + stored.to(tl.int32), mask=mask, other=0.0)
    else:
        return to_float32(stored)


@device_function
def load_codes(
    rows, k0, end, row_bytes, BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, WHOLE_BYTES: tl.constexpr
):
    """The codes of columns k0 .. k0 + BK of some rows, int32 (BN, BK); columns from `end` on read as code 0 or as padding.

    rows: uint8 pointers (BN, 1) to the first byte of each row, a little-endian bitstream.
    WHOLE_BYTES: k0 lies on a byte and BITS divides 8: each byte is read once and split. Else a code is cut out of the two bytes it is in.
    """
    if WHOLE_BYTES:
        column = k0 * BITS // 8 + tl.arange(0, BK * BITS // 8)[None, :]
        if EVEN:
            c = tl.load(rows + column)
        else:
            c = tl.load(rows + column, mask=column < row_bytes, other=0)
        c = c.to(tl.int32)
        if BITS == 4:
            c = tl.reshape(tl.join(c & 15, c >> 4), (BN, BK))
        elif BITS == 2:
            c = tl.reshape(tl.join(tl.join(c & 3, (c >> 4) & 3), tl.join((c >> 2) & 3, c >> 6)), (BN, BK))
        elif BITS == 1:
            even = tl.join(tl.join(c & 1, (c >> 4) & 1), tl.join((c >> 2) & 1, (c >> 6) & 1))
            odd = tl.join(tl.join((c >> 1) & 1, (c >> 5) & 1), tl.join((c >> 3) & 1, c >> 7))
            c = tl.reshape(tl.join(even, odd), (BN, BK))
        return c
    else:
        column = k0 + tl.arange(0, BK)[None, :]
        inside = column < end
        byte = column * BITS >> 3
        shift = (column * BITS) & 7
        c = tl.load(rows + byte, mask=inside, other=0).to(tl.int32)
        if 8 % BITS != 0:
            c |= tl.load(rows + byte + 1, mask=inside & (shift + BITS > 8), other=0).to(tl.int32) << 8
        return (c >> shift) & ((1 << BITS) - 1)


@device_function
def decode(
    code,
    table,
    DECODE: tl.constexpr,
    MIDDLE: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    SIGNED: tl.constexpr,
    SPECIALS: tl.constexpr,
    UNBIAS: tl.constexpr,
):
    """The value of each code (int32), exactly, as float32.

    DECODE "int": code - MIDDLE. "float": sign, exponent and mantissa moved to where float32 has them; times UNBIAS = 2^(127 - bias), which
    puts the exponent right, for subnormals too. "table": table[code].
    """
    if DECODE == "int":
        return (code - MIDDLE).to(tl.float32)
    elif DECODE == "float":
        magnitude = code & ((1 << (EXPONENT + MANTISSA)) - 1)
        v = (magnitude << (23 - MANTISSA)).to(tl.float32, bitcast=True) * UNBIAS
        if SPECIALS == "fn":
            v = tl.where(magnitude == (1 << (EXPONENT + MANTISSA)) - 1, float("nan"), v)
        elif SPECIALS == "ieee":
            v = tl.where(magnitude == ((1 << EXPONENT) - 1) << MANTISSA, float("inf"), v)
            v = tl.where(magnitude > ((1 << EXPONENT) - 1) << MANTISSA, float("nan"), v)
        if SIGNED:
            v = (v.to(tl.int32, bitcast=True) | ((code >> (EXPONENT + MANTISSA)) << 31)).to(tl.float32, bitcast=True)
        return v
    else:
        return tl.load(table + code)


@device_function
def to_dot(v, DOT: tl.constexpr):
    """float32 as the type in which products are taken."""
    if DOT == "bf16":
        return v.to(tl.bfloat16)
    elif DOT == "fp16":
        return v.to(tl.float16)
    elif DOT == "e4m3":
        return v.to(tl.float8e4nv)
    elif DOT == "e5m2":
        return v.to(tl.float8e5)
    elif DOT == "int8":
        return v.to(tl.int8)
    else:
        return v
