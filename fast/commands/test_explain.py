"""python -m fast explain, and what all commands share."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fast
from fast.commands.conftest import draw, llama, save

ROOT = Path(__file__).parent.parent.parent
LAYER = ("--n", 32, "--k", 64, "--device", "cpu")


def test_a_layer(call):
    code, out, err = call("explain", "--format", "int4_g32", "--m", "1,16", *LAYER)
    assert (code, err) == (0, "")
    calls = [line for line in out.splitlines() if not line.startswith(" ")]
    assert calls == [f"linear: bfloat16 x int4_g32 32x64 on cpu, m={m}" for m in (1, 16)]
    assert re.search(r"^  torch .* taken$", out, re.M) and re.search(
        r"^  humming .* not taken: Humming runs on NVIDIA GPUs only$", out, re.M
    )


def test_as_asked(call):
    code, out, _ = call("explain", "--format", "fp8", "--x-format", "int8_token", "--impl", "torch", *LAYER)
    assert code == 0 and "int8 (bfloat16) x fp8 32x64" in out


def test_a_checkpoint(tmp_path, call):
    tensors = llama(1) | {"model.layers.0.mlp.experts.down_proj": draw(2, 64, 64)}
    save(tmp_path / "in", tensors)
    assert call("quantize", tmp_path / "in", tmp_path / "out", "--format", "int4_g32")[0] == 0
    code, out, err = call("explain", tmp_path / "out", "--m", "1,16", "--device", "cpu")
    assert (code, err) == (0, "")
    table, *calls = out.split("\n\n")
    assert [line.split() for line in table.splitlines()] == [
        ["layer", "format", "shape", "m=1", "m=16"],
        ["model.layers.0.mlp.down_proj", "int4_g32", "64x96", "torch", "torch"],
        ["model.layers.0.mlp.experts.down_proj", "int4_g32", "2x64x64", "torch", "torch"],
        ["model.layers.0.mlp.up_proj", "int4_g32", "96x64", "torch", "torch"],
        ["model.layers.0.self_attn.k_proj", "int4_g32", "32x64", "torch", "torch"],
        ["model.layers.0.self_attn.q_proj", "int4_g32", "64x64", "torch", "torch"],
    ]
    assert len(calls) == 10 and all("taken" in one for one in calls)
    code, _, err = call("explain", tmp_path / "in")
    assert code == 2 and "has no quantization_config" in err


@pytest.mark.parametrize(
    "argv, message",
    [
        ((), "expected PATH, or --format, --n and --k"),
        (("--format", "int8", "--n", 4), "expected PATH, or --format, --n and --k"),
        (("there", "--format", "int8"), "got PATH and --format, expected one or the other"),
        (("nowhere",), "nowhere: there is no such file or directory"),
        (("--format", "int9", "--n", 4, "--k", 4), "unknown name 'int9'.*the nearest is 'int8'"),
        (("--format", "int4_h64", "--n", 4, "--k", 40), "k=40 is no multiple of the rotation's block 64"),
        (("--fromat", "int4"), "there is no option --fromat; the nearest is --format"),
    ],
    ids=str,
)
def test_refusals(call, argv, message):
    code, out, err = call("explain", *argv)
    assert (code, out) == (2, "") and re.search(message, err), err


def python(*argv):
    return subprocess.run([sys.executable, "-m", "fast", *argv], cwd=ROOT, capture_output=True, text=True)


def test_as_a_program(call):
    done = python("quantise")
    assert done.returncode == 2 and "'quantise' is none of quantize, bench-layer, explain; the nearest is quantize" in done.stderr
    code, out, _ = call("--help")
    assert code == 0 and all(name in out for name in ("quantize", "bench-layer", "explain", "exit codes: 0 done"))
    for command in ("quantize", "bench-layer", "explain"):
        code, out, _ = call(command, "--help")
        assert code == 0 and out.startswith(f"usage: python -m fast {command} ") and "exit codes: 0 done" in out
    code, _, err = call()
    assert code == 2 and "required: command" in err


def test_a_reader_that_has_seen_enough(tmp_path):
    """As head; what is printed is more than a pipe holds."""
    argv = ["explain", "--format", "int8", "--n", "8", "--k", "8", "--device", "cpu", "--m", ",".join(map(str, range(1, 400)))]
    run = subprocess.Popen([sys.executable, "-m", "fast", *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "linear: bfloat16 x int8 8x8 on cpu, m=1\n"
    run.stdout.close()
    assert run.stderr.read() == "" and run.wait() == 1


def test_an_interrupt_is_no_traceback(call, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fast.commands.explain.explain", interrupted)
    code, _, err = call("explain", "--format", "int8", *LAYER)
    assert (code, err) == (130, "python -m fast explain: interrupted\n") and fast.linear
