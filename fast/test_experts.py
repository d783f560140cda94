"""fast.fused_experts: against ref's answers within derived bounds, whole layers of real models, refusals, ranks, layouts, workspaces."""

import itertools
from dataclasses import replace

import pytest
import torch

import fast.moe as fast
import ref
from conformance.experts_case import ExpertsCase
from conformance.moe_case import Route
from conformance.ops.experts_data import ExpertsData, draw
from conformance.ops.fused_experts import Truth

from .linear import why_not
from .moe import experts, stack, workspace

CPU = torch.device("cpu")
LAYOUTS = ("indexed", "grouped_contiguous", "grouped_masked")


def layer(seed=4, **given):
    """The data of a layer of the exact regime: 9 tokens, 3 of 4 experts each, some slots empty."""
    route = Route(m=9, t=3, e=4, mixed=True, neg=0b1001)
    data = draw(ExpertsCase(**{"route": route, "h": 40, "i": 24, "n": 24, "format": "int4_g32", "dtype": "fp32", "seed": seed} | given))
    assert data.exact or data.case.data != "exact"
    return data


def run(data, **given):
    case = data.case
    options = {"activation": case.activation, "bias13": data.bias13, "bias2": data.bias2, "x_format": case.x_format, **case.parameters}
    args = {"x": data.x, "w13": data.w13, "w2": data.w2, "topk_weights": data.weights, "topk_ids": data.ids}
    return fast.fused_experts(**args | options | given)


def exact(data, **given):
    """What every correct layer gives, bit for bit."""
    case = data.case
    return ref.moe.fused_experts_variant(
        data.x, data.w13, data.w2, data.weights, given.get("topk_ids", data.ids), variant="stored", activation=case.activation,
        bias13=data.bias13, bias2=data.bias2, x_format=case.x_format, **case.parameters,
    )  # fmt: skip


@pytest.mark.parametrize(
    "given", [{}, {"format": None}, {"format": "mxfp4", "bias": "fp32"}, {"x_format": "int8_token", "dtype": "bf16"}], ids=str
)
@pytest.mark.parametrize("gemm_type", LAYOUTS)
def test_layouts(gemm_type, given):
    data = layer(**given)
    assert torch.equal(run(data, gemm_type=gemm_type), exact(data))


@pytest.mark.parametrize("gemm_type", LAYOUTS)
def test_layouts_on_triton(gemm_type):
    pytest.importorskip("triton")
    data = layer(h=16, i=16, n=16, route=Route(m=3, t=2, e=3, neg=2))
    assert torch.equal(run(data, gemm_type=gemm_type, impl="triton"), exact(data))


def test_tokens_experts_and_batches_in_another_order():
    data = layer(data="normal", dtype="bf16")
    y, order, experts = run(data), torch.randperm(9), torch.randperm(4)
    x, ids, weights = data.x[order], data.ids[order], data.weights[order]
    assert torch.equal(run(data, x=x, topk_ids=ids, topk_weights=weights), y[order])
    relabelled = torch.where(data.ids < 0, -1, experts.argsort()[data.ids.clamp(min=0)])
    w13, w2 = (ref.quantize(ref.dequantize(w)[experts].float(), "int4_g32") for w in (data.w13, data.w2))
    taken = [replace(w, **{name: getattr(w, name)[experts] for name in ("packed", "scale")}) for w in (data.w13, data.w2)]
    assert [t.shape for t in taken] == [w13.shape, w2.shape]
    assert torch.equal(run(data, w13=taken[0], w2=taken[1], topk_ids=relabelled), y)
    parts = [run(data, x=data.x[s], topk_ids=data.ids[s], topk_weights=data.weights[s]) for s in (slice(0, 4), slice(4, 9))]
    assert torch.equal(torch.cat(parts), y)
    assert torch.equal(
        run(data, topk_weights=torch.where(data.ids == 1, 0, data.weights)), run(data, topk_ids=torch.where(data.ids == 1, -1, data.ids))
    )


