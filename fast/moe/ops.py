"""The MoE functions as one torch.library operator, for torch.compile: a node in the graph, shapes by a fake.

The operator takes tensors (a QTensor as its parts, so that weights stay inputs of the graph), numbers (which may be symbols), and a text
that stands for the rest of the call: which function it is, and where everything belongs.
"""

import inspect

import torch

from ref.moe.check import ACTIVATIONS
from ref.qtensor import TENSORS, QTensor

from ..ops import _format, _name, _Owner
from ..quantize_input import quantize_input
from .activation import moe_activation, silu_and_mul
from .align import batched_moe_align_block_size, moe_align_block_size
from .experts import fused_experts
from .fused_mul_sum import moe_fused_mul_sum
from .grouped_linear import grouped_linear, indexed_linear, masked_linear
from .permute import moe_permute, moe_scatter_masked, moe_unpermute
from .stack import BY_NUMBER, Stack
from .topk import fused_topk, hash_topk

_library = torch.library.Library("quantref", "FRAGMENT")
_library.define("moe(str call, Tensor?[] tensors, SymInt[] numbers) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))

FUNCTIONS = {
    function.__name__: function
    for function in (
        fused_topk, hash_topk, moe_align_block_size, batched_moe_align_block_size, moe_permute, moe_unpermute, moe_scatter_masked,
        moe_activation, silu_and_mul, moe_fused_mul_sum, grouped_linear, masked_linear, indexed_linear, fused_experts,
    )
}  # fmt: skip
# Calls by the text that stands for them in a graph: the function, and (name or place, what it is, details) of every argument.
_CALLS = {}


def call(function, args, kwargs):
    """One of FUNCTIONS while torch.compile traces it."""
    out, format = kwargs.pop("out", None), kwargs.pop("format", None)
    if format is not None:
        # A float32 x gives the float32 result that is quantized.
        args = (args[0].float(), *args[1:])
    tensors, numbers, spec = [], [], []
    for place, value in [*enumerate(args), *kwargs.items()]:
        if isinstance(value, QTensor):
            tensors += [getattr(value, part) for part in TENSORS]
            numbers += value.shape
            spec.append((place, "qtensor", _name(value.format)))
        elif isinstance(value, Stack):
            numbers.append(value.number)
            spec.append((place, "stack", ""))
        elif isinstance(value, torch.Tensor):
            if value.requires_grad and torch.is_grad_enabled():
                raise NotImplementedError(
                    f"{function}: an argument requires a gradient, and this is for inference: call under torch.no_grad()"
                )
            tensors.append(value)
            spec.append((place, "tensor", ""))
        elif isinstance(value, int) and not isinstance(value, bool):
            numbers.append(value)
            spec.append((place, "number", ""))
        elif place == "x_format" and value is not None:
            spec.append((place, "format", _name(value)))
        else:
            spec.append((place, "constant", value))
    results = torch.ops.quantref.moe(_text(function, tuple(spec)), tensors, numbers)
    if format is not None:
        return quantize_input(results[0], format)
    if out is not None:
        if out.shape != results[0].shape or out.dtype != results[0].dtype:
            raise ValueError(f"{function}: out is {tuple(out.shape)} {out.dtype}, expected {tuple(results[0].shape)} {results[0].dtype}")
        return out.copy_(results[0])
    return results[0] if len(results) == 1 else tuple(results)


@torch.compiler.assume_constant_result
def _text(function, spec):
    text = f"{function} {spec}"
    _CALLS[text] = function, spec
    return text


def _arguments(call, tensors, numbers, weight):
    """The function, and its arguments by name, defaults filled in. weight: makes a QTensor of (format, shape, parts)."""
    function, spec = _CALLS[call]
    tensors, numbers = iter(tensors), iter(numbers)
    args, kwargs = [], {}
    for place, what, detail in spec:
        if what == "qtensor":
            shape = tuple(next(numbers) for _ in range(3))
            value = weight(detail, shape, [next(tensors) for _ in TENSORS])
        elif what == "stack":
            value = BY_NUMBER[int(next(numbers))]
        elif what in ("tensor", "number"):
            value = next(tensors if what == "tensor" else numbers)
        else:
            value = _format(detail) if what == "format" else detail
        if isinstance(place, str):
            kwargs[place] = value
        else:
            args.append(value)
    bound = inspect.signature(FUNCTIONS[function]).bind(*args, **kwargs)
    bound.apply_defaults()
    return FUNCTIONS[function], bound.arguments, bound


@torch.library.impl(_library, "moe", "CompositeExplicitAutograd")
def _moe(call, tensors, numbers):
    function, _, bound = _arguments(call, tensors, numbers, _owned)
    results = function(*bound.args, **bound.kwargs)
    return list(results) if isinstance(results, tuple) else [results]


def _owned(format, shape, parts):
    """The same Stack at every call with the same tensors, and so the same plans; it lives as long as the packed tensor."""
    packed, *rest = parts
    key = (format, shape, *map(id, rest))
    owner = getattr(packed, "_quantref_owner", None)
    if owner is None or owner.key != key:
        owner = packed._quantref_owner = _Owner(key, Stack(QTensor(_format(format), shape, packed, *rest)))
    return owner.prepared


@torch.library.register_fake("quantref::moe", lib=_library)
def _fake(call, tensors, numbers):
    function, given, _ = _arguments(call, tensors, numbers, lambda format, shape, parts: QTensor(_format(format), shape, *parts))
    return SHAPES[function.__name__](**given)


def _topk(logits, columns):
    shape = logits.shape[0], columns
    return [logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=torch.float32)]


