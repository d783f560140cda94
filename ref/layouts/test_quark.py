import json
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import ref
from conformance.vectors import stored
from conformance.weights import draw_weight
from ref.layouts import quark
from ref.scale import decode_scale

CASES, TENSORS = stored("quark")
LAYER = "model.layers.0.mlp.up_proj"


def parts_of(case):
    return {name.partition("/")[2]: t for name, t in TENSORS.items() if name.startswith(case + "/") and not name.endswith("/expected")}


def options_of(case):
    return quark.options(CASES[case]["config"], LAYER)


def rounded_steps(q, progressive):
    """float32 as Quark computes two stages: it rounds after the first product."""
    if q.scale_2 is None:
        return ref.dequantize(q, torch.float32)
    plain = replace(q.format, scale="fp32", scale_2=None)
    if progressive:  # (code - zero) * scale, then the tensor's scale
        return ref.dequantize(replace(q, format=plain, scale_2=None), torch.float32) * q.scale_2
    step = (decode_scale(q.scale, q.format.scale) * q.scale_2.double()).float()
    return ref.dequantize(replace(q, format=plain, scale=step, scale_2=None), torch.float32)


def same_bytes(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("case", sorted(CASES))
def test_golden(case):
    parts, options = parts_of(case), options_of(case)
    q = quark.read(parts, options)
    assert torch.equal(rounded_steps(q, case.startswith("progressive")), TENSORS[f"{case}/expected"])
    written = quark.write(q, **options, joined=case.endswith("joined"))
    if case == "uint2_float_zero":  # Quark stored these as int32; what they are is float
        parts["weight_zero_point"] = parts["weight_zero_point"].float()
    assert written.keys() == parts.keys()
    assert all(same_bytes(written[name], parts[name]) for name in parts)
    assert ref.equal(quark.read(written, options), q)
    assert quark.options(CASES[case]["config"], "lm_head") is None and quark.options(CASES[case]["config"], "model.1.mlp.gate") is None


KINDS = [  # format, multiple of n, multiple of k, stack
    ("int8_tensor", 1, 1, False),
    ("int8_bf16", 1, 1, False),
    ("int8_g16", 1, 16, False),
    ("uint8z_g16_fp16", 1, 16, False),
    ("int4_g32", 1, 32, False),
    ("uint4z_g16", 1, 16, False),
    ("uint4_g16_zfp32", 1, 16, False),
    ("int4", 1, 8, False),
    ("uint4z", 8, 8, False),
    ("uint4_zbf16", 1, 8, False),
    ("uint4z_tensor", 1, 8, False),
    ("int3_g16", 1, 16, False),
    ("uint3z_g8", 1, 64, False),
    ("int3_tensor", 1, 8, False),
    ("uint3z", 8, 8, False),
    ("int2_g16", 1, 16, False),
    ("uint2z_g16", 4, 16, False),
    ("uint2_g16_zfp16", 4, 16, False),
    ("uint2z", 4, 4, False),
    ("int4_g32_e8m0", 1, 32, False),
    ("int4_tensor2", 1, 8, False),
    ("int4_g16_e4m3_tensor2", 1, 16, False),
    ("fp8_tensor", 1, 1, False),
    ("fp8_b0x1", 1, 1, False),
    ("fp8_e5m2_fp16", 1, 1, False),
    ("fp8_e4m3_b16x32", 1, 1, True),
    ("fp8_e4m3_b16x32_e8m0", 1, 1, False),
    ("mxfp8", 1, 1, True),
    ("mxfp4", 1, 2, True),
    ("mxfp6_e2m3", 1, 4, True),
    ("mxfp6_e3m2", 1, 4, False),
    ("fp4_e2m1_g16_ue5m3", 1, 2, True),
    ("nvfp4", 1, 2, False),
    ("fp4_e2m1_g16_e5m2_tensor2", 1, 2, False),
    ("fp4_e2m1_g16_ue5m3_tensor2", 1, 2, False),
    ("fp4_e2m1_bf16_tensor2", 1, 2, False),
]


@given(
    st.sampled_from(KINDS),
    st.integers(0, 2**32),
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(0, 3),
    st.sampled_from(["reorder", "order"]),
)
def test_round_trip(kind, seed, n, k, e, pack_method):
    name, rows, columns, stack = kind
    shape = (n * rows, k * columns)
    q = draw_weight(seed, name, (e, *shape) if stack and e else shape)
    parts = quark.write(q, pack_method=pack_method)
    config = json.loads(json.dumps(quark.config_of(q, pack_method=pack_method)))
    options = quark.options(config, "layer")
    assert ref.equal(quark.read(parts, options), q)
    assert all(same_bytes(again, parts[part]) for part, again in quark.write(q, **options).items())


@given(st.sampled_from(["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2"]), st.integers(0, 2**32), st.integers(0, 9), st.integers(0, 4), st.booleans())
def test_round_trip_mx(name, seed, n, groups, joined):
    q = draw_weight(seed, name, (n, 32 * groups))
    stage = {"dtype": "mx", "mx_element_dtype": name.replace("mxfp4", "fp4").replace("mxfp6", "fp6"), "ch_axis": -1, "group_size": 32}
    options = quark.options({"global_quant_config": {"weight": stage}}, "layer")
    parts = quark.write(q, **options, joined=joined)
    assert ("weight_scale" in parts) == (not joined)
    assert ref.equal(quark.read(parts, options), q)
    assert quark.options(quark.config_of(q, **options, joined=joined), "layer") == options


def test_the_exponents_of_mx_have_no_bias():
    q = draw_weight(0, "mxfp4", (1, 32))
    new = quark.write(q)
    old = quark.write(q, quark.options({"global_quant_config": {"weight": {"dtype": "mx", "mx_element_dtype": "fp4"}}}, "layer")["spec"])
    assert torch.equal(old["weight"], new["weight"])
    assert int(old["weight_scale"].view(torch.int8)) == int(new["weight_scale"]) - 127


def test_scales_that_are_not_transposed():
    parts, options = parts_of("int4_group"), options_of("int4_group")
    q = quark.read(parts, options)
    as_file_to_file = {"weight": parts["weight"], "weight_scale": parts["weight_scale"].T}
    assert ref.equal(quark.read(as_file_to_file, options), q)


def test_find():
    names = ["a.weight", "a.weight_scale", "a.weight_zero_point", "a.input_scale", "a.bias", "norm.weight", "b.weight"]
    found = {"a": {part: f"a.{part}" for part in ("weight", "weight_scale", "weight_zero_point", "input_scale")}}
    assert quark.find(names, CASES["int4_group"]["config"]) == found
    mx = CASES["mx_fp4"]["config"]
    assert quark.find(names, mx) == found | {"b": {"weight": "b.weight"}}
    assert quark.find([*names, "lm_head.weight"], mx) == found | {"b": {"weight": "b.weight"}}


INT8 = {"dtype": "int8", "qscheme": "per_channel", "ch_axis": 0, "symmetric": True, "is_dynamic": False}
INT4 = {"dtype": "int4", "qscheme": "per_group", "ch_axis": 1, "group_size": 32, "symmetric": True, "is_dynamic": False}
FP8 = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}


