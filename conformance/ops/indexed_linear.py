"""indexed_linear: as grouped_linear, on rows that blocks of slots pick, times topk_weights; zeros for slots that no local expert has."""

import torch

from ref.moe import moe_align_block_size

from ..case import DTYPES
from ..grouped_case import indexed_cases, pool
from ..regimes import view_of
from . import Problem
from .grouped_data import GroupedTruth, draw, draw_weights, of_case
from .grouped_linear import SHARE, labels

__all__ = ["FUNCTION", "SHARE", "build", "cases", "labels", "pool"]
FUNCTION = "indexed_linear"


def cases(label, config=None):
    return indexed_cases(label, config)


def build(case, device, declared=None):
    device, route = torch.device(device), case.route
    slots, top_k = route.n, 1 if case.second else route.t
    data = draw(case, max(route.local_experts, 1), slots // top_k)
    owner = route.local(case.seed).flatten()
    used = (owner >= 0).view(-1, top_k).any(1)
    view, buffer = view_of(data.poisoned(used), (slots // top_k,), case.pad, case.offset, case.transposed, device)
    w, kwargs, owned = of_case(case, data, device)
    ids, mapped = route.ids(case.seed), route.expert_map(case.seed)
    blocks = [t.to(device) for t in moe_align_block_size(ids, case.block_size, route.e, mapped, case.whole, case.ignore)]
    owned |= {"x": buffer} | dict(zip(("sorted_token_ids", "expert_ids", "num_tokens_post_padded"), blocks, strict=True))
    if case.told:
        kwargs["block_size"] = case.block_size
    weights = draw_weights(case, slots)
    if weights is not None:
        kwargs["topk_weights"] = owned["topk_weights"] = weights.to(device)
    truth = GroupedTruth(data, device, declared, torch.arange(slots) // top_k, owner, weights)
    return Problem((view, w, *blocks, top_k), truth.check, device, owned, kwargs, ((slots, case.n), DTYPES[case.dtype]))
