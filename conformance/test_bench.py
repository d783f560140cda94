"""The benchmark's pure parts: floors, copies, the check of a result, tables, and what it says without a GPU."""

import json

import pytest
import torch

import ref

from . import bench

CPU = torch.device("cpu")


def test_the_floor_is_memory_or_arithmetic():
    # 8192 x 8192 int4 in groups of 128 with bf16 scales: 34.6 MB, at 4.3 TB/s and 790 TFLOP/s.
    size = 8192 * 8192 // 2 + 8192 * 64 * 2
    assert bench.floor_us(1, 8192, 8192, size, 4.3e12, 790e12) == pytest.approx((size + 32768) / 4.3e6)
    assert bench.floor_us(1024, 8192, 8192, size, 4.3e12, 790e12) == pytest.approx(2 * 1024 * 8192 * 8192 / 790e6)


@pytest.mark.parametrize("size", [1000, 8 << 20, 240_000_000, 10**9])
def test_copies_exceed_the_cache_together_and_no_more_than_need_be(size):
    count = bench.copies(size)
    assert count * size > bench.ROTATED >= (count - 1) * size


@pytest.mark.parametrize(("name", "x_format"), bench.HOST_FORMATS.items())
def test_a_result_is_checked_against_its_own_weight(name, x_format):
    q, x = bench.draw_weight(name, 200, 256, CPU), bench.draw_x(20, 256, CPU)
    ref.validate(q)
    judge = bench.judge_of(q, x, x_format)
    y = ref.linear(x, q, x_format=x_format)
    assert judge(y) is None
    assert "admissible" in judge(y.roll(1, 1))
    assert "NaN" in judge(torch.full_like(y, torch.nan)).upper().replace("NAN", "NaN")


def cell(m, us, outside=(), n=4096, k=4096):
    times = {name: [value, value, value] for name, value in us.items()}
    return {
        "format": "int4_g128_bf16",
        "n": n,
        "k": k,
        "m": m,
        "floor_us": 2.0,
        "us": times,
        "outside": dict.fromkeys(outside, "wrong"),
        "errors": {},
    }


def test_a_table_has_shares_ratios_and_notes():
    full = {bench.FAST: 5.0, bench.AGAIN: 5.1, bench.DEFAULT: 8.0, bench.FIXED: 24.0, bench.CUBLAS: 12.5}
    lines = bench.table([cell(1, full, [bench.DEFAULT]), cell(4, {bench.FAST: 4.0})], None).split("\n")
    assert lines[0].split(" | ")[2:6] == ["fast, us", "Humming, us", "Humming, deterministic, us", "cuBLAS bf16, us"]
    assert lines[2] == "| 4096 x 4096 | 1 | 5.0 | 8.0\\* | 24.0 | 12.5 | 2.0 | 40 % | 0.62 |"
    assert lines[3] == "| 4096 x 4096 | 4 | 4.0 | - | - | - | 2.0 | 50 % | - |"
    assert lines[5] == "The noise: the two times of `fast` in a cell differ by at most 2.0 %."
    assert lines[7].startswith("\\* Outside the bound")
    assert len({line.count("|") for line in lines[:4]}) == 1


def test_a_wrong_fast_has_no_time_and_no_ratio():
    lines = bench.table([cell(1, {bench.DEFAULT: 8.0}, [bench.FAST])], None).split("\n")
    assert lines[2] == "| 4096 x 4096 | 1 | - | 8.0 | - | - | 2.0 | - | - |"


def test_the_whole_report_survives_json():
    host = [{"call": "`fast.linear`, fp8", "us": [9.0, 8.5, 11.0], "memory": {1: (8192, 8192), 1024: (9 << 20, 8 << 20)}}]
    eight = cell(1, {bench.FAST: 5.0, bench.PRODUCT: 4.0}) | {"format": "fp8"}
    document = {
        "device": "a GPU",
        "torch": "2.11",
        "humming": "0.1.19",
        "seconds": 90.4,
        "bandwidth": 4.3e12,
        "peak": 7.9e14,
        "cells": [cell(1, {}), eight],
        "host": host,
    }
    text = bench.report(document)
    assert "### int4_g128_bf16 x bf16" in text and "### fp8 x fp8_e4m3_token" in text and "4.30 TB/s (a copy) and 790 TFLOP/s" in text
    assert "| `fast.linear`, fp8 | 9.0 | 8.5 | 11.0 | 8 KiB | 8 KiB | 9216 KiB | 8192 KiB |" in text
    json.dumps(document)


def test_without_a_gpu_it_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--quick"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == "bench: times are measured on a CUDA GPU, and there is none here\n"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--formats", "int4_g128"], "unknown format 'int4_g128', expected int4_g128_bf16 or fp8; the nearest is 'int4_g128_bf16'"),
        (["--json", "/no/such/folder/x.json"], "there is no folder '/no/such/folder'"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_usage(args, sentence, capsys):
    with pytest.raises(SystemExit) as exit:
        bench.main(args)
    assert exit.value.code == 2 and sentence in capsys.readouterr().err
