"""The grouped products against ref: every layout and implementation, experts without rows, rows that must have no influence.

Numbers are small and whole or powers of two, so that no sum and no product is rounded, and bits have to be equal.
"""

import gc
import re
import weakref

import pytest
import torch

import ref
import ref.moe

pytest.importorskip("triton")

from fast.moe.grouped_linear import grouped_linear, indexed_linear, masked_linear
from fast.moe.stack import Stack, prepare_experts, remember
from fast.request import Request
from ref.element import value_list
from ref.format import SCALE_DTYPES, parse_format
from ref.scale import encode_scale

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAN = float("nan")
IMPLS = ("torch", "triton")


def stack_of(name, e, n, k, seed=0, dtype=BF16):
    """A stack of random finite codes, scales of powers of two; a plain tensor of small integers for None."""
    generator = torch.Generator().manual_seed(seed + n * k)

    def draw(low, high, shape):
        return torch.randint(low, high, tuple(shape), generator=generator)

    if name is None:
        return draw(-2, 3, (e, n, k)).to(dtype)
    fmt = parse_format(name)
    finite = torch.tensor(value_list(fmt.element)).isfinite().nonzero()[:, 0]
    codes = finite[draw(0, len(finite), (e, n, k))]
    shape = fmt.scale_shape((e, n, k))
    scale = encode_scale(2.0 ** draw(-2, 3, shape).double(), fmt.scale)
    zero = None
    if fmt.zero is not None:
        zero = draw(0, 2**fmt.element.bits, shape)
        zero = zero.to(torch.uint8) if fmt.zero == "int" else (zero / 2).to(SCALE_DTYPES[fmt.zero])
    second = None
    if fmt.scale_2 is not None:
        second = 2.0 ** draw(-2, 1, (e, n if fmt.scale_2.startswith("channel") else 1, 1)).float()
    offset = draw(-16, 17, shape).to(SCALE_DTYPES[fmt.offset]) / 4 if fmt.offset else None
    return ref.QTensor(fmt, (e, n, k), ref.pack(codes, fmt.element.bits), scale, zero, second, offset=offset)


def numbers(*shape, dtype=BF16, seed=1):
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def offsets_of(counts, dtype=torch.int64):
    return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=dtype)


# Every expert empty in turn, all but one, all of them; one row, tile edges, rows behind the last expert's (the last number).
COUNTS = [
    ((0, 2, 3), 0), ((2, 0, 3), 1), ((2, 3, 0), 4), ((0, 0, 0), 5), ((0, 0, 0), 0), ((0, 20, 0), 0), ((1, 0, 0), 0), ((16, 15, 17), 2),
]  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", ["int4_g32", None])
def test_contiguous_rows(name, dtype, impl):
    w, bias = stack_of(name, 3, 9, 64), numbers(3, 9, dtype=FP32)
    for counts, behind in COUNTS:
        x = numbers(sum(counts) + behind, 64 + 3)[:, 1:-2]
        x[sum(counts) :] = NAN
        offsets = offsets_of(counts, dtype)
        out = torch.full((len(x), 9), NAN, dtype=BF16)
        got = grouped_linear(x, w, offsets, bias, impl=impl, out=out)
        want = ref.moe.grouped_linear(x, w, offsets, bias)
        assert got is out and torch.equal(got, want) and not got[sum(counts) :].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_planes_of_rows(impl):
    w, bias = stack_of("fp8_e4m3_b4x32", 3, 9, 64), numbers(3, 9)
    for most, counts in ((5, (0, 5, 2)), (17, (17, 0, 16)), (1, (0, 0, 1)), (3, (0, 0, 0)), (0, (0, 0, 0))):
        x = numbers(3, most, 64)
        x[torch.arange(most) >= torch.tensor(counts)[:, None]] = NAN
        given = torch.tensor(counts, dtype=torch.int32 if most % 2 else torch.int64)
        got = masked_linear(x.transpose(0, 1).contiguous().transpose(0, 1), w, given, bias, impl=impl)
        assert torch.equal(got, ref.moe.masked_linear(x, w, given, bias))


