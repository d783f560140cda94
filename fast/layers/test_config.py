"""Configurations and environment variables: keys, aliases, defaults, per-layer rules, and every way to get them wrong."""

import json

import pytest
import torch

from ref import parse_format

from . import environment
from .config import LayerConfig, QuantConfig, read_config, resolve
from .online import quantize_

INT4 = {"dtype": "int4", "group_size": 128}
GROUPED = parse_format("int4_g128_bf16")


@pytest.mark.parametrize(
    "given, expected",
    [
        (INT4, "int4_g128_bf16"),
        ({"b_dtype": "uint4", "weight_scale_group_size": 128}, "int4_g128_bf16"),
        ({"dtype": "int8", "group_size": 0}, "int8_bf16"),
        ({"weight_dtype": "int6"}, "int6_bf16"),
        ({"dtype": "float8e4m3", "group_size": 128, "group_size_n": 128}, "fp8_e4m3_b128x128"),
        ({"dtype": "float8e4m3", "scale_type": "tensor"}, "fp8_e4m3_tensor"),
        ({"dtype": "float4e2m1", "group_size": 32, "scale_dtype": "float8e8m0"}, "mxfp4"),
        ({"dtype": "float4e2m1", "group_size": 16, "bs_dtype": "float8e4m3", "scale_2_type": "tensor"}, "nvfp4"),
        ({"dtype": "int4", "group_size": 64, "has_zero_point": True}, "uint4z_g64_bf16"),
        ({"dtype": "int4", "group_size": 64, "has_zero_point": True, "is_fp_zero_point": True}, "uint4_g64_bf16_zbf16"),
        ({"dtype": "int4", "group_size": 128, "hadamard_block_size": 64}, "int4_g128_bf16_h64"),
    ],
    ids=str,
)
def test_weights(given, expected):
    assert read_config(given).layer("model.layers.0.mlp.up_proj").weight == parse_format(expected)


@pytest.mark.parametrize(
    "given, expected, static",
    [
        ({"dtype": "float8e4m3"}, "fp8_e4m3_token", False),
        ({"a_dtype": "float8e4m3", "input_scale_group_size": 128}, "fp8_e4m3_g128", False),
        ({"dtype": "int8", "group_size": 0}, "int8_token", False),
        ({"input_dtype": "float4e2m1", "group_size": 16}, "fp4_e2m1_g16_e4m3", False),
        ({"dtype": "float8e4m3", "group_size": 32}, "mxfp8", False),
        ({"dtype": "float8e4m3", "quant_mode": "static_tensor"}, "fp8_e4m3_tensor", True),
        ({"dtype": "float4e2m1", "group_size": 16, "input_quant_mode": "static_tensor_dynamic_group"}, "nvfp4", True),
        ({"dtype": "float8e4m3", "group_size": 64, "quantization_mode": "dynamic_group_token"}, "fp8_e4m3_g64_channel2", False),
        ({"dtype": "int8", "group_size": 128, "scale_dtype": "float32"}, "int8_g128", False),
    ],
    ids=str,
)
def test_activations(given, expected, static):
    layer = read_config(INT4, given).layer("up")
    assert (layer.x_format, layer.static) == (parse_format(expected), static)


@pytest.mark.parametrize("given", [None, {}, "", {"dtype": "bfloat16"}, {"dtype": "int8", "quant_mode": "none"}], ids=str)
def test_activations_as_they_are(given):
    assert read_config(INT4, given).layer("up") == LayerConfig(GROUPED)


def test_nothing_said_is_nothing_quantized():
    assert read_config(None) == QuantConfig() and read_config(None).layer("up") is None
    assert read_config({}, {"dtype": "int8"}).layer("up") is None


def test_sources(tmp_path):
    text = json.dumps(INT4)
    (tmp_path / "a.json").write_text(text)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": INT4 | {"quant_method": "humming"}}))
    for value in (INT4, text, str(tmp_path / "a.json"), tmp_path / "a.json", tmp_path / "config.json"):
        assert read_config(value).layer("up") == LayerConfig(GROUPED)
    assert INT4 == {"dtype": "int4", "group_size": 128}  # as it was given


def test_the_models_dtype_is_that_of_scales():
    assert read_config(INT4).layer("up", torch.float16).weight == parse_format("int4_g128_fp16")
    assert read_config(INT4 | {"scale_dtype": "float32"}).layer("up", torch.float16).weight == parse_format("int4_g128")
    assert read_config({"dtype": "float8e4m3", "group_size": 128, "group_size_n": 128}).layer("up", torch.float16).weight.scale == "fp32"


