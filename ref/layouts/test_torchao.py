"""torchao: its own tensors read bit for bit, written back byte for byte, and what is refused."""

import json

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import ref
from conformance.vectors import FOLDER, parts_of, stored
from conformance.weights import draw_weight
from ref.layouts.torchao import FORMATS, class_of, config_of, find, metadata_of, options, read, write
from ref.layouts.torchao_tensors import swizzle, unswizzle
from ref.qtensor import equal
from ref.scale import untile

CASES, TENSORS = {}, {}
for golden in ("torchao", "torchao_cuda"):
    if (FOLDER / f"{golden}.safetensors").exists():
        cases, tensors = stored(golden)
        CASES, TENSORS = CASES | cases, TENSORS | tensors


def split(name):
    return parts_of(TENSORS, name)


def same(a, b):
    return a.keys() == b.keys() and all(a[p].dtype == b[p].dtype and a[p].shape == b[p].shape and raw(a[p]) == raw(b[p]) for p in a)


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def said(name):
    return options({"_metadata": CASES[name]["metadata"]}, "layer")


@pytest.mark.parametrize("name", CASES)
def test_golden_reads(name):
    parts, expected = split(name)
    q = read(parts, said(name))
    if name.startswith("int") and q.offset is None:
        # The difference is exact in every dtype; the product is rounded in the wider of scale's and weight's dtypes, then to the weight's.
        codes = ref.decode(ref.unpack(q.packed, q.format.element.bits, q.shape[-1]), q.format.element)
        values = codes if q.zero is None else codes - untile(q.zero.double(), q.format.group, q.shape)
        assert torch.equal((values.to(expected.dtype) * untile(q.scale, q.format.group, q.shape)).to(expected.dtype), expected)
        assert torch.equal(ref.dequantize(q), values * untile(q.scale.double(), q.format.group, q.shape))
    elif q.scale_2 is not None:  # the two scales are multiplied, and rounded, first
        scale = ref.decode(q.scale, ref.parse_element("e4m3")).float() * q.scale_2
        values = ref.decode(ref.unpack(q.packed, 4, q.shape[-1]), q.format.element).float()
        assert torch.equal((values * untile(scale, q.format.group, q.shape)).to(expected.dtype), expected)
    else:  # float32, then the weight's dtype
        assert torch.equal(ref.dequantize(q, torch.float32).to(expected.dtype), expected)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("int4_partial", "tiles", "tiles_padded")])
def test_golden_is_written_back(name):
    parts, _ = split(name)
    back = write(read(parts, said(name)), swizzled="swizzled" in name)
    assert same(back, parts)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("int4_partial", "tiles", "tiles_padded", "intx8_asym")])
def test_metadata_is_torchaos(name):
    """What metadata_of says is what torchao says, but for how activations are quantized and for which kernel.

    int8 with float32 scales is an Int8Tensor, whichever class it came from.
    """
    mine = metadata_of({"layer": read(split(name)[0], said(name))}, swizzled="swizzled" in name)
    theirs = CASES[name]["metadata"]
    assert mine["tensor_names"] == theirs["tensor_names"]
    mine, theirs = json.loads(mine["layer.weight"]), json.loads(theirs["layer.weight"])
    for key in ("dtype", "orig_dtype", "kernel_preference", "act_quant_kwargs"):
        assert (key in mine["_data"]) == (key in theirs["_data"])
        mine["_data"].pop(key, None), theirs["_data"].pop(key, None)
    assert mine == theirs


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]["config"]["quant_type"]])
def test_the_config_alone_says_enough(name):
    parts, _ = split(name)
    assert equal(read(parts, options(CASES[name]["config"], "layer")), read(parts, said(name)))


def test_formats_are_what_golden_reads():
    assert {str(read(split(name)[0], said(name)).format) for name in CASES} >= {
        *("int8", "int8_tensor", "int8_g32", "uint8z", "int4_g32_bf16", "fp8", "fp8_e5m2", "fp8_e4m3_tensor", "int4_g32_bf16_obf16"),
        *("mxfp8", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "nvfp4", "fp4_e2m1_g16_e4m3", "uint3z_g32", "fp8_e4m3_b16x32"),
    }


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**32),
    fmt=st.sampled_from(FORMATS),
    n=st.integers(1, 3),
    k=st.integers(2, 3),
    experts=st.integers(0, 2),
    swizzled=st.booleans(),
)
def test_round_trip(seed, fmt, n, k, experts, swizzled):
    shape = (*([experts] if experts else []), 128 * n if "b128" in fmt else 5 * n, 128 * k if "128" in fmt else 32 * k)
    q = draw_weight(seed, fmt, shape)
    assume(q.zero is None or bool((q.zero != 2 ** (q.format.element.bits - 1)).any()))
    if q.format.zero == "fp32":
        q = ref.QTensor(q.format, q.shape, q.packed, q.scale, q.zero.bfloat16().float())
    assume(not (swizzled and experts == 2 and shape[1] % 128))
    parts = write(q, swizzled=swizzled)
    assert equal(read(parts, options(config_of(q, swizzled=swizzled), "layer")), q)
    assert equal(read(parts, options({"_metadata": metadata_of({"layer": q}, swizzled=swizzled)}, "layer")), q)


