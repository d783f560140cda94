"""Rows of many experts in blocks of one expert each, as moe_align_block_size gives them: what grouped kernels share.

Block b is places b * BLOCK ... of `ids`, which has `length`; each place holds a slot, or something that is none. `owners` has the expert of
each block, `end` the number of places that count. A block without a legal expert is written as zeros.
"""

import triton.language as tl

from .decode import round_to_output
from .jit import device_function


@device_function
def slots_of(ids, block, first, length, slots, BLOCK: tl.constexpr, BM: tl.constexpr):
    """BM slots of a block from its place `first` on, int32; `slots`, how many there are, where there is none."""
    inside = first + tl.arange(0, BM)
    place = block * BLOCK + inside
    slot = tl.load(ids + place, mask=(inside < BLOCK) & (place < length), other=-1)
    return tl.where((slot >= 0) & (slot < slots), slot, slots)


@device_function
def write_zeros(y, rm, rn, m, n):
    """y[rm, rn] = 0 for the rows below m and the columns below n."""
    where = y + rm.to(tl.int64)[:, None] * n + rn[None, :]
    zeros = round_to_output(tl.full((rm.shape[0], rn.shape[0]), 0.0, tl.float32), y.dtype.element_ty)
    tl.store(where, zeros, mask=(rm < m)[:, None] & (rn < n)[None, :])