def config(weight=INT8, **change):
    return {"quant_method": "quark", "global_quant_config": {"weight": weight}, "layer_quant_config": {}, "exclude": []} | change


def test_rules():
    rules = config(
        layer_quant_config={"*.q_proj": {"weight": INT4}, "*.k_proj": {"weight": None}, "*_proj": {"weight": FP8}},
        layer_type_quant_config={"Linear": {"weight": FP8}, "Conv2d": {"weight": INT4}},
        exclude=["lm_head", "*.gate", "model.9.*"],
    )
    dtype = {"a.q_proj": "int4", "a.v_proj": "fp8_e4m3", "a.up": "fp8_e4m3"}
    for layer, expected in dtype.items():
        assert quark.options(rules, layer)["spec"][0]["dtype"] == expected
    for layer in ("a.k_proj", "lm_head", "a.gate", "model.9.q_proj"):
        assert quark.options(rules, layer) is None
    assert quark.options(config(layer_quant_config=None, layer_type_quant_config=None, exclude=None), "a")["spec"][0]["dtype"] == "int8"
    assert quark.options(config(export={"pack_method": "order"}), "a")["pack_method"] == "order"
    legacy = {"dtype": "int4", "qscheme": "per_group", "axis": 1, "dynamic": False, "group_size": 32, "symmetric": True}
    assert quark.options(config(legacy), "a") == quark.options(config(INT4), "a")


