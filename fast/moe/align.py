"""Rows sorted by expert and padded to whole blocks: what an indexed grouped product reads."""

import torch

from .choose import check_devices, check_ids, check_integers, choose
from .expert_map import local_ids
from .permute import _contiguous, _places


def moe_align_block_size(
    topk_ids, block_size, num_experts, expert_map=None, pad_sorted_ids=False, ignore_invalid_experts=False, *, impl=None
):
    """ref.moe_align_block_size at speed, in the same stable order. Ids out of range belong to no expert, as negative ones do.

    Args:
        impl: None for the fastest, or "triton" or "torch".
        The rest, and the result: as ref.moe_align_block_size.
    """
    if block_size < 1:
        raise ValueError(f"moe_align_block_size: got block_size={block_size}, expected at least 1")
    check_integers("moe_align_block_size", topk_ids=topk_ids, expert_map=expert_map)
    check_devices("moe_align_block_size", topk_ids, expert_map=expert_map)
    if expert_map is not None and tuple(expert_map.shape) != (num_experts,):
        raise ValueError(f"moe_align_block_size: expert_map has shape {tuple(expert_map.shape)}, expected ({num_experts},)")
    chosen = choose("moe_align_block_size", impl, topk_ids.device)
    check_ids("moe_align_block_size", topk_ids, num_experts)
    n = topk_ids.numel()
    length = min(n + num_experts * (block_size - 1), n * block_size)
    if pad_sorted_ids:
        length = -(-length // block_size) * block_size
    blocks = -(-length // block_size)
    if chosen == "triton":
        from fast.triton import moe_sort

        order, owners, _, end = moe_sort.sort_slots(
            topk_ids.contiguous(), num_experts, num_experts, block_size, _contiguous(expert_map), ignore_invalid_experts, length, blocks
        )
        return order, owners, end
    ids = local_ids(topk_ids, num_experts, expert_map if ignore_invalid_experts else None).flatten()
    ids = torch.where(ids < num_experts, ids, -1)
    offsets, place = _places(ids, num_experts, block_size)
    order = torch.full((length + 1,), n, dtype=torch.int32, device=topk_ids.device)
    order[torch.where(ids < 0, length, place)] = torch.arange(n, dtype=torch.int32, device=topk_ids.device)
    start = torch.arange(blocks, device=topk_ids.device) * block_size
    owners = torch.searchsorted(offsets[1:], start, right=True)
    if expert_map is not None and not ignore_invalid_experts:
        owners = torch.cat((expert_map.long(), expert_map.new_full((1,), -1).long()))[owners]
    owners = torch.where(start < offsets[-1], owners, -1).clamp(min=-1)
    return order[:length], owners.to(torch.int32), offsets[-1:].to(torch.int32)


def batched_moe_align_block_size(max_tokens, block_size, counts, *, impl=None):
    """ref.batched_moe_align_block_size; a count beyond max_tokens counts as max_tokens. A few small kernels of torch's on every device."""
    if block_size < 1:
        raise ValueError(f"batched_moe_align_block_size: got block_size={block_size}, expected at least 1")
    choose("batched_moe_align_block_size", impl, counts.device, has=("torch",))
    check_integers("batched_moe_align_block_size", counts=counts)
    check_ids("batched_moe_align_block_size: counts", counts, max_tokens + 1)
    experts, blocks = counts.numel(), -(-max_tokens // block_size)
    device = counts.device
    rows = counts.long().clamp(0, max_tokens)
    whole = (rows + block_size - 1) // block_size
    ends = whole.cumsum(0)
    block = torch.arange(experts * blocks, device=device)
    owner = torch.searchsorted(ends, block, right=True)
    used = owner < experts
    held = owner.clamp(max=max(experts - 1, 0))
    if experts == 0:
        return block.to(torch.int32), block.to(torch.int32), torch.zeros(1, dtype=torch.int32, device=device)
    row = ((block - (ends - whole)[held]) * block_size)[:, None] + torch.arange(block_size, device=device)
    index = torch.where(used[:, None] & (row < rows[held, None]), held[:, None] * max_tokens + row, experts * max_tokens)
    return index.flatten().to(torch.int32), torch.where(used, owner, -1).to(torch.int32), (ends[-1:] * block_size).to(torch.int32)
