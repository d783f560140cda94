"""Up to 8 rows of x times a packed integer weight: the warps of a block share out k, each with multiplies of its own (mma m16n8k16)."""

import triton.language as tl

from .decode import round_to_output, to_float32
from .fragments import fields, number
from .jit import device_function, kernel
from .split_k import sum_over_blocks


@device_function
def _add(a, b):
    return a + b


@kernel(do_not_specialize=["m", "stride_x", "tiles_k"])
def small_m_kernel(
    y, x, bias, parts, tickets, m, stride_x, w, scale, zero, n, k, tiles_k, stride_s,
    ALIGNED: tl.constexpr, BITS: tl.constexpr, GROUP_TILES: tl.constexpr, SUB: tl.constexpr, ONE: tl.constexpr, EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr, BN: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr,
    DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr, CONSTRAINTS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum over k of x[m, k] * (code[n, k] - zero) * scale + bias[n], for m <= 8.

    y (m, n) contiguous. x (m, k), rows stride_x apart, 8 * something if ALIGNED (any distance if ONE: m is 1). bias (n,) or None.
    w: tiles of `fragments.pack`, tiles_k along k. scale, zero (or None): (groups, stride_s) as `fragments.by_columns` gives them; zero holds
    `fragments.offset`. parts, tickets: the workspace of `split_k`, or None.
    GROUP_TILES: tiles along k that share a scale (0: all of k), SUB: groups in a tile (either is 1). Scales multiply the float32 sums of groups.

    Grid: (blocks of BN rows of w, parts of k). In a step each warp takes one tile along k. EVEN_K: no step of any part reaches past its end.
    SPLIT: 1, 2 or more (any number above 2) parts of k.
    """
    WIDTH: tl.constexpr = 512 // BITS
    FIELDS: tl.constexpr = 16 // BITS
    ROWS: tl.constexpr = BN // 16
    G: tl.constexpr = WIDTH // SUB
    BATCH: tl.constexpr = SUB * WARPS
    BM: tl.constexpr = 8
    pid = tl.program_id(0)
    part, parts_k = tl.program_id(1), tl.num_programs(1)
    first = tiles_k * part // parts_k
    end = tiles_k * (part + 1) // parts_k

    # The axes of a load: warps, tiles of rows, halves of those, a warp's 512 bytes. Warps come first, so that Triton spreads them as the
    # batched product does: the codes then never leave their lanes.
    of_warp = tl.arange(0, WARPS)[:, None, None, None]
    of_row = (pid * ROWS + tl.arange(0, ROWS))[None, :, None, None]
    inside = 256 * tl.arange(0, 2)[None, None, :, None] + tl.arange(0, 256)[None, None, None, :]
    w_rows = w + of_row.to(tl.int64) * tiles_k * 512 + inside
    # The batch: groups of a tile, warps.
    batch_warp = tl.arange(0, BATCH) % WARPS
    batch_sub = tl.arange(0, BATCH) // WARPS
    rn = pid * BN + tl.arange(0, BN)
    rm = tl.arange(0, BM)
    rk = tl.arange(0, G)
    if ALIGNED:
        # Says that rows start at 16 bytes.
        stride_x = stride_x // 8 * 8

    acc = tl.full((BATCH, BN, BM), 0.0, tl.float32)
    for tile in tl.range(first, end, WARPS, num_stages=STAGES):
        if EVEN_K:
            w_tile = tile + of_warp
            batch_tile = tile + batch_warp
        else:
            # A step may reach past the last tile: x is read as 0 there.
            w_tile = tl.minimum(tile + of_warp, tiles_k - 1)
            batch_tile = tl.minimum(tile + batch_warp, tiles_k - 1)
        p = tl.load(w_rows + w_tile * 512, eviction_policy="evict_first")
        column = ((tile + batch_warp) * WIDTH + batch_sub * G)[:, None] + rk[None, :]
        stop = tl.minimum(k, end * WIDTH)
        if ONE:
            if EVEN_K:
                xv = tl.load(x + column)
            else:
                xv = tl.load(x + column, mask=column < stop, other=0)
            if INTERPRET:
                xv = to_float32(xv)
            xv = tl.permute(tl.reshape(xv, (BATCH, G // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
            xt = tl.broadcast_to(tl.reshape(xv, (BATCH, G, 1)), (BATCH, G, BM))
        else:
            x_rows = x + rm.to(tl.int64)[None, :, None] * stride_x
            if EVEN_K:
                xv = tl.load(x_rows + column[:, None, :], mask=rm[None, :, None] < m, other=0)
            else:
                xv = tl.load(x_rows + column[:, None, :], mask=(rm[None, :, None] < m) & (column[:, None, :] < stop), other=0)
            if INTERPRET:
                xv = to_float32(xv)
            # Triton's operands have four neighbours along k in a lane where the tiles have two and two: k is a sum, so x is put in that order.
            xv = tl.permute(tl.reshape(xv, (BATCH, BM, G // 16, 2, 4, 2)), (0, 1, 2, 4, 3, 5))
            xt = tl.permute(tl.reshape(xv, (BATCH, BM, G)), (0, 2, 1))
        if zero is not None:
            z_row = (pid * BN + tl.reshape(tl.arange(0, BN), (ROWS, 2, 8)))[None, :, :, :, None]
            z_group = tl.arange(0, SUB)[None, None, None, None, :]
            if GROUP_TILES > 0:
                z_group += tl.reshape(w_tile, (WARPS, 1, 1, 1, 1)) // GROUP_TILES * SUB
            z = tl.load(zero + z_group * stride_s + z_row)
            z = tl.broadcast_to(tl.reshape(z, (z.shape[0], ROWS, 2, 8, 1, SUB, 1)), (WARPS, ROWS, 2, 8, 4, SUB, 8 // SUB))
            z = tl.reshape(z, (WARPS, ROWS, 2, 256))
            v = fields(p, z, None, BITS, "sums", ASSEMBLY, CONSTRAINTS, DTYPE, INTERPRET)
        else:
            v = fields(p, None, None, BITS, "sums", ASSEMBLY, CONSTRAINTS, DTYPE, INTERPRET)
        # warp, tile of rows, r, l, c, group, j, e, 16 columns, h -> (group, warp), row, (j, 16 columns, c, h, e)
        v = tl.reshape(v, (WARPS, ROWS, 2, 8, 4, SUB, 4 // SUB, 2, FIELDS // 2, 2))
        v = tl.reshape(tl.permute(v, (5, 0, 1, 2, 3, 6, 8, 4, 9, 7)), (BATCH, BN, G))
        sums = tl.dot(v, xt, input_precision="ieee")
        if GROUP_TILES == 0:
            acc += sums
        else:
            s = tl.load(scale + (batch_tile // GROUP_TILES * SUB + batch_sub)[:, None] * stride_s + rn[None, :])
            acc += sums * number(s, DTYPE)[:, :, None]

    acc = tl.reduce(acc, 0, _add)
    finish = True
    if SPLIT > 1:
        rows = tl.arange(0, BN)[:, None]
        place = parts + pid.to(tl.int64) * (BN * BM) + rm[None, :] * BN + rows
        acc, finish = sum_over_blocks(acc, place, tickets + 2 * pid, part, parts_k, SPLIT, tl.num_programs(0).to(tl.int64) * (BN * BM))
    if finish:
        if GROUP_TILES == 0:
            acc *= number(tl.load(scale + rn), DTYPE)[:, None]
        if bias is not None:
            acc += to_float32(tl.load(bias + rn, mask=rn < n, other=0))[:, None]
        out = y + rm.to(tl.int64)[None, :] * n + rn[:, None]
        tl.store(out, round_to_output(acc, y.dtype.element_ty), mask=(rm[None, :] < m) & (rn[:, None] < n))
