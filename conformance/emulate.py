"""Adders emulated in float64, to test that no bound is ever left and that too short an accumulator is noticed."""

import math

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


def block_sum(x, w, unit, order=None, smallest=(0.0, 0.0)):
    """The same by a matrix unit (accumulators.Block): aligned, truncated block sums, promoted to float32 where it says so.

    Args:
        smallest: the smallest normal numbers of x's and of w's dtype. Products are aligned by the sum of their factors' exponents as
            these are stored, which for a subnormal one is that of the smallest normal number.
    """
    if order is not None:
        x, w = x[:, order], w[:, order]
    x, w = x.double(), w.double()
    x_exponent, w_exponent = (_exponent(t, least) for t, least in zip((x, w), smallest, strict=True))
    total = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float64)
    promoted = torch.zeros_like(total)
    for start in range(0, x.shape[1], unit.length):
        if unit.promote and start and start % unit.promote == 0:
            promoted, total = (promoted + total).float().double(), torch.zeros_like(total)
        block = slice(start, start + unit.length)
        terms = torch.cat((x[:, None, block] * w[None, :, block], total[..., None]), -1)
        exponents = torch.cat((x_exponent[:, None, block] + w_exponent[None, :, block], _exponent(total)[..., None]), -1)
        top = torch.where(terms == 0, NOTHING, exponents).amax(-1)
        total = _truncate(terms, torch.ldexp(torch.ones_like(total), top - unit.kept)[..., None]).sum(-1)
        total = _truncate(total, torch.ldexp(torch.ones_like(total), _exponent(total) - unit.bits))
    return (promoted + total).float().double() if unit.promote else total


# Below every exponent.
NOTHING = -500


def _exponent(t, smallest=0.0):
    """floor(log2 |t|), of the smallest normal number where |t| is less."""
    found = torch.frexp(t).exponent - 1
    return found if not smallest else found.clamp(min=math.frexp(smallest)[1] - 1)


def _truncate(x, unit):
    return torch.trunc(x / unit) * unit
