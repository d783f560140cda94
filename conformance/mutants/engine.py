"""Mutants: the project's own code with one small patch each, run through the suite's own cells in a process of its own.

A mutant is killed when the suite fails it. How that came about is kept: at which example, in which regime, and what three common
tolerances would have said of the same results.
"""

import functools
import importlib
import multiprocessing
import os
import pathlib
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field, replace

ROOT = pathlib.Path(__file__).parents[2]
# Seconds of a mutant in all, after which it hangs; and how much processor time its cell may take once it is killed, for the matrix and for the
# tolerances.
LIMIT = {"cpu": 120, "cuda": 400}
AFTER = 3
# As the command line has them for `fast`: see conformance.__main__.
POOLS = {"cuda": (("triton", 12), ("cublas", 12), ("humming", 2))}
SECONDS = {"cpu": (("triton", 8),)}

GROUPS = ("layout", "mask", "routing", "scale", "rounding", "activation", "memory", "concurrency", "variation")


class AnchorError(ValueError):
    """A mutant's anchor is not in its file, or not so often as it says."""


@dataclass(frozen=True)
class Mutant:
    """A patch of one file, and the cell that is to catch it.

    name: unique, says the defect. group: one of GROUPS. path: of the file, from the root. find: occurs exactly `times` times in it.
    op, label, impl: the cell; for readers of checkpoints op is "read" and label the layout.
    stands_for: the address of a public bug, or the operator that made it. lane: "cpu", or "gpu" for what the interpreter cannot show, or
        "both" for what it shows in cases so large that it gets few of them.
    opens: right patches (path, find, replace) that lead to the code: kernels that are not chosen on the CPU. hangs: it may never return.
    """

    name: str
    group: str
    path: str
    find: str
    replace: str
    op: str
    label: str
    impl: str | None
    stands_for: str
    lane: str = "cpu"
    times: int = 1
    opens: tuple = ()
    hangs: bool = False

    candidate, seconds = "fast", None

    def patches(self, device="cpu"):
        """[(path, find, replace, times)]; a GPU chooses its kernels by itself, but for what is of the GPU's lane."""
        opens = [(*patch, 1) for patch in self.opens] if device == "cpu" or self.lane == "gpu" else []
        return [*opens, (self.path, self.find, self.replace, self.times)]


@dataclass(frozen=True)
class Cheat:
    """A candidate that only looks as if it computed. about: what it does. seconds: when to stop waiting for it."""

    name: str
    candidate: str
    op: str
    label: str
    about: str
    seconds: int | None = None

    group, impl, lane, hangs = "cheat", None, "cpu", True

    def patches(self, device="cpu"):
        return []


class Enough(BaseException):
    """Nothing more is to be learnt from a cell."""


@dataclass
class Kill:
    """What came of a mutant.

    status: "killed", "survived", "timeout" or "crash" (killed, too), "error" (the mutant could not be run: nothing is known of it).
    examples_to_kill, regime, case, error: of the first example that failed. examples: how many ran. matrix: {regime: [failed, ran]}.
    rules: {rule: on how many of these examples it failed}, None where no numbers were compared. seconds: of its process.
    """

    name: str
    status: str = "survived"
    examples_to_kill: int | None = None
    regime: str = ""
    case: str = ""
    error: str = ""
    seconds: float = 0.0
    examples: int = 0
    matrix: dict = field(default_factory=dict)
    rules: dict | None = None

    @property
    def killed(self):
        return self.status in ("killed", "timeout", "crash")


def patched(mutant, device="cpu", root=ROOT):
    """{path: text} of the files that a mutant changes.

    Raises:
        AnchorError: an anchor does not occur as often as it should.
    """
    texts = {}
    for path, find, new, times in mutant.patches(device):
        text = texts.get(path) or (pathlib.Path(root) / path).read_text()
        count = text.count(find)
        if count != times or find == new:
            raise AnchorError(f"{mutant.name}: {find!r} occurs {count} times in {path}, expected {times}, and a change")
        texts[path] = text.replace(find, new)
    return texts


def run(mutant, examples=200, device="cpu", root=ROOT, seed=0):
    """The Kill of a mutant or a cheat, in a process of its own.

    Args:
        device: "cpu" or "cuda". root: the folder that holds fast and ref.
    """
    return Run(mutant, examples, device, root, seed).wait()