@pytest.mark.parametrize(
    "rules, quantized, left",
    [
        ({}, ("model.layers.0.mlp.up_proj", "experts.3.w1"), ("lm_head", "model.lm_head")),
        ({"ignore": ["self_attn"]}, ("model.layers.0.mlp.up",), ("model.layers.0.self_attn.q_proj",)),
        ({"ignored_layers": ["re:.*self_attn.*"]}, ("mlp.up", "mlp.experts.0.up"), ("a.self_attn.q",)),
        ({"modules_to_not_convert": ["re:vision_tower.*"]}, ("model.vision_tower.up", "up"), ("vision_tower.0.up",)),
        ({"ignored_layers": [], "ignore": ["up"]}, ("up",), ()),
        ({"dynamic": {"-:.*gate.*": {}}}, ("mlp.up",), ("mlp.gate",)),
    ],
    ids=str,
)
def test_layers_left_alone(rules, quantized, left):
    config = read_config(INT4 | rules, {"dtype": "int8"} | rules)
    for name in quantized:
        assert config.layer(name) == LayerConfig(GROUPED, parse_format("int8_token"))
    for name in left:
        assert config.layer(name) is None and config.input(name) == (None, False)


def test_overrides():
    config = read_config(INT4 | {"dynamic": {"+:.*down": {"b_dtype": "int8", "weight_scale_group_size": 0}, "-:.*": {}}})
    assert config.layer("mlp.down_proj").weight == parse_format("int8_bf16") and config.layer("mlp.up") is None
    only = read_config({"dynamic": {"+:.*experts": INT4}})
    assert only.layer("mlp.experts").weight == GROUPED and only.layer("mlp.up") is None
    x = read_config(INT4, {"dtype": "int8", "dynamic": {"+:.*down": {"a_dtype": "float8e4m3"}}})
    assert x.layer("down").x_format == parse_format("fp8_e4m3_token") and x.layer("up").x_format == parse_format("int8_token")
    x = read_config(INT4, {"dtype": "int8", "input_scale_group_size": 128, "dynamic": {"+:.*up": {"group_size": 64}}})
    assert x.layer("up").x_format == parse_format("int8_g64") and x.layer("down").x_format == parse_format("int8_g128")


def test_flags():
    config = read_config(INT4 | {"force_requant": True}, {"dtype": "int8", "allow_fallback": True})
    assert config.force_requant and config.layer("up").allow_fallback
    assert not read_config(INT4).force_requant and not read_config(INT4).layer("up").allow_fallback


WRONG = [
    ({"dtyp": "int4"}, "unknown key 'dtyp'; the nearest known one is 'dtype'"),
    ({"dtype": "int9"}, "'int9'"),
    ({"dtype": "int4", "group_size": "128"}, "weight_scale_group_size is '128'"),
    ({"dtype": "int4", "group_size": -3}, "-3"),
    ({"dtype": "int4", "weight_dtype": "int8"}, "contradict"),
    ({"dtype": "int4", "scale_type": "channel", "group_size": 32}, "channel"),
    ({"dtype": "int4", "force_requant": 1}, "force_requant is 1"),
    ({"dtype": "int4", "ignore": "up"}, "ignore is 'up', expected a list"),
    ({"dtype": "int4", "dynamic": {"up": {}}}, "pattern 'up'"),
    ({"dtype": "int4", "dynamic": {"+:(": {}}}, "no regular expression"),
    ({"dtype": "int4", "dynamic": {"+:up": {"bits": 3}}}, "dynamic '[+]:up' has the unknown key 'bits'"),
    ({"dtype": "int4", "dynamic": {"+:up": {"dtype": "int12"}}}, "int12"),
    ({"dtype": "int4", "dynamic": [1]}, "expected a dict of dicts"),
    ({"quant_method": "gptqq", "bits": 4}, "layout is 'gptqq', expected one of"),
    ({"quant_method": "gptq", "bit": 4}, "unknown key 'bit'; the nearest known one is 'bits'"),
    ({"quantization_config": None}, "quantization_config is None, expected an object"),
    ("{bad", "no JSON"),
    (7, "a int, expected a dict"),
]


@pytest.mark.parametrize("given, message", WRONG, ids=str)
def test_wrong_configs(given, message):
    with pytest.raises(ValueError, match=message):
        read_config(given)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"dtype": "int8", "allow_fallbak": True}, "nearest known one is 'allow_fallback'"),
        ({"dtype": "int8", "quant_mode": "dynamic_group"}, "needs a group_size"),
        ({"dtype": "int8", "group_size": 64, "quant_mode": "dynamic_token"}, "has no groups"),
        ({"dtype": "int8", "quant_mode": "dynamic"}, "quant_mode is 'dynamic'"),
        ({"dtype": "int8", "allow_fallback": "yes"}, "allow_fallback is 'yes'"),
        ({"dtype": "complex64"}, "complex64"),
    ],
    ids=str,
)
def test_wrong_input_configs(given, message):
    with pytest.raises(ValueError, match=message):
        read_config(INT4, given)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither JSON"):
        read_config(str(tmp_path / "none.json"))
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"list\.json.*a JSON list"):
        read_config(str(tmp_path / "list.json"))
    with pytest.raises(ValueError, match="cannot read"):
        read_config(str(tmp_path))


