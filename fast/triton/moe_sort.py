"""Slots sorted by expert, stable, in two launches: count, then place. moe_align_block_size and moe_permute are this sort."""

import torch
import triton.language as tl

from .jit import Launcher, device_function, interprets, kernel, multiple_of_16, stride_kind

CHUNK = 256  # slots of a program
COUNTS = 8192  # counts that a program reads at a time


@device_function
def expert_of(ids, expert_map, slot, n, experts, last, MAP: tl.constexpr, LOCAL: tl.constexpr):
    """The expert that each slot is sorted by, -1 for none: as it is or, with LOCAL, as the map has it. Illegal ids and local indices that
    are not below `last` belong to none."""
    expert = tl.load(ids + slot, mask=slot < n, other=-1).to(tl.int64)
    expert = tl.where((expert >= 0) & (expert < experts), expert, -1)
    if MAP and LOCAL:
        expert = tl.load(expert_map + expert, mask=expert >= 0, other=-1).to(tl.int64)
    return tl.where((expert >= 0) & (expert < last), expert, -1).to(tl.int32)


@kernel(do_not_specialize=["n", "length", "blocks"])
def count_kernel(
    counts, order, owners, inverse, ids, expert_map, n, experts, last, length, blocks,
    MAP: tl.constexpr, LOCAL: tl.constexpr, OWNERS: tl.constexpr, INVERSE: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """How many slots of a chunk each expert has, added to zeros; and what order, owners and inverse hold where nothing is placed."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    slot = program * CHUNK + tl.arange(0, CHUNK)
    expert = expert_of(ids, expert_map, slot, n, experts, last, MAP, LOCAL)
    tl.atomic_add(counts + program.to(tl.int64) * EXPERTS + expert, 1, mask=(slot < n) & (expert >= 0), sem="relaxed")
    for start in range(program * CHUNK, length, programs * CHUNK):
        at = start + tl.arange(0, CHUNK)
        tl.store(order + at, n, mask=at < length)
    if OWNERS:
        for start in range(program * CHUNK, blocks, programs * CHUNK):
            at = start + tl.arange(0, CHUNK)
            tl.store(owners + at, -1, mask=at < blocks)
    if INVERSE:
        tl.store(inverse + slot, -1, mask=slot < n)


@kernel(do_not_specialize=["n", "chunks"])
def place_kernel(
    order, owners, inverse, offsets, end, counts, ids, expert_map, n, experts, last, chunks, block,
    MAP: tl.constexpr, LOCAL: tl.constexpr, OWNERS: tl.constexpr, INVERSE: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr,
    READ: tl.constexpr, STEP: tl.constexpr, OWNED: tl.constexpr,
):  # fmt: skip
    """Each slot of a chunk to its place: behind the experts before its own, the chunks before this one, and the slots before it."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    lane = tl.arange(0, EXPERTS)
    total = tl.full((EXPERTS,), 0, tl.int32)
    before = tl.full((EXPERTS,), 0, tl.int32)
    for start in range(0, chunks, READ):
        chunk = start + tl.arange(0, READ)
        c = tl.load(counts + chunk[:, None] * EXPERTS + lane[None, :], mask=(chunk < chunks)[:, None], other=0)
        total += tl.reduce(c, 0, tl.standard._sum_combine)
        before += tl.reduce(tl.where((chunk < program)[:, None], c, 0), 0, tl.standard._sum_combine)
    whole = (total + block - 1) // block
    ends = tl.associative_scan(whole, 0, tl.standard._sum_combine)
    starts = (ends - whole) * block

    slot = program * CHUNK + tl.arange(0, CHUNK)
    expert = expert_of(ids, expert_map, slot, n, experts, last, MAP, LOCAL)
    rank = tl.full((CHUNK,), 0, tl.int32)
    for start in range(0, CHUNK, STEP):
        other = program * CHUNK + start + tl.arange(0, STEP)
        theirs = expert_of(ids, expert_map, other, n, experts, last, MAP, LOCAL)
        rank += tl.reduce(
            ((expert[:, None] == theirs[None, :]) & (other[None, :] < slot[:, None])).to(tl.int32), 1, tl.standard._sum_combine
        )
    placed = (slot < n) & (expert >= 0)
    at = tl.gather(starts + before, tl.where(placed, expert, 0), 0) + rank
    tl.store(order + at, slot, mask=placed)
    if INVERSE:
        tl.store(inverse + slot, at, mask=placed)
    if program == 0:
        tl.store(offsets + lane, starts.to(offsets.dtype.element_ty), mask=lane < last)
        final = tl.reduce(whole, 0, tl.standard._sum_combine) * block
        tl.store(offsets + last, final.to(offsets.dtype.element_ty))
        tl.store(end, final)
    if OWNERS:
        # Block b belongs to the expert that so many others end before or at.
        filled = tl.reduce(whole, 0, tl.standard._sum_combine)
        for start in range(program * OWNED, filled, programs * OWNED):
            b = start + tl.arange(0, OWNED)
            owner = tl.reduce((ends[None, :] <= b[:, None]).to(tl.int32), 1, tl.standard._sum_combine)
            if MAP and not LOCAL:
                owner = tl.load(expert_map + owner, mask=b < filled, other=-1).to(tl.int32)
                owner = tl.where(owner < 0, -1, owner)
            tl.store(owners + b, owner, mask=b < filled)


@kernel(do_not_specialize=["rows"])
def copy_rows_kernel(y, x, order, rows, n, t, k, stride_x, BLOCK: tl.constexpr):
    """y[row] = x[order[row] // t], zeros where order has no slot."""
    row = tl.program_id(0)
    slot = tl.load(order + row)
    here = slot < n
    source = (tl.where(here, slot, 0) // t).to(tl.int64) * stride_x
    for start in range(tl.program_id(1) * BLOCK, k, tl.num_programs(1) * BLOCK):
        column = start + tl.arange(0, BLOCK)
        v = tl.load(x + source + column, mask=column < tl.where(here, k, 0), other=0)
        tl.store(y + row.to(tl.int64) * k + column, v, mask=column < k)


_count, _place, _copy = Launcher(count_kernel), Launcher(place_kernel), Launcher(copy_rows_kernel)


def sort_slots(ids, experts, last, block, expert_map, local, length, blocks=0, inverse=None, offsets_dtype=torch.int64):
    """Slots in the order of their experts, each expert's from a multiple of `block` on.

    Args:
        ids: (m, t) contiguous. experts: legal ids are below it. last: experts that are sorted by are below it.
        local: whether the map is applied before (slots of other ranks are left out) or after (their blocks belong to -1).
        length: of the order. blocks: of owners; 0: none are wanted.
        inverse: int32, as many as ids, to be filled with each slot's place, or None.

    Returns:
        order int32 (length,), owners int32 (blocks,), offsets (last + 1,), end int32 (1,).
    """
    device, n = ids.device, ids.numel()
    lanes = max(1 << max(last - 1, 0).bit_length(), 2)
    chunks = max(-(-n // CHUNK), 1)
    counts = torch.zeros(chunks, lanes, dtype=torch.int32, device=device)
    order = torch.empty(length, dtype=torch.int32, device=device)
    owners = torch.empty(blocks, dtype=torch.int32, device=device)
    offsets = torch.empty(last + 1, dtype=offsets_dtype, device=device)
    end = torch.empty(1, dtype=torch.int32, device=device)
    flags = {
        "MAP": expert_map is not None,
        "LOCAL": local,
        "OWNERS": blocks > 0,
        "INVERSE": inverse is not None,
        "EXPERTS": lanes,
        "CHUNK": CHUNK,
    }
    where = ids if inverse is None else inverse
    mapped = ids if expert_map is None else expert_map
    kind = (
        ids.dtype,
        mapped.dtype,
        where.dtype,
        offsets_dtype,
        *map(multiple_of_16, (ids, mapped, where)),
        experts,
        last,
        block,
        *flags.values(),
    )
    args = (counts, order, owners, where, ids, mapped, n, experts, last, length, blocks)
    _count(kind, (chunks, 1, 1), args, flags, {"num_warps": 4})
    args = (order, owners, where, offsets, end, counts, ids, mapped, n, experts, last, chunks, block)
    read = max(1, min(COUNTS // lanes, 1 << (chunks - 1).bit_length()))
    steps = {"STEP": CHUNK, "OWNED": CHUNK} if interprets(device) else {"STEP": 64, "OWNED": max(8, min(64, COUNTS // lanes))}
    place = flags | {"READ": read} | steps
    _place((*kind, read), (chunks, 1, 1), args, place, {"num_warps": 8})
    return order, owners, offsets, end


def copy_rows(x, order, n, t, out):
    """out[row] = x[order[row] // t], zeros where order[row] is n."""
    rows, k = out.shape
    if rows == 0 or k == 0:
        return
    block = 1 << (k - 1).bit_length() if interprets(x.device) else min(2048, max(64, 1 << (k - 1).bit_length()))
    constants = {"BLOCK": block}
    kind = (x.dtype, multiple_of_16(x), multiple_of_16(out), stride_kind(x.stride(0)), n == 1, n % 16 == 0, t, k, block)
    _copy(kind, (rows, 1, 1), (out, x, order, rows, n, t, k, x.stride(0)), constants, {"num_warps": 4})
