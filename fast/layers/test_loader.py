"""Layers filled shard by shard: what they become, in any order, on any number of ranks; what is not kept; what is refused."""

import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

import fast
import ref
from conformance.weights import draw_weight

from .experts import FusedExperts
from .linear import Linear
from .loader import ExpertsLoader, LinearLoader

FORMATS = (*ref.FORMATS, "int5_g32", "int6", "int7_b3x24", "uint6z_g100", "fp8_e4m3_tensor", "int4_g32_tensor2div", "int4_g24_h4")
# Heads of 20 and 8 rows: neither words, groups nor blocks.
QKV = {"q": 20, "k": 8, "v": 8}


def filled(layer, shards, tensors, biases=None, prepare=None, **options):
    """The layer, filled by its loader, the last shard first."""
    loader = LinearLoader(layer, "layer", shards, **options)
    for shard in reversed(list(tensors)):
        loader.load(tensors[shard], shard)
        if biases is not None:
            loader.load_bias(biases[shard], shard)
    return loader.finish(prepare)


def whole(qs):
    return torch.cat([ref.dequantize(q) for q in qs])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("online", [True, False])
def test_each_shard_has_its_own_scales(name, online):
    """Of plain weights, quantized as they arrive, and of QTensors; in shapes that fill neither words nor groups nor blocks."""
    for k in (72, 40):
        plain = {shard: torch.randn(n, k) * 10**i for i, (shard, n) in enumerate(QKV.items())}
        qs = {shard: fast.quantize(w, name) for shard, w in plain.items()}
        layer = filled(Linear.empty(36, k, name), QKV, plain if online else qs, online=online)
        assert type(layer) is Linear and layer.shape == (36, k)
        assert torch.equal(ref.dequantize(layer.weight), whole(qs.values()))
        assert ref.equal(layer.weight, ref.fuse(list(qs.values())))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks(name, order, size):
    """Of any number of ranks, together as one alone: their weights, and, where sums are exact, their results."""
    k, index = 24 * size, None
    qs = {shard: draw_weight(i, name, (n * size, k), data="exact", order=order) for i, (shard, n) in enumerate(QKV.items())}
    if order:
        index = qs["q"].group_index
        qs = {shard: replace(q, group_index=index) for shard, q in qs.items()}
    x, biases = torch.randint(-3, 4, (2, k)).float(), {shard: torch.randint(-9, 9, (n * size,)).float() for shard, n in QKV.items()}
    w, y = whole(qs.values()), torch.cat([ref.linear(x, qs[s], biases[s]) for s in QKV], -1)
    shared = {"size": size, "shards": QKV, "tensors": qs, "biases": biases}
    by_rows = [filled(Linear.empty(36, k, name, bias=True), **shared, rank=r) for r in range(size)]
    parts = [ref.dequantize(layer.weight).split(list(QKV.values())) for layer in by_rows]
    assert torch.equal(torch.cat([rank[i] for i in range(3) for rank in parts]), w)
    ys = [layer(x).split(list(QKV.values()), -1) for layer in by_rows]
    assert torch.equal(torch.cat([rank[i] for i in range(3) for rank in ys], -1), y)
    shared["shards"] = {shard: n * size for shard, n in QKV.items()}
    by_columns = [filled(Linear.empty(36 * size, 24, name, bias=True), **shared, rank=r, axis="k") for r in range(size)]
    assert torch.equal(torch.cat([ref.dequantize(layer.weight) for layer in by_columns], -1), w)
    assert torch.equal(sum(layer(x[:, 24 * r : 24 * (r + 1)]) for r, layer in enumerate(by_columns)), y)
    assert [layer.bias is None for layer in by_columns] == [False] + [True] * (size - 1)


@pytest.mark.parametrize("axis", ["n", "k"])
def test_quantized_before_it_is_sliced(axis):
    w = torch.randn(8, 128)
    q = fast.quantize(w, "int4_g128")
    shape = (4, 128) if axis == "n" else (8, 64)
    made = [filled(Linear.empty(*shape, "int4_g128"), None, {0: w}, online=True, rank=r, size=2, axis=axis) for r in range(2)]
    assert torch.equal(torch.cat([ref.dequantize(layer.weight) for layer in made], "nk".index(axis)), ref.dequantize(q))


