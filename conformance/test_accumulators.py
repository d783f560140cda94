"""Bounds hold for emulated adders, in every order."""

import itertools
import math

import pytest
import torch

from . import accumulators as acc
from .emulate import block_sum, ieee_sum, tree_sum

KINDS = ("normal", "positive", "heavy", "cancelling", "subnormal")


def data(kind, k, seed, dtype=torch.bfloat16, m=4, n=5):
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(rows, k, generator=generator, dtype=torch.float64) for rows in (m, n))
    if kind == "positive":
        x, w = x.abs(), w.abs()
    elif kind == "heavy":
        x = torch.ldexp(x, torch.randint(-8, 8, x.shape, generator=generator))
    elif kind == "cancelling":
        half = k // 2
        x[:, half : 2 * half], w[:, half : 2 * half] = -x[:, :half], w[:, :half]
    elif kind == "subnormal":
        small = {torch.float16: 2.0**-20, torch.float8_e4m3fn: 2.0**-8}.get(dtype, 2.0**-130)
        x = torch.where(torch.rand(x.shape, generator=generator) < 0.8, x * small, 0.0)
    return x.to(dtype).double(), w.to(dtype).double()


@pytest.mark.parametrize(("kind", "k"), list(itertools.product(KINDS, (1, 7, 96, 300))))
def test_ieee_sums_in_any_order(kind, k):
    for seed in range(4):
        x, w = data(kind, k, seed)
        y, s = x @ w.T, x.abs() @ w.abs().T
        bound = acc.ieee(torch.tensor(k)) * s + k * 2.0**-53 * s + k * acc.ETA
        orders = (torch.arange(k), torch.arange(k).flip(0), torch.randperm(k, generator=torch.Generator().manual_seed(seed)))
        for got in (*(ieee_sum(x, w, order) for order in orders), tree_sum(x, w)):
            assert bool(((got - y).abs() <= bound).all())


UNITS = [acc.MMA_16, acc.Block(8, 24, 23), acc.Block(4, 23, 23), acc.Block(32, 13, 13), acc.MMA_FP8, acc.Block(16, 25, 23, 64)]
SMALLEST = {torch.float16: 2.0**-14, torch.bfloat16: 2.0**-126, torch.float8_e4m3fn: 2.0**-6}


def operands_of(unit):
    return torch.float16 if unit.kept > 20 else torch.float8_e4m3fn


def orders(k, seed):
    strided = torch.arange(k).view(-1, 4).T.flatten() if k % 4 == 0 else torch.arange(k).flip(0)
    return torch.arange(k), torch.randperm(k, generator=torch.Generator().manual_seed(seed)), strided


def aligned(x, w, smallest):
    """Magnitudes by which a unit aligns its operands."""
    return [torch.where(t != 0, t.abs().clamp(min=smallest), 0.0) for t in (x, w)]


@pytest.mark.parametrize(("kind", "unit"), list(itertools.product(KINDS, UNITS)), ids=str)
def test_block_units_in_any_order(kind, unit):
    """A2 and A4 in every order, A3 in the order that it is told; with subnormal operands, by the magnitudes of their stored exponents."""
    dtype = operands_of(unit)
    smallest = SMALLEST[dtype]
    for seed, k in enumerate((1, 31, 160, 400)):
        x, w = data(kind, k, seed, dtype)
        y, sizes = x @ w.T, aligned(x, w, smallest)
        bound = acc.blocks(torch.tensor(k), unit) * (sizes[0] @ sizes[1].T)
        for order in orders(k, seed):
            error = (block_sum(x, w, unit, order, (smallest, smallest)) - y).abs()
            assert bool((error <= bound).all())
            ordered = acc.running(x[:, order], w[:, order], unit, sizes=[t[:, order] for t in sizes])
            assert bool((error <= ordered).all())


def test_subnormal_operands_leave_a_bound_by_their_own_magnitudes():
    """x is e4m3's smallest number, and aligned as though it were 2^3 times that: 31 products vanish beside one of 2^-6."""
    x, w = torch.full((1, 32), 2.0**-9, dtype=torch.float64), torch.full((1, 32), 2.0**-9, dtype=torch.float64)
    w *= 3
    w[:, 0] = 8.0
    unit = acc.Block(32, 13, 13)
    error = (block_sum(x, w, unit, smallest=(2.0**-6, 2.0**-6)) - x @ w.T).abs().item()
    assert error == 93 * 2.0**-18
    for sizes, holds in ((aligned(x, w, 2.0**-6), True), ((x, w), False)):
        assert (error <= (acc.blocks(torch.tensor(32), unit) * (sizes[0] @ sizes[1].T)).item()) == holds
        assert (error <= acc.running(x, w, unit, sizes=sizes).item()) == holds


