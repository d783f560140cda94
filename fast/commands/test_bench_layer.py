"""python -m fast bench-layer."""

import re
import time

import pytest
import torch

from fast.commands import timing

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(timing, "ROTATED", 1000)
    monkeypatch.setattr(timing, "CALLS", 3)


@pytest.mark.parametrize("more", [(), ("--x-format", "int8_token"), ("--impl", "torch")], ids=str)
def test_a_table(call, quick, more):
    code, out, err = call("bench-layer", "--format", "int4_g32", "--n", 32, "--k", 64, "--m", "1,4", "--device", "cpu", *more)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    x = "int8" if "int8_token" in more else "bfloat16"
    assert re.fullmatch(rf"int4_g32 32x64, 0.0 MiB \(16 bits: 0.0\), x {x}, on cpu, \d+ threads", lines[0])
    assert lines[2].split() == ["m", "impl", "fast.linear", "16", "bits", "speed-up"]
    cell = r"\d+\.\d \(\d+\.\d to \d+\.\d\)"
    for line, m in zip(lines[3:], (1, 4), strict=True):
        assert re.fullmatch(rf"{m} +torch +{cell} +{cell} +\d+\.\d\d", line)


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--format", "int4_g32", "--impl", "humming"), "linear: impl 'humming' cannot run .*: Humming runs on NVIDIA GPUs only"),
        (("--format", "int4_g32", "--impl", "tritn"), "'tritn' is none of torch.*; the nearest is triton"),
        (("--format", "int4_h128"), "quantize: k=64 is no multiple of the rotation's block 128"),
        (("--format", "int4_g32", "--x-format", "nf4"), "x cannot be quantized to nf4"),
        (("--format", "int4_g32", "--m", "1,0"), "'1,0' is no list of positive numbers"),
        (("--format", "int4_g32", "--n", "-3"), "'-3' is no positive number"),
        (("--fromat", "int4_g32"), "there is no option --fromat; the nearest is --format"),
        ((), "required: --format"),
    ],
    ids=str,
)
def test_refusals(call, quick, argv, message):
    code, out, err = call("bench-layer", "--k", 64, "--n", 32, "--device", "cpu", *argv)
    assert (code, out) == (2, "") and re.search(message, err), err


def test_too_little_memory(call):
    code, out, err = call("bench-layer", "--format", "int8", "--n", 2**30, "--k", 2**30, "--device", "cpu")
    assert (code, out) == (1, "") and err.startswith("python -m fast bench-layer: there is too little memory: ")


def test_times_are_those_of_the_calls(monkeypatch):
    monkeypatch.setattr(timing, "CALLS", 5)
    called = []
    calls = [lambda i=i: (called.append(i), time.sleep(0.002)) for i in range(3)]
    median, least, most = timing.device_us(calls, CPU)
    assert 2000 <= least <= median <= most and called == [0, 0, 1, 2, 0, 1]
    assert timing.host_us(calls[0], CPU)[1] >= 2000
    monkeypatch.setattr(timing, "SECONDS", 0)
    called.clear()
    timing.device_us(calls, CPU)
    assert len(called) == 1 + timing.FEW


def test_copies_exceed_what_caches_hold():
    for size in (240_241, 10**7, 240_000_000, 10**12):
        assert timing.copies(size) * size > timing.ROTATED >= (timing.copies(size) - 1) * size
    assert timing.copies(0) == timing.copies(1000) == timing.MOST
