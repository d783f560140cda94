"""What a verdict of this suite is worth: known-bad versions of the project's own code, and whether they are caught.

    python -m conformance.power                  the mutants that a CPU can show
    python -m conformance.power --lane gpu       the others, on a GPU
    python -m conformance.power --variations     right changes: none of them may fail
    python -m conformance.power --cheats         candidates that only look as if they computed

Prints a line for each as it ends, then the kill matrix (how many examples of each regime failed), the tables and the survivors' names. Exit
code 0: nothing unexpected, 1: a survivor or a false alarm, 2: usage error.
"""

import argparse
import collections
import datetime
import fnmatch
import json
import os
import pathlib
import subprocess
import sys
import time

from .mutants import CHEATS, MUTANTS, VARIATIONS, engine
from .regimes import DATA

FILE = pathlib.Path(__file__).parent / "power.json"
# Of right changes more examples are asked for, since nothing stops early: 10,000 in all.
EXAMPLES, VARIATION_EXAMPLES = 200, 500
LANES = ("cpu", "gpu")


def main(argv=None):
    """Run what is asked for and print the tables; see the module."""
    args = _parse(argv)
    device = "cuda" if args.lane == "gpu" else "cpu"
    what, subjects = _subjects(args)
    if not subjects:
        print(f"power: there is no {what} {' '.join(args.mutants)!r} in the {args.lane} lane", file=sys.stderr)
        return 2
    examples = args.examples or (VARIATION_EXAMPLES if what == "variation" else EXAMPLES)
    if args.write and args.mutants != ["*"]:
        print("power: --write keeps the figures of whole tables: give no --mutants with it", file=sys.stderr)
        return 2
    start, kills = time.monotonic(), []
    for kill in _run(subjects, examples, device, args.jobs):
        kills.append(kill)
        print(f"[{len(kills)}/{len(subjects)}] {_line(kill, what)}", flush=True)
    order = {subject.name: i for i, subject in enumerate(subjects)}
    kills.sort(key=lambda kill: order[kill.name])
    seconds = time.monotonic() - start
    report = {"mutant": mutant_report, "variation": variation_report, "cheat": cheat_report}[what]
    print("\n".join(report(subjects, kills, seconds)))
    if args.write:
        write(what, args.lane, kills)
    return int(any(kill.killed == (what == "variation") or kill.status == "error" for kill in kills))


def _parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m conformance.power", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lane", choices=LANES, default="cpu")
    parser.add_argument("--mutants", nargs="+", default=["*"], metavar="NAME", help="only these; * and ? stand for others")
    parser.add_argument("--variations", action="store_true")
    parser.add_argument("--cheats", action="store_true")
    parser.add_argument(
        "--examples", type=int, metavar="N", help=f"a cell's examples (default {EXAMPLES}, of a variation {VARIATION_EXAMPLES})"
    )
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), metavar="N", help="processes (default: 2)")
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {FILE.name}, which reports print")
    return parser.parse_args(argv)


def _subjects(args):
    """What is run, in a word, and all of it."""
    what, found = ("variation", VARIATIONS) if args.variations else ("cheat", CHEATS) if args.cheats else ("mutant", MUTANTS)
    named = [s for s in found if any(fnmatch.fnmatch(s.name, pattern) for pattern in args.mutants)]
    # Right changes are right on both.
    return what, [s for s in named if s.lane in (args.lane, "both") or what == "variation"]


def _run(subjects, examples, device, jobs):
    """The Kill of each, as they end."""
    waiting, running = list(subjects), []
    while waiting or running:
        while waiting and len(running) < jobs:
            subject = waiting.pop(0)
            try:
                running.append(engine.Run(subject, examples, device))
            except engine.AnchorError as error:
                yield engine.Kill(subject.name, "error", error=str(error))
        for run in [run for run in running if run.poll()]:
            running.remove(run)
            yield run.wait()
        time.sleep(0.02)


def _line(kill, what):
    if kill.status == "error":
        return f"error     {kill.name}: {kill.error.strip().splitlines()[-1]}"
    where = f"at {kill.examples_to_kill} of {kill.examples}, {kill.regime}" if kill.examples_to_kill else f"in {kill.examples}"
    if kill.status in ("crash", "timeout"):
        where = kill.error
    status = "passed" if kill.status == "survived" and what != "mutant" else kill.status
    return f"{status:9} {kill.name} {where}, {kill.seconds:.1f} s"