@pytest.mark.parametrize("placement", ["linear", "round_robin"])
def test_the_sum_over_ranks_is_the_whole(placement):
    """Bit for bit: float32 has room for all of these sums. The last of three ranks has a single expert, and no token."""
    data = layer()
    ids = torch.where(data.ids == 3, 0, data.ids) if placement == "round_robin" else data.ids
    total = torch.zeros(9, 24)
    for rank in range(3):
        here = ref.expert_map(4, 3, rank, placement)
        own = (here >= 0).nonzero()[:, 0]
        w13, w2 = (replace(w, shape=(len(own), *w.shape[1:]), packed=w.packed[own], scale=w.scale[own]) for w in (data.w13, data.w2))
        total += run(data, w13=w13, w2=w2, topk_ids=ids, expert_map=here)
    assert torch.equal(total, exact(data, topk_ids=ids))


@pytest.mark.parametrize("empty", [0, 1, 3, "all", "others"])
def test_experts_without_rows(empty):
    data = layer()
    ids = torch.full_like(data.ids, -1) if empty == "all" else torch.full_like(data.ids, 2)
    if isinstance(empty, int):
        ids = torch.where(data.ids == empty, (empty + 1) % 4, data.ids)
    assert torch.equal(run(data, topk_ids=ids), exact(data, topk_ids=ids))


@pytest.mark.parametrize("gemm_type", LAYOUTS)
def test_ids_that_nobody_has_are_not_followed(gemm_type, monkeypatch):
    """Negative, beyond the experts, beyond the map, mapped beyond what is here; whatever the workspaces, and x of such tokens, hold."""
    poison(monkeypatch)
    data = layer()
    wild = torch.tensor([[-7, 4, 2**31 - 1]]).to(data.ids.dtype).expand(9, 3)
    ids = torch.where(torch.arange(9)[:, None] % 2 == 0, wild, data.ids)
    x = torch.where(torch.arange(9)[:, None] % 2 == 0, torch.nan, data.x)
    weights = torch.where(ids == wild, torch.nan, data.weights)
    clean = torch.where(ids == wild, -1, ids)
    y = run(data, topk_ids=ids, x=x, topk_weights=weights, gemm_type=gemm_type)
    assert torch.equal(y, exact(data, topk_ids=clean))
    assert torch.equal(run(data, topk_ids=ids, x=x, topk_weights=weights, gemm_type=gemm_type, expert_map=torch.arange(4)), y)
    lies = torch.tensor([0, 77, 2, 4])
    rows = ((data.ids != 1) & (data.ids != 3)).all(1)
    assert torch.equal(run(data, expert_map=lies, gemm_type=gemm_type)[rows], exact(data)[rows])
    monkeypatch.setenv("FAST_DEBUG", "1")
    with pytest.raises(ValueError, match="fused_experts: ids reach 2147483647, expected less than 4"):
        run(data, topk_ids=ids, gemm_type=gemm_type)
    with pytest.raises(ValueError, match="expert_map: ids reach 4"):
        run(data, expert_map=torch.arange(1, 5))


def poison(monkeypatch):
    monkeypatch.setattr(workspace, "allocate", lambda like, size: like.new_full((size,), torch.nan))


@pytest.mark.parametrize("x_format", [None, "int8_tensor", "int8_token"])
def test_what_workspaces_held_does_not_matter(x_format, monkeypatch):
    data = layer(x_format=x_format, data="normal", dtype="bf16")
    y = run(data)
    poison(monkeypatch)
    out = torch.full_like(y, torch.nan)
    assert run(data, out=out) is out and torch.equal(out, y)


