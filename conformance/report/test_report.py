"""The report as text and as a value: what is written, read back, refused, compared."""

import copy
import dataclasses
import io
import json

import pytest

from .. import report
from ..cell import Cell, Task, run
from ..status import FAILING, STATUSES
from .document import HERE, ReportError, check

RUN = {
    "candidate": "conformance.wrong:bias_dropped",
    "device": "cpu",
    "impls": (None,),
    "examples": 5,
    "seed": 0,
    "profile": "smoke",
    "seconds": 2.0,
    "examples_per_second": 2.5,
}
SCHEMA = json.loads((HERE / "schema.json").read_text())


@pytest.fixture(scope="module")
def cells():
    """A cell that fails and one that passes, of a real run."""
    tasks = [Task(name, "linear", "int8", (None,), "cpu", 5) for name in (RUN["candidate"], "ref")]
    failed, passed = (run(task)[0] for task in tasks)
    passed.label = "int4"
    return [failed, passed]


@pytest.fixture
def document(cells):
    return report.document(cells, RUN, {"-": {"accumulator_bits": 24, "notes": ["one"]}})


def test_what_is_written_is_read_back(cells, tmp_path):
    path = tmp_path / "report.json"
    report.write_json(path, cells, RUN)
    found = report.read(path)
    assert [c["status"] for c in found["cells"]] == ["fail", "pass"]
    assert found["cells"][0] == json.loads(json.dumps(dataclasses.asdict(cells[0])))
    assert found["cells"][1]["regimes"] and sum(found["cells"][1]["widths"]) == found["cells"][1]["elements"]
    assert found["run"]["impls"] == [None] and found["versions"]["torch"] and found["fingerprint"] is None


def test_schema_names_everything_that_is_written(document):
    check(document, SCHEMA, "report")
    assert set(document) == set(SCHEMA["properties"]) == set(SCHEMA["required"])
    of_cell = SCHEMA["properties"]["cells"]["items"]
    assert [f.name for f in dataclasses.fields(Cell)] == list(of_cell["properties"]) == of_cell["required"]
    assert of_cell["properties"]["status"]["enum"] == list(STATUSES)


def test_numbers_that_json_has_not_are_null(cells):
    cell = dataclasses.replace(cells[1], worst=float("inf"), bias_z=float("nan"))
    found = report.document([cell], RUN)["cells"][0]
    assert found["worst"] is None and found["bias_z"] is None
    assert "Infinity" not in json.dumps(found, allow_nan=False)


BAD = [
    (lambda d: d.update(schema=1), "has schema 1, expected 2"),
    (lambda d: d.update(schema="2"), "has schema '2', expected 2"),
    (lambda d: d.pop("cells"), "is not a report"),
    (lambda d: d.pop("run"), "has no 'run'"),
    (lambda d: d["run"].pop("seed"), ".run has no 'seed'"),
    (lambda d: d["run"].update(examples=0), ".run.examples is 0, expected 1 or more"),
    (lambda d: d["run"].update(seed=True), ".run.seed is true, expected integer"),
    (lambda d: d.update(cells={}), ".cells is {}, expected array"),
    (lambda d: d["cells"][1].update(status="passed"), ".cells[1].status is \"passed\", expected one of 'pass'"),
    (lambda d: d["cells"][0].update(widths=[1]), ".cells[0].widths has 1 items, expected 16"),
    (lambda d: d["cells"][0].update(worst="x" * 99), '.cells[0].worst is "xxx'),
    (lambda d: d["cells"][0].update(variants={"exact": 1.5}), ".cells[0].variants.exact is 1.5, expected integer"),
    (lambda d: d.update(fingerprint={"torch": 3}), ".fingerprint.torch is 3, expected object"),
    (lambda d: d["versions"].update(torch=2), ".versions.torch is 2, expected string or null"),
]


