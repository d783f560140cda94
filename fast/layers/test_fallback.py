"""The order in which activations fall back: by row, by device, with static scales, deprecated ones, and where nothing works."""

import warnings
from dataclasses import replace

import pytest
import torch

from ref.element import Float, Int, parse_element
from ref.format import Format, parse_format

from . import fallback
from .config import LayerConfig
from .fallback import E0M3, E2M1, E3M4, E4M3, E5M2, INT4, INT8, ORDER, choose, on_device
from .online import quantize_


def chosen(x, weight, capability, static=False, allow=True, x_dtype=torch.bfloat16):
    fmt, static = choose(parse_format(x), static, parse_format(weight), capability, x_dtype, allow)
    return None if fmt is None else str(fmt), static


# As vLLM tries them.
ROWS = {
    "e5m2": "e4m3 e3m4fn int8",
    "e4m3": "e3m4fn int8",
    "e3m4fn": "e4m3 int8",
    "e2m1": "e4m3 e3m4fn int8",
    "e0m3": "int4 e4m3 e3m4fn int8",
    "int8": "e4m3 e3m4fn",
    "int4": "e0m3 int8 e4m3 e3m4fn",
}


@pytest.mark.parametrize("element", ROWS)
@pytest.mark.parametrize("capability", [75, 80, 89, 90, 100, 103, 120])
def test_each_row_of_the_order(element, capability):
    """Weights of three bits go with every element, so that the device alone decides."""
    order = [parse_element(name) for name in ROWS[element].split()]
    element = parse_element(element)
    least = {INT8: 75, INT4: 75, E4M3: 89, E5M2: 89, E3M4: 100, E2M1: 100, E0M3: 100}
    old = {INT4: capability >= 90, INT8: 103 <= capability < 110}
    good = [e for e in (element, *order) if capability >= least[e] and not old.get(e)]
    asked = Format(element, group=(1, 64))
    fmt, static = choose(asked, False, parse_format("int3_g64"), capability, torch.float16, True)
    first = good[0] if good else None
    if first is None:
        assert fmt is None
    elif first == element:
        assert fmt == (Format(element) if element.bits == 8 else asked)
    else:
        assert fmt == Format(first)
    assert static is False


@pytest.mark.parametrize(
    "x, weight, capability, expected",
    [
        # A checkpoint's own, by device.
        ("fp8_e4m3_g128", "fp8_e4m3_b128x128", 90, "fp8"),
        ("fp8_e4m3_g128", "fp8_e4m3_b128x128", 80, None),
        ("fp8_e4m3_g128", "int4_g128", 80, "int8"),
        ("fp8_e5m2_token", "int4_g128", 90, "fp8_e5m2"),
        ("mxfp8", "mxfp8", 90, "fp8"),
        ("mxfp8", "mxfp8", 100, "fp8"),
        ("mxfp8", "mxfp8", 120, "mxfp8"),
        ("mxfp4", "mxfp4", 90, "fp8"),
        ("mxfp4", "mxfp4", 100, "mxfp4"),
        ("mxfp4", "mxfp4", 75, "int8"),
        ("int8_token", "int8", 80, "int8"),
        ("int8_g128", "int4_g128", 90, "int8"),
        ("int8_token", "int4_g128", 103, "fp8"),
        ("int8_token", "int8", 103, None),
        ("int4_g128", "int4_g128", 80, "int4_g128"),
        ("int4_g128", "int4_g128", 90, "int8"),
        ("int4_token", "uint4z_g128", 80, "int8"),
        # 8-bit floats as MX from 12.0 on, beside weights by channel or MX.
        ("int4_token", "int4", 120, "int8"),
        ("fp4_e2m1_g16_e4m3", "int5", 120, "mxfp8"),
        ("fp4_e2m1_g16_e4m3", "mxfp6_e2m3", 120, "mxfp8"),
        ("fp4_e2m1_g16_e4m3", "int5_g128", 120, "fp8"),
        ("fp4_e2m1_g16_e4m3", "int5", 100, "fp8"),
        # Weights that an element cannot hold.
        ("int8_token", "uint8z_g128", 90, None),
        ("int8_token", "fp8", 90, "fp8"),
        ("fp8_e4m3_token", "int8", 90, "int8"),
        ("fp8_e4m3_token", "int6_g128", 100, "fp8"),
        ("fp8_e4m3_token", "nf4_g64", 90, None),
        ("fp8_e4m3_token", "uint4_g64_fp16_zfp16", 90, None),
        ("fp8_e4m3_token", "uint4_g32_fp16_ofp16", 90, None),
        # Integers between those of the tensor cores.
        ("int5_token", "int4_g128", 80, "int5"),
        ("int6_token", "fp8", 90, None),
        ("fp5_e3m1_token", "int4", 90, None),
    ],
)
def test_pairs(x, weight, capability, expected):
    assert chosen(x, weight, capability) == (expected, False)


