"""expert_map, bit for bit."""

import torch

from ref.moe import expert_map

from .. import moe_strategies
from ..oracle import Agreement, equal
from . import Problem

FUNCTION = "expert_map"
SHARE = 0.25


def labels(formats):
    return ["all"]


def cases(label, config=None):
    return moe_strategies.expert_map_cases()


def build(case, device, declared=None):
    device = torch.device(device)
    want = expert_map(case.e, case.ranks, case.rank, case.placement)

    def check(result):
        equal(result, want, "expert_map")
        return Agreement()

    args = case.e, case.ranks, case.rank, case.placement
    return Problem(args, check, device, {}, {"device": device}, (want.shape, torch.int32))
