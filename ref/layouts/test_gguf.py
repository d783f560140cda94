"""GGUF's block types against the gguf package's own decoder, round trips, and what is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import ref
from conformance.vectors import stored
from conformance.weights import draw_weight
from ref.layouts import gguf, gguf_grids
from ref.layouts.gguf_blocks import BLOCKS
from ref.layouts.gguf_fields import half, levels, strided

CASES, TENSORS = stored("gguf")
# Types whose scale is stored as it is; the others factor it.
ONE_LEVEL = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4", "Q1_0")
TWO_LEVELS = tuple(sorted(set(BLOCKS) - set(ONE_LEVEL) - {"TQ1_0", "TQ2_0"}))


def blocks_of(name, seed, *shape):
    """Random bytes: (..., bytes) for blocks (..., blocks)."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (*shape, BLOCKS[name].nbytes), dtype=torch.uint8, generator=generator)
    if name == "NVFP4":
        data[..., :4] &= 127
    if name == "TQ2_0":  # no 3 in any of four fields
        data[..., :64] &= 0xFF ^ (data[..., :64] << 1 & 0xAA)
    return data.flatten(-2)


def test_every_type_but_q1_0_has_a_case():
    assert set(CASES) == set(BLOCKS) - {"Q1_0"}
    assert len(BLOCKS) == 24


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    weight = TENSORS[f"{name}/weight"]
    options = gguf.options(CASES[name]["config"], "blk.0.up")
    q = gguf.read({"weight": weight}, options)
    assert q.format == BLOCKS[name].format
    assert torch.equal(ref.dequantize(q, torch.float32), TENSORS[f"{name}/expected"])
    if name == "NVFP4":  # the one byte that has two spellings: 0x7F is the scale 0
        weight = weight.clone()
        weight[:, 0] = 0
    assert torch.equal(gguf.write(q, type=name)["weight"], weight)
    assert ref.equal(gguf.read(gguf.write(q, name), gguf.options(gguf.config_of(q, name), "layer")), q)


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"])
def test_grids(name):
    values = {"IQ2": (8, 25, 43), "IQ3_XXS": (4, 12, 20, 28, 36, 44, 52, 62), "IQ3_S": range(1, 17, 2), "IQ1": (-1, 0, 1)}
    digits = gguf_grids.digits("IQ1" if name == "IQ1_S" else name)
    mine = torch.tensor(next(v for k, v in values.items() if name.startswith(k)), dtype=torch.int8)[digits.long()]
    assert torch.equal(mine, TENSORS[f"grid/{name}"])


def test_q1_0():
    """One block by hand: no decoder to compare with. Bit i of the 16 bytes, lowest first: 1 is d, 0 is -d."""
    block = torch.tensor([0x00, 0xC0, 0b00000101, *[0] * 14, 0x80], dtype=torch.uint8)
    q = gguf.read({"weight": block.view(1, 18)}, {"type": "Q1_0"})
    expected = torch.full((1, 128), 2.0, dtype=torch.float64)
    expected[0, [0, 2, 127]] = -2.0
    assert torch.equal(ref.dequantize(q), expected)
    assert torch.equal(gguf.write(q, "Q1_0")["weight"][0], block)


@pytest.mark.parametrize("name", BLOCKS)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**40), shape=st.sampled_from([(1, 1), (2, 3), (3, 1), (2, 2, 1), (0, 2), (1, 0), (2, 1, 1, 2)]))
def test_round_trip_of_bytes(name, seed, shape):
    try:
        q = gguf.read({"weight": blocks_of(name, seed, *shape)}, {"type": name})
    except ValueError as error:
        assert "is NaN or inf" in str(error)
        return
    assert q.shape == (*shape[:-1], shape[-1] * BLOCKS[name].size)
    assert ref.equal(gguf.read(gguf.write(q, name), {"type": name, "k": q.shape[-1]}), q)


