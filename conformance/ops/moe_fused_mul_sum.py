"""moe_fused_mul_sum: weighted sums within gamma(T) sum |w h| (moe_sum_data), slots that do not count being NaN, and far apart in memory."""

import functools
import mmap

import torch

from .. import moe_strategies
from ..case import DTYPES
from ..regimes import view_of
from . import Problem
from .moe_sum_data import draw_rows, draw_weights, judge

FUNCTION = "moe_fused_mul_sum"
SHARE = 0.75
FAR = 2**31
# Pages are not counted before they are used; Python names Linux's flag from 3.12 on.
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def labels(formats):
    return ["all"]


def cases(label, config=None):
    return moe_strategies.mul_sum_cases()


def build(case, device, declared=None):
    device, route = torch.device(device), case.route
    m, t, k = route.m, route.t, case.k
    with_ids = case.ids or route.ranks > 0
    live = route.local(case.seed) >= 0 if with_ids else torch.ones(m, t, dtype=torch.bool)
    h = draw_rows(case.seed, m, t, k, case.dtype, case.data, live)
    w = draw_weights(case.seed, m, t, case.weights, case.data, live)
    view, buffer = _placed(h, case, device)
    owned = {"inputs": buffer, "topk_weights": w.to(device, copy=True)}
    kwargs = {}
    if with_ids:
        kwargs["topk_ids"] = owned["topk_ids"] = route.ids(case.seed).to(device)
    if route.ranks:
        kwargs["expert_map"] = owned["expert_map"] = route.expert_map(case.seed).to(device)
    return Problem((view, owned["topk_weights"]), judge(h, w, live), device, owned, kwargs, ((m, k), DTYPES[case.dtype]))


def _placed(h, case, device):
    """The rows as the case lays them out: (m, t, k), and what there is to guard."""
    m, t, k = h.shape
    far = _far(h.dtype, device) if case.layout.startswith("far") else None
    if far is not None:
        rows = m if case.layout == "far" else t
        apart = FAR // max(rows - 1, 1) + 8
        view = far.as_strided((m, t, k), (apart, k, 1) if case.layout == "far" else (k, apart, 1), case.offset)
        view.copy_(h)
        return view, view
    if case.layout == "slots":
        view, buffer = view_of(h.transpose(0, 1).reshape(m * t, k), (m * t,), case.pad, case.offset, False, device)
        return view.view(t, m, k).transpose(0, 1) if m * t else view.view(m, t, k), buffer
    view, buffer = view_of(h.reshape(m * t, k), (m * t,), case.pad, case.offset, case.layout == "columns", device)
    return view.unflatten(0, (m, t)) if m * t else view.view(m, t, k), buffer


@functools.lru_cache(maxsize=1)
def _far(dtype, device):
    """More than 2^31 elements, or None where a GPU has no room. On a CPU they are pages, of which only those that are used take memory."""
    size = FAR + 2**20
    if device.type == "cpu":
        pages = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
        return torch.frombuffer(pages, dtype=dtype)
    room = torch.cuda.mem_get_info(device)[0] > 2 * size * dtype.itemsize
    return torch.empty(size, dtype=dtype, device=device) if room else None