@pytest.mark.parametrize("kind", KINDS[:4])
@pytest.mark.parametrize("unit", [acc.MMA_16, acc.Block(32, 13, 13), acc.MMA_FP8], ids=str)
def test_an_ordered_bound_holds_where_kernels_begin_anew(kind, unit):
    """k split at edges of blocks, the parts added in float32, in their order and in pairs; and parts cut by scales."""
    x, w = data(kind, 400, 3, operands_of(unit))
    y = x @ w.T
    for cuts in ((0, 192), (0, 32, 64, 320), tuple(range(0, 400, 32)), tuple(range(0, 400, 100))):
        bound = acc.running(x, w, unit, cuts if cuts[1] == 100 else ())
        parts = [block_sum(x[:, a:b], w[:, a:b], unit) for a, b in zip(cuts, [*cuts[1:], 400], strict=True)]
        total = parts[0]
        for part in parts[1:]:
            total = (total + part).float().double()
        while len(parts) > 1:
            parts = [(a + b).float().double() for a, b in zip(parts[::2], [*parts[1::2], torch.zeros_like(y)], strict=False)]
        assert bool(((total - y).abs() <= bound).all()) and bool(((parts[0] - y).abs() <= bound).all())


def test_the_ordered_bound_is_tighter_on_mixed_signs():
    for unit in UNITS:
        x, w = data("normal", 400, 0, operands_of(unit))
        ordered, loose = acc.running(x, w, unit), acc.blocks(torch.tensor(400), unit) * (x.abs() @ w.abs().T)
        assert bool((ordered < loose / 3).all())


def test_declarations_of_accumulators():
    unit = acc.Block(32, 13, 13, 128, "ascending", True)
    assert acc.parse_accumulator(unit) is unit and acc.parse_accumulator(None) is None and acc.parse_accumulator("mma_16") == acc.MMA_16
    assert acc.parse_accumulator({"length": 32, "kept": 13, "bits": 13, "promote": 128, "order": "ascending", "exact": True}) == unit
    by_kind = acc.parse_accumulator({"fp32": "ieee", "float": {"length": 32, "kept": 13, "bits": 13}})
    assert hash(by_kind) and acc.parse_accumulator(by_kind) == by_kind
    assert acc.accumulator_of(by_kind, "float") == acc.Block(32, 13, 13) and acc.accumulator_of(by_kind, "bf16") is None
    assert acc.accumulator_of("ieee", "bf16") == "ieee"
    places = acc.parse_accumulator({"cuda *_g16* float": "mma_16", "cuda float": "mma_fp8", "cpu": "ieee"})
    for place, wanted in ((("float", "cuda", "fp4_e2m1_g16_e4m3_tensor2"), acc.MMA_16), (("float", "cuda", "fp8_e4m3"), acc.MMA_FP8),
                          (("float", "cpu", "fp8_e4m3"), "ieee"), (("bf16", "cuda", "int8"), None)):  # fmt: skip
        assert acc.accumulator_of(places, *place) == wanted
    for wrong in ("fp64", {}, {"bf16": "fp64"}, {"length": 16}, 3, {"length": 16, "kept": 25, "bits": 23, "exact": True},
                  {"length": 16, "kept": 25, "bits": 23, "promote": 8}, {"length": 16, "kept": 25, "bits": 23, "order": "random"}):  # fmt: skip
        with pytest.raises(ValueError, match="accumulator: "):
            acc.parse_accumulator(wrong)


def test_an_unpromoted_fp8_unit_leaves_the_float32_bound():
    x, w = data("positive", 400, 0, torch.float8_e4m3fn)
    y, s = x @ w.T, x.abs() @ w.abs().T
    error = (block_sum(x, w, acc.Block(32, 13, 13)) - y).abs()
    assert bool((error > acc.ieee(torch.tensor(400)) * s).all())


@pytest.mark.parametrize("unit", [acc.MMA_16, acc.MMA_FP8], ids=str)
def test_within_the_budget_nothing_is_lost(unit):
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-3, 4, (6, 256), generator=generator).double() for _ in range(2))
    s = x.abs() @ w.abs().T
    assert acc.exact(s, torch.ones(()), s if unit.promote else None)
    assert not acc.exact(s * 2**20, torch.ones(()))
    assert torch.equal(block_sum(x, w, unit), x @ w.T)
    assert torch.equal(ieee_sum(x, w, torch.randperm(256)), x @ w.T)


def test_quantum():
    rows = torch.tensor([[0.0, 6.0, -0.75], [0.0, 0.0, 0.0], [2.0**-140 * 3, 1.0, 0.0]], dtype=torch.float64)
    assert acc.quantum(rows).tolist() == [0.25, math.inf, 2.0**-140]
