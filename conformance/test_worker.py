"""Candidates that misbehave get a status and a sentence, and cost their own cell only."""

import pytest

from . import cell, misbehaving, trial, worker
from .case import LinearCase, read_case
from .status import STATUSES


def task(name, examples=8, impls=(None,), label="int8", op="linear", **more):
    return cell.Task(f"conformance.misbehaving:{name}", op, label, impls, "cpu", examples, **more)


@pytest.fixture(scope="module")
def pool():
    pool = worker.Pool("cpu", (20.0, 20.0))
    yield pool
    pool.close()


def run(pool, task):
    (cells,) = pool.run([task], 1)
    return {c.impl: c for c in cells}


# The candidate, the status of its cell, and what is said of it.
MISBEHAVING = [
    ("exits", "crash", "raised SystemExit: 3"),
    ("raises_base", "fail", "raised Base: base"),
    ("raises_mute", "fail", "raised Mute: its text raises RuntimeError"),
    ("raises_unpicklable", "fail", "raised Unpicklable: u"),
    ("raises_interrupt", "fail", "raised KeyboardInterrupt"),
    ("raises_group", "fail", "raised ExceptionGroup: all failed"),
    ("raises_stop", "fail", "raised StopIteration: 3"),
    ("refuses_mute", "unsupported", ""),
    ("refuses_declared", "undeclared reject", "declined, and int8 is declared: linear: at most 3 rows"),
    ("refuses_again", "fail", "declined a call that it had answered before: once only"),
    ("returns_sparse", "fail", "the result is torch.sparse_coo, expected a dense tensor"),
    ("returns_list", "fail", "the result is a list, expected a tensor"),
    ("returns_meta", "fail", "on meta, expected (1, 1) torch.bfloat16 on cpu"),
    ("returns_class", "fail", "the result is a"),
    ("prints", "pass", ""),
    ("forks", "fail", "the call forked, and returned in both processes"),
    ("sets_dtype", "fail", "default dtype"),
    ("sets_threads", "fail", "number of threads"),
    ("sets_device", "fail", "default device"),
    ("sets_grad", "fail", "grad mode"),
    ("sets_and_raises", "fail", "raised KeyError: 'k'"),
    ("takes_nothing", "fail", "raised TypeError"),
    ("no_function", "not provided", ""),
    ("undecided_and_says_so", "pass", ""),
]


def test_a_crash_that_does_not_come_again_is_none_the_less_one(pool):
    misbehaving.CRASHED.unlink(missing_ok=True)
    try:
        (found,) = run(pool, task("segfaults_once")).values()
    finally:
        misbehaving.CRASHED.unlink(missing_ok=True)
    assert found.status == "crash" and "and not again" in found.error and "LinearCase(" in found.error


@pytest.mark.parametrize(("name", "status", "sentence"), MISBEHAVING, ids=[row[0] for row in MISBEHAVING])
def test_misbehaving_candidates_get_a_status_and_a_sentence(pool, capfd, name, status, sentence):
    (found,) = run(pool, task(name)).values()
    assert (found.status, found.status in STATUSES) == (status, True), found
    assert sentence in found.error and "Traceback" not in found.error
    assert bool(found.error) == (status not in ("pass", "unsupported", "not provided"))
    assert not any(capfd.readouterr())


def test_the_worker_is_as_it_was(pool):
    """After all that, in the same process, a right kernel passes."""
    (found,) = run(pool, cell.Task("conformance.wrong:right", "linear", "int8", (None,), "cpu", 20)).values()
    assert (found.status, found.examples) == ("pass", 20), found.error


def test_other_bits_on_the_second_call_are_a_failure_unless_that_is_declared(pool):
    found = run(pool, task("undecided", 100))[None]
    assert found.status == "fail" and "the same bits" in found.error


