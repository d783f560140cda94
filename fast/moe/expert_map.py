"""Expert parallelism: which experts live on which rank, and how many rows a rank has to expect."""

import torch

PLACEMENTS = ("linear", "round_robin")


def expert_map(num_experts, ranks, rank, placement="linear", device=None):
    """ref.expert_map: int32 (num_experts,), the local index of each expert on one rank, or -1."""
    if ranks < 1 or not 0 <= rank < ranks or num_experts < 0:
        raise ValueError(f"expert_map: got rank {rank} of {ranks} with {num_experts} experts, expected 0 <= rank < ranks")
    if placement not in PLACEMENTS:
        raise ValueError(f"expert_map: unknown placement {placement!r}, expected one of {', '.join(PLACEMENTS)}")
    local = torch.full((num_experts,), -1, dtype=torch.int32, device=device)
    if placement == "round_robin":
        mine = local[rank::ranks]
    else:
        start = rank * (num_experts // ranks) + min(rank, num_experts % ranks)
        mine = local[start : start + num_experts // ranks + (rank < num_experts % ranks)]
    mine.copy_(torch.arange(mine.numel(), dtype=torch.int32, device=device))
    return local


def get_global_valid_shape_m(m, top_k, num_tokens_across_dp=None):
    """ref.get_global_valid_shape_m: rows that all ranks' tokens make together."""
    tokens = [m] if num_tokens_across_dp is None else num_tokens_across_dp
    return top_k * sum(map(int, tokens))


def estimate_local_valid_shape_m(global_valid_m, num_local_experts, num_experts):
    """ref.estimate_local_valid_shape_m: rows that fall to a rank, were routing even."""
    whole, rest = divmod(global_valid_m * num_local_experts, num_experts)
    return whole + (rest > 0)


def local_ids(topk_ids, num_experts, mapped):
    """Each slot's local expert, -1 for empty slots, illegal ids and experts of other ranks: int64, no synchronisation."""
    ids = topk_ids.long()
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, -1)
    if mapped is None:
        return ids
    return torch.where(ids < 0, -1, mapped.long()[ids.clamp(min=0)]).clamp(min=-1)
