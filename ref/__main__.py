"""The command line: python -m ref inspect PATH."""

import argparse
import math
import sys

from tqdm import tqdm

from . import layouts


def main(argv=None):
    """Run a command; 0: done, 2: a wrong argument, or a checkpoint that cannot be read (one line on stderr)."""
    parser = argparse.ArgumentParser(prog="python -m ref", description="What a quantized checkpoint holds.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("inspect", help="a table of the quantized layers of a checkpoint, and totals")
    command.add_argument("path", help="a directory of safetensors files, a .safetensors file or a .gguf file")
    args = parser.parse_args(argv)
    try:
        print(inspect(args.path))
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"python -m ref inspect: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def inspect(path):
    """A table, one line a quantized layer (name, layout, format, shape, bits per weight, MiB), and totals by format.

    Bits and MiB are those of the layer's tensors as they are in the file. Every layer is read, one at a time, and so checked.
    """
    checkpoint = layouts.open(path)
    rows, sums = [], {}
    for layer, q in tqdm(checkpoint, unit=" layers", delay=1, leave=False, disable=None):
        weights, size = math.prod(q.shape), checkpoint.nbytes(layer)
        rows.append((layer, checkpoint.layout, str(q.format), "x".join(map(str, q.shape)), *_sizes(weights, size)))
        count = sums.setdefault(str(q.format), [0, 0, 0])
        sums[str(q.format)] = [a + b for a, b in zip(count, (1, weights, size), strict=True)]
    sums["all quantized"] = [sum(column) for column in zip(*sums.values(), strict=True)]
    totals = [(name, str(count), str(weights), *_sizes(weights, size)) for name, (count, weights, size) in sums.items()]
    plain = sum(checkpoint.nbytes(name) for name in checkpoint.plain)
    totals.append(("plain tensors", str(len(checkpoint.plain)), "", "", _sizes(1, plain)[1]))
    return "\n".join(
        (
            *_table(("layer", "layout", "format", "shape", "bits/weight", "MiB"), rows, left=4),
            "",
            *_table(("total", "number", "weights", "bits/weight", "MiB"), totals, left=1),
        )
    )


def _sizes(weights, size):
    return f"{8 * size / max(weights, 1):.3f}", f"{size / 2**20:.2f}"


def _table(headings, rows, left):
    """Lines of aligned columns: the first `left` ones flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for row in (headings, *rows):
        cells = (cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        yield "  ".join(cells).rstrip()


if __name__ == "__main__":
    sys.exit(main())
