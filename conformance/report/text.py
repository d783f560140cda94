"""The report as text: progress while it runs, a table at the end."""

import sys

from ..status import FAILING, STATUSES


def progress(done, total, cells, seconds, stream=None):
    """One line, over and over, on a terminal; nothing elsewhere. Failures are printed as they come."""
    stream = stream or sys.stderr
    if not stream.isatty():
        return
    for cell in cells:
        if cell.status in FAILING:
            stream.write(f"\r\x1b[K{failure(cell)}\n")
    last = cells[-1]
    stream.write("\r\x1b[K" if done == total else f"\r\x1b[K{done}/{total} cells, {seconds:.0f} s: {last.op} {last.label}")
    stream.flush()


def failure(cell):
    """A failure in up to three lines: what, the first wrong coordinate, how to see it again."""
    impl = f" impl {cell.impl}" if cell.impl else ""
    lines = [f"{cell.status.upper()} {cell.op} {cell.label}{impl}", *(f"  {line}" for line in (cell.error, cell.reproduce) if line)]
    return "\n".join(lines)


def table(cells):
    """Operation x format x implementation, as text."""
    head = ("operation", "format", "impl", "status", "examples", "unsupported", "worst/bound", "variants")
    rows = [head]
    missing = {c.op for c in cells if c.status == "not provided"}
    rows += [(op, "all", "-", "not provided", "0", "0", "", "") for op in sorted(missing)]
    for c in cells:
        if c.op in missing:
            continue
        worst = f"{c.worst:.3f}" if c.elements else "exact" if c.examples else ""
        variants = ", ".join(f"{name} {count}" for name, count in sorted(c.variants.items(), key=lambda item: -item[1]))
        examples = f"{c.examples} ({c.left_out} left out)" if c.left_out else str(c.examples)
        rows.append((c.op, c.label, c.impl or "-", c.status, examples, str(c.unsupported), worst, variants))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def fingerprint(found):
    """What the probe of sums found, a line for each implementation and kind of x."""
    lines = []
    for name, one in found.items():
        said = {
            key.replace("_", " "): one.get(key)
            for key in ("accumulator_bits", "block_length", "order", "split_k", "promotion", "final_rounding")
        }
        told = [f"{key} {value}" for key, value in said.items() if value not in (None, "unknown")]
        told += ["flushes subnormals"] if one.get("flushes_subnormals") else []
        told += ["NOT AS DECLARED"] if one.get("matches_declaration") is False else []
        lines.append(f"sums of {name}: {', '.join(told)}")
    return "\n".join(lines)


def power(measured):
    """What a pass is worth, in one line."""
    if measured is None:
        return "what a pass is worth has not been measured (make power)"
    killed = measured["killed"]
    return (
        f"what a pass is worth: of {measured['mutants']} known-bad kernels {killed['both']} are caught ({killed['cpu']} on a CPU),"
        f" of {measured['variations']} right ones {measured['false_alarms']} accused in {measured['examples']:,} examples ({measured['date']})"
    )


def summary(cells, seconds):
    """The last line: how many cells of each status, and examples."""
    counts = {status: sum(cell.status == status for cell in cells) for status in STATUSES}
    examples = sum(cell.examples for cell in cells)
    parts = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    return f"{parts}; {examples} examples in {seconds:.0f} s, {examples / max(seconds, 1e-9):.0f} a second"
