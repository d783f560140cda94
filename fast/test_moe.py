"""The MoE operations around the products: refusals, ids out of range, out=, strides, and what must hold between calls. Results: see conformance."""

import importlib.util
import re
from types import SimpleNamespace

import pytest
import torch

import fast
import ref
from ref.moe.check import ACTIVATIONS

IMPLS = ("torch", "triton")
X = torch.arange(24.0).view(4, 6).bfloat16()
IDS = torch.tensor([[0, 2], [-1, 1], [2, 2], [1, 0]], dtype=torch.int32)
W = torch.tensor([[0.5, 0.25], [1.0, 0.5], [0.25, 0.25], [0.75, 0.5]])
ROWS = torch.stack((X, X.flip(0)), 1)
LOGITS = torch.tensor([[0.0, 2.0, 1.0, 2.0], [1.0, -1.0, 3.0, 0.0]])
MAP = torch.tensor([1, -1, 0], dtype=torch.int32)
TABLE, TOKENS = torch.tensor([[0, 1], [3, 2]]), torch.tensor([1, 0])


def same(a, b):
    a, b = (r if isinstance(r, tuple) else (r,) for r in (a, b))
    return all(torch.equal(p, q) and p.dtype == q.dtype for p, q in zip(a, b, strict=True))


def topk(**given):
    return fast.fused_topk(LOGITS, **{"top_k": 2} | given)


def mul_sum(**given):
    return fast.moe_fused_mul_sum(**{"inputs": ROWS, "topk_weights": W, "topk_ids": IDS} | given)


def align(**given):
    return fast.moe_align_block_size(**{"topk_ids": IDS, "block_size": 2, "num_experts": 3} | given)


def permute(**given):
    return fast.moe_permute(**{"x": X, "topk_ids": IDS, "num_experts": 3} | given)


def unpermute(**given):
    return fast.moe_unpermute(**{"rows": X, "topk_weights": W, "inv_permuted_idx": IDS} | given)


def scatter(**given):
    return fast.moe_scatter_masked(**{"x": X, "topk_ids": IDS, "num_experts": 3, "max_tokens": 4} | given)


def hashed(**given):
    return fast.hash_topk(**{"logits": LOGITS, "table": TABLE, "tokens": TOKENS} | given)


def act(*args, **given):
    return fast.moe_activation(X, *args, **given)


META = {"device": "meta"}
REFUSED = [
    (topk, {"top_k": 5}, ValueError, "got top_k=5, expected 1 to 4"),
    (topk, {"scoring_func": "softplus"}, ValueError, "unknown scoring_func 'softplus'"),
    (topk, {"renormalize": "mean"}, ValueError, "renormalize='mean'"),
    (topk, {"correction_bias": torch.zeros(3)}, ValueError, "correction_bias has shape (3,), expected (4,)"),
    (topk, {"correction_bias": torch.zeros(4, **META)}, ValueError, "correction_bias is on meta"),
    (topk, {"num_expert_group": 2}, ValueError, "expected both or neither"),
    (topk, {"num_expert_group": 3, "topk_group": 1}, ValueError, "4 experts do not form 3 groups"),
    (topk, {"num_expert_group": 2, "topk_group": 1, "top_k": 3}, ValueError, "expected 1 to 2"),
    (topk, {"num_valid": 3}, ValueError, "num_valid=3 of 2 rows"),
    (hashed, {"tokens": TOKENS[:1]}, ValueError, "tokens (1,)"),
    (hashed, {"table": TABLE.double()}, TypeError, "table has dtype torch.float64"),
    (align, {"block_size": 0}, ValueError, "got block_size=0, expected at least 1"),
    (align, {"topk_ids": W}, TypeError, "topk_ids has dtype torch.float32, expected int32 or int64"),
    (align, {"expert_map": MAP[:2]}, ValueError, "expert_map has shape (2,), expected (3,)"),
    (align, {"expert_map": MAP.to("meta")}, ValueError, "expert_map is on meta"),
    (permute, {"topk_ids": IDS[:3]}, ValueError, "x has shape (4, 6), topk_ids (3, 2)"),
    (permute, {"offset_dtype": torch.int16}, ValueError, "offset_dtype=torch.int16"),
    (permute, {"align": 0}, ValueError, "align=0"),
    (permute, {"num_local_experts": 2}, ValueError, "num_local_experts=2 without expert_map, and there are 3 experts"),
    (permute, {"expert_map": MAP[:2]}, ValueError, "expert_map has shape (2,), expected (3,)"),
    (unpermute, {"topk_weights": W[:3]}, ValueError, "topk_weights (3, 2)"),
    (unpermute, {"rows": X.double()}, TypeError, "rows are torch.float64"),
    (unpermute, {"inv_permuted_idx": W}, TypeError, "inv_permuted_idx has dtype torch.float32"),
    (unpermute, {"out": X[:3]}, ValueError, "moe_unpermute: out has shape (3, 6)"),
    (scatter, {"topk_ids": IDS.to("meta")}, ValueError, "topk_ids is on meta"),
    (mul_sum, {"topk_weights": W[:3]}, ValueError, "topk_weights (3, 2), expected (m, t, k) and (m, t)"),
    (mul_sum, {"inputs": ROWS.double()}, TypeError, "inputs are torch.float64"),
    (mul_sum, {"topk_ids": None, "expert_map": MAP}, ValueError, "expert_map without topk_ids"),
    (mul_sum, {"topk_ids": W}, TypeError, "topk_ids has dtype torch.float32"),
    (mul_sum, {"expert_map": MAP[None]}, ValueError, "expert_map has shape (1, 3), expected (experts,)"),
    (mul_sum, {"topk_weights": W.to("meta")}, ValueError, "topk_weights on meta"),
    (mul_sum, {"out": torch.empty(4, 6)}, ValueError, "moe_fused_mul_sum: out has shape (4, 6) and dtype torch.float32"),
    (act, {"activation": "swish"}, ValueError, "unknown activation 'swish'"),
    (act, {"activation": "situ"}, ValueError, "situ needs beta"),
    (act, {"activation": "gelu", "limit": 1.0}, ValueError, "gelu has no parameter limit"),
    (act, {"out": torch.empty(4, 3)}, ValueError, "out"),
    (fast.silu_and_mul, {"x": X[:, :5]}, ValueError, "an even number of columns"),
    (fast.expert_map, {"num_experts": 4, "ranks": 2, "rank": 2}, ValueError, "got rank 2 of 2"),
    (fast.expert_map, {"num_experts": 4, "ranks": 2, "rank": 1, "placement": "spread"}, ValueError, "unknown placement 'spread'"),
]


