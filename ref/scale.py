"""Scales: how they are stored, and which weights share one."""

import torch
from einops import rearrange, repeat

from .element import decode, encode
from .format import SCALE_DTYPES
from .rounding import round_to


def encode_scale(scale, name, rounding="nearest_even"):
    """float64 scales as they are stored: rounded once to a float dtype (saturating), or the codes of an 8-bit element."""
    target = SCALE_DTYPES[name]
    if isinstance(target, torch.dtype):
        top = torch.finfo(target).max
        return round_to(scale.clamp(-top, top), target)
    return encode(scale, target, rounding)


def decode_scale(scale, name):
    """Stored scales as float64, exactly."""
    target = SCALE_DTYPES[name]
    return scale.to(torch.float64) if isinstance(target, torch.dtype) else decode(scale, target)


def times_scale_2(t, fmt, scale_2):
    """t (..., n, k) or (..., a, b), times the second-level scale or divided by it, as the format says; t where it has none."""
    if scale_2 is None:
        return t
    return t / scale_2.to(torch.float64) if fmt.scale_2.endswith("divisor") else t * scale_2.to(torch.float64)


def round_up(scale, name):
    """Positive scales as they are stored, rounded up; the largest where none is large enough."""
    stored = encode_scale(scale, name)
    bits = stored.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[stored.element_size()])
    above = (bits + 1).view(stored.dtype)
    grow = (decode_scale(stored, name) < scale) & decode_scale(above, name).isfinite()
    return torch.where(grow, above, stored)


def tile(x, group):
    """(..., n, k) as tiles (..., a, b, gn * gk) of one group each, zero where a partial group ends, and which entries are real."""
    n, k = x.shape[-2:]
    gn, gk = group[0] or max(n, 1), group[1] or max(k, 1)
    pad = (0, max(-(-k // gk), group[1] == 0) * gk - k, 0, max(-(-n // gn), group[0] == 0) * gn - n)

    def split(t):
        return rearrange(torch.nn.functional.pad(t, pad), "... (a gn) (b gk) -> ... a b (gn gk)", gn=gn, gk=gk)

    return split(x), split(torch.ones(n, k, dtype=torch.bool, device=x.device))


def untile(t, group, shape):
    """A value per group (..., a, b) as a value per weight, (..., n, k)."""
    n, k = shape[-2:]
    expanded = repeat(t, "... a b -> ... (a gn) (b gk)", gn=group[0] or max(n, 1), gk=group[1] or max(k, 1))
    return expanded[..., :n, :k]
