"""One operation and format, every implementation: draw cases, try them, shrink what fails."""

import math
import zlib
from dataclasses import asdict, dataclass, field

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Flaky

from .attempt import attempt
from .candidate import load
from .case import reproduction
from .ops import operations
from .oracle import WIDE_EXAMPLES, WIDE_SHARE, Agreement, Disagreement
from .strategies import pool

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


@dataclass(frozen=True)
class Task:
    """A cell to run.

    pools: (impl, how many configurations a slow implementation is given); all others: any number.
    seconds: (impl, what its calls may take in all); then it gets a part of the cases, spread evenly. All others: any time.
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


@dataclass
class Cell:
    """What came of an operation, a format and an implementation.

    status: pass, fail, mistrusted (too wide a bound in too many elements), unsupported (nothing ran), not provided.
    examples: how many ran; unsupported: how many the candidate declined. worst: the largest error as a fraction of its bound.
    variants: how many examples agreed first with which. left_out: how many it was not given, for lack of time. seconds: in its calls.
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
    variants: dict = field(default_factory=dict)
    seconds: float = 0.0
    left_out: int = 0
    reason: str = ""
    case: str = ""
    error: str = ""
    reproduce: str = ""

    def count(self, agreement: Agreement):
        self.examples += 1
        self.worst = max(self.worst, agreement.worst)
        self.elements += agreement.elements
        self.wide += agreement.wide
        if agreement.variant:
            self.variants[agreement.variant] = self.variants.get(agreement.variant, 0) + 1

    def start_over(self):
        self.examples = self.unsupported = self.left_out = self.elements = self.wide = 0
        self.variants, self.seconds = {}, 0.0

    def close(self, vague=False):
        if self.status not in ("fail", "not provided"):
            self.status = "unsupported" if not self.examples else "mistrusted" if vague else "pass"

    def as_dict(self):
        return asdict(self)


def run(task):
    """The Cells of a Task, one for each implementation."""
    candidate = load(task.candidate)
    op = operations()[task.op]
    if candidate.function(op.FUNCTION) is None:
        return [Cell(task.op, task.label, None, "not provided")]
    impls = task.impls if candidate.takes(op.FUNCTION, "impl") else (None,)
    cells = {impl: Cell(task.op, task.label, impl) for impl in impls}
    pools = dict(task.pools)
    for size in sorted({pools.get(impl, 0) for impl in impls}):
        config = None
        if size and op.FUNCTION == "linear":
            config = pool(task.label, task.op == "linear_x", size, task.seed)
        elif size and hasattr(op, "pool"):
            config = op.pool(task.label, size, task.seed)
        active = {impl: cell for impl, cell in cells.items() if pools.get(impl, 0) == size}
        _explore(task, candidate, op, op.cases(task.label, config), active)
    # How wide the bound is does not depend on the implementation: all that was compared in this cell counts.
    enough = sum(cell.examples for cell in cells.values()) >= WIDE_EXAMPLES
    vague = enough and sum(cell.wide for cell in cells.values()) > WIDE_SHARE * sum(cell.elements for cell in cells.values())
    for cell in cells.values():
        cell.close(vague)
    return list(cells.values())


def run_case(case, candidate_name, impls, device):
    """The Cells of a single case."""
    candidate = load(candidate_name)
    name = "linear_x" if case.op == "linear" and case.x_format is not None else case.op
    op = operations()[name]
    if candidate.function(op.FUNCTION) is None:
        return [Cell(name, "case", None, "not provided")]
    impls = impls if candidate.takes(op.FUNCTION, "impl") else (None,)
    task = Task(candidate_name, name, "case", tuple(impls), device, 1)
    cells = [Cell(name, "case", impl) for impl in impls]
    problem = op.build(case, device, candidate.variants(op.FUNCTION))
    for cell in cells:
        try:
            _try(candidate, op, case, problem, cell)
        except Disagreement as error:
            _fail(task, cell, case, error)
        cell.close()
    return cells


def _explore(task, candidate, op, strategy, active):
    """Draw cases until every implementation has had its examples; start over without one that has failed."""
    while active:
        failed, seen, idle, batch = _Failed(), set(), 0, 0

        def example(case):
            _example(task, candidate, op, case, active, failed, seen)

        while len(seen) < task.examples and idle < IDLE and failed.error is None:
            before, batch = len(seen), batch + 1
            key = zlib.crc32(f"{task.seed} {task.op} {task.label} {batch}".encode())
            try:
                seed(key)(settings(QUIET, max_examples=BATCH)(given(strategy)(example)))()
            except Exception as error:
                if failed.own is not None:
                    raise RuntimeError(f"conformance itself failed on {failed.case!r}") from failed.own
                if failed.error is None or not isinstance(error, (Disagreement, Flaky)):
                    raise
                _fail(task, active.pop(failed.impl), failed.case, failed.error)
            idle = 0 if len(seen) > before else idle + 1
        if failed.error is None:
            return
        for cell in active.values():
            cell.start_over()


class _Failed:
    """The smallest failure so far: while it is shrunk, only its implementation runs, and only its kind of failure counts."""

    impl = case = error = None
    own = None  # an exception of the suite itself


def _example(task, candidate, op, case, active, failed, seen):
    shrinking, limits = failed.error is not None, dict(task.seconds)
    if not shrinking:
        if repr(case) in seen or len(seen) == task.examples:
            return
        seen.add(repr(case))
    problem = None
    for impl, cell in [(failed.impl, active[failed.impl])] if shrinking else active.items():
        if not shrinking and cell.seconds * task.examples > limits.get(impl, math.inf) * len(seen):
            cell.left_out += 1
            continue
        try:
            if problem is None:
                problem = op.build(case, task.device, candidate.variants(op.FUNCTION))
            _try(candidate, op, case, problem, cell, not shrinking)
        except Disagreement as error:
            if not shrinking or failed.error.kind == error.kind:
                failed.impl, failed.case, failed.error = impl, case, error
                raise
        except Exception as error:
            failed.case, failed.own = case, error
            raise


def _try(candidate, op, case, problem, cell, counted=True):
    before = candidate.spent
    try:
        agreement = attempt(candidate, op.FUNCTION, problem, cell.impl, case.seed)
        if counted:
            cell.count(agreement)
    except NotImplementedError as error:
        if counted:
            cell.unsupported += 1
            cell.reason = cell.reason or str(error)
    finally:
        cell.seconds += candidate.spent - before


def _fail(task, cell, case, error):
    cell.status, cell.case, cell.error = "fail", repr(case), str(error)
    cell.reproduce = reproduction(case, task.candidate, cell.impl, task.device)


def prepare_worker():
    """What a worker process does first."""
    torch.set_num_threads(1)
