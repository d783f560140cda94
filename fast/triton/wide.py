"""9 rows of x and more times a packed integer weight: the weight first, decoded into the registers that wgmma reads it from."""

import triton.language as tl

from .decode import round_to_output, to_float32
from .fragments import fields, finished, number, pair
from .jit import device_function, kernel
from .split_k import sum_over_blocks


@device_function
def _per_row(v, ROWS: tl.constexpr, SUB: tl.constexpr):
    """Scales (16 ROWS, SUB) in the shape of the halves (ROWS, 512)."""
    v = tl.broadcast_to(tl.reshape(v, (ROWS, 16, 1, SUB, 1)), (ROWS, 16, 4, SUB, 8 // SUB))
    return tl.reshape(v, (ROWS, 512))


@device_function
def tile_sums(
    w_tiles, x_tiles, rows_in, scale, zero, rn, first, end, k, stride_s, BITS: tl.constexpr, EXPONENT: tl.constexpr,
    GROUP_TILES: tl.constexpr, SUB: tl.constexpr, HOW: tl.constexpr, EVEN_K: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    STAGES: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr, CONSTRAINTS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """float32 (BN, BM): the products of BN rows of w and BM of x over tiles first .. end along k, with their groups' scales.

    w_tiles, x_tiles: pointers to the first of these tiles, (BN / 16, 512) and (BM, columns). rows_in: which rows of x there are, (BM, 1).
    """
    WIDTH: tl.constexpr = 512 // BITS
    FIELDS: tl.constexpr = 16 // BITS
    ROWS: tl.constexpr = BN // 16
    rk = tl.arange(0, WIDTH)
    sub = tl.arange(0, SUB)
    acc = tl.full((BN, BM), 0.0, tl.float32)
    for tile in tl.range(first, end, num_stages=STAGES):
        p = tl.load(w_tiles, eviction_policy="evict_first")
        if EVEN_K:
            xv = tl.load(x_tiles, mask=rows_in, other=0)
        else:
            xv = tl.load(x_tiles, mask=rows_in & (rk[None, :] < k - tile * WIDTH), other=0)
        if INTERPRET:
            xv = to_float32(xv)
        group = 0
        if GROUP_TILES > 0:
            group = tile // GROUP_TILES * SUB
        s = None
        if HOW != "sums":
            s = _per_row(pair(tl.load(scale + (group + sub)[None, :] * stride_s + rn[:, None]), DTYPE), ROWS, SUB)
        z = None
        if zero is not None:
            z = _per_row(tl.load(zero + (group + sub)[None, :] * stride_s + rn[:, None]), ROWS, SUB)
        v = fields(p, z, s, BITS, HOW, ASSEMBLY, CONSTRAINTS, DTYPE, INTERPRET, EXPONENT)
        # tile of rows, r, l, c, j, e, 16 columns, h -> row, (j, 16 columns, h, c, e)
        v = tl.reshape(v, (ROWS, 2, 8, 4, 4, 2, FIELDS // 2, 2))
        v = tl.reshape(tl.permute(v, (0, 1, 2, 4, 6, 7, 3, 5)), (BN, WIDTH))
        if HOW == "sums" and GROUP_TILES > 0:
            sums = tl.dot(v, tl.trans(xv), input_precision="ieee")
            acc += sums * number(tl.load(scale + group * stride_s + rn), DTYPE)[:, None]
        else:
            acc = finished(tl.dot(v, tl.trans(xv), acc, input_precision="ieee"), INTERPRET)
        w_tiles += 512
        x_tiles += WIDTH

    return acc


@kernel(do_not_specialize=["m", "stride_x", "tiles_k"])
def wide_kernel(
    y, x, bias, parts, tickets, m, stride_x, w, scale, zero, n, k, tiles_k, stride_s,
    ALIGNED: tl.constexpr, BITS: tl.constexpr, GROUP_TILES: tl.constexpr, SUB: tl.constexpr, HOW: tl.constexpr, EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
    DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr, CONSTRAINTS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum over k of x[m, k] * (code[n, k] - zero) * scale + bias[n].

    Arguments as small_m_kernel's. HOW "sums": scales multiply the float32 sums of groups (SUB is 1); "weight", "weight32": they are multiplied
    into the weight, rounded to x's type. GROUP_TILES == 0 (a scale for all of k) goes with "sums": it multiplies the finished sum.

    Grid: (blocks of BN rows of w x blocks of BM rows of x, parts of k), those of x fastest, so that the ones that read the same rows of w run
    together. EVEN_K: tiles do not reach past k.
    """
    WIDTH: tl.constexpr = 512 // BITS
    ROWS: tl.constexpr = BN // 16
    pid = tl.program_id(0)
    part, parts_k = tl.program_id(1), tl.num_programs(1)
    tiles_m = (m + BM - 1) // BM
    tile_m = pid % tiles_m
    tile_n = pid // tiles_m
    first = tiles_k * part // parts_k
    end = tiles_k * (part + 1) // parts_k
    if ALIGNED:
        # Says that rows start at 16 bytes.
        stride_x = stride_x // 8 * 8

    rm = tile_m * BM + tl.arange(0, BM)
    rn = tile_n * BN + tl.arange(0, BN)
    w_tiles = w + ((tile_n * ROWS + tl.arange(0, ROWS)).to(tl.int64) * tiles_k + first)[:, None] * 512 + tl.arange(0, 512)[None, :]
    x_tiles = x + rm.to(tl.int64)[:, None] * stride_x + first * WIDTH + tl.arange(0, WIDTH)[None, :]
    rows_in = rm[:, None] < m

    acc = tile_sums(
        w_tiles, x_tiles, rows_in, scale, zero, rn, first, end, k, stride_s, BITS, 0, GROUP_TILES, SUB, HOW, EVEN_K, BN, BM, STAGES, DTYPE,
        ASSEMBLY, CONSTRAINTS, INTERPRET,
    )  # fmt: skip

    finish = True
    if SPLIT > 1:
        place = parts + pid.to(tl.int64) * (BN * BM) + tl.arange(0, BM)[None, :] * BN + tl.arange(0, BN)[:, None]
        acc, finish = sum_over_blocks(acc, place, tickets + 2 * pid, part, parts_k, SPLIT, tl.num_programs(0).to(tl.int64) * (BN * BM))
    if finish:
        if GROUP_TILES == 0:
            acc *= number(tl.load(scale + rn), DTYPE)[:, None]
        if bias is not None:
            acc += to_float32(tl.load(bias + rn, mask=rn < n, other=0))[:, None]
        out = y + rm.to(tl.int64)[None, :] * n + rn[:, None]
        tl.store(out, round_to_output(acc, y.dtype.element_ty), mask=(rm[None, :] < m) & (rn[:, None] < n))
