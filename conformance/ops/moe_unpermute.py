"""moe_unpermute: weighted sums of gathered rows within gamma(T) sum |w h| (moe_sum_data); rows that no slot has are NaN."""

import torch

from ref.moe import moe_permute

from .. import moe_strategies
from ..case import DTYPES
from ..regimes import view_of
from . import Problem
from .moe_sum_data import draw_rows, draw_weights, judge

FUNCTION = "moe_unpermute"
SHARE = 0.5


def labels(formats):
    return ["all"]


def cases(label, config=None):
    return moe_strategies.unpermute_cases()


def build(case, device, declared=None):
    device, route = torch.device(device), case.route
    m, t, k = route.m, route.t, case.k
    live = route.local(case.seed) >= 0
    h = draw_rows(case.seed, m, t, k, case.dtype, case.data, live)
    w = draw_weights(case.seed, m, t, case.weights, case.data, live)
    map_ = route.expert_map(case.seed)
    _, _, inverse, order = moe_permute(h[:, 0] if t else h.new_zeros(m, k), route.ids(case.seed), route.e, map_, align=case.align)
    rows = torch.full((order.numel(), k), torch.nan, dtype=h.dtype)
    rows[inverse[live].long()] = h[live]
    view, buffer = view_of(rows, (rows.shape[0],), case.pad, case.offset, False, device)
    owned = {"rows": buffer, "topk_weights": w.to(device, copy=True)}
    owned["inv_permuted_idx"] = (inverse.long() if route.int64 else inverse).to(device)
    args = view, owned["topk_weights"], owned["inv_permuted_idx"]
    return Problem(args, judge(h, w, live), device, owned, {}, ((m, k), DTYPES[case.dtype]))
