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
        x = torch.where(torch.rand(x.shape, generator=generator) < 0.5, x * 2.0**-16, x)
    return x.to(dtype).double(), w.to(dtype).double()


@pytest.mark.parametrize(("kind", "k"), list(itertools.product(KINDS, (1, 7, 96, 300))))
def test_ieee_sums_in_any_order(kind, k):
    for seed in range(4):
        x, w = data(kind, k, seed)
        y, s = x @ w.T, x.abs() @ w.abs().T
        bound = acc.ieee(torch.tensor(k)) * s + k * 2.0**-53 * s
        orders = (torch.arange(k), torch.arange(k).flip(0), torch.randperm(k, generator=torch.Generator().manual_seed(seed)))
        for got in (*(ieee_sum(x, w, order) for order in orders), tree_sum(x, w)):
            assert bool(((got - y).abs() <= bound).all())


UNITS = [acc.MMA_16, acc.Block(8, 24, 23), acc.Block(4, 23, 23), acc.Block(32, 13, 13), acc.MMA_FP8]


@pytest.mark.parametrize(("kind", "unit"), list(itertools.product(KINDS[:4], UNITS)), ids=str)
def test_block_units_in_any_order(kind, unit):
    for seed, k in enumerate((1, 31, 160, 400)):
        x, w = data(kind, k, seed, torch.float16 if unit.kept > 20 else torch.float8_e4m3fn)
        y, s = x @ w.T, x.abs() @ w.abs().T
        bound = acc.blocks(torch.tensor(k), unit) * s
        for order in (torch.arange(k), torch.randperm(k, generator=torch.Generator().manual_seed(seed))):
            error = (block_sum(x, w, unit, order) - y).abs()
            assert bool((error <= bound).all())
            if not unit.promote:
                assert bool((error <= acc.running(x, w, unit, order)).all())


def test_the_ordered_bound_is_tighter_on_mixed_signs():
    x, w = data("normal", 400, 0)
    unit = acc.MMA_16
    assert bool((acc.running(x, w, unit) < acc.blocks(torch.tensor(400), unit) * (x.abs() @ w.abs().T)).all())


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