FP8 = ("fp8", {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "modules_to_not_convert": ["gate"]})
GPTQ = ("gptq", {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "gptq", "desc_act": False, "sym": True})
GPT_OSS = ("mxfp4", {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})
INT8, STORED = parse_format("int8_token"), LayerConfig(None, parse_format("fp8_e4m3_g128"), allow_fallback=True)
FORCED = INT4 | {"force_requant": True}


@pytest.mark.parametrize(
    "layer, checkpoint, weight, x, expected",
    [
        # No checkpoint: the config alone.
        ("mlp.up", None, None, None, None),
        ("mlp.up", None, None, {"dtype": "int8"}, None),
        ("mlp.up", None, INT4, None, LayerConfig(GROUPED)),
        ("mlp.up", None, INT4, {"dtype": "int8"}, LayerConfig(GROUPED, INT8)),
        ("mlp.up", None, INT4, {"dtype": "int8", "allow_fallback": True}, LayerConfig(GROUPED, INT8, allow_fallback=True)),
        ("mlp.up", None, INT4 | {"ignore": ["up"]}, {"dtype": "int8"}, None),
        ("lm_head", None, INT4, None, None),
        # One that is not quantized follows force_requant likewise.
        ("mlp.up", None, FORCED, None, LayerConfig(GROUPED)),
        # A quantized one stays as it is.
        ("mlp.up", FP8, None, None, STORED),
        ("mlp.up", FP8, INT4, None, STORED),
        ("mlp.gate", FP8, None, None, None),
        ("mlp.up", GPTQ, None, None, LayerConfig(None, allow_fallback=True)),
        # The input config counts before the checkpoint's, where it means the layer.
        ("mlp.up", FP8, None, {"dtype": "int8"}, LayerConfig(None, INT8)),
        ("mlp.up", FP8, None, {"dtype": "bfloat16"}, LayerConfig(None)),
        ("mlp.up", FP8, None, {"dtype": "int8", "ignore": ["up"]}, STORED),
        ("mlp.up", FP8, None, {"dtype": "int8", "allow_fallback": True}, LayerConfig(None, INT8, allow_fallback=True)),
        (
            "mlp.up",
            FP8,
            None,
            {"dtype": "float8e4m3", "quant_mode": "static_tensor"},
            LayerConfig(None, parse_format("fp8_e4m3_tensor"), True),
        ),
        # Quantized anew: whose input is not quantized unless somebody says so.
        ("mlp.up", FP8, FORCED, None, LayerConfig(GROUPED)),
        ("mlp.up", FP8, FORCED, {"dtype": "int8"}, LayerConfig(GROUPED, INT8)),
        ("mlp.up", FP8, FORCED | {"ignore": ["up"]}, None, STORED),
        ("mlp.gate", FP8, FORCED, {"dtype": "int8"}, None),
        # GPT-OSS: experts alone.
        ("model.layers.0.mlp.experts.gate_up_proj", GPT_OSS, None, None, LayerConfig(None, allow_fallback=True)),
        ("model.layers.0.mlp.experts", GPT_OSS, FORCED, None, LayerConfig(GROUPED)),
        ("model.layers.0.mlp.router", GPT_OSS, None, None, None),
        ("model.layers.0.mlp.router", GPT_OSS, FORCED, None, None),
        ("model.layers.0.self_attn.q_proj", GPT_OSS, None, {"dtype": "int8"}, None),
        # An online config of the same element is no such checkpoint.
        ("mlp.up", None, {"dtype": "float4e2m1", "group_size": 32, "scale_dtype": "float8e8m0"}, None, LayerConfig(parse_format("mxfp4"))),
    ],
    ids=str,
)
def test_resolve(layer, checkpoint, weight, x, expected):
    config = read_config(weight, x)
    assert resolve(layer, checkpoint, config) == expected
    assert config == read_config(weight, x)  # nothing is changed
    if checkpoint is None:
        assert config.layer(layer) == expected


def test_resolve_in_the_models_dtype():
    assert resolve("up", FP8, read_config(FORCED), torch.float16).weight == parse_format("int4_g128_fp16")


