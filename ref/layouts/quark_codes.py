"""How AMD Quark stores codes and zero points: packed by dtype, some of them transposed.

    dtype         container              along each row
    int4, uint4   int32, 8 codes         pack_method "reorder": bits 4i hold code (0, 2, 4, 6, 1, 3, 5, 7)[i]; "order": code i
    int3          uint8, 8 codes in 3    little-endian stream of 3 bits
    int2          int32, a code each     plain
    uint2         uint8, 4 codes         the first in the highest bits
    int8, uint8   int8, uint8            plain
    fp4           uint8, 2 codes         the first in the low half
    fp6_*         uint8, 4 codes in 3    little-endian stream of 6 bits
    fp8_*         float8                 plain

Signed integers are two's complement. With qscheme per_group, integers but int3 are stored transposed: rows are k's, and codes
of neighbouring n share a byte or word, the last of which is filled with zeros. Zero points are packed as codes are, where codes of one row
are those of one group.

Source: amd-quark 0.13, quark.torch.utils.pack.
"""

import torch

from ..element import NAMED, Float, Int
from ..pack import unpack
from . import bits
from .check import part

REORDER = (0, 2, 4, 6, 1, 3, 5, 7)
INTEGERS = {
    "int2": (2, True),
    "uint2": (2, False),
    "int3": (3, True),
    "int4": (4, True),
    "uint4": (4, False),
    "int8": (8, True),
    "uint8": (8, False),
}
FLOATS = {
    "fp4": Float(2, 1),
    "fp6_e2m3": Float(2, 3),
    "fp6_e3m2": Float(3, 2),
    "fp8_e4m3": NAMED["e4m3"],
    "fp8_e5m2": NAMED["e5m2"],
}
FLOAT8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
# Codes of one row come in multiples of this.
MULTIPLE = {"int3": 8, "int4": 8, "uint4": 8, "uint2": 4, "fp4": 2, "fp6_e2m3": 4, "fp6_e3m2": 4}


def dtype_of(element):
    """The dtype that stores an element, or None."""
    if isinstance(element, Int):
        return next((name for name, key in INTEGERS.items() if key == (element.bits, element.signed)), None)
    return next((name for name, value in FLOATS.items() if value == element), None)


def transposed(dtype, qscheme):
    """Whether codes (and integer zero points) are stored with rows and columns exchanged."""
    return qscheme == "per_group" and dtype in INTEGERS and dtype != "int3"


def read_integers(parts, name, dtype, order):
    """Codes uint8 (rows, columns) of a stored tensor, as it lies there; offset binary where dtype is signed. One axis counts as one row.

    Raises:
        ValueError: another torch dtype or shape, or a value out of range.
    """
    width, signed = INTEGERS[dtype]
    containers = {"int2": (torch.int32, torch.int8), "int8": (torch.int8,), "uint8": (torch.uint8,)}
    container = containers.get(dtype, (torch.int32,) if width == 4 else (torch.uint8,))
    data = part(parts, "quark", name, container)
    if data.dim() not in (1, 2):
        raise ValueError(f"quark: {name} has shape {tuple(data.shape)}, expected one or two axes")
    if dtype == "int3" and data.shape[-1] % 3:
        raise ValueError(f"quark: {name} has shape {tuple(data.shape)}, expected a multiple of 3 columns: 8 codes take 3 bytes")
    data = data.unsqueeze(0) if data.dim() == 1 else data
    if dtype == "int2":
        if data.numel() and not -2 <= int(data.min()) <= int(data.max()) <= 1:
            raise ValueError(f"quark: {name} ranges from {int(data.min())} to {int(data.max())}, expected -2 to 1")
        return (data + 2).to(torch.uint8)
    if dtype == "uint2":
        return torch.stack([data >> shift & 3 for shift in (6, 4, 2, 0)], dim=-1).flatten(-2)
    if dtype == "int3":
        codes = bits.stream(data, 3, data.shape[-1] // 3 * 8)
    elif width == 4:
        codes = bits.words(data, 4, order)
    else:
        codes = data
    return bits.from_twos(codes, width) if signed else codes.clone()


def write_integers(codes, name, dtype, order, fill=False):
    """The inverse of read_integers, for codes (rows, columns).

    Args:
        fill: whether Quark pads the last word of a row (it does where codes are transposed).

    Raises:
        ValueError: a row of codes that does not fill its words.
    """
    width, signed = INTEGERS[dtype]
    multiple = MULTIPLE.get(dtype, 1)
    codes = bits.to_twos(codes, width) if signed else codes
    if codes.shape[-1] % multiple:
        if width != 4 or not fill:
            raise ValueError(
                f"quark: {name} has rows of {codes.shape[-1]} codes, expected a multiple of {multiple}: {dtype} fills whole words"
            )
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % multiple))
    if dtype == "int2":
        return bits.sign_extended(bits.from_twos(codes, 2), 2).to(torch.int32)
    if dtype == "uint2":
        first, second, third, fourth = codes.unflatten(-1, (-1, 4)).unbind(-1)
        return first << 6 | second << 4 | third << 2 | fourth
    if dtype == "int3":
        return bits.join_stream(codes, 3)
    if width == 4:
        return bits.join_words(codes, 4, order)
    return codes.view(torch.int8) if signed else codes.clone()


