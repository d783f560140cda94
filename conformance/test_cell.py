"""What becomes of a cell: declarations, leaning results, errors of the suite itself, the environment, operations it is made of."""

import sys
import types

import pytest
import torch

import ref

from . import blocked, cell, database, environment
from .accumulators import MMA_16
from .candidate import Candidate, describe
from .case import LinearCase
from .declaration import Declaration
from .ops import linear
from .oracle import Agreement
from .waivers import Waiver


def candidate(**attributes):
    return Candidate("mine", types.SimpleNamespace(**{"linear": ref.linear, **attributes}))


def test_declarations():
    said = {"linear": {"formats": ["int4_*"], "accumulator": "mma_16"}, ("linear", "fast"): {"deterministic": False, "formats": None}}
    mine = candidate(DECLARATIONS=said, VARIANTS=("exact",))
    assert mine.declared("linear", "slow") == Declaration(("exact",), MMA_16, True, False, ("int4_*",))
    assert mine.declared("linear", "fast") == Declaration(("exact",), MMA_16, False, False, None)
    assert mine.declared("dequantize") == Declaration() == candidate().declared("linear")
    assert describe(mine, ("linear", "pack")).functions.keys() == {"linear"}


BAD = [
    ([], "DECLARATIONS of mine is a list, expected a dict"),
    ({"lineal": {}}, "declares 'lineal', of no function; the nearest is 'linear'"),
    ({"linear": 3}, "'linear': 3 is a int, expected a dict"),
    ({"linear": {"determinstic": True}}, "unknown field 'determinstic', expected one of variants,"),
    ({"linear": {"deterministic": "yes"}}, "deterministic is 'yes', expected True or False"),
    ({"linear": {"formats": "int8"}}, "formats is 'int8', expected names of formats, in a tuple"),
    ({"linear": {"formats": (8,)}}, "formats is (8,), expected names of formats, in a tuple"),
    ({"linear": {"accumulator": "mma_17"}}, "accumulator: got 'mma_17'"),
]


@pytest.mark.parametrize(("said", "message"), BAD)
def test_declarations_that_make_no_sense(said, message):
    with pytest.raises(ValueError) as error:
        describe(candidate(DECLARATIONS=said), ("linear",))
    assert message in str(error.value)


def test_declared_formats():
    mine = Declaration(formats=("int4_*", "* int8_*"))
    assert mine.promises("int4_g128") and mine.promises("fp8", "int8_token")
    assert not mine.promises("int8") and not mine.promises("int4_g128", "fp8_e4m3_token") and not Declaration().promises("int8")


def closed(signed, **fields):
    found = cell.Cell("linear", "int8", None, examples=200, signed=list(signed), **fields)
    found.close(cell.Task("mine", "linear", "int8", (None,), "cpu", 200))
    return found


def test_results_that_lean_to_one_side():
    assert closed((0, 0)).bias_z is None
    assert closed((150, 50)).status == "pass"  # 7.07 sigma
    assert closed((199, 0)).status == "pass"  # too few
    found = closed((40, 160))
    assert found.status == "fail" and found.bias_z == pytest.approx(-8.485, abs=1e-3)
    assert "40 were rounded away from zero and 160 toward it" in found.error
    assert found.reproduce == "python -m conformance --candidate mine --formats int8 --ops linear --examples 200 --seed 0"


def test_measurements_add_up():
    found = cell.Cell("linear", "int8", None)
    for _ in range(2):
        found.count(LinearCase(data="normal"), Agreement(0.5, 3, 1, "exact", [1] * 16, [2] * 10, 4, (5, 6)))
    assert (found.elements, found.matches, found.signed, found.widths, found.errors) == (6, 8, [10, 12], [2] * 16, [4] * 10)
    assert (found.variants, found.regimes) == ({"exact": 2}, {"normal": 2})


def test_an_error_of_the_suite_costs_its_own_cell(monkeypatch):
    def broken(case, device, declared=None):
        if case.n > 3:
            raise ZeroDivisionError("no such thing")
        return build(case, device, declared)

    build = linear.build
    monkeypatch.setattr(linear, "build", broken)
    found = cell.run(cell.Task("ref", "linear", "int8", (None,), "cpu", 30))[0]
    assert found.status == "error" and found.error.startswith("the suite itself failed: ZeroDivisionError: no such thing (test_cell.py:")
    assert found.case == "LinearCase(n=4)"
    monkeypatch.setattr(linear, "cases", lambda label, config: 1 / 0)
    found = cell.run(cell.Task("ref", "linear", "int8", (None,), "cpu", 30))[0]
    assert found.status == "error" and "ZeroDivisionError" in found.error and "--ops linear" in found.reproduce


