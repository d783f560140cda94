"""Waivers: what the file says, which cases it covers, and when it is a failure itself."""

import datetime

import pytest

from . import __main__ as cli
from . import cell
from .case import DequantizeCase, LinearCase
from .experts_case import ExpertsCase
from .moe_case import Route
from .waivers import Waiver, active, complaints, read

GOOD = """
[[waiver]]
link = "https://example.org/1"
op = "linear*"
where = "k % 128 != 0 and dtype == 'fp16'"
until = 2100-01-31
"""

# A file, and what is said of it.
BAD = [
    ("[[waiver]\n", "at line 1"),
    ("[[waivers]]\n", ":1: unknown table 'waivers'"),
    ("[waiver]\nlink = 'x'\n", ":1: write [[waiver]], in double brackets"),
    (GOOD + "untill = 3\n", ":7: unknown key 'untill', expected one of link, op,"),
    (GOOD.replace("link", "# link"), ":2: this waiver has no 'link'"),
    (GOOD.replace("until", "# until"), ":2: this waiver has no 'until'"),
    (GOOD.replace("2100-01-31", "'next year'"), ":6: until is 'next year', expected a day"),
    (GOOD.replace("2100-01-31", "2100-01-31T00:00:00"), ":6: until is datetime"),
    (GOOD.replace('"linear*"', "3"), ":4: op is 3, expected text"),
    (GOOD.replace('"linear*"', '"lineal"'), ":4: no operation is called 'lineal'; the nearest is 'linear'"),
    (GOOD + "statuses = ['error']\n", ":7: statuses is ['error'], expected some of fail,"),
    (GOOD.replace("k %", "kk %"), ":5: where: no case of these operations has a field 'kk'"),
    (GOOD.replace("k %", "k **"), ":5: where: 'k ** 128': Pow is not for this"),
    (GOOD.replace("k %", "k.real %"), ""),
    (GOOD.replace("k % 128 != 0", "open('x')"), ":5: where: \"open('x')\" is not for this"),
    (GOOD.replace("k % 128 != 0", "[k for k in lead]"), "is not for this"),
    (GOOD.replace("k % 128 != 0", "k ="), ":5: where: cannot read"),
    (GOOD + GOOD.replace("k %", "kk %"), ":11: where: no case"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_file_that_makes_no_sense(tmp_path, text, message):
    path = tmp_path / "waivers.toml"
    path.write_text(text)
    if not message:  # it is read, and covers nothing: a number has no fields
        assert not read(str(path))[0].covers(LinearCase(dtype="fp16"))
        return
    with pytest.raises(ValueError) as error:
        read(str(path))
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_bad_files_on_the_command_line(tmp_path, capsys):
    assert cli.main(["--candidate", "ref", "--device", "cpu", "--waivers", str(tmp_path / "none.toml")]) == 2
    assert "--waivers: cannot read" in capsys.readouterr().err


COVERS = [
    ("", LinearCase(), True),
    ("k % 128 != 0 and dtype == 'fp16'", LinearCase(k=130, dtype="fp16"), True),
    ("k % 128 != 0 and dtype == 'fp16'", LinearCase(k=128, dtype="fp16"), False),
    ("n in (1, 2) or m > 100", LinearCase(n=3, lead=(10, 20)), True),
    ("not 1 < n <= 3", LinearCase(n=3), False),
    ("bias is not None", LinearCase(bias="bf16"), True),
    ("format == 'int4_g128'", LinearCase(format="int4_g128"), True),
    ("x_format is None", DequantizeCase(), False),
    ("bias > 3", LinearCase(), False),
    ("route.t >= 2", Route(t=2), False),
]


@pytest.mark.parametrize(("where", "case", "covered"), COVERS)
def test_which_cases_are_covered(where, case, covered):
    assert Waiver("w", "link", where=where).covers(case) is covered


def test_fields_of_a_route_can_be_named():
    assert Waiver("w", "link", where="route.t >= 2 and route.neg == 0").covers(ExpertsCase(route=Route(t=2)))


def run(name, *waivers, examples=40, label="int8"):
    return cell.run(cell.Task(f"conformance.wrong:{name}", "linear", label, (None,), "cpu", examples, waivers=waivers))[0]


KNOWN = Waiver("w:1", "https://example.org/1", datetime.date(2100, 1, 1), where="bias is not None")


def test_a_waived_failure_is_xfail():
    found = run("bias_dropped", KNOWN)
    assert (found.status, found.waiver, found.examples) == ("xfail", KNOWN.link, 40)
    ran, failed = found.waived["w:1"]
    assert 0 < failed <= ran < 40 and "admissible" in found.error and found.reproduce
    assert not list(complaints((KNOWN,), [found], False))


def test_a_waiver_does_not_hide_another_failure():
    found = run("mutates_input", Waiver("w:1", "link", where="n > 1"))
    assert found.status == "fail" and "n=" not in found.case and found.waiver is None


def test_a_waiver_that_is_not_needed_fails():
    found = run("right", KNOWN)
    assert found.status == "xpass" and "none of them failed" in found.error
    assert "none of the" in next(complaints((KNOWN,), [found], False))


def test_a_waiver_of_another_status_does_not_apply():
    assert run("bias_dropped", Waiver("w:1", "link", where="bias is not None", statuses=("crash",))).status == "fail"


def test_stale_waivers():
    day = datetime.date(2030, 1, 1)
    old = Waiver("w:1", "link", day, op="linear")
    assert active([old], day) == (old,) and not active([old], day + datetime.timedelta(1))
    assert "expired on 2030-01-01" in next(complaints([old], [], False, day + datetime.timedelta(1)))
    ran = cell.Cell("pack", "4 bits", None, "pass")
    assert "covers nothing that ran" in next(complaints([old], [ran], False, day))
    assert not list(complaints([old], [ran], True, day))  # of a run that leaves cells out, that is no wonder
    here = cell.Cell("linear", "int8", None, "pass")
    assert "covers nothing that ran" in next(complaints([old], [here], True, day))


def test_on_the_command_line(tmp_path, capsys):
    path = tmp_path / "waivers.toml"
    line = ["--candidate", "conformance.wrong:bias_dropped", "--device", "cpu", "--jobs", "0", "--ops", "linear", "--formats", "int8"]
    line += ["--examples", "20", "--waivers", str(path)]
    path.write_text("[[waiver]]\nlink = 'https://example.org/1'\nop = 'linear'\nwhere = 'bias is not None'\nuntil = 2100-01-01\n")
    assert cli.main(line) == 0
    assert "1 xfail" in capsys.readouterr().out
    path.write_text(path.read_text().replace("2100", "2001"))
    assert cli.main(line) == 1
    out = capsys.readouterr().out
    assert "1 fail" in out and f"WAIVER {path}:1: expired on 2001-01-01" in out
