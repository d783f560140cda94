"""The GEMM over packed codes: one kernel for every element, scale and activation format, specialised by its constexprs."""

import triton.language as tl

from .decode import decode, load_codes, load_scale, round_to_output, to_dot, to_float32
from .experts import slots_of, write_zeros
from .fragments import finished
from .jit import kernel


@kernel(do_not_specialize=["m", "split_steps", "length"])
def gemm_kernel(
    y, x, w, scale, zero, offset, far, scale_2, bias, table, scale_table, x_scale, x_scale_2, parts, arrived, ids, owners, end, topk_weights,
    m, n, k, stride_x, row_bytes, stride_s, stride_xs, split_steps, length, top_k, experts, scale_unit, out_1, out_2,
    BITS: tl.constexpr, DECODE: tl.constexpr, MIDDLE: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, SIGNED: tl.constexpr,
    SPECIALS: tl.constexpr, UNBIAS: tl.constexpr, UNIT: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr, FAR: tl.constexpr,
    GN: tl.constexpr, GK: tl.constexpr, SCALE_2: tl.constexpr, X_GROUP: tl.constexpr, X_ROW: tl.constexpr, HAS_BIAS: tl.constexpr,
    DOT: tl.constexpr, W_PARTS: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr, WHOLE_BYTES: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK: tl.constexpr, WGMMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum over k of x[m, k] * ((value[code[n, k]] - zero) * scale * scale_2 + offset), times the scales of x, + bias[n].

    y (m, n) contiguous. x (m, k), rows stride_x apart: the operand of the product, as it is or quantized by quantize_input.
    w: uint8, rows of row_bytes bytes. scale, zero, offset: rows of stride_s; group of (n, k) = (n // GN, k // GK), GN or GK = 0 for the whole axis.
    scale_2: one (SCALE_2 "tensor") or n ("channel") float32, or what is divided by ("tensor_divisor", "channel_divisor"). x_scale: float32, rows of stride_xs, a scale for X_GROUP columns (0: none).
    x_scale_2: float32, one for all (X_ROW "tensor") or for each row ("token").

    SCALE "none": there is none, and the weight is as it is. "end": one scale over all of k, applied to the finished sum. "sums": applied to the float32 sum of each step, which lies within
        one group, and so are offsets, to the float32 sum of its x. "weight": multiplied into the weight (where the product is exact in the
        type of the dot).
    STEP: steps do not cross multiples of this many columns (0: none such); EVEN: no step reaches past k or past such a multiple.
    FAR: far (3, n) holds what the scales of each row are taken times, and in two factors what takes it back, all powers of two; offsets
        are in memory so.
    W_PARTS: a weight is the sum of so many numbers of the type DOT. UNIT, scale_unit, out_1, out_2: powers of two that keep
        weights in the range of that type: they are taken times UNIT, and where SCALE is "weight" their scales times scale_unit; out_1 *
        out_2 takes both back.
    WGMMA: products may run on while the next step decodes its weights into registers that they still read (fragments.finished).
    SPLIT: blocks along k; each leaves its sum in `parts`, and the last to arrive adds them in order: the bits do not depend on who is last.
    BLOCK: 0, or there are `experts` weights, scales, ... one behind the other, and rows in blocks of one expert each (see experts.py): row i
        of y is of row i // top_k of x, and is multiplied by topk_weights[i] at last, if there are any.
    """
    rows_n = (n + BN - 1) // BN
    tile = tl.program_id(0)
    tile_n = tile % rows_n
    tile_m = tile // rows_n
    part = tl.program_id(1)

    rn = tile_n * BN + tl.arange(0, BN)
    if BLOCK == 0:
        rm = tile_m * BM + tl.arange(0, BM)
    else:
        PER_BLOCK: tl.constexpr = (BLOCK + BM - 1) // BM
        block = tile_m // PER_BLOCK
        if block * BLOCK >= tl.load(end):
            return
        rm = slots_of(ids, block, tile_m % PER_BLOCK * BM, length, m, BLOCK, BM)
        expert = tl.load(owners + block).to(tl.int64)
        if (expert < 0) | (expert >= experts):
            if part == 0:
                write_zeros(y, rm, rn, m, n)
            return
        if GN == 0:
            rows_s = expert * stride_s
        else:
            rows_s = expert * ((n + GN - 1) // GN) * stride_s
        w += expert * n * row_bytes
        scale += rows_s
        zero += rows_s
        offset += rows_s
        if FAR:
            far += expert * 3 * n
        if SCALE_2 == "channel" or SCALE_2 == "channel_divisor":
            scale_2 += expert * n
        elif SCALE_2 != "none":
            scale_2 += expert
        if HAS_BIAS:
            bias += expert * n
    # Rows past the end read the last row and are not stored.
    an = tl.minimum(rn, n - 1)
    am = tl.minimum(rm, m - 1)
    ax = am
    if BLOCK > 0:
        ax = am // top_k
    if GN == 0:
        gn = an * 0
    else:
        gn = an // GN
    scale_rows = scale + gn.to(tl.int64) * stride_s
    zero_rows = zero + gn.to(tl.int64) * stride_s
    offset_rows = offset + gn.to(tl.int64) * stride_s
    w_rows = w + an.to(tl.int64)[:, None] * row_bytes
    x_rows = x + ax.to(tl.int64)[:, None] * stride_x
    if FAR:
        near = tl.load(far + an)
    xs_rows = x_scale + ax.to(tl.int64) * stride_xs

    PER_STEP: tl.constexpr = SCALE == "sums" or X_GROUP > 0
    SUB: tl.constexpr = 1 if STEP == 0 else (STEP + BK - 1) // BK
    if STEP == 0:
        steps = (k + BK - 1) // BK
    else:
        steps = k // STEP * SUB + (k % STEP + BK - 1) // BK
    first = part * split_steps
    last = tl.minimum(first + split_steps, steps)

    if DOT == "int8" and not PER_STEP:
        acc = tl.full((BN, BM), 0, tl.int32)
    else:
        acc = tl.full((BN, BM), 0.0, tl.float32)
    if ZERO and GK == 0:
        z = to_float32(tl.load(zero_rows))[:, None]

    for step in range(first, last):
        if STEP == 0:
            k0 = step * BK
            stop = k
        else:
            k0 = step // SUB * STEP + step % SUB * BK
            stop = tl.minimum(step // SUB * STEP + STEP, k)
        columns = k0 + tl.arange(0, BK)[None, :]
        if EVEN:
            xv = tl.load(x_rows + columns)
        else:
            xv = tl.load(x_rows + columns, mask=columns < stop, other=0.0)
        if DOT == "fp32":
            xv = to_float32(xv)
        xt = tl.trans(xv)

        if DECODE == "none":
            # The codes are numbers of the type of the dot.
            if EVEN:
                a = tl.load(w_rows + columns)
            else:
                a = tl.load(w_rows + columns, mask=columns < stop, other=0.0)
            if DOT == "fp32":
                a = to_float32(a)
        else:
            code = load_codes(w_rows, k0, stop, row_bytes, BITS, BN, BK, EVEN, WHOLE_BYTES)
            v = decode(code, table, DECODE, MIDDLE, EXPONENT, MANTISSA, SIGNED, SPECIALS, UNBIAS)
            if ZERO:
                if GK > 0:
                    z = to_float32(tl.load(zero_rows + k0 // GK))[:, None]
                v = v - z
            if UNIT != 1.0:
                v = v * UNIT
            if SCALE == "weight":
                groups = k0 // GK + tl.arange(0, BK // GK)[None, :]
                s = load_scale(scale_rows[:, None] + groups, scale_table, groups < stride_s) * scale_unit
                v = tl.reshape(tl.reshape(v, (BN, BK // GK, GK)) * s[:, :, None], (BN, BK))
            a = to_dot(v, DOT)

        if PER_STEP:
            if DOT == "int8":
                p = tl.dot(a, xt, out_dtype=tl.int32).to(tl.float32)
            elif DOT == "e4m3" or DOT == "e5m2":
                p = tl.dot(a, xt, max_num_imprecise_acc=BK if BK < 128 else 128)
            else:
                p = tl.dot(a, xt, input_precision="ieee")
        elif DOT == "int8":
            acc = tl.dot(a, xt, acc, out_dtype=tl.int32)
        elif DOT == "e4m3" or DOT == "e5m2":
            acc = tl.dot(a, xt, acc, max_num_imprecise_acc=BK if BK < 128 else 128)
        else:
            acc = tl.dot(a, xt, acc, input_precision="ieee")
        if not PER_STEP and WGMMA:
            acc = finished(acc, False)
        if W_PARTS > 1:
            # What the rounding of the weight left over. An infinite x has had its say: infinity times a remainder of zero would be NaN.
            finite = tl.where(tl.abs(xt.to(tl.float32)) < float("inf"), xt, 0.0).to(xt.dtype)
            for _ in tl.static_range(W_PARTS - 1):
                v = v - a.to(tl.float32)
                a = to_dot(v, DOT)
                if PER_STEP:
                    p = tl.dot(a, finite, p, input_precision="ieee")
                else:
                    acc = tl.dot(a, finite, acc, input_precision="ieee")
                    if WGMMA:
                        acc = finished(acc, False)

        if PER_STEP:
            if SCALE == "sums":
                if GK > 0:
                    group = k0 // GK
                else:
                    group = 0
                s = load_scale(scale_rows + group, scale_table, gn >= 0)
                if FAR:
                    s = s * near
                p = p * s[:, None]
                if OFFSET:
                    x_sum = tl.reduce(xv.to(tl.float32), 1, tl.standard._sum_combine)
                    p += to_float32(tl.load(offset_rows + group))[:, None] * x_sum[None, :]
            if X_GROUP > 0:
                p = p * tl.load(xs_rows + k0 // X_GROUP)[None, :]
            acc += p

    finish = True
    if SPLIT > 1:
        inside = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        place = parts + tile.to(tl.int64) * (BN * BM) + inside
        stride = tl.num_programs(0).to(tl.int64) * (BN * BM)
        tl.store(place + part * stride, acc.to(tl.int32, bitcast=True))
        # Every thread's part is written before the block says so.
        tl.debug_barrier()
        finish = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLIT - 1
        if finish:
            tl.debug_barrier()
            acc = tl.load(place, cache_modifier=".cg").to(acc.dtype, bitcast=True)
            for i in range(1, SPLIT):
                acc += tl.load(place + i * stride, cache_modifier=".cg").to(acc.dtype, bitcast=True)
            tl.store(arrived + tile, 0)

    if finish:
        out = acc.to(tl.float32) * out_1
        if SCALE == "end":
            s = load_scale(scale_rows, scale_table, gn >= 0)
            if FAR:
                s = s * near
            out = out * s[:, None]
        if FAR:
            out = out * tl.load(far + n + an)[:, None]
        if X_ROW == "token":
            out = out * tl.load(x_scale_2 + ax)[None, :]
        elif X_ROW == "tensor":
            out = out * tl.load(x_scale_2)
        if SCALE_2 == "channel":
            out = out * tl.load(scale_2 + an)[:, None]
        elif SCALE_2 == "tensor":
            out = out * tl.load(scale_2)
        elif SCALE_2 == "channel_divisor":
            out = tl.div_rn(out, tl.load(scale_2 + an)[:, None])
        elif SCALE_2 == "tensor_divisor":
            out = tl.div_rn(out, tl.load(scale_2))
        if FAR:
            out = out * tl.load(far + 2 * n + an)[:, None]
        out = out * out_2
        # Adding +0 turns the -0 of a zero sum times a negative scale into +0.
        if HAS_BIAS:
            out = out + to_float32(tl.load(bias + an))[:, None]
        else:
            out = out + 0.0
        if topk_weights is not None:
            out = out * to_float32(tl.load(topk_weights + am))[None, :]
        where = y + rm.to(tl.int64)[None, :] * n + rn[:, None]
        tl.store(where, round_to_output(out, y.dtype.element_ty), mask=(rm < m)[None, :] & (rn < n)[:, None])
