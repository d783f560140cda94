"""Grouped products, activations and the whole layer: each layout gives what single calls of linear give, ranks sum to the whole."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ref import dequantize, linear, quantize, quantize_input
from ref.combine import take_expert
from ref.rounding import round_to

from .activation import moe_activation, silu_and_mul
from .align import moe_align_block_size
from .check import ACTIVATIONS
from .expert_map import PLACEMENTS, expert_map
from .experts import fused_experts, fused_experts_variant
from .fused_mul_sum import moe_fused_mul_sum
from .grouped_linear import grouped_linear, indexed_linear, masked_linear
from .permute import moe_permute, moe_scatter_masked
from .test_rows import routes


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    routes(),
    st.sampled_from(["plain", "int4_g16", "nvfp4", "uint4z_g16"]),
    st.sampled_from([None, "int8_token"]),
    st.booleans(),
    st.integers(1, 4),
)
def test_three_layouts_of_one_product(route, form, x_format, biased, block):
    """Each slot's row through its expert, by linear, by blocks, by neighbours and by planes."""
    ids, e, mapped = route
    m, t = ids.shape
    x, experts = normal(m, 32, dtype=torch.bfloat16), e if mapped is None else int((mapped >= 0).sum())
    w = normal(experts, 6, 32, seed=1)
    w = w if form == "plain" else quantize(w, form)
    bias = normal(experts, 6, seed=2) if biased else None
    given = {"x_format": x_format}
    local = (ids if mapped is None else torch.where(ids < 0, -1, mapped[ids.clamp(min=0).long()])).long()
    expected = torch.zeros(m * t, 6, dtype=x.dtype)
    for slot, expert in enumerate(local.flatten().tolist()):
        if expert >= 0:
            one = w[expert] if form == "plain" else take_expert(w, expert)
            expected[slot] = linear(x[slot // t], one, None if bias is None else bias[expert], **given)
    aligned = moe_align_block_size(ids, block, e, mapped, True, False)
    assert torch.equal(indexed_linear(x, w, *aligned, t, bias, **given), expected)
    rows, offsets, inverse, _ = moe_permute(x, ids, e, mapped, align=block)
    y = grouped_linear(rows, w, offsets, bias, **given)
    here = inverse.flatten() >= 0
    assert torch.equal(y[inverse.flatten()[here].long()], expected[here])
    planes, counts, inverse = moe_scatter_masked(x, ids, e, max(offsets.diff().tolist(), default=0), mapped)
    planes = planes.masked_fill((torch.arange(planes.shape[1]) >= counts[:, None])[..., None], torch.nan)
    y = masked_linear(planes, w, counts, bias, **given)
    assert torch.equal(y.reshape(-1, 6)[inverse.flatten()[here].long()], expected[here]) and y.isfinite().all()
    weights = normal(m * t, seed=3)
    weighed = indexed_linear(x, w, *aligned, t, bias, topk_weights=weights, **given)
    exact = indexed_linear(x.double(), w, *aligned, t, bias) if x_format is None else None
    assert exact is None or torch.equal(weighed, round_to(exact * weights.double()[:, None], x.dtype))


def scalar(activation, g, u, p):
    """Each activation as a formula of two numbers."""
    s = 1 / (1 + math.exp(-g))
    if activation == "silu":
        g, u = (min(g, p["limit"]), max(min(u, p["limit"]), -p["limit"])) if "limit" in p else (g, u)
        return g / (1 + math.exp(-g)) * u
    if activation == "swiglustep":
        limit = p.get("limit", 7.0)
        return min(g * s, limit) * max(min(u, limit), -limit)
    if activation.startswith("swigluoai"):
        limit, alpha, beta = p.get("limit", 7.0), p.get("alpha", 1.702), p.get("beta", 1.0)
        g, u = min(g, limit), max(min(u, limit), -limit)
        return g / (1 + math.exp(-alpha * g)) * (u + beta)
    if activation == "situ":
        up = u if "up_beta" not in p else p["up_beta"] * math.tanh(u / p["up_beta"])
        return p["beta"] * math.tanh(g / p["beta"]) * s * up
    base = {
        "silu": lambda: g * s,
        "gelu": lambda: 0.5 * g * math.erfc(-g / math.sqrt(2)),
        "gelu_tanh": lambda: 0.5 * g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))),
        "relu2": lambda: max(g, 0.0) ** 2,
    }[activation.removesuffix("_no_mul")]()
    return base if activation.endswith("_no_mul") else base * u


