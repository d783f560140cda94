"""The orthonormal Hadamard rotation of blocks along the last axis."""

import torch

from .rounding import round_to


def hadamard(x, block):
    """Each block of `block` neighbours times H / sqrt(block), H the Sylvester matrix (natural order): its own inverse.

    Args:
        x: (..., k), any float dtype; computed in float64, rounded once.
        block: a power of two that divides k.

    Returns:
        (..., k), dtype of x.

    Raises:
        ValueError: block is no power of two, or does not divide k.

    Source: Sylvester (1867); the order and the scale are Humming's.

    >>> hadamard(torch.tensor([3.0, 1.0, 0.0, 2.0]), 4)
    tensor([3., 0., 1., 2.])
    """
    k = x.shape[-1]
    if block < 1 or block & (block - 1) or k % block:
        raise ValueError(f"hadamard: got block={block} and k={k}, expected a power of two that divides k")
    y = x.to(torch.float64)
    stride = 1
    while stride < block:
        a, b = y.unflatten(-1, (-1, 2, stride)).unbind(-2)
        y = torch.stack((a + b, a - b), -2).flatten(-3)
        stride *= 2
    return round_to(y / block**0.5, x.dtype)
