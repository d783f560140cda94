"""fused_topk: the choice of experts conditional on what float32 scores leave open, weights conditional on the choice (see routing).

Equal logits with equal biases go to the lower expert. Variant "any order": the right experts, not best first. Logits with NaN, or whose
scores are not finite: ids legal and distinct.
"""

import torch

from ref.rounding import round_to

from .. import moe_strategies, routing
from ..case import DTYPES
from ..oracle import equal
from ..regimes import below, hashed, normal, view_of
from . import Problem, accepted

FUNCTION = "fused_topk"
SHARE = 0.5


def labels(formats):
    return list(routing.SCORES)


def cases(label, config=None):
    return moe_strategies.topk_cases(label)


def draw_logits(seed, m, e, dtype, data):
    """(m, e) of a regime: integers, ties and equal (three numbers a row, one of them zero, or one number), normal, low (scores near zero),
    close (an ulp or two apart), wide, masked (some are -inf), nan, inf. A zero has any sign."""
    bits = hashed(seed, "logits", m, e)
    v = normal(bits)
    if data == "integers":
        v = (below(bits, 7) - 3).float()
    elif data in ("equal", "ties"):
        # One, or three numbers a row.
        values = normal(hashed(seed, "values", m, 3)) * torch.tensor((1.0, 1.0, 0.0))
        v = values.gather(1, below(bits, 3 if data == "ties" else 1))
    elif data == "low":
        v = v * 2 - 12
    elif data == "close":
        v = 1 + below(bits, 3) * 2.0**-23 if dtype == "fp32" else 1 + below(bits, 3) * (2.0**-10 if dtype == "fp16" else 2.0**-7)
    elif data == "wide":
        v = v * (40.0 if seed % 2 else 20000.0 if dtype == "fp16" else 2.0**100)
    elif data == "masked":
        v = torch.where((below(bits >> 32, 3) == 0) & (torch.arange(e) != seed % e), -torch.inf, v)
    elif data in ("nan", "inf") and m:
        v = torch.where(below(bits >> 40, 4) == 0, float("nan") if data == "nan" else float("inf") * (-1) ** (seed % 2), v)
    v = torch.where((v == 0) & (below(bits >> 24, 2) == 1), -0.0, v)
    return round_to(v.double(), DTYPES[dtype])


def draw_bias(seed, e, dtype, data):
    bits = hashed(seed, "bias", e)
    bias = (below(bits, 5) - 2) / 4.0 if data in ("integers", "equal", "close") else normal(bits) / 8
    return bias.to(DTYPES[dtype])


def build(case, device, declared=None):
    device = torch.device(device)
    logits = draw_logits(case.seed, case.m, case.e, case.dtype, case.data)
    bias = None if case.bias is None else draw_bias(case.seed, case.e, case.bias, case.data)
    view, buffer = view_of(logits, (case.m,), case.pad, case.offset, case.transposed, device)
    owned = {"logits": buffer} | ({} if bias is None else {"correction_bias": bias.to(device, copy=True)})
    kwargs = {"renormalize": case.renormalize, "scoring_func": case.scoring_func, "routed_scaling_factor": case.factor}
    kwargs |= {name: tensor for name, tensor in owned.items() if name != "logits"}
    if case.groups:
        kwargs |= {"num_expert_group": case.groups, "topk_group": case.topk_group}
    found = routing.scores(logits, case.scoring_func)

    def choice(ids):
        rows = len(ids)
        legal = accepted(declared, routing.VARIANTS)
        return routing.judge_choice(ids, logits[:rows], _head(found, rows), bias, case.groups, case.topk_group, legal)

    return finish(case, found, device, (view, case.top_k), kwargs, owned, choice)


def finish(case, found, device, args, kwargs, owned, choice):
    """The Problem of a routing; choice: ids of the rows that are no padding -> variant, raises Disagreement."""
    slots = case.top_k + case.shared
    valid = case.m if case.num_valid is None else case.num_valid
    kwargs |= {} if case.num_valid is None else {"num_valid": valid}
    kwargs |= {"num_shared_experts": case.shared, "shared_weight": case.shared_weight} if case.shared else {}

    def check(result):
        ids, weights = result
        equal(ids[valid:], torch.full((case.m - valid, slots), -1, dtype=torch.int32), "ids of padding")
        equal(weights[valid:], torch.zeros(case.m - valid, slots), "weights of padding")
        ids, weights = ids[:valid], weights[:valid]
        shared = torch.arange(case.e, case.e + case.shared, dtype=torch.int32).expand(valid, -1)
        equal(ids[:, case.top_k :], shared, "ids of shared experts")
        equal(weights[:, case.top_k :], torch.full((valid, case.shared), case.shared_weight), "weights of shared experts")
        chosen = ids[:, : case.top_k]
        variant = choice(chosen)
        agreement = routing.judge_weights(weights[:, : case.top_k], chosen, _head(found, valid), case.renormalize, case.factor)
        agreement.variant = variant
        return agreement

    shape = case.m, slots
    return Problem(args, check, device, owned, kwargs, [(shape, torch.int32), (shape, torch.float32)])


def _head(found, rows):
    return routing.Scores(found.score[:rows], found.error[:rows], found.judged[:rows])
