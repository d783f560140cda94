"""The command line: python -m conformance --candidate fast."""

import argparse
import math
import os
import sys
import time

import torch

from ref.format import parse_format

from . import blocked, cell, database, environment, formats, report, waivers, worker
from .candidate import nearest
from .case import read_case
from .ops import operations
from .profiles import PROFILES
from .status import FAILING

# `fast` by name: what it is tried with, and how many configurations its slow preparers are given (a new one compiles).
DEFAULTS = {"cpu": ("torch", "triton"), "cuda": ("torch", "triton", "humming", "cublas")}
POOLS = {"cuda": {"triton": 12, "cublas": 12, "humming": 2}}
# On the CPU Triton's interpreter takes a thousand times as long as a GPU; it gets this many seconds in each cell.
SECONDS = {"cpu": {"triton": 8}}
# What else python -m conformance does, by its first argument.
COMMANDS = ("export", "verify")


class UsageError(Exception):
    """A wrong argument; the message is one sentence."""


def main(argv=None):
    """Run the suite; 0: all that is provided agrees, 1: something disagrees, 2: usage error, 130: interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        from . import export

        return export.main(argv)
    pool = None
    try:
        args = _parse(argv)
        pool = worker.Pool(args.device, args.timeout, quiet=args.case is None) if args.jobs else None
        settle(args, pool)
        return _run(args, pool) if args.case is None else _single(args, pool)
    except (UsageError, ValueError) as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 2
    except (worker.Ended, worker.Failed) as error:
        print(f"conformance: the suite itself failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if pool is not None:
            pool.close()


def _ask(pool, function, *args):
    """function(*args), in a worker where there are any."""
    return function(*args) if pool is None else pool.ask(function, *args)


def _run(args, pool):
    tasks = _tasks(args, waivers.active(args.waivers) + _ask(pool, environment.probe, args.device))
    fingerprint = _fingerprint(args, pool) if args.fingerprint else None
    start, cells, interrupted = time.perf_counter(), [], False
    try:
        for done, found in enumerate(worker.here(tasks) if pool is None else pool.run(tasks, args.jobs), 1):
            cells += found
            report.progress(done, len(tasks), found, time.perf_counter() - start)
    except KeyboardInterrupt:
        interrupted = True
        ran = {(c.op, c.label) for c in cells}
        cells += [cell.Cell(t.op, t.label, impl, "not run") for t in tasks if (t.op, t.label) not in ran for impl in t.impls]
    order = {(task.op, task.label): i for i, task in enumerate(tasks)}
    cells.sort(key=lambda c: order[c.op, c.label])
    blocked.mark(cells)
    seconds = time.perf_counter() - start
    complaints = list(waivers.complaints(args.waivers, cells, args.narrowed or interrupted))
    _show(cells, seconds, complaints, fingerprint)
    try:
        _write(args, cells, seconds, fingerprint)
    except OSError as error:
        raise UsageError(f"cannot write {error.filename!r}: {error.strerror}") from None
    if interrupted:
        return 130
    if all(c.status in ("not provided", "unsupported") for c in cells):
        print(f"conformance: {args.candidate} provides nothing that was asked for", file=sys.stderr)
        return 2
    failed = bool(complaints) or any(c.status in FAILING for c in cells)
    if not failed and any(c.status == "precondition failed" for c in cells):
        print("conformance: this environment allows no verdict on some cells", file=sys.stderr)
        return 2
    return int(failed)


def _show(cells, seconds, complaints, fingerprint):
    print(report.table(cells))
    if fingerprint:
        print(report.fingerprint(fingerprint))
    print(report.summary(cells, seconds))
    print(report.power(report.measured_power()))
    for c in cells:
        if c.status in FAILING:
            print(report.failure(c))
    for complaint in complaints:
        print(f"WAIVER {complaint}")


def _write(args, cells, seconds, fingerprint):
    if args.database:
        database.write(args.database, cells)
    run = {name: getattr(args, name) for name in ("candidate", "device", "impls", "examples", "seed", "profile", "shard")}
    run |= {"seconds": seconds, "examples_per_second": sum(c.examples for c in cells) / max(seconds, 1e-9)}
    if args.json:
        report.write_json(args.json, cells, run, fingerprint)
    if args.report:
        report.write_html(args.report, cells, run, args.compare, fingerprint)
    if args.compare:
        print(report.differences(report.compare(args.compare, report.document(cells, run, fingerprint))))


def _single(args, pool):
    try:
        arguments = args.case, args.candidate, args.impls, args.device
        cells = _ask(pool, worker.one_case, *arguments)
    except worker.Ended as ended:
        cells = [cell.Cell(args.case.op, "case", ended.impl or None)]
        cells[0].fail(ended.kind, cell.Task(args.candidate, args.case.op, "case", (), args.device, 1), args.case, f"the call {ended}")
    for c in cells:
        impl = f" impl {c.impl}" if c.impl else ""
        note = f": {c.reason}" if c.status == "unsupported" else f", variant {next(iter(c.variants))}" if c.variants else ""
        print(report.failure(c) if c.status in FAILING else f"{c.status.upper()} {args.case!r}{impl}{note}")
    if all(c.status == "not provided" for c in cells):
        return 2
    return int(any(c.status in FAILING for c in cells))


def settle(args, pool):
    """What depends on the candidate: its description, and what it is tried with where the arguments do not say."""
    args.description = _describe(args, pool)
    args.formats = _formats(args.description.formats or formats.MAIN) if args.formats is None else args.formats
    args.impls = _impls(args)
    args.pool, args.seconds = (_by_impl(args, name, defaults) for name, defaults in (("pool", POOLS), ("seconds", SECONDS)))


def _describe(args, pool):
    """The candidate's Description."""
    functions = tuple(dict.fromkeys(op.FUNCTION for op in operations().values()))
    try:
        return _ask(pool, worker.describe, args.candidate, functions)
    except worker.Ended as ended:
        raise UsageError(f"candidate: cannot import {args.candidate!r}: it {ended}") from None
    except worker.Failed as failed:
        raise UsageError(str(failed)) from None


