"""What the MoE operations take: names, parameters, and refusals of arguments that do not fit each other. Nothing here reads data."""

from dataclasses import dataclass

import torch

from ..format import check_input_format, parse_format
from ..qtensor import QTensor, check_parts

SCORING = ("softmax", "sigmoid", "sqrtsoftplus")

# What engines divide by when they renormalize: the chosen scores' sum, or with something that keeps it from being zero.
DENOMINATORS = {"sum": 0.0, "sum_1e-20": 1e-20}


@dataclass(frozen=True)
class Activation:
    """What an activation is told by.

    gated: the input is gate and up, each half of the columns; interleaved: every second column is gate, not the first half.
    takes: its parameters; needs: those without a default; defaults: (name, value) of the others that have one.
    """

    gated: bool = True
    interleaved: bool = False
    takes: tuple = ()
    needs: tuple = ()
    defaults: tuple = ()


OAI = (("limit", 7.0), ("alpha", 1.702), ("beta", 1.0))
ACTIVATIONS = {
    "silu": Activation(takes=("limit",)),
    "gelu": Activation(),
    "gelu_tanh": Activation(),
    "relu2": Activation(),
    "swigluoai": Activation(interleaved=True, takes=("limit", "alpha", "beta"), defaults=OAI),
    "swigluoai_uninterleave": Activation(takes=("limit", "alpha", "beta"), needs=("limit",), defaults=OAI[1:]),
    "swiglustep": Activation(takes=("limit",), defaults=OAI[:1]),
    "situ": Activation(takes=("beta", "up_beta"), needs=("beta",)),
    "silu_no_mul": Activation(gated=False),
    "gelu_no_mul": Activation(gated=False),
    "gelu_tanh_no_mul": Activation(gated=False),
    "relu2_no_mul": Activation(gated=False),
}


def check_topk(logits, top_k, renormalize, scoring_func, correction_bias, num_expert_group, topk_group, num_shared_experts, num_valid):
    """Refuse arguments of fused_topk that do not fit each other; reads no data."""
    if not isinstance(logits, torch.Tensor) or not logits.dtype.is_floating_point:
        raise TypeError(
            f"fused_topk: logits are {logits.dtype if isinstance(logits, torch.Tensor) else type(logits).__name__}, expected a float tensor"
        )
    if logits.dim() != 2:
        raise ValueError(f"fused_topk: logits have shape {tuple(logits.shape)}, expected (tokens, experts)")
    m, e = logits.shape
    if scoring_func not in SCORING:
        raise ValueError(f"fused_topk: unknown scoring_func {scoring_func!r}, expected one of {', '.join(SCORING)}")
    if renormalize not in (True, False, *DENOMINATORS):
        raise ValueError(f"fused_topk: got renormalize={renormalize!r}, expected True, False or one of {', '.join(DENOMINATORS)}")
    if correction_bias is not None and tuple(correction_bias.shape) != (e,):
        raise ValueError(f"fused_topk: correction_bias has shape {tuple(correction_bias.shape)}, expected ({e},)")
    if (num_expert_group is None) != (topk_group is None):
        raise ValueError(f"fused_topk: got num_expert_group={num_expert_group} and topk_group={topk_group}, expected both or neither")
    legal = e
    if num_expert_group is not None:
        if num_expert_group < 1 or e % num_expert_group or not 1 <= topk_group <= num_expert_group:
            raise ValueError(f"fused_topk: {e} experts do not form {num_expert_group} groups of which {topk_group} are chosen")
        legal = e // num_expert_group * topk_group
    if not 1 <= top_k <= legal:
        raise ValueError(f"fused_topk: got top_k={top_k}, expected 1 to {legal}, the experts to choose from")
    if num_shared_experts < 0 or (num_valid is not None and not 0 <= num_valid <= m):
        raise ValueError(f"fused_topk: got num_shared_experts={num_shared_experts}, num_valid={num_valid} of {m} rows")


