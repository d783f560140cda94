"""The report: progress while it runs, a table at the end, JSON for machines."""

import json
import platform
import sys

import torch

SCHEMA = 1


def progress(done, total, cells, seconds, stream=None):
    """One line, over and over, on a terminal; nothing elsewhere. Failures are printed as they come."""
    stream = stream or sys.stderr
    if not stream.isatty():
        return
    for cell in cells:
        if cell.status == "fail":
            stream.write(f"\r\x1b[K{failure(cell)}\n")
    last = cells[-1]
    stream.write("\r\x1b[K" if done == total else f"\r\x1b[K{done}/{total} cells, {seconds:.0f} s: {last.op} {last.label}")
    stream.flush()


def failure(cell):
    """A failure in three lines: what, the first wrong coordinate, how to see it again."""
    impl = f" impl {cell.impl}" if cell.impl else ""
    return f"FAIL {cell.op} {cell.label}{impl}\n  {cell.error}\n  {cell.reproduce}"


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


def summary(cells, seconds):
    """The last line: how many cells of each status, and examples."""
    counts = {}
    for cell in cells:
        counts[cell.status] = counts.get(cell.status, 0) + 1
    examples = sum(cell.examples for cell in cells)
    parts = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    return f"{parts}; {examples} examples in {seconds:.0f} s"


def write_json(path, cells, run):
    """Everything in the table, and what it was run on.

    Args:
        run: the settings of the run, a dict.
    """
    device = torch.device(run["device"])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    document = {"schema": SCHEMA, "run": run, "torch": torch.__version__, "device_name": name, "cells": [c.as_dict() for c in cells]}
    with open(path, "w") as file:
        json.dump(document, file, indent=1)
        file.write("\n")
