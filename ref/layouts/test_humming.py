"""Humming: golden layers of its schema, round trips, refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ref
from conformance.weights import draw_weight
from ref.layouts import humming
from ref.layouts.test_gptq import LAYER, golden

GOLDEN = golden("humming")
CONFIG = {"quant_method": "humming", "b_dtype": "uint4", "weight_scale_group_size": 32}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_layers_mean_what_their_library_says(case):
    config, parts, expected = GOLDEN[case]
    q = humming.read(parts, humming.options(config, LAYER))
    assert torch.equal(ref.dequantize(q, expected.dtype), expected)


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_layers_are_written_byte_for_byte(case):
    config, parts, _ = GOLDEN[case]
    written = humming.write(humming.read(parts, humming.options(config, LAYER)))
    assert written.keys() == parts.keys()
    for name, tensor in parts.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name].float(), tensor.float()), name


ELEMENTS = [f"int{b}" for b in range(1, 9)] + [
    "fp4_e2m1",
    "fp6_e3m2",
    "fp6_e2m3",
    "fp8_e4m3",
    "fp8_e5m2",
    "fp8_e3m4fn",
    "fp4_e0m3",
    "fp3_e1m1",
]
SCALES = ["", "_bf16", "_fp16", "_e4m3", "_e5m2", "_ue5m3", "_e8m0"]


@st.composite
def layers(draw):
    kind = draw(st.sampled_from(["channel", "g32", "g64", "b16x32", "tensor"]))
    scale = "" if kind in ("b16x32", "tensor") else draw(st.sampled_from(SCALES))
    second = draw(st.sampled_from(["", "_tensor2", "_channel2"])) if kind in ("g32", "g64") else ""
    if kind in ("channel", "g32", "g64") and draw(st.booleans()):
        bits = draw(st.integers(1, 8))
        element, zero = draw(st.sampled_from([(f"uint{bits}z", ""), (f"uint{bits}", "_zfp16"), (f"uint{bits}", "_zbf16")]))
    else:
        element, zero = draw(st.sampled_from(ELEMENTS)), ""
    lead = draw(st.sampled_from([(), (2,)]))
    shape = (*lead, 32 * draw(st.integers(1, 2)), 64 * draw(st.integers(1, 2)))
    rotation = draw(st.sampled_from(["", "_h32"]))
    return draw_weight(draw(st.integers(0, 2**32)), f"{element}_{kind}{scale}{zero}{second}{rotation}", shape)


@given(layers())
def test_what_is_written_reads_back(q):
    assert ref.equal(humming.read(humming.write(q), humming.options(humming.config_of(q), LAYER)), q)


@pytest.mark.parametrize(
    ("more", "layer", "expected"),
    [
        ({}, LAYER, {"group": (1, 32), "scale": None, "zero": None, "scale_2": None, "hadamard": 0}),
        ({"b_dtype": None, "dtype": "int2"}, LAYER, {"element": ref.Int(2)}),
        ({"has_zero_point": True}, LAYER, {"element": ref.Int(4, False), "zero": "int"}),
        ({"weight_scale_group_size": None, "group_size": -1}, LAYER, {"group": (1, 0)}),
        ({"ignore": ["lm_head", "mlp.up_proj"]}, LAYER, None),
        ({"dynamic": {"-:.*up": {}}}, LAYER, None),
        ({"dynamic": {"+:.*up": {"dtype": "uint8", "group_size": 64}}}, LAYER, {"element": ref.Int(8), "group": (1, 64)}),
        ({"b_dtype": "float8e4m3", "weight_scale_group_size_n": 16}, LAYER, {"group": (16, 32), "scale": "fp32"}),
        ({"hadamard_block_size": 1}, LAYER, {"hadamard": 0}),
    ],
)
def test_options(more, layer, expected):
    found = humming.options({**CONFIG, **more}, layer)
    assert found is None if expected is None else found == found | expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"b_dtyp": "uint4"}, "unknown key 'b_dtyp'; the nearest known one is 'b_dtype'"),
        ({"b_dtype": "uint9"}, "b_dtype is 'uint9'"),
        ({"b_dtype": "float8e4m2"}, "b_dtype is 'float8e4m2'"),
        ({"b_dtype": 4}, "b_dtype is 4"),
        ({"dtype": "uint8"}, "contradict each other"),
        ({"bs_dtype": "int8"}, "bs_dtype is 'int8'"),
        ({"weight_scale_type": "row"}, "weight_scale_type is 'row'"),
        ({"weight_scale_type": "channel"}, "weight_scale_type 'channel' does not go with groups of 0 x 32"),
        ({"weight_scale_group_size": "32"}, "weight_scale_group_size is '32'"),
        ({"weight_scale_group_size": 0, "weight_scale_2_type": "channel"}, "does not go with weight_scale_type 'channel'"),
        ({"weight_scale_group_size_n": 16, "bs_dtype": "bfloat16"}, "scales by block are float32"),
        ({"has_zero_point": 1}, "has_zero_point is 1"),
        ({"hadamard_block_size": 48}, "hadamard_block_size is 48"),
        ({"dynamic": []}, None),
        ({"dynamic": ["-:x"]}, "dynamic is"),
        ({"ignore": "lm_head"}, "ignore is 'lm_head'"),
    ],
)
def test_bad_configs(more, message):
    if message is None:
        assert humming.options({**CONFIG, **more}, LAYER)
        return
    with pytest.raises(ValueError, match=message):
        humming.options({**CONFIG, **more}, LAYER)


def test_float_zero_points_of_floats_are_not_read():
    with pytest.raises(NotImplementedError, match="expected integers by group or channel"):
        humming.options({**CONFIG, "b_dtype": "float4e2m1", "has_zero_point": True}, LAYER)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"weight_scale": None}, {}, "weight_scale is missing"),
        ({"zero_point": torch.zeros(1)}, {}, "unexpected tensor zero_point"),
        ({"weight": torch.zeros(32, 8)}, {}, "weight has dtype"),
        ({"weight": torch.zeros(256, dtype=torch.int32)}, {}, "weight has shape"),
        ({"weight": torch.zeros(32, 9, dtype=torch.int32)}, {}, "fits no whole groups of 1 x 32 at 4 bits"),
        ({"weight_scale": torch.zeros(32, 3)}, {}, r"weight_scale has shape \(32, 3\), expected \(32, 2\)"),
        ({"weight_scale": torch.zeros(32, 2, dtype=torch.uint8)}, {}, "says no scale dtype by itself"),
        ({"weight_scale": torch.zeros(32, 2)}, {"scale": "bf16"}, "weight_scale has dtype torch.float32"),
        ({"weight_scale": torch.full((32, 2), float("nan"))}, {}, "weight_scale .* NaN or inf"),
        ({"weight_scale_2": torch.full((1,), float("nan"))}, {"scale_2": "tensor"}, "weight_scale_2 .* NaN or inf"),
        ({"zero_point": torch.zeros(4, 1, dtype=torch.int32)}, {"zero": "int", "element": ref.Int(4, False)}, "zero_point has shape"),
        ({}, {"hadamard": 128}, "no multiple of hadamard_block_size=128"),
    ],
)
def test_bad_parts(changes, options, message):
    parts = {**humming.write(draw_weight(1, "int4_g32_bf16", (32, 64))), **changes}
    with pytest.raises(ValueError, match=f"humming: .*{message}"):
        humming.read(parts, humming.options(CONFIG, LAYER) | options)


@pytest.mark.parametrize(
    ("fmt", "shape", "order", "message"),
    [
        ("nf4_g32", (32, 64), False, "got nf4_g32, which Humming has no schema for"),
        ("int4_tensor_bf16", (32, 64), False, "no schema"),
        ("int4_b16x32_bf16", (32, 64), False, "no schema"),
        ("int4_channel2", (32, 64), False, "no schema"),
        ("uint4_g32_fp16_ofp16", (32, 64), False, "no schema"),
        ("int4_g48", (32, 64), False, "expected .* whole groups"),
        ("int3", (32, 40), False, "rows of whole words"),
        ("uint4z", (31, 64), False, "do not end with a word"),
        ("int4_g32", (32, 64), True, "q has a group_index"),
    ],
)
def test_what_cannot_be_written(fmt, shape, order, message):
    with pytest.raises(ValueError, match=f"humming: .*{message}"):
        humming.write(draw_weight(1, fmt, shape, order=order))