def test_what_the_environment_gets_wrong_is_no_verdict(monkeypatch):
    monkeypatch.setitem(environment.PROBES, "host", (lambda device: "the moon is full", "bias is not None"))
    (waiver,) = environment.probe("cpu")
    found = cell.run(cell.Task("conformance.wrong:bias_dropped", "linear", "int8", (None,), "cpu", 30, waivers=(waiver,)))[0]
    assert (found.status, found.reason) == ("precondition failed", "the moon is full")
    found = cell.run(cell.Task("conformance.wrong:right", "linear", "int8", (None,), "cpu", 30, waivers=(waiver,)))[0]
    assert found.status == "pass" and not found.waived


def test_the_environment_of_these_tests_is_right():
    assert environment.probe("cpu") == ()
    torch.set_flush_denormal(True)
    try:
        assert [w.reason for w in environment.probe("cpu")] == ["the CPU flushes subnormal numbers"]
    finally:
        torch.set_flush_denormal(False)


def test_blocked():
    cells = [
        cell.Cell("dequantize", "int8", None, "fail"),
        cell.Cell("linear", "int8", "a", "fail"),
        cell.Cell("linear", "int8", "b", "pass"),
        cell.Cell("linear", "int4", "a", "fail"),
        cell.Cell("grouped_linear", "int8", "a", "crash"),
        cell.Cell("grouped_linear", "int8", "b", "fail"),
        cell.Cell("pack", "6 bits", None, "fail"),
        cell.Cell("unpack", "6 bits", None, "fail"),
        cell.Cell("dequantize", "fp6_e3m2", None, "timeout"),
        cell.Cell("moe_activation", "all", "a", "fail"),
        cell.Cell("fused_experts", "mxfp4", "a", "fail"),
        cell.Cell("fused_experts", "mxfp4", "b", "xfail"),
    ]
    blocked.mark(cells)
    assert [c.blocked_by for c in cells] == [
        None,
        "dequantize",
        None,
        None,
        "linear",
        None,
        None,
        "pack",
        "unpack",
        None,
        "moe_activation",
        None,
    ]
    assert all((c.status == "blocked") == (c.blocked_by is not None) for c in cells)


def test_failures_found_come_first_next_time(tmp_path, monkeypatch):
    drawn = cell.run(cell.Task("conformance.wrong:bias_dropped", "linear", "int8", (None,), "cpu", 30))
    database.write(tmp_path, drawn)
    database.write(tmp_path, drawn)
    first = database.read(tmp_path, "linear", "int8")
    assert first == ((None, drawn[0].case),) and database.read(tmp_path, "linear", "int4") == ()
    again = cell.run(cell.Task("conformance.wrong:bias_dropped", "linear", "int8", (None,), "cpu", 30, first=first))[0]
    assert (again.status, again.case, again.examples) == ("fail", drawn[0].case, 0)
    right = cell.run(cell.Task("conformance.wrong:right", "linear", "int8", (None,), "cpu", 3, first=(*first, (None, "LinearCase(q=1)"))))[
        0
    ]
    assert (right.status, right.examples) == ("pass", 4)


def test_a_folder_keeps_only_the_newest(tmp_path):
    for n in range(1, database.KEPT + 5):
        database.write(tmp_path, [cell.Cell("linear", "int8", "a", "crash", case=repr(LinearCase(n=n)))])
    kept = database.read(tmp_path, "linear", "int8")
    assert len(kept) == database.KEPT and kept[0] == ("a", f"LinearCase(n={database.KEPT + 4})")


def test_interpreted_bfloat16_is_probed_where_it_is_asked_for(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    module = types.ModuleType("conformance.interpreted")
    module.what_is_wrong = lambda: ["it is wrong"]
    monkeypatch.setitem(sys.modules, "conformance.interpreted", module)
    monkeypatch.setattr(sys.modules["conformance"], "interpreted", module, raising=False)
    (found,) = environment.probe("cpu")
    assert "it is wrong" in found.reason and found.covers(LinearCase()) and not found.covers(LinearCase(dtype="fp16"))
    assert isinstance(found, Waiver)
