"""The whole layer of experts."""

import functools
import weakref

import torch

from ref.format import parse_format
from ref.moe.check import ACTIVATIONS, check_activation
from ref.qtensor import QTensor

from ..eager import _round_once
from ..registry import find
from .activation import moe_activation
from .align import moe_align_block_size
from .choose import check_devices, check_ids
from .expert_map import estimate_local_valid_shape_m
from .fused_mul_sum import _result, moe_fused_mul_sum
from .grouped_linear import _checked, _contiguous, _rows
from .permute import moe_permute, moe_scatter_masked, moe_unpermute
from .stack import Stack, block_size_for, remember
from .workspace import Workspaces

GEMM_TYPES = ("auto", "indexed", "grouped_contiguous", "grouped_masked")


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
    impl=None,
    gemm_type="auto",
    deterministic=True,
    out=None,
):
    """ref.fused_experts at speed, of its variant "stored": both products and the activation are rounded to x's dtype, each once.

    Products are as grouped_linear's, the activation and the weighted sum in float32, the sum in the order of the slots. Nothing waits for
    the GPU, and no shape depends on data. Slots with an id that is negative, out of range or not local are not computed, and not read.

    Args:
        x: (m, h), float16, bfloat16 or float32; any strides.
        w13, w2: QTensors, what prepare_experts returned, or plain tensors. Their tensors must not be written to afterwards.
        topk_ids, expert_map: int32 or int64; ids out of range and a map beyond w13's experts are refused with FAST_DEBUG=1 only.
        impl: of the products: None for the fastest that can, or for what FAST_IMPL pins; or "torch", "triton", "humming" or another that is
            registered, which never falls back. With "torch" and "triton" all the rest is done by the same, otherwise by what is fastest.
        gemm_type: how rows come to their experts: "indexed" (the products pick them), "grouped_contiguous" (moved together, expert after
            expert), "grouped_masked" (to planes of m * top_k rows for each expert: for few tokens), or "auto": indexed.
        deterministic: as linear.
        out: None, or where to write: (m, h'), contiguous, h' the rows of w2.
        The rest: as ref.fused_experts.

    Returns:
        (m, h'), dtype of x.

    Raises:
        TypeError, ValueError: arguments that do not fit each other, before any launch.
        NotImplementedError: legal, but impl or gemm_type cannot do it, or x requires a gradient.
        ExceptionGroup: no implementation can do it.
    """
    if gemm_type not in GEMM_TYPES:
        raise ValueError(f"fused_experts: unknown gemm_type {gemm_type!r}, expected one of {', '.join(GEMM_TYPES)}")
    first, second, act = check(
        x, w13, w2, topk_weights, topk_ids, activation, expert_map, bias13, bias2, apply_router_weight_on_input,
        (("limit", limit), ("alpha", alpha), ("beta", beta), ("up_beta", up_beta)),
    )  # fmt: skip
    experts = first.shape[0]
    everywhere = experts if expert_map is None else expert_map.shape[0]
    check_ids("fused_experts", topk_ids, everywhere)
    if expert_map is not None:
        check_ids("fused_experts: expert_map", expert_map, experts)
    m, t = topk_ids.shape
    y = _result("fused_experts", x, m, second.shape[1], out)
    if impl is not None:
        find("grouped", impl, "fused_experts")
    if not (m and t and experts and y.numel()):
        return y.zero_()
    block, plans = plans_for(first, second, (x.dtype, x_format, impl, deterministic), (bias13, bias2), m * t, everywhere)
    layout = "indexed" if gemm_type == "auto" else gemm_type
    whole = x_format is not None and parse_format(x_format).group == (0, 0)
    if whole and layout != "indexed":
        raise NotImplementedError(f"fused_experts: {x_format} has one scale for all of x, and {layout} moves parts of it; 'indexed' can")
    x, topk_ids, topk_weights = _rows(x.detach()), topk_ids.contiguous(), topk_weights.detach()
    if apply_router_weight_on_input:
        x = _round_once(x.double() * topk_weights.double(), x.dtype)
        topk_weights = torch.ones_like(topk_weights, dtype=torch.float32)
    rest = impl if impl in ("torch", "triton") else None
    layer = Layer(
        plans, block, act, (_contiguous(bias13), _contiguous(bias2)), (first.shape[1], second.shape[2], second.shape[1]), rest, whole
    )
    LAYOUTS[layout](layer, x, topk_weights, topk_ids, expert_map, experts, everywhere, y)
    return y


