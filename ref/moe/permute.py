"""Rows brought together by expert, and back."""

import torch

from ..rounding import round_to
from .expert_map import local_ids


def moe_permute(x, topk_ids, num_experts, expert_map=None, *, num_local_experts=None, align=1, offset_dtype=torch.int64):
    """Each slot's row of x, in the order of the (local) experts; within an expert in the order of the slots.

    Slot i is token i // top_k. Slots that are empty or whose expert lives elsewhere have no row. With align > 1 every expert's
    rows begin at a multiple of it, and rows of zeros fill the gaps.

    Args:
        x: (m, k).
        topk_ids: (m, top_k), integer, less than num_experts.
        num_experts: of all ranks together; expert_map: as moe_align_block_size.
        num_local_experts: how many experts the map keeps here; None counts them, for which a GPU has to be waited for.
        offset_dtype: torch.int32 or torch.int64.

    Returns, with r = m top_k + (align - 1) local experts, the most rows that there can be:
        rows: (r, k), dtype of x. Those behind the end are zeros here; kernels may leave them as they were.
        expert_first_token_offset: offset_dtype (local experts + 1,): where each expert's rows begin, and the end.
        inv_permuted_idx: int32 (m, top_k): the row of each slot, -1 where it has none.
        permuted_idx: int32 (r,): the slot of each row, m * top_k for a row that fills a gap or is behind the end.

    Raises:
        TypeError, ValueError: as local_ids, shapes that disagree, or another offset_dtype.

    Source: vLLM 0.33 moe_permute (which keeps rows of remote slots behind the end) and DeepGEMM's contiguous layout.
    """
    if x.dim() != 2 or topk_ids.dim() != 2 or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(f"moe_permute: x has shape {tuple(x.shape)}, topk_ids {tuple(topk_ids.shape)}, expected (m, k) and (m, top_k)")
    if offset_dtype not in (torch.int32, torch.int64) or align < 1:
        raise ValueError(f"moe_permute: got offset_dtype={offset_dtype}, align={align}, expected torch.int32 or int64, and at least 1")
    local = local_ids(topk_ids, num_experts, expert_map).flatten()
    experts = num_experts if expert_map is None else int((expert_map >= 0).sum())
    if num_local_experts not in (None, experts):
        raise ValueError(f"moe_permute: got num_local_experts={num_local_experts}, and {experts} experts live here")
    counts = torch.bincount(local[local >= 0], minlength=experts)
    padded = -(-counts // align) * align
    offsets = torch.cat((padded.new_zeros(1), padded.cumsum(0)))
    slots = torch.where(local < 0, experts, local).sort(stable=True).indices[: int(counts.sum())]
    first = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    rows = offsets[local[slots]] + torch.arange(slots.numel(), device=x.device) - first[local[slots]]
    n = local.numel()
    r = n + (align - 1) * experts
    permuted_idx = torch.full((r,), n, dtype=torch.int32, device=x.device)
    permuted_idx[rows] = slots.to(torch.int32)
    inverse = torch.full((n,), -1, dtype=torch.int32, device=x.device)
    inverse[slots] = rows.to(torch.int32)
    out = x.new_zeros(r, x.shape[1])
    out[rows] = x[slots // max(topk_ids.shape[1], 1)]
    return out, offsets.to(offset_dtype), inverse.view_as(topk_ids), permuted_idx


def moe_unpermute(rows, topk_weights, inv_permuted_idx):
    """y[m, :] = sum over t of topk_weights[m, t] * rows[inv_permuted_idx[m, t], :], over the slots that have a row.

    Args:
        rows: (r, k), fp32, fp16 or bf16.
        topk_weights: (m, t), any float dtype.
        inv_permuted_idx: (m, t), integer, -1 where a slot has no row.

    Returns:
        (m, k), dtype of rows: float64 sums, rounded once.

    Raises:
        ValueError: shapes disagree, or an index is not below r.

    Source: vLLM 0.33 moe_unpermute.
    """
    if rows.dim() != 2 or topk_weights.dim() != 2 or topk_weights.shape != inv_permuted_idx.shape:
        raise ValueError(
            f"moe_unpermute: rows have shape {tuple(rows.shape)}, topk_weights {tuple(topk_weights.shape)}, "
            f"inv_permuted_idx {tuple(inv_permuted_idx.shape)}, expected (r, k), (m, t) and (m, t)"
        )
    if inv_permuted_idx.numel() and int(inv_permuted_idx.max()) >= rows.shape[0]:
        raise ValueError(f"moe_unpermute: inv_permuted_idx reaches {int(inv_permuted_idx.max())}, expected less than {rows.shape[0]} rows")
    y = rows.new_zeros(topk_weights.shape[0], rows.shape[1], dtype=torch.float64)
    for slot in range(topk_weights.shape[1]):
        here = inv_permuted_idx[:, slot] >= 0
        y[here] += topk_weights[here, slot, None].to(torch.float64) * rows[inv_permuted_idx[here, slot].long()].to(torch.float64)
    return round_to(y, rows.dtype)


def moe_scatter_masked(x, topk_ids, num_experts, max_tokens, expert_map=None, *, num_local_experts=None):
    """Each expert's rows of x in a plane of its own (the masked layout): (local experts, max_tokens, k), zeros behind the last.

    Returns:
        planes: (e, max_tokens, k), dtype of x.
        counts: int32 (e,): rows of each expert.
        inv_permuted_idx: int32 (m, top_k): e * max_tokens + j for row j of expert e, -1 for a slot without one.

    Raises:
        TypeError, ValueError: as moe_permute, or an expert with more than max_tokens rows.

    Source: DeepEP's low-latency layout, vLLM 0.33 batched experts.
    """
    rows, offsets, inverse, permuted = moe_permute(x, topk_ids, num_experts, expert_map, num_local_experts=num_local_experts)
    counts, end = offsets.diff(), int(offsets[-1])
    if counts.numel() and int(counts.max()) > max_tokens:
        raise ValueError(f"moe_scatter_masked: an expert has {int(counts.max())} rows, and planes hold {max_tokens}")
    experts = torch.repeat_interleave(torch.arange(counts.numel(), device=x.device), counts)
    place = experts * max_tokens + torch.arange(end, device=x.device) - offsets[experts]
    planes = x.new_zeros(counts.numel() * max_tokens, x.shape[1])
    planes[place] = rows[:end]
    moved = torch.full((inverse.numel(),), -1, dtype=torch.int32, device=x.device)
    moved[permuted[:end].long()] = place.to(torch.int32)
    return planes.view(counts.numel(), max_tokens, x.shape[1]), counts.to(torch.int32), moved.view_as(inverse)
