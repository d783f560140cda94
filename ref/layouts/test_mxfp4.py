import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import ref
from conformance.vectors import stored
from conformance.weights import draw_weight
from ref.layouts import mxfp4

CASES, TENSORS = stored("mxfp4")
LAYER = "model.layers.0.mlp.experts.gate_up_proj"


def parts_of(case):
    return {part: TENSORS[f"{case}/{part}"] for part in ("blocks", "scales")}


@pytest.mark.parametrize("case", sorted(CASES))
def test_golden(case):
    parts = parts_of(case)
    q = mxfp4.read(parts, mxfp4.options(CASES[case]["config"], LAYER))
    expected = TENSORS[f"{case}/expected"]
    assert torch.equal(ref.dequantize(q, expected.dtype).mT, expected)
    written = mxfp4.write(q)
    assert written.keys() == parts.keys() and all(torch.equal(written[p], parts[p]) for p in parts)


def test_deinterleave():
    q = mxfp4.read(parts_of("gate_up"), {})
    gate, up = mxfp4.deinterleave(q)
    w = TENSORS["gate_up/expected"]  # as transformers' module has it: gate is every second column
    assert torch.equal(ref.dequantize(gate, w.dtype).mT, w[..., 0::2])
    assert torch.equal(ref.dequantize(up, w.dtype).mT, w[..., 1::2])
    with pytest.raises(ValueError, match=r"mxfp4.deinterleave: got n=7, expected an even number"):
        mxfp4.deinterleave(draw_weight(0, "mxfp4", (7, 32)))


@given(st.integers(0, 2**32), st.integers(0, 4), st.integers(0, 20), st.integers(0, 5))
def test_round_trip(seed, e, n, groups):
    q = draw_weight(seed, "mxfp4", (e, n, 32 * groups) if e else (n, 32 * groups))
    config = mxfp4.config_of(q)
    assert ref.equal(mxfp4.read(mxfp4.write(q), mxfp4.options(config, "layer")), q)


def test_the_tensors_are_not_shared():
    parts = parts_of("down")
    q = mxfp4.read(parts, {})
    kept = ref.dequantize(q)
    parts["blocks"].add_(1), parts["scales"].add_(1)
    mxfp4.write(q)["scales"].zero_()
    assert torch.equal(ref.dequantize(q), kept)
    parts["blocks"].sub_(1), parts["scales"].sub_(1)


def test_find_and_options():
    names = [f"{LAYER}_{part}" for part in ("blocks", "scales", "bias")] + ["model.norm.weight", "x.down_proj_blocks"]
    assert mxfp4.find(names, {}) == {
        LAYER: {"blocks": f"{LAYER}_blocks", "scales": f"{LAYER}_scales"},
        "x.down_proj": {"blocks": "x.down_proj_blocks"},
    }
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]}
    assert mxfp4.options(config, LAYER) == {}
    assert mxfp4.options(config, "model.layers.11.self_attn.q_proj") is None
    assert mxfp4.options({"quant_method": "mxfp4"}, "lm_head") == {}
    for bad, message in (
        ({"bits": 4}, "unknown key 'bits'"),
        ({"modules_to_not_convert": "lm_head"}, "expected a list"),
        ([], "expected a dict"),
    ):
        with pytest.raises(ValueError, match=message):
            mxfp4.options(bad, LAYER)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scales": None}, "scales is missing"),
        ({"bias": torch.ones(3)}, "unexpected tensor bias"),
        ({"blocks": torch.zeros(2, 4, 3, 16)}, "blocks has dtype torch.float32, expected torch.uint8"),
        ({"blocks": torch.zeros(2, 4, 3, 8, dtype=torch.uint8)}, r"blocks has shape \(2, 4, 3, 8\), expected \(e, n, k / 32, 16\)"),
        ({"blocks": torch.zeros(4, 16, dtype=torch.uint8)}, r"blocks has shape \(4, 16\)"),
        ({"scales": torch.zeros(2, 24, 4, dtype=torch.uint8)}, r"scales has shape \(2, 24, 4\), expected \(2, 24, 3\)"),
        ({"scales": torch.zeros(2, 24, 3)}, "scales has dtype torch.float32"),
        ({"scales": torch.full((2, 24, 3), 255, dtype=torch.uint8)}, "scale of mxfp4 is NaN"),
    ],
)
def test_bad_parts(change, message):
    with pytest.raises(ValueError, match=message):
        mxfp4.read(parts_of("down") | change, {})


@pytest.mark.parametrize(
    "name, shape, message", [("nvfp4", (8, 32), "got nvfp4"), ("mxfp4", (8, 33), "got k=33, expected a multiple of 32")]
)
def test_what_cannot_be_stored(name, shape, message):
    with pytest.raises(ValueError, match=message):
        mxfp4.write(draw_weight(0, name, shape))
    with pytest.raises(ValueError, match="without group_index"):
        mxfp4.write(draw_weight(0, "mxfp4", (8, 64), order=True))