PARAMETERS = {
    "silu": [{}, {"limit": 1.5}],
    "swigluoai": [{}, {"limit": 1.0, "alpha": 2.0, "beta": 0.5}],
    "swigluoai_uninterleave": [{"limit": 7.0}, {"limit": 1.0, "alpha": 1.0, "beta": 0.0}],
    "swiglustep": [{}, {"limit": 1.0}],
    "situ": [{"beta": 2.0}, {"beta": 1.0, "up_beta": 3.0}],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype):
    for parameters in PARAMETERS.get(activation, [{}]):
        x = (normal(4, 32, dtype=torch.float64) * 4).to(dtype)
        got = moe_activation(x, activation, **parameters)
        chosen = ACTIVATIONS[activation]
        gate, up = (x[:, 0::2], x[:, 1::2]) if chosen.interleaved else x.chunk(2, 1) if chosen.gated else (x, x)
        expected = [scalar(activation, g, u, parameters) for g, u in zip(gate.flatten().tolist(), up.flatten().tolist(), strict=True)]
        expected = torch.tensor(expected, dtype=torch.float64).reshape(gate.shape)
        # 1 + erf cancels for gates far below zero: 2^-53 of the gate, not of the result.
        slack = 2.0**-50 * (expected.abs() + (gate.double() * up.double()).abs() + gate.double().abs())
        low, high = (round_to(expected + sign * slack, dtype) for sign in (-1, 1))
        assert got.dtype == dtype and ((low <= got) & (got <= high)).all(), (activation, parameters)


def test_an_activation_may_be_quantized_without_a_rounding_between():
    x = normal(5, 64, dtype=torch.bfloat16)
    q = moe_activation(x, "silu", format="int8_token")
    assert torch.equal(q.packed, quantize_input(moe_activation(x.double(), "silu"), "int8_token").packed)
    assert torch.equal(silu_and_mul(x), moe_activation(x))


@st.composite
def layers(draw):
    """x, w13, w2, weights, ids of a small layer, and how many experts there are."""
    e, t, m = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.sampled_from([0, 1, 2, 7]))
    ids = torch.tensor(draw(st.lists(st.integers(-1, e - 1), min_size=m * t, max_size=m * t)), dtype=torch.int32).reshape(m, t)
    form = draw(st.sampled_from(["plain", "int4_g16", "mxfp4"]))
    w13, w2 = normal(e, 2 * 32, 32, seed=1), normal(e, 32, 32, seed=2)
    weights = normal(m, t, seed=3)
    return normal(m, 32, dtype=torch.bfloat16), *((w13, w2) if form == "plain" else (quantize(w13, form), quantize(w2, form))), weights, ids


@settings(max_examples=60, deadline=None)
@given(layers(), st.sampled_from([None, "fp8_e4m3_token"]))
def test_the_layer_is_its_stages(layer, x_format):
    """Variant "stored" is the chain of the public operations, and "exact" rounds nowhere but at the end."""
    x, w13, w2, weights, ids = layer
    m, t = ids.shape
    aligned = moe_align_block_size(ids, 2, w13.shape[0])
    hidden = moe_activation(indexed_linear(x, w13, *aligned, t, x_format=x_format))
    # Slots without an expert stay out of a dynamic scale: their rows are zeros.
    down = indexed_linear(hidden, w2, *aligned, 1, x_format=x_format)
    expected = moe_fused_mul_sum(down.view(m, t, w2.shape[1]), weights, ids)
    assert torch.equal(fused_experts_variant(x, w13, w2, weights, ids, variant="stored", x_format=x_format), expected)
    if x_format is None:
        assert torch.equal(fused_experts(x, w13, w2, weights, ids), round_to(fused_experts(x.double(), w13, w2, weights, ids), x.dtype))


@settings(max_examples=60, deadline=None)
@given(layers(), st.integers(1, 6), st.sampled_from(PLACEMENTS))
def test_the_ranks_sum_to_the_whole(layer, ranks, placement):
    """In float64, up to the order of t additions; every rank holds its own experts only."""
    x, w13, w2, weights, ids = layer
    a, b = (w.double() if isinstance(w, torch.Tensor) else dequantize(w) for w in (w13, w2))
    whole = fused_experts(x.double(), a, b, weights, ids)
    total, size = torch.zeros_like(whole), torch.zeros_like(whole)
    for rank in range(ranks):
        mapped = expert_map(a.shape[0], ranks, rank, placement)
        local = torch.zeros(int((mapped >= 0).sum()), dtype=torch.long)
        local[mapped[mapped >= 0].long()] = (mapped >= 0).nonzero().flatten()
        part = fused_experts(x.double(), a[local], b[local], weights, ids, expert_map=mapped)
        total, size = total + part, size + part.abs()
    assert ((total - whole).abs() <= 8 * 2.0**-53 * (size + whole.abs() + _magnitude(x, a, b, weights, ids))).all()