ROUTES = {
    "any": [[0, 1], [2, 2], [-1, 0], [1, 0]],
    "first empty": [[1, 2], [2, 1], [1, 1], [2, -1]],
    "last empty": [[1, 0], [0, 1], [1, 1], [0, 0]],
    "one has all": [[1, 1], [1, 1], [1, 1], [1, 1]],
    "nobody": [[-1, -1], [-1, -1], [-1, -1], [-1, -1]],
    "one token": [[2, 0]],
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("route", ROUTES)
def test_blocks_of_slots(route, impl):
    ids = torch.tensor(ROUTES[route])
    w, bias = stack_of("int4_g32", 3, 9, 64), numbers(3, 9)
    x, weights = numbers(len(ids), 64), torch.tensor([0.5, -2.0, 1.0, 0.25])[: len(ids), None] * torch.tensor([1.0, 2.0])
    for mapped, block, ignore, pad in (
        (None, 16, False, False), (None, 5, False, True), (torch.tensor([1, -1, 0]), 16, False, False),
        (torch.tensor([-1, 0, -1]), 20, True, False), (torch.tensor([-1, -1, -1]), 16, False, True),
    ):  # fmt: skip
        blocks = ref.moe.moe_align_block_size(ids, block, 3, mapped, pad, ignore)
        given = None if mapped is None else weights if block == 16 else weights.double().flatten()
        call = (x, w, *blocks, 2, bias)
        got = indexed_linear(*call, topk_weights=given, block_size=block, impl=impl, out=torch.full((ids.numel(), 9), NAN, dtype=BF16))
        assert torch.equal(got, ref.moe.indexed_linear(*call, topk_weights=given, block_size=block))
        if pad:
            assert torch.equal(indexed_linear(*call, impl=impl), ref.moe.indexed_linear(*call))
        if mapped is None and block == 16:
            # What comes out of the first product goes into the second row by row.
            again = (got, stack_of(None, 3, 5, 9), *blocks, 1)
            assert torch.equal(indexed_linear(*again, block_size=block, impl=impl), ref.moe.indexed_linear(*again, block_size=block))


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(impl):
    w = stack_of("int4_g32", 3, 9, 64)
    ids = torch.zeros(0, 2, dtype=torch.int64)
    assert indexed_linear(numbers(0, 64), w, *ref.moe.moe_align_block_size(ids, 16, 3), 2, impl=impl).shape == (0, 9)
    assert grouped_linear(numbers(0, 64), w, offsets_of((0, 0, 0)), impl=impl).shape == (0, 9)


@pytest.mark.parametrize("impl", IMPLS)
def test_experts_and_slots_out_of_range_read_nothing(impl, monkeypatch):
    w = stack_of("int8", 2, 4, 32)
    x = numbers(3, 32)
    ids = torch.tensor([0, 1, 2, -5, 99, 3, 3, 3], dtype=torch.int32)
    got = indexed_linear(x, w, ids[:4], torch.tensor([0, 2**30]), torch.tensor([4]), 1, block_size=2, impl=impl)
    want = torch.zeros_like(got)
    want[:2] = ref.linear(x[:2], ref.combine.take_expert(w, 0))
    assert torch.equal(got, want)
    got = indexed_linear(x, w, ids[2:6], torch.tensor([1]), torch.tensor([4]), 1, block_size=4, impl=impl)
    assert not got[:2].any() and got[2].any()
    grouped_linear(x, w, torch.tensor([0, 7, 99]), impl=impl)
    grouped_linear(x, w, torch.tensor([-4, 2, 1]), impl=impl)
    masked_linear(x[None].expand(2, 3, 32), w, torch.tensor([9, -1]), impl=impl)
    monkeypatch.setenv("FAST_DEBUG", "1")
    for call in (
        lambda: indexed_linear(x, w, ids[:4], torch.tensor([0, 2]), torch.tensor([4]), 1, block_size=2, impl=impl),
        lambda: grouped_linear(x, w, torch.tensor([0, 2, 4]), impl=impl),
        lambda: masked_linear(x[None].expand(2, 3, 32), w, torch.tensor([4, 0]), impl=impl),
    ):
        with pytest.raises(ValueError, match="reach"):
            call()


GENERAL = [
    ("int3_g24", BF16), ("uint4z_g16_fp16", FP16), ("uint4_g64_zfp16", BF16), ("fp8", FP32), ("fp8_e4m3_tensor", BF16), ("fp8_e4m3_b4x128", FP16),
    ("fp8_e4m3_b128x128", BF16), ("mxfp4", BF16), ("nvfp4", BF16), ("nf4_tensor", BF16), ("uint4_g32_fp16_ofp16", BF16), ("int3_b5x48_obf16", BF16),
    ("int4_g32_channel2div", BF16), ("fp4_e2m1_g16_e4m3_tensor2div", FP16), ("fp6_e2m3_g32_bf16_channel2", FP16), (None, FP16), (None, FP32),
]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), GENERAL, ids=str)
def test_one_hot_rows_give_the_weights(name, dtype):
    w = stack_of(name, 3, 9, 140, dtype=dtype)
    x = torch.zeros(8, 140, dtype=dtype)
    x[torch.arange(8), torch.arange(8) * 17 + 5] = 1
    offsets = offsets_of((3, 0, 5))
    want = ref.moe.grouped_linear(x, w, offsets)
    for impl in IMPLS:
        assert torch.equal(grouped_linear(x, w, offsets, impl=impl), want), impl