def test_a_list_of_shards_prepared_and_on_a_device():
    w = torch.randn(6, 64)
    layer = Linear.empty(6, 64, "int8", x_format="int8_tensor", static=True, device="cpu")
    loader = LinearLoader(layer, "gate_up", [2, 4], online=True)
    assert layer.packed.is_meta
    loader.load(w[:2], 0)
    loader.load(w[2:], 1)
    for value in (0.25, 0.5, 0.125):
        loader.load_x_scale(torch.tensor(value, dtype=torch.bfloat16))
    assert loader.finish(torch.float32) is layer and layer.packed is None and torch.equal(layer.x_scale, torch.tensor([0.5]))
    x = torch.randn(3, 64)
    y = fast.linear(x, fast.quantize(w, "int8"), x_format="int8_tensor", x_scale=torch.tensor([0.5]))
    assert torch.equal(layer(x), y)


def test_blocks_of_some_shards_are_cut():
    """One shard's border on a rank lies between blocks, another's inside of one."""
    qs = {"q": draw_weight(0, "fp8_e4m3_b8x32", (32, 64)), "k": draw_weight(1, "fp8_e4m3_b8x32", (8, 64))}
    layer = filled(Linear.empty(20, 64, "fp8_e4m3_b8x32"), {"q": 16, "k": 4}, qs, rank=1, size=2)
    assert torch.equal(ref.dequantize(layer.weight), torch.cat([ref.dequantize(qs["q"])[16:], ref.dequantize(qs["k"])[4:]]))


def experts_filled(layer, shards, biases=None, prepare=None, **options):
    """The layer, filled by its loader, the last expert first. shards: {shard: one tensor an expert}."""
    loader = ExpertsLoader(layer, "experts", **options)
    for given, load in ((shards, loader.load), (biases or {}, loader.load_bias)):
        for shard, of in given.items():
            for expert in reversed(range(len(of))):
                load(of[expert], expert, shard)
    return loader.finish(prepare)


def tokens(hidden, e, m=5):
    return torch.randn(m, hidden), torch.rand(m, 2), torch.randint(0, e, (m, 2))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("online", [True, False])
def test_experts(name, online):
    for e, hidden, inner in ((3, 40, 20), (2, 72, 36)):
        shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        plain = {shard: torch.randn(e, *shape) for shard, shape in shapes.items()}
        biases = {shard: torch.randn(e, shape[0]) for shard, shape in shapes.items()}
        qs = {shard: [fast.quantize(w, name) for w in stack] for shard, stack in plain.items()}
        layer = FusedExperts.empty(e, hidden, inner, name, bias=True)
        assert experts_filled(layer, plain if online else qs, biases, online=online) is layer
        w13 = ref.stack([ref.fuse([gate, up]) for gate, up in zip(qs["gate"], qs["up"], strict=True)])
        w2 = ref.stack(qs["down"])
        assert ref.equal(layer.w13.weight, w13) and ref.equal(layer.w2.weight, w2)
        x, *topk = tokens(hidden, e)
        bias13 = torch.cat([biases["gate"], biases["up"]], 1)
        assert torch.equal(layer(x, *topk), fast.fused_experts(x, w13, w2, *topk, bias13=bias13, bias2=biases["down"]))


@pytest.mark.parametrize("name", FORMATS)
def test_experts_on_ranks(name):
    e, hidden, inner, size = 2, 40, 20, 2
    shapes = {"gate": (inner * size, hidden), "up": (inner * size, hidden), "down": (hidden, inner * size)}
    qs = {shard: [draw_weight(i, name, shape) for i in range(e)] for shard, shape in shapes.items()}
    biases = {shard: torch.randn(e, shape[0]) for shard, shape in shapes.items()}
    ranks = [experts_filled(FusedExperts.empty(e, hidden, inner, name, bias=True), qs, biases, rank=r, size=size) for r in range(size)]
    gate, up, down = (torch.stack([ref.dequantize(q) for q in of]) for of in qs.values())
    firsts, seconds = ([ref.dequantize(getattr(layer, w).weight) for layer in ranks] for w in ("w13", "w2"))
    assert torch.equal(torch.cat([w[:, :inner] for w in firsts] + [w[:, inner:] for w in firsts], 1), torch.cat([gate, up], 1))
    assert torch.equal(torch.cat(seconds, 2), down)
    assert torch.equal(ranks[1].bias13, torch.cat([biases["gate"][:, inner:], biases["up"][:, inner:]], 1))
    assert torch.equal(ranks[0].bias2, biases["down"]) and ranks[1].bias2 is None