def _magnitude(x, a, b, weights, ids):
    """sum |weight| |down| of each output: what the order of the additions can change is counted from it."""
    total = torch.zeros(x.shape[0], b.shape[1], dtype=torch.float64)
    for slot in range(ids.shape[1]):
        total += (
            fused_experts(x.double(), a, b, torch.ones(len(x), 1), ids[:, slot : slot + 1]).abs() * weights[:, slot, None].double().abs()
        )
    return total


def test_weights_on_the_input():
    x, w13, w2 = normal(3, 16, dtype=torch.bfloat16), normal(2, 32, 16, seed=1), normal(2, 16, 16, seed=2)
    weights, ids = torch.tensor([[0.3], [0.5], [1.0]]), torch.tensor([[0], [1], [0]])
    got = fused_experts(x, w13, w2, weights, ids, apply_router_weight_on_input=True)
    assert torch.equal(got, fused_experts((x * weights).to(torch.bfloat16), w13, w2, torch.ones(3, 1), ids))


X, W13, W2 = torch.ones(3, 16), torch.ones(2, 32, 16), torch.ones(2, 16, 16)
ONES, IDS = torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int32)
BAD = [
    ((X, W13, W2, ONES, IDS + 2), {}, ValueError, "topk_ids: reach 2, expected less than 2"),
    ((X, W13, W2, ONES, IDS + 5), {"expert_map": torch.tensor([0, -1, 1])}, ValueError, "reach 5, expected less than 3"),
    (
        (X, W13[:1], W2[:1], ONES, IDS + 1),
        {"expert_map": torch.tensor([0, 1])},
        ValueError,
        "expert_map reaches 1, and there are 1 experts",
    ),
    ((X, W13, W2[:1], ONES, IDS), {}, ValueError, "w13 has 2 experts, w2 has 1"),
    ((X, W13, W2[..., :8], ONES, IDS), {}, ValueError, "k=16, weight has k=8"),
    ((X[:, :8], W13, W2, ONES, IDS), {}, ValueError, "x has k=8"),
    ((X, W13, W2, ONES[:2], IDS), {}, ValueError, r"expected \(3, top_k\)"),
    ((X, W13, W2, torch.ones(3, 2), IDS.expand(3, 2)), {"apply_router_weight_on_input": True}, ValueError, "needs top_k = 1, got 2"),
    ((X, W13, W2, ONES, IDS), {"activation": "swish"}, ValueError, "unknown activation 'swish'"),
    ((X, W13, W2, ONES, IDS), {"activation": "situ"}, ValueError, "situ needs beta"),
    ((X, W13, W2, ONES, IDS), {"activation": "gelu", "limit": 1.0}, ValueError, "gelu has no parameter limit"),
    ((X, W13, W2, ONES, IDS), {"bias13": torch.ones(2, 16)}, ValueError, r"bias has shape \(2, 16\), expected \(2, 32\)"),
    ((X, W13[:, :31], W2, ONES, IDS), {}, ValueError, "even number of columns"),
    ((X, W13[0], W2, ONES, IDS), {}, ValueError, r"expected \(experts, n, k\)"),
]


@pytest.mark.parametrize("args, kwargs, error, message", BAD)
def test_refusals(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        fused_experts(*args, **kwargs)


def test_refusals_of_layouts():
    with pytest.raises(ValueError, match="offsets are"):
        grouped_linear(X, W2, torch.tensor([0, 4, 2]))
    with pytest.raises(ValueError, match=r"counts are \[4, 0\], expected 2 from 0 to 3"):
        masked_linear(torch.ones(2, 3, 16), W2, torch.tensor([4, 0]))
    with pytest.raises(ValueError, match="expert_ids reach 2, expected less than 2"):
        indexed_linear(X, W2, torch.zeros(4, dtype=torch.int32), torch.tensor([2]), torch.tensor([4]), 1)
