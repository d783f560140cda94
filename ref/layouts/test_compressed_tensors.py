"""compressed-tensors against its own compressors (golden vectors), round trips, and everything that it refuses."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ref
from conformance.vectors import parts_of, stored
from conformance.weights import draw_weight
from ref.element import NAMED, Float, Int
from ref.format import Format
from ref.layouts import compressed_tensors as ct

CASES, TENSORS = stored("compressed_tensors")
LAYER = "model.layers.0.mlp.up_proj"


def golden(name):
    return *parts_of(TENSORS, name), CASES[name]["config"]


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    parts, expected, config = golden(name)
    options = ct.options(config, LAYER)
    q = ct.read(parts, options)
    assert torch.equal(ref.dequantize(q, expected.dtype), expected)
    sparse = config.get("sparsity_config", {}).get("format")
    packing = "padded" if options["format"] == "pack-quantized" and CASES[name]["version"] < "0.18" else "dense"
    written = ct.write(q, format=options["format"], packing=packing, sparse=sparse)
    parts.pop("weight_g_idx", None) if q.group_index is None else None
    assert written.keys() == parts.keys()
    if name == "sparse_24_bitmask_int8_channel":  # where three of four are zero the mask has a free choice
        assert torch.equal(ct.dense(written), ct.dense(parts))
    else:
        assert all(same(written[part], parts[part]) for part in parts)


def test_nvfp4_rounds_twice_in_the_library():
    parts, expected, config = golden("nvfp4")
    q = ct.read(parts, ct.options(config, LAYER))
    values = ref.decode(ref.unpack(q.packed, 4, 96), q.format.element).float()
    scale = parts["weight_scale"].float() / parts["weight_global_scale"]  # one rounding; the product with it is another
    assert torch.equal((values * scale.repeat_interleave(16, 1)).bfloat16(), expected)


def test_representative_formats():
    for name in ct.FORMATS:
        q = draw_weight(3, name, (128, 128))
        assert ref.equal(ct.read(ct.write(q), ct.options(ct.config_of(q), "layer")), q), name


@st.composite
def weights(draw):
    kind = draw(st.sampled_from(["int", "int", "uint", "fp8", "nvfp4", "mx"]))
    stacked = draw(st.booleans())
    shape = (*([draw(st.integers(1, 3))] * stacked), draw(st.integers(1, 40)), draw(st.integers(1, 70)))
    scale = draw(st.sampled_from(["fp32", "fp16", "bf16"]))
    gk = draw(st.integers(1, 40))
    group = draw(st.sampled_from([(0, 0), (1, 0), (1, gk), (draw(st.integers(2, 9)), gk)]))
    bits = draw(st.integers(1, 8))
    fmt = {
        "int": Format(Int(bits), scale, group),
        "uint": Format(Int(bits, signed=False), scale, group, zero="int"),
        "fp8": Format(NAMED["e4m3"], scale, group),
        "nvfp4": Format(Float(2, 1), "e4m3", (1, 16), scale_2="tensor_divisor"),
        "mx": Format(draw(st.sampled_from([Float(2, 1), Float(2, 3), NAMED["e4m3"]])), "e8m0", (1, 32)),
    }[kind]
    if not isinstance(fmt.element, Int):
        shape = (*shape[:-1], shape[-1] * 4)
    if draw(st.integers(0, 4)) == 0:
        fmt = replace(fmt, hadamard=shape[-1] & -shape[-1])
    return draw_weight(draw(st.integers(0, 999)), fmt, shape, order=fmt.group[0] == 1 and fmt.group[1] > 0 and draw(st.booleans()))


@given(weights(), st.sampled_from(["dense", "padded"]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_round_trip(q, packing, other_format):
    options = {"packing": packing} if isinstance(q.format.element, Int) else {}
    if other_format and (isinstance(q.format.element, Int) or (q.format.element == NAMED["e4m3"] and q.format.scale != "e8m0")):
        options = {"format": "naive-quantized"}
    config = json.loads(json.dumps(ct.config_of(q, **options)))
    assert ref.equal(ct.read(ct.write(q, **options), ct.options(config, "any.layer")), q)


@given(st.integers(0, 999), st.sampled_from(["int8", "int8_tensor_bf16", "fp8_bf16"]), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_sparse_round_trip(seed, fmt, n, fours):
    q = draw_weight(seed, fmt, (n, 4 * fours))
    keep = torch.rand(n, fours, 4, generator=torch.Generator().manual_seed(seed)).argsort(-1) < seed % 3
    zero = 128 if isinstance(q.format.element, Int) else 0
    codes = torch.where(keep.flatten(-2), ref.unpack(q.packed, 8, 4 * fours), zero)
    q = replace(q, packed=ref.pack(codes, 8))
    data = "naive-quantized"
    for sparse in ("sparse-24-bitmask", "sparse-bitmask"):
        parts = ct.write(q, format=data, sparse=sparse)
        assert ref.equal(ct.read(parts, ct.options(ct.config_of(q, format=data, sparse=sparse), "a")), q)


def config(**changes):
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}} | changes


def scheme(bits, targets, **group):
    return {"targets": targets, "weights": {"num_bits": bits, "type": "int"}} | group


def test_find():
    names = [f"a.{part}" for part in ("weight_packed", "weight_scale", "weight_shape", "input_global_scale", "bias")]
    names += [
        "b.weight",
        "b.weight_scale",
        "b.input_scale",
        "c.weight",
        "attn.k_scale",
        "d.compressed",
        "d.bitmask",
        "d.shape",
        "d.weight_scale",
    ]
    found = ct.find(names, config())
    assert {layer: sorted(parts) for layer, parts in found.items()} == {
        "a": ["input_global_scale", "weight_packed", "weight_scale", "weight_shape"],
        "b": ["input_scale", "weight", "weight_scale"],
        "d": ["bitmask", "compressed", "shape", "weight_scale"],
    }


def test_targets_and_ignore():
    groups = {
        "any": scheme(2, ["Linear"]),
        "names": scheme(3, ["lm_head", "re:.*mlp.*"]),
        "later": scheme(5, ["re:.*mlp.up"]),
        "embedding": scheme(7, ["Embedding"], format="naive-quantized"),
    }
    c = config(config_groups=groups, ignore=["re:.*gate$", "vision"])
    bits = {
        name: (o := ct.options(c, name)) and o["bits"] for name in ("lm_head", "x.mlp.up", "x.q_proj", "x.mlp.gate", "vision", "vision2")
    }
    # Names come before expressions and those before classes; expressions in alphabetical order, "*mlp.*" before "*mlp.up".
    assert bits == {"lm_head": 3, "x.mlp.up": 3, "x.q_proj": 2, "x.mlp.gate": None, "vision": None, "vision2": 2}
    assert ct.options(c, "model.embed_tokens")["format"] == "naive-quantized"
    assert ct.options(config(config_groups={}), "a") is None
    assert ct.options(config(format="dense"), "a") is None
    assert ct.options(config(config_groups={"a": scheme(4, ["FancyLinear"])}), "a")["bits"] == 4
    assert ct.options(config(config_groups={"a": {"targets": ["Linear"], "weights": None}}), "a") is None


@pytest.mark.parametrize(
    ("weights", "inputs", "expected"),
    [
        ({"num_bits": 4, "type": "int"}, None, "pack-quantized"),
        ({"num_bits": 8, "type": "int"}, {"num_bits": 8}, "int-quantized"),
        ({"num_bits": 8, "type": "float"}, {"num_bits": 8}, "float-quantized"),
        ({"num_bits": 8, "type": "float"}, None, "naive-quantized"),
        ({"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"}, None, "nvfp4-pack-quantized"),
        ({"num_bits": 4, "type": "float", "group_size": 32}, None, "mxfp4-pack-quantized"),
        ({"num_bits": 6, "type": "FLOAT", "group_size": 32}, None, "mxfp6-pack-quantized"),
        ({"num_bits": 8, "type": "float", "group_size": 32, "scale_dtype": "torch.uint8"}, {"num_bits": 8}, "mxfp8-quantized"),
    ],
)
def test_mixed_precision(weights, inputs, expected):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    assert ct.options(config(format="mixed-precision", config_groups={"g": group}), "a")["format"] == expected
    group["format"] = "pack-quantized" if weights["type"] == "int" else expected
    assert ct.options(config(format="int-quantized", config_groups={"g": group}), "a")["format"] == group["format"]


@pytest.mark.parametrize(
    ("args", "strategy", "group_size"),
    [
        ({}, "tensor", None),
        ({"group_size": 64}, "group", 64),
        ({"group_size": -1}, "channel", None),
        ({"strategy": "CHANNEL"}, "channel", None),
    ],
)
def test_strategy(args, strategy, group_size):
    o = ct.options(config(config_groups={"g": {"targets": ["Linear"], "weights": {"num_bits": 4} | args}}), "a")
    assert (o["strategy"], o["group_size"]) == (strategy, group_size)


def test_version_tells_packings_apart():
    said = {
        version: ct.options(config(version=version), "a")["packing"] for version in ("0.9.1", "0.17.1.a20260101", "0.18.0", "1.0", None)
    }
    assert said == {"0.9.1": "padded", "0.17.1.a20260101": "padded", "0.18.0": "dense", "1.0": "dense", None: None}


def rotation(location, **group):
    return {
        "config_groups": {"R": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": location, "ignore": ["out"]}]} | group}
    }


def test_rotations():
    assert ct.options(config(transform_config=rotation("input", head_dim=64)), "a")["hadamard"] == 64
    assert ct.options(config(transform_config=rotation("input")), "a")["hadamard"] == -1
    assert ct.options(config(transform_config=rotation("input", head_dim=64)), "out")["hadamard"] == 0
    assert ct.options(config(transform_config=rotation("weight_output", type="random-matrix")), "a")["hadamard"] == 0
    for bad in (rotation("output"), rotation("input", type="random-hadamard"), rotation("input", randomize=True)):
        with pytest.raises(NotImplementedError, match=r"transform 'R' rotates the (in|out)put of a as the model runs"):
            ct.options(config(transform_config=bad), "a")
    q = ct.write(draw_weight(0, "int4_g32_bf16", (4, 96)))
    with pytest.raises(NotImplementedError, match="k=96 rotated in blocks of 96"):
        ct.read(q, ct.options(config(transform_config=rotation("input")), "a"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"formt": "dense"}, "unknown key 'formt'; the nearest known one is 'format'"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"format": "pack_quantized"}, "format is 'pack_quantized', expected one of 'pack-quantized'"),
        ({"format": None}, "format is None"),
        ({"format": "float-quantized"}, "format 'float-quantized' cannot hold weights of type 'int' and 4 bits"),
        ({"config_groups": []}, None),
        ({"config_groups": [1]}, r"config_groups is \[1\], expected a dict"),
        ({"config_groups": {"g": {"targets": []}}}, "has no targets"),
        ({"config_groups": {"g": {"targets": "Linear"}}}, "targets is 'Linear', expected a list"),
        ({"config_groups": {"g": scheme(4, ["Linear"], wieghts=1)}}, "unknown key 'wieghts'; the nearest known one is 'weights'"),
        ({"config_groups": {"g": scheme(4, ["Linear"]), "h": scheme(5, ["Linear"])}}, "target 'Linear' twice"),
        ({"config_groups": {"g": scheme(4, ["ALinear"]), "h": scheme(5, ["BLinear"])}}, "nothing says of which one a is"),
        ({"config_groups": {"g": scheme("4", ["Linear"])}}, "num_bits is '4', expected an integer from 1 to 8"),
        ({"config_groups": {"g": scheme(9, ["Linear"])}}, "num_bits is 9"),
        ({"config_groups": {"g": {"targets": ["Linear"], "weights": [4]}}}, "weights is list, expected a dict"),
        ({"config_groups": {"g": scheme(4, ["re:("])}}, "no regular expression"),
        ({"ignore": "lm_head"}, "ignore is 'lm_head'"),
        ({"version": 17}, "version is 17"),
        ({"kv_cache_scheme": {"bits": 8}}, "kv_cache_scheme has the unknown key 'bits'; the nearest known one is 'num_bits'"),
        ({"sparsity_config": {"format": "4:8"}}, "sparsity_config: format is '4:8'"),
        ({"transform_config": {"config_groups": {"R": {"apply": [{"location": "inputs"}]}}}}, "location is 'inputs'"),
        ({"transform_config": rotation("input", head_dim=24)}, "head_dim is 24, expected a power of two"),
    ],
)
def test_bad_config(changes, message):
    if message is None:
        assert ct.options(config(**changes), "a") is None
        return
    with pytest.raises(ValueError, match=message) as error:
        ct.options(config(**changes), "a")
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "fp"}, "type is 'fp'"),
        ({"symmetric": "true"}, "symmetric is 'true'"),
        ({"strategy": "token"}, "strategy is 'token'"),
        ({"strategy": "group", "group_size": None}, r"group_size \(strategy group\) is None"),
        ({"strategy": "channel", "group_size": 128}, "group_size is 128 and strategy 'channel'"),
        ({"group_size": "128"}, "group_size is '128'"),
        ({"strategy": "block"}, "block_structure is None and strategy 'block'"),
        ({"strategy": "channel", "block_structure": [1, 2]}, "expected both or neither"),
        ({"strategy": "block", "block_structure": "16y16"}, "block_structure is '16y16'"),
        ({"strategy": "block", "block_structure": [0, 16]}, "block_structure is 0"),
        ({"dynamic": True}, "dynamic is True"),
    ],
)
def test_bad_arguments(changes, message):
    weights = {"num_bits": 4, "type": "int"} | changes
    with pytest.raises(ValueError, match=message):
        ct.options(config(config_groups={"g": {"targets": ["Linear"], "weights": weights}}), "a")


@pytest.mark.parametrize(
    "changes", [{"format": "marlin-24"}, {"sparsity_config": {"format": "marlin-24"}}, {"config_groups": {"W8A8": ["Linear"]}}]
)
def test_not_implemented(changes):
    with pytest.raises(NotImplementedError, match="compressed-tensors"):
        ct.options(config(**changes), "a")


def change(name, **parts):
    """A golden case with some parts replaced (or, by None, left out), read."""
    found, _, stored = golden(name)
    found = {part: tensor for part, tensor in (found | parts).items() if tensor is not None}
    return ct.read(found, ct.options(stored, LAYER))


def zeros(*shape, dtype=torch.int32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "parts", "message"),
    [
        ("pack_int4_group", {"weight_packed": None}, "weight_packed is missing"),
        ("pack_int4_group", {"weight_shape": None}, "weight_shape is missing"),
        ("pack_int4_group", {"weight": zeros(1)}, "unexpected tensor weight"),
        ("pack_int4_group", {"weight_packed": zeros(10, 12, dtype=torch.int64)}, "weight_packed has dtype torch.int64"),
        ("pack_int4_group", {"weight_packed": zeros(10, 13)}, "weight_packed has 13 words for 96 codes of 4 bits, expected 12"),
        ("pack_int4_group", {"weight_shape": torch.tensor([9, 96])}, r"weight_shape is \[9, 96\] and weight_packed has shape \(10, 12\)"),
        ("pack_int4_group", {"weight_shape": torch.tensor([10, -96])}, r"weight_shape is \[10, -96\]"),
        ("pack_int4_group", {"weight_shape": torch.tensor([[10, 96]])}, "weight_shape has shape"),
        ("pack_int4_group", {"weight_scale": zeros(10, 3, dtype=torch.float64)}, "weight_scale has dtype torch.float64"),
        ("pack_int4_group", {"weight_scale": zeros(10, 2, dtype=torch.float32)}, r"weight_scale has shape \(10, 2\), expected \(10, 3\)"),
        ("pack_int4_group", {"weight_scale": torch.full((10, 3), float("nan"))}, "scale of int4_g32 is NaN or inf"),
        (
            "pack_int4_group",
            {"weight_zero_point": torch.ones(10, 3, dtype=torch.int8)},
            "weight_zero_point is not zero, but the config says symm",
        ),
        ("pack_int4_channel_odd", {"weight_packed": zeros(5, 7) - 1}, "has bits set behind the last code"),
        ("padded_int3_group", {"weight_packed": zeros(10, 10) - 1}, r"weight_packed has bits set behind the codes \(10 of 3 bits"),
        ("pack_uint4_group", {"weight_zero_point": None}, "weight_zero_point is missing"),
        ("pack_uint4_group", {"weight_zero_point": zeros(3, 3)}, "weight_zero_point has 3 words for 10 codes of 4 bits, expected 2"),
        ("pack_uint4_group", {"weight_zero_point": zeros(2, 4)}, r"weight_zero_point has shape \(2, 4\), expected \(any, 3\)"),
        ("pack_uint4_group", {"weight_zero_point": zeros(2, 3) - 1}, "weight_zero_point has bits set behind the last of 10"),
        (
            "padded_uint7_group",
            {"weight_zero_point": zeros(2, 3)},
            "weight_zero_point has 2 words for 10 codes .* the same packing in all parts",
        ),
        (
            "pack_uint4_tensor",
            {"weight_zero_point": torch.tensor([8], dtype=torch.int8)},
            "weight_zero_point ranges from 8 to 8, expected -8 to 7",
        ),
        ("g_idx_int4", {"weight_g_idx": zeros(95)}, r"weight_g_idx has shape \(95,\), expected \(96,\)"),
        ("g_idx_int4", {"weight_g_idx": zeros(96) + 3}, "weight_g_idx ranges from 3 to 3, expected 0 to 2"),
        ("pack_int4_tensor", {"weight_g_idx": zeros(96)}, "weight_g_idx gives groups, but the strategy is 'tensor'"),
        ("int8_channel", {"weight": zeros(0, 96, dtype=torch.int8)}, r"weight has shape \(0, 96\)"),
        ("int8_channel", {"weight_scale": zeros(1, 10, dtype=torch.float16)}, "one for each row"),
        ("int4_naive", {"weight": zeros(10, 96, dtype=torch.int8) - 9}, "weight ranges from -9 to -9, expected -8 to 7"),
        ("fp8_block_partial", {"weight_scale": zeros(2, 3, dtype=torch.float16)}, "one for each 4 rows and 32 columns"),
        ("fp8_tensor", {"weight": zeros(10, 96, dtype=torch.uint8)}, "weight has dtype torch.uint8, expected torch.float8_e4m3fn"),
        ("nvfp4", {"weight_global_scale": None}, "weight_global_scale is missing"),
        ("nvfp4", {"weight_global_scale": torch.zeros(1)}, "scale_2 .* is 0"),
        ("nvfp4", {"weight_global_scale": torch.ones(2)}, "weight_global_scale has shape"),
        ("nvfp4", {"weight_scale": zeros(10, 6, dtype=torch.uint8)}, "weight_scale has dtype torch.uint8"),
        ("mxfp4", {"weight_scale": zeros(10, 3, dtype=torch.uint8) + 255}, "scale of mxfp4 is NaN"),
        ("mxfp6", {"weight_packed": zeros(10, 71, dtype=torch.uint8)}, "rows of 71 bytes, expected whole groups of 3"),
        ("sparse_24_bitmask_float8_channel", {"bitmask": None}, "bitmask is missing"),
        ("sparse_24_bitmask_float8_channel", {"bitmask": zeros(10, 5, dtype=torch.uint8)}, "two bits set of each four"),
        ("sparse_24_bitmask_float8_channel", {"shape": torch.tensor([[10], [48]])}, r"shape is \[10, 48\] and bitmask has shape \(10, 5\)"),
        ("sparse_24_bitmask_float8_channel", {"compressed": zeros(10, 19, dtype=torch.int8)}, r"compressed has shape \(10, 19\)"),
        ("sparse_bitmask_int8_channel", {"compressed": zeros(7, dtype=torch.int8)}, "the number of bits set in bitmask"),
        ("sparse_bitmask_int8_channel", {"row_offsets": zeros(10)}, "row_offsets disagree"),
    ],
)
def test_bad_parts(name, parts, message):
    with pytest.raises(ValueError, match=rf"compressed-tensors: .*{message}"):
        change(name, **parts)


def test_ambiguous_width_needs_a_version():
    parts, _, stored = golden("pack_int3_ambiguous")
    stored = {key: value for key, value in stored.items() if key != "version"}
    with pytest.raises(ValueError, match="fits both packings of 3 bits, and the config has no version"):
        ct.read(parts, ct.options(stored, LAYER))


def test_floats_with_zero_points():
    parts, _, stored = golden("fp8_channel")
    stored["config_groups"]["group_0"]["weights"]["symmetric"] = False
    with pytest.raises(NotImplementedError, match="zero points of integers only"):
        ct.read(parts | {"weight_zero_point": torch.ones(10, 1, dtype=torch.float8_e4m3fn)}, ct.options(stored, LAYER))


@pytest.mark.parametrize(
    ("fmt", "options", "message"),
    [
        ("fp8_e5m2", {}, "no format has the element e5m2"),
        ("uint4", {}, "unsigned integers with zero None"),
        ("uint4_g32_zfp16", {}, "unsigned integers with zero 'fp16'"),
        ("uint4z_g32", {"format": "nvfp4-pack-quantized"}, "format for uint4z_g32 is 'nvfp4-pack-quantized'"),
        ("nvfp4", {}, "weight_global_scale is a divisor"),
        ("int4_g32_ue5m3", {}, "no format holds"),
        ("fp4_e2m1_g16", {}, "no format holds"),
        ("int4_b0x16", {}, "one scale for 0 rows and 16 columns"),
        ("int8", {"format": "int-quantized", "packing": "padded"}, None),
        ("int4", {"packing": "tight"}, "packing is 'tight'"),
        ("int4", {"sparse": "sparse-24-bitmask"}, "wraps a weight"),
        ("int8", {"format": "int-quantized", "sparse": "sparse-24-bitmask"}, "weight is not 2:4 sparse"),
    ],
)
def test_what_cannot_be_written(fmt, options, message):
    q = draw_weight(2, fmt, (4, 64))
    if message is None:
        assert ct.write(q, **options).keys() == {"weight", "weight_scale"}
        return
    with pytest.raises(ValueError, match=message):
        ct.write(q, **options)
