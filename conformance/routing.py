"""Routing: how far float32 scores may be off, which choices of experts that leaves open, and how far weights may be off.

With u = 2^-24, per score, relative to it:
exp(-x): x (one rounding) times log2(e) (a constant and a product), 2^that to 4 u (what GPUs' ex2.approx promises): (4 + 3 |x|) u.
sigmoid: 1 / (1 + exp(-v)): the exponential, one addition, a division of 4 u: (9 + 3 |v|) u.
softmax: its exponential of v - max v, the average of the sum's terms, e - 1 additions, a division: (4 + 3 |x|) + average + e + 3.
sqrtsoftplus: sqrt(max(v, 0) + log1p(exp(-|v|))): the exponential, log1p to 8 u and an addition, halved by the root, which has 2 u:
(9 + 2 |v|) u.
Errors of an exponent by |x| u multiply: the bound is expm1 of these. Where float32 underflows (2^-126 and below) scores may be zero.

A choice is conditional on them: expert j has to come before i if its worth is certainly larger, by more than both errors; or if both
have the same logit and the same bias and j < i. A bias adds one rounding, a group's two best another.
"""

import itertools
from dataclasses import dataclass

import torch

from ref.moe import DENOMINATORS
from ref.moe.topk import SCORES

from .accumulators import U
from .oracle import Agreement, Disagreement, compare

VARIANTS = ("best first", "any order")
TINY = 2.0**-126
DIVISION, EXP = 4, 4


@dataclass
class Scores:
    """Of logits (m, e): the exact score, its admissible error, and whether a row is judged by them (none is NaN or infinite)."""

    score: torch.Tensor
    error: torch.Tensor
    judged: torch.Tensor


def scores(logits, scoring):
    """The Scores of logits, whose values float32 holds."""
    v = logits.double()
    score = SCORES[scoring](v)
    judged = score.isfinite().all(1)
    if scoring == "softmax":
        x = (v - v.amax(1, keepdim=True)).abs()
        exponent = torch.where(score > 0, EXP + 3 * x, 0.0)
        rounds = exponent + (score * exponent).sum(1, keepdim=True) + v.shape[1] + DIVISION
        under = (1 + v.shape[1]) * TINY
    elif scoring == "sigmoid":
        rounds, under = EXP + 1 + DIVISION + 3 * v.abs(), TINY
    else:
        rounds, under = 9 + 2 * v.abs(), TINY**0.5
    error = torch.where(score > 0, score * torch.expm1((rounds * U).clamp(max=80.0)), 0.0) + under
    return Scores(score, torch.nan_to_num(error, nan=0.0), judged)


def judge_choice(ids, logits, found, bias, groups, kept, variants=VARIANTS):
    """Hold chosen experts (m, top_k) against their scores; rows that cannot be judged: legal and distinct.

    Args:
        variants: those that are accepted.

    Returns:
        variant: "best first", or "any order" if only the set is right.

    Raises:
        Disagreement: an id that is illegal, twice there, or less than one that was left out.
    """
    (m, e), top_k = logits.shape, ids.shape[1]
    ids = ids.long()
    _legal(ids, e)
    worth, error = found.score, found.error
    if bias is not None:
        worth = worth + bias.double()
        error = error + U * (worth.abs() + error)
    same = logits[:, :, None] == logits[:, None, :]
    if bias is not None:
        same = same & (bias[:, None] == bias[None, :])
    before = _surely_before(worth, error, same)
    rank = torch.full((m, e), top_k).scatter_(1, ids, torch.arange(top_k).expand(m, -1))
    allowed = torch.ones(m, e, dtype=torch.bool)
    if groups:
        allowed = _allowed(rank < top_k, worth, error, logits, bias, groups, kept, before, found.judged)
    before = before & allowed[:, :, None] & allowed[:, None, :] & found.judged[:, None, None]
    wrong = before & (rank[:, :, None] > rank[:, None, :])
    if not bool(wrong.any()):
        return "best first"
    left_out = wrong & (rank == top_k)[:, :, None]
    if not bool(left_out.any()) and "any order" in variants:
        return "any order"
    row, better, chosen = (left_out if bool(left_out.any()) else wrong).nonzero()[0].tolist()
    raise Disagreement(
        "ids: choice",
        f"ids[{row}] = {ids[row].tolist()}, admissible only with expert {better} before {chosen}: it is worth {worth[row, better].item():.9g}, "
        f"the other {worth[row, chosen].item():.9g}",
    )


