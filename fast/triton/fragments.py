"""Integer weights of 2, 4 or 8 bits, and floats of 4 and 8, in the order of the tensor core's fragments.

A multiply of 16 rows by 16 columns wants of lane 4 l + c of a warp the columns 2 c + e + 8 h of rows l and l + 8 (e, h = 0, 1). The weight is
therefore stored in tiles of 16 rows by `columns(bits)` columns, 1024 bytes each, in which a lane's codes lie together:

    int16 [n / 16, k / columns, r = 2, l = 8, c = 4, j = 4, e = 2], field t of bits `bits` of which is the code of
    row 16 i + 8 r + l and, in its tile, column (128 / bits) j + 8 t + 2 c + e.

A lane's 16 bytes are one load and, field by field, the operands of the multiplies: neither shuffles nor shared memory between. Two halves (e)
make one word, and a field of both, ORed into the mantissa of a power of two, is a pair of floats: one instruction, one more to take the power off.
A float's field is moved to where the products' type has sign, exponent and mantissa; a multiplication by a power of two puts the exponent right.
"""

import functools

import torch
import triton.language as tl

from .decode import round_to_output, to_float32
from .jit import device_function

TILE_ROWS = 16
TILE_HALVES = 512
# Rows are padded to as many as the largest block takes.
ROWS_MULTIPLE = 128
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}

# The power of two whose last mantissa bit is worth 1, as a pair and as a number.
_MAGIC = {"bf16": (0x43004300, 128.0), "fp16": (0x64006400, 1024.0)}


# Bits of the mantissa, and the exponent's bias.
_PARTS = {"bf16": (7, 127), "fp16": (10, 15)}


def columns(bits):
    """Columns of a tile."""
    return 512 // bits


