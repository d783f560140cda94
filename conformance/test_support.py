"""The table of layouts and implementations: what fast/SUPPORT.md holds is what the code says."""

import re
from pathlib import Path

import torch

from ref.format import parse_format

from . import support
from .candidate import load

SUPPORT = Path(__file__).parent.parent / "fast" / "SUPPORT.md"
CPU = torch.device("cpu")


def test_it_has_every_layout_and_format_and_the_columns_that_need_no_gpu():
    candidate = load("fast")
    held = support.read(SUPPORT.read_text(), candidate.implementations)
    found = support.verdicts(candidate, CPU)
    assert held.keys() == found.keys()
    for row, reasons in found.items():
        cells = dict(zip(candidate.implementations, held[row], strict=True))
        for impl, reason in zip(candidate.implementations, reasons, strict=True):
            if impl in ("torch", "triton"):
                assert cells[impl] == (reason if reason in ("yes", "fp8 x") else "no"), (row, impl)
            assert cells[impl] in ("yes", "fp8 x", "no")


def test_a_table_reads_back():
    found = {("a", "int4"): ["yes", "no reason"], ("a", "int8"): ["yes", "no reason"], ("b", "int4"): ["fp8 x", "another"]}
    text = support.table(found, ("p", "q"), "here")
    assert "| a | int4, int8 | yes | no [1] |" in text and "1. no reason" in text and "2. another" in text
    read = support.read(f"{support.BEGIN}\n{text}\n{support.END}", ("p", "q"))
    assert read == {("a", "int4"): ["yes", "no"], ("a", "int8"): ["yes", "no"], ("b", "int4"): ["fp8 x", "no"]}


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(support, "registry", lambda: [("a", [("int4", parse_format("int4"), False)])])
    path = tmp_path / "x.md"
    path.write_text(f"before {support.BEGIN} old {support.END} after")
    assert support.main(["--candidate", "fast", "--write", str(path)]) == 0
    text = path.read_text()
    assert re.match("before <!-- support: begin -->\nbfloat16 x on ", text) and text.endswith(" after") and " old " not in text
    path.write_text("nothing")
    assert support.main(["--candidate", "fast", "--write", str(path)]) == 2 and "has no <!--" in capsys.readouterr().err
    assert support.main(["--candidate", "ref"]) == 2 and "no why_not" in capsys.readouterr().err
