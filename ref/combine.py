"""QTensors made of others, without any requantization: expert stacks, fused shards, chosen rows, slices of columns."""

import math
from dataclasses import replace

import torch

from .pack import pack, unpack, words_per_row
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
    block that would straddle two shards is written out for each row (group (gn, gk) becomes (1, gk)), as are all where some have other
    blocks of rows. Numbers stay what they are.

    Args:
        qs: QTensors (..., n, k) that differ in n, and in the rows that share a scale, only.

    Raises:
        ValueError: there is none, or formats, k or the group_index differ.
    """
    qs = list(qs)
    for q in qs:
        check_parts(q, "fuse")
    qs = _list(qs if len({q.format for q in qs}) == 1 else [by_row(q) for q in qs], "fuse")
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

    Scales that several rows share are written out for each row, unless all rows share one, or the rows chosen are neighbours of which the
    first is the first of a block.

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
    gn = q.format.group[0]
    if gn > 1 and (not index.numel() or int(index[0]) % gn or bool((index.diff() != 1).any())):
        q, gn = by_row(q), 1
    rows = {"packed": index} | (dict.fromkeys(("scale", "zero", "offset"), index[::gn] // gn) if gn else {})
    rows |= {"scale_2": index} if (q.format.scale_2 or "").startswith("channel") else {}
    parts = {name: getattr(q, name).index_select(-2, of) for name, of in rows.items() if getattr(q, name) is not None}
    return replace(q, shape=(*q.shape[:-2], index.numel(), q.shape[-1]), **parts)


def take_columns(q, start, stop):
    """Columns [start, stop) of a weight: w[..., start:stop].

    Where start is inside of a group, groups become finer: of gcd(gk, start) columns, so that groups of 128 cut at 64 are groups of 64, two
    with each scale, and cut at an odd place they are single columns. One scale for all of k stays one. Of a group_index the columns'
    part is kept, and the groups in it; if they are too many for the format's gk, it becomes the largest divisor of it for which they are not.

    Args:
        q: QTensor (..., n, k).
        start, stop: 0 <= start <= stop <= k.

    Returns:
        QTensor (..., n, stop - start).

    Raises:
        ValueError: columns that are not there, or a border inside of a block that was rotated together.

    >>> from .quantize import quantize
    >>> take_columns(quantize(torch.ones(8, 256), "int4_g128"), 64, 256)
    QTensor(int4_g64, shape=(8, 192), device=cpu)
    """
    check_parts(q, "take_columns")
    *lead, n, k = q.shape
    fmt = q.format
    if not 0 <= start <= stop <= k:
        raise ValueError(f"take_columns: got columns {start} to {stop} of a weight with k={k}, expected 0 <= start <= stop <= k")
    if fmt.hadamard and (start % fmt.hadamard or stop % fmt.hadamard):
        raise ValueError(
            f"take_columns: columns {start} to {stop} of {fmt} cut a block of {fmt.hadamard} that was rotated together; both must be multiples of it"
        )
    if (start, stop) == (0, k):
        return q
    (gn, gk), index = fmt.group, None if q.group_index is None else q.group_index[..., start:stop].contiguous()
    if gk == 0:
        chosen = None
    elif index is None:
        fine = math.gcd(gk, start)
        chosen = (start + fine * torch.arange(-(-(stop - start) // fine), device=q.packed.device)) // gk
        gk = fine
    else:
        index, chosen, gk = _renumbered(index, gk)
    parts = {name: getattr(q, name) for name in ("scale", "zero", "offset") if getattr(q, name) is not None}
    if chosen is not None:
        chosen = chosen.view(*(chosen.shape[:-1] or [1] * len(lead)), 1, chosen.shape[-1])
        parts = {name: torch.take_along_dim(part, chosen, -1) for name, part in parts.items()}
    packed = _columns(q.packed, fmt.element.bits, start, stop, k)
    shape = (*lead, n, stop - start)
    return replace(q, format=replace(fmt, group=(gn, gk)), shape=shape, packed=packed, group_index=index, **parts)


def _columns(packed, bits, start, stop, k):
    """The bitstreams of the columns [start, stop); they are moved as words where they begin with a word and end with one, or with the row."""
    if start * bits % 32 == 0 and (stop * bits % 32 == 0 or stop == k):
        return packed[..., start * bits // 32 : words_per_row(stop, bits)].contiguous()
    # 32 codes fill whole words.
    first = start // 32 * 32
    codes = unpack(packed[..., first * bits // 32 : words_per_row(stop, bits)], bits, stop - first)
    return pack(codes[..., start - first :], bits)


def _renumbered(index, gk):
    """A group_index (..., k) in which the groups that it has are 0, 1, 2, ...; which group each of these was, (..., groups); and gk.

    A format says by gk how many groups there are: those that are too many are the first again, and no column is in them.
    """
    *lead, k = index.shape
    found = [torch.unique(row, return_inverse=True) for row in index.reshape(torch.Size(lead).numel(), k)]
    count = max((len(used) for used, _ in found), default=0)
    gk = next(g for g in range(gk, 0, -1) if gk % g == 0 and -(-k // g) >= count)
    chosen, numbers = index.new_zeros(len(found), -(-k // gk), dtype=torch.long), index.new_empty(len(found), k)
    for i, (used, inverse) in enumerate(found):
        chosen[i, : len(used)], numbers[i] = used, inverse
    return numbers.view(index.shape), chosen.view(*lead, chosen.shape[1]), gk


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
