"""GPTQ: golden layers of AutoGPTQ and GPTQModel, round trips, refusals."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import ref
from conformance.vectors import parts_of, stored
from conformance.weights import draw_weight
from ref.layouts import gptq

LAYER = "model.layers.0.mlp.up_proj"


def golden(layout):
    """{case: (config, parts, expected)} of conformance/golden/<layout>.safetensors."""
    cases, tensors = stored(layout)
    return {case: (about["config"], *parts_of(tensors, case)) for case, about in cases.items()}


GOLDEN = golden("gptq")


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_layers_mean_what_their_library_says(case):
    config, parts, expected = GOLDEN[case]
    q = gptq.read(parts, gptq.options(config, LAYER))
    assert torch.equal(ref.dequantize(q, expected.dtype), expected)


@pytest.mark.parametrize("case", [case for case in GOLDEN if "borrow" not in case])
def test_golden_layers_are_written_byte_for_byte(case):
    config, parts, _ = GOLDEN[case]
    written = gptq.write(gptq.read(parts, gptq.options(config, LAYER)), config["checkpoint_format"])
    assert written.keys() == parts.keys()
    for name, tensor in parts.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor), name


@pytest.mark.parametrize("case", [case for case in GOLDEN if "borrow" in case])
def test_a_zero_of_0_in_version_1_needs_its_maker(case):
    config, parts, _ = GOLDEN[case]
    with pytest.raises(ValueError, match=r"gptq: qzeros has the field .* version 1 stores zero - 1"):
        gptq.read(parts, gptq.options({**config, "meta": None}, LAYER))


@st.composite
def layers(draw):
    bits = draw(st.integers(2, 8))
    version = "gptq_p" if bits in (5, 6, 7) else draw(st.sampled_from(gptq.CHECKPOINT_FORMATS))
    step = 32 if version == "gptq_p" and bits in gptq.PLANES else 1
    n, k = (step * draw(st.integers(1, 96 // step)) for _ in range(2))
    group = draw(st.sampled_from(["", "_g8", "_g32", "_g33", "_g256"]))
    element = f"int{bits}" if draw(st.booleans()) else f"uint{bits}z"
    fmt = element + group + draw(st.sampled_from(["", "_fp16", "_bf16"]))
    q = draw_weight(draw(st.integers(0, 2**32)), fmt, (n, k), order=draw(st.booleans()))
    if q.group_index is not None and torch.equal(q.group_index, torch.arange(k, dtype=torch.int32) // q.format.group[1]):
        q = replace(q, group_index=None)  # groups in order have no index
    if version == "gptq" and q.zero is not None:
        q = replace(q, zero=q.zero.clamp(min=1))
    return q, version


@given(layers())
def test_what_is_written_reads_back(layer):
    q, version = layer
    config = gptq.config_of(q, checkpoint_format=version)
    assert ref.equal(gptq.read(gptq.write(q, checkpoint_format=version), gptq.options(config, LAYER)), q)


@given(st.integers(2, 8), st.integers(0, 2**32))
@example(bits=3, seed=0)
def test_planes_and_bitstreams_hold_the_same_bits(bits, seed):
    if bits in gptq.PLANES:
        words = torch.randint(-(2**31), 2**31, (3 * bits, 5), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(gptq._to_planes(gptq._from_planes(words, bits), bits), words)


@pytest.mark.parametrize("fmt", gptq.FORMATS)
def test_every_format_has_a_version_of_its_own(fmt):
    q = draw_weight(1, fmt, (32, 128))
    assert str(q.format) == fmt
    assert ref.equal(gptq.read(gptq.write(q), gptq.options(gptq.config_of(q), LAYER)), q)


def test_without_g_idx_groups_are_in_order():
    q = draw_weight(1, "int4_g32_fp16", (8, 64))
    parts = gptq.write(q, g_idx=False)
    assert "g_idx" not in parts
    assert ref.equal(gptq.read(parts, gptq.options(gptq.config_of(q), LAYER)), q)


def test_find():
    names = [f"{LAYER}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx", "bias")] + ["model.norm.weight"]
    assert gptq.find(names, {}) == {LAYER: {part: f"{LAYER}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}}


CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}


@pytest.mark.parametrize(
    ("more", "layer", "expected"),
    [
        ({}, LAYER, {"bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq"}),
        ({"checkpoint_format": "gptq_v2", "format": "gptq_v2"}, LAYER, {"checkpoint_format": "gptq_v2"}),
        ({"bits": 5}, LAYER, {"checkpoint_format": "gptq_p"}),
        ({"bits": None, "w_bit": 3, "group_size": None, "q_group_size": 64}, LAYER, {"bits": 3, "group_size": 64}),
        ({"dynamic": {"-:.*up_proj": {}, "+:.*": {"bits": 8}}}, LAYER, None),
        ({"dynamic": {"-:.*up_proj": {}, "+:.*": {"bits": 8}}}, "model.layers.0.mlp.down_proj", {"bits": 8}),
        ({"dynamic": {r"+:.*\.up": {"bits": 8, "group_size": -1, "sym": False}}}, LAYER, {"bits": 8, "group_size": -1, "sym": False}),
        ({}, "lm_head", None),
        ({"lm_head": True}, "lm_head", {"bits": 4}),
        ({"dynamic": {"+:lm_head": {"bits": 8}}}, "lm_head", {"bits": 8}),
        ({"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]]}, LAYER, {"bits": 4}),
        ({"modules_in_block_to_quantize": ["self_attn.q_proj"]}, LAYER, None),
        ({"meta": {"quantizer": ["optimum:1.2", "gptqmodel:7.7.0"]}}, LAYER, {"word_zeros": True}),
    ],
)
def test_options(more, layer, expected):
    found = gptq.options({**CONFIG, **more}, layer)
    assert found is None if expected is None else found == found | expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"bitz": 4}, "unknown key 'bitz'; the nearest known one is 'bits'"),
        ({"bits": "4"}, "bits is '4', expected an integer from 2 to 8"),
        ({"bits": None}, "bits is None"),
        ({"group_size": 0}, "group_size .* is 0"),
        ({"group_size": None, "q_group_size": True}, "group_size .* is True"),
        ({"w_bit": 8}, "contradict each other"),
        ({"sym": 1}, "sym is 1, expected one of True, False"),
        ({"checkpoint_format": "gptq_v3"}, "checkpoint_format is 'gptq_v3'"),
        ({"checkpoint_format": ["gptq"]}, r"checkpoint_format is \['gptq'\]"),
        ({"quant_method": "awq"}, "quant_method is 'awq'"),
        ({"dynamic": ["+:x"]}, "dynamic is .* expected a dict of dicts"),
        ({"dynamic": {"+:.*": {"bit": 8}}}, "dynamic override of .* unknown key 'bit'"),
        ({"dynamic": {"+:(": {"bits": 8}}}, "no regular expression"),
        ({"modules_in_block_to_quantize": "q_proj"}, "modules_in_block_to_quantize is 'q_proj'"),
    ],
)
def test_bad_configs(more, message):
    with pytest.raises(ValueError, match=message):
        gptq.options({**CONFIG, **more}, LAYER)


@pytest.mark.parametrize(
    "more", [{"checkpoint_format": "marlin"}, {"is_marlin_format": True}, {"pack_dtype": "int16"}, {"rotation": "hadamard"}]
)
def test_configs_that_are_not_read(more):
    with pytest.raises(NotImplementedError, match=next(iter(more))):
        gptq.options({**CONFIG, **more}, LAYER)


def parts(**changes):
    return {**gptq.write(draw_weight(1, "int4_g32_fp16", (8, 64))), **changes}


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"qzeros": None}, {}, "qzeros is missing"),
        ({"extra": torch.zeros(1)}, {}, "unexpected tensor extra"),
        ({"qweight": torch.zeros(8, 8)}, {}, "qweight has dtype torch.float32"),
        ({"qweight": torch.zeros(7, 8, dtype=torch.int32)}, {}, r"qweight has shape \(7, 8\), expected \(8, 8\)"),
        ({"qweight": torch.zeros(8, 9, dtype=torch.int32)}, {}, "qweight has shape .* with n=8 of scales"),
        ({"qzeros": torch.zeros(2, 2, dtype=torch.int32)}, {}, "qzeros has shape"),
        ({"qzeros": torch.zeros(2, 1, dtype=torch.int32)}, {}, "qzeros has the zero 1 .* but sym is true, which means 8"),
        ({"scales": torch.zeros(2, 8, dtype=torch.int32)}, {}, "scales has dtype"),
        ({"scales": torch.full((2, 8), float("nan"))}, {}, "scales is NaN or inf"),
        ({"scales": torch.ones(3, 8), "qzeros": torch.full((3, 1), 0x77777777)}, {}, "qzeros has dtype"),
        ({"g_idx": torch.full((64,), 2, dtype=torch.int32)}, {}, "g_idx ranges from 2 to 2, expected 0 to 1"),
        ({"g_idx": torch.full((64,), -1, dtype=torch.int32)}, {}, "g_idx ranges from -1"),
        ({"g_idx": torch.zeros(64)}, {}, "g_idx has dtype"),
        ({"g_idx": torch.arange(64).flip(0) // 32}, {"desc_act": False}, "g_idx reorders the groups, but desc_act is false"),
        ({}, {"group_size": 16}, "scales has 2 groups, expected ceil"),
        ({"g_idx": None, "qweight": torch.zeros(8, 8, dtype=torch.int32)}, {"bits": 5}, "fit no k at 5 bits"),
    ],
)
def test_bad_parts(changes, options, message):
    with pytest.raises(ValueError, match=f"gptq: .*{message}" if not message.startswith("gptq") else message):
        gptq.read(parts(**changes), gptq.options(CONFIG, LAYER) | {"desc_act": None} | options)


@pytest.mark.parametrize(
    ("fmt", "shape", "options", "message"),
    [
        ("uint4z_g32", (8, 64), {"checkpoint_format": "gptq"}, "version 1 stores zero - 1"),
        ("int5", (32, 32), {"checkpoint_format": "gptq_v2"}, "which checkpoint_format 'gptq_p' alone has"),
        ("int5", (32, 33), {"checkpoint_format": "gptq_p"}, "packs whole blocks of 32"),
        ("int4", (8, 64), {"checkpoint_format": "v2"}, "checkpoint_format is 'v2'"),
        ("uint4_zfp16", (8, 64), {}, "got uint4_zfp16, expected integers"),
        ("nvfp4", (8, 64), {}, "got nvfp4, expected integers"),
        ("int4_b32x32", (32, 64), {}, "expected integers"),
        ("int4", (2, 8, 64), {}, "experts are layers of their own"),
    ],
)
def test_what_cannot_be_written(fmt, shape, options, message):
    with pytest.raises(ValueError, match=f"gptq: .*{message}"):
        gptq.write(draw_weight(1, fmt, shape), **options)