def _fingerprint(args, pool):
    """What the candidate's linear shows of its sums; None where it does not let itself be probed."""
    if "linear" not in args.description.functions:
        return None
    arguments = args.candidate, args.device, args.impls if "impl" in args.description.functions["linear"] else (None,)
    try:
        return _ask(pool, worker.fingerprint, *arguments)
    except (worker.Ended, worker.Failed) as error:
        print(f"conformance: no fingerprint: {error}", file=sys.stderr)
        return None


def _tasks(args, waived):
    chosen = operations()
    tasks = []
    for name in args.ops:
        share = getattr(chosen[name], "SHARE", 1)
        seconds = tuple((impl, share * most) for impl, most in args.seconds.items())
        limits = {"pools": tuple(args.pool.items()), "seconds": seconds, "waivers": waived}
        impls = args.impls if "impl" in args.description.functions.get(chosen[name].FUNCTION, ()) else (None,)
        for label in chosen[name].labels(args.formats):
            first = database.read(args.database, name, label) if args.database else ()
            examples = math.ceil(share * args.examples)
            tasks.append(cell.Task(args.candidate, name, label, impls, args.device, examples, args.seed, first=first, **limits))
    if not tasks:
        raise UsageError(f"no operation of {', '.join(args.ops)} takes the formats {', '.join(args.formats)}")
    left = [name for name in args.ops if name not in {task.op for task in tasks}]
    if left:
        print(f"conformance: not run, for want of a format that they take: {', '.join(left)}", file=sys.stderr)
    if args.shard:
        which, of = map(int, args.shard.split("/"))
        tasks = tasks[which - 1 :: of]
        if not tasks:
            raise UsageError(f"--shard {args.shard}: there are fewer cells than machines")
    return tasks


