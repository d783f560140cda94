"""Runs of rows as blocks of one expert each, by one small kernel: what fast.moe.blocks does in plain torch."""

import torch
import triton.language as tl

from .jit import Launcher, kernel, multiple_of_16


@kernel(do_not_specialize=["n", "blocks"])
def blocks_kernel(
    ids, owners, end, runs, n, blocks, experts, most, MASKED: tl.constexpr, BLOCK: tl.constexpr, RUNS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """One block a program. runs: offsets of contiguous rows, or (MASKED) how many of each expert's `most` rows count."""
    block = tl.program_id(0)
    run = tl.arange(0, RUNS)
    if MASKED:
        start = run.to(tl.int64) * most
        count = tl.load(runs + run, mask=run < experts, other=0).to(tl.int64)
        count = tl.minimum(tl.maximum(count, 0), most)
    else:
        # The rows behind the last expert's are one run more.
        start = tl.load(runs + run, mask=run <= experts, other=0).to(tl.int64)
        stop = tl.load(runs + run + 1, mask=run < experts, other=0).to(tl.int64)
        start = tl.minimum(tl.maximum(start, 0), n)
        stop = tl.where(run < experts, tl.minimum(tl.maximum(stop, 0), n), n)
        count = tl.where(run <= experts, tl.maximum(stop - start, 0), 0)
    whole = (count + BLOCK - 1) // BLOCK
    ends = tl.associative_scan(whole, 0, tl.standard._sum_combine)
    here = (ends - whole <= block) & (block < ends)
    number = block - tl.reduce(tl.where(here, ends - whole, 0), 0, tl.standard._sum_combine)
    first = tl.reduce(tl.where(here, start, 0), 0, tl.standard._sum_combine)
    rows = tl.reduce(tl.where(here, count, 0), 0, tl.standard._sum_combine)
    owner = tl.reduce(tl.where(here & (run < experts), run + 1, 0), 0, tl.standard._sum_combine) - 1
    inside = tl.arange(0, ROWS)
    row = number * BLOCK + inside
    tl.store(ids + block.to(tl.int64) * BLOCK + inside, tl.where(row < rows, first + row, n).to(tl.int32), mask=inside < BLOCK)
    tl.store(owners + block, owner)
    if block == 0:
        tl.store(end, tl.minimum(tl.reduce(whole, 0, tl.standard._sum_combine), blocks).to(tl.int32) * BLOCK)


_launch = Launcher(blocks_kernel)


def blocks(runs, n, block, count, most=None):
    """See fast.moe.blocks. most: None for offsets (e + 1,), else runs are counts (e,). count: how many blocks there can be.

    Returns:
        ids (count * block,), owners (count,), end (1,): int32.
    """
    experts = runs.numel() - (most is None)
    device = runs.device
    ids = torch.empty(count * block, dtype=torch.int32, device=device)
    owners = torch.empty(count, dtype=torch.int32, device=device)
    end = torch.empty(1, dtype=torch.int32, device=device)
    rows = 1 << (block - 1).bit_length()
    lanes = max(2, 1 << experts.bit_length())
    constants = {"MASKED": most is not None, "BLOCK": block, "RUNS": lanes, "ROWS": rows}
    kind = (runs.dtype, multiple_of_16(runs), experts, most, block)
    _launch(kind, (count, 1, 1), (ids, owners, end, runs, n, count, experts, 1 if most is None else most), constants, {"num_warps": 4})
    return ids, owners, end
