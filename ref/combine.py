"""QTensors made of others, without any requantization: expert stacks, fused shards, chosen rows."""

from dataclasses import replace

import torch

from .qtensor import TENSORS, QTensor, check_parts


def stack(qs):
    """Weights (n, k) as one stack (e, n, k): expert e is the e-th of qs.

    Args:
        qs: QTensors of one format and shape.

    Raises:
        ValueError: there is none, or formats or shapes differ, or only some have a group_index.
    """
    qs = _list(qs, "stack")
    first = qs[0]
    for q in qs:
        if tuple(q.shape) != tuple(first.shape):
            raise ValueError(f"stack: got shapes {tuple(first.shape)} and {tuple(q.shape)} (all must match)")
    return QTensor(first.format, (len(qs), *first.shape), **{name: _together(qs, name, torch.stack) for name in TENSORS})


def fuse(qs):
    """Shards one below the other: (n1, k), (n2, k), ... as (n1 + n2 + ..., k), as qkv and gate_up are fused.

    Each shard keeps its own scales: one scale for a tensor becomes one for each row, a second-level scale likewise, and a
    block that would straddle two shards is written out for each row (group (gn, gk) becomes (1, gk)). Numbers stay what they are.

    Args:
        qs: QTensors (..., n, k) that differ in n only.

    Raises:
        ValueError: there is none, or formats, k or the group_index differ.
    """
    qs = _list(qs, "fuse")
    first = qs[0]
    for q in qs:
        if (*q.shape[:-2], q.shape[-1]) != (*first.shape[:-2], first.shape[-1]):
            raise ValueError(f"fuse: got shapes {tuple(first.shape)} and {tuple(q.shape)} (all but n must match)")
        if q.group_index is not None and not torch.equal(q.group_index, first.group_index):
            raise ValueError("fuse: shards have different group_index, and a weight has one for all of its rows")
    if len(qs) == 1:
        return first
    gn = first.format.group[0]
    if gn == 0 or any(q.shape[-2] % gn for q in qs[:-1]):
        qs = [by_row(q) for q in qs]
    elif (first.format.scale_2 or "").startswith("tensor"):
        qs = [_second_by_row(q) for q in qs]
    shape = (*first.shape[:-2], sum(q.shape[-2] for q in qs), first.shape[-1])
    parts = {name: _together(qs, name, lambda tensors: torch.cat(tensors, dim=-2)) for name in TENSORS if name != "group_index"}
    return QTensor(qs[0].format, shape, group_index=first.group_index, **parts)


def take_rows(q, index):
    """Rows of a weight in another order, or some of them: w[..., index, :].

    Scales that several rows share are written out for each row, unless all rows share one.

    Args:
        q: QTensor (..., n, k).
        index: int64 (r,), each in [0, n).

    Returns:
        QTensor (..., r, k).

    Raises:
        ValueError: an index out of range.
    """
    check_parts(q, "take_rows")
    n = q.shape[-2]
    index = index.to(q.packed.device, torch.long)
    if index.dim() != 1 or (index.numel() and not 0 <= int(index.min()) <= int(index.max()) < n):
        raise ValueError(f"take_rows: index has shape {tuple(index.shape)} and must lie in [0, {n})")
    if q.format.group[0] > 1:
        q = by_row(q)
    rows = {"packed"} | ({"scale", "zero", "offset"} if q.format.group[0] == 1 else set())
    rows |= {"scale_2"} if (q.format.scale_2 or "").startswith("channel") else set()
    parts = {name: getattr(q, name).index_select(-2, index) for name in rows if getattr(q, name) is not None}
    return replace(q, shape=(*q.shape[:-2], index.numel(), q.shape[-1]), **parts)


def take_expert(q, expert):
    """One weight (n, k) of a stack (e, n, k).

    Raises:
        ValueError: q is no stack, or has no such expert.
    """
    if len(q.shape) != 3 or not 0 <= expert < q.shape[0]:
        raise ValueError(f"take_expert: got expert {expert} of shape {tuple(q.shape)}, expected one of a stack (e, n, k)")
    parts = {name: getattr(q, name)[expert] for name in TENSORS if getattr(q, name) is not None}
    return QTensor(q.format, tuple(q.shape[1:]), **parts)


def by_row(q):
    """The same numbers with scales for each row: group (gn, gk) becomes (1, gk), second-level scales of a tensor those of its rows."""
    n, gn = q.shape[-2], q.format.group[0]
    rows = torch.arange(n, device=q.packed.device) // (gn or max(n, 1))
    parts = {name: getattr(q, name).index_select(-2, rows) for name in ("scale", "zero", "offset") if getattr(q, name) is not None}
    return _second_by_row(replace(q, format=replace(q.format, group=(1, q.format.group[1])), **parts))


def _second_by_row(q):
    if q.scale_2 is None or not q.format.scale_2.startswith("tensor"):
        return q
    second = q.scale_2.expand(*q.shape[:-1], 1).contiguous()
    return replace(q, format=replace(q.format, scale_2=q.format.scale_2.replace("tensor", "channel")), scale_2=second)


def _list(qs, operation):
    qs = list(qs)
    if not qs:
        raise ValueError(f"{operation}: got no QTensor")
    for q in qs:
        check_parts(q, operation)
        if q.format != qs[0].format:
            raise ValueError(f"{operation}: got formats {qs[0].format} and {q.format} (all must match)")
        if (q.group_index is None) != (qs[0].group_index is None):
            raise ValueError(f"{operation}: some have a group_index and some have none")
    return qs


def _together(qs, name, combine):
    tensors = [getattr(q, name) for q in qs]
    return None if tensors[0] is None else combine(tensors)