def test_scales_far_from_the_middle_of_float32():
    w = stack_of("int4_g32", 2, 4, 64)
    w.scale[1] *= 2.0**-100
    w.scale[0] *= 2.0**90
    x, offsets = numbers(4, 64) * 2.0**-20, offsets_of((2, 2))
    assert torch.equal(grouped_linear(x, w, offsets, impl="triton"), ref.moe.grouped_linear(x, w, offsets))


QUANTIZED = [
    ("int4_g32", "int8_token"), ("int4_g32", "fp8_e4m3_g32"), ("int4_g32", "int8_tensor"), ("fp8_e4m3_b4x64", "fp8_e4m3_token"),
    ("fp8_e4m3_b4x64", "fp8_e4m3_tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "x_format"), QUANTIZED)
def test_quantized_rows(name, x_format):
    # One value of MAX times a power of two in each group: scales and codes are certain.
    x = numbers(8, 64)
    x[:, ::32] = 127 if x_format.startswith("int8") else 448
    w, ids = stack_of(name, 3, 9, 64), torch.tensor(ROUTES["any"])
    blocks = ref.moe.moe_align_block_size(ids, 16, 3)
    planes = numbers(3, 4, 64)
    planes[:, :, ::32] = x[0, 0]
    planes[torch.arange(4) >= torch.tensor([0, 4, 1])[:, None]] = NAN
    for impl in IMPLS:
        for x_scale in (None, torch.tensor([0.5])) if x_format.endswith("tensor") else (None,):
            given = {"x_format": x_format, "x_scale": x_scale}
            call = (x, w, offsets_of((3, 0, 4)))
            assert torch.equal(grouped_linear(*call, impl=impl, **given), ref.moe.grouped_linear(*call, **given))
            call = (planes, w, torch.tensor([0, 4, 1]))
            assert torch.equal(masked_linear(*call, impl=impl, **given), ref.moe.masked_linear(*call, **given))
            call = (x[:4], w, *blocks, 2)
            assert torch.equal(
                indexed_linear(*call, block_size=16, impl=impl, **given), ref.moe.indexed_linear(*call, block_size=16, **given)
            )


def test_rows_do_not_depend_on_each_other():
    w, x = stack_of("int4_g32", 3, 9, 64), torch.randn(30, 64, generator=torch.Generator().manual_seed(3)).to(BF16)
    offsets = offsets_of((10, 0, 20))
    for impl in IMPLS:
        whole = grouped_linear(x, w, offsets, impl=impl)
        parts = [grouped_linear(x[10 * i : 10 * i + 10], w, offsets_of((10, 0, 0) if i == 0 else (0, 0, 10)), impl=impl) for i in range(3)]
        assert torch.equal(torch.cat(parts), whole)


def test_a_rotation_goes_to_x_and_a_group_index_to_torch():
    q = stack_of("int4_g32_h4", 3, 9, 64)
    x, offsets = numbers(6, 64) * 4, offsets_of((2, 0, 4))
    assert torch.equal(grouped_linear(x, q, offsets, impl="triton"), ref.moe.grouped_linear(x, q, offsets))
    order = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(i)) // 32 for i in range(3)]).int()
    base = stack_of("int4_g32", 3, 9, 64)
    q = ref.QTensor(base.format, base.shape, base.packed, base.scale, group_index=order)
    assert torch.equal(grouped_linear(x, q, offsets, impl="torch"), ref.moe.grouped_linear(x, q, offsets))
    with pytest.raises(NotImplementedError, match="order of its own"):
        grouped_linear(x, q, offsets, impl="triton")


FRAGMENTS = [
    ("int4_g128", 17, 300, BF16, 4, (16, 20, 70)), ("uint4z_g64_fp16", 16, 200, FP16, 4, (16, 70)), ("int8_g64", 16, 130, BF16, 4, (16,)),
    ("uint2z_g256_bf16", 16, 300, BF16, 4, (16,)), ("int4_g128_bf16", 16, 128 * 40, BF16, 60, (16,)), ("mxfp4", 40, 300, BF16, 4, (16, 70)),
    ("mxfp4", 17, 288, FP16, 4, (16,)), ("fp8", 16, 130, FP16, 4, (16, 70)), ("fp8_e4m3_b16x64", 40, 200, BF16, 4, (16, 70)),
    ("fp8_e5m2", 16, 70, BF16, 4, (16,)), ("mxfp8", 20, 100, BF16, 4, (16,)),
]  # fmt: skip


@pytest.mark.parametrize("case", FRAGMENTS, ids=lambda case: f"{case[0]}-{case[3]}")
def test_weights_in_the_order_of_fragments(case):
    """The kernel that a GPU gets, in the interpreter. Several multiprocessors split k further."""
    from fast.triton import grouped_fragments

    name, n, k, dtype, multiprocessors, blocks = case
    q, bias = stack_of(name, 3, n, k), numbers(3, n)
    plan = grouped_fragments.prepare(q, Request(q.format, q.shape, dtype, torch.device("cpu")))
    plan.properties.multiprocessors = multiprocessors
    ids = torch.tensor(ROUTES["any"])
    x, weights = numbers(4, k, dtype=dtype), torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 0.25, 1.0, -1.0])
    for block in blocks:
        given = ref.moe.moe_align_block_size(ids, block, 3, torch.tensor([1, -1, 0]))
        out = torch.zeros(8, n, dtype=dtype)
        names = dict(zip(("sorted_token_ids", "expert_ids", "num_tokens_post_padded"), given, strict=True))
        plan.run(x, bias, None, out, **names, top_k=2, topk_weights=weights, block_size=block)
        assert torch.equal(out, ref.moe.indexed_linear(x, q, *given, 2, bias, topk_weights=weights, block_size=block))


