"""The rotation: the Sylvester matrix, its own inverse."""

import pytest
import torch

from .hadamard import hadamard
from .quantize import dequantize, quantize
from .rounding import round_to
from .test_quantize import normal


def sylvester(block):
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 64, 128, 512])
def test_hadamard_is_the_orthonormal_sylvester_matrix(block):
    h = hadamard(torch.eye(block, dtype=torch.float64), block)
    assert torch.equal(h, sylvester(block) / block**0.5)
    u = 2.0**-53
    error = 0 if block**0.5 % 1 == 0 else (block + 2) * u  # a sum of `block` products, each of two rounded square roots
    assert ((h @ h.T - torch.eye(block)).abs() <= error).all()
    x = torch.randint(-50, 50, (3, 2 * block), generator=torch.Generator().manual_seed(0)).double()
    twice = hadamard(hadamard(x, block), block)
    # Integers add without rounding; then a division, log2 B additions and another division, by the same rounded root.
    bound = 0 if block**0.5 % 1 == 0 else (block.bit_length() + 4) * u * x.abs().sum(-1, keepdim=True)
    assert ((twice - x).abs() <= bound).all()


def test_hadamard_blocks_dtypes_and_errors():
    x = normal(2, 3, 16)
    assert torch.equal(hadamard(x, 4)[..., 4:8], hadamard(x[..., 4:8], 4))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        y = hadamard(x.to(dtype), 8)
        assert y.dtype == dtype and torch.equal(y, round_to(hadamard(x.to(dtype).double(), 8), dtype))
    for block in (0, 3, -2, 12, 32):
        with pytest.raises(ValueError, match=f"hadamard: got block={block} and k=16, expected a power of two that divides k"):
            hadamard(x, block)


def test_rotated_weights_come_back():
    w = normal(4, 64, dtype=torch.float64)
    plain, rotated = quantize(hadamard(w, 16), "int4_g32"), quantize(w, "int4_g32_h16")
    assert torch.equal(plain.packed, rotated.packed) and torch.equal(plain.scale, rotated.scale)
    assert torch.equal(dequantize(rotated), hadamard(dequantize(plain), 16))
