"""One operation and format, every implementation: draw cases, try them, shrink what fails."""

import contextlib
import math
import zlib
from dataclasses import asdict, dataclass, field

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Flaky

from ref.format import parse_format

from .candidate import text
from .case import read_case, reproduction
from .formats import GENERATED
from .ops import operations
from .oracle import ERRORS, WIDE_EXAMPLES, WIDE_SHARE, WIDTHS, Agreement, Disagreement
from .strategies import pool
from .trial import Here, LeftOut, own

QUIET = settings(
    deadline=None,
    database=None,
    phases=(Phase.generate, Phase.shrink),
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)

# Hypothesis mutates its examples after the tenth, and then five of six are near-copies of others: fresh runs of ten give
# three times as many formats and seeds. Cases that come twice are left out; a cell ends after this many runs without news.
BATCH, IDLE = 10, 5

# Roundings to either side are as good as tosses of a coin: so many sigma, of so many tosses at least, are none.
SIGMAS, TOSSES = 8, 200

# What a kind of disagreement is called; "suite: ..." is an error, all others are failures.
STATUS = {"refused": "undeclared reject", "crash": "crash", "timeout": "timeout", "raised: SystemExit": "crash"}


@dataclass(frozen=True)
class Task:
    """A cell to run.

    pools: (impl, how many configurations a slow implementation is given); all others: any number.
    seconds: (impl, what its calls may take in all); then it gets a part of the cases, spread evenly. All others: any time.
    first: (impl, repr of a case) of cases that failed before: they are tried first. waivers: Waivers, of this and of other cells.
    """

    candidate: str
    op: str
    label: str
    impls: tuple
    device: str
    examples: int
    seed: int = 0
    pools: tuple = ()
    seconds: tuple = ()
    first: tuple = ()
    waivers: tuple = ()


@dataclass
class Cell:
    """What came of an operation, a format and an implementation.

    status: one of status.STATUSES. examples: how many ran; unsupported: how many the candidate declined; left_out: how many it was not
    given, for lack of time. worst, elements, wide, widths, errors, matches, signed: those of Agreement, over all examples; bounded: examples
    with elements under a bound, vague: the sum of their shares of wide ones; bias_z: by how many sigma more results were rounded away from
    zero than toward it. variants: how many examples agreed first with which; regimes: how many had which data. seconds: in its calls. case,
    error, reproduce: of a failure. reason: of what did not run.
    waiver: the link of what is waived; waived: of each waiver, how many examples it covers and how many of those failed.
    blocked_by: an operation that this one is made of, and that fails.
    """

    op: str
    label: str
    impl: str | None
    status: str = "unsupported"
    examples: int = 0
    unsupported: int = 0
    worst: float = 0.0
    elements: int = 0
    wide: int = 0
    bounded: int = 0
    vague: float = 0.0
    widths: list = field(default_factory=lambda: [0] * WIDTHS)
    errors: list = field(default_factory=lambda: [0] * ERRORS)
    matches: int = 0
    signed: list = field(default_factory=lambda: [0, 0])
    bias_z: float | None = None
    variants: dict = field(default_factory=dict)
    regimes: dict = field(default_factory=dict)
    seconds: float = 0.0
    left_out: int = 0
    reason: str = ""
    case: str = ""
    error: str = ""
    reproduce: str = ""
    blocked_by: str | None = None
    waiver: str | None = None
    waived: dict = field(default_factory=dict)

    def count(self, case, agreement: Agreement):
        self.examples += 1
        self.worst = max(self.worst, agreement.worst)
        self.elements += agreement.elements
        self.wide += agreement.wide
        if agreement.elements:
            self.bounded, self.vague = self.bounded + 1, self.vague + agreement.wide / agreement.elements
        self.matches += agreement.matches
        for name in ("widths", "errors", "signed"):
            setattr(self, name, [a + b for a, b in zip(getattr(self, name), getattr(agreement, name), strict=True)])
        if agreement.variant:
            self.variants[agreement.variant] = self.variants.get(agreement.variant, 0) + 1
        self.saw(case)

    def saw(self, case):
        data = getattr(case, "data", None)
        if data is not None:
            self.regimes[data] = self.regimes.get(data, 0) + 1

    def fail(self, status, task, case, error):
        self.status, self.case, self.error = status, repr(case), error
        self.reproduce = reproduction(case, task.candidate, self.impl, task.device)

    def excuse(self, waiver, task, case, error):
        """A failure that is waived: an example like others."""
        self.examples += 1
        self.saw(case)
        if not self.waiver:
            self.fail(waiver.becomes, task, case, error)
            self.waiver, self.reason = waiver.link, waiver.reason

    def close(self, task, vague=False):
        """Decide on the status."""
        up, down = self.signed
        tosses = up + down
        self.bias_z = (up - down) / math.sqrt(tosses) if tosses else None
        covered = any(ran for ran, _ in self.waived.values())
        if self.waiver or self.status not in ("unsupported", "pass"):
            pass
        elif not self.examples:
            self.status = "unsupported"
        elif tosses >= TOSSES and abs(self.bias_z) > SIGMAS:
            self.status = "fail"
            self.error = f"results lean to one side: {up} were rounded away from zero and {down} toward it, expected about as many"
            self.reproduce = rerun(task, self.impl)
        elif covered:
            self.status, self.error = "xpass", f"{', '.join(self.waived)} covers examples of this cell, and none of them failed"
        else:
            self.status = "mistrusted" if vague else "pass"

    def as_dict(self):
        return asdict(self)