def tiles_one_by_one(codes, t):
    """The CUDA kernel's loop, as PyTorch's int4mm.cu has it: a lane holds a row and a pair of columns of two k-tiles in a word."""
    n, k = codes.shape
    out = torch.zeros(n // 8, k // (32 * t), 32, t, dtype=torch.int64)
    for row in range(n // 8):
        for tile in range(k // (32 * t)):
            for lane in range(32):
                for inner in range(t):
                    base = (tile * t + inner) * 32 + lane % 4 * 2
                    ks = [base, base + 1, base + 8, base + 9, base + 16, base + 17, base + 24, base + 25]
                    v = [int(codes[8 * row + lane // 4, i]) for i in ks]
                    word = [v[0], v[2], v[4], v[6], v[1], v[3], v[5], v[7]]
                    out[row, tile, lane, inner] = sum(c << (4 * i) for i, c in enumerate(word))
    return torch.where(out >= 2**31, out - 2**32, out).int()


@pytest.mark.parametrize("t, shape", [(4, (10, 240)), (1, (8, 64)), (2, (16, 128))])
def test_tiles(t, shape):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (16 if shape[0] > 8 else 8, 256 if t == 4 else shape[1]), generator=generator)
    both = torch.randn(codes.shape[1] // 32, len(codes), 2, generator=generator).bfloat16()
    parts = {"_weight_qdata": tiles_one_by_one(codes, t), "_weight_scale_and_zero": both}
    q = read(parts, {"type": "Int4TilePackedTo4dTensor", "block_size": [1, 32], "shape": list(shape)})
    scale, zero = both.double().repeat_interleave(32, 0).unbind(-1)
    assert q.format == ref.parse_format("int4_g32_bf16_obf16")
    assert torch.equal(ref.dequantize(q), ((codes - 8) * scale.T + zero.T)[: shape[0], : shape[1]])


def test_plain_int32():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (6, 64), generator=generator, dtype=torch.uint8)
    scale = torch.randn(2, 6, generator=generator).half()
    zero = torch.randint(0, 16, (2, 6), generator=generator, dtype=torch.int8)
    packed = (codes[:, 1::2] << 4 | codes[:, 0::2]).view(torch.int32)
    parts = {"_weight_qdata": packed, "_weight_scale": scale, "_weight_zero_point": zero}
    meta = {"type": "Int4PlainInt32Tensor", "block_size": [1, 32], "shape": [6, 64]}
    q = read(parts, meta)
    scale, difference = scale.double().repeat_interleave(32, 0).T, codes - zero.double().repeat_interleave(32, 0).T
    assert torch.equal(ref.dequantize(q), difference * scale)
    assert equal(read(write(q), options(config_of(q), "layer")), q)
    with pytest.raises(NotImplementedError, match="torch_npu"):
        read(parts | {"_weight_zero_point": zero.half()}, meta)
    with pytest.raises(ValueError, match="zero_point ranges from 0 to 16, expected 0 to 15"):
        read(parts | {"_weight_zero_point": zero.clamp(max=0) + torch.tensor([0, 16, 0, 0, 0, 0], dtype=torch.int8)}, meta)


@settings(max_examples=20)
@given(rows=st.integers(1, 300), columns=st.integers(1, 20))
def test_swizzle(rows, columns):
    scale = (torch.arange(rows * columns) % 251).to(torch.uint8).reshape(rows, columns)
    tiles = swizzle(scale)
    assert torch.equal(unswizzle(tiles.flatten(), rows, columns), scale)
    row, column = rows - 1, columns - 1  # cuBLAS: tile by tile, (r % 32) * 16 + r // 32 * 4 + c
    tile = row // 128 * -(-columns // 4) + column // 4
    assert tiles.flatten()[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4] == scale[row, column]


def test_find():
    names = ["a.b._weight_qdata", "a.b._weight_scale", "a.b._weight_act_quant_scale", "a.b.bias", "a.norm.weight", "x._weight_scale"]
    names += ["a.experts._gate_up_proj_qdata", "a.experts._gate_up_proj_per_tensor_scale", "a.experts._gate_up_proj_scale"]
    assert find(names, {}) == {
        "a.b": {"_weight_qdata": names[0], "_weight_scale": names[1], "_weight_act_quant_scale": names[2]},
        "a.experts.gate_up_proj": {"_weight_qdata": names[6], "_weight_per_tensor_scale": names[7], "_weight_scale": names[8]},
    }


def config(kind, **data):
    return {"quant_type": {"default": {"_type": kind, "_data": data}}}


def test_options():
    assert options(config("Int8WeightOnlyConfig"), "x") == {"type": "Int8Tensor"}
    assert options(config("Int8WeightOnlyConfig") | {"modules_to_not_convert": ["lm_head"]}, "lm_head") is None
    assert options({"_metadata": {"x.weight": '{"_type": "Tensor"}'}}, "x") is None
    tiles = config("Int4WeightOnlyConfig", group_size=64, int4_packing_format="tile_packed_to_4d")
    assert options(tiles, "x") == {"type": "Int4TilePackedTo4dTensor", "block_size": [1, 64]}
    int8, int4 = config("Int8WeightOnlyConfig")["quant_type"]["default"], config("Int4WeightOnlyConfig")["quant_type"]["default"]
    rules = config("FqnToConfig", fqn_to_config={"_default": int8, r"re:.*\.up": int4, "a.up": None, "b.up.weight": int8})
    assert options(rules, "a.up") is None
    assert [options(rules, layer)["type"] for layer in ("b.up", "c.up", "c.down")] == ["Int8Tensor", "Int4Tensor", "Int8Tensor"]
    assert options(config("FqnToConfig", fqn_to_config={}), "x") is None


@pytest.mark.parametrize(
    "config, message",
    [
        ([], "quantization_config is list"),
        ({"quant_types": {}}, "unknown key 'quant_types'; the nearest known one is 'quant_type'"),
        ({}, "quant_type is NoneType, expected a dict"),
        ({"quant_type": {"default": []}}, "expected a dict with _type and _data"),
        ({"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": 8}}}, "_data of Int8WeightOnlyConfig is int"),
        (config("Int4WeightOnlyConfig", group_size="32"), "group_size is '32', expected an integer"),
        (config("Int4WeightOnlyConfig", int4_packing_format="tiles"), "int4_packing_format is 'TILES', expected one of 'PLAIN'"),
        (config("IntxWeightOnlyConfig", weight_dtype="int9"), "weight_dtype is 'int9'"),
        (config("FqnToConfig", fqn_to_config=[1]), "FqnToConfig is list, expected a dict"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head'"),
        ({"_metadata": {"layer.weight": "{"}}, "metadata of layer.weight is no JSON"),
        ({"_metadata": {"layer.weight": "[]"}}, "expected a dict with _type and _data"),
        ({"_metadata": {"layer.weight": '{"_type": "Int8Tensor", "_data": {"block_size": [1, 0]}}'}}, "block_size is [1, 0]"),
        ({"_metadata": {"layer.weight": '{"_type": "MXTensor", "_data": {"elem_dtype": "int8"}}'}}, "elem_dtype is 'int8'"),
    ],
)
def test_bad_config(config, message):
    with pytest.raises(ValueError, match=r"^torchao: ") as error:
        options(config, "layer")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"quant_type": "int4_weight_only"}, "only pickled its tensors"),
        (config("UIntxWeightOnlyConfig"), "'UIntxWeightOnlyConfig' has no reader; there is"),
        (config("Int4WeightOnlyConfig", int4_packing_format="preshuffled"), "Int4PreshuffledTensor is shuffled for one kernel library"),
        ({"_metadata": {"layer.weight": '{"_type": "AffineQuantizedTensor", "_data": {}}'}}, "'AffineQuantizedTensor' has no reader"),
    ],
)
def test_not_carried(config, message):
    with pytest.raises(NotImplementedError, match=r"^torchao: ") as error:
        options(config, "layer")
    assert message in str(error.value)


