"""The Triton kernels for integer weights and 16-bit x: in the interpreter, against ref, and compiled for GPUs that are not there."""

import re

import pytest
import torch

import ref
from fast.request import Request
from ref.format import parse_format

pytest.importorskip("triton")

from fast.triton import weight_only

CUDA = torch.device("cuda", 0)


def weight(name, n, k, scales):
    """A QTensor of random codes and zero points, with scales out of a list."""
    fmt = parse_format(name)
    generator = torch.Generator().manual_seed(n * k)
    codes = torch.randint(0, 2**fmt.element.bits, (n, k), generator=generator)
    shape = fmt.scale_shape((n, k))
    scale = torch.tensor(scales)[torch.randint(0, len(scales), shape, generator=generator)].to(ref.format.SCALE_DTYPES[fmt.scale])
    zero = None
    if fmt.zero is not None:
        zero = torch.randint(0, 2**fmt.element.bits, shape, generator=generator, dtype=torch.uint8)
    return ref.QTensor(fmt, (n, k), ref.pack(codes, fmt.element.bits), scale, zero)


def plan_for(q, dtype, multiprocessors=4):
    plan = weight_only.prepare(q, Request(q.format, q.shape, dtype, q.packed.device))
    plan.properties.multiprocessors = multiprocessors
    return plan


def run(plan, x, bias=None):
    out = torch.full((x.shape[0], plan.n), float("nan"), dtype=x.dtype)
    plan.run(x, bias, None, out)
    return out


BF16, FP16 = torch.bfloat16, torch.float16

# Format, n, k, dtype of x, rows of x, multiprocessors (more split k further).
CASES = [
    ("int4_g128", 40, 300, BF16, (1, 3, 20), 1),
    ("int4_g32_fp16", 17, 160, FP16, (1, 2, 9), 1),
    ("int4_g256_bf16", 20, 600, BF16, (130,), 1),
    ("uint4z_g64", 33, 200, BF16, (5, 9), 1),
    ("int4_tensor", 16, 130, FP16, (2, 17), 1),
    ("int8", 16, 2100, BF16, (1, 8, 9, 70, 130), 8),
    ("int8_g64_fp16", 16, 65 * 64, BF16, (3, 40), 4),
    ("uint8z_g32_bf16", 18, 70, BF16, (4, 10), 1),
    ("int2_g64", 16, 300, BF16, (1, 12), 1),
    ("uint2z_g512_fp16", 16, 1100, FP16, (7, 33), 1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c[0])
def test_exact_numbers_give_the_same_bits_as_ref(case):
    # Small whole numbers and powers of two: no sum and no product is rounded.
    name, n, k, dtype, rows, multiprocessors = case
    q = weight(name, n, k, [0.25, 0.5, 1.0, 2.0])
    plan = plan_for(q, dtype, multiprocessors)
    bias = torch.randint(-8, 8, (n,)).to(dtype)
    for m in rows:
        x = torch.randint(-2, 3, (m, k)).to(dtype)
        assert torch.equal(run(plan, x, bias), ref.linear(x, q, bias))


def test_one_hot_rows_give_the_weight():
    # Scales of 8 bits times codes less zero points of 5 are exact in float32, and a group's sum has one term.
    q = weight("uint4z_g32_bf16", 20, 140, [1.0078125, 0.0123, 3.7, 1e-5])
    columns = torch.tensor([0, 1, 8, 9, 31, 32, 63, 64, 127, 128, 139])
    x = torch.zeros(11, 140, dtype=BF16)
    x[torch.arange(11), columns] = 1.0
    want = ref.dequantize(q).to(BF16).T[columns]
    plan = plan_for(q, BF16)
    assert torch.equal(run(plan, x[:1]), want[:1])
    assert torch.equal(run(plan, x[3:11]), want[3:11])
    assert torch.equal(run(plan, x), want)


def test_more_rows_round_the_weight_to_the_dtype_of_x():
    # Two ones in a row: the sum of two rounded weights is exact in float32.
    q = weight("int4_g64_fp16", 16, 128, [0.3, 0.7])
    x = torch.zeros(9, 128, dtype=BF16)
    x[torch.arange(9), torch.arange(9)] = x[torch.arange(9), torch.arange(70, 79)] = 1.0
    plan = plan_for(q, BF16)
    rounded, exact = (ref.linear_variant(x, q, variant=name) for name in ("weight_rounded", "exact"))
    assert plan.variant == "weight_rounded" and not torch.equal(rounded, exact)
    assert torch.equal(run(plan, x), rounded)
    assert torch.equal(run(plan, x[:8]), exact[:8])


def test_any_strides_of_x_and_dtypes_of_bias():
    q = weight("int4_g128", 16, 136, [0.5, 2.0])
    plan = plan_for(q, BF16)
    wide = torch.randint(-2, 3, (20, 150)).to(BF16)
    for m in (1, 3, 20):
        for x in (wide[:m, 1:137], wide[:m, 8:144], wide[:1, :136].expand(m, 136)):
            for bias in (torch.randint(-8, 8, (32,))[::2].to(dtype) for dtype in (torch.float64, torch.float32, FP16)):
                assert torch.equal(run(plan, x, bias), ref.linear(x, q, bias))


def test_infinity_and_nan_stay_in_their_row():
    q = weight("int4_g128", 16, 200, [1.0])
    x = torch.randint(-2, 3, (3, 200)).to(BF16)
    x[1, 199], x[2, 0] = float("inf"), float("nan")
    got, want = run(plan_for(q, BF16), x), ref.linear(x, q)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(), want.nan_to_num())


