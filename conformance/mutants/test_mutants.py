"""The tables' anchors hold, mutants are killed where they should be, right changes pass, and the figures that are printed are right."""

import ast
import json
import pathlib

import pytest

from conformance import power

from . import CHEATS, MUTANTS, VARIATIONS, engine
from .rules import RULES, Rules

EVERY = (*MUTANTS, *VARIATIONS)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_anchor_is_where_it_should_be(device):
    for mutant in EVERY:
        for path, text in engine.patched(mutant, device).items():
            ast.parse(text, path)


def test_the_tables():
    names = [subject.name for subject in (*EVERY, *CHEATS)]
    assert len(names) == len(set(names))
    assert len(MUTANTS) >= 120 and len(VARIATIONS) >= 20 and len(CHEATS) >= 15
    assert all(mutant.group in engine.GROUPS for mutant in EVERY) and all(mutant.group == "variation" for mutant in VARIATIONS)
    assert {mutant.lane for mutant in MUTANTS} <= {"cpu", "gpu", "both"}
    assert all(mutant.stands_for and " " not in mutant.name for mutant in EVERY)


def test_an_anchor_that_does_not_hold():
    lost = engine.Mutant("lost", "mask", "fast/eager.py", "no such line", "", "linear", "int8", "torch", "nothing")
    with pytest.raises(engine.AnchorError, match=r"lost: 'no such line' occurs 0 times in fast/eager\.py, expected 1"):
        engine.patched(lost)
    (kill,) = power._run([lost], 1, "cpu", 1)
    assert kill.status == "error" and not kill.killed


def named(table, name):
    return next(subject for subject in table if subject.name == name)


# Of each way to run something, one: a mutant, its examples, and what becomes of it.
KILLED = [
    ("zero_off_by_one", 12, "killed"),
    ("input_clamped_in_place", 40, "killed"),
    ("gemm_codes_in_wrong_order", 12, "killed"),
    ("integer_zero_off_by_one", 12, "killed"),
    ("sign_bit_dropped", 12, "killed"),
    ("gemm_rows_of_m_not_masked", 12, "crash"),
]


def test_mutants_are_killed_and_right_changes_are_not():
    subjects = [named(MUTANTS, name) for name, *_ in KILLED] + [named(VARIATIONS, name) for name in ("sums_backwards", "steps_backwards")]
    kills = {kill.name: kill for kill in power._run(subjects, 25, "cpu", 2)}
    for name, examples, status in KILLED:
        kill = kills[name]
        assert kill.killed and kill.status in ("killed", status), kill
        assert kill.status == "crash" or (kill.examples_to_kill <= examples and kill.matrix[kill.regime][0] and kill.case and kill.error), (
            kill
        )
    for name in ("sums_backwards", "steps_backwards"):
        assert kills[name].status == "survived" and kills[name].examples, kills[name]
        assert not any(kills[name].rules.values())


def test_what_hangs_is_a_kill():
    kill = engine.run(named(CHEATS, "sleeps").__class__("sleeps", "conformance.mutants.cheats:sleeps", "linear", "int8", "sleeps", 2), 1)
    assert kill.status == "timeout" and kill.killed and kill.seconds >= 2


def test_rules():
    torch = pytest.importorskip("torch")
    y = torch.linspace(-2, 2, 101, dtype=torch.float64)
    for rule in RULES.values():
        assert rule(y, y) and not rule(-y, y)
    assert RULES["allclose"](y + 0.04, y) and not RULES["allclose"](y + 0.2, y)
    assert RULES["97 %"](y * 1.09, y) and not RULES["97 %"](y * 1.11, y)
    assert RULES["cosine"](y * 1.04, y) and not RULES["cosine"](y * 1.2, y)
    rules = Rules()
    for failed in (True, False):
        rules.start()
        rules.ask((-y).float(), y, "y")
        assert rules.end(failed) == dict.fromkeys(RULES, 1)


def kill(name, status="killed", at=3, regime="exact"):
    found = engine.Kill(name, status, at if status == "killed" else None, regime, seconds=1.0, examples=9)
    found.matrix, found.rules = {"exact": [2 * (status == "killed"), 4], "tiny": [0, 5]}, {"allclose": 1, "cosine": 0, "97 %": 0}
    return found


def test_the_report_of_mutants():
    subjects = [mutant for mutant in MUTANTS if mutant.group == "scale"][:3]
    kills = [kill(s.name, status) for s, status in zip(subjects, ("killed", "survived", "error"), strict=True)]
    kills[2].error = "x\nwhy"
    lines = power.mutant_report(subjects, kills, 12.3)
    assert lines[-1] == "1 of 3 mutants killed in 12 s"
    assert f"survivors: {subjects[1].name}" in lines and f"not run: {subjects[2].name} (why)" in lines
    assert any(line.split() == [subjects[0].name, "3", "+", "."] for line in lines)
    assert any(line.split() == ["scale", "3", "1"] for line in lines)
    assert any(line.split()[-2:] == ["would", "3"] and "allclose" in line for line in lines)


def test_what_is_written_keeps_the_other_lane(tmp_path, monkeypatch):
    monkeypatch.setattr(power, "FILE", tmp_path / "power.json")
    of = {lane: [mutant.name for mutant in MUTANTS if mutant.lane == lane] for lane in ("cpu", "gpu", "both")}
    power.write("mutant", "gpu", [kill(of["gpu"][0]), kill(of["gpu"][1], "survived"), kill(of["both"][0]), kill(of["both"][1], "survived")])
    both = [kill(name, "survived") for name in of["both"][:2]]
    power.write("mutant", "cpu", [kill(of["cpu"][0]), kill(of["cpu"][1]), kill(of["cpu"][2], "error"), *both])
    power.write("variation", "cpu", [kill("f", "survived"), kill("g", "survived")])
    kept = json.loads(pathlib.Path(power.FILE).read_text())
    # One of the GPU's, one that was not run, and one that both let pass.
    assert kept["killed"] == {"cpu": 2, "gpu": 2, "both": len(MUTANTS) - 3} and kept["mutants"] == len(MUTANTS)
    assert (kept["variations"], kept["false_alarms"], kept["examples"]) == (2, 0, 18)
    assert kept["rules"]["cpu"]["allclose"] == 5 and len(kept["date"]) == 10


def test_the_command_line(capsys):
    assert power.main(["--mutants", "no_such_mutant"]) == 2
    assert "there is no mutant 'no_such_mutant' in the cpu lane" in capsys.readouterr().err
    assert power.main(["--mutants", "out_ignored", "--examples", "5", "--jobs", "1"]) == 0
    assert "1 of 1 mutants killed" in capsys.readouterr().out
