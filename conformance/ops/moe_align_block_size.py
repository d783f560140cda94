"""moe_align_block_size, bit for bit. Variant "any order": the slots of an expert in another order than their own, which vLLM leaves open."""

import torch

from ref.moe import moe_align_block_size

from .. import moe_strategies
from ..oracle import Agreement, Disagreement, equal
from . import Problem, accepted

FUNCTION = "moe_align_block_size"
VARIANTS = ("stable", "any order")
SHARE = 0.75
PARTS = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded")


def labels(formats):
    return ["all"]


def cases(label, config=None):
    return moe_strategies.align_cases()


def build(case, device, declared=None):
    device, route = torch.device(device), case.route
    ids, mapped = route.ids(case.seed), route.expert_map(case.seed)
    want = moe_align_block_size(ids, case.block_size, route.e, mapped, case.pad, case.ignore)
    owned = {"topk_ids": ids.to(device)} | ({} if mapped is None else {"expert_map": mapped.to(device)})

    def check(result):
        variant = "stable"
        try:
            equal(result[0], want[0], PARTS[0])
        except Disagreement:
            variant = "any order"
            if variant not in accepted(declared, VARIANTS):
                raise
            equal(in_order(result[0], want[0], ids), want[0], f"{PARTS[0]}, each expert's in order")
        for got, part, name in zip(result[1:], want[1:], PARTS[1:], strict=True):
            equal(got, part, name)
        return Agreement(variant=variant)

    kwargs = {"expert_map": owned.get("expert_map"), "pad_sorted_ids": case.pad, "ignore_invalid_experts": case.ignore}
    given = {name: value for name, value in kwargs.items() if value is not None and value is not False}
    args = owned["topk_ids"], case.block_size, route.e
    return Problem(args, check, device, owned, given, [(part.shape, torch.int32) for part in want])


def in_order(got, want, ids):
    """got, sorted within each expert's slots; an expert's are where `want` has a run of them."""
    n = ids.numel()
    expert = torch.cat((ids.flatten().long(), torch.tensor([-1])))[want.long()]
    # The end of a run: another expert, or sentinels.
    run = torch.cat((torch.tensor([False]), expert[1:] != expert[:-1])).cumsum(0)
    order = (run * (n + 1) + got.long().clamp(0, n)).argsort(stable=True)
    return got[order]