class Run:
    """A mutant that is being run: poll says whether it has ended, wait returns its Kill."""

    def __init__(self, mutant, examples=200, device="cpu", root=ROOT, seed=0):
        self.mutant, self.start, self.limit = mutant, time.monotonic(), mutant.seconds or LIMIT[device]
        self.folder = tempfile.mkdtemp(prefix="mutant-")
        try:
            texts = patched(mutant, device, root)
            for package in {path.partition("/")[0] for path in texts}:
                shutil.copytree(
                    pathlib.Path(root) / package, f"{self.folder}/{package}", ignore=shutil.ignore_patterns("__pycache__", "test_*")
                )
            for path, text in texts.items():
                pathlib.Path(self.folder, path).write_text(text)
        except BaseException:
            shutil.rmtree(self.folder)
            raise
        context = _server()
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_child, args=(other, mutant, examples, device, self.folder, seed), daemon=True)
        self.process.start()
        other.close()

    def poll(self):
        return self.connection.poll() or not self.process.is_alive() or time.monotonic() - self.start > self.limit

    def wait(self):
        """The Kill, once the process has ended or its time is up."""
        left = self.limit - (time.monotonic() - self.start)
        try:
            if not self.connection.poll(max(0, left)):
                # Of one that should return, that may as well be a busy machine.
                kill = Kill(self.mutant.name, "timeout" if self.mutant.hangs else "error", error=f"no end within {self.limit} s")
            else:
                kill = self.connection.recv()
        except EOFError:
            self.process.join()
            kill = Kill(self.mutant.name, "crash", error=f"the process ended with exit code {self.process.exitcode}")
        finally:
            self.process.kill()
            self.process.join()
            self.connection.close()
            shutil.rmtree(self.folder, ignore_errors=True)
        return replace(kill, seconds=time.monotonic() - self.start)


@functools.cache
def _server():
    """Processes are forked from one that has imported what takes long, and nothing that is patched."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conformance.mutants.preload"])
    return context


def _child(connection, mutant, examples, device, folder, seed):
    sys.dont_write_bytecode = True
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    kill = Kill(mutant.name)
    try:
        _import_patched(mutant, device, folder)
        if mutant.op == "read":
            _read(mutant, kill)
        else:
            _run_cell(mutant, kill, examples, device, seed)
    except Enough:
        pass
    except BaseException:
        kill.status, kill.error = "error", traceback.format_exc(limit=-4)
    connection.send(kill)
    connection.close()
    os._exit(0)


def _import_patched(mutant, device, folder):
    """Have the packages that are patched come from the folder."""
    sys.path.insert(0, folder)
    packages = {path.partition("/")[0] for path, *_ in mutant.patches(device)}
    # The oracle's ref is the real one, but for a mutant of ref itself, which the golden vectors judge.
    for name in list(sys.modules):
        top = name.partition(".")[0]
        if top in packages or ("ref" in packages and name in ("conformance.mutants.reading", "conformance.vectors")):
            del sys.modules[name]
    for package in packages:
        module = importlib.import_module(package)
        if not module.__file__.startswith(folder):
            raise ImportError(f"{package} came from {module.__file__}, expected {folder}")


def _read(mutant, kill):
    reading = importlib.import_module("conformance.mutants.reading").read_all(mutant.label)
    kill.examples = reading.cases + (reading.error is not None)
    kill.matrix = {"golden": [int(reading.error is not None), kill.examples]}
    if reading.error is not None:
        kill.status, kill.examples_to_kill, kill.regime = "killed", kill.examples, "golden"
        kill.case, kill.error = f"{mutant.label}: {reading.case}", reading.error


def _run_cell(mutant, kill, examples, device, seed):
    from .. import cell
    from .watching import watching

    cell.prepare_worker()
    device_name = "cuda:0" if device == "cuda" else device
    task = cell.Task(
        *(mutant.candidate, mutant.op, mutant.label, (mutant.impl,), device_name, examples, seed),
        pools=POOLS.get(device, ()),
        seconds=SECONDS.get(device, ()),
    )
    with watching(task, kill, AFTER) as trial:
        (found,) = cell.run(task, trial)
    if kill.status == "survived" and found.status == "fail":
        # Of no example alone: results that lean to one side.
        kill.status, kill.examples_to_kill, kill.regime, kill.error = "killed", kill.examples, "all", found.error
    elif kill.status == "survived" and found.status != "pass":
        kill.status, kill.error = "error", f"the cell is {found.status}: {found.error or found.reason}"
