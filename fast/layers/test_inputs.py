"""What checkpoints' own configs say of activations: every ecosystem, the layers that they mean, and what has no format."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ref.format import check_input_format, parse_format
from ref.layouts import LAYOUTS

from .inputs import input_of, static_scale

GOLDEN = Path(__file__).parents[2] / "conformance" / "golden"
Q, MLP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def said(layout, config, layer=MLP):
    fmt, static = input_of(layout, config, layer)
    assert fmt is None or check_input_format(fmt, torch.ones(1) if static else None, "input_of") is None
    return None if fmt is None else parse_format(fmt), static


def ct(inputs, **more):
    """A config of compressed-tensors with such input_activations."""
    weights = {"num_bits": 8, "type": "float", "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return (
        {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"]} | {"config_groups": {"0": group}} | more
    )


@pytest.mark.parametrize(
    "inputs, expected, static",
    [
        (None, None, False),
        ({"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}, "fp8_e4m3_token", False),
        ({"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}, "fp8_e4m3_tensor", True),
        ({"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": True}, "fp8_e4m3_tensor", False),
        ({"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True}, "fp8_e4m3_g128", False),
        ({"num_bits": 8, "type": "float", "group_size": 128, "dynamic": True}, "fp8_e4m3_g128", False),
        ({"num_bits": 8, "type": "float"}, "fp8_e4m3_tensor", True),
        ({"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}, "int8_token", False),
        ({"num_bits": 8, "strategy": "tensor"}, "int8_tensor", True),
        ({"num_bits": 4, "type": "INT", "strategy": "TOKEN", "dynamic": True}, "int4_token", False),
        ({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"}, "nvfp4", True),
        (
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": True},
            "fp4_e2m1_g16_e4m3_channel2",
            False,
        ),
        (
            {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "dynamic": True, "scale_dtype": "torch.uint8"},
            "mxfp4",
            False,
        ),
        ({"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "dynamic": True}, "fp8_e4m3_g32", False),
    ],
    ids=str,
)
def test_compressed_tensors(inputs, expected, static):
    expected = None if expected is None else parse_format(expected)
    assert said("compressed_tensors", ct(inputs)) == said("compressed-tensors", ct(inputs)) == (expected, static)


def test_mx_by_the_name_of_the_format():
    inputs = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "dynamic": True}
    assert said("compressed_tensors", ct(inputs, format="mxfp8-quantized")) == (parse_format("mxfp8"), False)


def test_the_group_that_means_the_layer():
    token = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    weights = {"num_bits": 8, "type": "float", "strategy": "channel"}
    groups = {
        "a": {"targets": ["re:.*self_attn.*"], "weights": weights, "input_activations": None},
        "b": {"targets": ["Linear"], "weights": weights, "input_activations": token},
    }
    config = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups, "ignore": ["re:.*down.*"]}
    assert said("compressed_tensors", config, Q) == (None, False)
    assert said("compressed_tensors", config, MLP) == (parse_format("fp8_e4m3_token"), False)
    assert said("compressed_tensors", config, "model.layers.0.mlp.down_proj") == (None, False)


def modelopt(algo, **more):
    return {"quant_method": "modelopt", "quant_algo": algo, "ignore": ["lm_head"]} | more


@pytest.mark.parametrize(
    "algo, expected, static",
    [
        ("FP8", "fp8_e4m3_tensor", True),
        ("FP8_PER_CHANNEL_PER_TOKEN", "fp8_e4m3_token", False),
        ("fp8_pb_wo", None, False),
        ("NVFP4", "nvfp4", True),
        ("NVFP4_AWQ", "nvfp4", True),
        ("W4A16_NVFP4", None, False),
        ("W4A8_NVFP4_FP8", "fp8_e4m3_tensor", True),
        ("MXFP4", "mxfp4", False),
        ("W4A8_MXFP4_FP8", "fp8_e4m3_tensor", False),
        ("MXFP8", "mxfp8", False),
        ("W4A16_AWQ", None, False),
        ("W8A16", None, False),
        ("W8A8_SQ_PER_CHANNEL", "int8_tensor", True),
    ],
)
def test_modelopt(algo, expected, static):
    assert said("modelopt", modelopt(algo)) == (None if expected is None else parse_format(expected), static)
    assert said("modelopt", modelopt(algo), "lm_head") == (None, False)
    old = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algo, "exclude_modules": ["lm_head"]}}
    assert said("modelopt", old) == said("modelopt", modelopt(algo))


def test_modelopt_by_layer():
    config = modelopt("MIXED_PRECISION", quantized_layers={Q: {"quant_algo": "FP8"}, MLP: {"quant_algo": "NVFP4", "group_size": 32}})
    assert said("modelopt", config, Q) == (parse_format("fp8_e4m3_tensor"), True)
    assert said("modelopt", config, MLP) == (parse_format("fp4_e2m1_g32_e4m3_tensor2"), True)
    assert said("modelopt", config, "model.layers.1.mlp.up_proj") == (None, False)


def test_modelopt_stores_the_scales_that_are_static():
    """Its own exporter writes an input_scale exactly where we say that there is one."""
    with safe_open(GOLDEN / "modelopt.safetensors", "pt") as file:
        names, cases = set(file.keys()), json.loads(file.metadata()["cases"])
        seen = set()
        for case, about in cases.items():
            if about["config"]["quant_algo"].upper() == "W4A8_AWQ":  # not read, for its weight
                continue
            fmt, static = input_of("modelopt", about["config"], "proj")
            assert static == (f"{case}/input_scale" in names), case
            if static:
                assert static_scale({"input_scale": file.get_tensor(f"{case}/input_scale")}).shape == (1,)
            seen.add(fmt)
    assert len(seen) > 5


@pytest.mark.parametrize(
    "config, expected, static",
    [
        ({"activation_scheme": "dynamic", "weight_block_size": [128, 128]}, "fp8_e4m3_g128", False),
        ({"activation_scheme": "dynamic", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}, "fp8_e4m3_g128_e8m0", False),
        ({"activation_scheme": "dynamic", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}, "mxfp8", False),
        ({"activation_scheme": "dynamic", "weight_block_size": None}, "fp8_e4m3_token", False),
        ({"activation_scheme": "dynamic", "fmt": "e5m2"}, "fp8_e4m3_token", False),
        ({"activation_scheme": "static"}, "fp8_e4m3_tensor", True),
        ({}, "fp8_e4m3_token", False),
        ({"modules_to_not_convert": [MLP], "activation_scheme": "static"}, None, False),
    ],
    ids=str,
)
def test_fp8(config, expected, static):
    expected = None if expected is None else parse_format(expected)
    assert said("fp8", {"quant_method": "fp8"} | config) == (expected, static)


def test_other_names_of_fp8():
    fbgemm = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    for layout in ("fp8", "fbgemm_fp8"):
        assert said(layout, fbgemm) == (parse_format("fp8_e4m3_token"), False)
        assert said(layout, fbgemm, "lm_head") == (None, False)
    assert said("fp8", {"quant_method": "mxfp8", "weight_block_size": [1, 32]}) == (parse_format("mxfp8"), False)


def quark(inputs, **more):
    weight = {"dtype": "fp8_e4m3", "qscheme": "per_channel", "ch_axis": 0, "is_dynamic": False}
    return {"quant_method": "quark", "global_quant_config": {"weight": weight, "input_tensors": inputs}} | more


FP4 = {"dtype": "fp4", "qscheme": "per_group", "ch_axis": -1, "group_size": 16, "is_dynamic": True}


@pytest.mark.parametrize(
    "inputs, expected, static",
    [
        (None, None, False),
        ({"dtype": "bfloat16"}, None, False),
        ({"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}, "fp8_e4m3_tensor", True),
        ({"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": True}, "fp8_e4m3_tensor", False),
        ({"dtype": "fp8_e4m3", "qscheme": "per_channel", "ch_axis": 1, "is_dynamic": True}, "fp8_e4m3_token", False),
        ({"dtype": "fp8_e5m2", "qscheme": "per_group", "ch_axis": -1, "group_size": 128, "is_dynamic": True}, "fp8_e5m2_g128", False),
        ({"dtype": "int8", "qscheme": "per_channel", "ch_axis": 0, "is_dynamic": True, "symmetric": True}, "int8_token", False),
        ({"dtype": "int8", "qscheme": "per_tensor", "is_dynamic": False, "symmetric": True}, "int8_tensor", True),
        (FP4 | {"group_size": 32, "scale_format": "e8m0"}, "mxfp4", False),
        ({"dtype": "mx", "mx_element_dtype": "fp6_e2m3", "ch_axis": -1, "group_size": 32}, "mxfp6_e2m3", False),
        ([FP4, {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, "is_scale_quant": True}], "nvfp4", True),
        (
            [FP4, {"dtype": "fp8_e4m3", "qscheme": "per_channel", "ch_axis": 0, "is_dynamic": True, "is_scale_quant": True}],
            "fp4_e2m1_g16_e4m3_channel2",
            False,
        ),
    ],
    ids=str,
)
def test_quark(inputs, expected, static):
    assert said("quark", quark(inputs)) == (None if expected is None else parse_format(expected), static)
    assert said("quark", quark(inputs, exclude=["*up_proj"])) == (None, False)


def test_quark_by_layer():
    by_layer = {"*self_attn*": quark({"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False})["global_quant_config"]}
    config = quark(None, layer_quant_config=by_layer)
    assert said("quark", config, Q) == (parse_format("fp8_e4m3_tensor"), True) and said("quark", config, MLP) == (None, False)


def test_humming():
    config = {"quant_method": "humming", "dtype": "uint4", "group_size": 64, "scale_dtype": "bfloat16", "ignore": ["lm_head"]}
    assert said("humming", config) == (None, False)  # those keys are the weight's
    config |= {"a_dtype": "float8e4m3", "input_scale_group_size": 128, "dynamic": {"+:.*self_attn": {"a_dtype": "int8"}, "-:.*down": {}}}
    assert said("humming", config) == (parse_format("fp8_e4m3_g128"), False)
    assert said("humming", config, Q) == (parse_format("int8_g128"), False)
    assert said("humming", config, "model.layers.0.mlp.down_proj") == (None, False)
    static = {"quant_method": "humming", "b_dtype": "float8e4m3", "a_dtype": "float8e4m3", "input_quant_mode": "static_tensor"}
    assert said("humming", static) == (parse_format("fp8_e4m3_tensor"), True)


def test_bitnet_quantizes_by_token():
    config = {"quant_method": "bitnet", "linear_class": "bitlinear", "modules_to_not_convert": ["lm_head"]}
    assert said("bitnet", config) == (parse_format("int8_token"), False) and said("bitnet", config, "lm_head") == (None, False)


def auto_round(**more):
    return {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "packing_format": "auto_round:auto_gptq"} | more


FLOAT = {"packing_format": "auto_round:llm_compressor"}


@pytest.mark.parametrize(
    "more, expected, static",
    [
        ({}, None, False),
        ({"act_bits": 16, "act_data_type": "float"}, None, False),
        ({"act_bits": 8, "act_group_size": -1, "act_sym": True, "act_dynamic": True}, "int8_token", False),
        (
            FLOAT | {"data_type": "nv_fp", "group_size": 16, "act_bits": 4, "act_data_type": "nv_fp4_with_static_gs", "act_dynamic": True},
            "nvfp4",
            True,
        ),
        (FLOAT | {"data_type": "mx_fp", "group_size": 32, "act_bits": 4, "act_data_type": "mx_fp_rceil"}, "mxfp4", False),
        (FLOAT | {"bits": 8, "data_type": "mx_fp", "group_size": 32, "act_bits": 8, "act_data_type": "mx_fp"}, "mxfp8", False),
        (
            FLOAT | {"bits": 8, "data_type": "fp", "group_size": [128, 128], "act_bits": 8, "act_data_type": "fp", "act_group_size": 128},
            "fp8_e4m3_g128",
            False,
        ),
        (
            FLOAT
            | {"bits": 8, "data_type": "fp", "group_size": -1}
            | {"act_bits": 8, "act_data_type": "fp8", "act_group_size": 0, "act_dynamic": False},
            "fp8_e4m3_tensor",
            True,
        ),
        ({"extra_config": {MLP: {"act_bits": 8, "act_group_size": -1}}}, "int8_token", False),
        ({"bits": 16, "act_bits": 8}, None, False),
    ],
    ids=str,
)
def test_auto_round(more, expected, static):
    assert said("auto_round", auto_round(**more)) == (None if expected is None else parse_format(expected), static)


def torchao(kind, **data):
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_version": 2, "_data": data}}}


ROW, BOTH = {"_type": "PerRow", "_data": {"dim": -1}}, {"_type": "PerTensor", "_data": {}}


@pytest.mark.parametrize(
    "config, expected",
    [
        (torchao("Int8WeightOnlyConfig", granularity=ROW), None),
        (torchao("Int8DynamicActivationInt8WeightConfig"), "int8_token"),
        (
            torchao("Int8DynamicActivationInt8WeightConfig", act_mapping_type={"_type": "MappingType", "_data": "SYMMETRIC"}),
            "int8_token",
        ),
        (torchao("Float8DynamicActivationFloat8WeightConfig"), "fp8_e4m3_tensor"),
        (torchao("Float8DynamicActivationFloat8WeightConfig", granularity=[ROW, ROW]), "fp8_e4m3_token"),
        (torchao("Float8DynamicActivationFloat8WeightConfig", granularity=[BOTH, BOTH]), "fp8_e4m3_tensor"),
        (torchao("Float8DynamicActivationInt4WeightConfig"), "fp8_e4m3_token"),
        (torchao("MXDynamicActivationMXWeightConfig", activation_dtype={"_type": "torch.dtype", "_data": "float8_e4m3fn"}), "mxfp8"),
        ({"quant_method": "torchao", "_metadata": {}}, None),
    ],
    ids=str,
)
def test_torchao(config, expected):
    assert said("torchao", config) == (None if expected is None else parse_format(expected), False)


@pytest.mark.parametrize("layout", ["gptq", "awq", "marlin", "mxfp4", "bitsandbytes", "hqq", "gguf"])
def test_layouts_of_weights_alone(layout):
    assert input_of(layout, {"quant_method": layout}, MLP) == (None, False)


def test_configs_that_ecosystems_wrote_are_understood():
    known, count = {module.__name__.rpartition(".")[2] for module in LAYOUTS.values()}, 0
    for path in sorted(GOLDEN.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            cases = json.loads(file.metadata().get("cases", "{}"))
        for about in cases.values():
            config = about.get("config")
            if path.stem in known and isinstance(config, dict) and config.get("quant_algo") != "W4A8_AWQ":
                input_of(path.stem, config, "layer")
                count += 1
    assert count > 100


@pytest.mark.parametrize(
    "layout, config, message",
    [
        (
            "compressed_tensors",
            ct({"num_bits": 8, "symmetric": False, "strategy": "token", "dynamic": True}),
            "zero points .* symmetric true",
        ),
        ("compressed_tensors", ct({"num_bits": 8, "strategy": "token"}), "strategy 'token' and dynamic False"),
        ("compressed_tensors", ct({"num_bits": 8, "strategy": "channel"}), "strategy 'channel'"),
        ("compressed_tensors", ct({"num_bits": 8, "strategy": "group", "group_size": 64}), "strategy 'group' and dynamic False"),
        ("compressed_tensors", ct({"num_bits": 16, "type": "float"}), "floats of 16 bits"),
        ("quark", quark({"dtype": "int8", "qscheme": "per_tensor", "symmetric": False}), "'int8', symmetric False"),
        ("quark", quark({"dtype": "uint8", "qscheme": "per_tensor", "symmetric": False}), "'uint8'"),
        ("quark", quark({"dtype": "fp8_e4m3", "qscheme": "per_channel", "ch_axis": -1, "is_dynamic": True}), "ch_axis -1"),
        ("quark", quark({"dtype": "fp8_e4m3", "qscheme": "per_group", "group_size": 32}), "is_dynamic False"),
        ("quark", quark([FP4, FP4 | {"dtype": "fp8_e5m2", "qscheme": "per_tensor", "is_scale_quant": True}]), "quantized in turn"),
        ("auto_round", auto_round(act_bits=8, act_sym=False), "act_sym False"),
        ("auto_round", auto_round(act_bits=8, act_dynamic=False, act_group_size=128), "act_group_size 128"),
        ("auto_round", auto_round(act_bits=4, act_data_type="nv_fp4"), "'nv_fp4'"),
        ("torchao", torchao("Int8DynamicActivationIntxWeightConfig"), "Int8DynamicActivationIntxWeightConfig"),
        ("torchao", torchao("Int8DynamicActivationInt8WeightConfig", act_mapping_type={"_data": "ASYMMETRIC"}), "ASYMMETRIC"),
        ("modelopt", modelopt("W4A8_AWQ"), "W4A8_AWQ"),
    ],
    ids=str,
)
def test_what_has_no_format(layout, config, message):
    with pytest.raises(NotImplementedError, match=message):
        input_of(layout, config, MLP)


@pytest.mark.parametrize(
    "layout, config, message",
    [
        ("gptqq", {}, "layout is 'gptqq', expected one of .*'gptq'"),
        ("fp8", {"activation_scheme": "dynamical"}, "'dynamical'"),
        ("fp8", {"activation_schem": "static"}, "nearest known one is 'activation_scheme'"),
        ("modelopt", modelopt("FP9"), "FP9"),
        ("compressed_tensors", ct({"num_bits": 8, "type": "complex"}), "type is 'complex'"),
        ("compressed_tensors", ct({"num_bits": 8, "dynamic": "global"}), "dynamic is 'global'"),
        ("compressed_tensors", ct({"num_bits": 8, "strategy": "group", "dynamic": True}), "group_size is None"),
        ("compressed_tensors", ct({"num_bit": 8}), "nearest known one is 'num_bits'"),
        ("quark", quark({"qscheme": "per_tensor"}), "input_tensors has dtype None"),
        ("humming", {"b_dtype": "uint4", "a_dtype": "int8", "quant_mode": "dynamic"}, "quant_mode is 'dynamic'"),
        ("auto_round", auto_round(act_bits="8"), "act_bits is '8'"),
    ],
    ids=str,
)
def test_wrong_configs(layout, config, message):
    with pytest.raises(ValueError, match=message):
        input_of(layout, config, MLP)


def test_static_scales():
    assert static_scale({"weight": torch.zeros(2), "input_scale": torch.tensor(0.5, dtype=torch.bfloat16)}).tolist() == [0.5]
    assert static_scale({"input_global_scale": torch.tensor([4.0])}).tolist() == [0.25]
    assert static_scale({"input_scale": torch.tensor([1.0]), "input_scale_2": torch.tensor([2.0, 4.0])}).tolist() == [2.0, 4.0]
    with pytest.raises(ValueError, match=r"no input_scale \(there is weight, weight_scale\)"):
        static_scale({"weight_scale": 1, "weight": 2})
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"input_scale is .* expected positive numbers"):
            static_scale({"input_scale": torch.tensor([wrong])})
