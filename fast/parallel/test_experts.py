"""Experts on one rank, and refusals; test_check has several."""

import pytest
import torch

import fast
import ref
from fast.parallel import ExpertParallel, take_experts


def layer(format="int4_g32"):
    g = torch.Generator().manual_seed(3)
    w13, w2 = (ref.quantize(torch.randn(5, n, k, generator=g), format) for n, k in ((32, 40), (24, 16)))
    return torch.randn(9, 40, generator=g).bfloat16(), w13, w2, torch.rand(9, 3, generator=g), torch.randint(-1, 6, (9, 3), generator=g)


@pytest.mark.parametrize("format", ["int4_g32", "nvfp4", "fp8_e4m3_b128x128"])
@pytest.mark.parametrize("placement", ["linear", "round_robin"])
def test_each_rank_has_its_experts(format, placement):
    _, w13, *_ = layer(format)
    bias = torch.arange(5.0)[:, None].expand(5, 32)
    for ranks in (1, 2, 3, 7):
        for rank in range(ranks):
            here = fast.expert_map(5, ranks, rank, placement)
            own = [int((here == i).nonzero()) for i in range(int(here.max()) + 1)]
            assert torch.equal(ref.dequantize(ref.validate(take_experts(w13, here))), ref.dequantize(w13)[own])
            assert torch.equal(take_experts(bias, here), bias[own])
    with pytest.raises(ValueError, match=r"take_experts: the map has shape \(4,\), w has 5 experts \(both must match\)"):
        take_experts(w13, torch.arange(4))


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_rank_alone(alone, dtype, ids_dtype):
    """Bit for bit fused_experts, with empty slots, an id beyond the experts, and a result of another width."""
    x, w13, w2, weights, ids = layer()
    x, ids = x.to(dtype), ids.to(ids_dtype)
    many = ExpertParallel(lambda x, *topk: fast.fused_experts(x, w13, w2, *topk), num_experts=5)
    for rows in (9, 1, 0):
        args = x[:rows], w13, w2, weights[:rows], ids[:rows]
        assert torch.equal(many(args[0], *args[3:]), fast.fused_experts(*args))


def test_layers_that_are_prepared_and_cast(alone):
    """Its own tables are no part of a state, and casts leave them alone."""
    x, w13, w2, weights, ids = layer()
    many = ExpertParallel(fast.FusedExperts(w13, w2, activation="gelu"), num_experts=5).half()
    assert sorted(many.state_dict()) == [f"experts.{name}.{part}" for name in ("w13", "w2") for part in ("packed", "scale")]
    many.experts.prepare()
    assert torch.equal(many(x, weights, ids), fast.fused_experts(x, w13, w2, weights, ids, activation="gelu"))


def test_what_is_sent(alone):
    """A row goes once to a rank, whatever it needs there; and slots that are nobody's do not travel."""
    seen = []

    def local(x, topk_weights, topk_ids):
        seen.append((x, topk_weights, topk_ids))
        return x

    x, ids = torch.arange(6.0).view(3, 2), torch.tensor([[1, 0], [-1, 2], [-1, 7]])
    many = ExpertParallel(local, num_experts=3)
    sizes = []
    exchange = many._exchange
    many._exchange = lambda t, *counts: sizes.append(tuple(t.shape)) or exchange(t, *counts)
    y = many(x, torch.tensor([[0.5, 0.25], [torch.nan, 2.0], [torch.nan, torch.nan]]), ids)
    assert sizes == [(2, 2), (3, 2), (3, 2)]
    ((rows, weights, experts),) = seen
    assert rows.tolist() == [[0, 1], [0, 1], [2, 3]] and weights.tolist() == [[1], [1], [1]] and experts.tolist() == [[1], [0], [2]]
    assert y.tolist() == [[0, 0.75], [4, 6], [0, 0]]


def test_refusals(alone):
    x, w13, w2, weights, ids = layer()
    many = ExpertParallel(lambda x, *topk: x, num_experts=5)
    with pytest.raises(ValueError, match="ExpertParallel: got 0 experts, expected at least 1"):
        ExpertParallel(None, num_experts=0)
    with pytest.raises(ValueError, match="unknown placement 'robin', expected one of linear, round_robin"):
        ExpertParallel(None, num_experts=2, placement="robin")
    whole = fast.FusedExperts(w13, w2, x_format="int8_tensor")
    with pytest.raises(NotImplementedError, match="x_format int8_tensor has one scale for all tokens, and each rank sees some of them"):
        ExpertParallel(whole, num_experts=2)
    with pytest.raises(TypeError, match=r"ExpertParallel: x is torch.float64, expected a float16, bfloat16 or float32 tensor"):
        many(x.double(), weights, ids)
    with pytest.raises(TypeError, match=r"ExpertParallel: topk_ids has dtype torch.float32, expected int32 or int64"):
        many(x, weights, weights)
    with pytest.raises(TypeError, match=r"ExpertParallel: topk_weights are torch.int64, expected floats"):
        many(x, ids, ids)
    for args in ((x[:4], weights, ids), (x, weights[:, :2], ids), (x[0], weights, ids), (x, weights.flatten(), ids.flatten())):
        with pytest.raises(ValueError, match=r"expected \(m, h\), \(m, top_k\) and \(m, top_k\)"):
            many(*args)
    with pytest.raises(ValueError, match="ExpertParallel: x is on meta, the layer on cpu"):
        many(x.to("meta"), weights, ids)
    with pytest.raises(NotImplementedError, match="x requires a gradient, and quantized weights are for inference"):
        many(x.float().requires_grad_(), weights, ids)