@pytest.mark.parametrize(
    "bad, error, message",
    [
        (config(global_config={}), ValueError, "unknown key 'global_config'; the nearest known one is 'global_quant_config'"),
        (config(global_quant_config={"weights": INT8}), ValueError, "unknown key 'weights'; the nearest known one is 'weight'"),
        (config(INT8 | {"bits": 8}), ValueError, "unknown key 'bits'"),
        (config(INT8 | {"dtype": "int7"}), ValueError, "dtype is 'int7', expected one of 'int2'"),
        (config(INT8 | {"dtype": None}), ValueError, "dtype None"),
        (config(INT8 | {"dtype": ["int8"]}), ValueError, "dtype"),
        (config(INT8 | {"qscheme": "per_row"}), ValueError, "qscheme is 'per_row'"),
        (config(INT8 | {"ch_axis": 3}), ValueError, "ch_axis of per_channel is 3"),
        (config(INT8 | {"ch_axis": [0]}), ValueError, "ch_axis of per_channel is"),
        (config(INT8 | {"symmetric": None}), ValueError, "symmetric of int8 is None"),
        (config(INT8 | {"qscheme": "per_block", "block_size": [8, 8]}), ValueError, "qscheme is per_block for int8"),
        (config(INT8 | {"zero_point_type": "int8"}), ValueError, "zero_point_type is 'int8'"),
        (config(INT4 | {"group_size": "32"}), ValueError, "group_size is '32'"),
        (config(INT4 | {"ch_axis": 0}), ValueError, "ch_axis of per_group is 0"),
        (config(FP8 | {"qscheme": "per_block", "block_size": 128}), ValueError, "block_size is 128"),
        (config(FP8 | {"scale_format": "e3m2"}), ValueError, "scale_format is 'e3m2'"),
        (config([INT8, INT8, INT8]), ValueError, "has 3 stages"),
        (config([]), ValueError, "has 0 stages"),
        (config([{"dtype": "mx", "mx_element_dtype": "fp4"}, FP8]), ValueError, "dtype 'mx' is one stage of two"),
        (config([FP8 | {"is_scale_quant": True}, FP8]), ValueError, "is_scale_quant is true in the first stage"),
        (config([INT4, INT8 | {"is_scale_quant": True}]), NotImplementedError, "scale_2 belongs to the tensor"),
        (config([INT4, INT8 | {"qscheme": "per_tensor", "is_scale_quant": True}]), NotImplementedError, "scales quantized to int8"),
        (config({"dtype": "mx", "mx_element_dtype": "int8"}), NotImplementedError, "mx_element_dtype int8"),
        (config({"dtype": "mx", "mx_element_dtype": "fp4", "group_size": 16}), ValueError, "group_size of dtype 'mx' is 16"),
        (config({"dtype": "mx6"}), NotImplementedError, "weights of dtype mx6"),
        (config(INT8 | {"is_dynamic": True}), NotImplementedError, "is_dynamic is true"),
        (config(export={"pack_method": "sorted"}), ValueError, "pack_method is 'sorted'"),
        (config(export={"weight_format": "fake_quantized"}), NotImplementedError, "fake_quantized"),
        (config(export=[]), ValueError, "export is list"),
        (config(exclude="lm_head"), ValueError, "exclude is 'lm_head'"),
        (config(layer_quant_config=[]), ValueError, "layer_quant_config is"),
        (config(layer_quant_config={3: {}}), ValueError, "layer_quant_config is"),
        (config(layer_type_quant_config=[]), ValueError, "layer_type_quant_config is"),
        ("quark", ValueError, "is str, expected a dict"),
    ],
)
def test_bad_config(bad, error, message):
    with pytest.raises(error, match=message) as caught:
        quark.options(bad, LAYER)
    assert str(caught.value).startswith("quark: ")


