import json
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import ref
from conformance.vectors import stored
from conformance.weights import draw_weight
from ref.layouts import modelopt
from ref.scale import decode_scale

CASES, TENSORS = stored("modelopt")
REFUSED = ("int4_awq", "w4a8_awq", "int8_smoothquant")


def parts_of(case):
    return {name.partition("/")[2]: t for name, t in TENSORS.items() if name.startswith(case + "/") and not name.endswith("/expected")}


def rounded_steps(q):
    """float32 as modelopt computes it: scale * scale_2 is rounded before it meets the value."""
    if q.scale_2 is not None:
        step = (decode_scale(q.scale, q.format.scale) * q.scale_2.double()).float()
        q = replace(q, format=replace(q.format, scale="fp32", scale_2=None), scale=step, scale_2=None)
    return ref.dequantize(q, torch.float32)


@pytest.mark.parametrize("case", sorted(set(CASES) - set(REFUSED)))
def test_golden(case):
    parts, config = parts_of(case), CASES[case]["config"]
    options = modelopt.options(config, "model.layers.0.proj")
    old = modelopt.options(CASES[case]["hf_quant_config"], "model.layers.0.proj")
    assert options == (old | {"group_size": None} if case in ("int4", "w4a8_nvfp4_fp8") else old)
    assert modelopt.options(config, "lm_head") is None
    q = modelopt.read(parts, options)
    assert ref.equal(q, modelopt.read(parts, old))
    assert torch.equal(rounded_steps(q), TENSORS[f"{case}/expected"])
    written = modelopt.write(q, **options)
    assert written.keys() == parts.keys() - {"input_scale"}
    for name, tensor in written.items():
        assert tensor.dtype == parts[name].dtype and tensor.shape == parts[name].shape, name
        assert torch.equal(tensor.contiguous().view(-1).view(torch.uint8), parts[name].reshape(-1).view(torch.uint8)), name
    assert ref.equal(modelopt.read(written, options), q)


@pytest.mark.parametrize("case", REFUSED)
def test_golden_that_no_qtensor_holds(case):
    with pytest.raises(NotImplementedError, match="pre_quant_scale"):
        modelopt.read(parts_of(case), modelopt.options(CASES[case]["config"], "proj"))
    if case != "w4a8_awq":
        parts = parts_of(case)
        del parts["pre_quant_scale"]  # what is left is a plain weight: modelopt folds the factor into the norm where it can
        q = modelopt.read(parts, modelopt.options(CASES[case]["config"], "proj"))
        assert torch.equal(rounded_steps(q), TENSORS[f"{case}/expected"])


def test_every_code_of_int4():
    weight = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    q = modelopt.read({"weight": weight, "weight_scale": torch.ones(32, 1)}, {"quant_algo": "W4A16_AWQ", "group_size": 16})
    value = ref.dequantize(q).int()
    signed = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1], dtype=torch.int32)
    assert torch.equal(value[0::2], signed[(weight & 15).int()]) and torch.equal(value[1::2], signed[(weight >> 4).int()])


KINDS = [  # quant_algo, format, stack
    ("FP8", "fp8_tensor", True),
    ("FP8", "fp8", False),
    ("FP8_PER_CHANNEL_PER_TOKEN", "fp8_bf16", False),
    ("FP8_PB_WO", "fp8_e4m3_b16x16", False),
    ("FP8_PB_REAL", "fp8_e4m3_b128x128", False),
    ("NVFP4", "nvfp4", True),
    ("NVFP4_AWQ", "fp4_e2m1_g32_e4m3_tensor2", False),
    ("W4A16_NVFP4", "nvfp4", True),
    ("MXFP4", "mxfp4", False),
    ("MXFP8", "mxfp8", False),
    ("W4A16_AWQ", "int4_g32", False),
    ("W4A16_AWQ", "int4_g128_bf16", False),
    ("W8A16", "int8", False),
    ("W8A8_SQ_PER_CHANNEL", "int8_fp16", False),
]


@given(st.sampled_from(KINDS), st.integers(0, 2**32), st.integers(0, 40), st.integers(0, 100), st.integers(0, 3))
def test_round_trip(kind, seed, n, k, e):
    algo, name, stack = kind
    shape = (e, 2 * n, 2 * k) if stack and e else (2 * n, 2 * k)
    q = draw_weight(seed, name, shape)
    parts = modelopt.write(q, quant_algo=algo)
    config = modelopt.config_of(q, quant_algo=algo)
    options = modelopt.options(json.loads(json.dumps(config)), "layer")
    assert options["quant_algo"] == algo
    assert ref.equal(modelopt.read(parts, options), q)
    assert all(t.is_contiguous() for t in parts.values())
    nested = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algo.lower(), "group_size": options["group_size"] or None}}
    assert modelopt.options(nested, "layer") == options


