"""HQQ: its own tensors read bit for bit, written back byte for byte, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ref
from conformance.vectors import parts_of, stored
from conformance.weights import draw_weight
from ref.layouts.hqq import DTYPES, FORMATS, config_of, find, options, read, write
from ref.qtensor import equal
from ref.scale import untile

CASES, TENSORS = stored("hqq")


def split(name):
    return parts_of(TENSORS, name)


def same(a, b):
    """Byte for byte: codes that are stored as floats may be NaN."""
    return a.keys() == b.keys() and all(a[p].dtype == b[p].dtype and a[p].shape == b[p].shape and raw(a[p]) == raw(b[p]) for p in a)


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("name", CASES)
def test_golden_reads(name):
    parts, expected = split(name)
    q = read(parts, options(CASES[name]["config"], "model.layers.0.mlp.up_proj"))
    # HQQ rounds the difference, and then the product, to the dtype of scales and zeros.
    codes = ref.unpack(q.packed, q.format.element.bits, q.shape[-1]).to(expected.dtype)
    assert torch.equal((codes - untile(q.zero, q.format.group, q.shape)) * untile(q.scale, q.format.group, q.shape), expected)
    assert torch.equal(
        ref.dequantize(q),
        (codes.double() - untile(q.zero, q.format.group, q.shape).double()) * untile(q.scale, q.format.group, q.shape).double(),
    )


@pytest.mark.parametrize("name", CASES)
def test_golden_is_written_back(name):
    parts, _ = split(name)
    how = CASES[name]["options"] | {"group_size": CASES[name]["options"]["group_size"] or int(parts["group_size"])}
    back = write(read(parts, {}), **how)
    if name == "b1_58_axis1":  # three values are two bits
        assert raw(back.pop("nbits")) == [2, 0, 0, 0] and parts.pop("nbits").dtype == torch.float32
    assert same(back, parts)


def test_elements_and_groups():
    formats = {name: str(read(split(name)[0], {}).format) for name in CASES}
    assert [formats[f"b{b}_axis1"] for b in ("8", "6", "5", "4", "3", "2", "1_58", "1")] == [
        f"uint{b}_g64_fp16_zfp16" for b in (8, 6, 5, 4, 3, 2, 2, 1)
    ]
    assert formats["b4_axis0"] == "uint4_g1_bf16_zbf16"
    assert formats["b4_column"] == "uint4_b0x1_fp16_zfp16"
    assert formats["b4_across_rows"] == "uint4_g16_bf16_zbf16"
    assert formats["b4_row"] == "uint4_g64_bf16_zbf16"
    assert formats["b4_fp32"] == "uint4_g32_zfp32"
    assert {str(ref.parse_format(f)) for f in FORMATS if "g1_" not in f} <= set(formats.values()) | {"uint4_g64_bf16_zbf16"}


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    bits=st.sampled_from([1, 2, 3, 4, 5, 6, 8]),
    n=st.integers(1, 4),
    groups=st.integers(1, 3),
    size=st.sampled_from([16, 32, 40]),
    dtype=st.sampled_from(sorted(DTYPES)),
    view_as_float=st.booleans(),
)
def test_round_trip(seed, bits, n, groups, size, dtype, view_as_float):
    rows = {1: 8, 2: 4, 4: 2}.get(bits, 1)
    q = draw_weight(seed, ref.Format(ref.Int(bits, False), dtype, (1, size), zero=dtype), (rows * n, size * groups))
    how = {"view_as_float": view_as_float}
    assert equal(read(write(q, **how), options(config_of(q, **how), "layer")), q)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    bits=st.sampled_from([2, 3, 4, 8]),
    axis=st.integers(0, 1),
    n=st.integers(1, 5),
    k=st.integers(1, 30),
    size=st.integers(1, 6),
)
def test_groups_of_the_reshaped_weight(seed, bits, axis, n, k, size):
    """Against the formula in the format's own words: reshape, one scale a row or a column."""
    rows, size = 4 * n, 4 * size
    generator = torch.Generator().manual_seed(seed)
    if rows * k % (4 * size):
        k = 4 * size
    groups = rows * k // size
    shape = (groups, size) if axis else (size, groups)
    codes = torch.randint(0, 2**bits, shape, generator=generator)
    scale, zero = torch.rand(2, *((groups, 1) if axis else (1, groups)), generator=generator, dtype=torch.float64).half()
    like = ref.QTensor(ref.Format(ref.Int(bits, False), "fp16", (1, k), zero="fp16"), (rows, k), None, None)
    template = write(draw_weight(seed, like.format, (rows, k)), group_size=None)
    chunks = {2: 4, 3: 10, 4: 2, 8: 1}[bits]
    padded = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % chunks if bits == 3 else 0))
    word = sum(c << ((3 if bits == 3 else bits) * (chunks - 1 - i)) for i, c in enumerate(padded.chunk(chunks)))
    parts = template | {"W_q": word.to(torch.int32 if bits == 3 else torch.uint8), "scale": scale, "zero": zero}
    parts |= {"group_size": torch.tensor(size, dtype=torch.int32), "axis": torch.tensor(axis, dtype=torch.int32)}
    q = read(parts, {})
    assert torch.equal(ref.dequantize(q), ((codes.double() - zero.double()) * scale.double()).reshape(rows, k))
    assert same(write(q, axis=axis, group_size=size), parts)
    assert equal(read(write(q, axis=axis, group_size=size), options(config_of(q, axis=axis, group_size=size), "layer")), q)


