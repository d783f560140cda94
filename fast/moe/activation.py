"""What stands between an expert's two products."""

import math

import torch

from ref.format import check_input_format, parse_format
from ref.moe.check import ACTIVATIONS, check_activation

from ..quantize_input import quantize_input
from .choose import choose


def moe_activation(x, activation="silu", *, limit=None, alpha=None, beta=None, up_beta=None, format=None, impl=None, out=None):
    """ref.moe_activation at speed: float32 inside, rounded once.

    Args:
        impl: None for the fastest, or "triton" or "torch".
        out: None, or where to write, contiguous; not with format.
        The rest, and the result: as ref.moe_activation.
    """
    parameters = check_activation(x, activation, limit=limit, alpha=alpha, beta=beta, up_beta=up_beta)
    chosen, described = choose("moe_activation", impl, x.device), ACTIVATIONS[activation]
    n = x.shape[-1] // 2 if described.gated else x.shape[-1]
    if format is not None:
        format = parse_format(format)
        check_input_format(format, None, "moe_activation")
    y = x.new_empty(*x.shape[:-1], n, dtype=x.dtype if format is None else torch.float32) if out is None else out
    if tuple(y.shape) != (*x.shape[:-1], n) or (out is not None and (out.dtype != x.dtype or not out.is_contiguous())):
        raise ValueError(f"moe_activation: out is {tuple(y.shape)} {y.dtype}, expected {(*x.shape[:-1], n)} {x.dtype}, contiguous")
    rows = x.detach().reshape(-1 if x.numel() else 0, x.shape[-1])
    if chosen == "triton":
        from fast.triton import moe_activation as kernels

        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        kernels.moe_activation(
            rows.float() if rows.dtype == torch.float64 else rows, activation, described, parameters, y.view(rows.shape[0], n)
        )
    else:
        y.copy_(_activated(x.detach(), activation, described, parameters))
    return y if format is None else quantize_input(y, format)


def silu_and_mul(x, *, impl=None, out=None):
    """moe_activation(x, "silu")."""
    return moe_activation(x, "silu", impl=impl, out=out)


def _activated(x, activation, described, p):
    """float32, in plain torch."""
    v = x if x.dtype == torch.float64 else x.float()
    g, u = v, None
    if described.gated:
        g, u = (v[..., ::2], v[..., 1::2]) if described.interleaved else v.tensor_split(2, dim=-1)
    if p["limit"] is not None:
        u = u.clamp(-p["limit"], p["limit"])
        g = g if activation == "swiglustep" else g.clamp(max=p["limit"])
    if activation in ("silu", "silu_no_mul", "swiglustep"):
        y = torch.nn.functional.silu(g)
        y = y.clamp(max=p["limit"]) if activation == "swiglustep" else y
    elif activation.startswith("swigluoai"):
        y, u = g * torch.sigmoid(p["alpha"] * g), u + p["beta"]
    elif activation == "situ":
        y = p["beta"] * torch.tanh(g / p["beta"]) * torch.sigmoid(g)
        u = u if p["up_beta"] is None else p["up_beta"] * torch.tanh(u / p["up_beta"])
    elif activation.startswith("gelu_tanh"):
        y = g * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (g + 0.044715 * g * g * g))
    elif activation.startswith("gelu"):
        y = 0.5 * g * torch.special.erfc(-g * math.sqrt(0.5))
    else:
        y = g.relu().square()
    return y if u is None else y * u