def status_of(error):
    return "error" if error.kind.startswith("suite: ") else STATUS.get(error.kind, "fail")


def rerun(task, impl):
    """The shell command that runs a whole cell again."""
    where = f" --impl {impl}" if impl else ""
    where += f" --device {task.device}" if str(task.device) != "cpu" else ""
    where += f" --formats {task.label}" if task.label == GENERATED or is_format(task.label) else ""
    return f"python -m conformance --candidate {task.candidate}{where} --ops {task.op} --examples {task.examples} --seed {task.seed}"


def is_format(label):
    try:
        parse_format(label)
    except ValueError:
        return False
    return True


class _Found(Exception):
    """Tells Hypothesis of a failure."""


def run(task, trial=None, tell=None):
    """The Cells of a Task, one for each implementation.

    Args:
        trial: how cases are tried; None: Here.
        tell: called with each cell that has failed, as soon as that is certain.
    """
    trial = trial or Here(task.candidate, task.op, task.device)
    impls = trial.impls(task.impls)
    if impls is None:
        return [Cell(task.op, task.label, None, "not provided")]
    cells, pools = {}, dict(task.pools)
    for size in sorted({pools.get(impl, 0) for impl in impls}):
        cells |= _explore(task, trial, size, [impl for impl in impls if pools.get(impl, 0) == size], tell)
    for cell in cells.values():
        # How wide the bound is depends on the implementation by what it declares only: where one has few examples, those of all tell.
        cell.close(task, _vague([cell] if cell.examples >= WIDE_EXAMPLES else cells.values()))
    return [cells[impl] for impl in impls]


def _vague(cells):
    """Whether bounds were too wide to tell much, on average over the examples."""
    enough = sum(cell.examples for cell in cells) >= WIDE_EXAMPLES
    return enough and sum(cell.vague for cell in cells) > WIDE_SHARE * sum(cell.bounded for cell in cells)


def run_case(case, candidate_name, impls, device):
    """The Cells of a single case."""
    name = "linear_x" if case.op == "linear" and case.x_format is not None else case.op
    task, trial = Task(candidate_name, name, "case", tuple(impls), device, 1), Here(candidate_name, name, device)
    impls = trial.impls(impls)
    if impls is None:
        return [Cell(name, "case", None, "not provided")]
    cells = [Cell(name, "case", impl) for impl in impls]
    for cell in cells:
        try:
            _try(trial, operations()[name], case, trial.build(case, cell.impl), cell)
        except Disagreement as error:
            cell.fail(status_of(error), task, case, str(error))
        cell.close(task)
    return cells


def _explore(task, trial, size, impls, tell):
    """The Cells of implementations that have pools of this size: draw until each has had its examples; start over without one that has failed."""
    cells = {}
    while len(cells) < len(impls):
        search = _Search(task, trial, [impl for impl in impls if impl not in cells])
        try:
            search.run(_strategy(task, size))
        except Exception as error:
            # Not while a case was tried: no implementation can be judged.
            for cell in search.cells.values():
                cell.status, cell.error, cell.reproduce = "error", str(own(error)), rerun(task, cell.impl)
            return cells | search.cells
        if search.error is None:
            return cells | search.cells
        cell = cells[search.impl] = search.cells[search.impl]
        cell.waiver, cell.reason = None, ""
        cell.fail(status_of(search.error), task, search.case, str(search.error))
        if tell:
            tell(cell)
    return cells