@pytest.mark.parametrize(("call", "given", "error", "says"), REFUSED, ids=[f"{r[0].__name__}-{'-'.join(r[1])}" for r in REFUSED])
def test_refusals(call, given, error, says):
    with pytest.raises(error) as refused:
        call(**given)
    assert says in str(refused.value), refused.value


@pytest.mark.parametrize("call", [topk, hashed, align, permute, unpermute, scatter, mul_sum, act])
def test_a_named_implementation_never_falls_back(call, monkeypatch):
    with pytest.raises(ValueError, match="unknown impl 'cuda', expected one of triton, torch"):
        call(impl="cuda")
    with pytest.raises(NotImplementedError, match="there is no impl 'humming' of it; impl 'triton' can"):
        call(impl="humming")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match="triton is not installed; impl 'torch' can"):
        call(impl="triton")
    call()


def test_what_triton_cannot():
    with pytest.raises(NotImplementedError, match="impl 'triton' takes at most 4096 experts, got 4097; impl 'torch' takes any number"):
        fast.fused_topk(torch.zeros(1, 4097), 1, impl="triton")
    with pytest.raises(NotImplementedError, match="there is no impl 'triton' of it; impl 'torch' can"):
        fast.batched_moe_align_block_size(4, 2, torch.tensor([1]), impl="triton")


FAR = [3, 1000, 2**31 - 1]
STRAY = [
    (align, "topk_ids"),
    (permute, "topk_ids"),
    (scatter, "topk_ids"),
    (lambda **given: mul_sum(expert_map=MAP, **given), "topk_ids"),
    (lambda **given: align(expert_map=MAP, ignore_invalid_experts=True, **given), "topk_ids"),
    (lambda **given: permute(expert_map=MAP, num_local_experts=2, **given), "topk_ids"),
    (lambda **given: unpermute(rows=X[:3], **given), "inv_permuted_idx"),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("call", "name"), STRAY)
def test_ids_out_of_range_are_empty_slots(call, name, impl, monkeypatch):
    for value in FAR:
        for integer in (torch.int32, torch.int64):
            stray, empty = IDS.to(integer, copy=True), IDS.to(integer, copy=True)
            stray[0, 1] = stray[3, 0] = value if integer == torch.int32 else value + 2**40 * (value > 3)
            empty[0, 1] = empty[3, 0] = -1
            assert same(call(impl=impl, **{name: stray}), call(impl=impl, **{name: empty}))
    monkeypatch.setenv("FAST_DEBUG", "1")
    with pytest.raises(ValueError, match=r"reach \d+, expected less than 3"):
        call(impl=impl, **{name: stray})
    call(impl=impl, **{name: empty})


