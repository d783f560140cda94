"""Which implementation runs a call, and why no other does: without launching or compiling anything."""

from dataclasses import dataclass

import torch

from ref.format import parse_format
from ref.qtensor import QTensor

from . import choose, dispatch
from .dispatch import X_DTYPES, Prepared
from .moe import stack as stacks
from .moe.stack import Stack
from .registry import IMPLEMENTATIONS, module_of, runs_unasked


@dataclass(frozen=True)
class Candidate:
    """One implementation, for one call.

    call: in words. name: of the implementation. cost: what it says of itself, the Triton kernels' being 1; None where it is not tried
    unasked. reason: why it cannot run the call, or is not tried; None if it can. chosen: it is the one that runs.
    """

    call: str
    name: str
    cost: float | None
    reason: str | None
    chosen: bool


@dataclass(frozen=True, repr=False)
class Explanation:
    """candidates: a tuple of Candidates, call after call, in the order in which they are tried. As a string it is a table."""

    candidates: tuple

    def __repr__(self):
        calls = dict.fromkeys(one.call for one in self.candidates)
        return "\n".join(_table(call, [one for one in self.candidates if one.call == call]) for call in calls)


def _table(call, candidates):
    chosen = next((one for one in candidates if one.chosen), None)
    width = max(len(one.name) for one in candidates)
    lines = [call]
    for one in candidates:
        verdict = "taken" if one.chosen else f"not taken: {one.reason}" if one.reason else "legal, but slower"
        lines.append(f"  {one.name:{width}}  {'-' if one.cost is None else f'{one.cost:g}':>5}  {verdict}")
    return "\n".join(lines if chosen else [*lines, "  nothing can run it"])


def explain(
    w, m=1, *, x_dtype=torch.bfloat16, x_format=None, static_scale=False, bias=False, impl=None, deterministic=True
):  # fmt: skip
    """Which implementation runs a layer's call, and why the others do not: each is asked, nothing is launched or compiled.

    A weight that has not met such a call yet may still refuse by its values when it is prepared; after that this knows.

    Args:
        w: fast.Linear, FusedExperts, QTensor (n, k) or (e, n, k), what prepare or prepare_experts returned, or a plain tensor (e, n, k).
        m: rows of x; of experts, of all of them: tokens x top_k. x_dtype, deterministic: as the call will have them.
        x_format, bias, static_scale: as fast.prepare; a layer has its own. impl: as the call names it; None: the layer's own, if any.

    Returns:
        Explanation: its candidates, as values; as a string, a table.

    Raises:
        TypeError, ValueError: arguments that do not fit each other, or no such impl. NotImplementedError: impl is not of this operation.

    >>> import ref
    >>> ones = explain(ref.quantize(torch.ones(8, 32), "int4")).candidates
    >>> ones[0]
    Candidate(call='linear: bfloat16 x int4 8x32 on cpu, m=1', name='torch', cost=100.0, reason=None, chosen=True)
    >>> next(one.reason for one in ones if one.name == "humming")
    'Humming runs on NVIDIA GPUs only'
    """
    if not isinstance(m, int) or m < 0:
        raise ValueError(f"explain: m is {m!r}, expected a number of rows")
    if x_dtype not in X_DTYPES:
        raise TypeError(f"explain: x_dtype is {x_dtype}, expected torch.float16, torch.bfloat16 or torch.float32")
    weights = [("", w, bias)]
    if isinstance(w, torch.nn.Module):
        if x_format is not None or static_scale or bias is not False:
            raise ValueError(f"explain: x_format, static_scale and bias of a {type(w).__name__} are its own; leave them out")
        weights, x_format, static_scale = _of_layer(w)
        impl = impl or getattr(w, "impl", None)
    x_format = None if x_format is None else parse_format(x_format)
    found = []
    for name, weight, own_bias in weights:
        if isinstance(weight, Prepared) or (isinstance(weight, QTensor) and len(weight.shape) == 2):
            found += _of_linear(
                weight, m, (x_dtype, x_format, impl, deterministic, own_bias is None or own_bias is False, not static_scale)
            )
        elif isinstance(weight, (QTensor, Stack, torch.Tensor)) and len(weight.shape) == 3:
            found += _of_experts(name, weight, m, (x_dtype, x_format, impl, deterministic), static_scale, own_bias)
        else:
            got = f"{type(weight).__name__}{f' {tuple(weight.shape)}' if hasattr(weight, 'shape') else ''}"
            raise TypeError(
                f"explain: got {got}, expected a quantized layer or weight: fast.Linear, FusedExperts, QTensor, Prepared or Stack"
            )
    return Explanation(tuple(found))


