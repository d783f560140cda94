"""Why an implementation cannot run a MoE operation."""

from ref.format import parse_format

from ..registry import find, module_of
from . import choose
from .stack import describe, remember

# Operations with a kernel and plain torch.
OPERATIONS = (
    *("fused_topk", "hash_topk", "moe_align_block_size", "moe_permute", "moe_unpermute", "moe_scatter_masked"),
    *("moe_activation", "silu_and_mul", "moe_fused_mul_sum"),
)


def why_not(op, x, *args, impl, **given):
    """fast.why_not for MoE operations: the products of experts, and what stands around them, which depends on x's device only.

    Raises:
        TypeError, ValueError: no such operation or implementation.
    """
    if op in OPERATIONS:
        if impl not in ("torch", "triton"):
            raise ValueError(f"{op}: unknown impl {impl!r}, expected torch or triton")
        return choose.why_not(impl, x.device)
    if op == "fused_experts":
        return _products(op, x, args[:2], (given.get("bias13"), given.get("bias2")), impl, given)
    if op in ("grouped_linear", "masked_linear", "indexed_linear"):
        # The bias follows the rows' layout.
        place = {"grouped_linear": 2, "masked_linear": 2, "indexed_linear": 5}[op]
        return _products(op, x, args[:1], (given.get("bias", args[place] if len(args) > place else None),), impl, given)
    known = ("linear", "fused_experts", "grouped_linear", "masked_linear", "indexed_linear", *OPERATIONS)
    raise ValueError(f"why_not: unknown operation {op!r}, expected {', '.join(map(repr, known))}")


def _products(op, x, weights, biases, impl, given):
    module = module_of(find("grouped", impl, op))
    x_format = given.get("x_format")
    x_format = None if x_format is None else parse_format(x_format)
    dynamic, deterministic = given.get("x_scale") is None, given.get("deterministic", True)
    for w, bias in zip(weights, biases, strict=True):
        stack = remember(w)
        kind = (x.dtype, x_format, impl, deterministic, bias is None, False, dynamic, None, given.get("topk_weights") is not None)
        request = stack.request(kind)
        reason = module.why_not(request)
        if reason is not None:
            return f"{describe(request)}: {reason}"
    return None
