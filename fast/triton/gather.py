"""x's columns in another order."""

import torch
import triton.language as tl

from .jit import Launcher, kernel, multiple_of_16, stride_kind

COLUMNS = 1024  # of one thread block


@kernel(do_not_specialize=["m"])
def gather_kernel(y, x, columns, m, k, stride_x, stride_y, COLUMNS: tl.constexpr):
    """y[m, j] = x[m, columns[j]], 0 where that is negative; COLUMNS of a row a block."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column = tl.load(columns + place, mask=place < k, other=-1)
    v = tl.load(x + row * stride_x + column, mask=column >= 0, other=0)
    tl.store(y + row * stride_y + place, v, mask=place < k)


class Gather:
    """gather(x): columns of x (m, k) as `columns` (int32) lists them, 0 for a negative one; rows 16 bytes apart or a multiple of that."""

    def __init__(self, columns):
        self.columns = columns
        self.launch = Launcher(gather_kernel)

    def __call__(self, x):
        m, k = x.shape[0], len(self.columns)
        y = torch.empty((m, -(-k // 8) * 8), dtype=x.dtype, device=x.device)
        columns = min(COLUMNS, 1 << max(k - 1, 0).bit_length())
        args = (y, x, self.columns, m, k, x.stride(0), y.shape[1])
        kind = (multiple_of_16(x), stride_kind(x.stride(0)))
        self.launch(kind, (m, -(-k // columns), 1), args, {"COLUMNS": columns}, {"num_warps": 4})
        return y[:, :k]
