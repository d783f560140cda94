from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import ref
from conformance.vectors import stored
from conformance.weights import draw_weight
from ref.layouts import bitnet

CASES, TENSORS = stored("bitnet")
LAYER = "model.layers.0.mlp.up_proj"


def parts_of(case):
    return {part: TENSORS[f"{case}/{part}"] for part in ("weight", "weight_scale")}


@pytest.mark.parametrize("case", sorted(CASES))
def test_golden(case):
    parts = parts_of(case)
    options = bitnet.options(CASES[case]["config"], LAYER)
    q = bitnet.read(parts, options)
    assert torch.equal(ref.dequantize(q, torch.float32), TENSORS[f"{case}/expected"])
    written = bitnet.write(q, **options, dtype=parts["weight_scale"].dtype)
    assert all(written[p].dtype == parts[p].dtype and torch.equal(written[p], parts[p]) for p in parts)


@given(st.integers(0, 2**32), st.sampled_from([bitnet.DIVIDED, *bitnet.MULTIPLIED.values()]), st.integers(0, 9), st.integers(0, 70))
def test_round_trip(seed, fmt, rows, k):
    q = draw_weight(seed, fmt, (4 * rows, k))
    codes = ref.unpack(q.packed, 2, k).clamp(min=1)
    q = replace(q, packed=ref.pack(codes, 2), scale=torch.ones(1, 1) if fmt == bitnet.DIVIDED else q.scale)
    config = bitnet.config_of(q)
    assert ref.equal(bitnet.read(bitnet.write(q), bitnet.options(config, "layer")), q)


def test_every_byte():
    weight = torch.arange(256, dtype=torch.uint8).reshape(1, 256)
    fields = torch.stack([weight[0] >> 2 * i & 3 for i in range(4)])
    for row in range(256):
        parts = {"weight": weight[:, row : row + 1], "weight_scale": torch.ones(1)}
        if bool((fields[:, row] == 3).any()):
            with pytest.raises(ValueError, match="bitnet: weight has the code 3"):
                bitnet.read(parts, {"linear_class": "bitlinear"})
        else:
            q = bitnet.read(parts, {"linear_class": "bitlinear"})
            assert torch.equal(ref.dequantize(q)[:, 0], fields[:, row].double() - 1)


def test_find_and_options():
    names = ["a.weight", "a.weight_scale", "a.bias", "norm.weight"]
    assert bitnet.find(names, {}) == {"a": {"weight": "a.weight", "weight_scale": "a.weight_scale"}}
    config = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head"],
    }
    assert bitnet.options(config, LAYER) == {"linear_class": "autobitlinear"}
    assert bitnet.options(config, "lm_head") is None
    assert bitnet.options({}, LAYER) == {"linear_class": "bitlinear"}
    online = {"linear_class": "autobitlinear", "quantization_mode": "online"}
    for call in (lambda: bitnet.options(online, LAYER), lambda: bitnet.find(names, online)):
        with pytest.raises(NotImplementedError, match="bitnet: quantization_mode 'online' stores weights that are not quantized"):
            call()


@pytest.mark.parametrize(
    "config, message",
    [
        ({"linear_clas": "bitlinear"}, "unknown key 'linear_clas'; the nearest known one is 'linear_class'"),
        ({"linear_class": "BitLinear"}, "linear_class is 'BitLinear', expected one of"),
        ({"quantization_mode": None}, "quantization_mode is None"),
        ({"modules_to_not_convert": {"a": 1}}, "modules_to_not_convert is"),
        ({"modules_to_not_convert": ["*"]}, "no regular expression"),
        (None, "expected a dict"),
    ],
)
def test_bad_config(config, message):
    with pytest.raises(ValueError, match=message):
        bitnet.options(config, LAYER)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight_scale": None}, "weight_scale is missing"),
        ({"scale": torch.ones(1)}, "unexpected tensor scale"),
        ({"weight": torch.ones(4, 4)}, "weight has dtype torch.float32, expected torch.uint8"),
        ({"weight": torch.ones(4, dtype=torch.uint8)}, r"weight has shape \(4,\), expected \(any, any\) \(n / 4, k\)"),
        ({"weight_scale": torch.ones(2)}, r"weight_scale has shape \(2,\), expected \(1,\)"),
        ({"weight_scale": torch.ones(1, dtype=torch.int32)}, "weight_scale has dtype torch.int32"),
        ({"weight_scale": torch.zeros(1)}, "weight_scale is 0"),
        ({"weight_scale": torch.full((1,), torch.nan)}, "is NaN or inf"),
    ],
)
def test_bad_parts(change, message):
    with pytest.raises(ValueError, match=message):
        bitnet.read(parts_of("bitlinear") | change, {"linear_class": "bitlinear"})


def good():
    return bitnet.read(parts_of("bitlinear"), {"linear_class": "bitlinear"})


@pytest.mark.parametrize(
    "q, options, message",
    [
        (draw_weight(0, "int2_g64", (8, 64)), {}, "got int2_g64 of shape"),
        (replace(good(), packed=good().packed * 0), {}, "q has the value -2"),
        (replace(good(), scale=torch.full((1, 1), 2.0)), {}, "a scale beside its divisor that is not 1"),
        (
            ref.QTensor(bitnet.DIVIDED, (3, 1), torch.ones(3, 1, dtype=torch.int32), torch.ones(1, 1), scale_2=torch.ones(1, 1)),
            {},
            "got n=3",
        ),
        (good(), {"linear_class": "autobitlinear"}, "got linear_class='autobitlinear'"),
        (replace(good(), scale_2=torch.full((1, 1), 0.1)), {"dtype": torch.bfloat16}, "weight_scale 0.1.* is no torch.bfloat16"),
    ],
)
def test_what_cannot_be_stored(q, options, message):
    with pytest.raises(ValueError, match=message):
        bitnet.write(q, **options)