def test_stacks_keep_each_experts_own_scale():
    for name, algo in (("fp8_tensor", "FP8"), ("nvfp4", "NVFP4")):
        q = draw_weight(5, name, (3, 8, 32))
        second = "weight_scale" if algo == "FP8" else "weight_scale_2"
        parts = modelopt.write(q)
        assert parts[second].shape == (3,)
        same = modelopt.read(parts | {second: parts[second][:1]}, {"quant_algo": algo, "group_size": 16})
        assert ref.equal(modelopt.read(modelopt.write(same), {"quant_algo": algo, "group_size": 16}), same)


def test_find():
    names = ["a.weight", "a.weight_scale", "a.weight_scale_2", "a.input_scale", "a.bias", "norm.weight", "k_proj.k_scale"]
    names += ["m.experts.up", "m.experts.up_weight_scale", "m.experts.up_weight_scale_2", "m.experts.up_input_scale", "m.experts.up_bias"]
    found = modelopt.find(names, {})
    assert found == {
        "a": {p: f"a.{p}" for p in ("weight", "weight_scale", "weight_scale_2", "input_scale")},
        "m.experts.up": {"weight": "m.experts.up"} | {p: f"m.experts.up_{p}" for p in ("weight_scale", "weight_scale_2", "input_scale")},
    }


MIXED = {
    "quant_method": "modelopt",
    "quant_algo": "MIXED_PRECISION",
    "ignore": ["lm_head", "model.vision*", "model.layers.9.mlp"],
    "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    "config_groups": {
        "group_0": {"weights": {"num_bits": 8, "type": "float", "dynamic": False}, "targets": ["a.q"]},
        "group_1": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}, "targets": ["a.up"]},
    },
    "quantized_layers": {
        "a.q": {"quant_algo": "FP8"},
        "a.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16},
        "a.mlp.experts.1.up": {"quant_algo": "W4A16_AWQ", "group_size": 64, "has_zero_point": False, "pre_quant_scale": True},
    },
}


@pytest.mark.parametrize(
    "layer, expected",
    [
        ("a.q", {"quant_algo": "FP8", "group_size": 0}),
        ("a.mlp.experts.0.up", {"quant_algo": "NVFP4", "group_size": 16}),
        ("a.mlp.experts.1.up", {"quant_algo": "W4A16_AWQ", "group_size": 64}),
        ("a.k", None),
        ("lm_head", None),
        ("model.vision_tower.q", None),
        ("model.layers.9.mlp.up", None),
    ],
)
def test_mixed_precision(layer, expected):
    assert modelopt.options(MIXED, layer) == expected
    keys = {"quant_algo", "quantized_layers"}
    old = {
        "quantization": {k: v for k, v in MIXED.items() if k in keys} | {"exclude_modules": MIXED["ignore"], "kv_cache_quant_algo": "FP8"}
    }
    assert modelopt.options(old, layer) == expected


def good(**change):
    return {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": []} | change


@pytest.mark.parametrize(
    "config, message",
    [
        (good(quantalgo="FP8"), "unknown key 'quantalgo'; the nearest known one is 'quant_algo'"),
        (good(quant_algo="NVFP5"), "quant_algo is 'NVFP5', expected one of 'FP8'"),
        (good(quant_algo=4), "quant_algo is 4"),
        (good(ignore="lm_head"), "ignore is 'lm_head', expected a list"),
        (good(group_size="16"), "group_size is '16', expected an integer"),
        (good(group_size=[16]), r"group_size is \[16\], expected an integer"),
        (good(quant_method="gptq"), "quant_method is 'gptq'"),
        (good(config_groups=[]), "config_groups is"),
        (good(config_groups={"g": {"weights": 3}}), "weights is 3"),
        (good(config_groups={"g": {"weights": {"group_size": 32}}}, group_size=16), "group_size is .* and .*, expected one"),
        (good(quant_algo="MIXED_PRECISION"), "quantized_layers is None"),
        (good(quant_algo="MIXED_PRECISION", quantized_layers={"layer": {"bits": 4}}), "unknown key 'bits'"),
        ({"quantization": {"quant_algo": "FP8", "exclude": []}}, "unknown key 'exclude'; the nearest known one is 'exclude_modules'"),
        ({"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP4"}}, "kv_cache_quant_algo is 'FP4'"),
        ({"quantization": {"quant_algo": "W4A16_AWQ", "has_zero_point": True}}, "has_zero_point is True"),
        ({"quantization": 3}, "quantization is int, expected a dict"),
        (3, "is int, expected a dict"),
    ],
)
def test_bad_config(config, message):
    with pytest.raises(ValueError, match=message) as caught:
        modelopt.options(config, "layer")
    assert str(caught.value).startswith("modelopt: ")


