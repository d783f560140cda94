"""Relations between calls of the grouped products, of weighted sums and of whole layers of experts, as relations.py has them."""

import itertools
from dataclasses import replace

import torch

from ref.moe.expert_map import local_ids
from ref.qtensor import TENSORS, QTensor

from .regimes import hashed
from .relations import FACTORS, Related, half, result_times, rows, scaled_by, spans, take, times


def grouped_scaled(args, kwargs, y, seed):
    """The grouped products: x and bias times a power of two."""
    x, *rest = args
    found = scaled_by(x, kwargs.get("bias"), kwargs, y, seed)
    if found is None:
        return None
    name, x, bias, expected = found
    return Related(name, (x, *rest), kwargs if bias is None else {**kwargs, "bias": bias}, expected)


def expert_rows_reordered(args, kwargs, y, seed):
    """grouped_linear: the rows of each expert in another order."""
    x, w, offsets, *rest = args
    at = offsets.tolist()
    if spans(kwargs, False):
        return None
    index = torch.arange(len(x))
    for start, end in itertools.pairwise(at):
        index[start:end] = start + hashed(seed, "order", end - start).argsort()
    if torch.equal(index, torch.arange(len(x))):
        return None
    return Related("an expert's rows in another order", (take(x, index), w, offsets, *rest), kwargs, rows(y, index))


def expert_rows_split(args, kwargs, y, seed):
    """grouped_linear: half of each expert's rows, and none behind them."""
    x, w, offsets, *rest = args
    at = offsets.tolist()
    if not at[-1] or spans(kwargs, True):
        return None
    halves = [start + half(end - start, seed) for start, end in itertools.pairwise(at)]
    index = torch.cat(halves)
    ends = torch.tensor([0, *map(len, halves)]).cumsum(0).to(offsets)
    return Related("half of each expert's rows", (take(x, index), w, ends, *rest), kwargs, rows(y, index))


def experts_relabelled(args, kwargs, y, seed):
    """grouped_linear: experts, with their rows, in another order."""
    x, w, offsets, *rest = args
    at, order = offsets.tolist(), _relabelling(w.shape[0], seed)
    if order is None or spans(kwargs, False):
        return None
    index = torch.cat([torch.arange(at[e], at[e + 1]) for e in order.tolist()] + [torch.arange(at[-1], len(x))])
    ends = torch.cat((torch.zeros(1, dtype=torch.int64), offsets.cpu().long().diff()[order].cumsum(0))).to(offsets)
    args = take(x, index), _experts(w, order), ends, *rest
    return Related("experts in another order", args, _experts_of(kwargs, order, "bias"), rows(y, index))


def planes_relabelled(args, kwargs, y, seed):
    """masked_linear: experts, with their planes, in another order."""
    x, w, counts, *rest = args
    order = _relabelling(w.shape[0], seed)
    if order is None or spans(kwargs, False):
        return None
    args = take(x, order), _experts(w, order), take(counts, order), *rest
    judged = torch.arange(x.shape[1]) < counts.cpu()[order][:, None]
    return Related("experts in another order", args, _experts_of(kwargs, order, "bias"), rows(y, order), judged)


def plane_rows_reordered(args, kwargs, y, seed):
    """masked_linear: the rows that count of each plane in another order."""
    x, w, counts, *rest = args
    e, most = x.shape[:2]
    if not counts.numel() or int(counts.max()) < 2 or spans(kwargs, False):
        return None
    index = torch.arange(most).repeat(e, 1)
    for expert, count in enumerate(counts.tolist()):
        index[expert, :count] = hashed(seed, "order", count).argsort()
    flat = (torch.arange(e)[:, None] * most + index).flatten()
    expected = None if y is None else y.flatten(0, 1)[flat].view_as(y)
    args = take(x.flatten(0, 1), flat).view(x.shape), w, counts, *rest
    return Related("an expert's rows in another order", args, kwargs, expected, torch.arange(most) < counts.cpu()[:, None])


def plane_scaled(args, kwargs, y, seed):
    """masked_linear: as scaled, where the rows that do not count may hold anything."""
    live = torch.arange(args[0].shape[1]) < args[2].cpu()[:, None]
    related = None if y is None else grouped_scaled(args, kwargs, torch.where(live[..., None], y, 0), seed)
    if related is not None:
        related.judged = live
    return related


