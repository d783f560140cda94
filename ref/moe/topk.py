"""Routing: which experts a token goes to, and with what weight."""

import torch

from ..rounding import round_to
from .check import DENOMINATORS, check_topk

SCORES = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": lambda logits: logits.sigmoid(),
    # DeepSeek-V4: the square root of softplus, written so that no term overflows.
    "sqrtsoftplus": lambda logits: (logits.clamp(min=0) + torch.log1p(torch.exp(-logits.abs()))).sqrt(),
}


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
):
    """The top_k experts of each token, best first, and their weights.

    score = scoring_func(logits). The experts with the largest score + correction_bias are chosen; the bias has no part in the
    weights. weight = score / (sum of the chosen scores, if renormalize) * routed_scaling_factor. Of equals the lower expert is
    chosen. A NaN counts as less than everything: ids are always legal, and the weights of such a row are what its scores make of them.

    With num_expert_group the experts form groups of neighbours, and only those of the topk_group best groups are chosen from
    (grouped_topk): a group is worth its largest score or, with a correction bias, the sum of its two largest score + bias.

    Args:
        logits: (m, e), any float dtype; e experts.
        top_k: 1 to e (with groups, to the experts of topk_group groups).
        renormalize: False, True ("sum"), or a key of DENOMINATORS.
        scoring_func: softmax, sigmoid or sqrtsoftplus.
        correction_bias: (e,), float, or None.
        num_expert_group, topk_group: both, or neither.
        num_shared_experts: as many slots are appended, with ids e, e + 1, ... and weight shared_weight (not scaled).
        num_valid: rows from this one on are padding: ids -1, weights 0. None: all are tokens.

    Returns:
        ids int32 (m, top_k + num_shared_experts), weights float32 of the same shape: float64 scores, rounded once.

    Raises:
        TypeError, ValueError: shapes or numbers that do not fit each other, an unknown name.

    Source: vLLM 0.33 fused_topk, fused_topk_bias and grouped_topk routers; Hugging Face's Mixtral, Qwen3-MoE, DeepSeek-V3, V4, GPT-OSS.

    >>> fused_topk(torch.tensor([[0.0, 2.0, 2.0, 1.0]]), 2)
    (tensor([[1, 2]], dtype=torch.int32), tensor([[0.5000, 0.5000]]))
    """
    check_topk(logits, top_k, renormalize, scoring_func, correction_bias, num_expert_group, topk_group, num_shared_experts, num_valid)
    score = SCORES[scoring_func](logits.detach().to(torch.float64))
    worth = selection(score, correction_bias, num_expert_group, topk_group)
    ids = worth.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    return _weigh(score, ids, renormalize, routed_scaling_factor, num_shared_experts, shared_weight, num_valid)


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
):
    """Experts by the token's own id, weights by the scores (DeepSeek-V4's first layers): ids = table[tokens].

    Args:
        table: (vocabulary, top_k), integer: the experts of each token id.
        tokens: (m,), integer token ids.
        The rest, and the result: as fused_topk.

    Raises:
        TypeError, ValueError: as fused_topk, or an id outside of its table.

    >>> hash_topk(torch.zeros(1, 4), torch.tensor([[0, 1], [3, 2]]), torch.tensor([1]))[0]
    tensor([[3, 2]], dtype=torch.int32)
    """
    if table.dim() != 2 or tokens.shape != logits.shape[:1]:
        raise ValueError(f"hash_topk: table has shape {tuple(table.shape)}, tokens {tuple(tokens.shape)}, logits {tuple(logits.shape)}")
    check_topk(logits, table.shape[1], renormalize, scoring_func, None, None, None, num_shared_experts, num_valid)
    for name, ids, end in (("tokens", tokens, table.shape[0]), ("table", table, logits.shape[1])):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < end:
            raise ValueError(f"hash_topk: {name} ranges from {int(ids.min())} to {int(ids.max())}, expected 0 to {end - 1}")
    score = SCORES[scoring_func](logits.detach().to(torch.float64))
    ids = table[tokens.long()].long()
    return _weigh(score, ids, renormalize, routed_scaling_factor, num_shared_experts, shared_weight, num_valid)


def selection(score, correction_bias=None, num_expert_group=None, topk_group=None):
    """What experts are chosen by: float64 (m, e), -inf where one cannot be chosen before all others."""
    worth = score if correction_bias is None else score + correction_bias.to(torch.float64)
    worth = torch.where(worth.isnan(), -torch.inf, worth)
    if num_expert_group is None:
        return worth
    grouped = worth.unflatten(-1, (num_expert_group, -1))
    best = grouped.sort(dim=-1, descending=True).values[..., : 1 if correction_bias is None else 2].sum(-1)
    groups = best.sort(dim=-1, descending=True, stable=True).indices[:, :topk_group]
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, groups, True)
    return torch.where(kept[..., None], grouped.clamp(min=torch.finfo(torch.float64).min), -torch.inf).flatten(1)


def _weigh(score, ids, renormalize, routed_scaling_factor, num_shared_experts, shared_weight, num_valid):
    m, e = score.shape
    weights = score.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + DENOMINATORS["sum" if renormalize is True else renormalize])
    weights = weights * routed_scaling_factor
    shared = torch.arange(e, e + num_shared_experts, device=ids.device).expand(m, -1)
    ids = torch.cat((ids, shared), 1).to(torch.int32)
    weights = round_to(torch.cat((weights, torch.full_like(shared, shared_weight, dtype=torch.float64)), 1), torch.float32)
    if num_valid is not None:
        ids[num_valid:], weights[num_valid:] = -1, 0
    return ids, weights
