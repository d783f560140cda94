"""The command line: python -m conformance --candidate fast."""

import argparse
import math
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import torch

from ref.format import parse_format

from . import cell, formats, report
from .candidate import load, nearest
from .case import read_case
from .ops import operations

PROFILES = {"smoke": 10, "ci": 200, "deep": 2000}
# `fast` by name: what it is tried with, and how many configurations its slow preparers are given (a new one compiles).
DEFAULTS = {"cpu": ("torch", "triton"), "cuda": ("torch", "triton", "humming", "cublas")}
POOLS = {"cuda": {"triton": 12, "humming": 2}}
# On the CPU Triton's interpreter takes a thousand times as long as a GPU; it gets this many seconds in each cell.
SECONDS = {"cpu": {"triton": 4}}


class UsageError(Exception):
    """A wrong argument; the message is one sentence."""


def main(argv=None):
    """Run the suite; 0: all that is provided agrees, 1: something disagrees, 2: usage error."""
    try:
        args = _parse(argv)
        if args.case is not None:
            return _single(args)
        tasks = _tasks(args)
    except (UsageError, ValueError) as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 2
    start = time.perf_counter()
    cells = []
    try:
        for done, found in enumerate(_run(tasks, args.jobs), 1):
            cells += found
            report.progress(done, len(tasks), found, time.perf_counter() - start)
    except BrokenProcessPool:
        print(f"conformance: {args.candidate} ended its process (a crash, or an exit); --jobs 1 shows in which call", file=sys.stderr)
        return 1
    order = {(task.op, task.label): i for i, task in enumerate(tasks)}
    cells.sort(key=lambda c: order[c.op, c.label])
    seconds = time.perf_counter() - start
    print(report.table(cells))
    print(report.summary(cells, seconds))
    for c in cells:
        if c.status == "fail":
            print(report.failure(c))
    if args.json:
        run = {name: getattr(args, name) for name in ("candidate", "device", "impls", "examples", "seed", "profile")}
        report.write_json(args.json, cells, {**run, "seconds": seconds})
    if all(c.status in ("not provided", "unsupported") for c in cells):
        print(f"conformance: {args.candidate} provides nothing that was asked for", file=sys.stderr)
        return 2
    if all(c.status == "not provided" for c in cells):
        return 2
    return int(any(c.status == "fail" for c in cells))


def _single(args):
    cells = cell.run_case(args.case, args.candidate, args.impls, args.device)
    for c in cells:
        impl = f" impl {c.impl}" if c.impl else ""
        note = f": {c.reason}" if c.status == "unsupported" else f", variant {next(iter(c.variants))}" if c.variants else ""
        print(report.failure(c) if c.status == "fail" else f"{c.status.upper()} {args.case!r}{impl}{note}")
    if all(c.status == "not provided" for c in cells):
        return 2
    return int(any(c.status == "fail" for c in cells))


def _run(tasks, jobs):
    if jobs < 2 or len(tasks) < 2:
        cell.prepare_worker()
        yield from map(cell.run, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=cell.prepare_worker) as workers:
        for done in as_completed([workers.submit(cell.run, task) for task in tasks]):
            yield done.result()


def _tasks(args):
    chosen = operations()
    tasks = []
    for name in args.ops:
        share = getattr(chosen[name], "SHARE", 1)
        seconds = tuple((impl, share * most) for impl, most in args.seconds.items())
        limits = {"pools": tuple(args.pool.items()), "seconds": seconds}
        for label in chosen[name].labels(args.formats):
            examples = math.ceil(share * args.examples)
            tasks.append(cell.Task(args.candidate, name, label, args.impls, args.device, examples, args.seed, **limits))
    if not tasks:
        raise UsageError(f"no operation of {', '.join(args.ops)} takes the formats {', '.join(args.formats)}")
    return tasks


