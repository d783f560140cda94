"""Formats: an element, and the scales, zero points and rotation that turn its values into weights.

A format is a value. A new one is one entry in FORMATS; nothing else in the project asks which format it has.
"""

import difflib
import functools
import re
from dataclasses import dataclass

import torch

from .element import NAMED, Codebook, Float, Int, parse_element

# What a scale is stored as: a torch dtype, or the codes (uint8) of an 8-bit element.
SCALE_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": NAMED["e4m3"],
    "e5m2": NAMED["e5m2"],
    "ue5m3": NAMED["ue5m3"],
    "e8m0": NAMED["e8m0"],
}
ZERO_DTYPES = ("int", "fp32", "fp16", "bf16")
# What a second-level scale belongs to, and the part of a format's name that says so.
SCALE_2 = {"tensor": "tensor2", "channel": "channel2", "tensor_divisor": "tensor2div", "channel_divisor": "channel2div"}


@dataclass(frozen=True)
class Format:
    """What the parts of a QTensor mean: w[n, k] = (value[code] - zero) * scale * scale_2 + offset, then the inverse rotation.

    element: the map from code to value.
    scale: the name of the scale's dtype, a key of SCALE_DTYPES.
    group: (gn, gk): how many rows and columns share one scale (and zero); 0 means the whole axis.
        tensor (0, 0), channel (1, 0), group of g along k (1, g), block (gn, gk). A last, partial group is a group.
    zero: None, "int" (stored as uint8) or the name of a float dtype; only with unsigned integers. It is subtracted before scaling.
    scale_2: None, "tensor" (one float32) or "channel" (a float32 for each row): the second-level scale. "tensor_divisor" and
        "channel_divisor" divide by it: 1 / scale_2 is no float32 in general, so checkpoints that store divisors need their own word.
    hadamard: 0, or the size of the blocks along k that an orthonormal Hadamard matrix has rotated before quantization.
    offset: None, or the name of the float dtype of what is added after scaling, one for each group.

    Format names parse and print: int4_g128, uint4z_g64, fp8_e4m3_b128x128, mxfp4, nvfp4, nf4_g64 (see parse_format).
    """

    element: Int | Float | Codebook
    scale: str = "fp32"
    group: tuple = (1, 0)
    zero: str | None = None
    scale_2: str | None = None
    hadamard: int = 0
    offset: str | None = None

    def __post_init__(self):
        if self.scale not in SCALE_DTYPES:
            raise ValueError(f"Format: unknown scale dtype {self.scale!r}, expected one of {', '.join(SCALE_DTYPES)}")
        if len(self.group) != 2 or not all(isinstance(g, int) and g >= 0 for g in self.group):
            raise ValueError(f"Format: got group={self.group}, expected (rows, columns), each 0 (the whole axis) or more")
        if self.zero is not None and (self.zero not in ZERO_DTYPES or not isinstance(self.element, Int) or self.element.signed):
            raise ValueError(
                f"Format: got zero={self.zero!r} on {self.element}: expected one of {', '.join(ZERO_DTYPES)}, on an unsigned integer"
            )
        if self.scale_2 is not None and self.scale_2 not in SCALE_2:
            raise ValueError(f"Format: got scale_2={self.scale_2!r}, expected None or one of {', '.join(SCALE_2)}")
        if self.offset is not None and (self.offset not in ZERO_DTYPES[1:] or self.zero is not None or self.scale_2 is not None):
            raise ValueError(
                f"Format: got offset={self.offset!r}, expected None or one of {', '.join(ZERO_DTYPES[1:])}, without zero and scale_2"
            )
        if self.hadamard < 0 or self.hadamard & (self.hadamard - 1):
            raise ValueError(f"Format: got hadamard={self.hadamard}, expected 0 or a power of two")

    def __str__(self):
        for name, fmt in FORMATS.items():
            if fmt == self:
                return name
        element = f"fp{self.element.bits}_{self.element}" if isinstance(self.element, Float) else str(self.element)
        parts = [element + ("z" if self.zero == "int" else ""), _granularity(self.group)]
        parts += [self.scale] if self.scale != "fp32" else []
        parts += [f"z{self.zero}"] if self.zero not in (None, "int") else []
        parts += [f"o{self.offset}"] if self.offset else []
        parts += [SCALE_2[self.scale_2]] if self.scale_2 else []
        parts += [f"h{self.hadamard}"] if self.hadamard else []
        return "_".join(p for p in parts if p)

    def scale_shape(self, shape):
        """The scale's shape for codes of logical shape (..., n, k)."""
        *lead, n, k = shape
        gn, gk = self.group
        return (*lead, -(-n // gn) if gn else 1, -(-k // gk) if gk else 1)

    def bits_per_weight(self, shape):
        """Stored bits per weight, scales and zero points included, for codes of logical shape (..., n, k)."""
        *lead, n, k = shape
        count = torch.Size(lead).numel()
        groups = torch.Size(self.scale_shape(shape)).numel()
        bits = count * n * k * self.element.bits + groups * (_bits(self.scale) + _bits(self.zero) + _bits(self.offset))
        bits += count * 32 * (0 if self.scale_2 is None else n if self.scale_2.startswith("channel") else 1)
        return bits / max(count * n * k, 1)


def _bits(name):
    return {None: 0, "int": 8, "fp32": 32, "fp16": 16, "bf16": 16}.get(name, 8)


def _granularity(group):
    gn, gk = group
    if group == (1, 0):
        return ""
    if group == (0, 0):
        return "tensor"
    return f"g{gk}" if gn == 1 else f"b{gn}x{gk}"


FORMATS = {
    "int8": Format(Int(8)),
    "int4": Format(Int(4)),
    "int4_g128": Format(Int(4), group=(1, 128)),
    "int4_g128_bf16": Format(Int(4), scale="bf16", group=(1, 128)),
    "int4_g32": Format(Int(4), group=(1, 32)),
    "int3_g128": Format(Int(3), group=(1, 128)),
    "int2_g64": Format(Int(2), group=(1, 64)),
    "uint4z_g128": Format(Int(4, signed=False), group=(1, 128), zero="int"),
    "uint4_g32_fp16_ofp16": Format(Int(4, signed=False), scale="fp16", group=(1, 32), offset="fp16"),
    "uint4_g64_fp16_zfp16": Format(Int(4, signed=False), scale="fp16", group=(1, 64), zero="fp16"),
    "fp8": Format(NAMED["e4m3"]),
    "fp8_e5m2": Format(NAMED["e5m2"]),
    "fp8_e4m3_b128x128": Format(NAMED["e4m3"], group=(128, 128)),
    "fp6_e3m2": Format(Float(3, 2)),
    "mxfp4": Format(Float(2, 1), scale="e8m0", group=(1, 32)),
    "mxfp6_e2m3": Format(Float(2, 3), scale="e8m0", group=(1, 32)),
    "mxfp6_e3m2": Format(Float(3, 2), scale="e8m0", group=(1, 32)),
    "mxfp8": Format(NAMED["e4m3"], scale="e8m0", group=(1, 32)),
    "mxfp8_e5m2": Format(NAMED["e5m2"], scale="e8m0", group=(1, 32)),
    "nvfp4": Format(Float(2, 1), scale="e4m3", group=(1, 16), scale_2="tensor"),
    "nf4_g64": Format(NAMED["nf4"], group=(1, 64)),
}


def parse_format(name):
    """The format called `name`.

    A name in FORMATS, or parts joined by "_": an element (int4; uint4z with an integer zero point; fp8_e4m3, fp6_e3m2,
    fp4_e2m1; nf4), then in any order a granularity (tensor, channel, g128, b128x128; token is channel, said of
    activations; channel where none is given), the scale's dtype (fp32 where none is given), the float zero point's dtype
    (zfp16), the offset's dtype (ofp16), a second-level scale (tensor2, channel2, tensor2div, channel2div), a rotation (h128).
    "fp8" alone is e4m3, "fp4" alone is e2m1.

    Args:
        name: str, or a Format, which is returned as it is.

    Raises:
        ValueError: the name does not parse; the message has the nearest name.

    >>> parse_format("int4_g128").group
    (1, 128)
    >>> str(parse_format("fp4_e2m1_g32_e8m0"))
    'mxfp4'
    """
    if isinstance(name, Format):
        return name
    if not isinstance(name, str):
        raise TypeError(f"format: got {type(name).__name__}, expected a name or a Format")
    if name in FORMATS:
        return FORMATS[name]
    try:
        return _parse(name)
    except ValueError as error:
        nearest = difflib.get_close_matches(name, FORMATS, n=1, cutoff=0.0)
        raise ValueError(f"format: unknown name {name!r} ({error}); the nearest is {nearest[0]!r}") from None


@functools.cache
def _parse(name):
    head, *parts = name.split("_")
    fields = {}
    if match := re.fullmatch(r"fp(\d)", head):
        if parts and re.fullmatch(r"u?e\d.*", parts[0]):
            element = parse_element(parts.pop(0))
        elif head in ("fp8", "fp4"):
            element = parse_element({"fp8": "e4m3", "fp4": "e2m1"}[head])
        else:
            raise ValueError(f"{head} needs its element, as fp6_e3m2")
        if element.bits != int(match[1]):
            raise ValueError(f"{element} has {element.bits} bits, not {match[1]}")
    elif match := re.fullmatch(r"(uint[1-8])z", head):
        element, fields["zero"] = parse_element(match[1]), "int"
    else:
        element = parse_element(head)
    for part in parts:
        field, value = _parse_part(part)
        if field in fields:
            raise ValueError(f"{part!r} gives {field} a second time")
        fields[field] = value
    return Format(element, **fields)


def _parse_part(part):
    if part in ("tensor", "channel", "token"):
        return "group", (0, 0) if part == "tensor" else (1, 0)
    if match := re.fullmatch(r"g([1-9]\d*)", part):
        return "group", (1, int(match[1]))
    if match := re.fullmatch(r"b(\d+)x(\d+)", part):
        return "group", (int(match[1]), int(match[2]))
    if part in SCALE_DTYPES:
        return "scale", part
    if part[:1] == "z" and part[1:] in ZERO_DTYPES:
        return "zero", part[1:]
    if part[:1] == "o" and part[1:] in ZERO_DTYPES[1:]:
        return "offset", part[1:]
    if part in SCALE_2.values():
        return "scale_2", next(kind for kind, name in SCALE_2.items() if name == part)
    if match := re.fullmatch(r"h([1-9]\d*)", part):
        return "hadamard", int(match[1])
    raise ValueError(f"{part!r} is no part of a format name")


def check_input_format(fmt, x_scale, operation):
    """Refuse a format that activations cannot have, or an x_scale that does not belong to it. Reads no data.

    Args:
        x_scale: a tensor with one floating-point value, or None.
        operation: the name that messages begin with.

    Raises:
        TypeError, ValueError: what was got, and what was expected.
    """
    element = fmt.element
    if isinstance(element, Codebook) or not element.signed or (isinstance(element, Int) and element.bits < 2) or fmt.zero is not None:
        raise ValueError(f"{operation}: x cannot be quantized to {fmt}: expected signed integers of 2 bits or more, or signed floats")
    if fmt.offset is not None or (fmt.scale_2 or "").endswith("divisor"):
        raise ValueError(f"{operation}: x cannot be quantized to {fmt}: expected no offset, and no divisor")
    if fmt.group not in ((0, 0), (1, 0)) and (fmt.group[0] != 1 or fmt.group[1] == 0):
        raise ValueError(f"{operation}: x cannot be quantized to {fmt}: expected scales by tensor, token or group")
    if fmt.scale_2 is not None and (fmt.group[1] == 0 or (fmt.scale_2 == "channel" and fmt.scale != "e4m3")):
        raise ValueError(f"{operation}: x cannot be quantized to {fmt}: expected scales by group under scale_2, and e4m3 under a token's")
    static = fmt.group == (0, 0) or fmt.scale_2 == "tensor"
    if x_scale is None:
        if fmt.scale_2 == "tensor":
            raise ValueError(f"{operation}: {fmt} needs x_scale, the static scale of the tensor")
        return
    if not static:
        raise ValueError(f"{operation}: got x_scale, but the scales of {fmt} are dynamic")
    if not isinstance(x_scale, torch.Tensor) or not x_scale.dtype.is_floating_point:
        got = x_scale.dtype if isinstance(x_scale, torch.Tensor) else type(x_scale).__name__
        raise TypeError(f"{operation}: x_scale is {got}, expected a floating-point tensor with one value")
    if x_scale.numel() != 1:
        raise ValueError(f"{operation}: x_scale has shape {tuple(x_scale.shape)}, expected one value")