def test_parts_of_k_are_summed_whatever_the_split():
    q = weight("int8", 16, 64 * 64, [1.0])
    x = torch.randint(-1, 2, (3, q.shape[1])).to(BF16)
    want = ref.linear(x, q)
    splits = set()
    for multiprocessors in (1, 2, 4):
        plan = plan_for(q, BF16, multiprocessors)
        assert torch.equal(run(plan, x), want)
        splits.add(plan.ways[2].parts)
    assert splits == {1, 2, 4}


def test_tiles_fit_and_parts_are_never_empty():
    for shared in (101376, 166912, 232448):
        for bits in (4, 8) if shared < 160 << 10 else (2, 4, 8):
            device = type("Device", (), {"multiprocessors": 132, "shared_memory": shared})
            for n in (1, 4096, 28672):
                for m in (1 << i for i in range(weight_only.BUCKETS)):
                    tile = weight_only.choose_tile(m, n, bits, device)
                    assert tile.stages >= 2 and (tile.bm <= 8 or tile.stages * tile.stage_bytes(bits) <= shared)
                    assert m > 64 or tile.bm >= m or shared < 232448
                    for tiles_k in (1, 16, 500):
                        parts = weight_only.choose_parts(tile, m, n, tiles_k, device)
                        assert 1 <= parts <= tiles_k and (parts == 1 or tile.bm <= 128)


@pytest.fixture
def hopper(monkeypatch):
    """A device of compute capability 9.0, as far as why_not looks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    properties = type("Properties", (), {"multi_processor_count": 132, "shared_memory_per_block_optin": 232448})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(torch.version, "hip", None)


def request(name, dtype=BF16, shape=(64, 1024), device=CUDA, x_format=None):
    return Request(parse_format(name), shape, dtype, device, x_format)


@pytest.mark.parametrize("name", [case[0] for case in CASES] + ["int4_g384", "int4_g32", "int8_g16", "uint4z_g2048", "int4_tensor_bf16"])
def test_takes(hopper, name):
    assert weight_only.why_not(request(name)) is None


@pytest.mark.parametrize(
    "name",
    [
        "int3_g128",
        "int4_g16",
        "int4_g96",
        "uint4",
        "uint4_g64_zfp16",
        "fp8",
        "int4_g32_e4m3",
        "int4_b128x128",
        "uint4_g32_fp16_ofp16",
        "int4_g128_channel2div",
        "int4_channel2",
        "nf4_g64",
    ],
)
def test_leaves_to_the_general_kernel(hopper, name):
    assert "the weight is" in weight_only.why_not(request(name))


def test_refusals_other_than_of_a_format(hopper, monkeypatch):
    assert "float32" in weight_only.why_not(request("int4_g128", torch.float32))
    assert "int8" in weight_only.why_not(request("int4_g128", x_format=parse_format("int8_token")))
    assert weight_only.why_not(request("int4_g128", shape=(64, 0))) is not None
    assert "interpreter" in weight_only.why_not(request("int4_g128", device=torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "8.0" in weight_only.why_not(request("int4_g128"))


@pytest.mark.parametrize(
    ("name", "m", "arch"),
    [("int4_g128", 1, 90), ("int4_g128", 8, 80), ("int4_g128", 64, 90), ("int4_g128", 256, 90), ("int8", 256, 90)],
)
def test_compiles_without_a_gpu(name, m, arch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    plan = plan_for(weight(name, 128, 128, [1.0]), BF16)
    launch = plan._way((m - 1).bit_length()).launch
    kernel, constants = launch.kernel, launch.constants | {"INTERPRET": False, "ALIGNED": True}
    tensors = {torch.int16: "*i16", torch.float32: "*fp32", torch.int32: "*i32"}
    weight_types = [tensors[a.dtype] if isinstance(a, torch.Tensor) else "i32" if a is not None else None for a in launch.weight]
    types = dict(zip(kernel.arg_names, ["*bf16", "*bf16", None, None, None, "i32", "i32", *weight_types], strict=False))
    constants |= {name: None for name, kind in types.items() if kind is None}
    signature = {name: types.get(name) or "constexpr" for name in kernel.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, a in enumerate(kernel.arg_names)
        if signature[a].startswith("*") or a in ("n", "k", "stride_s")
    }
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()}, attributes)
    compiled = compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": launch.warps, "enable_fp_fusion": True})
    assert compiled.metadata.shared <= {80: 166912, 90: 232448}[arch]
    assert ("wgmma" in compiled.asm["ptx"]) == (m > 8 and arch == 90)
    # No multiply is left running: it may still read registers that the next step writes.
    assert set(re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", compiled.asm["ptx"])) <= {"0"}
