"""Adders emulated in float64, to test that no bound is ever left and that too short an accumulator is noticed."""

import torch


def ieee_sum(x, w, order, dtype=torch.float32):
    """sum over k of x[m, k] w[n, k], one by one in the given order, every partial sum rounded to dtype: float64 (m, n)."""
    total = torch.zeros(x.shape[0], w.shape[0], dtype=dtype)
    for k in order.tolist():
        total = (total.double() + x[:, None, k].double() * w[None, :, k].double()).to(dtype)
    return total.double()


def tree_sum(x, w, dtype=torch.float32):
    """The same by pairwise sums, as a split of k into many parts would have them."""
    terms = (x[:, None, :].double() * w[None, :, :].double()).to(dtype)
    while terms.shape[-1] > 1:
        terms = torch.nn.functional.pad(terms, (0, terms.shape[-1] % 2)).unflatten(-1, (-1, 2))
        terms = (terms[..., 0].double() + terms[..., 1].double()).to(dtype)
    return terms[..., 0].double()


def block_sum(x, w, unit, order=None):
    """The same by a matrix unit (accumulators.Block): aligned, truncated block sums, promoted to float32 where it says so."""
    if order is not None:
        x, w = x[:, order], w[:, order]
    total = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float64)
    promoted = torch.zeros_like(total)
    for start in range(0, x.shape[1], unit.length):
        if unit.promote and start and start % unit.promote == 0:
            promoted, total = (promoted + total).float().double(), torch.zeros_like(total)
        products = x[:, None, start : start + unit.length] * w[None, :, start : start + unit.length]
        terms = torch.cat((products.double(), total[..., None]), -1)
        kept = torch.ldexp(torch.ones_like(total), torch.frexp(terms.abs().amax(-1)).exponent - 1 - unit.kept)
        total = _truncate(terms, kept[..., None]).sum(-1)
        last = torch.ldexp(torch.ones_like(total), torch.frexp(total).exponent - 1 - unit.bits)
        total = _truncate(total, last)
    return (promoted + total).float().double() if unit.promote else total


def _truncate(x, unit):
    return torch.trunc(x / unit) * unit