@pytest.mark.parametrize(("name", "block", "arch"), [("int4_g128", 16, 90), ("mxfp4", 64, 80)])
def test_compiles_without_a_gpu(name, block, arch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from fast.triton import grouped_fragments

    q = stack_of(name, 2, 128, 256)
    plan = grouped_fragments.prepare(q, Request(q.format, q.shape, BF16, torch.device("cpu")))
    launched = []
    kernel, plan.launch = plan.launch.function, lambda *call: launched.append(call)
    blocks = ref.moe.moe_align_block_size(torch.tensor([[0, 1]]), block, 2)
    names = dict(zip(("sorted_token_ids", "expert_ids", "num_tokens_post_padded"), blocks, strict=True))
    plan.run(numbers(1, 256), None, None, torch.empty(2, 128, dtype=BF16), **names, top_k=2, topk_weights=torch.ones(2), block_size=block)
    _, _, args, constants, options = launched[0]
    pointers = {BF16: "*bf16", FP32: "*fp32", torch.int16: "*i16", torch.int32: "*i32", torch.uint8: "*u8"}
    kinds = [
        pointers[a.dtype] if isinstance(a, torch.Tensor) else "constexpr" if a is None else "fp32" if isinstance(a, float) else "i32"
        for a in args
    ]
    constants = constants | {"INTERPRET": False}
    signature = dict(zip(kernel.arg_names, [*kinds, *["constexpr"] * len(constants)], strict=True))
    values = {(i,): v for i, v in enumerate((*args, *constants.values())) if i >= len(args) or v is None}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds) if kind[0] == "*" or kernel.arg_names[i] in ("n", "k", "stride_s")
    }
    source = ASTSource(kernel, signature, values, aligned)
    compiled = compile(source, target=GPUTarget("cuda", arch, 32), options=options | {"enable_fp_fusion": True})
    assert compiled.metadata.shared <= {80: 166912, 90: 232448}[arch]
    assert ("wgmma" in compiled.asm["ptx"]) == (arch == 90) and "cp.async.cg" in compiled.asm["ptx"]
    # No multiply is left running: it may still read registers that the next step writes.
    assert set(re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", compiled.asm["ptx"])) <= {"0"}


def test_what_fragments_cannot_hold_is_refused():
    from fast.triton import grouped_fragments

    def prepare(q):
        return grouped_fragments.prepare(q, Request(q.format, q.shape, BF16, torch.device("cpu")))

    q = stack_of("mxfp4", 2, 16, 128)
    q.scale[0, 0, 0] = 255
    with pytest.raises(NotImplementedError, match="far apart"):
        prepare(q)
    q = stack_of("fp8", 2, 16, 128)
    q.packed[1, 3, 2] = 0x7F
    with pytest.raises(NotImplementedError, match="no numbers"):
        prepare(q)


def test_prepared_stacks_need_no_qtensor_and_are_remembered():
    q, x, offsets = stack_of("int4_g32", 3, 9, 64), numbers(5, 64), offsets_of((1, 0, 4))
    want = ref.moe.grouped_linear(x, q, offsets)
    prepared = prepare_experts(q)
    assert isinstance(prepared, Stack) and prepared.w is None and torch.equal(grouped_linear(x, prepared, offsets), want)
    with pytest.raises(NotImplementedError, match="prepared for other calls"):
        grouped_linear(x.half(), prepared, offsets)
    assert remember(q) is remember(q) and remember(prepared) is prepared
    for w in (q, stack_of(None, 2, 3, 4)):
        gone = weakref.ref(remember(w))
        del w
    del q
    gc.collect()
    assert gone() is None


def test_one_bias_is_built_in_and_others_are_not(monkeypatch):
    from .moe import grouped_eager

    made, prepare = [], grouped_eager.prepare
    monkeypatch.setattr(grouped_eager, "prepare", lambda w, request, bias: made.append(bias) or prepare(w, request))
    q, x, offsets = stack_of("int4_g32", 3, 9, 64), numbers(5, 64), offsets_of((1, 0, 4))
    bias = numbers(3, 9)
    for given in (bias, None, bias.clone(), bias, bias.clone(), bias.bfloat16()):
        want = ref.moe.grouped_linear(x, q, offsets, given)
        assert torch.equal(grouped_linear(x, q, offsets, given), want)
    assert [None if b is None else b.data_ptr() for b in made] == [bias.data_ptr(), None, None]
    bias += 1
    assert torch.equal(grouped_linear(x, q, offsets, bias), ref.moe.grouped_linear(x, q, offsets, bias)) and len(made) == 3
    made.clear()
    prepared = prepare_experts(q, bias=bias)
    assert made[0].data_ptr() == bias.data_ptr() and torch.equal(
        grouped_linear(x, prepared, offsets, bias), grouped_linear(x, q, offsets, bias)
    )
    with pytest.raises(NotImplementedError, match="with this bias"):
        grouped_linear(x, prepared, offsets, bias.clone())
    made.clear()
    grouped_linear(x, prepare_experts(q, bias=True), offsets, bias)
    assert made == [None]
    with pytest.raises(ValueError, match="bias has shape"):
        prepare_experts(q, bias=bias[:2])
    with pytest.raises(TypeError, match=r"^prepare_experts: w is Tensor, expected a QTensor$"):
        prepare_experts(numbers(3, 9, 9))
    with pytest.raises(ValueError, match=r"^prepare_experts: weight int8 has shape \(2, 2\), expected \(experts, n, k\)$"):
        prepare_experts(ref.quantize(torch.ones(2, 2), "int8"))


def test_refusals():
    w, x, offsets = stack_of("int4_g32", 3, 9, 64), numbers(5, 64), offsets_of((1, 0, 4))
    blocks = ref.moe.moe_align_block_size(torch.tensor(ROUTES["any"]), 16, 3)
    for error, match, call in (
        (ValueError, "experts, n, k", lambda: grouped_linear(x, w.packed[0], offsets)),
        (ValueError, r"k=60, weight int4_g32 has k=64", lambda: grouped_linear(x[:, :60], w, offsets)),
        (TypeError, "x is torch.float64", lambda: grouped_linear(x.double(), w, offsets)),
        (TypeError, "int32 or int64", lambda: grouped_linear(x, w, offsets.float())),
        (ValueError, "offsets have shape", lambda: grouped_linear(x, w, offsets[1:])),
        (ValueError, "bias has shape", lambda: grouped_linear(x, w, offsets, torch.ones(9))),
        (TypeError, "bias is torch.int64", lambda: grouped_linear(x, w, offsets, torch.ones(3, 9, dtype=torch.int64))),
        (ValueError, "without x_format", lambda: grouped_linear(x, w, offsets, x_scale=torch.ones(1))),
        (NotImplementedError, "no impl 'cublas' of it", lambda: grouped_linear(x, w, offsets, impl="cublas")),
        (ValueError, "unknown impl 'marlin'", lambda: grouped_linear(x, w, offsets, impl="marlin")),
        (ValueError, "out is", lambda: grouped_linear(x, w, offsets, out=torch.empty(5, 8))),
        (ValueError, r"\(3, max_tokens, k\)", lambda: masked_linear(x, w, offsets[1:])),
        (ValueError, "counts have shape", lambda: masked_linear(x.expand(3, 5, 64), w, offsets)),
        (ValueError, "do not fit each other", lambda: indexed_linear(x, w, *blocks, 2, block_size=3)),
        (ValueError, "topk_weights have shape", lambda: indexed_linear(x[:4], w, *blocks, 2, topk_weights=torch.ones(4), block_size=16)),
        (TypeError, "topk_weights are", lambda: indexed_linear(x[:4], w, *blocks, 2, topk_weights=torch.ones(8).int(), block_size=16)),
        (NotImplementedError, "gradient", lambda: grouped_linear(x.requires_grad_(), w, offsets)),
    ):
        with pytest.raises(error, match=match):
            call()


def test_the_small_kernel_makes_the_same_blocks_as_torch():
    from fast.moe import blocks
    from fast.triton import moe_blocks

    for counts, behind in COUNTS:
        for block in (16, 5):
            offsets, r = offsets_of(counts), sum(counts) + behind
            want = blocks.blocks_of_offsets(offsets, r, block)
            if r:
                got = moe_blocks.blocks(offsets, r, block, want[1].numel())
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            given, most = torch.tensor(counts, dtype=torch.int32), max(counts) + 1
            want = blocks.blocks_of_counts(given, most, block)
            got = moe_blocks.blocks(given, 3 * most, block, want[1].numel(), most)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