def _aligned(topk_ids, block_size, num_experts, pad_sorted_ids, **_):
    n = topk_ids.numel()
    length = min(n + num_experts * (block_size - 1), n * block_size)
    blocks = -(-length // block_size)
    return [topk_ids.new_empty(size, dtype=torch.int32) for size in (blocks * block_size if pad_sorted_ids else length, blocks, 1)]


def _batched(max_tokens, block_size, counts, **_):
    blocks = counts.numel() * -(-max_tokens // block_size)
    return [counts.new_empty(size, dtype=torch.int32) for size in (blocks * block_size, blocks, 1)]


def _local(num_experts, expert_map, num_local_experts):
    if expert_map is not None and num_local_experts is None:
        raise NotImplementedError("moe_permute: with an expert_map, torch.compile needs num_local_experts: shapes cannot depend on data")
    return num_experts if num_local_experts is None else num_local_experts


def _permuted(x, topk_ids, num_experts, expert_map, num_local_experts, align, offset_dtype, **_):
    experts = _local(num_experts, expert_map, num_local_experts)
    r = topk_ids.numel() + (align - 1) * experts
    offsets = topk_ids.new_empty(experts + 1, dtype=offset_dtype)
    return [
        x.new_empty(r, x.shape[1]),
        offsets,
        topk_ids.new_empty(topk_ids.shape, dtype=torch.int32),
        topk_ids.new_empty(r, dtype=torch.int32),
    ]


def _scattered(x, topk_ids, num_experts, max_tokens, expert_map, num_local_experts, **_):
    experts = _local(num_experts, expert_map, num_local_experts)
    counts = topk_ids.new_empty(experts, dtype=torch.int32)
    return [x.new_empty(experts, max_tokens, x.shape[1]), counts, topk_ids.new_empty(topk_ids.shape, dtype=torch.int32)]


def _activated(x, activation="silu", **_):
    return [x.new_empty(*x.shape[:-1], x.shape[-1] // 2 if ACTIVATIONS[activation].gated else x.shape[-1])]


SHAPES = {
    "fused_topk": lambda logits, top_k, num_shared_experts, **_: _topk(logits, top_k + num_shared_experts),
    "hash_topk": lambda logits, table, num_shared_experts, **_: _topk(logits, table.shape[1] + num_shared_experts),
    "moe_align_block_size": _aligned,
    "batched_moe_align_block_size": _batched,
    "moe_permute": _permuted,
    "moe_scatter_masked": _scattered,
    "moe_unpermute": lambda rows, topk_weights, **_: [rows.new_empty(topk_weights.shape[0], rows.shape[1])],
    "moe_fused_mul_sum": lambda inputs, **_: [inputs.new_empty(inputs.shape[0], inputs.shape[2])],
    "moe_activation": _activated,
    "silu_and_mul": _activated,
    "grouped_linear": lambda x, w, **_: [x.new_empty(x.shape[0], w.shape[1])],
    "masked_linear": lambda x, w, **_: [x.new_empty(*x.shape[:2], w.shape[1])],
    "indexed_linear": lambda x, w, top_k, **_: [x.new_empty(x.shape[0] * top_k, w.shape[1])],
    "fused_experts": lambda x, w2, **_: [x.new_empty(x.shape[0], w2.shape[1])],
}
