"""fp8 against transformers' own code (golden vectors), round trips, rules, and everything that it refuses."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ref
from conformance.vectors import parts_of, stored
from conformance.weights import draw_weight
from ref.element import NAMED, Float
from ref.format import Format
from ref.layouts import fp8

CASES, TENSORS = stored("fp8")


def golden(name):
    return *parts_of(TENSORS, name), CASES[name]["config"]


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    parts, expected, config = golden(name)
    q = fp8.read(parts, fp8.options(config, "model.layers.0.mlp.up_proj"))
    assert torch.equal(ref.dequantize(q, expected.dtype), expected)
    scale = next(part for part in fp8.SCALES if part in parts)
    written = fp8.write(q, scale_name=scale)
    assert written.keys() == parts.keys() - {"activation_scale"}
    if name == "block_ue8m0_bytes":  # written as float8_e8m0fnu
        written[scale] = written[scale].view(torch.uint8)
    if name == "fbgemm_gate_up":  # fbgemm stores scales of a stack as (e, 1, n) or (e, n, 1), by the projection
        written[scale] = written[scale].mT.contiguous()
    assert all(same(written[part], parts[part]) for part in written)


def test_representative_formats():
    for name in fp8.FORMATS:
        q = draw_weight(3, name, (256, 256))
        assert ref.equal(fp8.read(fp8.write(q), fp8.options(fp8.config_of(q), "layer")), q), name


@st.composite
def weights(draw):
    shape = (*([draw(st.integers(1, 3))] * draw(st.booleans())), draw(st.integers(1, 40)), draw(st.integers(1, 70)))
    group = draw(st.sampled_from([(0, 0), (1, 0), (draw(st.integers(1, 40)), draw(st.integers(1, 40)))]))
    if len(shape) == 3 and shape[1] % 2 == 0 and shape[1] > 2 and draw(st.booleans()):
        group = (shape[1] // 2, 0)
    if draw(st.integers(0, 3)) == 0:
        return draw_weight(draw(st.integers(0, 999)), "mxfp4", (*shape[:-1], 2 * shape[-1]))
    element = NAMED[draw(st.sampled_from(["e4m3", "e5m2"]))]
    return draw_weight(draw(st.integers(0, 999)), Format(element, draw(st.sampled_from(["fp32", "fp16", "bf16", "e8m0"])), group), shape)


@given(weights())
@settings(max_examples=150, deadline=None)
def test_round_trip(q):
    config = json.loads(json.dumps(fp8.config_of(q)))
    assert ref.equal(fp8.read(fp8.write(q), fp8.options(config, "any.layer")), q)


def test_deepseek_blocks_are_partial_at_the_edge():
    q = draw_weight(0, "fp8_e4m3_b128x128", (576, 200))  # kv_a_proj_with_mqa has 576 rows
    parts = fp8.write(q)
    assert parts["weight_scale_inv"].shape == (5, 2)
    w, scale = parts["weight"].double(), parts["weight_scale_inv"].double()
    assert torch.equal(ref.dequantize(q)[512:, 128:], w[512:, 128:] * scale[4, 1])


def test_find():
    names = ["layers.0.attn.wq_a.weight", "layers.0.attn.wq_a.scale", "norm.weight", "q_l2_clip.scale", "self_attn.k_scale"]
    names += [
        "a.weight",
        "a.weight_scale_inv",
        "a.input_scale",
        "a.bias",
        "lost.weight_scale",
        "m.weight",
        "m.qscale_weight",
        "m.qscale_act",
    ]
    names += [f"mlp.experts.{p}{e}" for p in ("gate_up_proj", "down_proj") for e in ("", "_scale_inv", "_activation_scale")]
    names += ["l4.experts.down_proj", "l4.experts.down_proj_scale"]
    found = fp8.find(names, {})
    assert {layer: tuple(parts) for layer, parts in found.items()} == {
        "layers.0.attn.wq_a": ("weight", "scale"),
        "a": ("weight", "weight_scale_inv", "input_scale"),
        "lost": ("weight_scale",),
        "m": ("weight", "qscale_weight", "qscale_act"),
        "mlp.experts.gate_up_proj": ("weight", "weight_scale_inv", "activation_scale"),
        "mlp.experts.down_proj": ("weight", "weight_scale_inv", "activation_scale"),
        "l4.experts.down_proj": ("weight", "weight_scale"),
    }
    assert found["mlp.experts.down_proj"]["weight"] == "mlp.experts.down_proj"


def test_lists_of_what_stays():
    c = {"quant_method": "fp8", "modules_to_not_convert": ["lm_head", "layers.1", "mlp.gate", "x.*norm"], "ignored_layers": ["fc1"]}
    names = ("lm_head", "layers.1.up", "layers.11.up", "a.mlp.gate", "a.mlp.gate_proj", "x.y.norm", "x.y.norms", "decoder.fc1", "fc11")
    kept = {name for name in names if fp8.options(c, name) is None}
    assert kept == {"lm_head", "layers.1.up", "a.mlp.gate", "x.y.norm", "decoder.fc1"}


def test_agrees_with_transformers_about_lists():
    utils = pytest.importorskip("transformers.quantizers.quantizers_utils")
    patterns = ["lm_head", "model.layers.1", "mlp.gate", ".*shared.*", "visual", "a|b"]
    names = [
        "lm_head",
        "model.layers.1.x",
        "model.layers.11",
        "z.mlp.gate",
        "mlp.gate_up",
        "q.shared_expert",
        "visual.blocks.0",
        "b.c",
        "ab",
        "m.lm_head",
    ]
    for name in names:
        kept = fp8.options({"quant_method": "fp8", "ignored_layers": patterns}, name) is None
        assert kept != utils.should_convert_module(name, patterns), name


def test_scales_by_shape():
    """Without weight_block_size the scale's shape tells what it belongs to; null rules out blocks, silence means 128 x 128."""
    w = draw_weight(1, "fp8_tensor", (256, 128))
    weight = fp8.write(w)["weight"]

    def group(shape, **config):
        return fp8.read(
            {"weight": weight, "weight_scale": torch.ones(shape)}, fp8.options({"quant_method": "fp8"} | config, "a")
        ).format.group

    assert group(()) == group((1,)) == group((1, 1)) == (0, 0)
    assert group((256,)) == group((256, 1)) == (1, 0)
    assert group((2, 1)) == group((2, 1), weight_block_size=[128, 128]) == (128, 128)
    with pytest.raises(ValueError, match="expected one value, or one for each of n=256 rows"):
        group((2, 1), weight_block_size=None)
    stack = {"weight": weight.view(2, 128, 128), "weight_scale_inv": torch.ones(2, 2, 1)}
    assert fp8.read(stack, fp8.options({"weight_block_size": None}, "experts.gate_up_proj")).format.group == (64, 0)
    assert fp8.read(stack, fp8.options({"weight_block_size": [128, 128]}, "experts.gate_up_proj")).format.group == (64, 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_block": 1}, "unknown key 'weight_block'; the nearest known one is 'weight_block_size'"),
        ({"quant_method": "awq"}, "quant_method is 'awq'"),
        ({"activation_scheme": "Static"}, "activation_scheme is 'Static'"),
        ({"fmt": "e3m4"}, "fmt is 'e3m4'"),
        ({"scale_fmt": "e8m0"}, "scale_fmt is 'e8m0'"),
        ({"expert_dtype": 4}, "expert_dtype is 4"),
        ({"weight_block_size": 128}, "weight_block_size is 128"),
        ({"weight_block_size": [128, 0]}, "weight_block_size is 0"),
        ({"weight_block_size": ["128", 128]}, "weight_block_size is '128'"),
        ({"ignored_layers": "lm_head"}, "ignored_layers is 'lm_head', expected a list"),
        ({"modules_to_not_convert": ["("]}, "no regular expression"),
    ],
)
def test_bad_config(changes, message):
    with pytest.raises(ValueError, match=message):
        fp8.options({"quant_method": "fp8"} | changes, "a")