class Layer:
    """The two products and the activation between them, on rows that one of the LAYOUTS has brought to their experts."""

    def __init__(self, plans, block, act, biases, columns, impl, whole):
        """
        Args:
            plans, biases: of w13 and w2. block: rows of a block. act: the activation's name and parameters. columns: of each stage's result.
            impl: of everything else. whole: x is quantized with one scale for all of it.
        """
        self.plans, self.block, self.act, self.biases, self.columns, self.impl, self.whole = plans, block, act, biases, columns, impl, whole

    def __call__(self, product, x, rows, flat=True):
        """x's rows through the experts: (rows, h').

        Args:
            product: (plan, x, bias, out, stage) -> None. flat: it takes rows that are quantized already.
        """
        quantizer = getattr(self.plans[1], "quantizer", None) if flat and not self.whole else None
        first, inner, last = self.columns
        spaces = Workspaces(x, rows, (first, inner if quantizer is None else 0, last))
        gate_up, hidden, down = (spaces[stage] for stage in range(3))
        if self.whole:
            # The largest of all rows decides, and those that nobody writes must not have a say.
            gate_up.zero_()
        product(self.plans[0], x, self.biases[0], gate_up, 0)
        name, parameters = self.act
        if quantizer is None:
            moe_activation(gate_up, name, **dict(parameters), impl=self.impl, out=hidden)
        else:
            hidden = quantizer.activated(gate_up, name, parameters)
        product(self.plans[1], hidden, self.biases[1], down, 1)
        return down


def indexed(layer, x, topk_weights, topk_ids, expert_map, experts, everywhere, y):
    """Rows stay where they are: row i of every result belongs to slot i, and the products pick what each expert has."""
    m, t = topk_ids.shape
    ids, owners, end = moe_align_block_size(topk_ids, layer.block, everywhere, expert_map, ignore_invalid_experts=True, impl=layer.impl)
    known = trusted(layer, expert_map)

    def product(plan, a, bias, out, stage):
        plan.run(
            a, bias, None, out, sorted_token_ids=ids, expert_ids=owners, num_tokens_post_padded=end, top_k=1 if stage else t,
            block_size=layer.block, **known[stage],
        )  # fmt: skip

    down = layer(product, x, m * t)
    # With a map, ids out of range are not read either.
    here = identity(experts, x.device) if expert_map is None else expert_map
    moe_fused_mul_sum(down.view(m, t, -1), topk_weights, topk_ids, here, impl=layer.impl, out=y)


def grouped_contiguous(layer, x, topk_weights, topk_ids, expert_map, experts, everywhere, y):
    """Rows are copied together, expert after expert, and summed from there."""
    rows, offsets, inverse, _ = moe_permute(
        x, topk_ids, everywhere, expert_map, num_local_experts=experts, offset_dtype=torch.int32, impl=layer.impl
    )
    known = trusted(layer, expert_map)

    def product(plan, a, bias, out, stage):
        plan.contiguous(a, offsets, bias, None, out, **known[stage])

    down = layer(product, rows, rows.shape[0])
    moe_unpermute(down, topk_weights, inverse, impl=layer.impl, out=y)


def grouped_masked(layer, x, topk_weights, topk_ids, expert_map, experts, everywhere, y):
    """Rows are copied to planes, one an expert, which hold any number of them that there may be."""
    most = topk_ids.numel()
    planes, counts, inverse = moe_scatter_masked(
        x, topk_ids, everywhere, most, expert_map, num_local_experts=experts, impl=layer.impl
    )  # fmt: skip
    known = trusted(layer, expert_map)

    def product(plan, a, bias, out, stage):
        plan.masked(a.view(experts, most, -1), counts, bias, None, out.view(experts, most, -1), **known[stage])

    down = layer(product, planes.view(experts * most, -1), experts * most, flat=False)
    moe_unpermute(down, topk_weights, inverse, impl=layer.impl, out=y)


LAYOUTS = {"indexed": indexed, "grouped_contiguous": grouped_contiguous, "grouped_masked": grouped_masked}


def trusted(layer, expert_map):
    """For each product: what tells it that its blocks are of experts that exist. Only a map could say otherwise; and only Humming asks."""
    told = [hasattr(plan, "block_sizes") and expert_map is None and not layer.whole for plan in layer.plans]
    return [{"trusted": True} if known else {} for known in told]


