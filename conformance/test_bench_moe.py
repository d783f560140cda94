"""The benchmark of experts: routes, floors, the check of a result, and a run of a small layer with the clock left out."""

import pytest
import torch

import fast
import ref

from . import bench, bench_moe

CPU = torch.device("cpu")
SMALL = bench_moe.Model(8, 2, 64, 32, "int4_g32_bf16")


def test_one_token_has_other_experts_on_every_route():
    ids = [bench_moe.draw_ids(bench_moe.MODELS["Qwen3-30B-A3B"], 1, "uniform", seed, CPU) for seed in range(16)]
    assert len(torch.cat(ids).unique()) == 128


@pytest.mark.parametrize("routing", bench_moe.ROUTINGS)
def test_routes_are_distinct_in_a_row_and_as_skewed_as_they_say(routing):
    ids = bench_moe.draw_ids(bench_moe.MODELS["Qwen3-30B-A3B"], 512, routing, 3, CPU)
    assert all(len(row.unique()) == 8 for row in ids) and ids.dtype == torch.int32
    counts = ids.flatten().bincount(minlength=128).sort(descending=True).values
    assert (counts[0] > 8 * counts.float().mean()) == (routing == "zipf")


def test_the_floor():
    model = bench_moe.MODELS["Qwen3-30B-A3B"]
    # The table of performance.md: 4.5 us for a token, and 391 for 4096.
    assert bench_moe.floor_us(model, 1, 8, 4.3e12, 790e12) == pytest.approx(4.5, abs=0.1)
    assert bench_moe.floor_us(model, 4096, 128, 4.3e12, 790e12) == pytest.approx(391, abs=1)
    q = bench_moe.draw_weights(SMALL, CPU)
    held = sum(w.packed.nbytes + w.scale.nbytes for w in map(ref.validate, q))
    assert held == SMALL.experts * bench_moe.expert_bytes(SMALL)


@pytest.mark.parametrize("form", ["int4_g32_bf16", "mxfp4"])
def test_a_cell(form, monkeypatch, capsys):
    """All but the clock and Humming: peers agree, and a wrong one is left out."""
    model = bench_moe.Model(8, 2, 64, 32, form, "silu" if form != "mxfp4" else "swigluoai")
    monkeypatch.setitem(bench_moe.MODELS, "small", model)
    monkeypatch.setattr(bench_moe, "ROUTES", 2)
    monkeypatch.setattr(bench, "capture", lambda calls: [call() for call in calls] and (None, calls))
    monkeypatch.setattr(bench, "interleaved", lambda graphs: {name: [10.0 + len(name), 9.0, 30.0] for name in graphs})
    layer = bench_moe.Layer(fast, "small", CPU)
    peers = (bench_moe.LAYER, bench_moe.PRODUCTS, bench_moe.RAW, bench_moe.AGAIN)
    cells = [bench_moe.measure(layer, m, "zipf", peers, 4.3e12, 790e12) for m in (1, 9)]
    for cell in cells:
        assert set(cell["us"]) == {bench_moe.LAYER, bench_moe.PRODUCTS, bench_moe.AGAIN} and not cell["outside"]
        assert list(cell["errors"]) == [bench_moe.RAW]
    monkeypatch.setattr(layer, "layer", lambda cell, ids, impl=None: cell.y.zero_())
    cell = bench_moe.measure(layer, 9, "uniform", peers, 4.3e12, 790e12)
    assert bench_moe.LAYER in cell["outside"] and bench_moe.LAYER not in cell["us"]
    sums = {"m": 9, "us": {bench_moe.SUM: [2.0, 1.0, 3.0]}, "bytes": {bench_moe.SUM: 8_000_000}, "errors": {}, "floor_us": 1.0}
    document = {"device": "none", "torch": "2", "cells": [*cells, cell], "sums": [sums], "bandwidth": 4e12, "peak": 7e14, "seconds": 1}
    lines = bench_moe.report(document).split("\n")
    assert lines[4].startswith("| small | 1 | zipf | 2 | 15.0 | 22.0 | 9.0 to 30.0 |") and lines[4].endswith("| 0.68 | - |")
    assert lines[-1] == "| 9 x 8 x 7168 | 2.00 (1.00 to 3.00) | - | - | 4.00 | - |"
    assert "small m=9 zipf" in capsys.readouterr().err


def test_without_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert bench_moe.main([]) == 2
    assert "there is none here" in capsys.readouterr().err
    for argv in (["--models", "Qwen"], ["--rows", "0"], ["--json", "/nowhere/at/all"]):
        with pytest.raises(SystemExit):
            bench_moe.main(argv)
