"""Humming's grouped products as far as they go without a GPU: refusals, tiles, layers of stacks, blocks taken apart, calls to the launcher."""

import contextlib
import itertools
import sys
from types import SimpleNamespace

import pytest
import torch

import ref
from fast.humming import grouped, layer, moe_tiles, rules
from fast.humming.reblock import reblock
from fast.request import Request
from ref.format import FORMATS, parse_format
from ref.moe import moe_align_block_size

CUDA = torch.device("cuda", 0)
TABLES = [moe_tiles.HALF, moe_tiles.FP8_BLOCKS, moe_tiles.EIGHT]
LAYERS = {  # experts, top_k, (n, k) of both products
    "Qwen3-30B-A3B": (128, 8, (1536, 2048), (2048, 768)),
    "GPT-OSS-120B": (128, 4, (5760, 2880), (2880, 2880)),
    "DeepSeek-V3 TP8": (256, 8, (512, 7168), (7168, 256)),
}


@pytest.fixture
def hopper(monkeypatch):
    """A device of compute capability 9.0 with 132 multiprocessors, as far as is looked, with all libraries installed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)


def request(name, x_format=None, dtype=torch.bfloat16, shape=(4, 256, 512), device=CUDA, **more):
    return Request(name and parse_format(name), shape, dtype, device, x_format and parse_format(x_format), **more)


TAKEN = [
    *[(name, None) for name in ("int4_g128_bf16", "mxfp4", "nvfp4", "uint4z_g64_bf16", "int4_tensor")],
    *[
        ("int8_g128_bf16", "int8_token"),
        ("fp8_e4m3_b128x128", "fp8_e4m3_g128"),
        ("mxfp4", "fp8_e4m3_token"),
        ("int4_g128_bf16", "int8_g32"),
    ],
]


@pytest.mark.parametrize("name, x_format", TAKEN)
def test_takes(hopper, name, x_format):
    assert grouped.why_not(request(name, x_format)) is None


def test_refuses(hopper, monkeypatch):
    assert "float32 ones would be rounded" in grouped.why_not(request("int4_g128"))
    assert "quantized weights" in grouped.why_not(request(None))
    assert grouped.why_not(request("mxfp4", bias=True)) is None
    for name, x_format in (("nvfp4", None), ("int4_tensor", None), ("mxfp4", "fp8_e4m3_token")):
        assert "bias" in grouped.why_not(request(name, x_format, bias=True))
    assert "reordered" in grouped.why_not(request("int4_g128_bf16", group_index=True))
    assert "rotated" in grouped.why_not(request("int4_g128_bf16_h128"))
    assert "rotate" in grouped.why_not(request("int4_g128_bf16", "int8_token_h64"))
    assert "empty" in grouped.why_not(request("mxfp4", shape=(0, 256, 512)))
    assert "NVIDIA" in grouped.why_not(request("mxfp4", device=torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert "9.0" in grouped.why_not(request("mxfp4"))


@pytest.mark.parametrize("name", FORMATS)
def test_says_something_about_every_format(hopper, name):
    for x_format in (None, "int8_token", "fp8_e4m3_g128"):
        reason = grouped.why_not(request(name, x_format))
        assert reason is None or (reason and not reason.endswith("."))


def test_expected_blocks():
    assert moe_tiles.expected_blocks(37, 1, 16) == 3
    assert 7.5 < moe_tiles.expected_blocks(8, 128, 16) < 8
    generator = torch.Generator().manual_seed(0)
    for rows, experts, m in ((64, 128, 16), (2048, 128, 16), (2048, 32, 64), (40000, 128, 64)):
        counts = [torch.randint(experts, (rows,), generator=generator).bincount(minlength=experts) for _ in range(20)]
        drawn = sum(float((-(-count // m)).sum()) for count in counts) / 20
        assert moe_tiles.expected_blocks(rows, experts, m) == pytest.approx(drawn, rel=0.04)
    assert moe_tiles.expected_blocks(2**18, 256, 128) == pytest.approx(2**11 + 128)


@pytest.mark.parametrize("table", TABLES, ids=["half", "fp8_blocks", "eight"])
@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (1536, 2048), (7168, 256), (512, 7168), (5760, 2944)], ids=str)
def test_every_block_size_has_a_tile_for_every_number_of_rows(table, shape):
    sizes = moe_tiles.sizes(table, shape)
    assert {16, 32, 64, 128} <= set(sizes)
    for layout, m in [("indexed", m) for m in sizes] + [("grouped_contiguous", None), ("grouped_masked", None)]:
        made = moe_tiles.intervals(table, shape, 64, 132, layout, (16, 8.25), m)
        assert made[0][0] == 0 and made[-1][1] == 1 << 30
        assert all(a[1] == b[0] for a, b in itertools.pairwise(made))
        for _, _, config in made:
            rows, n, k = config["block_shape"]
            assert shape[0] % n == 0 and shape[1] % k == 0 and m in (None, rows)
            assert not config["use_stream_k"] and not config.get("use_tma_c", False)
            assert layout != "indexed" or not config.get("use_tma_a", False)


def test_tiles_fit_a_multiprocessor():
    for table in TABLES:
        for tile in table:
            m, n, k = tile.warp
            warps = (tile.m // m) * (tile.n // n) * (tile.k // k)
            assert (tile.m % m, tile.n % n, tile.k % k, tile.m % 8) == (0, 0, 0, 0)
            assert tile.blocks * (warps + 4 * (not tile.alone)) <= 32
            assert not tile.wgmma or tile.n // n % 4 == 0
            # Weights of at most 8 bits, scales and zero points of 24 bits for each 16 of them.
            for bits in (4.5, 6, 8.25, 9.5):
                of_x = 16 if table is moe_tiles.HALF else 8
                stages, blocks = moe_tiles.residency(tile, (of_x, bits))
                assert 3 <= stages <= tile.stages and 1 <= blocks <= tile.blocks
                assert blocks * stages * tile.k * (tile.m * of_x + tile.n * bits) / 8 <= moe_tiles.SHARED_MEMORY
                assert bits > 6 or blocks == tile.blocks


@pytest.mark.parametrize("name", LAYERS)
def test_blocks_grow_with_the_rows_of_an_expert(hopper, name):
    experts, top_k, *shapes = LAYERS[name]
    asked = request("int4_g128_bf16", shape=(experts, *shapes[0]))
    blocks = [grouped.choose_block(tokens * top_k, shapes, asked) for tokens in (1, 16, 256, 1024, 4096, 65536)]
    assert max(blocks[:2]) <= 16 < blocks[3] and blocks[-1] >= 64


STACKED = ("int4_g32_bf16", "uint4z_g64_bf16", "mxfp4", "nvfp4", "fp8_e4m3_b128x128", "int4_tensor", "int3_bf16")


@pytest.mark.parametrize("name", STACKED)
def test_a_stack_is_its_experts(monkeypatch, hopper, name):
    """The tensors of a stack are those of its experts, one after the other."""
    configs = _without_humming(monkeypatch)
    e, n, k = 3, 136, 200
    stack = ref.quantize(torch.randn(e, n, k, generator=torch.Generator().manual_seed(1)), name)
    x_format = "fp8_e4m3_g128" if "b128" in name else None
    _, made = layer.build(stack, request(name, x_format, shape=(e, n, k)))
    assert configs[-1]["num_experts"] == e and (configs[-1]["shape_n"], configs[-1]["shape_k"]) == (256, 256)
    for expert in range(e):
        _, single = layer.build(ref.combine.take_expert(stack, expert), request(name, x_format, shape=(n, k)))
        assert configs[-1]["num_experts"] == 0
        for part, tensor in single.items():
            assert torch.equal(made[part][expert].flatten(), tensor.flatten()), part


@pytest.mark.parametrize("name, k", [("int4_g32_bf16", 200), ("mxfp4", 96), ("int1_g32_bf16", 64), ("uint4z_g64_bf16", 130), ("fp8_e4m3_g64_bf16", 64), ("int5_g16_bf16", 40)])  # fmt: skip
def test_a_bias_is_one_more_column(monkeypatch, hopper, name, k):
    """With ones in its column of x, what the tensors mean is the product and the bias."""
    configs = _without_humming(monkeypatch)
    generator = torch.Generator().manual_seed(1)
    e, n = 2, 24
    q = ref.quantize(torch.randn(e, n, k, generator=generator), name)
    bias = torch.randn(e, n, generator=generator).bfloat16()
    _, made = layer.build(q, request(name, shape=(e, n, k)), bias)
    g = rules.group_size(q.format)
    column, columns = layer.bias_column(k, g), configs[-1]["shape_k"]
    assert column >= k and columns - configs[-1]["pad_shape_k"] > column
    codes = ref.unpack(made["weight"], q.format.element.bits, columns).long()
    w = ref.element.values(q.format.element)[codes]
    if "zero_point" in made:
        w = w - made["zero_point"].double().repeat_interleave(g, -1)
    w = (w * made["weight_scale"].double().repeat_interleave(g, -1))[:, :n]
    x = torch.zeros(5, columns, dtype=torch.float64)
    x[:, :k] = torch.randn(5, k, generator=generator)
    x[:, column] = 1
    torch.testing.assert_close(x @ w.mT, x[:, :k] @ ref.dequantize(q).mT + bias[:, None].double(), rtol=1e-12, atol=1e-12)


def test_a_bias_that_would_be_rounded_is_refused(monkeypatch, hopper):
    _without_humming(monkeypatch)
    q = ref.quantize(torch.randn(2, 8, 32), "mxfp4")
    with pytest.raises(NotImplementedError, match="not representable"):
        layer.build(q, request("mxfp4", shape=(2, 8, 32)), torch.full((2, 8), 1.001))
    with pytest.raises(NotImplementedError, match="prepared with"):
        grouped.prepare(q, request("mxfp4", shape=(2, 8, 32), bias=True))


def _without_humming(monkeypatch):
    """Lets layer.build run without humming; what the layers were configured with, in a list that grows."""
    configs = []
    monkeypatch.setitem(sys.modules, "humming", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "humming.config", SimpleNamespace(LayerConfig=lambda **config: configs.append(config)))
    monkeypatch.setitem(sys.modules, "humming.transform", SimpleNamespace(transform_humming_tensors=lambda config, t, already_padded: t))
    monkeypatch.setattr(layer, "_packed_along_n", lambda zero, bits: zero)
    return configs


@pytest.mark.parametrize("given, rows", [(16, 16), (64, 16), (5, 16), (40, 16), (8, 16), (96, 48), (50, 48)])
def test_blocks_are_taken_apart_or_filled_up(given, rows):
    generator = torch.Generator().manual_seed(given)
    ids = torch.randint(6, (23, 2), generator=generator)
    expert_map = torch.tensor([2, 0, -1, 1, -1, -1])
    sorted_ids, experts, end = moe_align_block_size(ids, given, 6, expert_map)
    y = torch.full((ids.numel(), 3), 7.0)
    made_ids, made_experts, made_end = reblock(sorted_ids, experts, end, given, rows, 3, y)
    assert made_ids.numel() == made_experts.numel() * rows and int(made_end) % rows == 0
    owner = torch.full((ids.numel() + 1,), -1)
    used = made_ids[: int(made_end)].long()
    owner[used] = made_experts.long().repeat_interleave(rows)[: used.numel()]
    local = expert_map[ids.flatten()]
    assert owner[:-1].tolist() == local.tolist()
    assert made_experts.min() >= 0 and made_experts.max() < 3
    assert torch.equal(y == 0, (local < 0)[:, None].expand(-1, 3))


def test_blocks_that_lie_are_not_followed():
    y = torch.ones(4, 2, dtype=torch.bfloat16)
    given = [torch.tensor(values, dtype=torch.int32) for values in ([0, 99, -5, 3] * 4, [9], [1 << 20])]
    ids, experts, end = reblock(*given, 16, 16, 2, y)
    assert ids.tolist() == [4] * 16 and experts.tolist() == [0] and end.tolist() == [16]
    assert y[:, 0].tolist() == [0, 1, 1, 0]


def test_calls_of_the_launcher(hopper):
    """What each layout passes on, with a launcher that only notes it."""
    calls = []
    plan = object.__new__(grouped.GroupedPlan)
    plan.experts, plan.n, plan.k, plan.ones, plan.sms = 2, 8, 32, None, 132
    plan.quantizer, plan.grouped, plan.block_sizes, plan.locks = None, False, (16, 32), torch.zeros(0)
    plan.tensors = {"weight": "w", "weight_scale": "s", "weight_scale_2": "t"}
    plan.tables = {"indexed": {16: "16", 32: "32"}, "grouped_contiguous": {None: "c"}, "grouped_masked": {None: "m"}}
    plan.launch = lambda *args: calls.append(args)
    plan._device = contextlib.nullcontext
    x, out = torch.randn(6, 32, dtype=torch.bfloat16), torch.ones(12, 8, dtype=torch.bfloat16)
    ids, experts, end = moe_align_block_size(torch.tensor([[0, 1]] * 6), 32, 2)
    call = dict(sorted_token_ids=ids, expert_ids=experts, num_tokens_post_padded=end, top_k=2, block_size=32)
    plan.run(x, None, None, out, **call, trusted=True)
    assert calls[-1][0] == "32" and calls[-1][10] is ids and calls[-1][11] is experts and calls[-1][15:] == (2, 0, False)
    plan.run(x, None, None, out, **call)
    assert calls[-1][0] == "32" and calls[-1][10] is not ids and calls[-1][11].tolist() == [0, 1, 0]
    plan.contiguous(x, torch.tensor([0, 4, 3]), None, None, out[:6])
    assert calls[-1][0] == "c" and calls[-1][13].tolist() == [0, 4, 4] and not out[:6].any() and out[6:].all()
    plan.masked(x.view(2, 3, 32), torch.tensor([9, 1]), None, None, out[6:].view(2, 3, 8))
    assert calls[-1][0] == "m" and calls[-1][13].tolist() == [3, 1] and calls[-1][1].shape == (6, 32) and not out.any()
    plan.n = 16
    plan.run(x, None, None, out, **call, trusted=True)
    assert calls[-1][9].shape == (12, 16)
    plan.n, plan.k, plan.ones = 8, 40, 32
    plan.run(x, None, None, out, **call, trusted=True)
    assert torch.equal(calls[-1][1][:, :32], x) and (calls[-1][1][:, 32] == 1).all() and not calls[-1][1][:, 33:].any()
    with pytest.raises(NotImplementedError, match="rounded"):
        plan.run(x, None, None, out, **call, topk_weights=torch.ones(12))