@pytest.mark.parametrize("name", ONE_LEVEL)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**40), shape=st.sampled_from([(1, 1), (2, 3), (3, 2, 1)]), scale=st.booleans())
def test_round_trip_of_weights(name, seed, shape, scale):
    fmt = replace(BLOCKS[name].format, scale_2="tensor" if scale and not BLOCKS[name].offset else None)
    shape = (*shape[:-1], shape[-1] * BLOCKS[name].size)
    q = draw_weight(seed, replace(fmt, offset=None), shape)
    if fmt.offset:
        q = replace(q, format=fmt, offset=draw_weight(seed + 1, replace(fmt, offset=None), shape).scale)
    if name == "NVFP4":
        q = replace(q, scale=q.scale & 127)
    parts = gguf.write(q, name)
    assert ("scale" in parts) == (fmt.scale_2 is not None)
    assert ref.equal(gguf.read(parts, gguf.options(gguf.config_of(q, name), "layer")), q)


@pytest.mark.parametrize("name", TWO_LEVELS)
def test_scales_that_no_float16_and_integers_make(name):
    q = gguf.read({"weight": TENSORS[f"{name}/weight"]}, {"type": name})
    q.scale[1, 1] *= 1 + 2**-20
    with pytest.raises(ValueError, match=f"gguf: no {name}: row 1, block 0: scales are no float16 times integers"):
        gguf.write(q, name)


@settings(max_examples=30)
@given(st.integers(-2047, 2047), st.integers(-24, 5), st.lists(st.integers(-32, 31), min_size=8, max_size=8))
@example(1024, 0, [-31, *[0] * 7])
@example(3, -24, [0] * 8)
@example(2047, 5, [-32] * 8)
def test_levels_are_the_smallest(mantissa, exponent, integers):
    """Against all float16 d: the one written is the smallest in magnitude that gives every scale."""
    field = levels(half(0), strided(2, 1, 8), 63, low=-32)
    scale = mantissa * 2.0**exponent * torch.tensor(integers, dtype=torch.float32).view(1, 1, 8)
    blocks = torch.zeros(1, 1, 10, dtype=torch.uint8)
    field.put(blocks, scale)
    assert torch.equal(field.get(blocks), scale)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).double()
    every = every[every.isfinite() & (every != 0)]
    s = scale.view(1, -1).double() / every.unsqueeze(-1)
    works = ((s == s.round()) & (s >= -32) & (s <= 31)).all(-1)
    smallest = every[works].abs().min() if bool(scale.any()) else 0
    assert half(0).get(blocks).double().abs() == smallest


def test_stack_and_scale():
    weight = torch.stack([TENSORS["NVFP4/weight"]] * 2)
    parts = {"weight": weight, "scale": torch.tensor([0.5, 3.0]), "input_scale": torch.tensor([1.0, 1.0])}
    q = gguf.read(parts, {"type": "NVFP4"})
    assert q.format == ref.parse_format("nvfp4")
    assert torch.equal(ref.dequantize(q, torch.float32), TENSORS["NVFP4/expected"] * parts["scale"].view(2, 1, 1))
    assert torch.equal(gguf.write(q, "NVFP4")["scale"], parts["scale"])


def test_a_scale_beside_minima():
    with pytest.raises(NotImplementedError, match="gguf: scale multiplies the minima of Q4_K, too"):
        gguf.read({"weight": TENSORS["Q4_K/weight"], "scale": torch.ones(1)}, {"type": "Q4_K"})


def test_scales_that_mean_zero():
    """ggml decodes the e4m3 code 0x7F to zero, not NaN."""
    block = torch.tensor([[127, 0, 56, 126, *[0x77] * 32]], dtype=torch.uint8)
    w = ref.dequantize(gguf.read({"weight": block}, {"type": "NVFP4"}))
    assert w.view(4, 16)[:, 0].tolist() == [0, 0, 6, 6 * 448]


def test_many_rows_are_read_in_parts(monkeypatch):
    data = TENSORS["Q4_K/weight"]
    whole = gguf.read({"weight": data}, {"type": "Q4_K"})
    monkeypatch.setattr(gguf, "CHUNK", 512)
    assert ref.equal(gguf.read({"weight": data}, {"type": "Q4_K"}), whole)
    assert torch.equal(gguf.write(whole, "Q4_K")["weight"], data)
    bad = blocks_of("TQ2_0", 0, 4, 2)
    bad[:, 64:66] = bad[:, 130:132] = 0
    bad[2, 66] = 0xC0
    with pytest.raises(ValueError, match="gguf: weight of type TQ2_0, row 2, block 1: codes have a 3, expected 0 to 2"):
        gguf.read({"weight": bad}, {"type": "TQ2_0"})


