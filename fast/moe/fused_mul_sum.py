"""The weighted sum of what a token's experts returned."""

import torch

from ref.moe.check import check_mul_sum

from .choose import check_ids, check_integers, choose
from .expert_map import local_ids


def moe_fused_mul_sum(inputs, topk_weights, topk_ids=None, expert_map=None, *, impl=None, out=None):
    """ref.moe_fused_mul_sum at speed: y[m] = sum over t of topk_weights[m, t] * inputs[m, t], over the slots whose expert lives here.

    Sums are kept in float32, in the order of the slots, and rounded once. Slots that are empty, whose expert lives elsewhere, or
    whose id is out of range are not read; a token without any other slot gives zeros.

    Args:
        inputs: (m, t, k), fp32, fp16 or bf16, any strides.
        topk_weights, topk_ids, expert_map: as ref.moe_fused_mul_sum.
        impl: None for the fastest, or "triton" or "torch".
        out: None, or where to write: (m, k), contiguous.

    Raises:
        TypeError, ValueError: arguments that do not fit each other. Ids out of range are refused with FAST_DEBUG=1 only.
    """
    check_mul_sum(inputs, topk_weights, topk_ids, expert_map)
    check_integers("moe_fused_mul_sum", topk_ids=topk_ids, expert_map=expert_map)
    if expert_map is not None and expert_map.dim() != 1:
        raise ValueError(f"moe_fused_mul_sum: expert_map has shape {tuple(expert_map.shape)}, expected (experts,)")
    chosen = choose("moe_fused_mul_sum", impl, inputs.device)
    if expert_map is not None:
        check_ids("moe_fused_mul_sum", topk_ids, expert_map.shape[0])
    m, _, k = inputs.shape
    y = _result("moe_fused_mul_sum", inputs, m, k, out)
    if chosen == "triton":
        from fast.triton import moe_sum

        inputs = inputs if inputs.stride(2) == 1 else inputs.contiguous()
        ids = None if topk_ids is None else topk_ids.contiguous()
        moe_sum.moe_fused_mul_sum(inputs, _floats(topk_weights), ids, None if expert_map is None else expert_map.contiguous(), y)
        return y
    here = None
    if topk_ids is not None:
        here = topk_ids >= 0 if expert_map is None else local_ids(topk_ids, expert_map.shape[0], expert_map) >= 0
    total = torch.zeros(m, k, dtype=torch.float32, device=inputs.device)
    for slot in range(inputs.shape[1]):
        part = topk_weights[:, slot, None].float() * inputs[:, slot].float()
        total += part if here is None else torch.where(here[:, slot, None], part, 0.0)
    return y.copy_(total)


def _floats(weights):
    return (weights.float() if weights.dtype == torch.float64 else weights).contiguous()


def _result(operation, like, m, k, out):
    if out is None:
        return like.new_empty(m, k)
    if tuple(out.shape) != (m, k) or out.dtype != like.dtype or out.device != like.device or not out.is_contiguous():
        got = f"shape {tuple(out.shape)} and dtype {out.dtype}, on {out.device}{'' if out.is_contiguous() else ', not contiguous'}"
        raise ValueError(f"{operation}: out has {got}, expected {(m, k)} and {like.dtype}, on {like.device}, contiguous")
    return out