def plans_for(first, second, kind, biases, slots, everywhere):
    """The block size that serves both products, and their plans.

    They are chosen by the interval 2^(i-1) < slots <= 2^i, as though all experts, here and elsewhere, had equally many.

    Args:
        first, second: the Stacks of w13 and w2. kind: dtype of x, x_format, impl, deterministic. biases: of both, or None.
        slots: tokens x top_k. everywhere: how many experts they choose from.
    """
    experts = max(first.shape[0], 1)
    rows = estimate_local_valid_shape_m(1 << max(slots - 1, 0).bit_length(), experts, max(everywhere, 1))
    block = block_size_for(-(-rows // experts))
    plans = [
        stack.plan("fused_experts", *kind, bias, None, block) for stack, bias in ((first, biases[0]), (second, biases[1]))
    ]  # fmt: skip
    # Humming's tiles have sizes of their own.
    tiled = [plan for plan in plans if hasattr(plan, "block_sizes")]
    return best_block(rows, *tiled) if tiled else block, plans


_BEST = weakref.WeakKeyDictionary()


def best_block(rows, plan, *others):
    """The block size in which so many slots of all experts take the least time, as the first of these plans estimates it."""
    known = _BEST.setdefault(plan, {})
    key = rows, *((other.n, other.k) for other in others)
    if key not in known:
        known[key] = plan.block_size(rows, *others)
    return known[key]


@functools.cache
def _identity(experts, device):
    return torch.arange(experts, dtype=torch.int32, device=device)


def identity(experts, device):
    """The map of a single rank. One that a CUDA graph makes while it is captured is the graph's own."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _identity.__wrapped__(experts, device)
    return _identity(experts, device)


def check(x, w13, w2, topk_weights, topk_ids, activation, expert_map, bias13, bias2, on_input, given):
    """The Stacks of both weights, and the activation with its parameters, after the checks that every call has to pass; they read no data."""
    first = _checked("fused_experts", x, w13, bias13, None, 2, topk_ids=topk_ids, expert_map=expert_map)
    if topk_ids.dim() != 2 or topk_ids.shape != topk_weights.shape or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"fused_experts: topk_weights have shape {tuple(topk_weights.shape)}, topk_ids {tuple(topk_ids.shape)}, "
            f"expected ({x.shape[0]}, top_k)"
        )
    if not topk_weights.dtype.is_floating_point:
        raise TypeError(f"fused_experts: topk_weights are {topk_weights.dtype}, expected floats")
    check_devices("fused_experts", x, topk_weights=topk_weights)
    if expert_map is not None and expert_map.dim() != 1:
        raise ValueError(f"fused_experts: expert_map has shape {tuple(expert_map.shape)}, expected (experts,)")
    if on_input and topk_ids.shape[1] != 1:
        raise ValueError(f"fused_experts: apply_router_weight_on_input needs top_k = 1, got {topk_ids.shape[1]}")
    e, n, _ = first.shape
    inner, parameters = _activation(n, activation, given)
    second = _second(w2, e, inner, bias2, x)
    return first, second, (activation, parameters)


@functools.lru_cache(maxsize=256)
def _activation(n, activation, given):
    """Columns of the activation's result, and its parameters with defaults, as pairs."""
    parameters = check_activation(torch.empty(0, n), activation, **dict(given))
    return n // 2 if ACTIVATIONS[activation].gated else n, tuple(parameters.items())


def _second(w2, experts, inner, bias, x):
    """The Stack of w2, checked."""
    if not isinstance(w2, (QTensor, torch.Tensor, Stack)) or len(w2.shape) != 3:
        raise ValueError(f"fused_experts: w2 has shape {tuple(getattr(w2, 'shape', ()))}, expected (experts, n, k)")
    second = remember(w2)
    e, n, k = second.shape
    if e != experts:
        raise ValueError(f"fused_experts: w13 has {experts} experts, w2 has {e} (both must match)")
    if k != inner:
        raise ValueError(f"fused_experts: the activation gives {inner} columns, w2 has k={k} (both must match)")
    if second.device != x.device:
        raise ValueError(f"fused_experts: x is on {x.device}, w2 on {second.device} (both must match)")
    if bias is not None and not bias.dtype.is_floating_point:
        raise TypeError(f"fused_experts: bias2 is {bias.dtype}, expected a floating-point tensor")
    if bias is not None and tuple(bias.shape) != (e, n):
        raise ValueError(f"fused_experts: bias2 has shape {tuple(bias.shape)}, expected {(e, n)}: (experts, n) of w2")
    check_devices("fused_experts", x, bias2=bias)
    return second