def test_scales_and_zeros_stacked():
    parts, _ = split("b4_axis1")
    q = read(parts, {})
    parts["zero_scale"] = torch.stack((parts.pop("zero"), parts.pop("scale")))
    assert equal(read(parts, {}), q)


def test_find():
    parts = list(split("b4_axis1")[0])
    names = [f"model.layers.0.up.{p}" for p in parts] + ["model.layers.0.up.bias", "model.norm.weight"]
    assert find(names, {}) == {"model.layers.0.up": {p: f"model.layers.0.up.{p}" for p in parts}}


def test_options():
    weight = {"nbits": 4, "group_size": 64, "axis": 1}
    config = {"quant_method": "hqq", "quant_config": {"weight_quant_params": weight}, "skip_modules": ["lm_head", "mlp.gate"]}
    assert options(config, "model.layers.3.self_attn.q_proj") == weight
    assert options(config, "lm_head") is None
    assert options(config, "model.layers.3.mlp.gate") is None
    config["quant_config"] = {"self_attn.q_proj": {"weight_quant_params": {"nbits": 8, "group_size": None}}, "mlp.up_proj": None}
    assert options(config, "model.layers.3.self_attn.q_proj") == {"nbits": 8}
    assert options(config, "model.layers.3.mlp.up_proj") is None
    assert options(config, "model.layers.3.mlp.down_proj") is None


@pytest.mark.parametrize(
    "config, message",
    [
        ([], "quantization_config is list, expected a dict"),
        ({"quant_configs": {}}, "unknown key 'quant_configs'; the nearest known one is 'quant_config'"),
        ({}, "quant_config is NoneType, expected a dict"),
        ({"quant_config": {"weight_quant_params": [4]}}, "weight_quant_params is list"),
        ({"quant_config": {"weight_quant_params": {"nbits": "4"}}}, "nbits is '4', expected one of 8, 6"),
        ({"quant_config": {"weight_quant_params": {"axis": 2}}}, "axis is 2, expected one of 0, 1"),
        ({"quant_config": {"weight_quant_params": {"group_size": 0}}}, "group_size is 0, expected an integer"),
        ({"quant_config": {"weight_quant_params": {}, "scale_quant_params": 8}}, "scale_quant_params is 8"),
        ({"quant_config": {"weight_quant_params": {}}, "skip_modules": "lm_head"}, "skip_modules is 'lm_head', expected a list"),
    ],
)
def test_bad_config(config, message):
    with pytest.raises(ValueError, match=r"^hqq: ") as error:
        options(config, "layer")
    assert message in str(error.value)


def with_(name="b4_axis1", **changes):
    return {p: t for p, t in (split(name)[0] | changes).items() if t is not None}


