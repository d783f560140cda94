"""Processes that cells run in: a candidate that ends its process, or never returns, costs its own cell only.

A worker is asked for the value of a function, and keeps the parent told of the case that it tries, in memory that both share, so that
nothing is lost when it dies. Workers live long. After a crash the cell is drawn once more, each case in a process of its own accord:
a driver draws and shrinks, and a second worker, replaced whenever it dies, makes the calls.

A process starts as a copy of one that has imported no more than torch; those that use a GPU start from nothing, as CUDA wants it.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from multiprocessing.connection import wait

import torch

from . import candidate as candidates
from . import cell
from .candidate import text
from .ops import operations
from .oracle import Disagreement
from .trial import Here, LeftOut

# Seconds that a call may take: the first of a case, which may compile, and the others.
LIMITS = (120.0, 60.0)
# What looking for a small case may cost after the first crash: so many processes, and so many seconds lost with them.
TRIES, LOST = 60, 120.0
# While a hang is shrunk a call may take this many seconds, or this many times as long as the slowest that came back.
HANG, SLOWEST = 10.0, 20.0
POLL = 0.2


class Ended(Exception):
    """A worker is gone. kind: "crash" or "timeout"; the text says what it did last; impl, case: what it spoke of last ("": of none)."""

    def __init__(self, kind, how, impl="", case=""):
        super().__init__(how)
        self.kind, self.impl, self.case = kind, impl, case


class Failed(Exception):
    """A function that a worker was asked for raised; the text is a sentence."""


class Told(candidates.Watch):
    """What a worker tells its parent; memory that both have."""

    user = False

    def __init__(self, context, limits):
        self.limits = limits
        self.text = context.RawArray(ctypes.c_char, 1 << 16)  # impl, a tab, repr of the case
        self.reason = context.RawArray(ctypes.c_char, 1 << 10)
        self.deadline = context.RawValue(ctypes.c_double, 0.0)  # of the call that runs, by time.monotonic()
        self.limit = context.RawValue(ctypes.c_double, 0.0)
        self.calls = 0

    def about(self, impl, case):
        self.calls = 0
        self.text.value = f"{impl or ''}\t{case!r}".encode()[: (1 << 16) - 1]

    def call(self):
        self.limit.value = self.limits[min(self.calls, 1)]
        self.deadline.value = time.monotonic() + self.limit.value
        self.calls += 1

    def rest(self):
        self.deadline.value = 0.0

    def lost(self, reason):
        self.reason.value = reason.encode()[: (1 << 10) - 1]
        os._exit(1)


class Worker:
    """A process that is asked for values of functions.

    Args:
        device: what its calls run on. limits: as LIMITS. group: the process group that it joins, None: its own.
        quiet: what it prints is lost; else it goes to stderr.
    """

    def __init__(self, device, limits=LIMITS, group=None, quiet=True):
        method = (
            "spawn" if torch.device(device).type != "cpu" or "forkserver" not in multiprocessing.get_all_start_methods() else "forkserver"
        )
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload([__name__, *(op.__name__ for op in operations().values())])
        self.told, self.group = Told(context, limits), group
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, self.told, group, quiet))
        self.process.start()
        other.close()

    def send(self, function, *args):
        """Ask for function(*args)."""
        self.told.text.value = b""
        with contextlib.suppress(OSError):  # it has died: poll says how
            self.connection.send((function, args))

    def poll(self, seconds=0.0):
        """(what, value) that it says, "done" for the value asked for; None where nothing has come.

        Raises:
            Ended: it has died, or a call has not returned in time.
            Failed: the function raised.
        """
        try:
            if self.connection.poll(seconds):
                what, value = self.connection.recv()
                if what == "failed":
                    raise Failed(value)
                return what, value
        except (OSError, EOFError):
            self.process.join(5)
        if not self.process.is_alive():
            how = self.told.reason.value.decode(errors="replace") or _how(self.process.exitcode)
            self.close()
            raise Ended("crash", how, *self._about())
        deadline = self.told.deadline.value
        if deadline and time.monotonic() > deadline:
            self.close()
            raise Ended("timeout", f"did not return within {self.told.limit.value:g} s", *self._about())
        return None

    def ask(self, function, *args):
        """The value of function(*args); raises as poll does."""
        self.send(function, *args)
        while True:
            said = self.poll(POLL)
            if said is not None and said[0] == "done":
                return said[1]

    def close(self):
        """End the process, and what it has started."""
        if self.process.pid and self.group is None:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join(5)
        self.connection.close()

    def _about(self):
        impl, _, case = self.told.text.value.decode(errors="replace").partition("\t")
        return impl, case


def _how(code):
    if code is not None and code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"ended its process: {name}"
    return f"ended its process: exit code {code}"


def _serve(connection, told, group, quiet):
    """What a worker does: answer until the parent is gone."""
    with contextlib.suppress(OSError):
        os.setpgid(0, group or 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_outlive_nobody, daemon=True).start()
    _redirect(quiet)
    cell.prepare_worker()
    candidates.watch = told
    process = os.getpid()
    while True:
        try:
            function, args = connection.recv()
        except (OSError, EOFError):
            os._exit(0)
        try:
            answer = "done", function(*args, connection) if function in TELLING else function(*args)
        except BaseException as error:
            answer = "failed", text(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {text(error)}"
        if os.getpid() != process:
            os._exit(0)
        told.rest()
        connection.send(answer)


def _outlive_nobody():
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _redirect(quiet):
    sys.stdout.flush()
    if quiet:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    else:
        os.dup2(2, 1)


# ---- what workers are asked for


def describe(name, functions):
    """Description of the candidate of this name."""
    candidates.watch.call()
    return candidates.describe(candidates.load(name), functions)


def cells(task, connection):
    """The Cells of a Task; failed ones are sent ahead."""
    return cell.run(task, tell=lambda found: connection.send(("cell", found)))


def careful_cells(task, known, once, connection):
    """The Cells of a Task of one implementation that has ended its process before.

    known: {repr of a case: (kind, text)} of a hang. once: what to say where it does not happen again, which is no better.
    """
    trial = Elsewhere(task, candidates.watch.limits, known)
    try:
        found = cell.run(task, trial)
        for one in found:
            if one.status in ("pass", "mistrusted", "unsupported"):
                one.status, one.error, one.reproduce = "crash", once, cell.rerun(task, one.impl)
        return found
    finally:
        trial.close()


TELLING = (cells, careful_cells)


def one_case(case, candidate, impls, device):
    """The Cells of a single case."""
    return cell.run_case(case, candidate, impls, device)


def fingerprint(candidate, device, impls):
    """What fingerprint.probe_all finds."""
    from .fingerprint import probe_all

    loaded = candidates.load(candidate)
    return probe_all(loaded, device, impls, lambda impl: loaded.declared("linear", impl).accumulator)


def _single(task, case, impl):
    """What came of one case: (Agreement, None), or (None, the exception's class and arguments); and the seconds in its calls."""
    global _here
    if _here is None or _here[0] != (task.candidate, task.op, task.device):
        _here = (task.candidate, task.op, task.device), Here(task.candidate, task.op, task.device)
    trial, before = _here[1], _here[1].spent
    try:
        agreement, error = trial.attempt(trial.op.FUNCTION, trial.build(case, impl), case, impl), None
    except NotImplementedError as refusal:
        agreement, error = None, (NotImplementedError, (text(refusal),))
    except Disagreement as wrong:
        agreement, error = None, (Disagreement, (wrong.kind, text(wrong)))
    return agreement, error, trial.spent - before


_here = None


class Elsewhere:
    """Tries cases in a process that may die of them, and is replaced then; a trial, as Here is."""

    def __init__(self, task, limits, known):
        self.task, self.limits, self.known = task, limits, dict(known)  # known: what it has died of
        self.worker, self.spent, self.slowest = None, 0.0, 0.0
        self.tries, self.lost = 0, 0.0

    def impls(self, names):
        return names

    def build(self, case, impl):
        """Nothing: the problem is built where the call is made."""

    def attempt(self, function, problem, case, impl):
        if repr(case) in self.known:
            raise Disagreement(*self.known[repr(case)])
        if self.tries >= TRIES or self.lost > LOST:
            raise LeftOut
        start = time.monotonic()
        try:
            self.worker = self.worker or Worker(self.task.device, self.limits, os.getpgid(0))
            agreement, error, spent = self.worker.ask(_single, self.task, case, impl)
        except Ended as ended:
            self.tries, self.lost, self.worker = self.tries + 1, self.lost + time.monotonic() - start, None
            self._hurry(ended.kind)
            self.known[repr(case)] = ended.kind, f"the call {ended}"
            raise Disagreement(*self.known[repr(case)]) from None
        except Failed as failed:
            raise Disagreement("suite: worker", f"the suite itself failed: {failed}") from None
        self.spent += spent
        self.slowest = max(self.slowest, spent)
        if error is not None:
            raise error[0](*error[1])
        return agreement

    def _hurry(self, kind):
        """Once a call has hung, wait less for the next ones."""
        if kind == "timeout":
            limit = max(HANG, SLOWEST * self.slowest)
            self.limits = tuple(min(limit, usual) for usual in self.limits)

    def close(self):
        if self.worker is not None:
            self.worker.close()
            self.worker = None


# ---- the parent


@dataclass
class _Job:
    """A part of a task that a worker is asked for. order: the task's place. again: its worker had died before it tried anything."""

    order: int
    task: cell.Task
    function: object = cells
    args: tuple = ()
    again: bool = False


class Pool:
    """Workers, and the tasks that they share."""

    def __init__(self, device, limits=LIMITS, quiet=True):
        self.make = lambda: Worker(device, limits, quiet=quiet)
        self.workers = [self.make()]

    def close(self):
        for worker in self.workers:
            worker.close()

    def ask(self, function, *args):
        """The value of function(*args); raises Ended (the worker is replaced) and Failed."""
        try:
            return self.workers[0].ask(function, *args)
        except Ended:
            self.workers[0] = self.make()
            raise

    def run(self, tasks, jobs):
        """The Cells of each task, a list for each as it is done, from so many workers at once."""
        self.workers += [self.make() for _ in range(min(jobs, len(tasks)) - len(self.workers))]
        queue = deque(_Job(i, task) for i, task in enumerate(tasks))
        parts, found = [1] * len(tasks), [[] for _ in tasks]
        busy = {}
        while queue or busy:
            for i, worker in enumerate(self.workers):
                if i not in busy and queue:
                    job = busy[i] = queue.popleft()
                    worker.send(job.function, job.task, *job.args)
            wait([self.workers[i].connection for i in busy], timeout=POLL)
            for i, job in list(busy.items()):
                try:
                    said = self.workers[i].poll()
                    if said is None:
                        continue
                    what, value = said
                    if what == "cell":
                        found[job.order].append(value)
                        job.task = replace(job.task, impls=tuple(impl for impl in job.task.impls if impl != value.impl))
                        continue
                    told = {c.impl for c in found[job.order]}
                    found[job.order] += [c for c in value if c.impl not in told]
                except Failed as failed:
                    found[job.order] += [_lost(job.task, impl, "error", f"the suite itself failed: {failed}") for impl in job.task.impls]
                except Ended as ended:
                    self.workers[i] = self.make()
                    more = list(self._after(job, ended, found[job.order]))
                    parts[job.order] += len(more)
                    queue.extendleft(reversed(more))
                del busy[i]
                parts[job.order] -= 1
                if not parts[job.order]:
                    yield sorted(found[job.order], key=lambda c: _place(tasks[job.order].impls, c.impl))

    def _after(self, job, ended, found):
        """The jobs that are left of one whose worker has ended; what can be said at once is added to found."""
        if not ended.case and not job.again:
            # What the candidate left running may have ended a worker that had nothing to do.
            yield replace(job, again=True)
            return
        if job.function is careful_cells or not ended.case:
            # It was no call of the candidate, or has ended the driver, too.
            where = f"; the last case was {ended.case}" if ended.case else ""
            found += [_lost(job.task, impl, ended.kind, f"the candidate {ended}{where}") for impl in job.task.impls]
            return
        known = {ended.case: (ended.kind, f"the call {ended}")} if ended.kind == "timeout" else {}
        guilty = next((impl for impl in job.task.impls if (impl or "") == ended.impl), None)
        once = f"a call {ended}, and not again; the case was {ended.case}"
        yield _Job(job.order, replace(job.task, impls=(guilty,)), careful_cells, (known, once))
        # A function without impl= is one cell, however many names there are.
        others = tuple(impl for impl in job.task.impls if impl != guilty)
        if others and ended.impl:
            yield _Job(job.order, replace(job.task, impls=others))


def _lost(task, impl, status, error):
    return cell.Cell(task.op, task.label, impl, status, error=error, reproduce=cell.rerun(task, impl))


def _place(impls, impl):
    return impls.index(impl) if impl in impls else len(impls)


def here(tasks):
    """The Cells of each task, in this process."""
    cell.prepare_worker()
    for task in tasks:
        yield cell.run(task)