@pytest.mark.parametrize("activation", ["swigluoai", "relu2_no_mul"])
def test_experts_of_other_kinds(activation):
    """Every second row is gate's; and no gate at all."""
    gate, up, down = torch.randn(2, 12, 32), torch.randn(2, 12, 32), torch.randn(2, 32, 12)
    gated = activation == "swigluoai"
    shards = {"gate": gate, "up": up, "down": down} if gated else {"up": up, "down": down}
    layer = FusedExperts.empty(2, 32, 12, "int8", activation=activation)
    experts_filled(layer, shards, online=True, prepare=torch.float32)
    w13 = torch.stack([gate, up], 2).flatten(1, 2) if gated else up
    x, *topk = tokens(32, 2)
    y = fast.fused_experts(x, fast.quantize(w13, "int8"), fast.quantize(down, "int8"), *topk, activation=activation)
    assert torch.equal(layer(x, *topk), y)


def test_no_experts_at_all():
    layer = ExpertsLoader(FusedExperts.empty(0, 32, 12, "int8", bias=True), "experts").finish()
    x, *topk = tokens(32, 2)
    assert torch.equal(layer(x, *topk, expert_map=torch.tensor([-1, -1])), torch.zeros(5, 32))


def test_nothing_is_kept_beside_the_stack():
    """Plain shards are dropped when they are quantized, and quantized ones when their expert is whole; the stack is made once."""
    layer = FusedExperts.empty(4, 64, 32, "int4_g32")
    loader = ExpertsLoader(layer, "experts", online=True)
    stack = None
    for expert in range(4):
        for shard, shape in {"gate": (32, 64), "up": (32, 64), "down": (64, 32)}.items():
            w = torch.randn(shape)
            loader.load(w, expert, shard)
            gone = weakref.ref(w)
            del w
            assert gone() is None
        assert not any(q is not None for side in (loader.first, loader.second) for s in side.shards for q in s.weights.values())
        place = loader.first.weight.packed.data_ptr()
        assert stack in (None, place)
        stack = place
    assert loader.finish().w13.packed.data_ptr() == stack


def test_the_shards_of_a_linear_are_freed():
    q = fast.quantize(torch.randn(8, 64), "int4_g32")
    gone = weakref.ref(q.packed)
    loader = LinearLoader(Linear.empty(16, 64, "int4_g32"), "layer", [8, 8])
    loader.load(q, 0)
    loader.load(q, 1)
    del q
    layer = loader.finish()
    assert gone() is None and layer.shape == (16, 64)


@pytest.mark.parametrize("axis, rank", [("n", 0), ("n", 1), ("k", 1)])
def test_unquantized_weights_make_a_plain_linear(axis, rank):
    ws, biases = {"a": torch.randn(8, 32).half(), "b": torch.randn(4, 32).half()}, {"a": torch.randn(8), "b": torch.randn(4)}
    shards, shape = ({"a": 4, "b": 2}, (6, 32)) if axis == "n" else ({"a": 8, "b": 4}, (12, 16))
    empty = Linear.empty(*shape, "int4_g32", bias=True, x_format="int8_token")
    with pytest.warns(UserWarning, match=r"^layer: .*\(torch\.float16\).* to be int4_g32; it becomes a plain torch\.nn\.Linear"):
        layer = filled(empty, shards, ws, biases, rank=rank, size=2, axis=axis)
    assert type(layer) is nn.Linear and layer.weight.dtype == torch.float16 and not any(p.requires_grad for p in layer.parameters())
    expected = torch.cat([w.chunk(2, "nk".index(axis))[rank] for w in ws.values()])
    assert torch.equal(layer.weight, expected)
    if axis == "n":
        assert torch.equal(layer.bias, torch.cat([b.chunk(2)[rank] for b in biases.values()]).half())
    else:
        assert layer.bias is None


