"""moe_scatter_masked, bit for bit, zeros behind an expert's rows included. Variant "any order": its rows in another order."""

import torch

from ref.moe import moe_scatter_masked

from .. import moe_strategies
from ..oracle import Agreement, Disagreement, equal
from . import Problem, accepted
from .moe_align_block_size import VARIANTS
from .moe_permute import call, draw_x

FUNCTION = "moe_scatter_masked"
SHARE = 0.5


def labels(formats):
    return ["all"]


def cases(label, config=None):
    return moe_strategies.scatter_cases()


def build(case, device, declared=None):
    device, route = torch.device(device), case.route
    x, local = draw_x(case), route.local(case.seed)
    most = max(route.counts(case.seed).tolist(), default=0) + case.more
    args, kwargs, owned = call(case, x, device)
    want = moe_scatter_masked(x, route.ids(case.seed), route.e, most, route.expert_map(case.seed))
    planes, counts, inverse = want

    def check(result):
        equal(result[1], counts, "counts")
        variant, places, expected = "stable", result[2], planes
        try:
            equal(places, inverse, "inv_permuted_idx")
        except Disagreement:
            variant = "any order"
            if variant not in accepted(declared, VARIANTS):
                raise
            # Each slot on its expert's plane, and all of the same places taken.
            equal(places.long().div(max(most, 1), rounding_mode="floor"), local, "inv_permuted_idx, its plane")
            equal(places.flatten().sort().values, inverse.flatten().sort().values, "inv_permuted_idx, sorted")
            expected = torch.zeros_like(planes)
            at = (local >= 0).nonzero()
            expected.view(-1, case.k)[places[local >= 0].long()] = x[at[:, 0]]
        equal(result[0], expected, "planes")
        return Agreement(variant=variant)

    return Problem((*args, most), check, device, owned, kwargs, [(part.shape, part.dtype) for part in want])