def test_algorithms_without_a_weight_of_their_own():
    for algo in ("NVFP4_SVD", "W4A8_AWQ"):
        with pytest.raises(NotImplementedError, match=f"modelopt: quant_algo {algo}: "):
            modelopt.options(good(quant_algo=algo), "layer")
    assert modelopt.options({"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}, "layer") is None


NV = {
    "weight": torch.zeros(8, 16, dtype=torch.uint8),
    "weight_scale": torch.ones(8, 2).to(torch.float8_e4m3fn),
    "weight_scale_2": torch.tensor(1.0),
}
NV_OPTIONS = {"quant_algo": "NVFP4", "group_size": 16}
F8 = {"weight": torch.zeros(8, 16).to(torch.float8_e4m3fn), "weight_scale": torch.tensor(1.0)}


@pytest.mark.parametrize(
    "parts, algo, error, message",
    [
        ({k: v for k, v in NV.items() if k != "weight_scale_2"}, "NVFP4", ValueError, "weight_scale_2 is missing"),
        (NV | {"qweight": NV["weight"]}, "NVFP4", ValueError, "unexpected tensor qweight"),
        (NV | {"weight": NV["weight"].int()}, "NVFP4", ValueError, "weight has dtype torch.int32, expected torch.uint8"),
        (NV | {"weight": NV["weight"][0]}, "NVFP4", ValueError, r"weight has shape \(16,\)"),
        (
            NV | {"weight_scale": NV["weight_scale"][:, :1]},
            "NVFP4",
            ValueError,
            r"weight_scale has shape \(8, 1\), expected \(8, 2\) \(n, k / 16\)",
        ),
        (NV | {"weight_scale_2": torch.ones(2)}, "NVFP4", ValueError, r"weight_scale_2 has shape \(2,\), expected \(\)"),
        (NV | {"weight_scale_2": torch.tensor(torch.nan)}, "NVFP4", ValueError, "scale_2 of nvfp4 is NaN or inf"),
        (NV | {"weight_scale": torch.full((8, 2), torch.nan).to(torch.float8_e4m3fn)}, "NVFP4", ValueError, "scale of nvfp4 is NaN"),
        (NV | {"pre_quant_scale": torch.ones(32)}, "NVFP4_AWQ", NotImplementedError, "pre_quant_scale multiplies the input"),
        (NV | {"svdquant_lora_a": torch.ones(32)}, "NVFP4", NotImplementedError, "low-rank"),
        (F8 | {"weight": torch.zeros(2, 8, 16).to(torch.float8_e4m3fn)}, "MXFP8", NotImplementedError, "weight is a stack"),
        (F8 | {"weight_scale": torch.ones(8, 2)}, "FP8", ValueError, r"weight_scale has shape \(8, 2\), expected \(8, 1\)"),
        (F8 | {"weight_scale": torch.ones(9)}, "FP8_PER_CHANNEL_PER_TOKEN", ValueError, r"weight_scale has shape \(9,\), expected \(8,\)"),
        (F8 | {"weight_scale": torch.ones(2, 1)}, "FP8_PB_WO", ValueError, r"weight_scale has shape \(2, 1\), expected \(1, 1\)"),
        (F8 | {"weight_scale": torch.tensor(torch.inf)}, "FP8", ValueError, "scale of fp8_e4m3_tensor is NaN or inf"),
        (F8 | {"weight_scale": torch.tensor(1)}, "FP8", ValueError, "weight_scale has dtype torch.int64"),
        (F8 | {"weight": NV["weight"], "weight_scale": torch.ones(16, 3)}, "W4A16_AWQ", ValueError, "k=16 to be a multiple of its columns"),
        (F8 | {"weight_scale": None}, "FP8", ValueError, "weight_scale is missing"),
        (F8 | {"weight_scale": "1"}, "W8A16", ValueError, "weight has dtype torch.float8_e4m3fn, expected torch.int8"),
    ],
)
def test_bad_parts(parts, algo, error, message):
    with pytest.raises(error, match=message):
        modelopt.read(parts, {"quant_algo": algo, "group_size": modelopt.ALGOS[algo]})


@pytest.mark.parametrize(
    "name, shape, options, message",
    [
        ("uint4z_g128", (8, 128), {}, "got uint4z_g128, expected one like"),
        ("nvfp4", (8, 33), {}, "got k=33, expected an even number"),
        ("int4_g32", (7, 32), {}, "got n=7, expected an even number"),
        ("mxfp8", (2, 8, 32), {}, r"got shape \(2, 8, 32\), expected \(n, k\)"),
        ("fp8", (8, 16), {"quant_algo": "NVFP4"}, "quant_algo NVFP4 does not store fp8, expected FP8_PER_CHANNEL_PER_TOKEN or FP8"),
        ("nvfp4", (8, 32), {"group_size": 32}, "got group_size=32 for nvfp4, expected 16"),
    ],
)
def test_what_cannot_be_stored(name, shape, options, message):
    q = draw_weight(0, name, shape)
    with pytest.raises(ValueError, match=message):
        modelopt.write(q, **options)


def test_a_group_index_cannot_be_stored():
    with pytest.raises(ValueError, match="int4_g32 with group_index"):
        modelopt.write(draw_weight(0, "int4_g32", (8, 64), order=True))
