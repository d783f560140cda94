"""grouped_linear: for each row what linear is held to, with the weight of its expert; zeros behind the last expert's rows (grouped_data)."""

import torch

from ..case import DTYPES
from ..formats import GENERATED
from ..grouped_case import grouped_cases, pool
from ..regimes import view_of
from . import Problem
from .grouped_data import GroupedTruth, draw, of_case

__all__ = ["FUNCTION", "SHARE", "build", "cases", "labels", "pool"]

FUNCTION = "grouped_linear"
SHARE = 0.2
FORMATS = ("int4_g128_bf16", "mxfp4", "fp8_e4m3_b128x128", GENERATED)


def labels(formats):
    return list(FORMATS) if GENERATED in formats else list(formats)


def cases(label, config=None):
    return grouped_cases(label, config)


def build(case, device, declared=None):
    device, counts = torch.device(device), case.route.counts(case.seed)
    r = int(counts.sum()) + case.more
    data = draw(case, case.route.e, r)
    owner = torch.cat((torch.arange(case.route.e).repeat_interleave(counts), torch.full((case.more,), -1)))
    view, buffer = view_of(data.poisoned(owner >= 0), (r,), case.pad, case.offset, case.transposed, device)
    w, kwargs, owned = of_case(case, data, device)
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(torch.int64 if case.int64 else torch.int32).to(device)
    owned |= {"x": buffer, "expert_first_token_offset": offsets}
    truth = GroupedTruth(data, device, declared, torch.arange(r), owner)
    return Problem((view, w, offsets), truth.check, device, owned, kwargs, ((r, case.n), DTYPES[case.dtype]))
