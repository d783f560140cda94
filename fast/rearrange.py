"""Weights with a rotation or a group index as weights with neither, and x to match: one place for all kernels.

Sums have no order, so columns may be sorted by group, which makes groups of neighbours again, if x's columns are gathered in the same
order. And x (W H)^T = (x H) W^T, as H is symmetric: the rotation goes to x, before it is gathered, and is rounded to x's dtype.
"""

import contextlib
import importlib
import importlib.util
from dataclasses import replace

import torch

from . import codes

# Codes moved at a time: some 100 bytes each on the way.
CHUNK = 2**21


def needed(request):
    """Whether the weight has a rotation or a group index."""
    return request.group_index or request.format.hadamard > 0


def why_not(request):
    """Why x cannot be rearranged for such a call, as a sentence; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton, which rearranges x for it, is not installed"
    if request.x_format is not None and request.format.hadamard:
        return "quantized activations and a rotation of the weight do not go together here"
    if request.x_format is not None and request.x_format.group[1]:
        return "x is quantized in groups of neighbouring columns, and the weight's group index would put these in another order"
    return None


def plain(request, shape=None):
    """The request for the rearranged weight; its shape where that is known."""
    return replace(request, format=replace(request.format, hadamard=0), shape=tuple(shape or request.shape), group_index=False)


def prepare(module, q, request):
    """An implementation's plan for the rearranged weight, behind what x has to go through first.

    Raises:
        NotImplementedError: as the implementation does.
        ValueError: group_index reaches outside of the groups.
    """
    w, columns = rearranged(q)
    plan = module.prepare(w, plain(request, w.shape))
    steps = []
    if q.format.hadamard and q.shape[1]:
        steps.append(importlib.import_module("fast.triton.rotate").Rotation(q.format.hadamard))
    if columns is not None:
        steps.append(importlib.import_module("fast.triton.gather").Gather(columns))
    return Plan(plan, steps, q.packed.device)


class Plan:
    """run(x, bias, x_scale, out): the steps, then the plan for the rearranged weight."""

    def __init__(self, plan, steps, device):
        self.plan, self.steps, self.device = plan, steps, device

    def run(self, x, bias, x_scale, out):
        with _on(self.device):
            for step in self.steps:
                x = step(x)
            self.plan.run(x, bias, x_scale, out)


def rearranged(q):
    """The weight (n, k) without rotation and group index, and which column of q each of its columns is.

    Groups with more than gk columns become several with the same scale; where one has fewer, columns of code 0 follow, and x has
    to be 0 there.

    Returns:
        QTensor (n, k'), and int32 (k',), -1 where there is no such column; None where all columns are in place.
    """
    check_group_index(q)
    w = replace(q, format=replace(q.format, hadamard=0), group_index=None)
    if q.group_index is None or not q.format.group[1] or not q.shape[1]:
        return w, None
    columns, groups = _by_group(q.group_index.long(), q.scale.shape[1], q.format.group[1])
    parts = {name: getattr(q, name)[:, groups] for name in ("scale", "zero", "offset") if getattr(q, name) is not None}
    if torch.equal(columns, torch.arange(q.shape[1], device=columns.device)):
        return replace(w, **parts), None
    return replace(w, shape=(q.shape[0], len(columns)), packed=_moved(q, columns), **parts), columns.int()


def check_group_index(q):
    """Raise ValueError where the group index reaches outside of the weight's groups; reads it."""
    if q.group_index is None or not q.group_index.numel():
        return
    if not 0 <= int(q.group_index.min()) <= int(q.group_index.max()) < q.scale.shape[-1]:
        raise ValueError(f"linear: group_index of {q.format} reaches outside of its {q.scale.shape[-1]} groups")


def _by_group(index, count, gk):
    """Columns in the order of their groups, each gk places of one group: the column at each place, or -1, and the group of each gk places."""
    order = torch.argsort(index, stable=True)
    sizes = torch.bincount(index, minlength=count)
    blocks = (sizes + gk - 1) // gk
    # Of each column in turn: where its group starts among the sorted columns, and in the new weight.
    old, new = ((t.cumsum(0) - t)[index[order]] for t in (sizes, blocks * gk))
    place = new + torch.arange(len(index), device=index.device) - old
    columns = torch.full((int(place[-1]) + 1,), -1, device=index.device)
    columns[place] = order
    return columns, torch.repeat_interleave(torch.arange(count, device=index.device), blocks)


def _moved(q, columns):
    """The bitstream with its columns moved; code 0 where there is none."""
    bits = q.format.element.bits
    out = torch.empty(q.shape[0], -(-len(columns) * bits // 32), dtype=torch.int32, device=q.packed.device)
    step = max(1, CHUNK // len(columns))
    for start in range(0, q.shape[0], step):
        rows = slice(start, start + step)
        out[rows] = codes.pack(codes.unpack(q.packed[rows], bits, columns.clamp(min=0)) * (columns >= 0), bits)
    return out


def _on(device):
    return contextlib.nullcontext() if device.type == "cpu" or device.index == torch.cuda.current_device() else torch.cuda.device(device)