def _parse(argv):
    parser = _Parser(prog="python -m conformance", description=__doc__)
    parser.add_argument("--candidate", required=True, help="pkg.mod or pkg.mod:attr, with functions of ref's names and signatures")
    parser.add_argument("--ops", help="comma-separated; default: all")
    parser.add_argument("--formats", help="comma-separated names, or 'generated'; default: the main formats and generated ones")
    parser.add_argument("--impl", help="comma-separated values of impl=; default for fast: all that the device has")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--profile", default="ci", help=", ".join(f"{name} ({n} examples)" for name, n in PROFILES.items()))
    parser.add_argument("--examples", type=int, help="for each operation, format and implementation; overrides the profile")
    parser.add_argument("--seed", type=int, default=0, help="other cases; default 0: the same ones on every run")
    parser.add_argument("--pool", help="impl=N,...: how many configurations (n, k, format, dtype) an implementation is given")
    parser.add_argument(
        "--seconds", help="impl=N,...: what an implementation may take in a cell; then it gets a part of the cases; 0: no limit"
    )
    parser.add_argument("--jobs", type=int, help="processes; default 2 on a CPU, 1 on a GPU")
    parser.add_argument("--json", metavar="FILE", help="write the report there, too")
    parser.add_argument("--case", help="run one case, as a failure prints it")
    args = parser.parse_args(argv)
    args.candidate_object = load(args.candidate)
    args.device = _device(args.device)
    kind = torch.device(args.device).type
    args.ops = _names("operation", args.ops, list(operations()))
    args.formats = _formats(args.formats)
    args.impls = _impls(args, kind)
    if args.profile not in PROFILES:
        raise UsageError(f"unknown profile {args.profile!r}, expected one of {', '.join(PROFILES)}{nearest(args.profile, PROFILES)}")
    args.examples = PROFILES[args.profile] if args.examples is None else args.examples
    if args.examples < 1:
        raise UsageError(f"--examples is {args.examples}, expected 1 or more")
    usual = args.candidate == "fast"
    args.pool = _by_impl("pool", args.pool, POOLS.get(kind, {}) if usual else {}, args.impls)
    args.seconds = _by_impl("seconds", args.seconds, SECONDS.get(kind, {}) if usual else {}, args.impls)
    args.jobs = (min(2, os.cpu_count() or 1) if kind == "cpu" and args.profile != "smoke" else 1) if args.jobs is None else args.jobs
    args.case = None if args.case is None else read_case(args.case)
    if args.json and not os.path.isdir(os.path.dirname(os.path.abspath(args.json))):
        raise UsageError(f"--json: there is no folder {os.path.dirname(args.json)!r}")
    if args.json and os.path.isdir(args.json):
        raise UsageError(f"--json: {args.json!r} is a folder, expected a file's name")
    return args


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(message)


def _names(what, text, known):
    names = known if text is None else [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            raise UsageError(f"unknown {what} {name!r}, expected one of {', '.join(known)}{nearest(name, known)}")
    if not names:
        raise UsageError(f"no {what} given, expected one of {', '.join(known)}")
    return names


def _formats(text):
    if text is None:
        return list(formats.MAIN)
    names = [name for name in text.split(",") if name]
    for name in names:
        if name != formats.GENERATED:
            parse_format(name)
    if not names:
        raise UsageError("no format given")
    return names


def _impls(args, kind):
    candidate = args.candidate_object
    known = candidate.implementations
    if args.impl is None:
        return DEFAULTS.get(kind, (None,)) if args.candidate == "fast" else known or (None,)
    names = tuple(name for name in args.impl.split(",") if name)
    functions = [op.FUNCTION for op in operations().values() if candidate.function(op.FUNCTION)]
    if not any(candidate.takes(function, "impl") for function in functions):
        raise UsageError(f"no function of {args.candidate} takes impl=")
    for name in names:
        if known and name not in known:
            raise UsageError(f"unknown impl {name!r}, expected one of {', '.join(known)}{nearest(name, known)}")
    if not names:
        raise UsageError("no impl given")
    return names


def _device(text):
    if text is None:
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError:
        raise UsageError(f"unknown device {text!r}, expected cpu, cuda or cuda:N{nearest(text, ('cpu', 'cuda'))}") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {text!r} is not supported, expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"device {text!r}: this machine has {torch.cuda.device_count()} of that kind")
    return "cuda:0" if text == "cuda" else text


def _by_impl(option, text, default, impls):
    """impl=N,... as a dict; N alone: for every implementation; 0: left out."""
    if text is None:
        return {impl: number for impl, number in default.items() if impl in impls}
    numbers = {}
    for part in text.split(","):
        name, _, number = part.rpartition("=")
        if not number.isdigit() or (name and name not in impls):
            raise UsageError(f"--{option} is {text!r}, expected impl=N,... with impl one of {', '.join(map(str, impls))}")
        numbers |= {name: int(number)} if name else dict.fromkeys(impls, int(number))
    return {impl: number for impl, number in numbers.items() if number}


if __name__ == "__main__":
    sys.exit(main())