def padded_rows(n):
    """Rows that are stored of a weight of n."""
    return -(-n // ROWS_MULTIPLE) * ROWS_MULTIPLE


def pack(packed, n, k, bits):
    """Codes from a QTensor's bitstream to tiles.

    Args:
        packed: (n, ceil(k * bits / 32)) int32, the bitstream of each row. bits: 2, 4 or 8.

    Returns:
        int16 (tiles of padded_rows(n), tiles of k, 512); rows and columns past n and k hold code 0.
    """
    width = columns(bits)
    tiles_n, tiles_k, per_half = padded_rows(n) // TILE_ROWS, -(-k // width), 16 // bits
    out = torch.empty(tiles_n, tiles_k, TILE_HALVES, dtype=torch.int16, device=packed.device)
    shifts = torch.arange(per_half, device=packed.device, dtype=torch.int32) * bits
    # A few rows at a time: the codes take 4 bytes each on the way.
    step = max(1, (1 << 22) // (TILE_ROWS * tiles_k * width))
    for i in range(0, tiles_n, step):
        rows = packed[i * TILE_ROWS : (i + step) * TILE_ROWS]
        count = min(step, tiles_n - i)
        words = rows.new_zeros(count * TILE_ROWS, tiles_k * width * bits // 32)
        words[: rows.shape[0], : rows.shape[1]] = rows
        fields = torch.arange(32 // bits, device=packed.device, dtype=torch.int32) * bits
        codes = (words[:, :, None] >> fields) & ((1 << bits) - 1)
        codes = codes.view(count, 2, 8, tiles_k, 4, per_half, 4, 2).permute(0, 3, 1, 2, 6, 4, 7, 5)
        out[i : i + count] = (codes << shifts).sum(-1, dtype=torch.int32).to(torch.int16).view(count, tiles_k, TILE_HALVES)
    return out


def by_columns(parts, n, groups, x_dtype):
    """Scales or offsets of zero points (n or 1, at most groups), as the kernels read them: along n, and zero past what there is.

    Returns:
        (groups, padded_rows(n)): int32, each a pair of the same two numbers of x_dtype, if that is parts' dtype; else float32.
    """
    wide = torch.zeros(groups, padded_rows(n), dtype=torch.float32, device=parts.device)
    wide[: parts.shape[1], :n] = parts.t()
    if parts.dtype != x_dtype:
        return wide
    return wide.to(x_dtype)[:, :, None].expand(-1, -1, 2).contiguous().view(torch.int32)[:, :, 0]


def offset(zero, bits, x_dtype):
    """What the decoder adds so that a code less its integer zero point is left: exact in x_dtype.

    -(power + zero point) for the power of two that the code is read in; 8-bit codes of bfloat16 come less 128: 128 - zero point.
    """
    power = -128.0 if bits == 8 and x_dtype == torch.bfloat16 else _MAGIC[DTYPES[x_dtype]][1]
    return (-(zero.float() + power)).to(x_dtype)


def lift(exponent, x_dtype):
    """The exponent of the power of two that a float with so many exponent bits comes without, where it is moved only."""
    return _PARTS[DTYPES[x_dtype]][1] - (2 ** (exponent - 1) - 1)


def exponents(scale, n, groups, element, x_dtype):
    """Scales in e8m0, codes (..., n, at most groups), as the kernels read them for float weights: exponent fields of x_dtype, with `lift` in them.

    Returns:
        uint8 (..., groups, padded_rows(n)), and the power of two that results are to be multiplied by. None where fields would overflow, or
        products with the smallest of the values would not be exact; it reads the scales.
    """
    bias = _PARTS[DTYPES[x_dtype]][1]
    shift = bias - 127 + lift(element.exponent, x_dtype)
    low, high = int(scale.min()), int(scale.max())
    down = max(0, high + shift - 2 * bias)
    # The smallest value is 2 to this; 2^(1 - bias) is the least normal number.
    smallest = 2 - 2 ** (element.exponent - 1) - element.mantissa
    if high == 255 or low + shift - down < 1 or low - 127 - down + smallest < 1 - bias:
        return None
    held = torch.zeros(*scale.shape[:-2], groups, padded_rows(n), dtype=torch.uint8, device=scale.device)
    held[..., : scale.shape[-1], :n] = (scale.int() + (shift - down)).mT.to(torch.uint8)
    return held, 2.0**down


@device_function
def pair(v, DTYPE: tl.constexpr):
    """A scale as a pair; exponent fields (uint8) become powers of two."""
    if v.dtype == tl.uint8:
        return (v.to(tl.int32) << (7 if DTYPE == "bf16" else 10)) * 65537
    else:
        return v


@device_function
def number(v, DTYPE: tl.constexpr):
    """A scale or an offset, as `by_columns` stores them, as float32."""
    if v.dtype == tl.int32:
        if DTYPE == "bf16":
            return (v & -65536).to(tl.float32, bitcast=True)
        else:
            return (v & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return v


def _move(bits, dtype, exponent, i, word):
    """PTX lines that leave field i of a word (two halves), a float, in $i, short of its `lift`."""
    mantissa = _PARTS[dtype][0]
    own = bits - 1 - exponent
    magnitude = f"0x{(((1 << (bits - 1)) - 1) << (mantissa - own)) * 0x10001:08X}"

    def shifted(name, left):
        return f"shl.b32 {name}, {word}, {left};" if left >= 0 else f"shr.u32 {name}, {word}, {-left};"

    return [
        shifted("t", mantissa - own - bits * i),
        f"and.b32 t, t, {magnitude};",
        shifted("s", 16 - bits - bits * i),
        f"lop3.b32 ${i}, s, 0x80008000, t, 0xEA;",
    ]


def _assembly(bits, dtype, how, zero, exponent):
    """PTX for a word (two halves, of one row or of two): the pairs of its fields, one output each, from the word and each half's zero point and scale."""
    fields = 16 // bits
    magic, power = _MAGIC[dtype]
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    kind = {"bf16": "bf16x2", "fp16": "f16x2"}[dtype]

    def pair(value):
        raw = torch.tensor(value, dtype=torch.float32).to(half).view(torch.int16).item() & 0xFFFF
        return f"0x{raw << 16 | raw:08X}"

    word, offset, scale = f"${fields}", "z", "c"
    scales = fields + 1 + 2 * zero
    mask = f"0x{((1 << bits) - 1) * 0x10001:08X}"
    lines = [
        ".reg .b32 t, s, one, off, nought, z, c;",
        ".reg .b16 a, b;",
        ".reg .f32 f, g;",
        f"mov.b32 one, {pair(1.0)};",
        f"mov.b32 nought, {pair(-0.0)};",
    ]
    # The compiler decides whose halves share a word: of each its own zero point and its own scale.
    lines += [f"prmt.b32 z, ${fields + 1}, ${fields + 2}, 0x7610;"] * zero
    lines += [f"prmt.b32 c, ${scales}, ${scales + 1}, 0x7610;"] * (how == "weight")
    signed_byte = bits == 8 and dtype == "bf16"
    if signed_byte:
        lines.append(f"mov.b32 off, {pair(-1.0)};")
    elif not zero:
        lines.append(f"mov.b32 off, {pair(-power - 2 ** (bits - 1))};")
    if exponent:
        up = lift(exponent, half)
        lines.append(f"mov.b32 off, {pair(2.0**up)};")
    for i in range(fields):
        source = word
        if exponent:
            lines += _move(bits, dtype, exponent, i, word)
            if how == "sums" and up:
                lines.append(f"fma.rn.{kind} ${i}, ${i}, off, nought;")
            elif how == "weight":
                lines.append(f"fma.rn.{kind} ${i}, ${i}, {scale}, nought;")
            continue
        if i:
            lines.append(f"shr.u32 t, {word}, {bits * i};")
            source = "t"
        if signed_byte:
            # 8 bits are one more than the mantissa has: the low 7, less 128 or, where the top bit is 0, 256.
            lines.append(f"lop3.b32 s, {source}, 0x00800080, 0x{magic:08X}, 0xAE;")
            lines.append(f"lop3.b32 t, {source}, 0x007F007F, 0x{magic:08X}, 0xEA;")
            lines.append(f"fma.rn.{kind} ${i}, s, off, t;")
            if zero:
                lines.append(f"fma.rn.{kind} ${i}, ${i}, one, {offset};")
        else:
            lines.append(f"lop3.b32 ${i}, {source}, {mask}, 0x{magic:08X}, 0xEA;")
            lines.append(f"fma.rn.{kind} ${i}, ${i}, one, {offset if zero else 'off'};")
        if how == "weight":
            # Adding -0 is a multiply, which bfloat16 has as an instruction of its own on the newest devices only.
            lines.append(f"fma.rn.{kind} ${i}, ${i}, {scale}, nought;")
        elif how == "weight32":
            if dtype == "bf16":
                lines.append(f"shl.b32 t, ${i}, 16; mov.b32 f, t; and.b32 t, ${i}, 0xFFFF0000; mov.b32 g, t;")
            else:
                lines.append(f"mov.b32 {{a, b}}, ${i}; cvt.f32.f16 f, a; cvt.f32.f16 g, b;")
            lines.append(f"mul.rn.f32 f, f, ${scales}; mul.rn.f32 g, g, ${scales + 1}; cvt.rn.{kind}.f32 ${i}, g, f;")
    return "{ " + " ".join(lines) + " }"


def _constraints(bits, how, zero):
    inputs = ["r"] + ["r", "r"] * zero + {"sums": [], "weight": ["r", "r"], "weight32": ["f", "f"]}[how]
    return ",".join(["=r"] * (16 // bits) + inputs)


@functools.cache
def assembly(bits, x_dtype, how, zero, exponent=0):
    """The constexprs ASSEMBLY and CONSTRAINTS of `fields`. exponent: bits of the exponent, 0 for integers; scales of floats are `exponents`."""
    return _assembly(bits, DTYPES[x_dtype], how, int(zero), exponent), _constraints(bits, how, int(zero))


@device_function
def fields(p, zero, scale, BITS: tl.constexpr, HOW: tl.constexpr, ASSEMBLY: tl.constexpr, CONSTRAINTS: tl.constexpr, DTYPE: tl.constexpr,
           INTERPRET: tl.constexpr, EXPONENT: tl.constexpr = 0):  # fmt: skip
    """The numbers in halves p (int16): a new last axis of 16 / BITS fields, of the products' type (float32 in the interpreter).

    HOW "sums": code - zero point. "weight", "weight32": times the scale (pairs, or float32), rounded to the products' type.
    zero: pairs, the `offset` of zero points, or None: codes are in offset binary. scale: None for "sums". Both have p's shape.
    EXPONENT: bits of a float's exponent; 0 for integers.
    """
    if INTERPRET:
        place = tl.arange(0, 16 // BITS)
        code = (tl.expand_dims(p.to(tl.int32), -1) >> (place * BITS)) & ((1 << BITS) - 1)
        if EXPONENT > 0:
            # Moved to float32's places, with the exponent of the products' type: short of its `lift`.
            v = ((code & ((1 << (BITS - 1)) - 1)) << (24 - BITS + EXPONENT)).to(tl.float32, bitcast=True)
            if DTYPE == "fp16":
                v *= 2.0**112
            v = tl.where(code >> (BITS - 1) == 0, v, -v)
            if HOW == "sums":
                return v * 2.0 ** ((127 if DTYPE == "bf16" else 15) + 1 - (1 << (EXPONENT - 1)))
            else:
                return v * tl.expand_dims(number(scale, DTYPE), -1)
        v = code.to(tl.float32)
        if zero is None:
            v -= 1 << (BITS - 1)
        else:
            v += tl.expand_dims(number(zero, DTYPE), -1) + (
                -128.0 if BITS == 8 and DTYPE == "bf16" else 128.0 if DTYPE == "bf16" else 1024.0
            )
        if HOW != "sums":
            v = to_float32(round_to_output(v * tl.expand_dims(number(scale, DTYPE), -1), tl.int16 if DTYPE == "bf16" else tl.float16))
        return v
    else:
        if HOW == "sums":
            inputs = [p] if zero is None else [p, zero]
        else:
            inputs = [p, scale] if zero is None else [p, zero, scale]
        if DTYPE == "bf16":
            v = tl.inline_asm_elementwise(ASSEMBLY, CONSTRAINTS, inputs, dtype=(tl.bfloat16,) * (16 // BITS), is_pure=True, pack=2)
        else:
            v = tl.inline_asm_elementwise(ASSEMBLY, CONSTRAINTS, inputs, dtype=(tl.float16,) * (16 // BITS), is_pure=True, pack=2)
        if BITS == 8:
            return tl.join(v[0], v[1])
        elif BITS == 4:
            return tl.reshape(tl.join(tl.join(v[0], v[2]), tl.join(v[1], v[3])), p.shape + [4])  # noqa: RUF005 (Triton knows no stars)
        else:
            even = tl.join(tl.join(v[0], v[4]), tl.join(v[2], v[6]))
            odd = tl.join(tl.join(v[1], v[5]), tl.join(v[3], v[7]))
            return tl.reshape(tl.join(even, odd), p.shape + [8])  # noqa: RUF005


@device_function
def finished(acc, INTERPRET: tl.constexpr):
    """acc, once the multiplies that add to it are done: for a loop that adds to acc without looking at it.

    wgmma goes on while it reads its first operand out of registers. Triton lets it run into the loop's next step, and waits before shared memory
    that is still read is written, but not so for registers: the next step's decoding would overwrite them. It does wait where acc is used.
    """
    if INTERPRET:
        return acc
    else:
        return tl.inline_asm_elementwise(
            "// finished", "=r,0" if acc.dtype == tl.int32 else "=f,0", [acc], dtype=acc.dtype, is_pure=True, pack=1
        )
