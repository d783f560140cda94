"""Data from a seed: counter-based, so that every device, every shape and every machine sees the same bits.

An element depends on the seed, the tensor's name and its coordinates only. No library's generator is involved, and all
arithmetic is on integers or exact, so shrinking a shape keeps the data that is left.
"""

import zlib

import torch

from ref.rounding import round_to

from .case import DTYPES

# What x and the weights are like. The first call for (nearly) bit equality; in unique, the scales of groups differ, and x picks a column for
# each row, so that a wrong result tells whose place it came from (probes). The last have special values.
EXACT = ("exact", "one_hot", "unique")
RANDOM = ("normal", "positive", "heavy", "cancelling", "outlier", "huge", "tiny", "zero_row")
SPECIAL = ("subnormal_scale", "nan", "inf")
DATA = EXACT + RANDOM + SPECIAL

_GOLDEN, _MIX_1, _MIX_2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


def hashed(seed, name, *shape):
    """Uniform 64-bit integers, int64 of this shape, one for each coordinate."""
    key = zlib.crc32(name.encode())
    counter = torch.zeros((), dtype=torch.int64)
    for axis, size in enumerate(shape):
        step = torch.arange(size, dtype=torch.int64).view(-1, *[1] * (len(shape) - axis - 1))
        counter = counter + step * (2**20 + 7) ** (len(shape) - axis - 1)
    return _mix(counter * _GOLDEN + _key((seed << 32) ^ key))


def _mix(z):
    """The finalizer of splitmix64."""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _MIX_1
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _MIX_2
    return z ^ ((z >> 31) & (2**33 - 1))


def _key(value):
    """The finalizer of splitmix64 on a Python integer: an odd signed 64-bit integer."""
    mask = 2**64 - 1
    z = value & mask
    z = ((z ^ (z >> 30)) * (_MIX_1 & mask)) & mask
    z = ((z ^ (z >> 27)) * (_MIX_2 & mask)) & mask
    z = (z ^ (z >> 31)) | 1
    return z - 2**64 if z >= 2**63 else z


def below(bits, limit):
    """bits -> 0..limit-1."""
    return (bits & (2**31 - 1)) % limit


def normal(bits):
    """Nearly normal numbers of deviation 1.15, float32, exact: four uniform 16-bit fields, summed."""
    total = (bits & 65535) + ((bits >> 16) & 65535) + ((bits >> 32) & 65535) + ((bits >> 48) & 65535)
    return (total - 131070).float() * 2.0**-15


def draw_x(seed, m, k, dtype, data, w_row=None):
    """x (m, k) of one of the inexact regimes.

    Args:
        dtype: a key of DTYPES.
        w_row: float64 (k,), a row of the weight: in "positive" x takes its signs, so that all products with it are positive;
            in "cancelling" neighbouring products with it cancel but for x's rounding.

    Returns:
        DTYPES[dtype] (m, k), finite but for "nan" and "inf".
    """
    bits = hashed(seed, "x", m, k)
    if data == "one_hot":
        at = below(hashed(seed, "hot", m, 1), max(k, 1))
        return ((torch.arange(k) == at) * torch.where(at % 3 == 0, -0.5, 1.0)).to(DTYPES[dtype])
    if data == "unique":
        # Neighbouring rows pick columns that are no neighbours.
        at = (seed + torch.arange(m)[:, None] * 37) % max(k, 1)
        return (torch.arange(k) == at).to(DTYPES[dtype])
    x = normal(bits)
    if data == "positive":
        x = x.abs() + 0.125
        x = x if w_row is None else torch.where(w_row < 0, -x, x)
    elif data == "heavy":
        x = torch.ldexp(x, (below(bits >> 20, 28) - 16) * (below(bits >> 7, 8) == 0))
    elif data == "cancelling" and w_row is not None and k > 1:
        pairs = x[:, : k - k % 2].unflatten(1, (-1, 2))
        w = w_row[: k - k % 2].unflatten(0, (-1, 2))
        ratio = torch.where((w != 0).all(1), w[:, 0] / w[:, 1], 1.0)
        x[:, 1 : k - k % 2 + 1 : 2] = (-pairs[..., 0].double() * ratio.clamp(-64, 64)).float()
    elif data == "outlier":
        x[:, seed % k] *= 256
    elif data == "huge":
        x = x * 4096
    elif data == "tiny":
        x = x * (2.0**-18 if dtype == "fp16" else 2.0**-127)
    elif data == "zero_row" and m:
        x[seed % m] = 0
    elif data == "subnormal_scale":
        x = x * (64.0 if dtype == "fp16" else 2.0**40)
    elif data in ("nan", "inf") and m:
        special = float("nan") if data == "nan" else float("inf")
        x[seed % m, (seed // 64) % k] = special if seed % 2 else -special
    return round_to(x.double(), DTYPES[dtype])


def view_of(x, lead, pad, offset, transposed, device):
    """x (m, k) on device as a view (*lead, k) into a buffer of NaN.

    Returns:
        (view, buffer): rows k + pad elements apart, starting `offset` elements in; with transposed, the columns lie m + pad apart.
    """
    m, k = x.shape
    rows, columns = (k, m) if transposed else (m, k)
    stride = columns + pad
    buffer = torch.full((offset + rows * stride + pad + 1,), float("nan") if x.is_floating_point() else 1, dtype=x.dtype)
    view = buffer[offset : offset + rows * stride].view(rows, stride)[:, :columns]
    view.copy_(x.T if transposed else x)
    buffer = buffer.to(device)
    view = buffer.as_strided((rows, columns), (stride, 1), offset)
    view = view.T if transposed else view
    return (view.unflatten(0, lead) if lead else view[0]), buffer
