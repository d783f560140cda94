"""GGUF's block types, as a table: where codes and scales are in a block's bytes, and what format they make.

A row of k weights is k / size blocks, one behind the other. d, m and dmin are float16; bytes are little-endian. Scales in two
levels (d times an integer, exact in float32) are folded into one; a minimum (m, or -dmin times an integer) is the format's offset.

Source: ggml's ggml-common.h and ggml-quants.c. Everything here is checked against gguf 0.19.0's dequantize (the golden vectors)
except for Q1_0, which that package cannot decode: its meaning (bit 1 is d, bit 0 is -d, lowest bit first) is read, not checked.
"""

from dataclasses import dataclass

import torch

from ..element import NAMED, Codebook, Float, Int
from ..format import Format
from .gguf_codes import alike, even, grid, half_of_nibbles, quads, ternary, trits, unsigned_e4m3
from .gguf_fields import Field, half, levels, planes, six_bits, strided, sub, words

# The values that vectors of a grid are made of; a sign (or shift) bit on top of the digit. Values of unused digits are 0.
IQ2 = Codebook("iq2", (8, 25, 43, 0, -8, -25, -43, 0))
IQ3_XXS = Codebook("iq3_xxs", tuple(s * v for s in (1, -1) for v in (4, 12, 20, 28, 36, 44, 52, 62)))
IQ3_S = Codebook("iq3_s", tuple(s * v for s in (1, -1) for v in range(1, 17, 2)))
IQ1 = Codebook("iq1", (-0.875, 0.125, 1.125, 0, -1.125, -0.125, 0.875, 0))
SIGN = Codebook("sign", (-1.0, 1.0))


@dataclass(frozen=True)
class Block:
    """A block type: its id in files, weights and bytes of a block, the format that it makes, and its fields."""

    id: int
    size: int
    nbytes: int
    format: Format
    codes: Field
    scale: Field
    offset: Field | None = None


def _format(element, scale, group, offset=None):
    return Format(element, scale, (1, group), offset=offset)


def _uint(bits):
    return Int(bits, signed=False)


def _k4(at, mins, unit=1.0):
    return levels(half(2 * mins), six_bits(at, mins), 63, unit=unit)


# Plain tensors: id and dtype.
PLAIN = {
    "F32": (0, torch.float32),
    "F16": (1, torch.float16),
    "I8": (24, torch.int8),
    "I16": (25, torch.int16),
    "I32": (26, torch.int32),
    "I64": (27, torch.int64),
    "F64": (28, torch.float64),
    "BF16": (30, torch.bfloat16),
}

_I16, _I32 = torch.int16, torch.int32
_SEVENS = (0, 7, 14, 21)
_THREES = (0, 3, 6, 9)
_IQ1_M_NIBBLES = planes((32, 16, 4, 1))

