"""A cell's trial that writes down what the suite says of each example, and goes on after a failure, without shrinking."""

import contextlib
import time

from .. import cell
from ..oracle import Agreement, Disagreement
from .engine import Enough
from .rules import Rules


class Watching(cell.Here):
    """Tries cases in this process, and fills in a Kill.

    after: processor seconds; a cell that has failed goes on for so long in all.
    """

    def __init__(self, task, kill, rules, after):
        super().__init__(task.candidate, task.op, task.device)
        self.kill, self.rules, self.after, self.start = kill, rules, after, time.process_time()
        self.used, self.called, self.candidate.call = 0.0, self.candidate.call, self._call

    @property
    def spent(self):
        """Processor time, so that what a slow implementation is given does not depend on what else runs on the machine."""
        return self.used

    def _call(self, *args, **kwargs):
        start = time.process_time()
        try:
            return self.called(*args, **kwargs)
        finally:
            self.used += time.process_time() - start

    def attempt(self, function, problem, case, impl):
        kill, failure = self.kill, None
        self.rules.start()
        try:
            agreement = super().attempt(function, problem, case, impl)
        except Disagreement as error:
            if cell.status_of(error) == "error":
                kill.status, kill.case, kill.error = "error", repr(case), str(error)
                raise Enough from None
            agreement, failure = Agreement(), error
            self.rules.blame(error.kind)
        regime = getattr(case, "data", None) or "any"
        counts = kill.matrix.setdefault(regime, [0, 0])
        counts[0] += failure is not None
        counts[1] += 1
        kill.examples += 1
        kill.rules = self.rules.end(failure is not None)
        if failure is not None and kill.status == "survived":
            kill.status, kill.examples_to_kill, kill.regime = "killed", kill.examples, regime
            kill.case, kill.error = repr(case), str(failure)
        if kill.status == "killed" and time.process_time() - self.start > self.after:
            raise Enough
        return agreement


@contextlib.contextmanager
def watching(task, kill, after):
    """The trial of a task whose Kill is to be filled in."""
    rules = Rules()
    with rules.listening():
        yield Watching(task, kill, rules, after)
