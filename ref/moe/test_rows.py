"""Alignment, permutation and expert maps: definitions written as loops, over structures with every expert empty in turn."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .align import batched_moe_align_block_size, moe_align_block_size
from .expert_map import PLACEMENTS, estimate_local_valid_shape_m, expert_map, get_global_valid_shape_m, local_ids
from .fused_mul_sum import moe_fused_mul_sum
from .permute import moe_permute, moe_scatter_masked, moe_unpermute


@st.composite
def routes(draw):
    """ids (m, t) with empty experts, empty slots and duplicates, the number of experts, a map or None."""
    e, m, t = draw(st.integers(1, 6)), draw(st.integers(0, 9)), draw(st.integers(1, 3))
    legal = draw(st.lists(st.integers(0, e - 1), min_size=1, max_size=e)) + [-1] * draw(st.integers(0, 1))
    ids = torch.tensor(
        draw(st.lists(st.sampled_from(legal), min_size=m * t, max_size=m * t)), dtype=draw(st.sampled_from([torch.int32, torch.int64]))
    )
    ranks = draw(st.integers(1, e + 1))
    mapped = expert_map(e, ranks, draw(st.integers(0, ranks - 1)), draw(st.sampled_from(PLACEMENTS))) if draw(st.booleans()) else None
    return ids.reshape(m, t), e, mapped


@settings(max_examples=300, deadline=None)
@given(routes(), st.integers(1, 5), st.booleans(), st.booleans())
def test_alignment(route, block, pad, ignore):
    ids, e, mapped = route
    got, experts, end = moe_align_block_size(ids, block, e, mapped, pad, ignore)
    n, expected, owners = ids.numel(), [], []
    for expert in range(e):
        local = expert if mapped is None else int(mapped[expert])
        slots = [i for i, v in enumerate(ids.flatten().tolist()) if v == expert and not (ignore and local < 0)]
        blocks = -(-len(slots) // block)
        expected += slots + [n] * (blocks * block - len(slots))
        owners += [local] * blocks
    length = min(n + e * (block - 1), n * block)
    length = -(-length // block) * block if pad else length
    assert end.tolist() == [len(expected)] and end.dtype == got.dtype == experts.dtype == torch.int32
    assert got.tolist() == expected + [n] * (length - len(expected)) and len(expected) <= length
    assert experts.tolist() == owners + [-1] * (-(-length // block) - len(owners))


@given(st.lists(st.integers(0, 7), max_size=5), st.integers(1, 5))
def test_batched_alignment(counts, block):
    got, experts, end = batched_moe_align_block_size(7, block, torch.tensor(counts, dtype=torch.int32))
    rows = {b: [r for r in got[b * block : (b + 1) * block].tolist() if r < 7 * len(counts)] for b in range(len(experts))}
    for expert, count in enumerate(counts):
        mine = [r for b, owner in enumerate(experts.tolist()) if owner == expert for r in rows[b]]
        assert mine == [expert * 7 + j for j in range(count)]
    assert end.item() == sum(-(-c // block) * block for c in counts) and got.numel() == len(counts) * -(-7 // block) * block
    assert all(not rows[b] for b, owner in enumerate(experts.tolist()) if owner < 0)


@settings(max_examples=300, deadline=None)
@given(routes(), st.integers(1, 4), st.sampled_from([torch.int32, torch.int64]))
def test_permutation_and_back(route, align, dtype):
    ids, e, mapped = route
    m, t = ids.shape
    x = torch.arange(1.0, m * 3 + 1).reshape(m, 3)
    rows, offsets, inverse, permuted = moe_permute(x, ids, e, mapped, align=align, offset_dtype=dtype)
    local = local_ids(ids, e, mapped)
    assert offsets.dtype == dtype and offsets[0] == 0 and (offsets % align == 0).all()
    assert offsets[-1] <= len(rows) == len(permuted) == m * t + (align - 1) * (len(offsets) - 1)
    for expert in range(len(offsets) - 1):
        slots = (local.flatten() == expert).nonzero().flatten()
        start = int(offsets[expert])
        assert permuted[start : start + len(slots)].tolist() == slots.tolist()
        assert (permuted[start + len(slots) : int(offsets[expert + 1])] == m * t).all() and int(offsets[expert + 1]) - start - len(
            slots
        ) < align
    for slot in range(m * t):
        row = int(inverse.flatten()[slot])
        assert (row < 0) == (local.flatten()[slot] < 0)
        assert row < 0 or (torch.equal(rows[row], x[slot // t]) and int(permuted[row]) == slot)
    assert not rows[permuted == m * t].any()
    weights = torch.arange(1.0, m * t + 1).reshape(m, t)
    expected = moe_fused_mul_sum(x[:, None].expand(m, t, 3).contiguous(), weights, ids, torch.arange(e) if mapped is None else mapped)
    assert torch.equal(moe_unpermute(rows, weights, inverse), expected)


@settings(max_examples=200, deadline=None)
@given(routes(), st.integers(0, 2))
def test_planes(route, room):
    ids, e, mapped = route
    m = ids.shape[0]
    x = torch.arange(1.0, m * 3 + 1).reshape(m, 3)
    rows, offsets, _, _ = moe_permute(x, ids, e, mapped)
    most = max(offsets.diff().tolist(), default=0)
    planes, counts, inverse = moe_scatter_masked(x, ids, e, most + room, mapped)
    assert counts.tolist() == offsets.diff().tolist() and planes.shape == (len(counts), most + room, 3)
    for expert, count in enumerate(counts.tolist()):
        assert (
            torch.equal(planes[expert, :count], rows[int(offsets[expert]) : int(offsets[expert]) + count])
            and not planes[expert, count:].any()
        )
    flat = planes.reshape(-1, 3)
    for slot, row in enumerate(inverse.flatten().tolist()):
        assert row < 0 or torch.equal(flat[row], x[slot // ids.shape[1]])
    if most:
        with pytest.raises(ValueError, match=f"an expert has {most} rows, and planes hold {most - 1}"):
            moe_scatter_masked(x, ids, e, most - 1, mapped)


@given(st.integers(0, 20), st.integers(1, 6), st.sampled_from(PLACEMENTS))
def test_every_expert_lives_on_one_rank(e, ranks, placement):
    maps = torch.stack([expert_map(e, ranks, rank, placement) for rank in range(ranks)])
    assert ((maps >= 0).sum(0) == 1).all() and maps.dtype == torch.int32
    counts = (maps >= 0).sum(1).tolist()
    assert counts == sorted(counts, reverse=True) and counts[0] - counts[-1] <= 1
    for row in maps:
        assert row[row >= 0].tolist() == list(range(int((row >= 0).sum())))


def test_estimates():
    assert get_global_valid_shape_m(7, 8) == 56 and get_global_valid_shape_m(7, 8, torch.tensor([7, 0, 3])) == 80
    assert [estimate_local_valid_shape_m(80, e, 16) for e in (0, 1, 16)] == [0, 5, 80] and estimate_local_valid_shape_m(81, 1, 16) == 6


BAD = [
    (lambda: moe_align_block_size(torch.tensor([[3]]), 4, 3), ValueError, "topk_ids: reach 3, expected less than 3"),
    (lambda: moe_align_block_size(torch.tensor([[1.0]]), 4, 3), TypeError, "torch.float32, expected an integer tensor"),
    (lambda: moe_align_block_size(torch.tensor([[1]]), 0, 3), ValueError, "block_size=0"),
    (lambda: moe_align_block_size(torch.tensor([[1]]), 4, 3, torch.zeros(2, dtype=torch.int32)), ValueError, r"expected integers \(3,\)"),
    (lambda: moe_align_block_size(torch.tensor([[1]]), 4, 3, torch.tensor([0, 0, -1])), ValueError, "each from 0 to 1 once"),
    (lambda: batched_moe_align_block_size(4, 2, torch.tensor([5])), ValueError, "counts range from 5 to 5, expected 0 to 4"),
    (lambda: moe_permute(torch.ones(2, 3), torch.tensor([[0]]), 1), ValueError, r"x has shape \(2, 3\), topk_ids \(1, 1\)"),
    (
        lambda: moe_permute(torch.ones(1, 3), torch.tensor([[0]]), 1, num_local_experts=2),
        ValueError,
        "num_local_experts=2, and 1 experts live",
    ),
    (lambda: moe_permute(torch.ones(1, 3), torch.tensor([[0]]), 1, offset_dtype=torch.int16), ValueError, "torch.int16"),
    (lambda: moe_unpermute(torch.ones(2, 3), torch.ones(1, 1), torch.tensor([[2]])), ValueError, "reaches 2, expected less than 2 rows"),
    (
        lambda: moe_unpermute(torch.ones(2, 3), torch.ones(1, 2), torch.tensor([[1]])),
        ValueError,
        r"expected \(r, k\), \(m, t\) and \(m, t\)",
    ),
    (lambda: moe_fused_mul_sum(torch.ones(1, 2, 3), torch.ones(1, 3)), ValueError, r"topk_weights \(1, 3\)"),
    (lambda: moe_fused_mul_sum(torch.ones(1, 2, 3), torch.ones(1, 2), None, torch.zeros(1)), ValueError, "expert_map without topk_ids"),
    (lambda: moe_fused_mul_sum(torch.ones(1, 2, 3), torch.ones(1, 2), torch.tensor([[0]])), ValueError, r"topk_ids have shape \(1, 1\)"),
    (lambda: moe_fused_mul_sum(torch.ones(1, 1, 3), torch.ones(1, 1), torch.tensor([[2]]), torch.tensor([0, 1])), ValueError, "reach 2"),
    (lambda: moe_fused_mul_sum(torch.ones(1, 2, 3).long(), torch.ones(1, 2)), TypeError, "torch.int64"),
    (lambda: expert_map(4, 2, 2), ValueError, "rank 2 of 2"),
    (lambda: expert_map(4, 2, 0, "random"), ValueError, "unknown placement 'random'"),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_rows_that_are_not_local_are_not_read():
    inputs = torch.full((2, 2, 3), torch.nan)
    inputs[0, 1] = 2.0
    y = moe_fused_mul_sum(inputs, torch.tensor([[torch.nan, 0.5], [1.0, 1.0]]), torch.tensor([[1, 0], [-1, 2]]), torch.tensor([0, -1, -1]))
    assert y.tolist() == [[1.0] * 3, [0.0] * 3]
