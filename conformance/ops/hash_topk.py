"""hash_topk: ids of the table, bit for bit, and weights as fused_topk."""

import torch

from .. import moe_strategies, routing
from ..oracle import equal
from ..regimes import below, hashed, view_of
from .fused_topk import draw_logits, finish

FUNCTION = "hash_topk"
SHARE = 0.5


def labels(formats):
    return ["all"]


def cases(label, config=None):
    return moe_strategies.hash_topk_cases()


def build(case, device, declared=None):
    device = torch.device(device)
    integer = torch.int64 if case.int64 else torch.int32
    logits = draw_logits(case.seed, case.m, case.e, case.dtype, case.data)
    # Distinct experts in a row of the table.
    table = hashed(case.seed, "table", case.vocabulary, case.e).argsort(1)[:, : case.top_k].to(integer)
    tokens = below(hashed(case.seed, "tokens", case.m), case.vocabulary).to(integer)
    view, buffer = view_of(logits, (case.m,), case.pad, 0, False, device)
    owned = {"logits": buffer, "table": table.to(device, copy=True), "tokens": tokens.to(device, copy=True)}
    kwargs = {"renormalize": case.renormalize, "scoring_func": case.scoring_func, "routed_scaling_factor": case.factor}

    def choice(ids):
        equal(ids, table[tokens[: len(ids)].long()].to(torch.int32), "ids")
        return ""

    found = routing.scores(logits, case.scoring_func)
    return finish(case, found, device, (view, owned["table"], owned["tokens"]), kwargs, owned, choice)
