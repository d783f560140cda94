"""Which implementation runs a quantized linear layer, and why no other does; or, with PATH, each quantized layer of a checkpoint."""

import torch

from ref.layouts import open as open_checkpoint

from .. import registry
from ..explain import explain
from ..layers.weight import moved
from . import arguments
from .layout import blank


def add_arguments(parser):
    parser.add_argument("path", metavar="PATH", nargs="?", help="a quantized checkpoint: a directory, a .safetensors file or a .gguf file")
    parser.add_argument(
        "--format", type=arguments.format_name, metavar="FORMAT", help="without PATH: of the weight, as int4_g128, fp8, mxfp4"
    )
    parser.add_argument("--n", type=arguments.number, help="without PATH: out features")
    parser.add_argument("--k", type=arguments.number, help="without PATH: in features")
    parser.add_argument("--m", type=arguments.numbers, default=[1], help="rows of x, one or several numbers as 1,16,256 (default: 1)")
    parser.add_argument(
        "--x-format",
        type=arguments.format_name,
        metavar="FORMAT",
        help="what x is quantized to first, as int8_token (default: nothing, it is bfloat16)",
    )
    parser.add_argument("--impl", type=arguments.one_of(registry.IMPLEMENTATIONS["linear"]), help="as if this one were asked for by name")
    parser.add_argument("--device", type=arguments.device, help="cpu, cuda or cuda:1 (default: cuda where there is one)")


def run(args):
    """The command; returns its exit code."""
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    asked = [f"--{name}" for name in ("format", "n", "k") if getattr(args, name) is not None]
    try:
        if args.path is not None and asked:
            raise ValueError(f"got PATH and {' and '.join(asked)}, expected one or the other")
        if args.path is None and len(asked) < 3:
            raise ValueError("expected PATH, or --format, --n and --k")
        if args.path is None:
            q = blank(args.format, (args.n, args.k), device)
            lines = [explain(q, m, x_format=args.x_format, impl=args.impl) for m in args.m]
        else:
            lines = list(of_checkpoint(open_checkpoint(args.path), args, device))
    except (ValueError, NotImplementedError, TypeError, OSError) as error:
        return arguments.fail("explain", error, 2)
    print(*lines, sep="\n")
    return 0


def of_checkpoint(checkpoint, args, device):
    """Lines of text: a table with one row a layer; and below it, for each kind of layer, the candidates and their reasons."""
    from tqdm import tqdm

    rows, found = [], {}
    for layer, q in tqdm(checkpoint, unit=" layers", delay=1, leave=False, disable=None):
        kind = (q.format, tuple(q.shape), q.group_index is not None)
        if kind not in found:
            here = moved(q, device)
            found[kind] = [explain(here, m, x_format=args.x_format, impl=args.impl) for m in args.m]
        rows.append((layer, str(q.format), "x".join(map(str, q.shape)), *map(taken, found[kind])))
    yield from arguments.table(("layer", "format", "shape", *(f"m={m}" for m in args.m)), rows, left=3 + len(args.m))
    for explanation in (one for of in found.values() for one in of):
        yield f"\n{explanation}"


def taken(explanation):
    """The implementation that runs, or "none"."""
    return next((one.name for one in explanation.candidates if one.chosen), "none")
