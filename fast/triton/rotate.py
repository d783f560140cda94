"""Rotation of activations: the orthonormal Hadamard matrix applied to blocks of columns, rounded once."""

import torch
import triton.language as tl

from .decode import round_to_output, to_float32
from .jit import Launcher, kernel, multiple_of_16, stride_kind

COLUMNS = 2048  # of one thread block


@kernel(do_not_specialize=["m"])
def rotate_kernel(y, x, m, k, stride_x, stride_y, ROOT: tl.constexpr, LEVELS: tl.constexpr, COLUMNS: tl.constexpr):
    """y = x H / ROOT, H the Sylvester matrix of 2^LEVELS columns, by butterflies in float64; COLUMNS of a row a block."""
    row = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    v = to_float32(tl.load(x + row.to(tl.int64) * stride_x + column, mask=column < k, other=0)).to(tl.float64)
    for level in tl.static_range(LEVELS):
        pairs = tl.permute(tl.reshape(v, (COLUMNS >> (level + 1), 2, 1 << level)), (0, 2, 1))
        a, b = tl.split(pairs)
        v = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (COLUMNS,))
    v = v / ROOT
    # Rounded to odd on the way to float32, so that the rounding to the output is the only one.
    t = v.to(tl.float32)
    rest = v - t.to(tl.float64)
    below = ((rest < 0) & (t > 0)) | ((rest > 0) & (t < 0))
    u = t.to(tl.int32, bitcast=True) - below.to(tl.int32)
    odd = (u | (rest != 0).to(tl.int32)).to(tl.float32, bitcast=True)
    if y.dtype.element_ty == tl.float32:
        odd = t
    tl.store(y + row.to(tl.int64) * stride_y + column, round_to_output(odd, y.dtype.element_ty), mask=column < k)


class Rotation:
    """rotation(x): each block of `block` columns of x (m, k) times H / sqrt(block), in x's dtype, rounded once."""

    def __init__(self, block):
        self.block = block
        self.launch = Launcher(rotate_kernel)

    def __call__(self, x):
        m, k = x.shape
        y = torch.empty((m, k), dtype=x.dtype, device=x.device)
        columns = max(self.block, min(COLUMNS, 1 << max(k - 1, 0).bit_length()))
        constants = {"ROOT": self.block**0.5, "LEVELS": self.block.bit_length() - 1, "COLUMNS": columns}
        kind = (multiple_of_16(x), stride_kind(x.stride(0)), k)
        self.launch(kind, (m, -(-k // columns), 1), (y, x, m, k, x.stride(0), k), constants, {"num_warps": 4})
        return y