def test_compatible_pairs_are_those_of_humming():
    """Its rules, from the bits of either side, against ours, from the values."""

    def humming(x, w, zero, capability):
        least = {INT8: 75, INT4: 75, E4M3: 89, E5M2: 89, E3M4: 100, E2M1: 100, E0M3: 100}
        if capability < least[x] or w.bits > x.bits:
            return False
        if isinstance(x, Int):
            bits = w.bits if isinstance(w, Int) else w.mantissa + 1 if w.exponent == 0 else 99
            return bits <= x.bits and not (zero and bits == x.bits)
        # Weights are widened to another element of x's size, where that holds them.
        if x.bits == 8:
            mantissas = [4] if x == E3M4 else [3]
            mantissas += [4] if capability >= 100 else []
        else:
            mantissas = [x.mantissa]
        if isinstance(w, Int):
            return any(w.bits < x.bits and w.bits <= m + (1 if zero else 2) for m in mantissas)
        if w.bits == x.bits:
            return w in least
        return any(w.mantissa <= m + (w.exponent == 0) and w.exponent <= {4: 3, 3: 4, 1: 2}.get(m, 0) for m in mantissas)

    weights = [(Int(b), False) for b in range(1, 9)] + [(Int(b, signed=False), True) for b in range(1, 9)]
    weights += [(w, False) for w in (E2M1, E0M3, Float(2, 3), Float(3, 2), E4M3, E5M2, Float(2, 2), Float(0, 4))]
    # Ours takes more, as fast does: floats whose values times a power of two are int8, and uint3z, which is exact in e0m3.
    more = set()
    for capability in (75, 80, 89, 90, 100, 120):
        for x in ORDER:
            for w, zero in weights:
                weight = Format(w, group=(1, 64), zero="int" if zero else None)
                ours = fallback._why_not(Format(x), weight, capability, torch.float16) is None
                theirs = humming(x, w, zero, capability)
                assert ours or not theirs, (capability, x, w)
                if ours and not theirs:
                    more.add((str(x), str(w)))
    assert more == {("int8", "e2m1"), ("int8", "e2m2"), ("int8", "e2m3"), ("e2m1", "uint3")}


@pytest.mark.parametrize("x", ["fp8_e4m3_tensor", "int8_tensor"])
def test_a_static_scale_is_kept(x):
    assert choose(parse_format(x), True, parse_format("int4_g128"), 90, allow_fallback=True) == (parse_format(x), True)
    # A scale by tensor that is made of x is not static: by token is better.
    assert choose(parse_format(x), False, parse_format("int4_g128"), 90, allow_fallback=True)[0].group == (1, 0)


def test_a_static_scale_goes_with_its_format():
    assert chosen("nvfp4", "nvfp4", 100, static=True) == ("nvfp4", True)
    assert chosen("nvfp4", "nvfp4", 90, static=True) == ("fp8", False)
    assert chosen("fp8_e4m3_tensor", "fp8", 80, static=True) == (None, False)


@pytest.mark.parametrize("allow", [True, False])
def test_on_other_devices_all_is_kept(allow):
    for x in ("mxfp4", "nvfp4", "int4_g128", "fp8_e4m3_g128", "int3_token"):
        assert choose(parse_format(x), True, parse_format("nf4_g64"), None, allow_fallback=allow) == (parse_format(x), True)
    assert choose(None, False, parse_format("int4"), None) == (None, False)


def test_without_fallback_a_compatible_format_is_kept():
    for x in ("fp8_e4m3_g128", "mxfp8", "int8_g64", "int5_token"):
        assert choose(x, False, "int4_g128", 90) == (parse_format(x), False)
    assert choose(None, False, parse_format("nf4_g64"), 80) == (None, False)
    assert choose(None, False, parse_format("nf4_g64"), 75, torch.float16) == (None, False)


