"""What stands between an expert's two products."""

import math
from dataclasses import dataclass

import torch

from ..activation import quantize_input
from ..rounding import round_to


@dataclass(frozen=True)
class Activation:
    """function(gate, up, limit, alpha, beta, up_beta) in float64; up is None where the input is not halved.

    interleaved: gate is every second column, not the first half. needs: parameters without a default. defaults: of the others.
    """

    function: object
    gated: bool = True
    interleaved: bool = False
    takes: tuple = ()
    needs: tuple = ()
    defaults: tuple = ()


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


OAI = (("limit", 7.0), ("alpha", 1.702), ("beta", 1.0))
ACTIVATIONS = {
    "silu": Activation(lambda g, u, p: _silu(_capped(g, p["limit"])) * _clamped(u, p["limit"]), takes=("limit",)),
    "gelu": Activation(lambda g, u, p: _gelu(g) * u),
    "gelu_tanh": Activation(lambda g, u, p: _gelu_tanh(g) * u),
    "relu2": Activation(lambda g, u, p: _relu2(g) * u),
    "swigluoai": Activation(_swigluoai, interleaved=True, takes=("limit", "alpha", "beta"), defaults=OAI),
    "swigluoai_uninterleave": Activation(_swigluoai, takes=("limit", "alpha", "beta"), needs=("limit",), defaults=OAI[1:]),
    "swiglustep": Activation(lambda g, u, p: _capped(_silu(g), p["limit"]) * _clamped(u, p["limit"]), takes=("limit",), defaults=OAI[:1]),
    "situ": Activation(_situ, takes=("beta", "up_beta"), needs=("beta",)),
    "silu_no_mul": Activation(lambda g, u, p: _silu(g), gated=False),
    "gelu_no_mul": Activation(lambda g, u, p: _gelu(g), gated=False),
    "gelu_tanh_no_mul": Activation(lambda g, u, p: _gelu_tanh(g), gated=False),
    "relu2_no_mul": Activation(lambda g, u, p: _relu2(g), gated=False),
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
        return chosen.function(v, None, parameters)
    gate, up = (v[..., 0::2], v[..., 1::2]) if chosen.interleaved else v.chunk(2, dim=-1)
    return chosen.function(gate, up, parameters)


def check_activation(x, activation, **given):
    """The activation's parameters, defaults filled in; raises TypeError or ValueError where something does not fit; reads no data."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"moe_activation: unknown activation {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    chosen = ACTIVATIONS[activation]
    if not isinstance(x, torch.Tensor) or not x.dtype.is_floating_point:
        raise TypeError(f"moe_activation: x is {x.dtype if isinstance(x, torch.Tensor) else type(x).__name__}, expected a float tensor")
    if x.dim() < 1 or (chosen.gated and x.shape[-1] % 2):
        raise ValueError(f"moe_activation: x has shape {tuple(x.shape)}, and {activation} needs an even number of columns: gate and up")
    for name, value in given.items():
        if value is not None and name not in chosen.takes:
            raise ValueError(f"moe_activation: {activation} has no parameter {name}; it has {', '.join(chosen.takes) or 'none'}")
        if value is None and name in chosen.needs:
            raise ValueError(f"moe_activation: {activation} needs {name}")
    set_by_caller = {name: value for name, value in given.items() if value is not None}
    return dict.fromkeys(("limit", "alpha", "beta", "up_beta")) | dict(chosen.defaults) | set_by_caller


def _result(y, dtype, format):
    return round_to(y, dtype) if format is None else quantize_input(y, format)