def _parse(argv):
    parser = _Parser(prog="python -m conformance", description=__doc__)
    parser.add_argument("--candidate", required=True, help="pkg.mod or pkg.mod:attr, with functions of ref's names and signatures")
    parser.add_argument("--ops", help="comma-separated; default: all")
    parser.add_argument(
        "--formats", help="comma-separated names, or 'generated'; default: the candidate's FORMATS, or the main formats and generated ones"
    )
    parser.add_argument("--impl", help="comma-separated values of impl=; default for fast: all that the device has")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--profile", default="ci", help=", ".join(f"{name} ({n} examples)" for name, n in PROFILES.items()))
    parser.add_argument("--examples", type=int, help="for each operation, format and implementation; overrides the profile")
    parser.add_argument("--seed", type=int, default=0, help="other cases; default 0: the same ones on every run")
    parser.add_argument("--pool", help="impl=N,...: how many configurations (n, k, format, dtype) an implementation is given")
    parser.add_argument(
        "--seconds", help="impl=N,...: what an implementation may take in a cell; then it gets a part of the cases; 0: no limit"
    )
    limits = ",".join(f"{limit:g}" for limit in worker.LIMITS)
    parser.add_argument(
        "--timeout", default=limits, help=f"seconds that a case's first call (which may compile) and others may take; {limits}"
    )
    parser.add_argument("--jobs", type=int, help="worker processes; default 2 on a CPU, 1 on a GPU; 0: run in this one, for a debugger")
    parser.add_argument("--shard", metavar="I/N", help="the I-th of N parts of the cells, for N machines")
    parser.add_argument("--waivers", metavar="FILE", help="known failures, in TOML (conformance.waivers says how)")
    parser.add_argument("--database", metavar="DIR", help="keep cases that fail there, and try those first")
    parser.add_argument("--fingerprint", action="store_true", help="probe how sums are accumulated")
    parser.add_argument("--json", metavar="FILE", help="write the report there, too")
    parser.add_argument("--report", metavar="FILE", help="write it as one page of HTML, too")
    parser.add_argument("--compare", metavar="FILE", help="the --json of another run: say what has changed")
    parser.add_argument("--case", help="run one case, as a failure prints it")
    args = parser.parse_args(argv)
    args.narrowed = any((args.ops, args.formats, args.impl, args.shard))
    args.device = _device(args.device)
    args.kind = torch.device(args.device).type
    args.ops = _names("operation", args.ops, list(operations()))
    args.formats = None if args.formats is None else _formats(args.formats.split(","))
    if args.profile not in PROFILES:
        raise UsageError(f"unknown profile {args.profile!r}, expected one of {', '.join(PROFILES)}{nearest(args.profile, PROFILES)}")
    args.examples = PROFILES[args.profile] if args.examples is None else args.examples
    if args.examples < 1:
        raise UsageError(f"--examples is {args.examples}, expected 1 or more")
    if args.jobs is None:
        args.jobs = min(2, os.cpu_count() or 1) if args.kind == "cpu" and args.profile != "smoke" else 1
    if args.jobs < 0:
        raise UsageError(f"--jobs is {args.jobs}, expected 0 or more")
    args.timeout = _timeout(args.timeout)
    args.shard = _shard(args.shard)
    args.waivers = waivers.read(args.waivers) if args.waivers else ()
    args.case = None if args.case is None else read_case(args.case)
    args.compare = report.read(args.compare) if args.compare else None
    for option in ("json", "report"):
        path = getattr(args, option)
        if path and not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise UsageError(f"--{option}: there is no folder {os.path.dirname(path)!r}")
        if path and os.path.isdir(path):
            raise UsageError(f"--{option}: {path!r} is a folder, expected a file's name")
    if args.database and os.path.exists(args.database) and not os.path.isdir(args.database):
        raise UsageError(f"--database: {args.database!r} is no folder")
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


def _formats(names):
    names = [name for name in names if name]
    for name in names:
        if name != formats.GENERATED:
            parse_format(name)
    if not names:
        raise UsageError("no format given")
    return names


def _impls(args):
    known = args.description.implementations
    if args.impl is None:
        return DEFAULTS.get(args.kind, (None,)) if args.candidate == "fast" else known or (None,)
    names = tuple(name for name in args.impl.split(",") if name)
    if not any("impl" in parameters for parameters in args.description.functions.values()):
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


def _timeout(text):
    try:
        first, later = map(float, text.split(","))
        if not (0 < later < math.inf and 0 < first < math.inf):
            raise ValueError
    except ValueError:
        raise UsageError(f"--timeout is {text!r}, expected two numbers of seconds, as 120,30") from None
    return first, later


def _shard(text):
    if text is None:
        return None
    which, _, of = text.partition("/")
    if not (which.isdecimal() and of.isdecimal() and 1 <= int(which) <= int(of)):
        raise UsageError(f"--shard is {text!r}, expected I/N with I from 1 to N")
    return text


def _by_impl(args, option, defaults):
    """impl=N,... as a dict; N alone: for every implementation; 0: left out."""
    text = getattr(args, option)
    if text is None:
        usual = defaults.get(args.kind, {}) if args.candidate == "fast" else {}
        return {impl: number for impl, number in usual.items() if impl in args.impls}
    numbers = {}
    for part in text.split(","):
        name, _, number = part.rpartition("=")
        if not number.isdigit() or (name and name not in args.impls):
            raise UsageError(f"--{option} is {text!r}, expected impl=N,... with impl one of {', '.join(map(str, args.impls))}")
        numbers |= {name: int(number)} if name else dict.fromkeys(args.impls, int(number))
    return {impl: number for impl, number in numbers.items() if number}


if __name__ == "__main__":
    sys.exit(main())