def mutant_report(subjects, kills, seconds):
    """The kill matrix, tables and survivors, as lines."""
    lines = ["", *matrix(kills), ""]
    killed = [kill for kill in kills if kill.killed]
    groups = collections.Counter(subject.group for subject in subjects)
    of_group = collections.Counter(subject.group for subject, kill in zip(subjects, kills, strict=True) if kill.killed)
    lines += ["group        mutants  killed"]
    lines += [f"{group:12} {groups[group]:7} {of_group[group]:7}" for group in engine.GROUPS if groups[group]]
    first = collections.Counter(kill.regime or kill.status for kill in killed)
    any_of = collections.Counter(regime for kill in killed for regime, (failed, _) in kill.matrix.items() if failed)
    lines += ["", "regime              first to kill  kills at all"]
    lines += [f"{regime:20} {first[regime]:12} {any_of[regime]:13}" for regime in sorted(first | any_of, key=lambda r: -any_of[r])]
    tries = sorted(kill.examples_to_kill for kill in killed if kill.examples_to_kill)
    if tries:
        lines += [
            "",
            f"examples to the kill: median {tries[len(tries) // 2]}, nine of ten within {tries[len(tries) * 9 // 10]}, at most {tries[-1]}",
        ]
    lines += ["", *rules_report(kills)]
    survivors = [kill.name for kill in kills if kill.status == "survived"]
    broken = [f"{kill.name} ({kill.error.strip().splitlines()[-1]})" for kill in kills if kill.status == "error"]
    lines += [""] + ([f"survivors: {', '.join(survivors)}"] if survivors else []) + ([f"not run: {', '.join(broken)}"] if broken else [])
    ways = ", ".join(f"{count} by {way}" for way, count in collections.Counter(k.status for k in killed).items() if way != "killed")
    return [*lines, f"{len(killed)} of {len(kills)} mutants killed{f' ({ways})' if ways else ''} in {seconds:.0f} s"]


def matrix(kills):
    """A line for each mutant: which regimes failed: # all of their examples, + some, . none; blank: no example of it."""
    met = {regime for kill in kills for regime in kill.matrix}
    regimes = [r for r in DATA if r in met] + sorted(met - set(DATA))
    width = max(len(kill.name) for kill in kills)
    lines = [f"{'':{width}}  {'at':>4}  " + " ".join(f"{regime[:4]:4}" for regime in regimes)]
    for kill in kills:
        marks = []
        for regime in regimes:
            failed, ran = kill.matrix.get(regime, (0, 0))
            marks.append(" " if not ran else "." if not failed else "#" if failed == ran else "+")
        at = kill.examples_to_kill or {"survived": "-", "error": "?"}.get(kill.status, kill.status[:4])
        lines.append(f"{kill.name:{width}}  {at:>4}  " + " ".join(f"{mark:4}" for mark in marks).rstrip())
    return lines


def rules_report(kills):
    """How many mutants the common rules would have caught, on the same examples."""
    compared = [kill for kill in kills if kill.rules is not None]
    caught = {rule: sum(kill.rules[rule] > 0 for kill in compared) for rule in _rules(compared)}
    return [f"on the same examples, of the {len(compared)} mutants whose numbers were compared:"] + [
        f"  {what:42} {count:4}"
        for what, count in (
            ("this suite kills", sum(kill.killed for kill in compared)),
            ("allclose(rtol=.01, atol=.05) would", caught.get("allclose", 0)),
            ("cosine difference < 1e-3 would", caught.get("cosine", 0)),
            ("97 % of elements within 10 % would", caught.get("97 %", 0)),
            ("any of these three would", sum(any(kill.rules.values()) for kill in compared)),
        )
    ]


def _rules(kills):
    return next((kill.rules for kill in kills), {})


def variation_report(subjects, kills, seconds):
    """How many right changes failed, as lines."""
    alarms = [kill for kill in kills if kill.killed]
    lines = ["", *(f"false alarm: {kill.name}: {kill.error}\n  {kill.case}" for kill in alarms)]
    lines += [f"not run: {kill.name}: {kill.error.strip()}" for kill in kills if kill.status == "error"]
    examples = sum(kill.examples for kill in kills)
    return [*lines, f"{len(alarms)} false alarms of {len(kills)} right changes, {examples} examples, in {seconds:.0f} s"]


def cheat_report(subjects, kills, seconds):
    """Which cheats passed, as lines."""
    from .mutants.cheats import UNSEEN

    passed = [kill.name for kill in kills if not kill.killed]
    lines = ["", *(f"not seen by any test: {name}: {why}" for name, why in UNSEEN.items())]
    lines += [f"passed: {', '.join(passed)}"] if passed else []
    return [*lines, f"{len(kills) - len(passed)} of {len(kills)} cheats caught in {seconds:.0f} s"]


def write(what, lane, kills):
    """Keep what reports print; a run of one lane leaves the other's figures as they are."""
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    if what == "variation":
        kept |= {
            "variations": len(kills),
            "false_alarms": sum(kill.killed for kill in kills),
            "examples": sum(kill.examples for kill in kills),
        }
    elif what == "cheat":
        kept |= {"cheats": len(kills), "cheats_caught": sum(kill.killed for kill in kills)}
    else:
        killed = {"cpu": 0, "gpu": 0} | kept.get("killed", {}) | {lane: sum(kill.killed for kill in kills)}
        survivors = kept.get("survivors", {}) | {lane: [kill.name for kill in kills if not kill.killed]}
        everywhere = [m.name for m in MUTANTS if all(m.name in survivors.get(of, [m.name]) for of in LANES if m.lane in (of, "both"))]
        compared = [kill for kill in kills if kill.rules is not None]
        rules = {rule: sum(kill.rules[rule] > 0 for kill in compared) for rule in _rules(compared)}
        kept |= {"mutants": len(MUTANTS), "killed": killed | {"both": len(MUTANTS) - len(everywhere)}, "survivors": survivors}
        kept["rules"] = kept.get("rules", {}) | {lane: {"compared": len(compared), "suite": sum(k.killed for k in compared), **rules}}
    kept |= {"date": datetime.date.today().isoformat(), "commit": _commit()}
    FILE.write_text(json.dumps(kept, indent=1) + "\n")


def _commit():
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=FILE.parent, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
