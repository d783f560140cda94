"""A kernel that shows what Triton's interpreter makes of bfloat16."""

import torch
import triton
import triton.language as tl


@triton.jit
def _halve(x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, (tl.load(x + i).to(tl.float32) * 0.5).to(tl.bfloat16))


@triton.jit
def _product(x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    tile = tl.load(x + i[:, None] * n + i[None, :])
    tl.store(y + i[:, None] * n + i[None, :], tl.dot(tile, tile))


def what_is_wrong():
    """What it does wrong, in words."""
    x = torch.tensor([1.0, 1.0078125, -3.0, 2.0**-130, 1.5, -0.0, 1e30, 7.0], dtype=torch.bfloat16)
    y = torch.zeros_like(x)
    _halve[(1,)](x, y, 8)
    if not torch.equal(y, (x.float() * 0.5).bfloat16()):
        yield "it rounds to bfloat16 wrongly"
    x = torch.ones(16, 16, dtype=torch.bfloat16)
    y = torch.zeros(16, 16)
    _product[(1,)](x, y, 16)
    if not bool((y == 16).all()):
        yield "tl.dot multiplies the bits of bfloat16"