def test_a_checkpoints_own_config(tmp_path):
    """read_config of a quantized checkpoint says what its layers are, for weights that stay as they are."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": FP8[1]}))
    for value in (FP8[1], tmp_path / "config.json", json.dumps(FP8[1])):
        config = read_config(value)
        assert config == QuantConfig(checkpoint=FP8)
        assert config.layer("mlp.up") == STORED and config.layer("mlp.gate") is None
    assert read_config(FP8[1], {"dtype": "int8"}).layer("mlp.up") == LayerConfig(None, INT8)
    with pytest.raises(NotImplementedError, match="aqlm"):
        read_config({"quant_method": "aqlm"})
    with pytest.raises(ValueError, match=r"^quantize_: the config is that of a checkpoint that is quantized already \(fp8\)"):
        quantize_(torch.nn.Sequential(torch.nn.Linear(64, 16)), FP8[1])


@pytest.fixture
def variables(monkeypatch):
    for names in environment.NAMES.items():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    readers = (environment.quant_config, environment.f16_accum, environment.gemm_type)
    for reader in readers:
        reader.cache_clear()
    yield monkeypatch
    for reader in readers:
        reader.cache_clear()


@pytest.mark.parametrize("which", [0, 1])
def test_each_variable_by_its_own_name(variables, which):
    assert environment.quant_config() == QuantConfig() and environment.gemm_type() == "auto" and environment.f16_accum() is False
    names = [pair[which] for pair in environment.NAMES.items()]
    for name, value, reader, expected in (
        (names[0], json.dumps(INT4), environment.quant_config, read_config(INT4)),
        (names[1], '{"dtype": "int8"}', environment.quant_config, read_config(None, {"dtype": "int8"})),
        (names[2], "0", environment.f16_accum, False),
        (names[3], "grouped", environment.gemm_type, "grouped_contiguous"),
    ):
        reader.cache_clear()
        variables.setenv(name, value)
        assert reader() == expected
        variables.delenv(name)
        assert reader() == expected  # read once


def test_all_variables_together(variables, tmp_path):
    (tmp_path / "x.json").write_text('{"dtype": "float8e4m3"}')
    variables.setenv("FAST_ONLINE_QUANT_CONFIG", json.dumps(INT4))
    variables.setenv("VLLM_HUMMING_INPUT_QUANT_CONFIG", str(tmp_path / "x.json"))
    variables.setenv("FAST_USE_F16_ACCUM", "1")
    variables.setenv("VLLM_HUMMING_MOE_GEMM_TYPE", "indexed")
    variables.setenv("FAST_MOE_GEMM_TYPE", "indexed")
    assert environment.quant_config().layer("up") == LayerConfig(GROUPED, parse_format("fp8_e4m3_token"))
    assert environment.gemm_type() == "indexed"
    # Where no config is given, it is theirs; and whoever makes a layer is told what has no effect.
    with pytest.warns(UserWarning, match="no effect"):
        layer = quantize_(torch.nn.Sequential(torch.nn.Linear(128, 8, dtype=torch.bfloat16)))[0]
    assert (layer.format, layer.x_format) == (GROUPED, parse_format("fp8_e4m3_token"))
    assert environment.f16_accum() is True
    with pytest.raises(ValueError, match="config is a QuantConfig, which has an x of its own, and x was given, too"):
        environment.given(QuantConfig(), {"dtype": "int8"})


@pytest.mark.parametrize(
    "name, value, error, message, reader",
    [
        ("FAST_ONLINE_QUANT_CONFIG", '{"dtyp": 1}', ValueError, "^FAST_ONLINE_QUANT_CONFIG: .*dtyp", "quant_config"),
        (
            "FAST_ONLINE_QUANT_CONFIG",
            '{"quant_method": "fp8"}',
            ValueError,
            r"^FAST_ONLINE_QUANT_CONFIG: the config is that of a checkpoint .*\(fp8\)",
            "quant_config",
        ),
        ("FAST_ONLINE_QUANT_CONFIG", '{"quant_method": "aqlm"}', NotImplementedError, "^FAST_ONLINE_QUANT_CONFIG: .*aqlm", "quant_config"),
        ("FAST_INPUT_QUANT_CONFIG", '{"quant_method": "fp8"}', ValueError, "^FAST_INPUT_QUANT_CONFIG: .*'quant_method'", "quant_config"),
        ("FAST_INPUT_QUANT_CONFIG", "none.json", FileNotFoundError, "^FAST_INPUT_QUANT_CONFIG: .*none.json", "quant_config"),
        ("VLLM_HUMMING_USE_F16_ACCUM", "maybe", ValueError, "'maybe', expected 0 or 1", "f16_accum"),
        ("FAST_MOE_GEMM_TYPE", "grupped", ValueError, "'grupped', expected one of indexed", "gemm_type"),
    ],
)
def test_wrong_variables(variables, name, value, error, message, reader):
    variables.setenv(name, value)
    with pytest.raises(error, match=message):
        getattr(environment, reader)()


def test_both_names_set_to_different_values(variables):
    variables.setenv("FAST_MOE_GEMM_TYPE", "auto")
    variables.setenv("VLLM_HUMMING_MOE_GEMM_TYPE", "indexed")
    with pytest.raises(ValueError, match="different values"):
        environment.gemm_type()
