"""AutoRound: golden layers of its exporters, round trips, refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ref
from conformance.weights import draw_weight
from ref.layouts import auto_round
from ref.layouts.test_gptq import LAYER, golden

GOLDEN = golden("auto_round")
CONFIG = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "packing_format": "auto_round:auto_gptq"}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_layers_mean_what_their_library_says(case):
    config, parts, expected = GOLDEN[case]
    q = auto_round.read(parts, auto_round.options(config, LAYER))
    assert torch.equal(ref.dequantize(q, expected.dtype), expected)


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_layers_are_written_byte_for_byte(case):
    config, parts, _ = GOLDEN[case]
    packing = config.get("packing_format") if "qweight" in parts else None
    written = auto_round.write(auto_round.read(parts, auto_round.options(config, LAYER)), packing)
    assert written.keys() == parts.keys()
    for name, tensor in parts.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name].float(), tensor.float()), name


@st.composite
def layers(draw):
    seed, group = draw(st.integers(0, 2**32)), draw(st.sampled_from(["", "_g32", "_g64"]))
    shape = (32 * draw(st.integers(1, 2)), 64 * draw(st.integers(1, 2)))
    packing = draw(st.sampled_from([None, "auto_round:auto_gptq", "auto_round", "auto_round:gptqmodel", "auto_round:auto_awq"]))
    bits = draw(st.integers(4, 7) if packing == "auto_round:auto_awq" else st.integers(2, 8))
    asymmetric = packing != "auto_round:auto_gptq" and draw(st.booleans())
    return draw_weight(seed, f"{f'uint{bits}z' if asymmetric else f'int{bits}'}{group}_fp16", shape), packing


@given(layers())
def test_what_is_written_reads_back(layer):
    q, packing = layer
    options = auto_round.options(auto_round.config_of(q, packing), LAYER)
    assert ref.equal(auto_round.read(auto_round.write(q, packing), options), q)


FLOATS = ["mxfp4", "mxfp8", "fp4_e2m1_g16_e4m3_tensor2div", "fp4_e2m1_g16_ue5m3", "fp4_e2m1_g32_ue5m3"]
FLOATS += ["fp8_bf16", "fp8_tensor", "fp8_e4m3_g32_bf16", "fp8_e4m3_b16x32_bf16", "fp8_e5m2_fp16"]


@given(st.integers(0, 2**32), st.sampled_from(FLOATS))
def test_floats_that_are_written_read_back(seed, fmt):
    q = draw_weight(seed, fmt, (32, 64))
    assert ref.equal(auto_round.read(auto_round.write(q), auto_round.options(auto_round.config_of(q), LAYER)), q)


@given(st.integers(0, 2**32))
def test_mxint4_reads_back(seed):
    q = draw_weight(seed, auto_round.MXINT4, (32, 64))
    assert ref.equal(auto_round.read(auto_round.write(q), auto_round.options(auto_round.config_of(q), LAYER)), q)


def test_find():
    names = [f"{LAYER}.{part}" for part in ("weight_packed", "weight_scale", "bias")] + ["model.norm.weight"]
    assert auto_round.find(names, {}) == {LAYER: {part: f"{LAYER}.{part}" for part in ("weight_packed", "weight_scale")}}


@pytest.mark.parametrize(
    ("more", "layout", "expected"),
    [
        ({}, "gptq", {"bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq"}),
        ({"packing_format": None}, "gptq", {"checkpoint_format": "gptq"}),
        ({"packing_format": "auto_round"}, "gptq", {"checkpoint_format": "gptq_v2"}),
        ({"packing_format": "auto_round:gptq"}, "gptq", {"checkpoint_format": "gptq"}),
        ({"packing_format": "auto_round:auto_gptq:exllamav2"}, "gptq", {"checkpoint_format": "gptq"}),
        ({"packing_format": "auto_round:gptqmodel", "bits": 5}, "gptq", {"bits": 5, "checkpoint_format": "gptq_v2"}),
        ({"packing_format": "auto_round:auto_awq", "sym": False}, "awq", {"zero_point": True, "version": "gemm"}),
        ({"extra_config": {LAYER: {"bits": 8, "group_size": -1}}}, "gptq", {"bits": 8, "group_size": -1}),
        ({"extra_config": {".*up_proj.*": {"bits": 2}}}, "gptq", {"bits": 2}),
        ({"extra_config": {"up": {}, "mlp": {"bits": 3}}}, "gptq", {"bits": 3}),
        ({"extra_config": {"mlp": {"bits": 3}, LAYER: {"bits": 8}}}, "gptq", {"bits": 8}),
        ({"extra_config": {LAYER: {"bits": 16, "data_type": "fp"}}}, None, None),
        ({"data_type": "fp", "bits": 8, "group_size": [64, 64], "packing_format": None}, "fp8", {"block": (64, 64)}),
        ({"data_type": "mx_fp", "packing_format": "auto_round:llm_compressor"}, "compressed_tensors", {"format": "mxfp4-pack-quantized"}),
        ({"data_type": "mx_int4", "packing_format": "auto_round"}, "mxint4", {"group_size": 32}),
    ],
)
def test_options(more, layout, expected):
    found = auto_round.options({**CONFIG, **more}, LAYER)
    if layout is None:
        assert found is None
    else:
        assert found["layout"] == layout and found["options"] == found["options"] | expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"bitz": 4}, "unknown key 'bitz'; the nearest known one is 'bits'"),
        ({"bits": None}, "bits is None"),
        ({"bits": "4"}, "bits is '4'"),
        ({"bits": 9}, "bits is 9"),
        ({"group_size": None}, "group_size .* is None"),
        ({"sym": "true"}, "sym is 'true'"),
        ({"data_type": "nf4"}, "data_type is 'nf4'"),
        ({"data_type": 4}, "data_type is 4"),
        ({"packing_format": "auto_round:exl3"}, "packing_format is 'auto_round:exl3'"),
        ({"packing_format": 1}, "packing_format is 1"),
        ({"packing_format": "auto_round:fp8_static"}, "is for floats, but data_type is 'int'"),
        ({"packing_format": "auto_round:auto_awq", "bits": 3}, "bits .* is 3"),
        ({"data_type": "mx_fp", "sym": False}, "has no zero points"),
        ({"data_type": "mx_fp", "group_size": 16}, "group_size .* is 16"),
        ({"data_type": "nv_fp", "group_size": 16, "bits": 8}, "data_type and bits"),
        ({"data_type": "fp", "bits": 4}, "bits .* is 4"),
        ({"extra_config": [LAYER]}, "extra_config is"),
        ({"extra_config": {LAYER: {"bit": 4}}}, "unknown key 'bit'"),
        ({"extra_config": {"(": {"bits": 4}}}, "no regular expression"),
    ],
)
def test_bad_configs(more, message):
    with pytest.raises(ValueError, match=message):
        auto_round.options({**CONFIG, **more}, LAYER)


@pytest.mark.parametrize("more", [{"packing_format": "auto_round:mlx"}, {"rotation_config": {"hadamard_type": "random_hadamard"}}])
def test_configs_that_are_not_read(more):
    with pytest.raises(NotImplementedError, match=next(iter(more))):
        auto_round.options({**CONFIG, **more}, LAYER)


@pytest.mark.parametrize(
    ("fmt", "changes", "message"),
    [
        ("int4_g32_fp16", {"qzeros": None}, "gptq: qzeros is missing"),
        ("int4_g32_fp16", {"qzeros": torch.full((2, 4), -1, dtype=torch.int32)}, "gptq: qzeros has the field 15"),
        ("fp4_e2m1_g16_ue5m3", {"weight_scale": None}, "auto_round: weight_scale is missing"),
        ("fp4_e2m1_g16_ue5m3", {"weight_scale": torch.zeros(32, 3, dtype=torch.uint8)}, "auto_round: weight_scale has shape"),
        ("fp4_e2m1_g16_ue5m3", {"weight_packed": torch.zeros(32, 30, dtype=torch.uint8)}, "auto_round: weight_packed has k=60"),
        ("fp4_e2m1_g16_ue5m3", {"weight_scale": torch.full((32, 4), 255, dtype=torch.uint8)}, "auto_round: weight_scale .* NaN"),
        ("mxint4", {"weight_scale": torch.ones(32, 2, dtype=torch.uint8)}, "auto_round: weight_scale ranges from 1 to 1"),
        ("fp8_bf16", {"weight_scale": torch.ones(31, dtype=torch.bfloat16)}, "fp8: weight_scale has shape"),
    ],
)
def test_bad_parts(fmt, changes, message):
    q = draw_weight(1, auto_round.MXINT4 if fmt == "mxint4" else fmt, (32, 64))
    with pytest.raises(ValueError, match=message):
        auto_round.read({**auto_round.write(q), **changes}, auto_round.options(auto_round.config_of(q), LAYER))


@pytest.mark.parametrize(
    ("fmt", "order", "packing", "message"),
    [
        ("uint4z_g32", False, "auto_round:auto_gptq", "auto_round: q has the zero 0"),
        ("int4_g32", True, None, "auto_round: q has a group_index"),
        ("int4_g32", False, "auto_round:fp8", "is for floats"),
        ("mxfp4", False, "auto_round", "expected None for mxfp4"),
        ("nf4_g64", False, None, "auto_round: got nf4_g64"),
        ("mxfp6_e3m2", False, None, "auto_round: got mxfp6_e3m2"),
        ("uint4_g32_fp16_ofp16", False, None, "auto_round: got uint4_g32_fp16_ofp16"),
    ],
)
def test_what_cannot_be_written(fmt, order, packing, message):
    with pytest.raises(ValueError, match=message):
        auto_round.write(draw_weight(1, fmt, (32, 64), order=order), packing)
