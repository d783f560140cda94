"""The command line: exit codes, sentences for bad input, the report."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

import ref

from . import __main__ as cli
from . import cell, report
from .candidate import Candidate, load
from .ops import operations


def main(capsys, *args):
    code = cli.main(["--candidate", "ref", "--device", "cpu", "--jobs", "0", *args])
    out, err = capsys.readouterr()
    return code, out, err


def test_ref_agrees_with_itself(capsys, tmp_path):
    path = tmp_path / "report.json"
    code, out, _ = main(capsys, "--examples", "3", "--formats", "int4_g32,nvfp4", "--json", str(path))
    assert code == 0, out
    assert "pass" in out and "linear_x" in out
    document = json.loads(path.read_text())
    assert document["schema"] == report.SCHEMA
    assert {c["op"] for c in document["cells"]} == set(operations())
    assert all(c["status"] == "pass" for c in document["cells"])


def test_a_disagreement_is_one_and_prints_how_to_see_it_again(capsys):
    code = cli.main(
        ["--candidate", "conformance.wrong:bias_dropped", "--device", "cpu", "--jobs", "0", "--formats", "int8", "--ops", "linear"]
    )
    out = capsys.readouterr().out
    assert code == 1
    line = next(line for line in out.splitlines() if "--case" in line)
    assert line.strip() == "python -m conformance --candidate conformance.wrong:bias_dropped --case 'LinearCase(bias='\"'\"'bf16'\"'\"')'"
    done = subprocess.run(line.replace("python", sys.executable, 1), shell=True, capture_output=True, text=True, env=_environment())
    assert done.returncode == 1 and "FAIL" in done.stdout and "admissible" in done.stdout


def test_one_case(capsys):
    code, out, _ = main(capsys, "--case", "LinearCase(n=3, format='nvfp4')")
    assert code == 0 and out.startswith("PASS LinearCase(n=3, format='nvfp4')")


def test_two_processes_find_the_same(capsys):
    args = ["--examples", "5", "--formats", "int8", "--ops", "linear,pack"]
    _, here, _ = main(capsys, *args)
    _, two, _ = main(capsys, *args, "--jobs", "2")
    assert here.splitlines()[:4] == two.splitlines()[:4] and "pass" in here


def test_what_a_candidate_prints_does_not_spoil_the_report(capfd):
    args = ["--candidate", "conformance.misbehaving:prints", "--device", "cpu", "--jobs", "1", "--ops", "linear", "--formats", "int8"]
    assert cli.main([*args, "--examples", "3"]) == 0
    out, err = capfd.readouterr()
    assert "noise" not in out + err and len(out.splitlines()) == 5


def test_a_case_that_ends_the_process(capfd):
    args = ["--candidate", "conformance.misbehaving:segfaults", "--device", "cpu", "--case", "LinearCase()"]
    assert cli.main(args) == 1
    out = capfd.readouterr().out
    assert out.splitlines() == [
        "CRASH linear case",
        "  the call ended its process: SIGSEGV",
        "  python -m conformance --candidate conformance.misbehaving:segfaults --case 'LinearCase()'",
    ]


def test_shards_are_a_partition(capsys):
    args = ["--examples", "2", "--formats", "int8,int4", "--ops", "dequantize,pack,unpack", "--json"]
    found = []
    for shard in ("1/1", "1/2", "2/2"):
        path = f"{shard[0]}{shard[2]}.json"
        with TemporaryDirectory() as folder:
            main(capsys, *args, f"{folder}/{path}", "--shard", shard)
            found.append([(c["op"], c["label"]) for c in json.loads(Path(folder, path).read_text())["cells"]])
    whole, one, two = found
    assert sorted(one + two) == sorted(whole) and one and two and not set(one) & set(two)


def test_a_database_brings_back_what_failed(capsys, tmp_path):
    args = ["--candidate", "conformance.wrong:bias_dropped", "--formats", "int8", "--ops", "linear", "--database", str(tmp_path / "new")]
    for examples in ("30", "1"):
        code, out, _ = main(capsys, *args, "--examples", examples)
        assert code == 1 and "LinearCase(bias=" in out


def test_an_interrupted_run_reports_what_it_has(capsys, monkeypatch):
    def cells(tasks):
        yield cell.run(tasks[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.worker, "here", cells)
    code, out, _ = main(capsys, "--examples", "2", "--formats", "int8,int4", "--ops", "pack")
    assert code == 130 and "1 pass, 1 not run" in out


def test_two_runs_are_compared(capsys, tmp_path):
    path = str(tmp_path / "old.json")
    args = ["--formats", "int8", "--ops", "linear", "--examples", "10"]
    main(capsys, *args, "--json", path)
    page = tmp_path / "report.html"
    code, out, _ = main(capsys, *args, "--candidate", "conformance.wrong:scale_of_wrong_row", "--compare", path, "--report", str(page))
    assert code == 1 and "1 worse" in out and "pass -> fail" in out and "<!doctype html>" in page.read_text()


BAD = [
    (["--candidate", "no.such.module"], "cannot import 'no.such.module'"),
    (["--candidate", "ref:lineal"], "has no attribute 'lineal'; the nearest is 'linear'"),
    (["--ops", "lineer"], "unknown operation 'lineer'"),
    (["--ops", "lineer"], "the nearest is 'linear'"),
    (["--ops", ","], "no operation given"),
    (["--formats", "int4_g12x"], "the nearest is 'int4_g128'"),
    (["--formats", ","], "no format given"),
    (["--profile", "sooke"], "unknown profile 'sooke', expected one of smoke, ci, deep, soak; the nearest is 'smoke'"),
    (["--device", "coda"], "unknown device 'coda'"),
    (["--device", "meta"], "device 'meta' is not supported"),
    (["--impl", "triton"], "no function of ref takes impl="),
    (["--examples", "0"], "--examples is 0"),
    (["--examples", "many"], "invalid int value"),
    (["--pool", "x"], "--pool is 'x'"),
    (["--seconds", "cuda=3"], "--seconds is 'cuda=3'"),
    (["--case", "LinearCase(k="], "cannot read"),
    (["--json", "/no/such/folder/x.json"], "there is no folder"),
    (["--json", "/"], "is a folder"),
    (["--report", "/no/such/folder/x.html"], "--report: there is no folder"),
    (["--compare", "/no/such/file"], "cannot read '/no/such/file'"),
    (["--waivers", "/no/such/file"], "--waivers: cannot read '/no/such/file'"),
    (["--database", __file__], "is no folder"),
    (["--jobs", "-1"], "--jobs is -1"),
    (["--timeout", "3"], "--timeout is '3', expected two numbers"),
    (["--timeout", "0,1"], "--timeout is '0,1', expected two numbers"),
    (["--shard", "3/2"], "--shard is '3/2', expected I/N"),
    (["--shard", "2/2", "--ops", "linear", "--formats", "int8"], "there are fewer cells than machines"),
    (["--formats", "uint4z_g64", "--ops", "quantize_input"], "no operation of quantize_input takes the formats uint4z_g64"),
    (["--colour"], "unrecognized arguments"),
]


@pytest.mark.parametrize(("args", "message"), BAD, ids=[" ".join(args) for args, _ in BAD])
def test_bad_input_is_one_sentence_and_exit_2(capsys, args, message):
    code, out, err = main(capsys, *args)
    assert code == 2
    assert message in err and err.count("\n") == 1 and not out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there(capsys):
    code, _, err = main(capsys, "--device", "cuda")
    assert code == 2 and "this machine has 0" in err


def test_unknown_impl_of_a_candidate_that_lists_them(capsys, monkeypatch):
    module = types.ModuleType("listing")
    module.IMPLEMENTATIONS = ("torch", "triton")
    module.linear = lambda x, w, bias=None, *, impl=None: ref.linear(x, w, bias)
    monkeypatch.setitem(sys.modules, "listing", module)
    code = cli.main(["--candidate", "listing", "--device", "cpu", "--jobs", "0", "--impl", "tritom"])
    assert code == 2 and "the nearest is 'triton'" in capsys.readouterr().err


def test_statuses(capsys, monkeypatch):
    module = types.ModuleType("partial")

    def linear(x, w, bias=None, *, x_format=None, x_scale=None):
        if w.format.element.bits > 4:
            raise NotImplementedError("linear: at most 4 bits")
        return ref.linear(x, w, bias, x_format=x_format, x_scale=x_scale)

    module.linear = linear
    monkeypatch.setitem(sys.modules, "partial", module)
    found = {}
    for op, label in (("linear", "int8"), ("linear", "int4"), ("pack", "4 bits")):
        found[op, label] = cell.run(cell.Task("partial", op, label, (None,), "cpu", 8))[0]
    assert found["linear", "int8"].status == "unsupported"
    assert found["linear", "int8"].reason == "linear: at most 4 bits"
    assert found["linear", "int4"].status == "pass"
    assert found["pack", "4 bits"].status == "not provided"
    assert cli.main(["--candidate", "partial", "--device", "cpu", "--jobs", "0", "--ops", "pack", "--formats", "int4"]) == 2
    assert "provides nothing" in capsys.readouterr().err


def test_strange_candidates_fail_in_a_sentence(monkeypatch):
    def strange(behave):
        module = types.ModuleType("strange")
        module.linear = behave
        monkeypatch.setitem(sys.modules, "strange", module)
        return cell.run(cell.Task("strange", "linear", "int8", (None,), "cpu", 5))[0]

    def raises(*args, **kwargs):
        raise KeyError("k")

    assert "raised KeyError" in strange(raises).error
    assert "the result is a NoneType" in strange(lambda *a, **k: None).error
    assert "TypeError" in strange(lambda: None).error
    assert strange(lambda x, w, bias=None: ref.linear(x, w, bias).double()).error.startswith("the result is")


def test_time_is_spread_over_the_cases():
    found = cell.run(cell.Task("ref", "linear", "int8", (None,), "cpu", 40, seconds=((None, 1e-3),)))[0]
    assert found.status == "pass" and 0 < found.examples < 20 and found.examples + found.left_out == 40


def test_a_pool_bounds_what_has_to_be_prepared(monkeypatch):
    seen = set()

    def linear(x, w, bias=None, *, impl=None, x_format=None, x_scale=None):
        seen.add((w.format, w.shape, x.dtype))
        return ref.linear(x, w, bias, x_format=x_format, x_scale=x_scale)

    module = types.ModuleType("slow")
    module.linear = linear
    monkeypatch.setitem(sys.modules, "slow", module)
    found = cell.run(cell.Task("slow", "linear", "int4_g128", ("a",), "cpu", 40, pools=(("a", 2),)))[0]
    # Two, and what a call in between makes of each: columns of zeros, or more rows.
    assert found.status == "pass" and found.examples > 20 and len(seen) <= 4


def test_candidates_by_attribute():
    assert load("ref.linear:linear").target is ref.linear
    candidate = Candidate("x", types.SimpleNamespace(linear=lambda x: x, pack=3))
    assert candidate.function("pack") is None and candidate.function("linear") is not None
    assert not candidate.takes("linear", "impl") and candidate.implementations == ()


def _environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def test_one_case_of_an_operation_that_is_not_provided(capsys):
    code, out, _ = main(capsys, "--candidate", "fast", "--case", "PackCase()")
    assert code == 2 and out.startswith("NOT PROVIDED")