def _legal(ids, e):
    wrong = (ids < 0) | (ids >= e)
    if bool(wrong.any()):
        at = wrong.nonzero()[0].tolist()
        raise Disagreement("ids: range", f"ids{at} = {ids[tuple(at)].item()}, admissible 0 to {e - 1}")
    ordered = ids.sort(dim=1).values
    twice = ordered[:, 1:] == ordered[:, :-1]
    if bool(twice.any()):
        row = int(twice.nonzero()[0, 0])
        raise Disagreement("ids: twice", f"ids[{row}] = {ids[row].tolist()}, admissible: each expert once")


def _surely_before(worth, error, same):
    """bool (m, e, e): [r, j, i]: j has to come before i."""
    larger = (worth - error)[:, :, None] > (worth + error)[:, None, :]
    index = torch.arange(worth.shape[1])
    return (larger & ~same) | (same & (index[:, None] < index[None, :]))


def _allowed(chosen, worth, error, logits, bias, groups, kept, before, judged):
    """bool (m, e): the experts of the groups that were chosen from: a set of `kept` that holds all chosen experts and leaves out no better one.

    Where there are several, one with which the choice agrees, if there is one.
    """
    m, e = worth.shape
    size = e // groups
    planes = worth.unflatten(1, (groups, size))
    most = 1 if bias is None else min(2, size)
    top = planes.sort(dim=2, descending=True, stable=True).indices[:, :, :most]
    best = planes.gather(2, top).sum(2)
    off = error.unflatten(1, (groups, size)).amax(2) * most
    off = off + U * (best.abs() + off) * (most - 1)
    keys = [logits.unflatten(1, (groups, size)).gather(2, top)]
    keys += [] if bias is None else [bias.unflatten(0, (groups, size)).expand(m, -1, -1).gather(2, top)]
    same = torch.stack([(key[:, :, None] == key[:, None, :]).all(3) for key in keys]).all(0)
    group_before = _surely_before(best, off, same)
    used = chosen.unflatten(1, (groups, size)).any(2)
    allowed = torch.zeros(m, groups, dtype=torch.bool)
    for row in range(m):
        allowed[row] = _group_set(row, used, group_before, chosen, before, groups, kept, size) if judged[row] else True
    return allowed.repeat_interleave(size, 1)


def _group_set(row, used, group_before, chosen, before, groups, kept, size):
    legal = None
    for members in itertools.combinations(range(groups), kept):
        inside = torch.zeros(groups, dtype=torch.bool)
        inside[list(members)] = True
        if bool((used[row] & ~inside).any()) or bool((group_before[row] & ~inside[:, None] & inside[None, :]).any()):
            continue
        experts = inside.repeat_interleave(size)
        left_out = before[row] & (experts & ~chosen[row])[:, None] & chosen[row][None, :]
        if not bool(left_out.any()):
            return inside
        legal = inside if legal is None else legal
    if legal is None:
        touched = used[row].nonzero().flatten().tolist()
        raise Disagreement("ids: groups", f"ids[{row}] are of the groups {touched}, admissible: of the best only, {kept} of {groups}")
    return legal


def judge_weights(got, ids, found, renormalize, factor):
    """Hold weights (m, top_k) against the scores of the candidate's own ids.

    A sum has at most top_k - 1 additions and the error of its terms; then a division, and a product with the factor (and the rounding
    of factor and epsilon to float32).
    """
    score, error = found.score.gather(1, ids.long()), found.error.gather(1, ids.long())
    judged = found.judged
    exact, bound = score, error
    if renormalize:
        total = score.sum(1, keepdim=True) + DENOMINATORS["sum" if renormalize is True else renormalize]
        doubt = error.sum(1, keepdim=True) + (ids.shape[1] + 1) * U * total
        # A sum that may vanish in float32 divides by anything.
        judged = judged & (doubt < total / 4).squeeze(1)
        exact = score / total
        bound = (error + exact * doubt) / (total - doubt).clamp(min=TINY)
        bound = bound + DIVISION * U * (exact + bound) + TINY
    exact = exact * factor
    bound = bound * abs(factor) + 2 * U * (exact.abs() + bound * abs(factor)) + TINY
    return compare(got[judged], exact[judged], bound[judged], "weights") if bool(judged.any()) else Agreement()