def read_floats(parts, dtype):
    """(packed, shape) of weight (..., n, columns): the stored bytes are a little-endian stream already.

    Raises:
        ValueError: another torch dtype or shape.
    """
    element = FLOATS[dtype]
    weight = part(parts, "quark", "weight", (FLOAT8.get(dtype, torch.uint8),))
    if weight.dim() not in (2, 3) or weight.shape[-1] * 8 % (element.bits * MULTIPLE.get(dtype, 1)):
        what = f"(n, k * {element.bits} / 8)" if dtype not in FLOAT8 else "(n, k)"
        raise ValueError(f"quark: weight has shape {tuple(weight.shape)}, expected {what}, or (e, n, ...) for a stack")
    return bits.from_bytes(weight.contiguous()), (*weight.shape[:-1], weight.shape[-1] * 8 // element.bits)


def write_floats(q, dtype):
    """The inverse of read_floats."""
    k, multiple = q.shape[-1], MULTIPLE.get(dtype, 1)
    if k % multiple:
        raise ValueError(f"quark: got k={k}, expected a multiple of {multiple}: {dtype} fills whole bytes")
    data = bits.to_bytes(q.packed, k * q.format.element.bits // 8)
    return data.view(FLOAT8[dtype]) if dtype in FLOAT8 else data


def read_mx(parts, dtype):
    """(packed, e8m0 codes, shape) of dtype "mx": blocks of 32 codes behind their exponent, or beside it in weight_scale.

    A block is 16 bytes of fp4, or for fp6 8 times 3 bytes: the two high bits of four codes, the first in the highest bits, then
    the four low bits of each, the first in the high half. Its exponent is an int8 without bias: w = value * 2^exponent.

    Raises:
        ValueError: another torch dtype or shape, or an exponent of -128, which e8m0 does not have.
    """
    element = FLOATS[dtype]
    size = 4 * element.bits
    weight = part(parts, "quark", "weight", (torch.uint8,), (-1, -1), f"(n, k / 32 * {size}), or a byte more for each 32")
    joined = parts.get("weight_scale") is None
    if weight.shape[1] % (size + joined):
        raise ValueError(
            f"quark: weight has shape {tuple(weight.shape)}, expected a multiple of {size + joined} columns: blocks of 32 codes"
        )
    n, groups = weight.shape[0], weight.shape[1] // (size + joined)
    if joined:
        exponent, data = weight.reshape(n, groups, size + 1).split([1, size], dim=-1)
        exponent, data = exponent.squeeze(-1).contiguous(), data.contiguous()
    else:
        exponent = part(parts, "quark", "weight_scale", (torch.uint8, torch.int8), (n, groups), "(n, k / 32)").contiguous()
        data = weight.reshape(n, groups, size)
    exponent = exponent.view(torch.int8)
    if bool((exponent == -128).any()):
        raise ValueError("quark: weight_scale has the exponent -128, expected -127 to 127 (e8m0)")
    if dtype != "fp4":
        data = data.reshape(n, groups, 8, 3)
        high = torch.stack([data[..., 0] >> shift & 3 for shift in (6, 4, 2, 0)], dim=-1)
        low = torch.stack([data[..., 1] >> 4, data[..., 1] & 15, data[..., 2] >> 4, data[..., 2] & 15], dim=-1)
        data = bits.join_stream((high << 4 | low).reshape(n, 32 * groups), 6)
    scale = (exponent.to(torch.int16) + 127).to(torch.uint8)
    return bits.from_bytes(data.reshape(n, groups * size)), scale, (n, 32 * groups)


def write_mx(q, dtype, joined):
    """The inverse of read_mx: {"weight": ...} with the exponents in it (joined), or weight and weight_scale."""
    n, k = q.shape
    groups, width = k // 32, q.format.element.bits
    data = bits.to_bytes(q.packed, k * width // 8)
    if width == 6:
        codes = unpack(q.packed, 6, k).reshape(n, groups, 8, 4)
        first, second, third, fourth = (codes >> 4).unbind(-1)
        low = codes & 15
        high = first << 6 | second << 4 | third << 2 | fourth
        data = torch.stack([high, low[..., 0] << 4 | low[..., 1], low[..., 2] << 4 | low[..., 3]], dim=-1)
    data = data.reshape(n, groups, 4 * width)
    exponent = (q.scale.to(torch.int16) - 127).to(torch.int8).view(torch.uint8)
    if joined:
        return {"weight": torch.cat([exponent.unsqueeze(-1), data], dim=-1).reshape(n, groups * (4 * width + 1))}
    return {"weight": data.reshape(n, groups * 4 * width), "weight_scale": exponent}
