"""Rows of many experts times weights in the fragments' order: wide_kernel for blocks of one expert each."""

import triton.language as tl

from .decode import round_to_output, to_float32
from .experts import slots_of, write_zeros
from .fragments import number
from .jit import kernel
from .split_k import sum_over_blocks
from .wide import tile_sums


@kernel(do_not_specialize=["m", "stride_x", "tiles_k", "length", "tiles_m"])
def grouped_wide_kernel(
    y, x, bias, ids, owners, end_of_ids, topk_weights, parts, tickets, m, stride_x, length, tiles_m, top_k, experts,
    w, scale, zero, n, k, tiles_k, stride_s, groups, out_scale,
    ALIGNED: tl.constexpr, BITS: tl.constexpr, EXPONENT: tl.constexpr, GROUP_TILES: tl.constexpr, SUB: tl.constexpr, HOW: tl.constexpr,
    EVEN_K: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
    DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr, CONSTRAINTS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """y[i] = (sum over k of x[i // top_k, k] * (code[e, n, k] - zero) * scale + bias[e, n]) * topk_weights[i] for the slots i of expert e.

    y (m, n) contiguous. x (rows, k), rows stride_x apart, 8 * something if ALIGNED. bias (experts, n) or None; topk_weights (m,) or None.
    ids, owners, end_of_ids: blocks of BLOCK places (see experts.py), tiles_m tiles of BM places in all.
    w, scale, zero: of each expert one behind the other, tiles and (groups, stride_s), as wide_kernel's. EXPONENT: see fragments.fields; scales of
    floats with HOW "weight" are `fragments.exponents`. out_scale: what sums are multiplied by.

    Grid: (blocks of BN rows of w x tiles_m, parts of k), those of x fastest, so that the ones that read the same rows of w run together.
    """
    WIDTH: tl.constexpr = 512 // BITS
    ROWS: tl.constexpr = BN // 16
    PER_BLOCK: tl.constexpr = (BLOCK + BM - 1) // BM
    pid = tl.program_id(0)
    part, parts_k = tl.program_id(1), tl.num_programs(1)
    tile_m = pid % tiles_m
    tile_n = pid // tiles_m
    block = tile_m // PER_BLOCK
    if block * BLOCK >= tl.load(end_of_ids):
        return
    rm = slots_of(ids, block, tile_m % PER_BLOCK * BM, length, m, BLOCK, BM)
    rn = tile_n * BN + tl.arange(0, BN)
    expert = tl.load(owners + block).to(tl.int64)
    if (expert < 0) | (expert >= experts):
        if part == 0:
            write_zeros(y, rm, rn, m, n)
        return
    first = tiles_k * part // parts_k
    end = tiles_k * (part + 1) // parts_k
    if ALIGNED:
        # Says that rows start at 16 bytes.
        stride_x = stride_x // 8 * 8
    of_tile = expert * (stride_s // 16) + tile_n * ROWS + tl.arange(0, ROWS)
    w_tiles = w + (of_tile * tiles_k + first)[:, None] * 512 + tl.arange(0, 512)[None, :]
    x_tiles = x + (rm // top_k).to(tl.int64)[:, None] * stride_x + first * WIDTH + tl.arange(0, WIDTH)[None, :]
    scale += expert * groups * stride_s
    if zero is not None:
        zero += expert * groups * stride_s

    acc = tile_sums(
        w_tiles, x_tiles, rm[:, None] < m, scale, zero, rn, first, end, k, stride_s, BITS, EXPONENT, GROUP_TILES, SUB, HOW, EVEN_K, BN, BM,
        STAGES, DTYPE, ASSEMBLY, CONSTRAINTS, INTERPRET,
    )  # fmt: skip

    finish = True
    if SPLIT > 1:
        place = parts + pid.to(tl.int64) * (BN * BM) + tl.arange(0, BM)[None, :] * BN + tl.arange(0, BN)[:, None]
        acc, finish = sum_over_blocks(acc, place, tickets + 2 * pid, part, parts_k, SPLIT, tl.num_programs(0).to(tl.int64) * (BN * BM))
    if finish:
        if GROUP_TILES == 0:
            acc *= number(tl.load(scale + rn), DTYPE)[:, None]
        acc *= out_scale
        if bias is not None:
            acc += to_float32(tl.load(bias + expert * n + rn, mask=rn < n, other=0))[:, None]
        if topk_weights is not None:
            acc *= to_float32(tl.load(topk_weights + rm, mask=rm < m, other=0))[None, :]
        out = y + rm.to(tl.int64)[None, :] * n + rn[:, None]
        tl.store(out, round_to_output(acc, y.dtype.element_ty), mask=(rm[None, :] < m) & (rn[:, None] < n))