def test_find_and_options():
    names = ["a.weight", "a.scale", "a.input_scale", "b.weight", "b.bias", "c", "norm.weight"]
    types = {
        "a.weight": "NVFP4",
        "a.scale": "F32",
        "a.input_scale": "F32",
        "b.weight": "Q6_K",
        "b.bias": "F32",
        "c": "Q8_0",
        "norm.weight": "F32",
    }
    config = {"quant_method": "gguf", "types": types}
    found = gguf.find(names, config)
    a = {"weight": "a.weight", "scale": "a.scale", "input_scale": "a.input_scale"}
    assert found == {"a": a, "b": {"weight": "b.weight"}, "c": {"weight": "c"}}
    assert [gguf.options(config, layer) for layer in ("a", "b", "c")] == [{"type": "NVFP4"}, {"type": "Q6_K"}, {"type": "Q8_0"}]
    assert gguf.options(config, "norm") is None
    assert gguf.options(config, "other") is None
    with pytest.raises(ValueError, match=r"gguf: c\.weight and c are both weights of the layer c"):
        gguf.find(["c.weight", "c"], {"types": {"c": "Q8_0", "c.weight": "Q8_0"}})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "gguf: config is NoneType, expected a dict"),
        ({"type": {}}, "gguf: config has the unknown key 'type'; the nearest known one is 'types'"),
        ({"types": ["Q4_K"]}, "gguf: types is list, expected a dict of tensor names to types"),
        ({"types": {"*": "Q4_K_M"}}, "gguf: type of layer is 'Q4_K_M', expected one of Q4_0"),
        ({"types": {"layer.weight": 12}}, "gguf: type of layer is 12, expected one of 'Q4_0'"),
    ],
)
def test_bad_config(config, message):
    with pytest.raises(ValueError, match=message.replace("one of Q4_0", "one of 'Q4_0'")):
        gguf.options(config, "layer")


def _nan(name, at):
    data = TENSORS[f"{name}/weight"].clone()
    data[1, at : at + 2] = torch.tensor([0x00, 0x7E], dtype=torch.uint8)
    return {"weight": data}


Q4_0 = TENSORS["Q4_0/weight"]


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ({}, {"type": "Q4_0"}, "gguf: weight is missing"),
        ({"weight": Q4_0, "bias": Q4_0}, {"type": "Q4_0"}, "gguf: unexpected tensor bias, expected weight, scale, input_scale"),
        ({"weight": Q4_0.float()}, {"type": "Q4_0"}, "gguf: weight has dtype torch.float32, expected torch.uint8"),
        ({"weight": [1]}, {"type": "Q4_0"}, "gguf: weight has dtype list, expected torch.uint8"),
        ({"weight": Q4_0[0]}, {"type": "Q4_0"}, r"gguf: weight has shape \(288,\), expected \(..., n, bytes of Q4_0 blocks, 18 each\)"),
        (
            {"weight": Q4_0[:, 1:]},
            {"type": "Q4_0"},
            r"gguf: weight has shape \(3, 287\), expected \(..., n, bytes of Q4_0 blocks, 18 each\)",
        ),
        ({"weight": Q4_0}, {"type": "Q4_0", "k": 256}, r"gguf: weight has shape \(3, 288\), expected \(..., n, Q4_0 blocks for k=256\)"),
        ({"weight": Q4_0}, {"type": "q4_0"}, "gguf: type is 'q4_0', expected one of"),
        ({"weight": Q4_0}, {}, "gguf: type is None, expected one of"),
        ({"weight": Q4_0}, {"type": "Q4_0", "bits": 4}, "gguf: options has the unknown key 'bits'"),
        ({"weight": Q4_0, "scale": torch.ones(2)}, {"type": "Q4_0"}, r"gguf: scale has shape \(2,\), expected \(1,\)"),
        ({"weight": Q4_0, "scale": torch.ones(1).half()}, {"type": "Q4_0"}, "gguf: scale has dtype torch.float16, expected torch.float32"),
        ({"weight": Q4_0, "scale": torch.tensor([torch.inf])}, {"type": "Q4_0"}, "scale_2 of .* is NaN or inf"),
        (_nan("Q4_0", 18), {"type": "Q4_0"}, r"scale of int4_g32_fp16 is NaN or inf at \(1, 1\)"),
        (_nan("Q4_1", 2), {"type": "Q4_1"}, "offset of .* is NaN or inf at"),
        (_nan("Q4_K", 2), {"type": "Q4_K"}, "offset of .* is NaN or inf at"),
        (_nan("Q6_K", 208), {"type": "Q6_K"}, "scale of .* is NaN or inf at"),
        ({"weight": torch.full((1, 17), 255, dtype=torch.uint8)}, {"type": "MXFP4"}, "scale of mxfp4 is NaN or inf at"),
        ({"weight": torch.full((1, 36), 128, dtype=torch.uint8)}, {"type": "NVFP4"}, "row 0, block 0: a scale has its sign bit set"),
        ({"weight": torch.full((1, 66), 3, dtype=torch.uint8)}, {"type": "TQ2_0"}, "row 0, block 0: codes have a 3, expected 0 to 2"),
    ],
)
def test_bad_parts(parts, options, message):
    with pytest.raises(ValueError, match=message):
        gguf.read(parts, options)