def check_activation(x, activation, **given):
    """The activation's parameters, defaults filled in; raises TypeError or ValueError where something does not fit; reads no data."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"moe_activation: unknown activation {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    chosen = ACTIVATIONS[activation]
    if not isinstance(x, torch.Tensor) or not x.dtype.is_floating_point:
        raise TypeError(f"moe_activation: x is {x.dtype if isinstance(x, torch.Tensor) else type(x).__name__}, expected a float tensor")
    if x.dim() < 1 or (chosen.gated and x.shape[-1] % 2):
        raise ValueError(f"moe_activation: x has shape {tuple(x.shape)}, and {activation} needs an even number of columns: gate and up")
    for name, value in given.items():
        if value is not None and name not in chosen.takes:
            raise ValueError(f"moe_activation: {activation} has no parameter {name}; it has {', '.join(chosen.takes) or 'none'}")
        if value is None and name in chosen.needs:
            raise ValueError(f"moe_activation: {activation} needs {name}")
    set_by_caller = {name: value for name, value in given.items() if value is not None}
    return dict.fromkeys(("limit", "alpha", "beta", "up_beta")) | dict(chosen.defaults) | set_by_caller


def check_mul_sum(inputs, topk_weights, topk_ids, expert_map):
    """Refuse arguments that do not fit each other; reads no data."""
    if inputs.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not topk_weights.dtype.is_floating_point:
        raise TypeError(
            f"moe_fused_mul_sum: inputs are {inputs.dtype}, topk_weights {topk_weights.dtype}, expected fp32, fp16 or bf16, and floats"
        )
    if inputs.dim() != 3 or tuple(topk_weights.shape) != tuple(inputs.shape[:2]):
        raise ValueError(
            f"moe_fused_mul_sum: inputs have shape {tuple(inputs.shape)}, topk_weights {tuple(topk_weights.shape)}, expected (m, t, k) and (m, t)"
        )
    if topk_ids is None and expert_map is not None:
        raise ValueError("moe_fused_mul_sum: got expert_map without topk_ids: nothing says which expert a slot belongs to")
    if topk_ids is not None and tuple(topk_ids.shape) != tuple(inputs.shape[:2]):
        raise ValueError(f"moe_fused_mul_sum: topk_ids have shape {tuple(topk_ids.shape)}, expected {tuple(inputs.shape[:2])}")
    for name, tensor in (("topk_weights", topk_weights), ("topk_ids", topk_ids), ("expert_map", expert_map)):
        if tensor is not None and tensor.device != inputs.device:
            raise ValueError(f"moe_fused_mul_sum: inputs are on {inputs.device}, {name} on {tensor.device} (all must match)")


def check_grouped(x, w, bias, x_format, x_scale, dims, operation="grouped_linear"):
    """Refuse arguments of a grouped product that do not fit each other.

    Args:
        dims: of x: 2, or 3 for planes.
    """
    if not isinstance(w, (QTensor, torch.Tensor)) or len(w.shape) != 3:
        raise ValueError(f"{operation}: w has shape {tuple(getattr(w, 'shape', ()))}, expected (experts, n, k)")
    e, n, k = w.shape
    name = f"weight {w.format}" if isinstance(w, QTensor) else "weight"
    if not isinstance(x, torch.Tensor) or x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{operation}: x is {got}, expected a floating-point tensor of 16 bits or more")
    if x.dim() != dims or (dims == 3 and x.shape[0] != e):
        raise ValueError(f"{operation}: x has shape {tuple(x.shape)}, expected {'(rows, k)' if dims == 2 else f'({e}, max_tokens, k)'}")
    if x.shape[-1] != k:
        raise ValueError(f"{operation}: x has k={x.shape[-1]}, {name} has k={k} (both must match)")
    if isinstance(w, QTensor):
        check_parts(w, operation)
    if bias is not None and not bias.dtype.is_floating_point:
        raise TypeError(f"{operation}: bias is {bias.dtype}, expected a floating-point tensor")
    if bias is not None and tuple(bias.shape) != (e, n):
        raise ValueError(f"{operation}: bias has shape {tuple(bias.shape)}, expected {(e, n)}: (experts, n) of {name}")
    if x_format is not None:
        check_input_format(parse_format(x_format), x_scale, operation)
    elif x_scale is not None:
        raise ValueError(f"{operation}: got x_scale without x_format")
    device = w.packed.device if isinstance(w, QTensor) else w.device
    for other, where in (("w", device), ("bias", None if bias is None else bias.device)):
        if where is not None and where != x.device:
            raise ValueError(f"{operation}: x is on {x.device}, {other} is on {where} (both must match)")


def check_experts(x, w13, w2, topk_weights, topk_ids, activation, bias13, bias2, apply_router_weight_on_input, x_format, given):
    """Refuse arguments of fused_experts that do not fit each other; reads no data."""
    check_grouped(x, w13, bias13, x_format, None, 2, "fused_experts")
    if topk_ids.shape != topk_weights.shape or topk_ids.dim() != 2 or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"fused_experts: topk_weights have shape {tuple(topk_weights.shape)}, topk_ids {tuple(topk_ids.shape)}, "
            f"expected ({x.shape[0]}, top_k)"
        )
    if apply_router_weight_on_input and topk_ids.shape[1] != 1:
        raise ValueError(f"fused_experts: apply_router_weight_on_input needs top_k = 1, got {topk_ids.shape[1]}")
    check_activation(x.new_empty(0, w13.shape[1]), activation, **given)
    inner = w13.shape[1] // (2 if ACTIVATIONS[activation].gated else 1)
    check_grouped(x.new_empty(0, inner), w2, bias2, x_format, None, 2, "fused_experts")
    if w2.shape[0] != w13.shape[0]:
        raise ValueError(f"fused_experts: w13 has {w13.shape[0]} experts, w2 has {w2.shape[0]} (both must match)")