@pytest.mark.parametrize(
    ("name", "parts", "changes", "message"),
    [
        ("block", {"weight": None}, {}, "weight is missing"),
        ("block", {"weight_scale_inv": None}, {}, "weight_scale_inv is missing"),
        ("block", {"weight_scale": torch.ones(1)}, {}, "both weight_scale_inv and weight_scale"),
        ("block", {"weight_zero_point": torch.ones(1)}, {}, "unexpected tensor weight_zero_point"),
        ("block", {"weight": torch.zeros(32, 96)}, {}, "weight has dtype torch.float32"),
        ("block", {"weight": torch.zeros(32, 96, dtype=torch.float8_e4m3fnuz)}, {}, "weight has dtype torch.float8_e4m3fnuz"),
        ("block", {"weight": torch.zeros(32, dtype=torch.float8_e4m3fn)}, {}, r"weight has shape \(32,\)"),
        ("block", {"weight": torch.zeros(32, 96).to(torch.float8_e5m2)}, {}, "the config says fmt 'e4m3'"),
        (
            "block",
            {"weight_scale_inv": torch.ones(2, 4)},
            {},
            r"weight_scale_inv has shape \(2, 4\), expected \(2, 3\): one for each block of 16 x 32",
        ),
        ("block", {"weight_scale_inv": torch.ones(2, 3).double()}, {}, "weight_scale_inv has dtype torch.float64"),
        ("block", {"weight_scale_inv": torch.full((2, 3), torch.inf)}, {}, "weight_scale_inv: scale of .* is NaN or inf"),
        ("block_ue8m0_bytes", {"weight_scale_inv": torch.full((32, 3), 255, dtype=torch.uint8)}, {}, "scale of mxfp8 is NaN"),
        ("block", {}, {"weight_block_size": [128, 128]}, r"expected \(1, 1\)"),
        ("fp4_experts", {}, {"expert_dtype": "fp8"}, "holds fp4, but the config says expert_dtype 'fp8'"),
        ("fp4_experts", {"scale": torch.ones(6, 2)}, {}, r"scale has shape \(6, 2\), expected \(6, 3\): fp4 has one scale for each 32"),
    ],
)
def test_bad_parts(name, parts, changes, message):
    found, _, config = golden(name)
    found = {part: tensor for part, tensor in (found | parts).items() if tensor is not None}
    with pytest.raises(ValueError, match=f"fp8: .*{message}"):
        fp8.read(found, fp8.options(config | changes, "a"))


@pytest.mark.parametrize(
    ("fmt", "options", "message"),
    [
        ("int8", {}, "expected e4m3, e5m2 or e2m1"),
        ("fp8_g32_e4m3", {}, "scales in float32, float16, bfloat16 or e8m0"),
        ("fp8_tensor_tensor2", {}, "there is no tensor for it"),
        ("fp8_h16", {}, "there is no tensor for it"),
        (Format(Float(2, 1), "e8m0", (1, 16)), {}, "one scale for each 32"),
        ("fp8_b2x0", {}, "one scale for 2 rows and 0 columns"),
        ("fp8_tensor", {"quant_method": "fbgemm_fp8"}, "rows belong to fbgemm_fp8"),
        ("fp8_tensor", {"quant_method": "mxfp8"}, "quant_method is 'mxfp8'"),
        ("fp8_tensor", {"scale_name": "scales"}, "scale_name is 'scales'"),
    ],
)
def test_what_cannot_be_written(fmt, options, message):
    with pytest.raises(ValueError, match=message):
        fp8.write(draw_weight(2, fmt, (8, 64)), **options)
