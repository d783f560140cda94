"""Rows brought together by expert, and back."""

import torch

from .choose import check_devices, check_ids, check_integers, choose
from .expert_map import local_ids
from .fused_mul_sum import _floats, _result


def moe_permute(x, topk_ids, num_experts, expert_map=None, *, num_local_experts=None, align=1, offset_dtype=torch.int64, impl=None):
    """ref.moe_permute at speed; rows behind the end of the last expert are zeros here too.

    Args:
        num_local_experts: how many experts the map keeps here: without it a GPU has to be waited for. Local indices beyond count as -1.
        impl: None for the fastest, or "triton" or "torch".
        The rest, and the result: as ref.moe_permute.
    """
    _check("moe_permute", x, topk_ids, num_experts, expert_map)
    if offset_dtype not in (torch.int32, torch.int64) or align < 1:
        raise ValueError(f"moe_permute: got offset_dtype={offset_dtype}, align={align}, expected torch.int32 or int64, and at least 1")
    chosen = choose("moe_permute", impl, x.device)
    experts = _local_experts("moe_permute", num_experts, expert_map, num_local_experts)
    n, t = topk_ids.numel(), topk_ids.shape[1]
    r = n + (align - 1) * experts
    if chosen == "triton":
        from fast.triton import moe_sort

        inverse = torch.empty(topk_ids.shape, dtype=torch.int32, device=x.device)
        order, _, offsets, _ = moe_sort.sort_slots(
            topk_ids.contiguous(),
            num_experts,
            experts,
            align,
            _contiguous(expert_map),
            True,
            r,
            inverse=inverse,
            offsets_dtype=offset_dtype,
        )
        rows = x.new_empty(r, x.shape[1])
        moe_sort.copy_rows(x if x.stride(1) == 1 else x.contiguous(), order, n, t, rows)
        return rows, offsets, inverse, order
    local = local_ids(topk_ids, num_experts, expert_map).flatten()
    local = torch.where(local < experts, local, -1)
    offsets, place = _places(local, experts, align)
    order = torch.full((r + 1,), n, dtype=torch.int32, device=x.device)
    order[torch.where(local < 0, r, place)] = torch.arange(n, dtype=torch.int32, device=x.device)
    order = order[:r]
    padded = torch.cat((x, x.new_zeros(1, x.shape[1])))
    rows = padded[torch.where(order < n, order // max(t, 1), x.shape[0]).long()]
    inverse = torch.where(local < 0, -1, place).to(torch.int32).view(topk_ids.shape)
    return rows, offsets.to(offset_dtype), inverse, order


def moe_unpermute(rows, topk_weights, inv_permuted_idx, *, impl=None, out=None):
    """ref.moe_unpermute at speed: float32 sums in the order of the slots, rounded once. Indices out of range are not read."""
    if rows.dim() != 2 or topk_weights.dim() != 2 or topk_weights.shape != inv_permuted_idx.shape:
        raise ValueError(
            f"moe_unpermute: rows have shape {tuple(rows.shape)}, topk_weights {tuple(topk_weights.shape)}, "
            f"inv_permuted_idx {tuple(inv_permuted_idx.shape)}, expected (r, k), (m, t) and (m, t)"
        )
    if rows.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not topk_weights.dtype.is_floating_point:
        raise TypeError(f"moe_unpermute: rows are {rows.dtype}, topk_weights {topk_weights.dtype}, expected fp32, fp16 or bf16, and floats")
    check_integers("moe_unpermute", inv_permuted_idx=inv_permuted_idx)
    check_devices("moe_unpermute", rows, topk_weights=topk_weights, inv_permuted_idx=inv_permuted_idx)
    chosen = choose("moe_unpermute", impl, rows.device)
    check_ids("moe_unpermute", inv_permuted_idx, rows.shape[0])
    m, t = topk_weights.shape
    y = _result("moe_unpermute", rows, m, rows.shape[1], out)
    if chosen == "triton":
        from fast.triton import moe_sum

        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        moe_sum.moe_unpermute(rows, _floats(topk_weights), inv_permuted_idx.contiguous(), y)
        return y
    padded = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))
    total = torch.zeros(m, rows.shape[1], dtype=torch.float32, device=rows.device)
    for slot in range(t):
        index = inv_permuted_idx[:, slot].long()
        here = (index >= 0) & (index < rows.shape[0])
        part = topk_weights[:, slot, None].float() * padded[torch.where(here, index, rows.shape[0])].float()
        total += torch.where(here[:, None], part, 0.0)
    return y.copy_(total)


def moe_scatter_masked(x, topk_ids, num_experts, max_tokens, expert_map=None, *, num_local_experts=None, impl=None):
    """ref.moe_scatter_masked at speed. Rows beyond max_tokens of an expert are refused with FAST_DEBUG=1, and else left out."""
    _check("moe_scatter_masked", x, topk_ids, num_experts, expert_map)
    chosen = choose("moe_scatter_masked", impl, x.device)
    experts = _local_experts("moe_scatter_masked", num_experts, expert_map, num_local_experts)
    rows, offsets, inverse, _ = moe_permute(x, topk_ids, num_experts, expert_map, num_local_experts=experts, impl=chosen)
    counts = offsets.diff()
    check_ids("moe_scatter_masked: rows of an expert", counts, max_tokens + 1)
    plane = torch.arange(max_tokens, device=x.device)
    source = torch.where(plane < counts[:, None], offsets[:-1, None] + plane, rows.shape[0])
    padded = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))
    local = local_ids(topk_ids, num_experts, expert_map)
    local = torch.where(local < experts, local, -1)
    within = inverse - offsets[local.clamp(min=0)] if experts else inverse
    held = (local >= 0) & (within < max_tokens)
    moved = torch.where(held, local * max_tokens + within, -1).to(torch.int32)
    return padded[source], counts.clamp(max=max_tokens).to(torch.int32), moved


def _places(local, experts, align):
    """Where each expert's rows begin and the last ones end, int64 (experts + 1,), and the row of each slot."""
    one_hot = local[:, None] == torch.arange(experts, device=local.device)
    whole = (one_hot.sum(0) + align - 1) // align * align
    offsets = torch.cat((whole.new_zeros(1), whole.cumsum(0)))
    rank = (one_hot.cumsum(0) - 1).gather(1, local.clamp(min=0)[:, None]).flatten() if experts else torch.zeros_like(local)
    return offsets, offsets[local.clamp(min=0)] + rank


def _local_experts(operation, num_experts, expert_map, num_local_experts):
    if expert_map is None and num_local_experts not in (None, num_experts):
        raise ValueError(f"{operation}: got num_local_experts={num_local_experts} without expert_map, and there are {num_experts} experts")
    if num_local_experts is not None:
        return num_local_experts
    return num_experts if expert_map is None else int((expert_map >= 0).sum())


def _contiguous(tensor):
    return None if tensor is None else tensor.contiguous()


def _check(operation, x, topk_ids, num_experts, expert_map):
    if x.dim() != 2 or topk_ids.dim() != 2 or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(f"{operation}: x has shape {tuple(x.shape)}, topk_ids {tuple(topk_ids.shape)}, expected (m, k) and (m, top_k)")
    check_integers(operation, topk_ids=topk_ids, expert_map=expert_map)
    check_devices(operation, x, topk_ids=topk_ids, expert_map=expert_map)
    if expert_map is not None and tuple(expert_map.shape) != (num_experts,):
        raise ValueError(f"{operation}: expert_map has shape {tuple(expert_map.shape)}, expected ({num_experts},)")
    check_ids(operation, topk_ids, num_experts)
