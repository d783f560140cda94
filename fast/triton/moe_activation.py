"""What stands between an expert's two products, in float32, rounded once."""

import triton.language as tl

from .decode import round_to_output, to_float32
from .jit import Launcher, device_function, interprets, kernel, multiple_of_16, stride_kind

BLOCK = 1024


@device_function
def sigmoid(g):
    # Whatever exp does far from zero, this is exactly 1 or 0 there.
    return 1.0 / (1.0 + tl.exp(-g))


@device_function
def tanh(v):
    """tanh to a few units in the last place: near zero, where (1 - e) / (1 + e) cancels, by its series."""
    size = tl.abs(v)
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    v2 = v * v
    near = size * (1.0 + v2 * (-1.0 / 3 + v2 * (2.0 / 15 + v2 * (-17.0 / 315 + v2 * (62.0 / 2835)))))
    magnitude = tl.where(size < 0.25, near, far)
    return tl.where(v < 0, -magnitude, magnitude)


@device_function
def activated(
    g, u, KIND: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, UP_BETA: tl.constexpr, INTERPRET: tl.constexpr
):
    """One of ref.ACTIVATIONS on gate and up, float32; a parameter that is not set is None; u is None where there is no up."""
    if LIMIT is not None and KIND != "swiglustep":
        # Not tl.minimum, which would lose a NaN.
        g = tl.where(g > LIMIT, LIMIT, g)
    if LIMIT is not None:
        u = tl.where(u > LIMIT, LIMIT, tl.where(u < -LIMIT, -LIMIT, u))
    if KIND == "silu":
        v = g * sigmoid(g)
    elif KIND == "swiglustep":
        v = g * sigmoid(g)
        v = tl.where(v > LIMIT, LIMIT, v)
    elif KIND == "swigluoai":
        v = g * sigmoid(ALPHA * g)
        u = u + BETA
    elif KIND == "situ":
        v = BETA * tanh(g / BETA) * sigmoid(g)
        if UP_BETA is not None:
            u = UP_BETA * tanh(u / UP_BETA)
    elif KIND == "gelu":
        v = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # (1 + tanh(z)) / 2 is the sigmoid of 2 z.
        v = g * sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    else:
        v = tl.where(g > 0, g * g, tl.where(g == g, 0.0, g))
    if u is not None:
        v = v * u
    return v


@device_function
def load_activated(
    row, column, n, KIND: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    BETA: tl.constexpr, UP_BETA: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Columns of the activation of one row of x: row points to its 2 n (or n) columns. Zero past the end."""
    inside = column < n
    if INTERLEAVED:
        g = to_float32(tl.load(row + 2 * column, mask=inside, other=0.0))
        u = to_float32(tl.load(row + 2 * column + 1, mask=inside, other=0.0))
    else:
        g = to_float32(tl.load(row + column, mask=inside, other=0.0))
        u = None
        if GATED:
            u = to_float32(tl.load(row + n + column, mask=inside, other=0.0))
    return activated(g, u, KIND, LIMIT, ALPHA, BETA, UP_BETA, INTERPRET)


@kernel(do_not_specialize=["m"])
def activation_kernel(
    y, x, m, n, stride_x,
    KIND: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    UP_BETA: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """y = act(x): BLOCK columns of one row a program."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v = load_activated(x + row.to(tl.int64) * stride_x, column, n, KIND, GATED, INTERLEAVED, LIMIT, ALPHA, BETA, UP_BETA, INTERPRET)
    tl.store(y + row.to(tl.int64) * n + column, round_to_output(v, y.dtype.element_ty), mask=column < n)


_launch = Launcher(activation_kernel)


def moe_activation(x, activation, chosen, parameters, out):
    """out = act(x), x (m, 2 n) or (m, n), columns adjacent; chosen: its ref.moe.check.Activation; parameters: all four, None where not set."""
    m, n = out.shape
    if m == 0 or n == 0:
        return
    interpret = interprets(x.device)
    block = 1 << (n - 1).bit_length() if interpret else min(BLOCK, max(64, 1 << (n - 1).bit_length()))
    constants = constexprs(activation, chosen, parameters) | {"BLOCK": block, "INTERPRET": interpret}
    kind = (x.dtype, out.dtype, multiple_of_16(x), multiple_of_16(out), stride_kind(x.stride(0)), n, *constants.values())
    _launch(kind, (m, -(-n // block), 1), (out, x, m, n, x.stride(0)), constants, {"num_warps": max(1, block // 256)})


def constexprs(activation, chosen, parameters):
    """What the kernels are told of an activation."""
    kind = activation.removesuffix("_no_mul").removesuffix("_uninterleave")
    return {
        "KIND": kind, "GATED": chosen.gated, "INTERLEAVED": chosen.interleaved,
        **{name.upper(): None if parameters[name] is None else float(parameters[name]) for name in ("limit", "alpha", "beta", "up_beta")},
    }  # fmt: skip