@pytest.mark.parametrize(("harm", "message"), BAD, ids=[message for _, message in BAD])
def test_another_file_is_refused_in_a_sentence(document, tmp_path, harm, message):
    harm(document)
    path = tmp_path / "old.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ReportError) as caught:
        report.read(path)
    assert message in str(caught.value) and "old.json" in str(caught.value) and len(str(caught.value)) < 600


def test_no_file_and_no_json(tmp_path):
    with pytest.raises(ReportError, match="No such file"):
        report.read(tmp_path / "none.json")
    path = tmp_path / "bytes.json"
    for content in (b"\xff\xfe", b"{", b"[]", b"3"):
        path.write_bytes(content)
        with pytest.raises(ReportError, match="is not"):
            report.read(path)


def test_two_runs_are_compared(document):
    old = copy.deepcopy(document)
    old["run"]["examples"], old["versions"]["torch"] = 50, "1.0"
    old["cells"] = [dict(old["cells"][0], label=label) for label in ("a", "b", "c", "d", "gone")]
    new = copy.deepcopy(old)
    new["run"]["examples"], new["versions"]["torch"] = 5, "2.0"
    new["cells"] = [dict(cell, label=label) for cell, label in zip(new["cells"], ("a", "b", "c", "d", "new"), strict=True)]
    for cells, statuses in (
        (old["cells"], ("fail", "pass", "xfail", "fail", "pass")),
        (new["cells"], ("pass", "unsupported", "pass", "fail", "crash")),
    ):
        for cell, status in zip(cells, statuses, strict=True):
            cell["status"] = status
    found = report.compare(old, new)
    assert [(kind, b["label"]) for kind, _, b in found.changed] == [("worse", "b"), ("better", "a"), ("better", "c")]
    assert [c["label"] for c in found.new] == ["new"] and [c["label"] for c in found.gone] == ["gone"] and found.same == 1
    lines = report.differences(found).splitlines()
    assert lines[0] == "compared with the old run: 1 worse, 2 better, 0 changed otherwise, 1 new, 1 gone, 1 as before"
    assert lines[1] == "  not the same: examples 50 -> 5, version of torch 1.0 -> 2.0"
    assert lines[2:] == [
        "  worse   linear b: pass -> unsupported",
        "  better  linear a: fail -> pass",
        "  better  linear c: xfail -> pass",
        "  new     linear new: crash",
        "  gone    linear gone: pass",
    ]


@pytest.mark.parametrize(
    ("before", "now", "kind"),
    [("pass", "mistrusted", "worse"), ("unsupported", "crash", "worse"), ("fail", "crash", "other"), ("fail", "unsupported", "other")],
)
def test_what_is_worse(document, before, now, kind):
    old = copy.deepcopy(document)
    old["cells"][0]["status"], document["cells"][0]["status"] = before, now
    assert [k for k, _, _ in report.compare(old, document).changed] == [kind]


def test_the_same_run_has_no_differences(document):
    found = report.compare(document, document)
    assert (found.changed, found.new, found.gone, found.settings, found.same) == ((), (), (), (), 2)


def test_text_has_every_status_in_order(cells):
    all_of_them = [dataclasses.replace(cells[1], label=status, status=status) for status in STATUSES]
    line = report.summary(all_of_them, 4.0)
    assert line == f"{', '.join(f'1 {s}' for s in STATUSES)}; {5 * len(STATUSES)} examples in 4 s, 18 a second"
    text = report.table([cell for cell in all_of_them if cell.status != "not provided"])
    assert len(text.splitlines()) == 2 + len(STATUSES) - 1


def test_progress_prints_what_fails_to_a_terminal_only(cells):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        for status in STATUSES:
            stream.truncate(0)
            report.progress(1, 2, [dataclasses.replace(cells[0], status=status)], 1.0, stream)
            assert (status.upper() + " linear int8" in stream.getvalue()) == (shown and status in FAILING)


def test_a_failure_without_a_case_is_one_line():
    assert report.failure(Cell("linear", "int8", "triton", "crash")) == "CRASH linear int8 impl triton"
