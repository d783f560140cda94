"""Known-wrong grouped products are caught, and shrink to small cases; the right ones pass."""

import pytest

from . import cell
from .case import read_case


def run(name, op, label="int4_g128_bf16", examples=60):
    return cell.run(cell.Task(f"conformance.wrong_grouped:{name}", op, label, (None,), "cpu", examples))[0]


# The kernel, the operation, and what the case it shrinks to must fulfil.
WRONG = [
    ("expert_after_empty", "grouped_linear", lambda c: c.route.n <= 2 and c.route.e <= 3 and c.n == 1),
    ("rows_behind_the_last", "grouped_linear", lambda c: c.route.n <= 1 and c.more == 1),
    ("scales_of_the_first", "grouped_linear", lambda c: c.route.n <= 3 and c.route.e <= 3),
    ("tail_dropped", "masked_linear", lambda c: c.route.n <= 4),
    ("remote_as_first", "indexed_linear", lambda c: c.route.n <= 2 and c.route.ranks and not c.ignore),
    ("row_of_slot", "indexed_linear", lambda c: c.route.n <= 4 and c.route.t > 1 and not c.second),
    ("bias_not_weighed", "indexed_linear", lambda c: c.route.n <= 2 and c.bias and c.weights),
    ("rounded_before_the_weight", "indexed_linear", lambda c: c.route.n <= 8 and c.weights),
]


@pytest.mark.parametrize(("name", "op", "small"), WRONG, ids=[f"{row[0]}-{row[1]}" for row in WRONG])
def test_wrong_kernels_are_caught(name, op, small):
    found = run(name, op)
    assert found.status == "fail"
    case = read_case(found.case)
    assert small(case), found.case
    assert cell.run_case(case, f"conformance.wrong_grouped:{name}", (None,), "cpu")[0].status == "fail"
    assert cell.run_case(case, "conformance.wrong_grouped:right", (None,), "cpu")[0].status == "pass"
    assert "admissible" in found.error


@pytest.mark.parametrize("op", ["grouped_linear", "masked_linear", "indexed_linear"])
def test_right_kernels_pass(op):
    for label in ("int4_g128_bf16", "generated"):
        found = run("right", op, label, 25)
        assert (found.status, found.examples) == ("pass", 25), found.error
