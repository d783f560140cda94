"""Cases that failed before, in a folder: a file for each operation and format, a line for each case."""

from pathlib import Path

from .status import WAIVABLE

# How many of a cell are kept, the newest first.
KEPT = 20


def read(folder, op, label):
    """(impl, repr of a case) of an operation and format, the newest first."""
    path = _path(folder, op, label)
    rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return tuple((None if impl == "-" else impl, case) for impl, _, case in (row.partition("\t") for row in rows))


def write(folder, cells):
    """Keep the failures of a run, in front of those that are kept already."""
    failed = {}
    for cell in cells:
        if cell.status in (*WAIVABLE, "blocked") and cell.case:
            failed.setdefault((cell.op, cell.label), []).append((cell.impl, cell.case))
    for (op, label), new in failed.items():
        rows = dict.fromkeys([*new, *read(folder, op, label)])
        kept = [row for i, row in enumerate(rows) if sum(other[0] == row[0] for other in list(rows)[:i]) < KEPT]
        path = _path(folder, op, label)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{impl or '-'}\t{case}\n" for impl, case in kept), encoding="utf-8")


def _path(folder, op, label):
    return Path(folder) / op / f"{label.replace('/', '_')}.txt"
