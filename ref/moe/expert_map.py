"""Expert parallelism: which experts live on which rank, and how many rows a rank has to expect."""

import torch

PLACEMENTS = ("linear", "round_robin")


def expert_map(num_experts, ranks, rank, placement="linear", device=None):
    """The local index of each expert on one rank, -1 for those that live elsewhere.

    "linear": neighbours live together; the first num_experts % ranks ranks have one more. "round_robin": expert i lives on rank
    i % ranks. Local indices ascend with the expert.

    Returns:
        int32 (num_experts,).

    Raises:
        ValueError: no such rank or placement.

    Source: vLLM expert_map_manager (its code, not its docstring, which has the last ranks take the remainder).

    >>> expert_map(5, ranks=2, rank=1)
    tensor([-1, -1, -1,  0,  1], dtype=torch.int32)
    """
    if ranks < 1 or not 0 <= rank < ranks or num_experts < 0:
        raise ValueError(f"expert_map: got rank {rank} of {ranks} with {num_experts} experts, expected 0 <= rank < ranks")
    if placement not in PLACEMENTS:
        raise ValueError(f"expert_map: unknown placement {placement!r}, expected one of {', '.join(PLACEMENTS)}")
    experts = torch.arange(num_experts, device=device)
    if placement == "round_robin":
        here, local = experts % ranks == rank, experts // ranks
    else:
        each, more = divmod(num_experts, ranks)
        start = rank * each + min(rank, more)
        here, local = (experts >= start) & (experts < start + each + (rank < more)), experts - start
    return torch.where(here, local, -1).to(torch.int32)


def get_global_valid_shape_m(m, top_k, num_tokens_across_dp=None):
    """Rows that all ranks' tokens make together: tokens times top_k.

    Args:
        m: this rank's tokens; all there are where num_tokens_across_dp is None.
        num_tokens_across_dp: tokens of each data-parallel rank.
    """
    return (m if num_tokens_across_dp is None else sum(int(tokens) for tokens in num_tokens_across_dp)) * top_k


def estimate_local_valid_shape_m(global_valid_m, num_local_experts, num_experts):
    """Rows that fall to a rank, were routing even: ceil(global_valid_m * num_local_experts / num_experts)."""
    return -(-global_valid_m * num_local_experts // num_experts)


def local_ids(topk_ids, num_experts, expert_map=None):
    """Each slot's expert as a local index, -1 where the slot is empty or its expert lives elsewhere: int64, shape of topk_ids.

    Raises:
        TypeError, ValueError: ids or map are no integers, an id is not below num_experts, the map has another length, or its
            local indices are not 0, 1, ... in some order.
    """
    if not isinstance(topk_ids, torch.Tensor) or topk_ids.dtype.is_floating_point or topk_ids.dtype == torch.bool:
        raise TypeError(f"topk_ids: got {getattr(topk_ids, 'dtype', type(topk_ids).__name__)}, expected an integer tensor")
    if topk_ids.numel() and int(topk_ids.max()) >= num_experts:
        raise ValueError(f"topk_ids: reach {int(topk_ids.max())}, expected less than {num_experts}, the number of experts")
    ids = topk_ids.long().clamp(min=-1)
    if expert_map is None:
        return ids
    if expert_map.dtype.is_floating_point or tuple(expert_map.shape) != (num_experts,):
        raise ValueError(f"expert_map: got {expert_map.dtype} {tuple(expert_map.shape)}, expected integers ({num_experts},)")
    local = expert_map[expert_map >= 0].sort().values
    if not torch.equal(local.long(), torch.arange(local.numel(), device=local.device)):
        raise ValueError(f"expert_map: got the local indices {local.tolist()}, expected each from 0 to {local.numel() - 1} once")
    return torch.where(ids < 0, -1, expert_map.long().clamp(min=-1)[ids.clamp(min=0)])