def test_neighbours_never_share_a_workspace(monkeypatch):
    seen = []
    products = experts.LAYOUTS["indexed"]
    real = workspace.Workspaces

    def spy(like, rows, columns):
        seen.append(real(like, rows, columns))
        return seen[-1]

    monkeypatch.setattr(experts, "Workspaces", spy)
    assert experts.LAYOUTS["indexed"] is products
    data = layer()
    out = torch.empty(9, 24)
    run(data, out=out)
    (spaces,) = seen
    extents = [(spaces[i].data_ptr(), spaces[i].data_ptr() + spaces[i].nbytes) for i in range(3)] + [
        (out.data_ptr(), out.data_ptr() + out.nbytes)
    ]
    for (a, b), (c, d) in itertools.pairwise(extents):
        assert b <= c or d <= a
    assert extents[0][0] == extents[2][0] and [tuple(spaces[i].shape) for i in range(3)] == [(27, 48), (27, 24), (27, 24)]


def test_on_input():
    data = layer(route=Route(m=9, t=1, e=4, mixed=True, neg=1), on_input=True)
    y = run(data, apply_router_weight_on_input=True)
    assert torch.equal(y, ref.fused_experts(data.x, data.w13, data.w2, data.weights, data.ids, apply_router_weight_on_input=True))


@pytest.mark.parametrize("shape", [{"m": 0}, {"t": 0}, {"e": 0}, {"n": 0}], ids=str)
def test_nothing_to_do(shape):
    m, t, e, n = ({"m": 3, "t": 2, "e": 4, "n": 5} | shape).values()
    w13, w2 = torch.ones(e, 8, 6), torch.ones(e, n, 4)
    y = fast.fused_experts(torch.ones(m, 6), w13, w2, torch.ones(m, t), torch.full((m, t), -1))
    assert torch.equal(y, torch.zeros(m, n))


GOOD = {"x": torch.ones(3, 8), "w13": torch.ones(4, 12, 8), "w2": torch.ones(4, 8, 6), "topk_weights": torch.ones(3, 2),
        "topk_ids": torch.zeros(3, 2, dtype=torch.int32)}  # fmt: skip
REFUSED = [
    ({"x": torch.ones(3, 7)}, ValueError, "x has k=7, weight has k=8"),
    ({"x": torch.ones(3, 8).long()}, TypeError, "x is torch.int64"),
    ({"x": torch.ones(3, 2, 8)}, ValueError, r"expected \(rows, k\)"),
    ({"w13": torch.ones(12, 8)}, ValueError, r"expected \(experts, n, k\)"),
    ({"w2": torch.ones(8, 6)}, ValueError, r"w2 has shape \(8, 6\), expected \(experts, n, k\)"),
    ({"w2": torch.ones(3, 8, 6)}, ValueError, "w13 has 4 experts, w2 has 3"),
    ({"w2": torch.ones(4, 8, 5)}, ValueError, "the activation gives 6 columns, w2 has k=5"),
    ({"activation": "silu_no_mul"}, ValueError, "the activation gives 12 columns, w2 has k=6"),
    ({"topk_ids": torch.zeros(3, 3).int()}, ValueError, r"topk_weights have shape \(3, 2\), topk_ids \(3, 3\)"),
    ({"topk_ids": torch.zeros(2, 2).int(), "topk_weights": torch.ones(2, 2)}, ValueError, r"expected \(3, top_k\)"),
    ({"topk_ids": torch.zeros(3, 2)}, TypeError, "topk_ids has dtype torch.float32, expected int32 or int64"),
    ({"topk_weights": torch.ones(3, 2).int()}, TypeError, "topk_weights are torch.int32, expected floats"),
    ({"expert_map": torch.zeros(4)}, TypeError, "expert_map has dtype torch.float32"),
    ({"expert_map": torch.zeros(2, 2).int()}, ValueError, r"expert_map has shape \(2, 2\), expected \(experts,\)"),
    ({"bias13": torch.ones(4, 11)}, ValueError, r"bias has shape \(4, 11\), expected \(4, 12\)"),
    ({"bias2": torch.ones(4, 7)}, ValueError, r"bias2 has shape \(4, 7\), expected \(4, 8\)"),
    ({"bias2": torch.ones(4, 8).int()}, TypeError, "bias2 is torch.int32"),
    ({"apply_router_weight_on_input": True}, ValueError, "needs top_k = 1, got 2"),
    ({"activation": "swiglu"}, ValueError, "unknown activation 'swiglu'"),
    ({"activation": "situ"}, ValueError, "situ needs beta"),
    ({"activation": "gelu", "limit": 1.0}, ValueError, "gelu has no parameter limit"),
    ({"gemm_type": "grouped"}, ValueError, "unknown gemm_type 'grouped', expected one of auto, indexed"),
    ({"impl": "cutlass"}, ValueError, "unknown impl 'cutlass'"),
    ({"x_format": "nf4_token"}, ValueError, "cannot be quantized to nf4"),
    ({"out": torch.ones(3, 7)}, ValueError, r"out has shape \(3, 7\)"),
    ({"out": torch.ones(3, 8).bfloat16()}, ValueError, "out has shape"),
    ({"x": torch.ones(3, 8, requires_grad=True)}, NotImplementedError, "requires a gradient"),
    ({"impl": "humming"}, NotImplementedError, "humming"),
    ({"x_format": "int8_tensor", "gemm_type": "grouped_masked"}, NotImplementedError, "one scale for all of x"),
    ({"x": torch.ones(3, 8, device="meta")}, ValueError, "x is on meta"),
    ({"topk_weights": torch.ones(3, 2, device="meta")}, ValueError, "topk_weights is on meta"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "error", "message"), REFUSED, ids=[row[2][:40] for row in REFUSED])
