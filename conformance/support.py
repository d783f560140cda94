"""Which implementation runs what a checkpoint layout yields: python -m conformance.support --candidate fast --write fast/SUPPORT.md

A table in Markdown, from nothing but ref.layouts.LAYOUTS, the FORMATS of each layout, and the candidate's why_not: a small weight of
each format times bfloat16 x, as it is or else quantized to fp8, on the best device there is. Nothing is launched.
"""

import argparse
import re
import sys
from pathlib import Path

import torch

from ref import layouts
from ref.format import parse_format

from .candidate import load
from .weights import draw_weight, to_device

BEGIN, END = "<!-- support: begin -->", "<!-- support: end -->"
SHAPE = (128, 512)
# How x is given, in the order of preference, and the cell where an implementation takes it so.
WAYS = ((None, "yes"), ("fp8_e4m3_token", "fp8 x"))
GROUP_INDEX = " with a group index"


def registry():
    """[(layout, [(entry, format, whether the weight has a group index)])] of all layouts; GROUP_INDEX says which may come with one."""
    modules = {module.__name__.rpartition(".")[2]: module for module in layouts.LAYOUTS.values()}
    found = []
    for name, module in sorted(modules.items()):
        fmts = [parse_format(fmt) for fmt in module.FORMATS]
        entries = [(str(fmt), fmt, False) for fmt in fmts]
        entries += [(f"{fmt}{GROUP_INDEX}", parse_format(fmt), True) for fmt in getattr(module, "GROUP_INDEX", ())]
        found.append((name, entries))
    return found


def verdicts(candidate, device):
    """{(layout, entry): [for each implementation, how x may be given, or why not: a sentence]}."""
    why_not, x = candidate.function("why_not"), torch.ones(1, SHAPE[1], dtype=torch.bfloat16, device=device)
    known, found = {}, {}
    for layout, entries in registry():
        for entry, fmt, order in entries:
            if (fmt, order) not in known:
                q = to_device(draw_weight(0, fmt, SHAPE, order=order), device)
                known[fmt, order] = [_verdict(why_not, x, q, impl) for impl in candidate.implementations]
            found[layout, entry] = known[fmt, order]
    return found


def _verdict(why_not, x, q, impl):
    reasons = []
    for x_format, cell in WAYS:
        reason = why_not("linear", x, q, impl=impl, **({"x_format": x_format} if x_format else {}))
        if reason is None:
            return cell
        reasons.append(reason)
    return _short(reasons[0])


def _short(reason):
    """A reason without the call that it is about, and without asides."""
    return re.sub(r" \([^)]*\)", "", reason.partition(": ")[2] or reason)


def table(found, implementations, where):
    """The table as Markdown: the formats of a layout that fare alike share a row; reasons are footnotes."""
    cells, notes, lines = [cell for _, cell in WAYS], [], []
    rows = {}
    for (layout, entry), reasons in found.items():
        rows.setdefault((layout, tuple(reasons)), []).append(entry)
    for (layout, reasons), entries in rows.items():
        marks = []
        for reason in reasons:
            if reason not in cells and reason not in notes:
                notes.append(reason)
            marks.append(reason if reason in cells else f"no [{notes.index(reason) + 1}]")
        lines.append(f"| {layout} | {', '.join(entries)} | {' | '.join(marks)} |")
    head = [f"| layout | formats | {' | '.join(implementations)} |", "|---" * (2 + len(implementations)) + "|"]
    foot = [f"{i}. {note}" for i, note in enumerate(notes, 1)]
    return "\n".join([f'bfloat16 x on {where}; "fp8 x": x quantized to fp8_e4m3_token.', "", *head, *lines, "", *foot])


def read(text, implementations):
    """{(layout, entry): cells} of the table between the markers of a text: what table wrote, reasons as "no"."""
    found = {}
    for line in text.partition(BEGIN)[2].partition(END)[0].splitlines():
        columns = [column.strip() for column in line.strip("|").split("|")]
        if len(columns) == 2 + len(implementations) and columns[0] not in ("layout", "---"):
            for entry in columns[1].split(", "):
                found[columns[0], entry] = [re.sub(r" \[\d+\]", "", cell) for cell in columns[2:]]
    return found


def main(argv=None):
    """Print the table, or put it between the markers of a file; 0, or 2 for a usage error."""
    parser = argparse.ArgumentParser(prog="python -m conformance.support", description=__doc__)
    parser.add_argument("--candidate", required=True, help="pkg.mod or pkg.mod:attr with why_not and IMPLEMENTATIONS")
    parser.add_argument("--write", metavar="FILE", help=f"replace what lies there between {BEGIN} and {END}")
    args = parser.parse_args(argv)
    try:
        candidate = load(args.candidate)
        if candidate.function("why_not") is None or not candidate.implementations:
            raise ValueError(f"candidate: {args.candidate} has no why_not, or no IMPLEMENTATIONS")
        before = after = ""
        if args.write:
            before, begin, rest = Path(args.write).read_text().partition(BEGIN)
            _, end, after = rest.partition(END)
            if not begin or not end:
                raise ValueError(f"--write: {args.write} has no {BEGIN} ... {END}")
    except (OSError, ValueError) as error:
        print(f"conformance.support: {error}", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    where = f"one {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "a CPU"
    text = table(verdicts(candidate, device), candidate.implementations, where)
    if args.write:
        Path(args.write).write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
