"""The Hadamard rotation at speed."""

import torch


def hadamard(x, block):
    """ref.hadamard: each block of `block` neighbours along the last axis times H / sqrt(block).

    Computed in float32 (float64 for float64), rounded once to x's dtype.
    """
    k = x.shape[-1]
    if block < 1 or block & (block - 1) or k % block:
        raise ValueError(f"hadamard: got block={block} and k={k}, expected a power of two that divides k")
    y = x if x.dtype == torch.float64 else x.to(torch.float32)
    half = 1
    while half < block:
        pairs = y.reshape(*x.shape[:-1], k // (2 * half), 2, half)
        y = torch.cat((pairs[..., :1, :] + pairs[..., 1:, :], pairs[..., :1, :] - pairs[..., 1:, :]), dim=-2)
        half *= 2
    return (y.reshape(x.shape) * block**-0.5).to(x.dtype)
