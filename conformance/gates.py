"""Activations between an expert's products: how far float32 may be off, function by function.

With u = 2^-24, relative to the result unless said otherwise; "exponential" and its error as in routing.

sigmoid(z): (9 + 3 |z|) u, plus the error of z itself, as |d log sigmoid / dz| <= 1.
silu: g sigmoid(g): one product more; and with up another: (12 + 2 |g|) u |y| all told. Exactly g from g = 32 on, where 1 + e^-g is 1 in float32,
    and exactly zero up to g = -128, where e^-g is infinite.
swigluoai: the constant alpha and its product put 2 u |alpha g| into z; u + beta, the constant beta and two products: (14 + 5 |alpha g|) u |y|
    + u |beta| |g sigmoid|.
situ: tanh is within 16 u (by (1 - e) / (1 + e) from 1/4 on, a series below; or better), its argument is a quotient (4 u) by a constant (1 u),
    whose errors it never enlarges, and it is multiplied by the constant: 23 u; the sigmoid (9 + 3 |g|) u and products; up alike.
gelu: 1 + erf cancels, so its error is absolute: erf's argument is off by 2 u, which moves it by less than u, itself by 4 u, the sum by 2 u:
    g / 2 times 7 u; and three products.
gelu_tanh: tanh's argument is off by 6 u, which moves it by less than 3 u, itself by 8 u, the sum by 2 u: g / 2 times 13 u; and three products.
relu2: two products.
Limits are exact, and pass no more error on than they get. Where float32 underflows up to 2^-126 is lost, a sigmoid where its exponential
overflows (so that 2^-126 |g| of a gate may be), and what it is multiplied by counts. Where g^2 overflows nothing is asked.
"""

import math

import torch

from ref.moe.activation import activate
from ref.moe.check import ACTIVATIONS, check_activation

from .accumulators import U

TINY, LARGEST = 2.0**-126, torch.finfo(torch.float32).max
ONE, NOTHING = 32.0, -128.0  # from where on and up to where a float32 sigmoid is exactly 1 and 0


def gates(x, activation, given):
    """The exact gate act(g) and its admissible error, and up (None without) and its own: float64 (..., n) each; and where nothing is asked."""
    p = check_activation(x, activation, **given)
    described = ACTIVATIONS[activation]
    v = x.double()
    g, u = v, None
    if described.gated:
        g, u = (v[..., 0::2], v[..., 1::2]) if described.interleaved else v.chunk(2, dim=-1)
    name = activation.removesuffix("_no_mul").removesuffix("_uninterleave")
    limit = p["limit"]
    if limit is not None:
        u = u.clamp(-limit, limit)
        g = g if name == "swiglustep" else g.clamp(max=limit)
    a = _act(activation, g, p)
    off = _gate_error(name, g, a, p)
    if name == "swiglustep":
        # What the limit makes of an error: never more, and nothing far beyond it.
        low, high = (a - off).clamp(max=limit), (a + off).clamp(max=limit)
        a = a.clamp(max=limit)
        off = torch.maximum(high - a, a - low)
    u_off = None
    if u is not None:
        u_off = torch.zeros_like(u)
        if name == "swigluoai":
            u_off, u = U * ((u + p["beta"]).abs() + abs(p["beta"])), u + p["beta"]
        elif p["up_beta"] is not None:
            u = p["up_beta"] * torch.tanh(u / p["up_beta"])
            u_off = 23 * U * u.abs() + TINY
    silent = v.isinf()
    silent = silent if not described.gated else _either(silent, described.interleaved)
    return a, off, u, u_off, silent | ((name == "relu2") & (g > LARGEST**0.5))


def _either(flags, interleaved):
    g, u = (flags[..., 0::2], flags[..., 1::2]) if interleaved else flags.chunk(2, dim=-1)
    return g | u


def _act(activation, g, p):
    """act(g) of a gate to which the limit has been applied, without up."""
    name = activation.removesuffix("_no_mul").removesuffix("_uninterleave")
    if name in ("silu", "gelu", "gelu_tanh", "relu2"):
        return activate(g, f"{name}_no_mul")
    if name == "swiglustep":
        return activate(g, "silu_no_mul")
    if name == "swigluoai":
        return g * torch.sigmoid(p["alpha"] * g)
    return p["beta"] * torch.tanh(g / p["beta"]) * g.sigmoid()


def _gate_error(name, g, a, p):
    size = g.abs()
    if name in ("silu", "swiglustep"):
        error = torch.where(g >= ONE, 0.0, torch.where(g <= NOTHING, a.abs(), (11 + 2 * size) * U * a.abs() + TINY * (1 + size)))
    elif name == "swigluoai":
        z = p["alpha"] * size
        error = (11 + 5 * z) * U * a.abs() + TINY * (1 + size)
        error = torch.where(p["alpha"] * g >= ONE + 1, 0.0, torch.where(p["alpha"] * g <= NOTHING - 1, a.abs(), error))
    elif name == "situ":
        error = (34 + 3 * size) * U * a.abs() + TINY * (1 + abs(p["beta"]))
    elif name in ("gelu", "gelu_tanh"):
        error = U * ((3.5 if name == "gelu" else 6.5) * size + 2 * a.abs()) + TINY
    else:
        error = U * a.abs() + TINY
    return torch.nan_to_num(error, nan=0.0, posinf=math.inf)


def product(a, off, u, u_off):
    """act(g) times up, and its error: one more product in float32."""
    if u is None:
        return a, off
    y = a * u
    error = off * u.abs() + u_off * (a.abs() + off) + TINY * ((off > 0) | ((y != 0) & (y.abs() < TINY)))
    return y, torch.nan_to_num(error + U * (y.abs() + error), nan=0.0, posinf=math.inf)
