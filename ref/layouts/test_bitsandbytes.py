"""bitsandbytes: its own tensors read bit for bit, written back byte for byte, and what is refused."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ref
from conformance.vectors import parts_of, stored
from conformance.weights import draw_weight
from ref.layouts import bitsandbytes
from ref.layouts.bitsandbytes import FORMATS, FP4, INT8, STATE, config_of, find, options, read, write
from ref.qtensor import equal

CASES, TENSORS = stored("bitsandbytes")


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
    if name == "int8":  # bitsandbytes rounds q * SCB, and that times the float32 next to 1 / 127; exact is one rounding of q * SCB / 127
        w = parts["weight"] * parts["SCB"][:, None] * 7.874015718698502e-3
        assert torch.equal(w, expected)
        exact = parts["weight"].double() * parts["SCB"][:, None].double() / 127
        assert torch.equal(ref.dequantize(q), exact)
        return
    # It rounds to float32 first, and then to the weight's dtype.
    assert torch.equal(ref.dequantize(q, torch.float32).to(expected.dtype), expected)


@pytest.mark.parametrize("name", CASES)
def test_golden_is_written_back(name):
    parts, _ = split(name)
    q = read(parts, {})
    back = write(q, **CASES[name]["options"])
    if "weight.nested_absmax" in parts:  # one level is written; the codes are the same
        assert torch.equal(back["weight"].view(torch.uint8), parts["weight"].view(torch.uint8)) and equal(read(back, {}), q)
    elif name == "fp4_odd":  # the half byte behind the last code is of no meaning
        assert torch.equal(back["weight"][:-1], parts["weight"][:-1]) and equal(read(back, {}), q)
    else:
        assert same(back, parts)


def test_elements_and_groups():
    assert {name: str(read(split(name)[0], {}).format) for name in CASES} == {
        **dict.fromkeys(("nf4", "nf4_fp32", "nf4_double", "experts"), "nf4_g64"),
        **dict.fromkeys(("fp4", "fp4_double"), "bnbfp4_g64"),
        "nf4_b128_storage_bf16": "nf4_g128",
        "fp4_b32_storage_fp32": "bnbfp4_g32",
        "nf4_rows_in_blocks": "nf4_b2x0",
        "nf4_blocks_across_rows": "nf4_g32",
        "nf4_double_across_rows": "nf4_g16",
        "fp4_odd": "bnbfp4_g1",
        "int8": str(INT8),
    }


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(["nf4", "bnbfp4"]),
    shape=st.tuples(st.integers(1, 9), st.sampled_from([32, 64, 96, 128, 256, 320])),
    experts=st.integers(0, 2),
    rows=st.sampled_from([0, 2, 4]),
    storage=st.sampled_from(["uint8", "bfloat16"]),
    dtype=st.sampled_from(bitsandbytes.DTYPES),
)
def test_round_trip(seed, kind, shape, experts, rows, storage, dtype):
    n, k = shape
    blocksize = 64 if rows == 0 and k % 64 == 0 else 32 if rows == 0 else rows * k
    if blocksize not in bitsandbytes.BLOCKSIZES:
        return
    if experts and rows:
        n *= rows
    shape = (experts, n, k) if experts else (n, k)
    element = FP4 if kind == "bnbfp4" else ref.parse_element("nf4")
    q = draw_weight(seed, ref.Format(element, group=(rows, 0) if rows else (1, blocksize)), shape)
    how = {"dtype": dtype, "quant_storage": storage}
    assert equal(read(write(q, **how), options(config_of(q, **how), "layer")), q)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 9), k=st.integers(1, 70))
def test_round_trip_int8(seed, n, k):
    q = draw_weight(seed, INT8, (n, k))
    q = ref.QTensor(q.format, q.shape, q.packed, q.scale, scale_2=torch.full((1, 1), 127.0))
    assert equal(read(write(q), options(config_of(q), "layer")), q)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 9), k=st.integers(1, 100), blocksize=st.sampled_from([32, 64]))
def test_blocks_that_cross_rows(seed, n, k, blocksize):
    """Against the flattened weight, block by block."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n * k + n * k % 2,), generator=generator)
    absmax = torch.rand(-(-n * k // blocksize), generator=generator)
    table = torch.tensor(ref.parse_element("nf4").values)
    parts = {
        "weight": (codes[0::2] << 4 | codes[1::2]).to(torch.uint8)[:, None],
        "weight.absmax": absmax,
        "weight.quant_map": table,
        **state(quant_type="nf4", blocksize=blocksize, dtype="float32", shape=[n, k]),
    }
    q = read(parts, {"bits": 4})
    flat = table[codes[: n * k]] * absmax.repeat_interleave(blocksize)[: n * k]
    assert torch.equal(ref.dequantize(q, torch.float32).flatten(), flat)
    assert equal(read(write(q, blocksize=blocksize), {}), q)


def state(**fields):
    return {STATE + fields.get("quant_type", "nf4"): torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)}


def test_a_stored_table_of_its_own():
    parts, _ = split("nf4")
    parts["weight.quant_map"] = torch.linspace(-1, 1, 16)
    q = read(parts, {})
    assert q.format.element == ref.Codebook("bnbnf4", tuple(torch.linspace(-1, 1, 16).tolist()))
    assert same(write(q), parts)


def test_formats_are_what_read_gives():
    formats = [ref.parse_format(f) for f in FORMATS]
    assert {read(split(name)[0], {}).format for name in ("nf4", "fp4", "int8")} == set(formats)


def test_find():
    parts = list(split("nf4_double")[0])
    names = [f"model.up.{p}" for p in parts] + [
        "model.up.bias",
        "model.norm.weight",
        "model.down.weight",
        "model.down.SCB",
        "model.down.weight_format",
    ]
    names += [f"mlp.experts.gate_up_proj{p.removeprefix('weight')}" for p in parts]
    assert find(names, {}) == {
        "model.up": {p: f"model.up.{p}" for p in parts},
        "model.down": {p: f"model.down.{p}" for p in ("weight", "SCB", "weight_format")},
        "mlp.experts.gate_up_proj": {p: f"mlp.experts.gate_up_proj{p.removeprefix('weight')}" for p in parts},
    }


def test_options():
    config = {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head", "model.layers.1", r"visual\..*"]}
    assert options(config, "model.layers.10.mlp.up_proj") == {"bits": 4}
    assert options({"load_in_8bit": True, "load_in_4bit": False, "llm_int8_skip_modules": None}, "x") == {"bits": 8}
    for layer in ("lm_head", "model.lm_head", "model.layers.1.mlp.up_proj", "visual.blocks.0"):
        assert options(config, layer) is None


@pytest.mark.parametrize(
    "config, message",
    [
        ({"load_in_4bits": True}, "unknown key 'load_in_4bits'; the nearest known one is 'load_in_4bit'"),
        ({"load_in_4bit": 1}, "load_in_4bit is 1, expected one of False, True"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit are both True"),
        ({}, "load_in_4bit and load_in_8bit are both False"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "af4"}, "bnb_4bit_quant_type is 'af4'"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": "int32"}, "bnb_4bit_quant_storage is 'int32'"),
        ({"load_in_4bit": True, "llm_int8_skip_modules": "lm_head"}, "llm_int8_skip_modules is 'lm_head', expected a list"),
        ({"load_in_4bit": True, "llm_int8_skip_modules": ["("]}, "is no regular expression"),
        ([], "quantization_config is list, expected a dict"),
    ],
)
def test_bad_config(config, message):
    with pytest.raises(ValueError, match=r"bitsandbytes|regular") as error:
        options(config, "layer")
    assert message in str(error.value)


def without(name, part):
    return {p: t for p, t in split(name)[0].items() if p != part}


def with_(name, **changes):
    return split(name)[0] | {p.replace("__", "."): t for p, t in changes.items()}


def with_state(**changes):
    parts = split("nf4")[0]
    fields = json.loads(bytes(parts.pop(STATE + "nf4").tolist()).decode()) | changes
    return parts | {STATE + "nf4": torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize(
    "parts, message",
    [
        (without("nf4", "weight.quant_map"), "bitsandbytes: weight.quant_map is missing"),
        (without("nf4", STATE + "nf4"), "expected one weight.quant_state.bitsandbytes__nf4 or"),
        (without("nf4_double", "weight.nested_absmax"), "bitsandbytes: weight.nested_absmax is missing"),
        (with_("nf4", weight__absmax=torch.ones(47)), "weight.absmax has shape (47,), expected (48,)"),
        (with_("nf4", weight__absmax=torch.full((48,), float("nan"))), "weight.absmax is NaN or inf"),
        (with_("nf4", weight__absmax=torch.ones(48, dtype=torch.uint8)), "weight.absmax has dtype torch.uint8, expected torch.float32"),
        (with_("nf4", weight__quant_map=torch.full((16,), float("inf"))), "weight.quant_map is NaN or inf"),
        (
            with_("nf4", weight=torch.zeros(1535, 1, dtype=torch.uint8)),
            "weight has shape (1535, 1) and dtype torch.uint8, expected one column of 1536",
        ),
        (with_("nf4", weight=torch.zeros(1536, 1, dtype=torch.int64)), "weight has dtype torch.int64"),
        (with_("nf4", other=torch.zeros(1)), "unexpected tensor other"),
        (with_("nf4") | {STATE + "nf4": torch.tensor([255], dtype=torch.uint8)}, "is no JSON"),
        (with_("nf4") | {STATE + "nf4": torch.tensor([91, 93], dtype=torch.uint8)}, "is list, expected a dict"),
        (with_state(blocksize=48), "blocksize is 48, expected one of 32, 64"),
        (with_state(blocksize="64"), "blocksize is '64'"),
        (with_state(quant_type="fp4"), "quant_type is 'fp4', expected one of 'nf4'"),
        (with_state(shape=[24, -128]), "shape is [24, -128], expected [n, k]"),
        (with_state(shape=[24, 64]), "weight has shape (1536, 1)"),
        (with_state(dtype="int8"), "dtype is 'int8'"),
        (with_state(nested_offset=1.0), "nested_offset is there, but"),
        (with_state(size=1), "unknown key 'size'"),
        (with_("int8", SCB=torch.ones(23)), "SCB has shape (23,), expected (24,)"),
        (with_("int8", SCB=torch.full((24,), float("inf"))), "SCB is NaN or inf"),
        (with_("int8", weight=torch.zeros(24, 96)), "weight has dtype torch.float32, expected torch.int8"),
    ],
)
def test_bad_parts(parts, message):
    with pytest.raises(ValueError, match=r"^bitsandbytes: ") as error:
        read(parts, {})
    assert message in str(error.value)


def test_tiled_int8_and_other_bits():
    with pytest.raises(NotImplementedError, match="weight_format is 2, expected 0"):
        read(with_("int8", weight_format=torch.tensor(2, dtype=torch.uint8)), {})
    with pytest.raises(ValueError, match=r"parts of 8 bits .*the config says 4"):
        read(split("int8")[0], {"bits": 4})


@pytest.mark.parametrize(
    "fmt, shape, how, message",
    [
        ("int4_g64", (4, 64), {}, "cannot store int4_g64"),
        ("nf4_g64_fp16", (4, 64), {}, "cannot store nf4_g64_fp16"),
        ("nf4_g48", (4, 96), {}, "blocks of 48, expected one of 32"),
        ("nf4", (4, 64), {}, "blocks of 64 over shape (4, 64) are groups of (1, 64)"),
        ("nf4_g64", (4, 96), {}, "are groups of (1, 32)"),
        ("nf4_g32", (4, 96), {"blocksize": 64}, "scales differ within a block of 64"),
        ("nf4_g64", (4, 64), {"dtype": "float64"}, "dtype is 'float64'"),
        (INT8, (4, 64), {}, "expected (n, k) and 127"),
    ],
)
def test_what_cannot_be_written(fmt, shape, how, message):
    with pytest.raises(ValueError, match=r"^bitsandbytes: ") as error:
        write(draw_weight(1, fmt, shape), **how)
    assert message in str(error.value)
