"""The whole layer of experts."""

import torch

from ..rounding import round_to
from .activation import activate
from .check import check_experts
from .expert_map import local_ids
from .grouped_linear import operand, product

# What kernels legitimately differ in: where results between the stages are rounded.
VARIANTS = {
    "exact": "nothing is rounded between the products but what is quantized",
    "stored": "both products and the activation are rounded to x's dtype, as engines that store them do",
}


def fused_experts(
    x,
    w13,
    w2,
    topk_weights,
    topk_ids,
    *,
    activation="silu",
    expert_map=None,
    bias13=None,
    bias2=None,
    limit=None,
    alpha=None,
    beta=None,
    up_beta=None,
    apply_router_weight_on_input=False,
    x_format=None,
):
    """y[m] = sum over t of weight[m, t] * (act(x[m] W13[e]^T + bias13[e]) W2[e]^T + bias2[e]), e = topk_ids[m, t].

    Slots with a negative id, and those whose expert lives elsewhere (expert_map), add nothing.

    Args:
        x: (m, h), float16, bfloat16 or float32.
        w13: QTensor or plain tensor (e, 2 i, h), gate above up (interleaved where the activation says so); (e, i, h) for *_no_mul.
        w2: QTensor or plain tensor (e, h, i).
        topk_weights, topk_ids: (m, t), as fused_topk gives them.
        activation, limit, alpha, beta, up_beta: as moe_activation.
        expert_map: (e_global,), integer: the index into w13 and w2 of each expert, or -1; None: ids are indices.
        bias13, bias2: (e, 2 i) and (e, h), any float dtype, or None.
        apply_router_weight_on_input: x times its weight, rounded to x's dtype, goes in, and nothing is weighed at the end; t = 1.
        x_format: None, or the format that x, and what enters the second product, are quantized to.

    Returns:
        (m, h), dtype of x, in float64 all the way (variant "exact") and rounded once.

    Raises:
        TypeError, ValueError: arguments that do not fit each other, or an id out of range.

    Source: vLLM 0.33 fused_experts and its Humming experts.
    """
    given = {"limit": limit, "alpha": alpha, "beta": beta, "up_beta": up_beta}
    return fused_experts_variant(
        x, w13, w2, topk_weights, topk_ids, variant="exact", activation=activation, expert_map=expert_map, bias13=bias13, bias2=bias2,
        apply_router_weight_on_input=apply_router_weight_on_input, x_format=x_format, **given,
    )  # fmt: skip


def fused_experts_variant(
    x, w13, w2, topk_weights, topk_ids, *, variant, activation="silu", expert_map=None, bias13=None, bias2=None,
    apply_router_weight_on_input=False, x_format=None, **given,
):  # fmt: skip
    """fused_experts, with one of the VARIANTS by name."""
    if variant not in VARIANTS:
        raise ValueError(f"fused_experts: unknown variant {variant!r}, expected one of {', '.join(VARIANTS)}")
    check_experts(x, w13, w2, topk_weights, topk_ids, activation, bias13, bias2, apply_router_weight_on_input, x_format, given)
    experts = w13.shape[0]
    local = local_ids(topk_ids, experts if expert_map is None else expert_map.shape[0], expert_map)
    if local.numel() and int(local.max()) >= experts:
        raise ValueError(f"fused_experts: expert_map reaches {int(local.max())}, and there are {experts} experts")
    if apply_router_weight_on_input:
        x = round_to(x.detach().to(torch.float64) * topk_weights.to(torch.float64), x.dtype)

    def kept(t):
        return round_to(t, x.dtype).to(torch.float64) if variant == "stored" else t

    # One row for each local slot.
    rows, slots = (local >= 0).nonzero(as_tuple=True)
    chosen = local[rows, slots]
    gate_up = kept(_products(operand(x, x_format)[rows], w13, chosen, bias13))
    hidden = kept(activate(gate_up, activation, **given))
    down = kept(_products(operand(hidden, x_format), w2, chosen, bias2))
    if not apply_router_weight_on_input:
        down = down * topk_weights[rows, slots, None].to(torch.float64)
    return round_to(down.new_zeros(x.shape[0], w2.shape[1]).index_add_(0, rows, down), x.dtype)


def _products(a, w, chosen, bias):
    """Row r of a times the weight of expert chosen[r], float64."""
    y = a.new_zeros(a.shape[0], w.shape[1])
    for expert in chosen.unique().tolist():
        y[chosen == expert] = product(a[chosen == expert], w, expert, bias)
    return y
