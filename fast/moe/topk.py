"""Routing: which experts a token goes to, and with what weight."""

import torch

from ref.moe.check import DENOMINATORS, check_topk

from .choose import check_devices, check_ids, check_integers, choose

# The kernel holds all experts of a token in registers.
MOST_EXPERTS = 4096


def fused_topk(
    logits,
    top_k,
    renormalize=True,
    *,
    scoring_func="softmax",
    correction_bias=None,
    num_expert_group=None,
    topk_group=None,
    routed_scaling_factor=1.0,
    num_shared_experts=0,
    shared_weight=1.0,
    num_valid=None,
    impl=None,
):
    """ref.fused_topk at speed: scores in float32. Without a bias a softmax chooses by the logits themselves, which are of the same order.

    Args:
        impl: None for the fastest, or "triton" or "torch".
        The rest, and the result: as ref.fused_topk.
    """
    check_topk(logits, top_k, renormalize, scoring_func, correction_bias, num_expert_group, topk_group, num_shared_experts, num_valid)
    check_devices("fused_topk", logits, correction_bias=correction_bias)
    return _topk(
        "fused_topk", logits, top_k, renormalize, scoring_func, correction_bias, num_expert_group, topk_group, routed_scaling_factor,
        num_shared_experts, shared_weight, num_valid, None, None, impl,
    )  # fmt: skip


def hash_topk(
    logits,
    table,
    tokens,
    renormalize=True,
    *,
    scoring_func="sqrtsoftplus",
    routed_scaling_factor=1.0,
    num_shared_experts=0,
    shared_weight=1.0,
    num_valid=None,
    impl=None,
):
    """ref.hash_topk at speed. A token or an expert out of its range gives id -1 and weight 0 (with FAST_DEBUG=1: ValueError)."""
    if table.dim() != 2 or tokens.shape != logits.shape[:1]:
        raise ValueError(f"hash_topk: table has shape {tuple(table.shape)}, tokens {tuple(tokens.shape)}, logits {tuple(logits.shape)}")
    check_topk(logits, table.shape[1], renormalize, scoring_func, None, None, None, num_shared_experts, num_valid)
    check_integers("hash_topk", table=table, tokens=tokens)
    check_devices("hash_topk", logits, table=table, tokens=tokens)
    check_ids("hash_topk: tokens", tokens, table.shape[0])
    check_ids("hash_topk: table", table, logits.shape[1])
    return _topk(
        "hash_topk", logits, table.shape[1], renormalize, scoring_func, None, None, None, routed_scaling_factor, num_shared_experts,
        shared_weight, num_valid, table, tokens, impl,
    )  # fmt: skip


def _topk(
    operation, logits, top_k, renormalize, scoring, bias, groups, kept, factor, shared, shared_weight, num_valid, table, tokens, impl
):
    chosen = choose(operation, impl, logits.device)
    m, e = logits.shape
    epsilon = DENOMINATORS["sum" if renormalize is True else renormalize] if renormalize else None
    logits = logits.detach()
    if chosen == "triton":
        if e > MOST_EXPERTS:
            raise NotImplementedError(
                f"{operation}: impl 'triton' takes at most {MOST_EXPERTS} experts, got {e}; impl 'torch' takes any number"
            )
        from fast.triton import moe_topk

        ids = torch.empty(m, top_k + shared, dtype=torch.int32, device=logits.device)
        weights = torch.empty(m, top_k + shared, dtype=torch.float32, device=logits.device)
        logits = logits.float() if logits.dtype == torch.float64 else logits
        moe_topk.fused_topk(
            logits if logits.stride(1) == 1 else logits.contiguous(), top_k, ids, weights, scoring_func=scoring,
            bias=None if bias is None else bias.float().contiguous(), groups=groups, kept=kept, epsilon=epsilon, factor=factor, shared=shared,
            shared_weight=shared_weight, num_valid=num_valid, table=None if table is None else table.contiguous(),
            tokens=None if tokens is None else tokens.contiguous(),
        )  # fmt: skip
        return ids, weights
    # float64 first: in float32 the vector and the scalar loops of torch's CPU kernels differ in last bits, and equals would not be equal.
    v = logits.double()
    if scoring == "softmax":
        score = v.softmax(1)
    else:
        score = v.sigmoid() if scoring == "sigmoid" else (v.clamp(min=0) + torch.log1p(torch.exp(-v.abs()))).sqrt()
    score = score.float()
    if table is None:
        ids = _best(v if scoring == "softmax" and bias is None else score, bias, groups, kept, top_k)
        weights = score.gather(1, ids)
    else:
        known = (tokens >= 0) & (tokens < table.shape[0])
        ids = torch.where(known[:, None], table.long()[torch.where(known, tokens, 0).long()], -1)
        ids = torch.where((ids >= 0) & (ids < e), ids, -1)
        weights = torch.where(ids < 0, 0.0, score.gather(1, ids.clamp(min=0)))
    if epsilon is not None:
        weights = weights / (weights.sum(1, keepdim=True) + epsilon)
        # With a table all slots of a row may be without an expert: 0 / 0 is 0 there.
        weights = weights if table is None else torch.where(ids < 0, 0.0, weights)
    weights = torch.cat((weights * factor, weights.new_full((m, shared), shared_weight)), 1)
    ids = torch.cat((ids, torch.arange(e, e + shared, device=ids.device).expand(m, -1)), 1).to(torch.int32)
    if num_valid is not None:
        ids[num_valid:], weights[num_valid:] = -1, 0.0
    return ids, weights


def _best(worth, bias, groups, kept, top_k):
    """The experts worth most, the lower of equals first."""
    worth = (worth if bias is None else worth + bias.float()).nan_to_num(-torch.inf, torch.inf, -torch.inf)
    if groups is not None:
        planes = worth.unflatten(1, (groups, -1))
        size = planes.shape[2]
        of_group = planes.topk(min(2, size), dim=2).values.sum(2) if bias is not None else planes.amax(2)
        chosen = of_group.sort(dim=1, descending=True, stable=True).indices[:, :kept]
        member = torch.zeros_like(of_group, dtype=torch.bool).scatter_(1, chosen, True).repeat_interleave(size, 1)
        # Those of other groups come last, also behind -inf.
        order = (worth.clamp(min=torch.finfo(worth.dtype).min)).masked_fill(~member, -torch.inf)
    else:
        order = worth
    return order.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
