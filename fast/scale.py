"""Stored scales as numbers."""

import functools

import torch

from ref.element import values
from ref.format import SCALE_DTYPES

# Held by device: making one waits for a GPU.
_table = functools.cache(values)


def decoded_scale(scale, name):
    """Scales as they are stored, in a float dtype or as codes of an 8-bit element: float64, exactly."""
    target = SCALE_DTYPES[name]
    return scale.to(torch.float64) if isinstance(target, torch.dtype) else _table(target, scale.device)[scale.long()]
