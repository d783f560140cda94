"""The weighted sum of what a token's experts returned, and the gathered sum of moe_unpermute: one kernel."""

import torch
import triton.language as tl

from .decode import round_to_output, to_float32
from .jit import Launcher, interprets, kernel, multiple_of_16, stride_kind


@kernel(do_not_specialize=["m"])
def moe_sum_kernel(
    y, x, weights, ids, expert_map, m, t, k, experts, stride_m, stride_t,
    IDS: tl.constexpr, MAP: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of y[row] = sum over slots of weights[row, slot] * x[row, slot], over the slots that live here; a block of threads a program.

    ids: (m, t): without IDS every slot counts; with it those not below zero; with MAP those below `experts` that the map keeps.
    ROWS: ids are rows of x instead, of which there are `experts`. A slot that does not count is not read.
    """
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < k
    acc = tl.full((BLOCK,), 0, tl.float32)
    # Without a branch, so that every slot's loads are on their way before the first is added.
    for slot in tl.static_range(SLOTS):
        at = row.to(tl.int64) * t + slot
        here = row < m
        if ROWS:
            source = tl.load(ids + at).to(tl.int64)
            here = (source >= 0) & (source < experts)
            start = source * stride_m
        else:
            start = row.to(tl.int64) * stride_m + tl.full((), slot, tl.int64) * stride_t
            if IDS:
                expert = tl.load(ids + at).to(tl.int64)
                here = expert >= 0
                if MAP:
                    here = here & (expert < experts)
                    here = here & (tl.load(expert_map + expert, mask=here, other=-1) >= 0)
        weight = to_float32(tl.load(weights + at))
        v = to_float32(tl.load(x + start + column, mask=column < tl.where(here, k, 0), other=0.0))
        # A slot that does not count may have any weight, NaN included.
        acc += tl.where(here, weight * v, 0.0)
    tl.store(y + row.to(tl.int64) * k + column, round_to_output(acc, y.dtype.element_ty), mask=inside)


_launch = Launcher(moe_sum_kernel)


def moe_fused_mul_sum(inputs, topk_weights, topk_ids, expert_map, out):
    """out[m] = sum over t of topk_weights[m, t] * inputs[m, t]; arguments as fast.moe has checked them, columns of inputs adjacent."""
    m, t, k = inputs.shape
    experts = 0 if expert_map is None else expert_map.shape[0]
    strides = inputs.stride(0), inputs.stride(1)
    _run(out, inputs, topk_weights, topk_ids, expert_map, m, t, k, experts, strides, rows=False)


def moe_unpermute(rows, topk_weights, inv_permuted_idx, out):
    """out[m] = sum over t of topk_weights[m, t] * rows[inv_permuted_idx[m, t]]."""
    m, t = topk_weights.shape
    _run(out, rows, topk_weights, inv_permuted_idx, None, m, t, rows.shape[1], rows.shape[0], (rows.stride(0), 0), rows=True)


def _run(out, x, weights, ids, expert_map, m, t, k, experts, strides, rows):
    if m == 0 or k == 0:
        return
    if t == 0:
        out.zero_()
        return
    block, warps = tile(m, k, x.device)
    constants = {
        "IDS": ids is not None,
        "MAP": expert_map is not None,
        "ROWS": rows,
        "SLOTS": t,
        "BLOCK": block,
    }
    args = (out, x, weights, weights if ids is None else ids, weights if expert_map is None else expert_map, m, t, k, experts, *strides)
    kind = (
        *(tensor.dtype for tensor in args[:5]), *map(multiple_of_16, args[:5]), *map(stride_kind, (k, *strides)), t, experts == 1,
        experts % 16 == 0, warps, *constants.values(),
    )  # fmt: skip
    _launch(kind, (m, -(-k // block), 1), args, constants, {"num_warps": warps})


def tile(m, k, device):
    """Columns of a thread block, and its warps: 16 bytes a thread and load, and enough loads in flight for the memory of each architecture.

    Where that leaves multiprocessors idle, blocks of half as many columns, as measured on an H200 up to 4 rows.
    """
    whole = 1 << max(k - 1, 0).bit_length()
    if interprets(device):
        return whole, 4
    if torch.version.hip is not None:
        block, warps = 1024, 2  # of 64 threads
    else:
        block, warps = {7: (512, 2), 8: (1024, 4)}.get(torch.cuda.get_device_capability(device)[0], (1024, 4))
        if m * -(-k // block) < torch.cuda.get_device_properties(device).multi_processor_count:
            block = 512
    return (block, warps) if whole >= block else (max(whole, 16), max(1, whole * warps // block))