@pytest.mark.parametrize(
    "case, change, message",
    [
        ("int4_group", {"weight_scale": None}, "weight_scale is missing"),
        ("int4_group", {"scales": torch.ones(1)}, "unexpected tensor scales"),
        ("int4_group", {"weight": torch.zeros(64, 3)}, "weight has dtype torch.float32, expected torch.int32"),
        (
            "int4_group",
            {"weight": torch.zeros(64, 4, dtype=torch.int32)},
            r"weight has shape \(64, 4\), 32 columns of codes, but weight_scale",
        ),
        ("int4_group", {"weight": torch.zeros(65, 3, dtype=torch.int32)}, "k=65, expected a multiple of group_size=32"),
        ("int4_group", {"weight": torch.zeros(2, 64, 3, dtype=torch.int32)}, "expected one or two axes"),
        ("int4_group", {"weight": torch.zeros(64, dtype=torch.int32)}, "weight"),
        ("int4_group", {"weight_scale": torch.ones(3, 24)}, r"weight_scale has shape \(3, 24\), expected \(2, n\)"),
        ("int4_group", {"weight_scale": torch.full((2, 24), torch.nan)}, "scale of int4_g32 is NaN"),
        ("int4_group", {"weight_scale": torch.ones(2, 24, dtype=torch.int32)}, "weight_scale has dtype torch.int32"),
        ("int4_group", {"weight_zero_point": torch.ones(2, 3, dtype=torch.int32)}, "weight_zero_point is not zero"),
        ("uint4_group", {"weight_zero_point": None}, "weight_zero_point is missing"),
        (
            "uint4_group",
            {"weight_zero_point": torch.zeros(3, 3, dtype=torch.int32)},
            r"weight_zero_point has shape \(3, 3\), expected 2 rows",
        ),
        ("uint4_tensor", {"weight_zero_point": torch.tensor(16, dtype=torch.int32)}, "weight_zero_point is 16"),
        ("uint4_tensor", {"weight_zero_point": torch.zeros(2, dtype=torch.int32)}, r"weight_zero_point has shape \(2,\), expected \(\)"),
        ("uint2_float_zero", {"weight_zero_point": torch.zeros(2, 3)}, r"weight_zero_point has shape \(2, 3\), expected \(2, 12\)"),
        ("uint2_float_zero", {"weight_zero_point": torch.full((2, 12), 4, dtype=torch.int32)}, "weight_zero_point ranges from 4 to 4"),
        ("int2_group", {"weight": torch.full((64, 10), 2, dtype=torch.int32)}, "weight ranges from 2 to 2, expected -2 to 1"),
        ("int3_channel", {"weight": torch.zeros(16, 16, dtype=torch.uint8)}, "expected a multiple of 3 columns"),
        ("int8_channel", {"weight_scale": torch.ones(20)}, r"weight_scale has shape \(20,\) for a weight \(10, 20\), expected \(10,\)"),
        ("fp8_tensor", {"weight_scale": torch.ones(2)}, r"expected \(\) for \(n, k\): per_tensor"),
        ("fp8_tensor", {"weight_zero_point": torch.ones(())}, "weight_zero_point is not zero"),
        ("fp8_block", {"weight_scale": torch.ones(3, 3)}, r"weight_scale has shape \(3, 3\), expected \(3, 2\)"),
        ("mxfp4", {"weight_scale": torch.full((10, 2), 255, dtype=torch.uint8)}, "scale of mxfp4 is NaN"),
        ("mxfp4", {"weight_scale": torch.ones(10, 3, dtype=torch.uint8)}, r"weight_scale has shape \(10, 3\), expected \(10, 2\)"),
        ("mxfp6_e2m3", {"weight": torch.zeros(10, 47, dtype=torch.uint8)}, r"weight has shape \(10, 47\)"),
        ("mx_fp4_joined", {"weight": torch.zeros(10, 35, dtype=torch.uint8)}, "expected a multiple of 17 columns"),
        ("mx_fp4", {"weight_scale": torch.full((10, 2), 128, dtype=torch.uint8)}, "weight_scale has the exponent -128"),
        ("nvfp4", {"weight_scale_2": None}, "weight_scale_2 is missing"),
        ("nvfp4", {"weight_scale_2": torch.ones(10)}, r"the tensor's scale has shape \(10,\)"),
        ("nvfp4", {"weight_scale": torch.ones(10, 4)}, "weight_scale has dtype torch.float32, expected torch.float8_e4m3fn"),
    ],
)
def test_bad_parts(case, change, message):
    with pytest.raises(ValueError, match=message):
        quark.read(parts_of(case) | change, options_of(case))