@pytest.mark.parametrize(
    "x, weight, capability, message",
    [
        (
            "nvfp4",
            "int4_g128",
            90,
            r"^activations in nvfp4 do not go with weights in int4_g128 on compute capability 9\.0: e2m1 is multiplied from 10\.0 on;"
            r" e4m3 or int8 or none would work \(allow_fallback true takes the first\)$",
        ),
        ("fp8_e4m3_token", "fp8", 80, r"on compute capability 8\.0: e4m3 is multiplied from 8\.9 on; none would work"),
        ("int8_token", "fp8", 90, "the weights are not exact in int8; e4m3 or none would work"),
        ("int8_token", "uint4_g64_fp16_zfp16", 90, "zero points that are floats; none would work"),
        ("fp5_e3m1_token", "int4", 90, "no tensor core multiplies e3m1; none would work"),
    ],
)
def test_without_fallback_the_rest_is_refused(x, weight, capability, message):
    with pytest.raises(ValueError, match=message):
        choose(parse_format(x), False, parse_format(weight), capability)


@pytest.mark.parametrize("allow", [True, False])
def test_nothing_works(allow):
    for x, capability in ((None, 75), ("fp8_e4m3_token", 70), (None, 70)):
        with pytest.raises(ValueError, match=rf"on compute capability 7\.{capability % 10}: .*; nothing works$"):
            choose(x, False, "fp8", capability, torch.bfloat16, allow)
    with pytest.raises(ValueError, match=r"^activations in bfloat16 .*: bfloat16 is multiplied from 8\.0 on, and float16 from 7\.5 on"):
        choose(None, False, "int4", 75, torch.bfloat16, allow)


@pytest.mark.parametrize("x, capability", [("int4_token", 90), ("int4_token", 120), ("int8_token", 103)])
def test_deprecated_pairs(x, capability):
    with pytest.warns(UserWarning, match=f"{x[:4]} are deprecated on compute capability"):
        assert choose(x, False, "int3_g64", capability)[0] == parse_format(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(x, False, "int3_g64", capability, allow_fallback=True)[0].element not in (INT4, parse_format(x).element)
        choose(x, False, "int3_g64", {103: 110}.get(capability, 89))


def test_from_a_layer_config_and_a_device(monkeypatch):
    weight, x = parse_format("fp8_e4m3_b128x128"), parse_format("fp8_e4m3_g128")
    stored = LayerConfig(None, x, allow_fallback=True)
    for device in ("cpu", "meta"):
        assert on_device(stored, device, torch.bfloat16, weight) == stored
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    assert on_device(stored, "cuda:0", torch.bfloat16, weight) == LayerConfig(None, None, allow_fallback=True)
    assert on_device(LayerConfig(parse_format("int4"), x, allow_fallback=True), "cuda", torch.float16).x_format == parse_format(
        "int8_token"
    )
    with pytest.raises(ValueError, match="none would work"):
        on_device(LayerConfig(weight, x), "cuda", torch.float16)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert on_device(stored, "cuda:0", torch.bfloat16, weight) == stored


def test_quantize_asks_for_the_device(monkeypatch):
    seen = []

    def as_on_hopper(config, device, x_dtype):
        seen.append((device, x_dtype))
        x_format, static = choose(config.x_format, config.static, config.weight, 90, x_dtype, config.allow_fallback)
        return replace(config, x_format=x_format, static=static)

    monkeypatch.setattr("fast.layers.online.on_device", as_on_hopper)
    model = torch.nn.Sequential(torch.nn.Linear(64, 16, dtype=torch.bfloat16))
    x = {"dtype": "float4e2m1", "group_size": 16}
    with pytest.raises(
        ValueError, match=r"^quantize_: 0: activations in .* e2m1 is multiplied from 10\.0 on; e4m3 or int8 or none would work"
    ):
        quantize_(model, {"dtype": "int4", "group_size": 32}, x)
    quantize_(model, {"dtype": "int4", "group_size": 32}, x | {"allow_fallback": True})
    assert model[0].x_format == parse_format("fp8_e4m3_token")
    assert seen == [(torch.device("cpu"), torch.bfloat16)] * 2
