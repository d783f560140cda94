"""Routing: the definition written as loops, ties, NaN, groups, shared experts, padding, refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .check import DENOMINATORS, SCORING
from .topk import fused_topk, hash_topk

INF, NAN = math.inf, math.nan


def by_loops(row, top_k, scoring, bias, groups, kept, renormalize):
    """One row, in Python floats."""
    e = len(row)
    if scoring == "softmax":
        top = max(row)
        total = math.fsum(math.exp(v - top) for v in row)
        score = [math.exp(v - top) / total for v in row]
    elif scoring == "sigmoid":
        score = [1 / (1 + math.exp(-v)) for v in row]
    else:
        score = [math.sqrt(math.log1p(math.exp(v))) for v in row]
    worth = [s + (bias[i] if bias else 0) for i, s in enumerate(score)]
    legal = range(e)
    if groups:
        size = e // groups
        best = [math.fsum(sorted(worth[g * size : (g + 1) * size])[-2 if bias else -1 :]) for g in range(groups)]
        chosen = sorted(range(groups), key=lambda g: (-best[g], g))[:kept]
        legal = [i for i in range(e) if i // size in chosen]
    ids = sorted(legal, key=lambda i: (-worth[i], i))[:top_k]
    total = math.fsum(score[i] for i in ids) if renormalize else 1.0
    return ids, [score[i] / total for i in ids]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_definition(data):
    groups = data.draw(st.sampled_from([None, None, 1, 2, 4]))
    e = (groups or 1) * data.draw(st.integers(1, 6))
    kept = data.draw(st.integers(1, groups)) if groups else None
    top_k = data.draw(st.integers(1, e // groups * kept if groups else e))
    m, seed = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 2**16))
    coarse = data.draw(st.booleans())  # many ties
    logits = torch.randn(m, e, generator=torch.Generator().manual_seed(seed))
    logits = logits.round() if coarse else logits
    scoring, renormalize = data.draw(st.sampled_from(list(SCORING))), data.draw(st.booleans())
    bias = torch.randn(e, generator=torch.Generator().manual_seed(seed + 1)).round() if data.draw(st.booleans()) else None
    given = {"scoring_func": scoring, "correction_bias": bias, "num_expert_group": groups, "topk_group": kept}
    ids, weights = fused_topk(logits, top_k, renormalize, **given)
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32 and ids.shape == weights.shape == (m, top_k)
    for row, got_ids, got_weights in zip(logits.tolist(), ids.tolist(), weights.double(), strict=True):
        expected_ids, expected = by_loops(row, top_k, scoring, None if bias is None else bias.tolist(), groups, kept, renormalize)
        assert got_ids == expected_ids
        # Rounded once to float32 from two evaluations in float64, each a few units of 2^-53 off.
        assert ((got_weights - torch.tensor(expected, dtype=torch.float64)).abs() <= 2.0**-24 * got_weights * (1 + 2.0**-20)).all()


def test_ties_go_to_the_lower_expert():
    ids, weights = fused_topk(torch.zeros(1, 5), 3)
    assert ids.tolist() == [[0, 1, 2]] and weights.tolist() == [[torch.tensor(1 / 3).item()] * 3]
    assert fused_topk(torch.tensor([[1.0, 3.0, 2.0, 3.0]]), 3)[0].tolist() == [[1, 3, 2]]


@pytest.mark.parametrize("scoring", SCORING)
@pytest.mark.parametrize("row", [[NAN] * 4, [0.0, NAN, 1.0, NAN], [INF, 0.0, INF, 0.0], [-INF] * 4, [NAN, -INF, INF, 1.0]])
def test_ids_are_legal_whatever_the_logits_are(scoring, row):
    for groups in ({}, {"num_expert_group": 2, "topk_group": 1}):
        ids, _ = fused_topk(torch.tensor([row]), 2, scoring_func=scoring, **groups)
        assert sorted(set(ids[0].tolist())) == sorted(ids[0].tolist()) and 0 <= ids.min() <= ids.max() < 4


def test_a_nan_is_chosen_last():
    assert fused_topk(torch.tensor([[NAN, -5.0, 1.0, NAN]]), 3, scoring_func="sigmoid")[0].tolist() == [[2, 1, 0]]


def test_the_bias_chooses_and_does_not_weigh():
    ids, weights = fused_topk(
        torch.tensor([[0.0, 1.0, 2.0]]), 1, False, scoring_func="sigmoid", correction_bias=torch.tensor([5.0, 0.0, 0.0])
    )
    assert ids.tolist() == [[0]] and weights.tolist() == [[0.5]]


def test_denominators_differ_where_all_scores_vanish():
    logits = torch.full((1, 4), -200.0)
    weights = {name: fused_topk(logits, 2, name, scoring_func="sigmoid")[1].tolist()[0] for name in DENOMINATORS}
    assert weights["sum"] == [0.5, 0.5] and max(weights["sum_1e-20"]) < 1e-60 + 1e-40
    assert fused_topk(logits, 2, True, scoring_func="sigmoid")[1].tolist() == [weights["sum"]]


def test_scale_shared_experts_and_padding():
    ids, weights = fused_topk(torch.zeros(3, 4), 2, routed_scaling_factor=2.5, num_shared_experts=2, shared_weight=0.4, num_valid=2)
    assert ids.tolist() == [[0, 1, 4, 5]] * 2 + [[-1] * 4]
    assert weights.tolist() == [[1.25, 1.25, torch.tensor(0.4).item(), torch.tensor(0.4).item()]] * 2 + [[0.0] * 4]


def test_hash_routing_takes_experts_from_a_table_and_weights_from_the_scores():
    logits, table = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]), torch.tensor([[2, 0], [1, 1]])
    ids, weights = hash_topk(logits, table, torch.tensor([0, 1]), False, scoring_func="sigmoid")
    assert ids.tolist() == [[2, 0], [1, 1]]
    assert torch.equal(weights, logits.double().sigmoid().gather(1, ids.long()).float())
    with pytest.raises(ValueError, match="tokens ranges from 0 to 2, expected 0 to 1"):
        hash_topk(logits, table, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="table ranges from 1 to 3, expected 0 to 2"):
        hash_topk(logits, table + 1, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"tokens \(3,\)"):
        hash_topk(logits, table, torch.tensor([0, 1, 1]))


BAD = [
    ((torch.zeros(2, 4), 5), {}, ValueError, "top_k=5, expected 1 to 4"),
    ((torch.zeros(2, 4), 0), {}, ValueError, "top_k=0"),
    ((torch.zeros(2, 4, dtype=torch.int32), 1), {}, TypeError, "torch.int32"),
    ((torch.zeros(4), 1), {}, ValueError, r"shape \(4,\), expected \(tokens, experts\)"),
    ((torch.zeros(2, 4), 1, "mean"), {}, ValueError, "renormalize='mean'"),
    ((torch.zeros(2, 4), 1), {"scoring_func": "tanh"}, ValueError, "unknown scoring_func 'tanh'"),
    ((torch.zeros(2, 4), 1), {"correction_bias": torch.zeros(3)}, ValueError, r"correction_bias has shape \(3,\), expected \(4,\)"),
    ((torch.zeros(2, 4), 1), {"num_expert_group": 2}, ValueError, "both or neither"),
    ((torch.zeros(2, 4), 1), {"num_expert_group": 3, "topk_group": 1}, ValueError, "4 experts do not form 3 groups"),
    ((torch.zeros(2, 4), 3), {"num_expert_group": 2, "topk_group": 1}, ValueError, "top_k=3, expected 1 to 2"),
    ((torch.zeros(2, 4), 1), {"num_valid": 3}, ValueError, "num_valid=3 of 2 rows"),
]


@pytest.mark.parametrize("args, kwargs, error, message", BAD)
def test_refusals(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        fused_topk(*args, **kwargs)