def _strategy(task, size):
    op, config = operations()[task.op], None
    if size and op.FUNCTION == "linear":
        config = pool(task.label, task.op == "linear_x", size, task.seed)
    elif size and hasattr(op, "pool"):
        config = op.pool(task.label, size, task.seed)
    return op.cases(task.label, config)


class _Search:
    """Draws cases for implementations until each has had its examples, or one has failed and its case is as small as it gets.

    impl, case, error: the smallest failure so far. While it is shrunk only its implementation runs, and only its kind of failure counts.
    """

    def __init__(self, task, trial, impls):
        self.task, self.trial, self.op = task, trial, operations()[task.op]
        self.cells = {impl: Cell(task.op, task.label, impl) for impl in impls}
        self.seen, self.limits = set(), dict(task.seconds)
        self.waivers = {impl: [w for w in task.waivers if w.names(task.op, task.label, impl)] for impl in impls}
        self.impl = self.case = self.error = None

    def run(self, strategy):
        for impl, shown in self.task.first:
            if impl in self.cells and self.error is None:
                self._known(impl, shown)
        idle = batch = 0
        while len(self.seen) < self.task.examples and idle < IDLE and self.error is None:
            before, batch = len(self.seen), batch + 1
            key = zlib.crc32(f"{self.task.seed} {self.task.op} {self.task.label} {batch}".encode())
            with contextlib.suppress(_Found, Flaky):
                seed(key)(settings(QUIET, max_examples=BATCH)(given(strategy)(self._example)))()
            idle = 0 if len(self.seen) > before else idle + 1

    def _known(self, impl, shown):
        """Try a case that failed in an earlier run; what it printed then may have no meaning now."""
        try:
            case = read_case(shown)
        except ValueError:
            return
        try:
            self._judge(impl, case)
        except Disagreement as error:
            self.impl, self.case, self.error = impl, case, error

    def _example(self, case):
        shrinking = self.error is not None
        if not shrinking:
            if repr(case) in self.seen or len(self.seen) == self.task.examples:
                return
            self.seen.add(repr(case))
        for impl in [self.impl] if shrinking else self.cells:
            cell = self.cells[impl]
            if not shrinking and cell.seconds * self.task.examples > self.limits.get(impl, math.inf) * len(self.seen):
                cell.left_out += 1
                continue
            try:
                self._judge(impl, case, not shrinking)
                continue
            except Disagreement as error:
                if shrinking and self.error.kind != error.kind:
                    continue
                self.impl, self.case, self.error = impl, case, error
            # Always from this line: to Hypothesis the place says which failure it is.
            raise _Found

    def _judge(self, impl, case, counted=True):
        """Try a case, and raise the Disagreement unless it is waived."""
        cell, failure = self.cells[impl], None
        before = cell.examples
        try:
            _try(self.trial, self.op, case, self.trial.build(case, impl), cell, counted)
        except Disagreement as error:
            failure = error
        waiver = None
        for covering in self.waivers[impl]:
            if covering.covers(case):
                failed = failure is not None and status_of(failure) in covering.statuses
                waiver = waiver or (covering if failed else None)
                if counted and covering.expected and (failed or cell.examples > before):
                    ran, so_far = cell.waived.get(covering.name, (0, 0))
                    cell.waived[covering.name] = (ran + 1, so_far + failed)
        if failure is not None and waiver is None:
            raise failure
        if failure is not None and counted:
            cell.excuse(waiver, self.task, case, str(failure))


def _try(trial, op, case, problem, cell, counted=True):
    before = trial.spent
    try:
        agreement = trial.attempt(op.FUNCTION, problem, case, cell.impl)
        if counted:
            cell.count(case, agreement)
    except NotImplementedError as error:
        if counted:
            cell.unsupported += 1
            cell.reason = cell.reason or text(error)
    except LeftOut:
        cell.left_out += counted
    finally:
        cell.seconds += trial.spent - before


def prepare_worker():
    """What a worker process does first."""
    torch.set_num_threads(1)