def _with_code(name, change):
    """A golden weight with other codes: change(codes of row 1)."""
    q = gguf.read({"weight": TENSORS[f"{name}/weight"]}, {"type": name})
    codes = ref.unpack(q.packed, q.format.element.bits, q.shape[-1])
    change(codes[1])
    return replace(q, packed=ref.pack(codes, q.format.element.bits))


def _flip(at, bit):
    def change(codes):
        codes[at] ^= bit

    return change


def _all(start, value):
    def change(codes):
        codes[start : start + 8] = value

    return change


ROW = "gguf: no {}: row 1, block 1: "


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("IQ2_XXS", _flip(300, 4), "codes have an odd number of negative weights among 8, expected an even one"),
        ("IQ2_XS", _flip(300, 4), "codes have an odd number of negative weights among 8"),
        ("IQ3_XXS", _flip(300, 8), "codes have an odd number of negative weights among 8"),
        ("IQ2_S", _all(296, 3), "codes have a vector that is not in the grid of IQ2_S"),
        ("IQ3_S", _all(296, 7), "codes have a vector that is not in the grid of IQ3_S"),
        ("IQ1_S", _all(296, 3), "codes have a vector that is not in the grid of IQ1"),
        ("IQ1_S", _flip(300, 4), "codes are shifted up and down within 32 weights"),
        ("IQ1_M", _flip(300, 4), "codes are shifted up and down within 8 weights"),
        ("TQ1_0", _all(296, 0), "codes have -2, expected -1 to 1"),
        ("TQ2_0", _all(296, 0), "codes have -2, expected -1 to 1"),
    ],
)
def test_codes_that_a_type_does_not_have(name, change, message):
    with pytest.raises(ValueError, match=ROW.format(name) + message):
        gguf.write(_with_code(name, change), name)


def test_weights_that_a_type_does_not_have():
    q = ref.quantize(torch.randn(2, 64), "int4_g32_fp16")
    for bad, name, message in (
        (q, "Q4_1", "no Q4_1: the format is int4_g32_fp16, expected uint4_g32_fp16_ofp16"),
        (q, "Q4_2", "type is 'Q4_2', expected one of"),
        (ref.quantize(torch.randn(2, 48), "int4_g32_fp16"), "Q4_0", "no Q4_0: k=48, expected a multiple of 32"),
        (replace(q, group_index=torch.zeros(64, dtype=torch.int32)), "Q4_0", "no Q4_0: there is a group_index"),
        (draw_weight(4, "fp4_e2m1_g16_e4m3", (64, 64)), "NVFP4", "no NVFP4: row .*: a scale is negative, expected an unsigned e4m3"),
    ):
        with pytest.raises(ValueError, match=f"gguf: {message}"):
            gguf.write(bad, name)