def test_a_crash_costs_its_own_cell_and_is_shrunk(pool):
    tasks = [task("one_segfaults", impls=("bad", "good")), task("one_segfaults", op="pack", label="4 bits")]
    linear, pack = sorted(pool.run(tasks, 2), key=len, reverse=True)
    bad, good = linear
    assert (bad.impl, bad.status, bad.error) == ("bad", "crash", "the call ended its process: SIGSEGV")
    assert read_case(bad.case) == LinearCase(n=4) and "--impl bad --case" in bad.reproduce
    assert (good.impl, good.status, good.examples) == ("good", "pass", 8)
    assert pack[0].status == "pass"


@pytest.mark.parametrize(("name", "how"), [("leaves", "exit code 7"), ("kills_itself", "SIGKILL"), ("closes_files", "exit code 1")])
def test_whatever_ends_the_process(pool, name, how):
    (found,) = run(pool, task(name)).values()
    assert (found.status, found.error) == ("crash", f"the call ended its process: {how}")
    assert read_case(found.case) == LinearCase()


def test_a_waived_crash_does_not_end_the_cell(pool):
    from .waivers import Waiver

    known = Waiver("known", "https://example.org/1", where="n > 3")
    (found,) = run(pool, task("segfaults_when_wide", waivers=(known,))).values()
    assert (found.status, found.examples, found.waiver) == ("xfail", 8, known.link), found.error
    ran, failed = found.waived["known"]
    assert ran == failed > 0


def test_a_call_that_does_not_return():
    pool = worker.Pool("cpu", (3.0, 1.0))
    try:
        found = run(pool, task("spins", 3))[None]
    finally:
        pool.close()
    assert (found.status, found.error) == ("timeout", "the call did not return within 3 s")
    assert read_case(found.case) == LinearCase()


def test_a_hang_is_shrunk(monkeypatch):
    """As far as the time that it may cost allows."""
    monkeypatch.setattr(worker, "LOST", 4.0)
    found, tried = careful("sleeps", (1.0, 1.0))
    assert found.status == "timeout" and tried.tries > 1 and tried.lost < 10
    assert read_case(found.case).n > 3


def test_effort_is_bounded(monkeypatch):
    monkeypatch.setattr(worker, "TRIES", 1)
    found, tried = careful("segfaults_when_wide", worker.LIMITS)
    assert found.status == "crash" and tried.tries == 1 and read_case(found.case).n > 3


def careful(name, limits):
    elsewhere = worker.Elsewhere(task(name), limits, {})
    try:
        return cell.run(task(name), elsewhere)[0], elsewhere
    finally:
        elsewhere.close()


def test_a_device_that_is_lost_is_a_crash(monkeypatch):
    """What CUDA says after an illegal access holds for the rest of the process."""
    told, here = [], trial.Here("conformance.misbehaving:raises_base", "linear", "cpu")
    monkeypatch.setattr(trial.candidates.watch, "lost", told.append)
    here.device = "cuda:0"
    monkeypatch.setattr(trial.torch.cuda, "synchronize", lambda device: (_ for _ in ()).throw(RuntimeError("illegal access\nmore")))
    with pytest.raises(trial.Disagreement):
        here.attempt("linear", here.op.build(LinearCase(), "cpu"), LinearCase(), None)
    assert told == ["the device cannot be used after it: illegal access"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import os; os._exit(5)", "it ended its process: exit code 5"),
        ("import sys; sys.exit('no')", "SystemExit: no"),
        ("def linear(:", "SyntaxError"),
        ("import time; time.sleep(1e6)", "it did not return within 2 s"),
    ],
)
def test_candidates_that_do_not_import(tmp_path, monkeypatch, capsys, body, message):
    from . import __main__ as cli

    (tmp_path / "hostile.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["--candidate", "hostile", "--device", "cpu", "--timeout", "2,2"]) == 2
    out, err = capsys.readouterr()
    assert message in err and "cannot import 'hostile'" in err and err.count("\n") == 1 and not out