def blocks_relabelled(args, kwargs, y, seed):
    """indexed_linear: experts in another order, each block keeping its own."""
    x, w, sorted_ids, expert_ids, *rest = args
    order = _relabelling(w.shape[0], seed)
    if order is None:
        return None
    args = x, _experts(w, order), sorted_ids, _renamed(expert_ids, order), *rest
    return Related("experts in another order", args, _experts_of(kwargs, order, "bias"), y)


def sums_reordered(args, kwargs, y, seed):
    """moe_fused_mul_sum: tokens in another order."""
    return _some_sums("tokens in another order", args, kwargs, y, lambda m: hashed(seed, "order", m).argsort())


def sums_split(args, kwargs, y, seed):
    """moe_fused_mul_sum: half of the tokens."""
    return _some_sums("half of the batch", args, kwargs, y, lambda m: half(m, seed))


def _some_sums(name, args, kwargs, y, choice):
    inputs, weights = args
    if len(inputs) < 2 or _far(inputs):
        return None
    index, given = choice(len(inputs)), dict(kwargs)
    if given.get("topk_ids") is not None:
        given["topk_ids"] = take(given["topk_ids"], index)
    return Related(name, (take(inputs, index), take(weights, index)), given, rows(y, index))


def slots_reordered(args, kwargs, y, seed):
    """moe_fused_mul_sum: the slots of every token in another order."""
    inputs, weights = args
    if inputs.shape[1] < 2 or _far(inputs):
        return None
    index, given = hashed(seed, "order", inputs.shape[1]).argsort().flip(0).to(inputs.device), dict(kwargs)
    if given.get("topk_ids") is not None:
        given["topk_ids"] = given["topk_ids"][:, index]
    return Related("slots in another order", (inputs[:, index], weights[:, index]), given, y)