def _of_layer(layer):
    """[(name, weight, bias)], x_format and whether its scale is static."""
    if hasattr(layer, "w13"):
        return [("w13", layer.w13.weight, layer.bias13), ("w2", layer.w2.weight, layer.bias2)], layer.x_format, False
    bias = getattr(layer, "bias", None)
    return (
        [("", getattr(layer, "weight", layer), bias)],
        getattr(layer, "x_format", None),
        getattr(layer, "x_scale", None) is not None,
    )


def _of_linear(w, m, kind):
    prepared, bucket = dispatch.remember(w), dispatch.bucket_of(m)
    plans = prepared.open(kind, None if kind[5] else torch.ones(1, device=prepared.device))
    request = prepared.request(kind)
    call = f"linear: {dispatch.describe(request)}, m={m}"
    held = _holder(prepared.made, plans[bucket])

    def reason(one):
        refused = prepared.made.get((one, request))
        return dispatch.refusal(one, request) or (refused if isinstance(refused, str) else None)

    return _candidates("linear", kind[2], request, 2**bucket, call, reason, held, prepared.q is None)


def _of_experts(name, w, m, kind, static_scale, bias):
    stack = stacks.remember(w)
    block = stacks.block_size_for(-(-m // max(stack.shape[0], 1)))
    stack.check_input("explain", kind[1], torch.ones(1, device=stack.device) if static_scale else None)
    # A bias that is not at hand is the one that the stack is prepared with, or will be.
    none, known = bias is None or bias is False, stack.bias is None or stack.bias.numel() > 0
    own = not none and (known if bias is True else stack.bias is None or stack.owns(bias))
    kind = (*kind, none, own, not static_scale, block, False)
    request = stack.request(kind)
    call = f"{name or 'grouped_linear'}: {stacks.describe(request)}, m={m}"

    def reason(one):
        refused = stack.made.get((one, request, not own))
        return module_of(one).why_not(request) or (refused if isinstance(refused, str) else None)

    return _candidates("grouped", kind[2], request, block, call, reason, _holder(stack.made, stack.kinds.get(kind)), stack.w is None)


def _holder(made, plan):
    """Whose plan it is; None where there is none yet."""
    return next((key[0] for key, one in made.items() if plan is not None and one is plan), None)


def _candidates(operation, impl, request, rows, call, reason, held, closed):
    """Candidates in the order in which choose.plan tries them, and after them those that it does not.

    Args:
        reason: Implementation -> why it cannot, or None. held: who has made the plan that the call has already. closed: no other can be made.
    """
    asked, _ = choose.asked_for(operation, impl, "explain")
    costs = {one: one.cost(request, rows) for one in IMPLEMENTATIONS[operation].values() if runs_unasked(one, request.device)}
    order = [*sorted(costs, key=costs.get), *(one for one in IMPLEMENTATIONS[operation].values() if one not in costs)]
    if held is not None and held not in order:
        order.append(held)
    found = []
    for one in sorted(order, key=lambda one: one != asked):
        why = None if one == held else reason(one)
        if why is None and asked not in (None, one):
            why = f"{asked.name!r} is {'asked for' if impl else f'pinned by {choose.VARIABLE}'}"
        elif why is None and asked is None and one not in costs and one != held:
            why = f"it is tried on {' and '.join(one.devices)}; on {request.device.type} only as impl={one.name!r}"
        elif why is None and closed and held is None:
            why = "the weight was prepared for other calls"
        elif why is None and held in costs and costs[one] < costs[held]:
            why = f"the weight has a plan by {held.name!r} already"
        found.append((one, why))
    legal = [one for one, why in found if why is None]
    taken = held or (legal[0] if legal else None)
    return [Candidate(call, one.name, costs.get(one), why, one == taken) for one, why in found]