def with_(name, **changes):
    return {p: t for p, t in (split(name)[0] | {f"_weight_{p}": t for p, t in changes.items()}).items() if t is not None}, said(name)


@pytest.mark.parametrize(
    "parts, options, message",
    [
        ({}, {}, "options are {}, expected what options() gives"),
        (*with_("int8_row", scale=None), "_weight_scale is missing"),
        (*with_("int8_row", scales=torch.ones(1)), "unexpected tensor _weight_scales"),
        (*with_("int8_row", qdata=torch.zeros(24, 64, dtype=torch.uint8)), "qdata has dtype torch.uint8, expected torch.int8"),
        (*with_("int8_row", qdata=torch.zeros(64, dtype=torch.int8)), "qdata has shape (64,), expected (n, k)"),
        (*with_("int8_row", scale=torch.ones(7, 1)), "scale has shape (7, 1), expected one value for each block of qdata's (24, 64)"),
        (*with_("int8_row", scale=torch.ones(24, 2)), "scale has shape (24, 2), and block_size is [1, 64]"),
        (*with_("int8_row_asym", zero_point=torch.ones(12, 1, dtype=torch.int8)), "zero_point has shape (12, 1)"),
        (*with_("int8_row", scale=torch.full((24, 1), float("nan"))), "scale of int8 is NaN or inf"),
        (*with_("intx3_sym", qdata=torch.full((8, 64), 4, dtype=torch.int8)), "qdata ranges from 4 to 4, expected -4 to 3 (int3)"),
        (*with_("intx3_asym", zero_point=torch.full((8, 2), -5, dtype=torch.int8)), "zero_point ranges from -5 to -5, expected -4 to 3"),
        (*with_("float8_row", scale=torch.ones(24, 1).half()), "scale has dtype torch.float16, expected torch.float32"),
        (
            *with_("int4", qdata=torch.zeros(24, 32, dtype=torch.int8)),
            "qdata has shape (24, 32), expected half as many columns as shape [24, 128]",
        ),
        (*with_("int4", scale=torch.ones(24, 4).bfloat16()), "scale has shape (24, 4), expected (4, 24) for groups of 32"),
        (split("int4")[0], {"type": "Int4Tensor"}, "block_size is missing"),
        (split("int4")[0], {"type": "Int4Tensor", "block_size": [2, 32]}, "block_size is [2, 32], expected ones"),
        (
            *with_("mxfp8", scale=torch.zeros(8, 3, dtype=torch.uint8).view(torch.float8_e8m0fnu)),
            "scale has shape (8, 3), expected (8, 2), or 512",
        ),
        (*with_("mxfp6_e2m3", qdata=torch.full((8, 64), 64, dtype=torch.uint8)), "qdata reaches 64, expected at most 63"),
        (split("mxfp4")[0], {"type": "MXTensor"}, "elem_dtype is None"),
        (split("mxfp8")[0], {"type": "MXTensor", "swizzled": True}, "but is_swizzled_scales is True"),
        (split("nvfp4")[0], {"type": "NVFP4Tensor", "block_size": [32]}, "block_size is [32], expected 16"),
        (*with_("nvfp4", per_tensor_scale=torch.ones(2)), "per_tensor_scale has shape (2,)"),
        (*with_("nvfp4", scale=torch.full((40, 6), float("nan")).to(torch.float8_e4m3fn)), "is NaN or inf"),
        (
            {"_weight_qdata": torch.zeros(2, 1, 32, 3).int(), "_weight_scale_and_zero": torch.ones(1)},
            {"type": "Int4TilePackedTo4dTensor", "block_size": [1, 32]},
            "qdata has shape (2, 1, 32, 3), expected (n / 8, k / (32 t), 32, t)",
        ),
        (
            {"_weight_qdata": torch.zeros(2, 1, 32, 4).int(), "_weight_scale_and_zero": torch.ones(4, 16, 2)},
            {"type": "Int4TilePackedTo4dTensor", "block_size": [1, 32], "shape": [17, 128]},
            "which is no weight of shape [17, 128], padded",
        ),
    ],
)
def test_bad_parts(parts, options, message):
    with pytest.raises(ValueError, match=r"^(torchao|validate): ") as error:
        read(parts, options)
    assert message in str(error.value)


