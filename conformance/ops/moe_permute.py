"""moe_permute, bit for bit up to the end of the last expert. Variant "any order": an expert's rows in another order than the slots'.

Rows behind the end may hold anything.
"""

import torch

from ref.moe import moe_permute
from ref.rounding import round_to

from .. import moe_strategies
from ..case import DTYPES
from ..oracle import Agreement, Disagreement, equal
from ..regimes import hashed, normal, view_of
from . import Problem, accepted
from .moe_align_block_size import VARIANTS, in_order

FUNCTION = "moe_permute"
SHARE = 0.75


def labels(formats):
    return ["all"]


def cases(label, config=None):
    return moe_strategies.permute_cases()


def draw_x(case):
    """(m, k): numbers that tell rows and columns apart; a row without any slot here is NaN."""
    x = normal(hashed(case.seed, "x", case.route.m, case.k))
    x[(case.route.local(case.seed) < 0).all(1)] = torch.nan
    return round_to(x.double(), DTYPES[case.dtype])


def call(case, x, device):
    """(args, kwargs, owned) of moe_permute, or moe_scatter_masked after its max_tokens."""
    route, mapped = case.route, case.route.expert_map(case.seed)
    view, buffer = view_of(x, (route.m,), case.pad, case.offset, False, device)
    owned = {"x": buffer, "topk_ids": route.ids(case.seed).to(device)}
    kwargs = {}
    if mapped is not None:
        kwargs["expert_map"] = owned["expert_map"] = mapped.to(device)
    if case.told or (mapped is not None and device.type != "cpu"):
        kwargs["num_local_experts"] = route.local_experts
    return (view, owned["topk_ids"], route.e), kwargs, owned


def build(case, device, declared=None):
    device, route = torch.device(device), case.route
    x = draw_x(case)
    dtype = torch.int64 if case.offset_int64 else torch.int32
    args, kwargs, owned = call(case, x, device)
    kwargs |= {"align": case.align, "offset_dtype": dtype}
    ids = route.ids(case.seed)
    rows, offsets, inverse, order = moe_permute(x, ids, route.e, route.expert_map(case.seed), align=case.align, offset_dtype=dtype)
    end = int(offsets[-1])

    def check(result):
        equal(result[1], offsets, "expert_first_token_offset")
        variant, got = "stable", result[3]
        try:
            equal(got, order, "permuted_idx")
        except Disagreement:
            variant = "any order"
            if variant not in accepted(declared, VARIANTS):
                raise
            equal(in_order(got, order, ids), order, "permuted_idx, each expert's in order")
        used = got < route.n
        want = inverse.flatten().clone()
        want[got[used].long()] = used.nonzero().flatten().to(torch.int32)
        equal(result[2], want.view_as(inverse), "inv_permuted_idx")
        want = torch.cat((x, x.new_zeros(1, case.k)))[torch.where(used, got // max(route.t, 1), route.m).long()]
        equal(result[0][:end], want[:end], "rows")
        return Agreement(variant=variant)

    kinds = [(part.shape, part.dtype) for part in (rows, offsets, inverse, order)]
    return Problem(args, check, device, owned, kwargs, kinds, lambda result: [result[0][:end], *result[1:]])
