"""The weighted sum of what a token's experts returned."""

import torch

from ..rounding import round_to
from .check import check_mul_sum
from .expert_map import local_ids


def moe_fused_mul_sum(inputs, topk_weights, topk_ids=None, expert_map=None):
    """Weighted sum of each token's expert outputs.

    y[m, :] = sum over t of topk_weights[m, t] * inputs[m, t, :], over the slots whose expert lives here.

    Args:
        inputs: (m, t, k), fp32, fp16 or bf16: row (m, t) is what slot t's expert returned for token m. Rows of other slots are not read.
        topk_weights: (m, t), any float dtype.
        topk_ids: (m, t), integer; a negative id marks an empty slot. Needed with expert_map.
        expert_map: (e_global,), integer: local index of each expert, -1 where it lives on another rank.

    Returns:
        (m, k), dtype of inputs: float64 sums, rounded once. A token with no local slot gives zeros.

    Raises:
        TypeError, ValueError: shapes or dtypes disagree, or an id is not below e_global.

    Source: vLLM moe_fused_mul_sum (pull request 34556), which leaves rows without a local slot as they were.

    >>> moe_fused_mul_sum(torch.ones(1, 2, 3), torch.tensor([[0.5, 0.25]]))
    tensor([[0.7500, 0.7500, 0.7500]])
    """
    check_mul_sum(inputs, topk_weights, topk_ids, expert_map)
    here = torch.ones(topk_weights.shape, dtype=torch.bool, device=inputs.device)
    if topk_ids is not None:
        experts = torch.iinfo(torch.int64).max if expert_map is None else expert_map.shape[0]
        here = local_ids(topk_ids, experts, expert_map) >= 0
    y = inputs.new_zeros(inputs.shape[0], inputs.shape[2], dtype=torch.float64)
    for slot in range(inputs.shape[1]):
        rows = here[:, slot]
        y[rows] += topk_weights[rows, slot, None].to(torch.float64) * inputs[rows, slot].to(torch.float64)
    return round_to(y, inputs.dtype)