def test_scaled_inputs():
    with pytest.raises(NotImplementedError, match="act_pre_scale multiplies the layer's input"):
        read(*with_("int8_row", act_pre_scale=torch.ones(64)))


@pytest.mark.parametrize(
    "fmt, shape, message",
    [
        ("nf4_g64", (4, 128), "cannot store nf4_g64"),
        ("int4_g48", (4, 64), "expected whole groups"),
        ("int8_h32", (4, 64), "no rotation"),
        ("int8_g64", (4, 64), "group (1, 64) of shape (4, 64) is read as (1, 0); expected that"),
        ("fp8_e4m3_bf16", (4, 64), "cannot store fp8_e4m3_bf16"),
        ("uint4_g32_zfp16", (4, 64), "cannot store uint4_g32_zfp16"),
        ("nvfp4", (0, 64), "expected whole groups"),
    ],
)
def test_what_cannot_be_written(fmt, shape, message):
    with pytest.raises(ValueError, match=r"^torchao: ") as error:
        write(draw_weight(1, fmt, shape))
    assert message in str(error.value)


def test_zeros_that_look_symmetric():
    q = draw_weight(1, "uint8z", (4, 64))
    q = ref.QTensor(q.format, q.shape, q.packed, q.scale, torch.full((4, 1), 128, dtype=torch.uint8))
    assert class_of(q) == "Int8Tensor"
    with pytest.raises(ValueError, match="all 0, as those of signed integers are"):
        write(q)