def test_what_a_weight_alone_does_not_hold():
    with pytest.raises(NotImplementedError, match="quark: input_rotation transforms the input"):
        quark.read(parts_of("fp8_tensor") | {"input_rotation": torch.ones(2, 2)}, options_of("fp8_tensor"))
    spec = config(INT4 | {"symmetric": False, "zero_point_type": "float32"})
    with pytest.raises(NotImplementedError, match="weight_zero_point has float zero points for int4"):
        quark.read(parts_of("int4_group") | {"weight_zero_point": torch.zeros(2, 24)}, quark.options(spec, LAYER))


@pytest.mark.parametrize(
    "name, shape, options, message",
    [
        ("int5", (8, 8), {}, "got int5, expected an element that it has"),
        ("nf4_g64", (8, 64), {}, "got nf4_g64, expected an element"),
        ("int4", (8, 9), {}, "weight has rows of 9 codes, expected a multiple of 8"),
        ("uint3z", (9, 8), {}, "weight_zero_point has rows of 9 codes, expected a multiple of 8"),
        ("int3", (9, 8), {}, None),
        ("uint4z", (9, 8), {}, None),
        ("uint2z_tensor", (4, 4), {}, "a zero point of the tensor, which uint2 does not pack"),
        ("int4_g32", (8, 40), {}, "got k=40, expected a multiple of group_size=32"),
        ("mxfp4", (8, 33), {}, "got k=33, expected a multiple of 2"),
        ("int4_g32", (2, 8, 32), {}, r"got int4_g32 of shape \(2, 8, 32\)"),
        ("int4_b8x32", (8, 32), {}, "got int4_b8x32, expected scales by tensor"),
        ("fp8_e4m3_b8x0", (8, 32), {}, "got fp8_e4m3_b8x0, expected scales by tensor"),
        ("fp4_e2m1_channel2", (8, 32), {}, "expected what"),
        ("fp8_e4m3_g16_e4m3", (8, 32), {}, "expected what"),
        ("int4_g32", (8, 32), {"pack_method": "sorted"}, "pack_method is 'sorted'"),
        (
            "int8",
            (8, 32),
            {"spec": [INT4 | {"scale_format": None, "zero_point_type": "int32", "mx_element_dtype": None}]},
            "got int8 of shape",
        ),
    ],
)
def test_what_cannot_be_stored(name, shape, options, message):
    q = draw_weight(1, name, shape)
    if message is None:  # Quark packs the weight, but not its zero point, which is zero
        assert ref.equal(quark.read(quark.write(q), quark.options(quark.config_of(q), "layer")), q)
        return
    with pytest.raises(ValueError, match=message):
        quark.write(q, **options)


def test_a_group_index_cannot_be_stored():
    with pytest.raises(ValueError, match="with group_index"):
        quark.write(draw_weight(0, "int4_g32", (8, 64), order=True))