def test_unquantized_experts_stay_plain():
    shards = {"gate": torch.randn(2, 12, 32), "up": torch.randn(2, 12, 32), "down": torch.randn(2, 32, 12)}
    x, *topk = tokens(32, 2)
    y = fast.fused_experts(x, torch.cat([shards["gate"], shards["up"]], 1), shards["down"], *topk)
    with pytest.warns(UserWarning, match=r"^experts: .*\(torch\.float32\).* to be int8; it stays plain") as seen:
        layer = experts_filled(FusedExperts.empty(2, 32, 12, "int8", x_format="int8_token"), shards, prepare=torch.float32)
    assert len(seen) == 2 and torch.equal(layer(x, *topk), y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = experts_filled(FusedExperts.empty(2, 32, 12, None), shards)
    assert torch.equal(layer(x, *topk), y)


ONE = torch.ones(4, 64)


def linear_loader(**options):
    return LinearLoader(Linear.empty(8, 64, "int4_g32", bias=True), "model.qkv", {"q": 4, "k": 4}, **options)


def after(loader, *calls):
    """The loader after calls (method, arguments...)."""
    for method, *args in calls:
        getattr(loader, method)(*args)
    return loader


WRONG = [
    (lambda: linear_loader().load(ONE[:3], "q"), ValueError, r"^model.qkv: weight of 'q' has shape \(3, 64\), expected \(4, 64\)$"),
    (lambda: linear_loader(size=2).load(ONE, "q"), ValueError, r"has shape \(4, 64\), expected \(8, 64\) \(2 ranks have n together\)"),
    (lambda: linear_loader().load_bias(ONE, "q"), ValueError, r"^model.qkv: bias of 'q' has shape \(4, 64\), expected \(4,\)$"),
    (lambda: linear_loader().load_bias(torch.ones(4).int(), "q"), TypeError, "bias of 'q' is torch.int32, expected floats"),
    (lambda: linear_loader().load(ONE, "kk"), ValueError, "^model.qkv: there is no shard 'kk'; the nearest is 'k'"),
    (lambda: linear_loader().load("x", "q"), TypeError, "weight of 'q' is str, expected a tensor"),
    (lambda: linear_loader().load(ONE.int(), "q"), TypeError, "is torch.int32, expected float16, bfloat16 or float32, or a QTensor"),
    (lambda: linear_loader().load(ONE.to(torch.float8_e4m3fn), "q"), TypeError, "is torch.float8_e4m3fn, expected float16"),
    (lambda: linear_loader().load(fast.quantize(ONE, "int8"), "q"), ValueError, "weight of 'q' is int8, expected int4_g32"),
    (lambda: linear_loader(online=True).load(ONE / 0, "q"), ValueError, "^model.qkv: weight of 'q': quantize: .*inf"),
    (lambda: linear_loader(axis="m"), ValueError, "model.qkv: unknown axis 'm', expected 'n' or 'k'"),
    (lambda: linear_loader(rank=2, size=2), ValueError, "model.qkv: got rank 2 of 2, expected 0 <= rank < size"),
    (lambda: after(linear_loader(), ("load", ONE, "q"), ("load", ONE, "q")), ValueError, "model.qkv: weight of 'q' arrived a second time"),
    (
        lambda: after(linear_loader(), ("load_bias", ONE[:, 0], "q"), ("load_bias", ONE[:, 0], "q")),
        ValueError,
        "model.qkv: bias of 'q' arrived a second time",
    ),
    (
        lambda: after(linear_loader(), ("load", ONE, "q"), ("load", fast.quantize(ONE, "int4_g32"), "k")),
        ValueError,
        "weight of 'k' is quantized, and what arrived before is not quantized",
    ),
    (
        lambda: after(linear_loader(), ("load", ONE, "q"), ("load_bias", ONE[:, 0], "k"), ("finish",)),
        ValueError,
        "^model.qkv: not all shards have arrived; missing: weight of 'k', bias of 'q'$",
    ),
    (lambda: LinearLoader(Linear.empty(8, 64, "int8"), "up").finish(), ValueError, "^up: not all shards have arrived; missing: weight$"),
    (lambda: LinearLoader(Linear.empty(8, 64, "int8"), "up").load_bias(ONE), ValueError, "^up: a bias arrived"),
    (lambda: LinearLoader(Linear.empty(8, 64, "int8"), "up").load_x_scale(ONE), ValueError, "^up: x_scale arrived"),
    (lambda: LinearLoader(Linear.empty(8, 64, "int8"), "up", [4, 5]), ValueError, r"^up: shards have 9 rows, the layer has n=8"),
    (
        lambda: after(LinearLoader(Linear.empty(4, 64, "int8", x_format="int8_tensor", static=True), "up", online=True), ("load", ONE), ("finish",)),
        ValueError,
        "missing: x_scale$",
    ),
    (
        lambda: LinearLoader(Linear.empty(4, 64, "int8", x_format="int8_tensor", static=True), "up").load_x_scale(ONE),
        ValueError,
        r"x_scale has shape \(4, 64\), expected one value",
    ),
]  # fmt: skip


@pytest.mark.parametrize("do, error, message", WRONG, ids=range(len(WRONG)))
def test_refusals(do, error, message):
    with pytest.raises(error, match=message):
        do()


def test_shards_that_do_not_go_together():
    loader = linear_loader()
    for shard, fmt in (("q", "int4_g32"), ("k", "int4_g16")):
        loader.load(fast.quantize(ONE, fmt), shard)
        loader.load_bias(torch.ones(4), shard)
    with pytest.raises(ValueError, match=r"^model.qkv: fuse: got formats int4_g32 and int4_g16"):
        loader.finish()


def test_finished_loaders():
    loader = LinearLoader(Linear.empty(4, 64, "int8", bias=True), "up", online=True)
    experts = ExpertsLoader(FusedExperts.empty(1, 64, 4, "int8", bias=True), "up", online=True)
    after(loader, ("load", ONE), ("load_bias", ONE[:, 0]), ("finish",))
    tensors = {"gate": ONE, "up": ONE, "down": ONE.T}
    after(experts, *(call for s, w in tensors.items() for call in (("load", w, 0, s), ("load_bias", w[:, 0], 0, s))), ("finish",))
    calls = [(loader, ("load", ONE)), (loader, ("load_bias", ONE[:, 0])), (loader, ("load_x_scale", ONE[:1, 0])), (loader, ("finish",))]
    calls += [(experts, ("load", ONE, 0, "up")), (experts, ("load_bias", ONE[:, 0], 0, "up")), (experts, ("finish",))]
    for of, call in calls:
        with pytest.raises(ValueError, match=r"^up: the layer was finished before"):
            after(of, call)


def test_a_border_inside_of_a_rotated_block():
    loader = LinearLoader(Linear.empty(4, 48, "int4_h16"), "down", size=2, rank=1, axis="k")
    q = draw_weight(0, "int4_h32", (4, 96))
    with pytest.raises(ValueError, match=r"^down: weight: take_columns: columns 48 to 96 of int4_h32 cut a block of 32"):
        loader.load(q)


def experts_loader(**options):
    return ExpertsLoader(FusedExperts.empty(2, 64, 4, "int4_g32"), "experts", **options)


@pytest.mark.parametrize(
    "do, message",
    [
        (lambda: experts_loader().load(ONE, 2, "up"), "^experts: there is no expert 2, expected 0 to 1"),
        (lambda: experts_loader().load(ONE, 1, "upp"), "^experts: expert 1: there is no shard 'upp'; the nearest is 'up'"),
        (lambda: experts_loader().load(ONE, 1, "down"), r"^experts: expert 1: weight has shape \(4, 64\), expected \(64, 4\)"),
        (lambda: experts_loader().load(ONE.T, 1, "up"), r"^experts: expert 1: weight of 'up' has shape \(64, 4\), expected \(4, 64\)"),
        (lambda: experts_loader().load_bias(ONE[:, 0], 1, "up"), "^experts: a bias of 'up' arrived"),
        (lambda: after(experts_loader(), ("load", ONE, 0, "up"), ("load", ONE, 0, "up")), "expert 0: weight of 'up' arrived a second time"),
        (
            lambda: after(experts_loader(), *(("load", ONE, 0, s) for s in ("gate", "up", "up"))),
            "expert 0: weight of 'up' arrived a second time",
        ),
        (
            lambda: after(experts_loader(), ("load", ONE, 0, "up"), ("load", ONE.T, 1, "down"), ("finish",)),
            r"^experts: not all .* missing: weight of 'gate' of expert 0, weight of 'gate' of expert 1, weight of 'up' of expert 1, weight of expert 0$",
        ),
        (
            lambda: ExpertsLoader(FusedExperts.empty(9, 64, 4, "int4_g32"), "experts").finish(),
            "and 15 more$",
        ),
        (
            lambda: after(
                experts_loader(), *(("load", fast.quantize(ONE, f"int4_g{g}"), e, s) for e, g in ((0, 32), (1, 16)) for s in ("gate", "up"))
            ),
            r"^experts: expert 1 is int4_g16, and the experts before are int4_g32 \(all must match\)",
        ),
        (
            lambda: after(
                experts_loader(), ("load", ONE.T, 0, "down"), ("load", fast.quantize(ONE.T, "int4_g32"), 1, "down")
            ),
            r"^experts: expert 1 is int4_g32, and the experts before are torch.float32 \(all must match\)",
        ),
        (
            lambda: ExpertsLoader(FusedExperts.empty(2, 64, 4, None), "experts").load(fast.quantize(ONE, "int4_g32"), 0, "up"),
            "weight of 'up' is int4_g32, expected a plain tensor",
        ),
    ],
    ids=range(12),
)  # fmt: skip
def test_refusals_of_experts(do, message):
    with pytest.raises(ValueError, match=message):
        do()