@pytest.mark.parametrize("impl", IMPLS)
def test_other_data_out_of_range(impl, monkeypatch):
    wrong_map = torch.tensor([1, 7, 2**31 - 1], dtype=torch.int32)
    right_map = torch.tensor([1, -1, -1], dtype=torch.int32)
    for call in (permute, scatter):
        a, b = (call(expert_map=m, num_local_experts=2, impl=impl) for m in (wrong_map, right_map))
        assert same(a, b)
    for renormalize in (False, True):
        stray = hashed(tokens=torch.tensor([2, -1]), renormalize=renormalize, impl=impl)
        assert same(stray, (torch.full((2, 2), -1, dtype=torch.int32), torch.zeros(2, 2)))
    ids, weights = hashed(table=torch.tensor([[0, 1], [3, 4]]), renormalize=False, impl=impl)
    assert ids.tolist() == [[3, -1], [0, 1]] and weights[0, 1] == 0
    rows, counts, places = scatter(max_tokens=1, impl=impl)
    assert rows.shape == (3, 1, 6) and counts.tolist() == [1, 1, 1] and places.tolist() == [[0, 2], [-1, 1], [-1, -1], [-1, -1]]
    assert fast.batched_moe_align_block_size(2, 2, torch.tensor([5, -1]))[2].item() == 2
    monkeypatch.setenv("FAST_DEBUG", "1")
    for call, given in (
        (scatter, {"max_tokens": 1}),
        (hashed, {"tokens": torch.tensor([2, 0])}),
        (hashed, {"table": torch.tensor([[0, 1], [3, 4]])}),
        (fast.batched_moe_align_block_size, {"max_tokens": 2, "block_size": 2, "counts": torch.tensor([5, 1])}),
    ):
        with pytest.raises(ValueError, match="expected less than"):
            call(**given)