def test_refusals(given, error, message):
    with pytest.raises(error, match=message):
        fast.fused_experts(**GOOD | given)


def test_why_not():
    q13, q2 = ref.quantize(torch.ones(4, 12, 8), "int4_g32"), ref.quantize(torch.ones(4, 8, 6), "int4_g32")
    x = torch.ones(3, 8)
    assert why_not("fused_experts", x, q13, q2, impl="torch") is None
    assert "NVIDIA" in why_not("fused_experts", x.bfloat16(), q13, q2, impl="humming")
    assert "NVIDIA" in why_not("grouped_linear", x.bfloat16(), q13, torch.zeros(5).int(), impl="humming")
    assert why_not("moe_fused_mul_sum", x, impl="torch") is None
    assert "not on meta" in why_not("moe_activation", torch.ones(1, device="meta"), impl="triton")
    with pytest.raises(ValueError, match="unknown impl 'cutlass'"):
        why_not("fused_experts", x, q13, q2, impl="cutlass")
    with pytest.raises(ValueError, match="moe_permute: unknown impl 'humming'"):
        why_not("moe_permute", x, impl="humming")


def test_blocks_follow_the_interval_of_tokens_times_top_k():
    first, second = (stack.remember(torch.ones(4, *shape)) for shape in ((12, 8), (8, 6)))
    kind = (torch.float32, None, "torch", True)
    sizes = [experts.plans_for(first, second, kind, (None, None), slots, 4)[0] for slots in (1, 64, 65, 128, 129, 256, 257, 4096)]
    assert sizes == [16, 16, 32, 32, 64, 64, 128, 128]
    # A quarter of the slots is expected here.
    assert experts.plans_for(first, second, kind, (None, None), 512, 16)[0] == 32


class Tiled:
    """A plan with tiles of its own, as Humming's."""

    block_sizes, n, k, asked = (16, 48), 8, 8, 0

    def block_size(self, rows, *others):
        self.asked += 1
        return 48 if others else 16


