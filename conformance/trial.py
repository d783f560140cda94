"""How a case is tried: the problem is built, the candidate is called, and what it did is judged."""

import contextlib
import traceback
from pathlib import Path

import torch

from . import candidate as candidates
from . import hygiene
from .attempt import attempt
from .candidate import load, text
from .ops import operations
from .oracle import Disagreement


class Here:
    """Tries cases in this process.

    A trial has: impls(names), those that apply, or None where the candidate has no such function; build(case, impl) and
    attempt(function, problem, case, impl), which gives an Agreement or raises; spent, seconds in calls so far.
    """

    def __init__(self, candidate, op, device):
        self.state = hygiene.state()
        self.candidate, self.op, self.device = load(candidate), operations()[op], device
        self.case, self.problems, self.declared = None, {}, {}
        self._recover()

    @property
    def spent(self):
        return self.candidate.spent

    def impls(self, names):
        if self.candidate.function(self.op.FUNCTION) is None:
            return None
        return tuple(names) if self.candidate.takes(self.op.FUNCTION, "impl") else (None,)

    def build(self, case, impl):
        """The Problem of a case, one for all impls that declare the same."""
        declared = self._declared(impl)
        if case is not self.case:
            self.case, self.problems = case, {}
        if declared not in self.problems:
            try:
                self.problems[declared] = self.op.build(case, self.device, declared)
            except Exception as error:
                raise own(error) from error
        return self.problems[declared]

    def attempt(self, function, problem, case, impl):
        declared = self._declared(impl)
        candidates.watch.about(impl, case)
        try:
            return attempt(self.candidate, function, problem, impl, case.seed, declared=declared)
        except NotImplementedError as error:
            self._recover()
            formats = [str(name) for name in (getattr(case, "format", None), getattr(case, "x_format", None)) if name is not None]
            if formats and declared.promises(*formats):
                raise Disagreement("refused", f"declined, and {' '.join(formats)} is declared: {text(error)}") from None
            raise
        except Disagreement:
            self._recover()
            raise
        except Exception as error:
            raise own(error) from error
        finally:
            candidates.watch.rest()
            if self.candidate.forked:
                self.candidate.forked = False
                raise Disagreement("forked", "the call forked, and returned in both processes") from None

    def _declared(self, impl):
        if impl not in self.declared:
            self.declared[impl] = self.candidate.declared(self.op.FUNCTION, impl)
        return self.declared[impl]

    def _recover(self):
        """Put right what an import, or a call that raised, left behind."""
        try:
            if torch.device(self.device).type == "cuda":
                torch.cuda.synchronize(self.device)
        except Exception as error:
            # No later call in this process can succeed.
            candidates.watch.lost(f"the device cannot be used after it: {text(error).splitlines()[0]}")
        for _ in self.state:
            with contextlib.suppress(Disagreement):
                hygiene.check_state(self.state)


class LeftOut(Exception):
    """A trial has no more time for this case."""


def own(error):
    """An exception of the suite itself, as a Disagreement."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent.name in ("conformance", "ops")]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return Disagreement(f"suite: {type(error).__name__}", f"the suite itself failed: {type(error).__name__}: {text(error)}{where}")
