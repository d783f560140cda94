"""Known-wrong MoE kernels are caught, and shrink to small cases; right ones and declared variants pass."""

import pytest

from . import cell, wrong_moe
from .case import read_case
from .ops import operations


def run(name, op, label="all", examples=200):
    return cell.run(cell.Task(f"conformance.wrong_moe:{name}", op, label, (None,), "cpu", examples))[0]


def least(case):
    """One token, one slot, few experts."""
    return case.route.m * case.route.t <= 2 and case.route.e <= 2


# The kernel, the cell, and what the case it shrinks to must fulfil.
WRONG = [
    ("biased_weights", "fused_topk", "sigmoid", lambda c: c.m == 1 and c.bias and c.e <= 2),
    ("higher_of_equals", "fused_topk", "softmax", lambda c: c.m == 1 and c.e == 2 and c.top_k == 1),
    ("masked_by_zero", "fused_topk", "softmax", lambda c: c.groups >= 2 and c.bias),
    ("padding_routed", "fused_topk", "softmax", lambda c: c.m == c.e == 1 and c.num_valid == 0),
    ("padding_routed", "hash_topk", "all", lambda c: c.m == c.e == 1 and c.num_valid == 0),
    ("table_of_row", "hash_topk", "all", lambda c: c.m == 1 and c.vocabulary <= 5 and c.e <= 3),
    ("last_expert_again", "moe_align_block_size", "all", lambda c: least(c) and c.route.cuts == (0,)),
    ("tail_as_first_expert", "moe_align_block_size", "all", least),
    ("padding_counted", "moe_align_block_size", "all", lambda c: c.block_size == 2 and c.route.n == 2),
    ("empty_slots_counted", "moe_align_block_size", "all", lambda c: least(c) and c.route.neg),
    ("any_order_undeclared", "moe_align_block_size", "all", lambda c: c.route.n <= 2),
    ("padding_counted", "batched_moe_align_block_size", "all", lambda c: c.counts == (0,)),
    ("documented_batches", "batched_moe_align_block_size", "all", lambda c: c.counts == (0,)),
    ("empty_slots_counted", "moe_permute", "all", lambda c: least(c) and c.route.neg),
    ("tail_dropped", "moe_permute", "all", lambda c: 33 <= c.route.n <= 40 and c.k == 1),
    ("stale_gaps", "moe_permute", "all", lambda c: least(c) and c.align > 1 and c.k == 1),
    ("stale_gaps", "moe_scatter_masked", "all", lambda c: least(c) and c.k == 1),
    ("map_forgotten", "moe_scatter_masked", "all", lambda c: c.route.n == 1 and c.route.e <= 3 and c.route.ranks),
    ("rows_of_empty_slots", "moe_unpermute", "all", lambda c: least(c) and c.k == 1),
    ("half_sums", "moe_unpermute", "all", lambda c: c.route.n <= 8 and c.k <= 3),
    ("map_read_backwards", "moe_fused_mul_sum", "all", lambda c: least(c) and c.route.neg and c.route.ranks),
    ("remote_slots_counted", "moe_fused_mul_sum", "all", lambda c: least(c) and c.route.ranks),
    ("rows_left", "moe_fused_mul_sum", "all", lambda c: least(c) and c.k == 1),
    ("half_sums", "moe_fused_mul_sum", "all", lambda c: c.route.n <= 8 and c.k <= 3),
    ("offsets_32", "moe_fused_mul_sum", "all", lambda c: c.layout == "far" and c.route.m <= 3 and c.route.t == 1),
    ("no_saturation", "moe_activation", "all", lambda c: c.n <= 3 and c.m == 1),
    ("limit_before_silu", "moe_activation", "all", lambda c: c.activation == "swiglustep" and c.m == 1),
    ("halves_for_interleaved", "moe_activation", "all", lambda c: c.activation == "swigluoai" and c.n == 2),
    ("gate_rounded_undeclared", "moe_activation", "all", lambda c: c.n <= 20 and c.dtype != "fp32"),
    ("remainder_to_the_last", "expert_map", "all", lambda c: c.e == 1 and c.ranks == 2),
]


@pytest.mark.parametrize(("name", "op", "label", "small"), WRONG, ids=[f"{row[0]}-{row[1]}" for row in WRONG])
def test_wrong_kernels_are_caught(name, op, label, small):
    found = run(name, op, label)
    assert found.status == "fail"
    case = read_case(found.case)
    assert small(case), found.case
    assert cell.run_case(case, f"conformance.wrong_moe:{name}", (None,), "cpu")[0].status == "fail"
    assert cell.run_case(case, "conformance.wrong_moe:right", (None,), "cpu")[0].status == "pass"
    assert "admissible" in found.error or "expected" in found.error


MOE = [name for name in operations() if hasattr(wrong_moe.right, name)]


@pytest.mark.parametrize("op", MOE)
def test_right_kernels_pass(op):
    for label in operations()[op].labels([]):
        found = run("right", op, label, 40)
        assert (found.status, found.examples) == ("pass", 40), found.error


@pytest.mark.parametrize(
    ("name", "op", "variant"), [("gate_rounded", "moe_activation", "gate rounded"), ("any_order", "moe_align_block_size", "any order")]
)
def test_variants_are_accepted_and_named(name, op, variant):
    found = run(name, op, examples=60)
    assert found.status == "pass" and set(found.variants) > {variant}, found.error
