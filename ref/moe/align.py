"""Rows sorted by expert and padded to whole blocks: what an indexed grouped product reads."""

import torch

from .expert_map import local_ids


def moe_align_block_size(topk_ids, block_size, num_experts, expert_map=None, pad_sorted_ids=False, ignore_invalid_experts=False):
    """Slots in the order of their experts, each expert's padded to whole blocks.

    Slot i is token i // top_k. For each expert, ascending, the slots that chose it follow each other in their own order, and
    then the sentinel n = topk_ids.numel() up to a multiple of block_size. Negative ids belong to no expert and are left out.

    With an expert_map, experts of other ranks either keep their blocks, with expert -1 (whose rows a product writes as zeros), or,
    with ignore_invalid_experts, are left out as if nobody had chosen them.

    Args:
        topk_ids: (m, top_k), integer, less than num_experts.
        block_size: rows of a block.
        num_experts: of all ranks together.
        expert_map: (num_experts,), the local index of each expert or -1, or None.
        pad_sorted_ids: the length of the first result is rounded up to whole blocks.

    Returns:
        sorted_token_ids: int32 (n + num_experts (block_size - 1),), or (n block_size,) where that is less; n behind the end.
        expert_ids: int32, the (local) expert of each block of it; -1 behind the end.
        num_tokens_post_padded: int32 (1,), where the end is: a multiple of block_size.

    Raises:
        TypeError, ValueError: as local_ids, or block_size < 1.

    Source: vLLM 0.33 moe_align_block_size. There the order within an expert is left open.

    >>> moe_align_block_size(torch.tensor([[1], [0], [1]]), 2, 2)[0]
    tensor([1, 3, 0, 2, 3], dtype=torch.int32)
    """
    _positive(block_size, "moe_align_block_size")
    n = topk_ids.numel()
    ids = local_ids(topk_ids, num_experts).flatten()
    local = local_ids(topk_ids, num_experts, expert_map).flatten()
    if ignore_invalid_experts:
        ids = local
    length = min(n + num_experts * (block_size - 1), n * block_size)
    if pad_sorted_ids:
        length = -(-length // block_size) * block_size
    device = topk_ids.device
    sorted_ids = torch.full((length,), n, dtype=torch.int32, device=device)
    expert_ids = torch.full((-(-length // block_size),), -1, dtype=torch.int32, device=device)
    at = 0
    for expert in ids[ids >= 0].unique().tolist():
        slots = (ids == expert).nonzero().flatten()
        sorted_ids[at : at + slots.numel()] = slots.to(torch.int32)
        end = at + -(-slots.numel() // block_size) * block_size
        expert_ids[at // block_size : end // block_size] = local[slots[0]].to(torch.int32)
        at = end
    return sorted_ids, expert_ids, torch.tensor([at], dtype=torch.int32, device=device)


def batched_moe_align_block_size(max_tokens, block_size, counts):
    """The same for rows that already lie by expert, (experts, max_tokens, k), of which the first counts[e] are tokens.

    Row j of expert e has the index e * max_tokens + j; the sentinel is experts * max_tokens.

    Args:
        counts: (experts,), integer, 0 to max_tokens.

    Returns:
        As moe_align_block_size, the first of length experts * round_up(max_tokens, block_size).

    Raises:
        ValueError: a count out of range, or block_size < 1.

    Source: vLLM 0.33 batched_moe_align_block_size (its code).

    >>> batched_moe_align_block_size(8, 4, torch.tensor([2, 3, 0, 6, 8]))[1]
    tensor([ 0,  1,  3,  3,  4,  4, -1, -1, -1, -1], dtype=torch.int32)
    """
    _positive(block_size, "batched_moe_align_block_size")
    if counts.numel() and not 0 <= int(counts.min()) <= int(counts.max()) <= max_tokens:
        raise ValueError(
            f"batched_moe_align_block_size: counts range from {int(counts.min())} to {int(counts.max())}, expected 0 to {max_tokens}"
        )
    experts, blocks = counts.numel(), -(-max_tokens // block_size)
    sorted_ids = torch.full((experts * blocks * block_size,), experts * max_tokens, dtype=torch.int32, device=counts.device)
    expert_ids = torch.full((experts * blocks,), -1, dtype=torch.int32, device=counts.device)
    at = 0
    for expert, count in enumerate(counts.tolist()):
        sorted_ids[at : at + count] = torch.arange(count, dtype=torch.int32, device=counts.device) + expert * max_tokens
        end = at + -(-count // block_size) * block_size
        expert_ids[at // block_size : end // block_size] = expert
        at = end
    return sorted_ids, expert_ids, torch.tensor([at], dtype=torch.int32, device=counts.device)


def _positive(block_size, operation):
    if block_size < 1:
        raise ValueError(f"{operation}: got block_size={block_size}, expected at least 1")
