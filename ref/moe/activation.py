"""What stands between an expert's two products."""

import math

import torch

from ..activation import quantize_input
from ..rounding import round_to
from .check import ACTIVATIONS, check_activation


def _silu(g):
    return g * g.sigmoid()


def _gelu(g):
    return 0.5 * g * (1 + torch.erf(g / math.sqrt(2)))


def _gelu_tanh(g):
    return 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))


def _relu2(g):
    return g.clamp(min=0) ** 2


def _clamped(u, limit):
    return u if limit is None else u.clamp(-limit, limit)


def _capped(g, limit):
    return g if limit is None else g.clamp(max=limit)


def _swigluoai(g, u, p):
    g = _capped(g, p["limit"])
    return g * torch.sigmoid(p["alpha"] * g) * (_clamped(u, p["limit"]) + p["beta"])


def _situ(g, u, p):
    soft = p["beta"] * torch.tanh(g / p["beta"]) * g.sigmoid()
    return soft * (u if p["up_beta"] is None else p["up_beta"] * torch.tanh(u / p["up_beta"]))


# Of gate and up, float64, and the parameters.
FUNCTIONS = {
    "silu": lambda g, u, p: _silu(_capped(g, p["limit"])) * _clamped(u, p["limit"]),
    "gelu": lambda g, u, p: _gelu(g) * u,
    "gelu_tanh": lambda g, u, p: _gelu_tanh(g) * u,
    "relu2": lambda g, u, p: _relu2(g) * u,
    "swigluoai": _swigluoai,
    "swigluoai_uninterleave": _swigluoai,
    "swiglustep": lambda g, u, p: _capped(_silu(g), p["limit"]) * _clamped(u, p["limit"]),
    "situ": _situ,
    "silu_no_mul": lambda g, u, p: _silu(g),
    "gelu_no_mul": lambda g, u, p: _gelu(g),
    "gelu_tanh_no_mul": lambda g, u, p: _gelu_tanh(g),
    "relu2_no_mul": lambda g, u, p: _relu2(g),
}


def moe_activation(x, activation="silu", *, limit=None, alpha=None, beta=None, up_beta=None, format=None):
    """gate and up, the halves of x's columns, as one: act(gate) * up, in float64, rounded once.

    silu: g s(g) u, with s the sigmoid. gelu: with erf. gelu_tanh: with its tanh form. relu2: max(g, 0)^2 u.
    silu with limit L (DeepSeek-V4): g to at most L, u to +-L first. swiglustep: min(g s(g), L) * u to +-L (L = 7).
    swigluoai: g to at most L, u to +-L; g s(alpha g) (u + beta); alpha = 1.702, beta = 1, L = 7; gate and up are the even and the odd
    columns. swigluoai_uninterleave: the same on halves; limit has no default.
    situ: beta tanh(g / beta) s(g) u, with up_beta: times up_beta tanh(u / up_beta) instead of u; beta has no default.
    *_no_mul: all of x is the gate, and nothing is multiplied.

    Args:
        x: (..., 2 n), or (..., n) for *_no_mul; fp32, fp16, bf16 or float64.
        activation: a key of ACTIVATIONS.
        limit, alpha, beta, up_beta: parameters; only those that the activation has.
        format: None, or the format that the result is quantized to (quantize_input), without being rounded before.

    Returns:
        (..., n), dtype of x; with format a QTensor (m, n).

    Raises:
        TypeError, ValueError: unknown activation, a parameter missing or not its own, an odd number of columns.

    Source: vLLM 0.33 fused_moe/activation.py and utils/humming/activation.py.

    >>> moe_activation(torch.tensor([[-1.0, 2.0, 3.0, 4.0]]), "relu2")
    tensor([[ 0., 16.]])
    """
    return _result(activate(x, activation, limit=limit, alpha=alpha, beta=beta, up_beta=up_beta), x.dtype, format)


def silu_and_mul(x):
    """moe_activation(x, "silu")."""
    return moe_activation(x, "silu")


def activate(x, activation, **given):
    """moe_activation before its rounding: float64 (..., n)."""
    parameters = check_activation(x, activation, **given)
    chosen = ACTIVATIONS[activation]
    v = x.detach().to(torch.float64)
    if not chosen.gated:
        return FUNCTIONS[activation](v, None, parameters)
    gate, up = (v[..., 0::2], v[..., 1::2]) if chosen.interleaved else v.chunk(2, dim=-1)
    return FUNCTIONS[activation](gate, up, parameters)


def _result(y, dtype, format):
    return round_to(y, dtype) if format is None else quantize_input(y, format)