@pytest.mark.parametrize("impl", IMPLS)
def test_out(impl):
    for call, shape in ((mul_sum, (4, 6)), (unpermute, (4, 6)), (act, (4, 3)), (lambda **given: fast.silu_and_mul(X, **given), (4, 3))):
        out = torch.full(shape, torch.nan).bfloat16()
        assert call(impl=impl, out=out) is out and same(out, call(impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_ids_weights_and_maps(impl):
    def spread(t):
        return torch.stack((t, torch.full_like(t, 99)), -1)[..., 0].T.contiguous().T

    for call, given in (
        (align, {"topk_ids": IDS, "expert_map": MAP}),
        (permute, {"topk_ids": IDS, "expert_map": MAP}),
        (scatter, {"topk_ids": IDS, "expert_map": MAP}),
        (mul_sum, {"topk_ids": IDS, "topk_weights": W, "expert_map": MAP}),
        (unpermute, {"inv_permuted_idx": IDS, "topk_weights": W}),
        (hashed, {"table": TABLE, "tokens": TOKENS}),
    ):
        apart = {name: spread(t) if t.dim() == 2 else torch.stack((t, t + 50), 1)[:, 0] for name, t in given.items()}
        assert same(call(impl=impl, **given), call(impl=impl, **apart))


@pytest.mark.parametrize("impl", IMPLS)
def test_tokens_in_another_order_and_in_parts(impl):
    order = torch.tensor([2, 0, 3, 1])
    y = mul_sum(expert_map=MAP, impl=impl)
    moved = mul_sum(inputs=ROWS[order], topk_weights=W[order], topk_ids=IDS[order], expert_map=MAP, impl=impl)
    assert same(moved, y[order])
    parts = [mul_sum(inputs=ROWS[p], topk_weights=W[p], topk_ids=IDS[p], expert_map=MAP, impl=impl) for p in (slice(0, 1), slice(1, 4))]
    assert same(torch.cat(parts), y)
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    for given in ({}, {"scoring_func": "sigmoid", "num_expert_group": 3, "topk_group": 2}):
        whole = fast.fused_topk(logits, 3, impl=impl, **given)
        assert same(fast.fused_topk(logits[order], 3, impl=impl, **given), tuple(t[order] for t in whole))
        assert same(tuple(fast.fused_topk(logits[i : i + 1], 3, impl=impl, **given) for i in range(4))[1], tuple(t[1:2] for t in whole))
    for activation in ("silu", "gelu"):
        assert same(fast.moe_activation(X[order], activation, impl=impl), fast.moe_activation(X, activation, impl=impl)[order])


@pytest.mark.parametrize("impl", IMPLS)
def test_experts_by_other_numbers(impl):
    name = torch.tensor([2, 0, 1])  # expert i is called name[i] now
    ids = torch.where(IDS < 0, -1, name[IDS.long().clamp(min=0)]).to(torch.int32)
    mapped = torch.empty_like(MAP)
    mapped[name] = MAP
    assert same(mul_sum(topk_ids=ids, expert_map=mapped, impl=impl), mul_sum(expert_map=MAP, impl=impl))
    # Alignment with the local order as it was: only the numbers before the map are new.
    assert same(
        align(topk_ids=ids, expert_map=mapped, ignore_invalid_experts=True, impl=impl),
        align(expert_map=MAP, ignore_invalid_experts=True, impl=impl),
    )
    assert same(permute(topk_ids=ids, expert_map=mapped, impl=impl), permute(expert_map=MAP, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_slots_and_duplicates(impl):
    # A slot of weight 0 is as good as an empty one, and two slots of one row as one of both weights: sums here are exact.
    zero = W.clone()
    zero[IDS == 2] = 0
    assert same(mul_sum(topk_weights=zero, impl=impl), mul_sum(topk_ids=torch.where(IDS == 2, -1, IDS), impl=impl))
    twice = torch.stack((X, X), 1)
    joined = mul_sum(inputs=X[:, None], topk_weights=W.sum(1, keepdim=True), topk_ids=IDS[:, :1] * 0, impl=impl)
    assert same(mul_sum(inputs=twice, topk_ids=IDS * 0, impl=impl), joined)
    # There and back: each token's row times the weights of its slots.
    rows, _, inverse, _ = permute(impl=impl)
    back = fast.moe_unpermute(rows, W, inverse, impl=impl)
    assert same(back, (X.float() * torch.where(IDS < 0, 0, W).sum(1, keepdim=True)).bfloat16())


def test_sum_over_ranks():
    for ranks in (1, 2, 4):
        for placement in ("linear", "round_robin"):
            maps = [fast.expert_map(3, ranks, rank, placement) for rank in range(ranks)]
            assert same(torch.stack([m >= 0 for m in maps]).sum(0), torch.ones(3, dtype=torch.long))
            y = sum(mul_sum(expert_map=m).float() for m in maps)
            assert same(y.bfloat16(), mul_sum())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nothing_of_no_rows(activation):
    given = {"beta": 1.0} if activation == "situ" else {"limit": 1.0} if activation == "swigluoai_uninterleave" else {}
    for impl in IMPLS:
        assert fast.moe_activation(X[:0], activation, impl=impl, **given).shape[0] == 0


def test_rows_to_expect():
    for m, top_k, tokens in ((5, 2, None), (5, 8, [5, 0, 7])):
        assert fast.get_global_valid_shape_m(m, top_k, tokens) == ref.get_global_valid_shape_m(m, top_k, tokens)
    for rows in (0, 1, 7, 64):
        for local, everywhere in ((1, 1), (3, 8), (8, 8)):
            assert fast.estimate_local_valid_shape_m(rows, local, everywhere) == ref.estimate_local_valid_shape_m(rows, local, everywhere)


@pytest.mark.parametrize(
    ("backend", "arch", "dtype"), [("cuda", 75, "fp16"), ("cuda", 80, "bf16"), ("cuda", 90, "bf16"), ("hip", "gfx942", "bf16")]
)
def test_the_weighted_sum_compiles_for(backend, arch, dtype, monkeypatch):
    """Ahead of time, with 16 bytes a thread and load: rows of 7168 columns lie at multiples of 16 bytes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from fast.triton import moe_sum

    monkeypatch.setattr(moe_sum, "interprets", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: divmod(arch, 10) if backend == "cuda" else (9, 4))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(multi_processor_count=1))
    monkeypatch.setattr(torch.version, "hip", None if backend == "cuda" else "6.4")
    launched = []
    monkeypatch.setattr(moe_sum, "_launch", lambda kind, grid, args, constants, options: launched.append((args, constants, options)))
    inputs = torch.empty(2, 8, 7168, dtype=torch.float16 if dtype == "fp16" else torch.bfloat16)
    fast.moe_fused_mul_sum(
        inputs, torch.ones(2, 8), torch.zeros(2, 8, dtype=torch.int32), torch.zeros(16, dtype=torch.int32), impl="triton"
    )
    [(args, constants, options)] = launched
    kinds = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}
    names = moe_sum.moe_sum_kernel.arg_names
    signature = {name: kinds[a.dtype] if isinstance(a, torch.Tensor) else "i32" for name, a in zip(names, args, strict=False)}
    signature |= dict.fromkeys(constants, "constexpr")
    whole = {
        (i,): [["tt.divisibility", 16]] for i, a in enumerate(args) if isinstance(a, torch.Tensor) or (names[i] != "m" and a % 16 == 0)
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(moe_sum.moe_sum_kernel, signature, values, whole)
    target = GPUTarget(backend, arch, 32 if backend == "cuda" else 64)
    compiled = compile(source, target=target, options=options | {"enable_fp_fusion": True})
    text = compiled.asm["ptx" if backend == "cuda" else "amdgcn"]
    assert len(re.findall(r"ld\.global\S*\.v4|load_dwordx4", text)) >= 8