BLOCKS = {
    "Q4_0": Block(2, 32, 18, _format(Int(4), "fp16", 32), planes((2, 16, 4, 16)), half(0)),
    "Q4_1": Block(3, 32, 20, _format(_uint(4), "fp16", 32, "fp16"), planes((4, 16, 4, 16)), half(0), half(2)),
    "Q5_0": Block(6, 32, 22, _format(Int(5), "fp16", 32), planes((6, 16, 4, 16), (2, 4, 1, 1)), half(0)),
    "Q5_1": Block(7, 32, 24, _format(_uint(5), "fp16", 32, "fp16"), planes((8, 16, 4, 16), (4, 4, 1, 1)), half(0), half(2)),
    "Q8_0": Block(8, 32, 34, _format(Int(8), "fp16", 32), planes((2, 32, 8, 1), flip=128), half(0)),
    "Q2_K": Block(
        10, 256, 84, _format(_uint(2), "fp32", 16, "fp32"), planes((16, 64, 2, 32)),
        levels(half(80), strided(0, 1, 16, bits=4), 15), levels(half(82), strided(0, 1, 16, shift=4, bits=4), 15, unit=-1.0),
    ),
    "Q3_K": Block(
        11, 256, 110, _format(Int(3), "fp32", 16), planes((32, 64, 2, 32), (0, 32, 1, 32)),
        levels(half(108), planes((96, 8, 4, 8), (104, 4, 2, 4)), 63, low=-32),
    ),
    "Q4_K": Block(12, 256, 144, _format(_uint(4), "fp32", 32, "fp32"), planes((16, 128, 4, 32)), _k4(4, 0), _k4(4, 1, -1.0)),
    "Q5_K": Block(
        13, 256, 176, _format(_uint(5), "fp32", 32, "fp32"), planes((48, 128, 4, 32), (16, 32, 1, 32)), _k4(4, 0), _k4(4, 1, -1.0),
    ),
    "Q6_K": Block(
        14, 256, 210, _format(Int(6), "fp32", 16), planes((0, 128, 4, 64), (128, 64, 2, 32)),
        levels(half(208), planes((192, 16, 8, 1), flip=128), 255, low=-128, zero=128),
    ),
    "IQ2_XXS": Block(
        16, 256, 66, _format(IQ2, "fp32", 32), grid("IQ2_XXS", quads(2, 8, 8), even(words(_I32, 6, 8, 8, _SEVENS, 7))),
        levels(half(0), words(_I32, 6, 8, 8, (28,), 4), 15, low=1, step=2, unit=0.125),
    ),
    "IQ2_XS": Block(
        17, 256, 74, _format(IQ2, "fp32", 16), grid("IQ2_XS", strided(2, 2, 32), even(strided(3, 2, 32, 1, 7)), strided(3, 2, 32, 0, 1)),
        levels(half(0), planes((66, 8, 4, 1)), 15, low=1, step=2, unit=0.125),
    ),
    "IQ3_XXS": Block(
        18, 256, 98, _format(IQ3_XXS, "fp32", 32), grid("IQ3_XXS", strided(2, 1, 64), even(words(_I32, 66, 4, 8, _SEVENS, 7))),
        levels(half(0), words(_I32, 66, 4, 8, (28,), 4), 15, low=1, step=2, unit=0.25),
    ),
    "IQ1_S": Block(
        19, 256, 50, _format(IQ1, "fp32", 32),
        grid("IQ1", strided(2, 1, 32), alike(words(_I16, 34, 2, 8, (15,), 1), 4), words(_I16, 34, 2, 8, _THREES, 3)),
        levels(half(0), words(_I16, 34, 2, 8, (12,), 3), 7, low=1, step=2),
    ),
    "IQ4_NL": Block(20, 32, 18, _format(NAMED["iq4nl"], "fp16", 32), planes((2, 16, 4, 16)), half(0)),
    "IQ3_S": Block(
        21, 256, 110, _format(IQ3_S, "fp32", 32), grid("IQ3_S", strided(2, 1, 64), strided(74, 1, 32), planes((66, 8, 1, 1))),
        levels(half(0), planes((106, 4, 4, 1)), 15, low=1, step=2),
    ),
    "IQ2_S": Block(
        22, 256, 82, _format(IQ2, "fp32", 16), grid("IQ2_S", strided(2, 1, 32), strided(34, 1, 32), planes((66, 8, 2, 1))),
        levels(half(0), planes((74, 8, 4, 1)), 15, low=1, step=2, unit=0.125),
    ),
    "IQ4_XS": Block(
        23, 256, 136, _format(NAMED["iq4nl"], "fp32", 32), planes((8, 128, 4, 16)),
        levels(half(0), planes((4, 4, 4, 1), (2, 2, 2, 1)), 63, low=-32),
    ),
    "IQ1_M": Block(
        29, 256, 56, _format(IQ1, "fp32", 16), grid("IQ1", strided(0, 1, 32), alike(sub(_IQ1_M_NIBBLES, 3, 1), 1), sub(_IQ1_M_NIBBLES, 0, 3)),
        levels(half_of_nibbles(words(_I16, 48, 2, 4, (12,), 4)), words(_I16, 48, 2, 4, _THREES, 3), 7, low=1, step=2),
    ),
    "TQ1_0": Block(34, 256, 54, _format(Int(2), "fp16", 256), trits((0, 32, 5), (32, 16, 5), (48, 4, 4)), half(52)),
    "TQ2_0": Block(35, 256, 66, _format(Int(2), "fp16", 256), ternary(planes((0, 64, 2, 32))), half(64)),
    "MXFP4": Block(39, 32, 17, _format(Float(2, 1), "e8m0", 32), planes((1, 16, 4, 16)), strided(0, 1, 1)),
    "NVFP4": Block(40, 64, 36, _format(Float(2, 1), "e4m3", 16), planes((4, 32, 4, 8)), unsigned_e4m3(strided(0, 1, 4))),
    "Q1_0": Block(41, 128, 18, _format(SIGN, "fp16", 128), planes((2, 16, 1, 1)), half(0)),
}  # fmt: skip

# Types that files may name and nothing here reads, and why.
REFUSED = {
    4: "Q4_2 was removed from the format",
    5: "Q4_3 was removed from the format",
    9: "Q8_1 is for activations at run time, not for files",
    15: "Q8_K is for activations at run time, not for files",
    31: "Q4_0_4_4 was removed from the format: Q4_0 takes its place",
    32: "Q4_0_4_8 was removed from the format: Q4_0 takes its place",
    33: "Q4_0_8_8 was removed from the format: Q4_0 takes its place",
    36: "IQ4_NL_4_4 was removed from the format: IQ4_NL takes its place",
    37: "IQ4_NL_4_8 was removed from the format: IQ4_NL takes its place",
    38: "IQ4_NL_8_8 was removed from the format: IQ4_NL takes its place",
    42: "Q2_0 has blocks of 64 weights in some writers and of 128 in others, and nothing in the file says which",
}
