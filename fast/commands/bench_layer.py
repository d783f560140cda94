"""Times fast.linear with a random weight beside torch.nn.functional.linear with the 16-bit one: medians, least and most, in microseconds."""

import contextlib
import functools

import torch
from torch.utils import _pytree as pytree

from .. import registry
from ..dispatch import prepare
from ..explain import explain
from ..linear import linear
from ..quantize import quantize
from . import arguments, timing
from .explain import taken


def add_arguments(parser):
    parser.add_argument(
        "--format", type=arguments.format_name, required=True, metavar="FORMAT", help="of the weight, as int4_g128, fp8, mxfp4"
    )
    parser.add_argument("--n", type=arguments.number, default=4096, help="out features (default: 4096)")
    parser.add_argument("--k", type=arguments.number, default=4096, help="in features (default: 4096)")
    parser.add_argument("--m", type=arguments.numbers, default=[1, 16, 256], help="rows of x, one or several numbers (default: 1,16,256)")
    parser.add_argument(
        "--x-format",
        type=arguments.format_name,
        metavar="FORMAT",
        help="what x is quantized to first, as int8_token (default: nothing, it is bfloat16)",
    )
    parser.add_argument(
        "--impl", type=arguments.one_of(registry.IMPLEMENTATIONS["linear"]), help="the implementation (default: the fastest that can)"
    )
    parser.add_argument("--device", type=arguments.device, help="cpu, cuda or cuda:1 (default: cuda where there is one)")


def run(args):
    """The command; returns its exit code."""
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            lines = list(measure(args, device))
    except (ValueError, TypeError, NotImplementedError, ExceptionGroup) as error:
        return arguments.fail("bench-layer", error, 2)
    print(*lines, sep="\n")
    return 0


def measure(args, device):
    """Lines of text: what was measured, and a table with one row a number of rows."""
    gpu = device.type == "cuda"
    w = torch.randn(args.n, args.k, device=device, generator=torch.Generator(device).manual_seed(0)).to(torch.bfloat16)
    q = quantize(w, args.format)
    size = sum(t.nbytes for t in pytree.tree_leaves(q) if t is not None)
    # Of none, what is wrong is said when it is tried.
    names = [taken(explain(q, m, x_format=args.x_format, impl=args.impl)) for m in args.m]
    prepared = [_prepared(q, args) for _ in range(timing.copies(size))]
    plain = [w.clone() for _ in range(timing.copies(w.nbytes))]
    speed = timing.bandwidth(device) if gpu else None
    rows = []
    for m, impl in zip(args.m, names, strict=True):
        x = torch.randn(m, args.k, device=device).to(torch.bfloat16)
        ours = [functools.partial(linear, x, p, x_format=args.x_format, impl=args.impl) for p in prepared]
        theirs = [functools.partial(torch.nn.functional.linear, x, one) for one in plain]
        times = [timing.device_us(calls, device) for calls in (ours, theirs)]
        row = [str(m), impl, *map(_shown, times), f"{times[1][0] / times[0][0]:.2f}"]
        if gpu:
            floor = (size + 2 * m * (args.n + args.k)) / speed * 1e6
            row += [f"{100 * floor / times[0][0]:.0f} %", *(_shown(timing.host_us(calls[0], device)) for calls in (ours, theirs))]
        rows.append(row)
    name = torch.cuda.get_device_name(device) if gpu else f"cpu, {torch.get_num_threads()} threads"
    yield f"{args.format} {args.n}x{args.k}, {size / 2**20:.1f} MiB (16 bits: {w.nbytes / 2**20:.1f}), x {args.x_format or 'bfloat16'}, on {name}"
    cold = timing.copies(size) * size > timing.ROTATED
    yield f"weights are {'cold' if cold else 'so small that they may stay in caches'}; medians (least to most) in us" + (
        f"; the floor is the memory's, {speed / 1e12:.2f} TB/s" if gpu else ""
    )
    head = ["m", "impl", "fast.linear", "16 bits", "speed-up"] + ["share of floor", "host", "host, 16 bits"] * gpu
    yield from arguments.table(head, rows, left=2)


def _prepared(q, args):
    copy = pytree.tree_map_only(torch.Tensor, torch.clone, q)
    return prepare(copy, x_format=args.x_format, impl=args.impl, m=args.m)


def _shown(us):
    return f"{us[0]:.1f} ({us[1]:.1f} to {us[2]:.1f})"
