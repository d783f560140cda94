"""Cases as files, for kernels that Python does not call: python -m conformance export DIR, and verify DIR OUTPUTS.

An export holds inputs, exact answers and the ends of the admissible intervals, as safetensors and JSON; GUIDE, which lies beside them, says
how. Only operations whose results are judged without looking at other results of the same kernel are exported.
"""

import argparse
import json
import math
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from hypothesis import given, seed, settings
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ref.element import value_list
from ref.format import SCALE_DTYPES, parse_format
from ref.pack import pack
from ref.quantize import dequantize

from . import formats
from .bounds import sums_exactly
from .cell import BATCH, QUIET
from .ops import operations, parts_of
from .ops.dequantize import DTYPES as RESULTS
from .ops.linear import Truth
from .ops.linear_data import draw as draw_linear
from .ops.pack import INTEGERS, draw_codes
from .oracle import interval, number, span
from .weights import draw_weight

SCHEMA = 1
BOUNDS = {"cpu": "float32 sums in any order", "cuda": "the matrix units of a GPU, 16 bits and fp8 promoted every 128"}
# Batches of drawing without enough cases that can be exported, before it is enough.
TRIES = 40
CONDITIONAL = "judged conditional on the kernel's own scales, codes, choices or order"
LEFT_OUT = {
    **dict.fromkeys(("quantize", "quantize_input", "moe_activation", "fused_topk", "hash_topk"), CONDITIONAL),
    **dict.fromkeys(("moe_align_block_size", "batched_moe_align_block_size", "moe_permute", "moe_scatter_masked"), CONDITIONAL),
    **dict.fromkeys(("moe_unpermute", "moe_fused_mul_sum", "fused_experts", "expert_map"), "not exported by this version"),
    **dict.fromkeys(("grouped_linear", "masked_linear", "indexed_linear"), "not exported by this version: as linear, expert by expert"),
    "linear, linear_x with NaN or inf in x": "these rows are held to a rule, and not to an interval",
    "dequantize with several roundings, a rotation or a float64 result": "held to a bound that is not exported",
}

GUIDE = """\
# Cases of quantref's conformance suite, as files

`index.json`: `schema` ({schema}), `bounds`, `formats`, `left_out`, and `cases`: for each its `name`, `op`, `case` (how the suite writes it),
`settings`, `inputs`, `output` (dtype and shape of `y`), and `variants` (null: bits).

- `inputs/NAME.safetensors`: what the operation is called with. A quantized weight `w` is `w.packed`, `w.scale`, and where its format has
  them `w.zero`, `w.scale_2`, `w.group_index`, `w.offset`.
- `expected/NAME.safetensors`: for the i-th variant `exact.i` (float64), and `low.i` and `high.i` (dtype of `y`): the least and the
  largest admissible result. For bit results: `bits`.

Write `OUTPUTS/NAME.safetensors` with one tensor `y` for each case, and run `python -m conformance verify DIR OUTPUTS`. A case agrees where
for some variant low <= y <= high in every element (zeros of either sign are equal; NaN where low is NaN), or where y equals the bits.

## Operations
- `linear`, `linear_x`: y = x W^T + bias; x (m, k), W (n, k). With `x_format`, x is quantized to that first, with `x_scale` where given.
- `dequantize`: y = W, rounded once.
- `pack`: codes (..., k), each of `bits` bits, as a little-endian bitstream for each row, in int32 words, zero bits behind the last.
- `unpack`: the reverse: `k` codes of each row, as uint8.

## Weights
`packed` is as `pack` makes it. With `formats[settings.format]`:
W[n, k] = (values[code] - zero) * scale * scale_2 + offset. scale, zero and offset are of group (n // group[0], k // group[1]); 0 in `group`
stands for the whole axis, and `group_index[k]` replaces k // group[1] where it is given. Scales stored as uint8 are codes: `scale_values`
decodes them. A scale_2 whose kind ends in `divisor` divides. With `hadamard` B, each B columns of W are multiplied by the orthonormal
Hadamard matrix of that size (Sylvester's order) afterwards.
"""


class ExportError(Exception):
    """What cannot be done; the message is one sentence."""


@dataclass
class Entry:
    """A case as files: answers are (variant, y, error), float64; bits stand instead of them."""

    inputs: dict
    dtype: torch.dtype
    settings: dict
    answers: list = field(default_factory=list)
    bits: torch.Tensor | None = None


def linear(case, device):
    data = draw_linear(case)
    if not bool(data.x.isfinite().all()):
        return None
    truth = Truth(data, torch.device(device))
    inputs = {"x": data.x, **parts_of(data.q, "w")}
    inputs |= {name: t for name, t in (("bias", data.bias), ("x_scale", data.x_scale)) if t is not None}
    given = {"format": str(parse_format(case.format))} | ({} if case.x_format is None else {"x_format": str(parse_format(case.x_format))})
    return Entry(inputs, data.x.dtype, given, [(variant, *truth.answer(variant)) for variant in truth.variants])


