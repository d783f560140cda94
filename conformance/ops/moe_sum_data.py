"""Weighted sums of a token's rows: data, and the bound of moe_fused_mul_sum and moe_unpermute.

y = sum over T slots of w_t h_t in float32: a product each and T - 1 additions in any order, so gamma(T) sum |w_t h_t|, and one more u
where a weight is float64. It is zero in the exact regime: rows of small integers and weights from {0, 1/4, 1/2, 3/4, 1} have sums of at
most 24 bits in every order. What must not be read, rows and weights of slots that do not count, is NaN.
"""

import torch

from ref.rounding import round_to

from ..accumulators import ETA, gamma
from ..case import DTYPES
from ..oracle import compare
from ..regimes import below, hashed, normal

WEIGHT_DTYPES = DTYPES | {"fp64": torch.float64}


def draw_rows(seed, m, t, k, dtype, data, live):
    """h (m, t, k), NaN in the slots that are not live (bool (m, t))."""
    bits = hashed(seed, "rows", m, t, k)
    h = (below(bits >> 20, 17) - 8).float() if data == "exact" else normal(bits)
    if data == "cancelling" and t > 1:
        h[:, 1::2] = -h[:, 0 : t - t % 2 : 2]
    elif data == "huge":
        h = h * (2.0**12 if dtype == "fp16" else 2.0**120)
    elif data == "tiny":
        h = h * (2.0**-20 if dtype == "fp16" else 2.0**-126)
    elif data in ("nan", "inf") and m and t and k:
        h[seed % m, (seed // 64) % t, (seed // 512) % k] = float("nan") if data == "nan" else float("inf") * (-1) ** (seed % 2)
    return round_to(torch.where(live[..., None], h, torch.nan).double(), DTYPES[dtype])


def draw_weights(seed, m, t, dtype, data, live):
    """w (m, t), NaN in the slots that are not live."""
    bits = hashed(seed, "weights", m, t)
    w = below(bits, 5) / 4.0 if data == "exact" else normal(bits).abs() + 2.0**-10
    return torch.where(live, w.double(), torch.nan).to(WEIGHT_DTYPES[dtype])


def judge(h, w, live):
    """A function of y (m, k) on the CPU: the Agreement of a weighted sum over the live slots."""
    doubles = w.dtype == torch.float64
    h = torch.where(live[..., None], h.double(), 0.0)
    w = torch.where(live, w.double(), 0.0)
    products = w[..., None] * h
    exact = products.sum(1)
    count = live.sum(1, keepdim=True)
    error = gamma(count + doubles) * products.abs().sum(1) + 2 * count * ETA

    def check(y):
        return compare(y, exact, torch.where(lossless(products), 0.0, torch.where(exact.isfinite(), error, 0.0)))

    return check


def lossless(products):
    """bool (m, k): sums that are exact in float32 in every order: multiples of one power of two, of 24 bits together."""
    total = products.abs().sum(1)
    quantum = 2.0**-5
    return ((products / quantum).frac() == 0).all(1) & (total < 2.0**24 * quantum)
