"""Relations hold for ref, for every function; kernels that only a relation catches are caught."""

import pytest
import torch

from . import metamorphic, relations
from .attempt import attempt
from .candidate import Candidate, load
from .case import DequantizeCase, LinearCase, PackCase, UnpackCase
from .declaration import Declaration
from .experts_case import ExpertsCase
from .grouped_case import GroupedLinearCase, IndexedLinearCase, MaskedLinearCase
from .moe_case import MulSumCase, Route
from .ops import operations
from .oracle import Disagreement
from .wrong import Right

ROUTE = Route(m=5, t=3, e=4, cuts=(3, 3, 8), mixed=True, neg=0b100010000000010)
GROUPED = {"route": ROUTE, "n": 5, "k": 32, "format": "int4_g16", "data": "exact", "bias": "fp32", "dtype": "fp32"}
# Cases to which every relation of their function applies, and in which it tells.
CASES = {
    "linear": [
        LinearCase(n=5, k=32, lead=(2, 3), format=name, data="exact", dtype="fp32", bias="fp32", order=order)
        for name, order in (("uint4z_g16", False), ("int4_g16", True), ("nvfp4", False), ("int8", False), ("int4_g32_h16", False))
    ],
    "grouped_linear": [GroupedLinearCase(**GROUPED, more=2)],
    "masked_linear": [MaskedLinearCase(**GROUPED, more=2)],
    "indexed_linear": [IndexedLinearCase(**(GROUPED | {"route": Route(m=5, t=3, e=6, cuts=(3, 3, 8), ranks=2)}), weights="fp32")],
    "moe_fused_mul_sum": [
        MulSumCase(route=ROUTE, k=5, dtype="fp32", data="exact"),
        MulSumCase(route=ROUTE, k=5, dtype="fp32", data="exact", ids=False, seed=1),
    ],
    "fused_experts": [
        ExpertsCase(route=route, h=16, i=8, n=8, format=name, dtype="bf16", data="exact", seed=seed)
        for route in (ROUTE, Route(m=5, t=3, e=6, cuts=(3, 3, 8), ranks=2, neg=2))
        for name, seed in ((None, 0), ("int4_g16", 2))
    ],
    "pack": [PackCase(bits=3, lead=(2, 2), k=7)],
    "unpack": [UnpackCase(bits=3, lead=(2, 2), k=7)],
    "dequantize": [DequantizeCase(n=4, k=32, format="int4_g16", data="exact", experts=2)],
}


def related(case, function, relation, seed=0):
    """(the Related of a case's call by ref, what ref returns for it)."""
    problem = operations()[case.op].build(case, "cpu")
    candidate = load("ref") if hasattr(load("ref").target, function) else load("ref.pack")
    y = candidate.call(function, problem.args, problem.kwargs)
    found = relation(problem.args, problem.kwargs, y, seed)
    return found, None if found is None else candidate.call(function, found.args, found.kwargs)


@pytest.mark.parametrize("function", CASES)
def test_every_relation_holds_for_ref_and_applies(function):
    for relation in metamorphic.RELATIONS[function]:
        applied = told = 0
        for case in CASES[function]:
            for seed in (0, 64, 1024):
                found, got = related(case, function, relation, seed)
                if found is None:
                    continue
                applied += 1
                same = got == found.expected
                if found.judged is not None:
                    same |= ~found.judged[..., None]
                assert bool(same.all()), (relation.__name__, case)
                told += bool(found.expected.any())
        assert applied and told > applied / 2, relation.__name__


class Sums(Right):
    """Sums in float32, of the first half of k and then the second, or the other way about: both well inside the bound."""

    def product(self, a, b, x_format):
        y = torch.zeros(len(a), len(b))
        for row in range(len(a)):
            k = torch.arange(a.shape[1])
            k = k.flip(0) if self.backwards(row, len(a)) else k
            for i in k.tolist():
                y[row] += (a[row, i] * b[:, i]).float()
        return y

    def backwards(self, row, rows):
        return False


class DependsOnTheBatch(Sums):
    def backwards(self, row, rows):
        return row == 0 and rows > 3


class DependsOnTheTile(Sums):
    def backwards(self, row, rows):
        return row % 4 == 3


RANDOM = LinearCase(n=8, k=40, lead=(6,), format="int8", data="normal", dtype="fp32")


def run(target, case, seed, **declared):
    op = operations()[case.op]
    return attempt(Candidate("test", target), op.FUNCTION, op.build(case, "cpu"), None, seed, Declaration(**declared))


@pytest.mark.parametrize("kernel", [DependsOnTheBatch, DependsOnTheTile])
def test_batch_invariance_is_held_to_account(kernel):
    kinds = set()
    for seed in range(0, 64, 8):
        run(Sums(), RANDOM, seed, batch_invariant=True)
        run(kernel(), RANDOM, seed)
        try:
            run(kernel(), RANDOM, seed, batch_invariant=True)
        except Disagreement as error:
            kinds.add(error.kind)
            assert "as batch invariance promises" in str(error) and "y[" in str(error)
    assert kinds and kinds <= {"relation: tokens in another order", "relation: half of the batch"}


class ZeroRowsShift(Right):
    """Wrong where x ends with a zero column, which no case that is drawn need have."""

    def product(self, a, b, x_format):
        return a @ (b if a[:, -1].any() else b.roll(1, 1)).T


class SignLost(Right):
    """Takes the largest number of each row for its sign."""

    def product(self, a, b, x_format):
        return a.abs() @ b.T if a.numel() and float(a.max()) <= 0 else a @ b.T


@pytest.mark.parametrize(
    ("kernel", "seed", "kind"),
    [(ZeroRowsShift(), 24, "relation: zeros behind k"), (SignLost(), 16 + 64, "relation: x times -1.0")],
)
def test_kernels_that_only_a_relation_catches(kernel, seed, kind):
    case = LinearCase(n=5, k=32, lead=(2,), format="uint4z_g16", data="exact", dtype="fp32", seed=10)
    problem = operations()["linear"].build(case, "cpu")
    x = problem.args[0]
    assert bool(x[:, -1].any()) and float(x.min()) >= 0
    run(kernel, case, 1)
    with pytest.raises(Disagreement) as error:
        run(kernel, case, seed)
    assert error.value.kind == kind and "as the first call's result has it" in str(error.value)


def test_relations_that_would_not_be_exact_are_not_asked_for():
    y = torch.tensor([2.0**-14, 1.0], dtype=torch.float16)
    assert relations.result_times(y, 0.5) is None and relations.result_times(y, -1.0) is not None
    x = torch.ones(4, 8)
    for fmt, halves in (("fp8_e4m3_tensor", False), ("fp8_e4m3_token", True), ("int8_b2x4", False)):
        args = x, torch.ones(3, 8), None
        given = {"x_format": fmt}
        assert (relations.batch_split(args, given, None, 0) is not None) == halves
        assert (relations.tokens_reordered(args, given, None, 0) is not None) == (fmt != "int8_b2x4")
        assert relations.scaled(args, given, x, 0) is None
    assert metamorphic.choose("linear", (x[:1], torch.ones(3, 8), None), {}, torch.ones(1, 3), 0, False, True) is None
    assert metamorphic.choose("unknown", (), {}, None, 0, True, False) is None