def dequantized(case, device):
    fmt, dtype = parse_format(case.format), RESULTS[case.dtype]
    lead = () if case.experts is None else (case.experts,)
    w = draw_weight(case.seed, fmt, (*lead, case.n, case.k), case.data, case.order)
    exact = dequantize(w)
    if fmt.hadamard or dtype == torch.float64 or not sums_exactly(w, exact):
        return None
    return Entry(parts_of(w, "w"), dtype, {"format": str(fmt), "k": case.k}, [("exact", exact, torch.zeros_like(exact))])


def packed(case, device):
    codes = draw_codes(case).to(INTEGERS[case.integer]).reshape(*case.lead, case.k)
    return Entry({"codes": codes}, torch.int32, {"bits": case.bits}, bits=pack(codes, case.bits))


def unpacked(case, device):
    codes = draw_codes(case).reshape(*case.lead, case.k)
    return Entry(
        {"packed": pack(codes, case.bits)}, torch.uint8, {"bits": case.bits, "k": case.k}, bits=codes.to(torch.uint8)
    )  # fmt: skip


SOURCES = {"linear": linear, "linear_x": linear, "dequantize": dequantized, "pack": packed, "unpack": unpacked}


def export(directory, ops, names, examples, number_of_run=0, device="cpu"):
    """Write cases into a new or empty directory; returns how many.

    Args:
        ops, names: operations and formats. examples: of each operation and format. device: whose adders' bounds hold, of BOUNDS.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ExportError(f"export: {str(directory)!r} exists and is no empty folder")
    for part in ("inputs", "expected"):
        (directory / part).mkdir(parents=True)
    cases, used = [], set()
    for op in ops:
        for label in operations()[op].labels(names):
            for i, (case, entry) in enumerate(_drawn(op, label, examples, number_of_run, device)):
                name = f"{op}-{label.replace(' ', '_')}-{i:03}"
                expected, variants = _expected(entry)
                save_file({key: t.contiguous() for key, t in entry.inputs.items()}, directory / "inputs" / f"{name}.safetensors")
                save_file(expected, directory / "expected" / f"{name}.safetensors")
                used |= {entry.settings[key] for key in ("format", "x_format") if key in entry.settings}
                shape = entry.answers[0][1].shape if entry.answers else entry.bits.shape
                output = {"dtype": _name(entry.dtype), "shape": list(shape)}
                about = {"settings": entry.settings, "inputs": sorted(entry.inputs), "output": output, "variants": variants}
                cases.append({"name": name, "op": op, "case": repr(case), **about})
    index = {"schema": SCHEMA, "bounds": BOUNDS[device], "seed": number_of_run, "left_out": LEFT_OUT}
    index |= {"formats": {name: _described(parse_format(name)) for name in sorted(used)}, "cases": cases}
    (directory / "index.json").write_text(json.dumps(index, indent=1, allow_nan=False) + "\n")
    (directory / "README.md").write_text(GUIDE.replace("{schema}", str(SCHEMA)))
    return len(cases)


def _drawn(op, label, examples, number_of_run, device):
    """(case, Entry) of so many different cases, fewer where there are no more."""
    found, seen = [], set()

    def collect(case):
        if repr(case) in seen or len(found) == examples:
            return
        seen.add(repr(case))
        entry = SOURCES[op](case, device)
        if entry is not None:
            found.append((case, entry))

    for batch in range(TRIES):
        if len(found) < examples:
            key = zlib.crc32(f"{number_of_run} export {op} {label} {batch}".encode())
            seed(key)(settings(QUIET, max_examples=BATCH)(given(operations()[op].cases(label))(collect)))()
    return found


def _expected(entry):
    """The tensors of an expected file, and the variants' names: only those that admit something else than the ones before."""
    if entry.bits is not None:
        return {"bits": entry.bits}, None
    tensors, variants = {}, []
    for variant, y, error in entry.answers:
        low, high = interval(y, error, entry.dtype)
        if any(torch.equal(low, tensors[f"low.{i}"]) and torch.equal(high, tensors[f"high.{i}"]) for i in range(len(variants))):
            continue
        tensors |= {f"exact.{len(variants)}": y.contiguous(), f"low.{len(variants)}": low, f"high.{len(variants)}": high}
        variants.append(variant)
    return tensors, variants


def _described(fmt):
    """A format for readers that do not parse its name."""
    scale = SCALE_DTYPES[fmt.scale]
    return {
        "bits": fmt.element.bits,
        "values": _values(fmt.element),
        "group": list(fmt.group),
        "scale": fmt.scale,
        "scale_values": None if isinstance(scale, torch.dtype) else _values(scale),
        "zero": fmt.zero,
        "scale_2": fmt.scale_2,
        "offset": fmt.offset,
        "hadamard": fmt.hadamard,
    }


