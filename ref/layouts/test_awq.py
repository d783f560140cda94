"""AWQ: golden layers of AutoAWQ and AutoRound, round trips, refusals."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ref
from conformance.weights import draw_weight
from ref.layouts import awq
from ref.layouts.test_gptq import LAYER, golden

GOLDEN = golden("awq")
CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_layers_mean_what_their_library_says(case):
    config, parts, expected = GOLDEN[case]
    q = awq.read(parts, awq.options(config, LAYER))
    assert torch.equal(ref.dequantize(q, expected.dtype), expected)


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_layers_are_written_byte_for_byte(case):
    config, parts, _ = GOLDEN[case]
    written = awq.write(awq.read(parts, awq.options(config, LAYER)), version=config["version"])
    assert written.keys() == parts.keys()
    for name, tensor in parts.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor), name


@st.composite
def layers(draw):
    version = draw(st.sampled_from(["gemm", "gemv", "gemv_fast", "marlin"]))
    seed, group = draw(st.integers(0, 2**32)), draw(st.sampled_from([0, 32, 64, 128]))
    k = (group or 64) * draw(st.integers(1, 3)) * (2 if version == "gemv_fast" else 1)
    bits = draw(st.integers(4, 7)) if version == "gemm" else 4
    n = draw(st.integers(1, 4)) * {"gemm": 8 if bits == 4 else 32, "gemv": 1, "gemv_fast": 4, "marlin": 64}[version]
    by = f"_g{group}" if group else ""
    if version == "gemv_fast":
        q = draw_weight(seed, f"uint4{by}_fp16_ofp16", (n, k))
    else:
        element = f"uint{bits}z" if version != "marlin" and draw(st.booleans()) else f"int{bits}"
        q = draw_weight(seed, element + by + draw(st.sampled_from(["_fp16", "_bf16"])), (n, k))
    return q, version


@given(layers())
def test_what_is_written_reads_back(layer):
    q, version = layer
    options = awq.options(awq.config_of(q, version=version), LAYER)
    assert ref.equal(awq.read(awq.write(q, version=version), options), q)


def test_without_qzeros_the_zero_is_in_the_middle():
    q = draw_weight(1, "int4_g32_fp16", (8, 64))
    parts = awq.write(q)
    del parts["qzeros"]
    assert ref.equal(awq.read(parts, awq.options(awq.config_of(q), LAYER)), q)


@pytest.mark.parametrize(
    ("more", "layer", "expected"),
    [
        ({}, LAYER, {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}),
        ({"version": "GEMV"}, LAYER, {"version": "gemv"}),
        ({"version": "exllama"}, LAYER, {"version": "gemm"}),
        ({"bits": None, "w_bit": 4, "group_size": None, "q_group_size": 128}, LAYER, {"bits": 4, "group_size": 128}),
        ({"modules_to_not_convert": ["visual", "up_proj"]}, LAYER, None),
        ({"modules_to_not_convert": ["model.layers.0"]}, LAYER, None),
        ({"modules_to_not_convert": ["mlp.up", "model.layers.1"]}, LAYER, {"bits": 4}),
        ({"modules_to_not_convert": None}, LAYER, {"bits": 4}),
        ({"zero_point": None, "sym": True, "bits": 6}, LAYER, {"bits": 6, "zero_point": False}),
    ],
)
def test_options(more, layer, expected):
    found = awq.options({**CONFIG, **more}, layer)
    assert found is None if expected is None else found == found | expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"bitz": 4}, "unknown key 'bitz'; the nearest known one is 'bits'"),
        ({"bits": 8}, "bits is 8, expected one of 4, 5, 6, 7"),
        ({"bits": 5, "version": "gemv"}, "bits is 5, expected one of 4"),
        ({"bits": "4"}, "bits is '4'"),
        ({"group_size": 0}, "group_size .* is 0"),
        ({"zero_point": "yes"}, "zero_point is 'yes'"),
        ({"sym": True}, "zero_point and sym are both True"),
        ({"version": "gemx"}, "version is 'gemx'"),
        ({"version": 2}, "version is 2"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head', expected a list"),
        ({"modules_to_not_convert": ["("]}, "no regular expression"),
    ],
)
def test_bad_configs(more, message):
    with pytest.raises(ValueError, match=message):
        awq.options({**CONFIG, **more}, LAYER)


@pytest.mark.parametrize("more", [{"version": "llm-awq"}, {"backend": "llm-awq"}, {"dynamic": {"-:.*": {}}}])
def test_configs_that_are_not_read(more):
    with pytest.raises(NotImplementedError, match=r"llm-awq|dynamic"):
        awq.options({**CONFIG, **more}, LAYER)


def parts_of(version, **changes):
    fmt = "uint4_g32_fp16_ofp16" if version == "gemv_fast" else "uint4z_g32_fp16"
    return {**awq.write(draw_weight(1, fmt, (8, 64)), version=version), **changes}


@pytest.mark.parametrize(
    ("version", "changes", "options", "message"),
    [
        ("gemm", {"qzeros": None}, {}, "qzeros is missing"),
        ("gemm", {"g_idx": torch.zeros(64)}, {}, "unexpected tensor g_idx"),
        ("gemm", {"qweight": torch.zeros(64, 1)}, {}, "qweight has dtype"),
        ("gemm", {"qweight": torch.zeros(64, 2, dtype=torch.int32)}, {}, r"qweight has shape \(64, 2\), expected \(any, 1\)"),
        ("gemm", {"qweight": torch.zeros(60, 1, dtype=torch.int32)}, {}, "k=60 is no multiple of group_size=32"),
        ("gemm", {"qzeros": torch.zeros(1, 1, dtype=torch.int32)}, {}, "qzeros has shape"),
        ("gemm", {"scales": torch.ones(2, 7)}, {}, "scales has n=7 columns, expected a multiple of 8"),
        ("gemm", {"scales": torch.full((2, 8), float("inf"))}, {}, "scales is NaN or inf"),
        ("gemm", {}, {"group_size": 64}, "scales has 2 groups, expected"),
        ("gemm", {"qzeros": torch.zeros(2, 1, dtype=torch.int32)}, {"zero_point": False}, "qzeros has the zero 0, but zero_point is false"),
        ("gemv", {"scales": torch.ones(8, 2)}, {}, r"scales has shape \(8, 2\), expected \(8, 32\)"),
        ("gemv", {"qzeros": torch.zeros(8, 1, dtype=torch.int32)}, {}, "qzeros has shape"),
        ("gemv", {}, {"group_size": 16}, "group_size is 16, expected 32, 64, or 128 and more"),
        ("gemv_fast", {"qweight": torch.zeros(2, 32, dtype=torch.int16)}, {}, "qweight has k=32 columns, expected a multiple of 64"),
        ("gemv_fast", {"qzeros": torch.full((32, 8), float("nan"), dtype=torch.float16)}, {}, "qzeros is NaN or inf"),
        ("gemv_fast", {}, {"zero_point": False}, "zero_point is false"),
        ("marlin", {"qzeros": None}, {}, "zero_point is true, but version marlin has no zero points"),
    ],
)
def test_bad_parts(version, changes, options, message):
    parts = {**(parts_of(version) if version != "marlin" else parts_of("gemm")), **changes}
    with pytest.raises(ValueError, match=f"awq: .*{message}"):
        awq.read(parts, awq.options({**CONFIG, "version": version}, LAYER) | options)


@pytest.mark.parametrize(
    ("fmt", "shape", "version", "message"),
    [
        ("int8_fp16", (8, 64), "gemm", "expected integers of 4, 5, 6, 7 bits"),
        ("int5_fp16", (8, 64), "gemm", "n=8, expected a multiple of 32"),
        ("int5_fp16", (8, 64), "gemv", "expected integers of 4 bits"),
        ("int4_g48", (8, 64), "gemm", "AWQ has no partial groups"),
        ("int4", (8, 60), "gemv", "k=60, expected a multiple of 8"),
        ("int4_fp16", (8, 64), "gemv_fast", "float16 scales and offsets"),
        ("uint4_fp16_ofp16", (8, 32), "gemv_fast", "expected multiples of 4 and 64"),
        ("int4", (8, 64), "exllama", "version is 'exllama'"),
    ],
)
def test_what_cannot_be_written(fmt, shape, version, message):
    with pytest.raises(ValueError, match=f"awq: .*{message}"):
        awq.write(draw_weight(1, fmt, shape), version=version)


def test_a_group_index_is_refused():
    q = draw_weight(1, "int4_g32", (8, 64))
    with pytest.raises(ValueError, match="awq: q has a group_index"):
        awq.write(replace(q, group_index=(torch.arange(64) % 2).int()))