@pytest.mark.parametrize(
    "parts, message",
    [
        (with_(scale=None), "scale is missing"),
        (with_(shape=None), "shape is missing"),
        (with_(other=torch.ones(1)), "unexpected tensor other"),
        (with_(W_q=torch.zeros(15, 64, dtype=torch.uint8)), "W_q has shape (15, 64) and dtype torch.uint8, expected (16, 64)"),
        (with_(W_q=torch.zeros(16, 64, dtype=torch.int64)), "W_q has dtype torch.int64"),
        (
            with_(W_q=torch.zeros(16, 64, dtype=torch.float16)),
            "W_q has shape (16, 64) and dtype torch.float16, expected (16, 64) of torch.uint8",
        ),
        (with_(W_q=torch.zeros(0, dtype=torch.uint8)), "W_q has shape (0,)"),
        (with_(scale=torch.ones(16, 1, dtype=torch.float16)), "scale has shape (16, 1), expected (32, 1) for group_size 64 of axis 1"),
        (with_(zero=torch.ones(32, 1)), "zero has dtype torch.float32, expected torch.float16"),
        (with_(scale=torch.full((32, 1), float("nan"), dtype=torch.float16)), "scale is NaN or inf at (0, 0)"),
        (with_(shape=torch.tensor([16, 0])), "shape is [16, 0]"),
        (with_(shape=torch.tensor([16, 128, 1])), "shape has shape (3,), expected (2,)"),
        (with_(nbits=torch.tensor(3, dtype=torch.int32)), "nbits is 3, expected one of 4 with packing 4bit_u8"),
        (with_(nbits=torch.tensor(float("nan"))), "nbits is nan"),
        (with_(nbits=torch.tensor([4, 4], dtype=torch.int32)), "nbits has shape (2,), expected one value"),
        (with_(axis=torch.tensor(2, dtype=torch.int32)), "axis is 2, expected one of 0, 1"),
        (with_(group_size=torch.tensor(0, dtype=torch.int32)), "group_size is 0"),
        (with_(group_size=torch.tensor(48, dtype=torch.int32)), "group_size 48 does not divide the 2048 weights"),
        (with_(packing=torch.tensor([52], dtype=torch.uint8)), "packing is '4', expected one of"),
        (with_("b5_axis1", W_q=torch.full((32, 64), 32, dtype=torch.uint8)), "W_q reaches 32, expected at most 31 (5 bits)"),
    ],
)
def test_bad_parts(parts, message):
    with pytest.raises(ValueError, match=r"^hqq: ") as error:
        read(parts, {})
    assert message in str(error.value)


def test_the_config_contradicts():
    with pytest.raises(ValueError, match=r"^hqq: nbits is 4, the config says 3"):
        read(with_(), {"nbits": 3})


@pytest.mark.parametrize(
    "changes",
    [{"quant_scale": torch.tensor(1, dtype=torch.uint8)}, {"scale_q": torch.ones(1)}, {"channel_wise": torch.tensor(0, dtype=torch.uint8)}],
)
def test_not_carried(changes):
    with pytest.raises(NotImplementedError, match=next(iter(changes))):
        read(with_(**changes), {})


@pytest.mark.parametrize(
    "fmt, shape, how, message",
    [
        ("int4_g64", (4, 64), {}, "cannot store int4_g64"),
        ("uint4_g64_fp16_zbf16", (4, 64), {}, "cannot store uint4_g64_fp16_zbf16"),
        ("uint7_g64_fp16_zfp16", (4, 64), {}, "cannot store 7 bits"),
        ("uint4_g64_fp16_zfp16", (2, 4, 64), {}, "shape (2, 4, 64): expected"),
        ("uint4_g64_fp16_zfp16", (3, 64), {}, "3 rows of 64 codes (group_size 64, axis 1), expected a multiple of 2"),
        ("uint4_g48_fp16_zfp16", (4, 64), {}, "group_size 48 does not divide"),
        ("uint4_g64_fp16_zfp16", (4, 128), {"group_size": 32}, "groups of (1, 32), and the weight has groups of (1, 64)"),
        ("uint4_g64_fp16_zfp16", (4, 128), {"axis": 0}, "groups of (0, 1), and the weight"),
        ("uint4_g1_fp16_zfp16", (4, 64), {"axis": 0, "group_size": 2}, "differ within a group of 2 of axis 0"),
        ("uint4_g15_fp16_zfp16", (4, 15), {"view_as_float": True}, "view_as_float with rows of 15 bytes"),
    ],
)
def test_what_cannot_be_written(fmt, shape, how, message):
    with pytest.raises(ValueError, match=r"^hqq: ") as error:
        write(draw_weight(1, fmt, shape), **how)
    assert message in str(error.value)