def _values(element):
    """The value of each code; JSON has no NaN and inf: they are strings."""
    return [v if math.isfinite(v) else str(v) for v in map(float, value_list(element))]


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def verify(directory, outputs):
    """Hold the files of `outputs` against an export.

    Returns:
        [(name, None or what is wrong)], a sentence for each case and each file that belongs to none.
    """
    index, outputs = _read_index(Path(directory)), Path(outputs)
    if not outputs.is_dir():
        raise ExportError(f"verify: there is no folder {str(outputs)!r}")
    found = [(case["name"], _judge(case, Path(directory), outputs)) for case in index["cases"]]
    known = {f"{case['name']}.safetensors" for case in index["cases"]}
    return found + [(path.name, "no case has this name") for path in sorted(outputs.iterdir()) if path.name not in known]


def _read_index(directory):
    try:
        index = json.loads((directory / "index.json").read_text())
        version, _ = index["schema"], index["cases"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"verify: {str(directory)!r} holds no export: {type(error).__name__}: {error}") from None
    if version != SCHEMA:
        raise ExportError(f"verify: {str(directory)!r} has schema {version}, expected {SCHEMA}: export it anew")
    return index


def _judge(case, directory, outputs):
    """None, or what is wrong with a case's output."""
    path = outputs / f"{case['name']}.safetensors"
    if not path.exists():
        return f"there is no file {path.name}"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        return f"{path.name} is no whole safetensors file: {error}"
    if set(tensors) != {"y"}:
        return f"{path.name} holds {', '.join(sorted(tensors)) or 'nothing'}, expected one tensor y"
    y, want = tensors["y"], case["output"]
    got = _name(y.dtype), list(y.shape)
    if got != (want["dtype"], want["shape"]):
        return f"y is {got[0]} {got[1]}, expected {want['dtype']} {want['shape']}"
    try:
        expected = load_file(directory / "expected" / path.name)
        return _compared(y, expected, case["variants"])
    except (OSError, SafetensorError, KeyError) as error:
        raise ExportError(f"verify: expected/{path.name} of the export is damaged: {error}") from None


def _compared(y, expected, variants):
    if variants is None:
        wrong, shown = y != expected["bits"], lambda at: f"{number(expected['bits'][at])} only"
        return _first(y, wrong, shown) if bool(wrong.any()) else None
    first = None
    for i in range(len(variants)):
        low, high, exact = (expected[f"{part}.{i}"] for part in ("low", "high", "exact"))
        wrong = ~(((y >= low) & (y <= high)) | (y.isnan() & low.isnan()))
        if not bool(wrong.any()):
            return None
        first = first or _first(y, wrong, lambda at: f"{span(low[at], high[at])}, exact {exact[at].item():.9g}")
    return first


def _first(y, wrong, shown):
    at = tuple(wrong.nonzero()[0].tolist())
    return f"y{list(at)} = {number(y[at])}, admissible {shown(at)} ({int(wrong.sum())} of {y.numel()} elements are wrong)"


def main(argv):
    """`export DIR [options]` or `verify DIR OUTPUTS`; 0: done, all agree; 1: an output is wrong or missing; 2: usage error."""
    parser = argparse.ArgumentParser(prog="python -m conformance", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("export", help="write cases as safetensors and JSON")
    one.add_argument("directory", metavar="DIR", help="a new or empty folder")
    one.add_argument("--ops", help=f"comma-separated; default: all of {', '.join(SOURCES)}")
    one.add_argument("--formats", help="comma-separated; default: the main formats")
    one.add_argument("--examples", type=int, default=10, help="of each operation and format; default 10")
    one.add_argument("--seed", type=int, default=0, help="other cases")
    one.add_argument("--device", choices=BOUNDS, default="cpu", help="whose sums the intervals allow for; default cpu")
    two = commands.add_parser("verify", help="hold another program's outputs against an export")
    two.add_argument("directory", metavar="DIR", help="an export")
    two.add_argument("outputs", metavar="OUTPUTS", help="a folder with a file NAME.safetensors for each case, tensor y")
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:
        return end.code
    try:
        return _export(args) if args.command == "export" else _verify(args)
    except (ExportError, ValueError, OSError) as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 2


def _export(args):
    ops = list(SOURCES) if args.ops is None else args.ops.split(",")
    for op in ops:
        if op not in SOURCES:
            why = LEFT_OUT.get(op, "there is no such operation")
            raise ExportError(f"export: {op!r} cannot be exported ({why}), expected some of {', '.join(SOURCES)}")
    names = [name for name in formats.MAIN if name != formats.GENERATED] if args.formats is None else args.formats.split(",")
    for name in names:
        parse_format(name)
    if args.examples < 1:
        raise ExportError(f"export: --examples is {args.examples}, expected 1 or more")
    count = export(args.directory, ops, names, args.examples, args.seed, args.device)
    print(f"{count} cases in {args.directory}; {args.directory}/README.md says what is where")
    return 0


def _verify(args):
    found = verify(args.directory, args.outputs)
    if not found:
        raise ExportError(f"verify: {args.directory!r} holds no cases")
    wrong = [(name, text) for name, text in found if text is not None]
    for name, text in wrong:
        print(f"FAIL {name}\n  {text}")
    print(f"{len(found) - len(wrong)} agree, {len(wrong)} fail")
    return int(bool(wrong))
