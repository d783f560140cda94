"""Marlin: what AutoGPTQ and vLLM's reference pack, round trips, refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ref
from conformance.weights import draw_weight
from ref.layouts import gptq, marlin
from ref.layouts.test_gptq import LAYER, golden

GOLDEN = golden("marlin")
CONFIG = {"quant_method": "marlin", "bits": 4, "group_size": 32}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_layers(case):
    config, parts, expected = GOLDEN[case]
    q = marlin.read(parts, marlin.options(config, LAYER))
    assert torch.equal(ref.dequantize(q, expected.dtype), expected)
    written = marlin.write(q)
    assert written.keys() == parts.keys() and all(torch.equal(written[name], tensor) for name, tensor in parts.items())


@given(st.integers(0, 2**32), st.sampled_from([4, 8]), st.sampled_from(["", "_g16", "_g48"]), st.integers(1, 3), st.integers(1, 2))
def test_what_is_written_reads_back(seed, bits, group, n, k):
    q = draw_weight(seed, f"int{bits}{group}_bf16", (64 * n, 48 * k))
    assert ref.equal(marlin.read(marlin.write(q), marlin.options(marlin.config_of(q), LAYER)), q)


def test_a_gptq_layer_is_repacked():
    q = draw_weight(1, "int4_g32_fp16", (64, 64))
    again = gptq.read(gptq.write(q), gptq.options(gptq.config_of(q), LAYER))
    assert all(torch.equal(a, b) for a, b in zip(marlin.write(again).values(), marlin.write(q).values(), strict=True))


def test_find_and_options():
    assert marlin.find(["a.B", "a.s", "a.bias"], {}) == {"a": {"B": "a.B", "s": "a.s"}}
    assert marlin.options(CONFIG, LAYER) == {"bits": 4, "group_size": 32}
    assert marlin.options(CONFIG, "lm_head") is None
    assert marlin.options({**CONFIG, "lm_head": True}, "lm_head") == {"bits": 4, "group_size": 32}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"bitz": 4}, "unknown key 'bitz'"),
        ({"bits": 3}, "bits is 3, expected one of 4, 8"),
        ({"group_size": "128"}, "group_size .* is '128'"),
        ({"sym": False}, "sym is False"),
        ({"desc_act": True}, "desc_act is True"),
        ({"checkpoint_format": "gptq"}, "checkpoint_format is 'gptq'"),
        ({"lm_head": 1}, "lm_head is 1"),
    ],
)
def test_bad_configs(more, message):
    with pytest.raises(ValueError, match=message):
        marlin.options({**CONFIG, **more}, LAYER)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"s": None}, {}, "s is missing"),
        ({"B": torch.zeros(4, 128)}, {}, "B has dtype"),
        ({"B": torch.zeros(4, 64, dtype=torch.int32)}, {}, r"B has shape \(4, 64\), expected \(any, 128\)"),
        ({}, {"group_size": 64}, "s has 2 groups, expected"),
        ({}, {"group_size": 48}, "got n=64, k=64"),
        ({"s": torch.full((2, 64), float("nan"))}, {}, "s is NaN or inf"),
        ({"B": torch.zeros(4, 64, dtype=torch.int32), "s": torch.ones(2, 32)}, {}, "got n=32, k=64, expected multiples of 64"),
    ],
)
def test_bad_parts(changes, options, message):
    parts = {**marlin.write(draw_weight(1, "int4_g32_fp16", (64, 64))), **changes}
    with pytest.raises(ValueError, match=f"marlin: .*{message}"):
        marlin.read(parts, marlin.options(CONFIG, LAYER) | options)


@pytest.mark.parametrize(
    ("fmt", "shape", "order", "message"),
    [
        ("int3", (64, 64), False, "expected integers of 4, 8 bits"),
        ("uint4z", (64, 64), False, "q has zero points"),
        ("int4_g32", (64, 64), True, "a group_index"),
        ("int4", (32, 64), False, "got n=32, k=64"),
        ("int4_g24", (64, 64), False, "group_size=24"),
    ],
)
def test_what_cannot_be_written(fmt, shape, order, message):
    with pytest.raises(ValueError, match=f"marlin: .*{message}"):
        marlin.write(draw_weight(1, fmt, shape, order=order))
