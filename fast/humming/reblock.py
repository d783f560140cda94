"""Blocks of one expert each, as somebody else made them, as the blocks of a kernel that believes what it is given."""

import torch
import triton.language as tl

from fast.triton.jit import Launcher, kernel, multiple_of_16


@kernel(do_not_specialize=["length", "slots", "experts"])
def reblock_kernel(
    ids, owners, end, y, sorted_ids, expert_ids, padded, length, slots, experts, n,
    GIVEN: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of ROWS rows, of PARTS that a given block of GIVEN rows becomes. Rows of blocks without an expert become zeros in y.

    SPAN: the power of two that ROWS fit in.
    """
    block = tl.program_id(0)
    given = block // PARTS
    stop = tl.minimum(tl.load(padded), length)
    row = tl.arange(0, SPAN)
    within = (block % PARTS) * ROWS + row
    at = given * GIVEN + within
    slot = tl.load(sorted_ids + at, mask=(row < ROWS) & (within < GIVEN) & (at < stop), other=-1)
    inside = (slot >= 0) & (slot < slots)
    expert = tl.load(expert_ids + given)
    known = (expert >= 0) & (expert < experts)
    tl.store(ids + block * ROWS + row, tl.where(inside & known, slot, slots), mask=row < ROWS)
    tl.store(owners + block, tl.where(known, expert, 0))
    if block == 0:
        tl.store(end, (stop + GIVEN - 1) // GIVEN * (PARTS * ROWS))
    if known == 0:
        for start in range(0, n, BLOCK):
            column = start + tl.arange(0, BLOCK)
            here = y + slot.to(tl.int64)[:, None] * n + column[None, :]
            tl.store(here, tl.full((SPAN, BLOCK), 0, y.dtype.element_ty), mask=inside[:, None] & (column < n)[None, :])


_launch = Launcher(reblock_kernel)


def reblock(sorted_ids, expert_ids, padded, given, rows, experts, y):
    """Blocks of `given` rows as blocks of `rows`, none of an expert that does not exist: those become zeros in y.

    Args:
        sorted_ids, expert_ids, padded: int32, as moe_align_block_size gives them.
        y: (slots, n) contiguous.

    Returns:
        The same three, whatever was in them safe to follow.
    """
    parts = -(-given // rows)
    blocks = expert_ids.numel() * parts
    made = [torch.empty(size, dtype=torch.int32, device=y.device) for size in (blocks * rows, blocks, 1)]
    slots, n = y.shape
    span = 1 << (rows - 1).bit_length()
    constants = {"GIVEN": given, "PARTS": parts, "ROWS": rows, "SPAN": span, "BLOCK": max(16, 2048 // span)}
    args = (*made, y, sorted_ids, expert_ids, padded, sorted_ids.numel(), slots, experts, n)
    kind = (y.dtype, *map(multiple_of_16, (y, sorted_ids, expert_ids, padded)), n, *constants.values())
    if blocks:
        _launch(kind, (blocks, 1, 1), args, constants, {"num_warps": 1 if rows < 64 else 4})
    else:
        made[2].zero_()
    return made
