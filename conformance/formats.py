"""Which formats are drawn: the main ones by name, and generated ones of every element, granularity, scale and zero point."""

import functools

import torch
from hypothesis import strategies as st

from ref.element import NAMED, Codebook, Float, Int
from ref.format import FORMATS, Format, check_input_format, parse_format

GENERATED = "generated"
MAIN = (*FORMATS, GENERATED)

# How x is quantized: dynamic per token, per group, per tensor; static per tensor; static with dynamic groups; groups with token.
ACTIVATIONS = (
    *("int8_token", "int4_token", "fp8_e4m3_token", "fp8_e5m2_token", "fp4_e2m1_token"),
    *("int8_tensor", "fp8_e4m3_tensor", "int8_g128", "int4_g64", "fp8_e4m3_g128"),
    *("fp8_e4m3_g32_e8m0", "fp8_e5m2_g32_e8m0", "fp4_e2m1_g32_e8m0"),
    *("fp4_e2m1_g16_e4m3_tensor2", "fp4_e2m1_g16_e4m3_channel2"),
)

CODEBOOKS = (
    *(NAMED["nf4"], NAMED["iq4nl"]),
    Codebook("ternary", (-1.0, 0.0, 1.0, 0.0)),
    Codebook("sign", (-1.0, 1.0)),
    Codebook("eighths", tuple((i - 3) ** 3 / 8 for i in range(8))),
    Codebook("wide", tuple(float((i - 100) * abs(i - 100)) for i in range(256))),
)
GROUPS = (16, 32, 64, 128, 0, 1, 3, 7, 24, 48, 100)
SCALES = ("fp32", "fp16", "bf16", "e4m3", "e5m2", "ue5m3", "e8m0")


@functools.cache
def floats(largest_exponent=7):
    """Every ExMy element of 2 to 8 bits, signed and unsigned, with each kind of special codes that leaves it a number."""
    found = []
    for e in range(largest_exponent + 1):
        for m in range(9 - e):
            for signed in (True, False):
                for specials in ("finite", "fn", "ieee"):
                    legal = 2 <= signed + e + m <= 8 and e + m > 0
                    legal = legal and not (specials == "ieee" and (e == 0 or e == 1)) and not (specials == "fn" and e + m < 2)
                    if legal:
                        found.append(Float(e, m, signed, specials))
    return tuple(found)


INTS = st.builds(Int, st.integers(1, 8), st.booleans())
ELEMENTS = st.one_of(INTS, st.sampled_from(floats()), st.sampled_from(CODEBOOKS))


@st.composite
def generated(draw):
    """A weight format."""
    element = draw(ELEMENTS)
    gk = draw(st.sampled_from(GROUPS))
    gn = draw(st.sampled_from((1, 1, 1, 1, 0, 2, 5, 128)))
    zero = draw(st.sampled_from((None, "int", "fp16", "bf16", "fp32"))) if isinstance(element, Int) and not element.signed else None
    scale_2 = draw(st.sampled_from((None, None, None, None, "tensor", "channel", "tensor_divisor", "channel_divisor")))
    offset = draw(st.sampled_from((None, None, None, "fp16", "bf16", "fp32"))) if zero is None and scale_2 is None else None
    rotation = draw(st.sampled_from((0, 0, 0, 0, 2, 4, 16, 64)))
    return short(Format(element, draw(st.sampled_from(SCALES)), (gn, gk), zero, scale_2, rotation, offset))


@st.composite
def generated_activation(draw):
    """A format that quantize_input takes."""
    element = draw(st.one_of(st.builds(Int, st.integers(2, 8)), st.sampled_from([f for f in floats(5) if f.signed and f.mantissa])))
    kind = draw(st.sampled_from(("token", "group", "tensor", "tensor2", "channel2")))
    group = {"token": (1, 0), "tensor": (0, 0)}.get(kind) or (1, draw(st.sampled_from(GROUPS[:4] + GROUPS[5:])))
    second = kind in ("tensor2", "channel2")
    scale = "e4m3" if second else draw(st.sampled_from(("fp32", "fp32", "bf16", "e8m0") if kind != "tensor" else ("fp32",)))
    return short(Format(element, scale, group, scale_2=kind[:-1] if second else None, hadamard=draw(st.sampled_from((0, 0, 0, 16)))))


def short(fmt):
    """The format's name where it parses back, else the format."""
    try:
        return str(fmt) if parse_format(str(fmt)) == fmt else fmt
    except ValueError:
        return fmt


def choose(label, otherwise):
    """A strategy for the format of a row of the report."""
    return otherwise if label == GENERATED else st.just(label)


def matching_activations(label):
    """Activation formats of the kind that a weight format usually meets first: x's element like the weight's, groups alike."""
    if label == GENERATED:
        return ACTIVATIONS
    element = parse_format(label).element
    family = "int" if isinstance(element, Int) else "fp4" if element.bits <= 4 else "fp8"
    return tuple(name for name in ACTIVATIONS if name.startswith(family))


def is_activation(name):
    """Whether quantize_input takes the format."""
    fmt = parse_format(name)
    try:
        check_input_format(fmt, torch.ones(1) if fmt.scale_2 == "tensor" else None, "quantize_input")
    except ValueError:
        return False
    return True
