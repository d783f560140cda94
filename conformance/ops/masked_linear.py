"""masked_linear: as grouped_linear, on planes; the rows that do not count may hold anything."""

import torch

from ..case import DTYPES
from ..grouped_case import MaskedLinearCase, grouped_cases, pool
from ..regimes import view_of
from . import Problem
from .grouped_data import GroupedTruth, draw, of_case
from .grouped_linear import SHARE, labels

__all__ = ["FUNCTION", "SHARE", "build", "cases", "labels", "pool"]
FUNCTION = "masked_linear"


def cases(label, config=None):
    return grouped_cases(label, config, MaskedLinearCase)


def build(case, device, declared=None):
    device, counts = torch.device(device), case.route.counts(case.seed)
    e = case.route.e
    most = int(counts.max()) + case.more
    data = draw(case, e, e * most)
    here = (torch.arange(most) < counts[:, None]).flatten()
    view, buffer = view_of(data.poisoned(here), (e, most), case.pad, case.offset, case.transposed, device)
    w, kwargs, owned = of_case(case, data, device)
    counts = counts.to(torch.int64 if case.int64 else torch.int32).to(device)
    owned |= {"x": buffer, "counts": counts}
    owner = torch.where(here, torch.arange(e).repeat_interleave(most), -1)
    truth = GroupedTruth(data, device, declared, torch.arange(e * most), owner, count=here)

    def check(y):
        return truth.check(y.reshape(e * most, case.n))

    def settled(tensors):
        return [y.reshape(e * most, case.n)[here] for y in tensors]

    return Problem((view, w, counts), check, device, owned, kwargs, ((e, most, case.n), DTYPES[case.dtype]), settled)
