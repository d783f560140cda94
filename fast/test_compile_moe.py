"""The MoE functions under torch.compile, and the operator behind them."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from torch.utils._pytree import tree_leaves

import fast.moe as fast
import ref

from .moe.ops import _CALLS
from .test_linear import normal, same


@pytest.fixture(autouse=True)
def afresh():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, backend=backend)


def layer(x, logits, w13, w2, **given):
    ids, weights = fast.fused_topk(logits, 2)
    return fast.fused_experts(x, w13, w2, weights, ids, **given) * 2


def weights(name=None, e=4):
    plain = normal(e, 32, 64, seed=1) * 0.2, normal(e, 64, 16, seed=2) * 0.2
    return plain if name is None else tuple(ref.quantize(w, name) for w in plain)


def test_a_layer_with_every_kind_of_weight():
    f = compiled(layer)
    q13, q2 = weights("int4_g32")
    prepared = fast.prepare_experts(q13, x_dtype=torch.float32), fast.prepare_experts(q2, x_dtype=torch.float32)
    for w13, w2 in (weights(), (q13, q2), prepared):
        for m in (3, 5):
            x, logits = normal(m, 64), normal(m, 4, seed=m)
            assert same(f(x, logits, w13, w2), layer(x, logits, w13, w2))
    given = {"x_format": "int8_token", "activation": "swigluoai", "limit": 3.0, "expert_map": torch.tensor([1, -1, 0, 2])}
    w13, w2 = weights("mxfp4", 3)
    assert same(f(x, logits, w13, w2, **given), layer(x, logits, w13, w2, **given))
    out = torch.empty(5, 64)
    assert same(compiled(layer)(x, logits, q13, q2, out=out), layer(x, logits, q13, q2)) and same(out * 2, layer(x, logits, q13, q2))


def test_weights_are_told_apart_and_compiled_once():
    counter = torch._dynamo.testing.CompileCounter()
    f, (q13, q2) = compiled(layer, counter), weights("int4_g32")
    x, logits = normal(3, 64), normal(3, 4)
    for w13 in (q13, replace(q13, scale=q13.scale * 3), q13):
        assert same(f(x, logits, w13, q2), layer(x, logits, w13, q2))
    assert counter.frame_count == 1
    one, other = (fast.prepare_experts(w, x_dtype=torch.float32) for w in (q13, replace(q13, scale=q13.scale * 3)))
    for w13 in (one, other, one):
        assert same(f(x, logits, w13, q2), layer(x, logits, w13, q2))


def test_compiled_weights_are_forgotten():
    f, (q13, q2) = compiled(layer), weights("int4_g32")
    f(normal(3, 64), normal(3, 4), q13, q2)
    alive = [weakref.ref(thing) for thing in (q13, q13.packed, q13.scale)]
    del q13
    gc.collect()
    assert [a() for a in alive] == [None] * 3


def test_every_function():
    def every(x, ids, topk_weights, w, logits, table):
        rows, offsets, inverse, order = fast.moe_permute(x, ids, 4, align=2, offset_dtype=torch.int32)
        planes, counts, places = fast.moe_scatter_masked(x, ids, 4, 6)
        order_by, owners, end = fast.moe_align_block_size(ids, 4, 4)
        product = fast.indexed_linear(x, w, order_by, owners, end, 2, block_size=4)
        grouped = fast.grouped_linear(rows, w, offsets)
        return (
            rows, offsets, inverse, order, planes, counts, places, order_by, owners, end, product, grouped, fast.masked_linear(planes, w, counts),
            fast.moe_activation(product, "situ", beta=2.0), fast.silu_and_mul(product), fast.moe_unpermute(grouped, topk_weights, inverse),
            fast.moe_fused_mul_sum(product.view(3, 2, 32), topk_weights, ids), fast.batched_moe_align_block_size(5, 4, counts),
            fast.moe_align_block_size(ids, 4, 4, pad_sorted_ids=True), fast.fused_topk(logits, 3, num_shared_experts=1),
            fast.hash_topk(logits, table, ids[:, 0]), fast.expert_map(5, 2, 1), fast.moe_activation(product, format="int8_token"),
        )  # fmt: skip

    x, ids, logits = normal(3, 64), torch.tensor([[0, 3], [-1, 2], [3, 3]]), normal(3, 4)
    args = (x, ids, normal(3, 2).abs(), weights("int4_g32")[0], logits, torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]]))
    ours, theirs = ([t for t in tree_leaves(f(*args)) if t is not None] for f in (compiled(every), every))
    assert len(ours) == len(theirs) >= 30
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))


def test_refusals_while_tracing():
    x, logits, (w13, w2) = normal(3, 64), normal(3, 4), weights("int4_g32")
    with pytest.raises(Exception, match="unknown impl 'cutlass'"):
        compiled(layer)(x, logits, w13, w2, impl="cutlass")
    with pytest.raises(Exception, match="out is"):
        compiled(layer)(x, logits, w13, w2, out=torch.empty(3, 5))
    with pytest.raises(Exception, match="needs num_local_experts"):
        compiled(lambda x, ids, here: fast.moe_permute(x, ids, 4, here))(x, torch.zeros(3, 1).int(), torch.arange(4))
    with pytest.raises(Exception, match="requires a gradient"), torch.enable_grad():
        compiled(layer)(x.requires_grad_(), logits, w13, w2)


def test_opcheck():
    x, logits, (w13, w2) = normal(3, 64), normal(3, 4), weights("int4_g32")
    compiled(layer)(x, logits, w13, w2, limit=5.75)
    (call,) = (text for text in _CALLS if text.startswith("fused_experts ") and "5.75" in text)
    ids, topk_weights = fast.fused_topk(logits, 2)
    parts = [t for w in (w13, w2) for t in (w.packed, w.scale, w.zero, w.scale_2, w.group_index, w.offset)]
    args = (call, [x, *parts, topk_weights, ids], [*w13.shape, *w2.shape])
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    assert set(torch.library.opcheck(torch.ops.quantref.moe.default, args, test_utils=tests).values()) == {"SUCCESS"}
    assert same(torch.ops.quantref.moe(*args)[0] * 2, layer(x, logits, w13, w2, limit=5.75))