def test_one_block_size_for_both_products(monkeypatch):
    first, second = (stack.remember(torch.ones(4, *shape)) for shape in ((12, 8), (8, 6)))
    one, two, plain = Tiled(), Tiled(), object()
    for pair, block in (((one, two), 48), ((one, two), 48), ((plain, two), 16), ((plain, plain), 32)):
        plans = iter(pair)
        monkeypatch.setattr(stack.Stack, "plan", lambda *_: next(plans))
        assert experts.plans_for(first, second, (torch.float32, None, None, True), (None, None), 120, 4)[0] == block
    assert one.asked == two.asked == 1


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("form", [None, "int4_g32", "mxfp4", "fp8_e4m3_b16x32"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen3_moe, not renormalized", "deepseek_v3", "gpt_oss"])
def test_real_models(name, form, dtype):
    """Routing and experts give what the module does: within the derived bounds of the layer, and in float64 but for its roundings."""
    pytest.importorskip("transformers")
    from ref.moe.test_models import INNER, TOKENS, E, H, build, magnitudes, stacked

    block, router, routing, activation, top_k = build(name)
    w13, w2, biases = stacked(block)
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    x = torch.randn(TOKENS, H).to(kind)
    biases = {key: None if b is None else b.detach().float() for key, b in biases.items()}
    held = [w.to(kind) if form is None else ref.quantize(w, form) for w in (w13, w2)]
    with torch.no_grad():
        for parameter, w in zip((block.experts.gate_up_proj, block.experts.down_proj), held, strict=True):
            values = w.double() if form is None else ref.dequantize(w)
            parameter.copy_(values if biases["bias13"] is None else values.mT)
        if biases["bias13"] is not None:
            block.experts.gate_up_proj_bias.copy_(biases["bias13"])
            block.experts.down_proj_bias.copy_(biases["bias2"])
        logits, weights, ids = router(x.double())
        expected = block.experts(x.double(), ids, weights.double())
    got_ids, got_weights = fast.fused_topk(logits.float(), top_k, correction_bias=_bias(router), **routing)
    assert torch.equal(got_ids.sort(1).values, ids.sort(1).values.int())
    y = fast.fused_experts(x, *held, got_weights, got_ids, **activation, **biases)

    case = ExpertsCase(route=Route(TOKENS, top_k, E), h=H, i=INNER, n=H, format=form, dtype=dtype, data="normal", **activation)
    data = ExpertsData(case, x, *held, biases["bias13"], biases["bias2"], got_weights, False)
    data.ids, data.local, data.live = got_ids, got_ids.long(), got_ids >= 0
    assert Truth(data, CPU).check(y).variant == "stored"
    # Three stages of one rounding each, on the way to slopes of at most 1.1; weights and the sum in float32.
    unit = {"bf16": 2.0**-9, "fp32": 2.0**-24}[dtype]
    room = 4 * unit * 1.21 + (H + INNER + 4 * top_k + 64) * 2.0**-24
    doubled = [w if form else w.double() for w in held]
    sizes = magnitudes(x.double(), *doubled, weights, ids, *biases.values())
    assert ((y.double() - expected).abs() <= room * sizes).all()


def _bias(router):
    bias = getattr(router, "e_score_correction_bias", None)
    return None if bias is None else bias.float()


@pytest.mark.parametrize("given", [{"activation": "silu"}, {"activation": "silu", "limit": 1.0}, {"activation": "relu2_no_mul"}], ids=str)
@pytest.mark.parametrize("x_format", ["int8_token", "fp8_e4m3_g16"])
def test_the_activation_is_quantized_as_though_it_had_been_stored(x_format, given, monkeypatch):
    pytest.importorskip("triton")
    data = layer(h=32, i=40, n=16, route=Route(m=3, t=2, e=3, neg=2), x_format=x_format, data="normal", dtype="bf16", **given)
    together = run(data, impl="triton")
    # Planes are activated and quantized one after the other.
    assert torch.equal(together, run(data, impl="triton", gemm_type="grouped_masked"))
    monkeypatch.setattr(experts, "moe_activation", None)
    assert torch.equal(together, run(data, impl="triton", gemm_type="grouped_contiguous"))