def sums_scaled(args, kwargs, y, seed):
    """moe_fused_mul_sum: rows times a power of two."""
    inputs, weights = args
    factor = FACTORS[seed // 64 % len(FACTORS)]
    if y is None or _far(inputs):
        return None
    x, expected = times(inputs, factor), result_times(y, factor)
    return None if x is None or expected is None else Related(f"rows times {factor}", (x, weights), kwargs, expected)


def zero_for_empty(args, kwargs, y, seed):
    """moe_fused_mul_sum: empty slots with the id of one that counts, weight zero and finite rows; without any, weights of zero as empty slots."""
    inputs, weights = args
    ids, mapped = kwargs.get("topk_ids"), kwargs.get("expert_map")
    if _far(inputs) or not weights.numel():
        return None
    if ids is None:
        if not bool((weights == 0).any()):
            return None
        ids = torch.where(weights == 0, -1, torch.arange(weights.shape[1], device=weights.device)).int()
        inputs = torch.where((weights == 0)[..., None], torch.nan, inputs)
        return Related("an empty slot for weight zero", (inputs, weights), {**kwargs, "topk_ids": ids}, y)
    found = _filled(weights, ids, mapped)
    if found is None:
        return None
    weights, ids, empty = found
    return Related("weight zero for an empty slot", (torch.where(empty[..., None], 1.0, inputs), weights), {**kwargs, "topk_ids": ids}, y)


def layer_tokens_reordered(args, kwargs, y, seed):
    """fused_experts: tokens in another order."""
    return _some_layer("tokens in another order", args, kwargs, y, lambda m: hashed(seed, "order", m).argsort(), False)


def layer_split(args, kwargs, y, seed):
    """fused_experts: half of the tokens."""
    return _some_layer("half of the batch", args, kwargs, y, lambda m: half(m, seed), True)


def _some_layer(name, args, kwargs, y, choice, smaller):
    x, w13, w2, weights, ids = args
    if len(x) < 2 or spans(kwargs, smaller):
        return None
    index = choice(len(x))
    return Related(name, (take(x, index), w13, w2, take(weights, index), take(ids, index)), kwargs, rows(y, index))


def layer_relabelled(args, kwargs, y, seed):
    """fused_experts: experts in another order, and the ids, or the map, with them."""
    x, w13, w2, weights, ids = args
    order = _relabelling(w13.shape[0], seed)
    if order is None:
        return None
    given = _experts_of(kwargs, order, "bias13", "bias2")
    if given.get("expert_map") is not None:
        given["expert_map"] = _renamed(given["expert_map"], order)
    else:
        ids = _renamed(ids, order)
    return Related("experts in another order", (x, _experts(w13, order), _experts(w2, order), weights, ids), given, y)


def layer_weights_scaled(args, kwargs, y, seed):
    """fused_experts: topk_weights times a power of two; float16 has no room for what is stored on the way."""
    x, w13, w2, weights, ids = args
    factor = FACTORS[seed // 64 % len(FACTORS)]
    if y is None or y.dtype == torch.float16 or kwargs.get("apply_router_weight_on_input"):
        return None
    w, expected = times(weights, factor), result_times(y, factor)
    return None if w is None or expected is None else Related(f"topk_weights times {factor}", (x, w13, w2, w, ids), kwargs, expected)


def layer_zero_for_empty(args, kwargs, y, seed):
    """fused_experts: empty slots with the id of one that counts, and weight zero."""
    x, w13, w2, weights, ids = args
    found = None if kwargs.get("apply_router_weight_on_input") else _filled(weights, ids, kwargs.get("expert_map"))
    return None if found is None else Related("weight zero for an empty slot", (x, w13, w2, *found[:2]), kwargs, y)


def layer_duplicates_merged(args, kwargs, y, seed):
    """fused_experts: of two slots of a token with one expert, the first with both weights, and the second empty."""
    x, w13, w2, weights, ids = args
    local = _local(ids, kwargs.get("expert_map"))
    for first in range(ids.shape[1]):
        for second in range(first + 1, ids.shape[1]):
            twice = (local[:, first] == local[:, second]) & (local[:, first] >= 0)
            if bool(twice.any()):
                at = twice.nonzero()[:, 0].to(ids.device)
                total, merged, fewer = weights[at, first].double() + weights[at, second].double(), weights.clone(), ids.clone()
                merged[at, first], merged[at, second], fewer[at, second] = total.to(weights.dtype), torch.nan, -1
                if not torch.equal(merged[at, first].double(), total):
                    return None
                return Related("one slot with both weights", (x, w13, w2, merged, fewer), kwargs, y)
    return None


def _relabelling(experts, seed):
    """Old numbers of the experts in their new order, or None where there is one order only."""
    if experts < 2:
        return None
    order = hashed(seed, "experts", experts).argsort()
    return order.roll(1) if torch.equal(order, torch.arange(experts)) else order


def _experts(w, order):
    if not isinstance(w, QTensor):
        return take(w, order)
    parts = {name: getattr(w, name) for name in TENSORS}
    return replace(w, **{name: take(t, order) for name, t in parts.items() if t is not None})


def _experts_of(kwargs, order, *names):
    return {name: take(t, order) if name in names and t is not None else t for name, t in kwargs.items()}


def _renamed(ids, order):
    """Expert numbers as they are in the new order; those below zero stay."""
    new = order.argsort().to(ids.device)
    return torch.where(ids >= 0, new[ids.clamp(min=0).long()].to(ids.dtype), ids)


def _local(ids, expert_map):
    """Each slot's expert here, -1 for none, on the CPU."""
    return local_ids(ids.cpu(), torch.iinfo(torch.int64).max if expert_map is None else expert_map.shape[0], _cpu(expert_map))


def _cpu(t):
    return None if t is None else t.cpu()


def _filled(weights, ids, expert_map):
    """(weights, ids, which): empty slots of tokens that have another slot, with its id and weight zero; None without any."""
    local = _local(ids, expert_map)
    empty = (local < 0) & (local >= 0).any(1, keepdim=True)
    if not bool(empty.any()):
        return None
    first = (local >= 0).long().argmax(1, keepdim=True).to(ids.device)
    empty = empty.to(ids.device)
    return torch.where(empty, 0, weights), torch.where(empty, ids.gather(1, first), ids), empty


def _far(t):
    return any(stride > 2**20 for stride in t.stride())
