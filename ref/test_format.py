"""Formats: names parse and print, shapes of scales, bits per weight, errors."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .element import NAMED, Float, Int, parse_element
from .format import FORMATS, SCALE_2, SCALE_DTYPES, Format, parse_format
from .test_element import FLOATS, INTS

GROUPS = st.sampled_from([(0, 0), (1, 0), (1, 1), (1, 16), (1, 64), (1, 128), (128, 128), (8, 16), (0, 32), (4, 0), (2, 1)])


@st.composite
def formats(draw):
    element = draw(st.sampled_from(FLOATS + INTS + [NAMED["nf4"], NAMED["iq4nl"]]))
    unsigned = isinstance(element, Int) and not element.signed
    zero = draw(st.sampled_from([None, "int", "fp32", "fp16", "bf16"])) if unsigned else None
    hadamard = draw(st.sampled_from([0, 1, 2, 16, 128, 512]))
    scale_2 = draw(st.sampled_from([None, *SCALE_2]))
    offset = draw(st.sampled_from([None, "fp32", "fp16", "bf16"])) if zero is None and scale_2 is None else None
    return Format(element, draw(st.sampled_from(list(SCALE_DTYPES))), draw(GROUPS), zero, scale_2, hadamard, offset)


@given(formats())
def test_names_parse_and_print(fmt):
    name = str(fmt)
    assert parse_format(name) == fmt and hash(parse_format(name)) == hash(fmt) and str(parse_format(name)) == name
    assert parse_format(fmt) is fmt


@given(formats(), formats())
def test_names_tell_formats_apart(a, b):
    assert (str(a) == str(b)) == (a == b)


@pytest.mark.parametrize("name", FORMATS)
def test_registered_names_print_as_they_are(name):
    assert str(FORMATS[name]) == name and parse_format(name) is FORMATS[name]


e4m3, e2m1 = NAMED["e4m3"], Float(2, 1)


@pytest.mark.parametrize(
    "name, fmt",
    [
        ("int4_g128", Format(Int(4), "fp32", (1, 128))),
        ("uint4z_g64", Format(Int(4, signed=False), "fp32", (1, 64), "int")),
        ("int8", Format(Int(8), "fp32", (1, 0))),
        ("fp8", Format(e4m3)),
        ("fp8_e4m3", Format(e4m3)),
        ("fp4_tensor", Format(e2m1, group=(0, 0))),
        ("fp8_e4m3_b128x128", Format(e4m3, group=(128, 128))),
        ("mxfp4", Format(e2m1, "e8m0", (1, 32))),
        ("nvfp4", Format(e2m1, "e4m3", (1, 16), None, "tensor")),
        ("nf4_g64", Format(NAMED["nf4"], group=(1, 64))),
        ("int8_token", Format(Int(8))),
        ("fp8_e4m3_token", Format(e4m3)),
        ("fp8_e4m3_g128", Format(e4m3, group=(1, 128))),
        ("fp8_e4m3_tensor", Format(e4m3, group=(0, 0))),
        ("fp4_e2m1_g16_e4m3_tensor2", Format(e2m1, "e4m3", (1, 16), None, "tensor")),
        ("fp4_e2m1_g16_e4m3_channel2", Format(e2m1, "e4m3", (1, 16), None, "channel")),
        ("int4_bf16_g32_h128", Format(Int(4), "bf16", (1, 32), hadamard=128)),
        ("int4_h128_g32_bf16", Format(Int(4), "bf16", (1, 32), hadamard=128)),
        ("uint4_g64_zfp16", Format(Int(4, signed=False), "fp32", (1, 64), "fp16")),
        ("fp8_e4m3_e4m3", Format(e4m3, "e4m3")),
        ("fp8_e4m3", Format(parse_element("e4m3fn"))),
        ("fp6_e2m3_b0x32_ue5m3", Format(Float(2, 3), "ue5m3", (0, 32))),
    ],
)
def test_names_by_hand(name, fmt):
    assert parse_format(name) == fmt


@pytest.mark.parametrize("name", FORMATS)
def test_formats_beside_a_registered_one(name):
    """A registered name stands for one format: the same with another scale dtype has another name."""
    for scale in SCALE_DTYPES:
        fmt = replace(FORMATS[name], scale=scale)
        assert parse_format(str(fmt)) == fmt


@pytest.mark.parametrize(
    "name, nearest",
    [("int4_g12b", "int4_g128"), ("mxfp5", "mxfp"), ("nvfp3", "nvfp4"), ("nf5_g64", "nf4_g64"), ("uint4x_g128", "uint4z_g128"),
     ("fp8_e4m3_b128", "fp8_e4m3_b128x128"), ("INT8", None), ("", None), ("int9", None), ("fp6", None), ("fp7_e4m3", None), ("int4_g0", None),
     ("int4_g128_g64", None), ("int4_fp32_bf16", None), ("int4_h12", None), ("int4z_g128", None), ("int4_zfp16", None), ("int4_h0", None),
     ("int4__g32", None), ("fp8_e4m3_zint", None), ("int4_g-1", None)],
)  # fmt: skip
def test_unknown_names_say_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"format: unknown name {re.escape(repr(name))}.*the nearest is '{nearest or ''}") as error:
        parse_format(name)
    assert re.search(r"the nearest is '(\w+)'$", str(error.value))[1] in FORMATS


def test_a_format_is_a_name_or_a_format():
    for wrong in (None, 4, ("int4",)):
        with pytest.raises(TypeError, match="expected a name or a Format"):
            parse_format(wrong)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"scale": "fp8"}, "unknown scale dtype 'fp8', expected one of fp32"),
        ({"scale": None}, "unknown scale dtype None"),
        ({"group": (1, -1)}, r"got group=\(1, -1\)"),
        ({"group": (1,)}, r"got group=\(1,\)"),
        ({"group": (1, 1.5)}, r"got group=\(1, 1.5\)"),
        ({"zero": "int"}, "on an unsigned integer"),
        ({"element": Int(4, signed=False), "zero": "e4m3"}, "got zero='e4m3'"),
        ({"element": e4m3, "zero": "fp16"}, "on an unsigned integer"),
        ({"scale_2": "group"}, "got scale_2='group'"),
        ({"hadamard": 12}, "got hadamard=12, expected 0 or a power of two"),
        ({"hadamard": -4}, "got hadamard=-4"),
    ],
)
def test_fields_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        Format(**{"element": Int(4), **fields})


@pytest.mark.parametrize(
    "group, shape, expected",
    [
        ((128, 128), (576, 7168), (5, 56)),
        ((128, 128), (7168, 576), (56, 5)),
        ((1, 128), (3, 576), (3, 5)),
        ((1, 128), (3, 128), (3, 1)),
        ((1, 128), (3, 1), (3, 1)),
        ((1, 0), (3, 576), (3, 1)),
        ((0, 0), (3, 576), (1, 1)),
        ((0, 32), (3, 33), (1, 2)),
        ((4, 0), (9, 33), (3, 1)),
        ((1, 16), (8, 5, 40), (8, 5, 3)),
        ((0, 0), (2, 8, 5, 40), (2, 8, 1, 1)),
        ((1, 16), (0, 0), (0, 0)),
        ((0, 0), (0, 0), (1, 1)),
    ],
)
def test_scale_shape(group, shape, expected):
    assert Format(Int(4), group=group).scale_shape(shape) == expected


@pytest.mark.parametrize(
    "name, shape, bits",
    [
        ("int4_g128", (256, 1024), 4.25),
        ("int4_g128_bf16", (256, 1024), 4.125),
        ("uint4z_g128_fp16", (256, 1024), 4 + 24 / 128),
        ("int8_tensor", (8, 8), 8.5),
        ("int8", (8, 64), 8.5),
        ("mxfp4", (4, 64), 4.25),
        ("nvfp4", (4, 64), 4.5 + 32 / 256),
        ("fp4_e2m1_g16_e4m3_channel2", (4, 64), 4.5 + 0.5),
        ("fp8_e4m3_b128x128", (128, 576), 8 + 5 * 32 / (128 * 576)),
        ("int3_g128", (7, 576), 3 + 5 * 32 / 576),
        ("nvfp4", (8, 4, 64), 4.5 + 32 / 256),
        ("uint4_g64_bf16_zfp32", (3, 64), 4 + 48 / 64),
    ],
)
def test_bits_per_weight(name, shape, bits):
    assert parse_format(name).bits_per_weight(shape) == pytest.approx(bits, rel=1e-15)


def test_bits_per_weight_of_nothing():
    assert parse_format("int4").bits_per_weight((0, 5)) == 0
