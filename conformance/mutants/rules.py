"""Three rules by which kernels are commonly accepted, asked of the results that the suite compares.

Each takes (got, y), the result and the exact answer in the result's dtype, float64, and says whether it accepts. Infinities and NaN of y are
held against their like beforehand, so that no rule refuses a right result for them.
"""

import contextlib
import sys

import torch

from .. import oracle


def allclose(got, y):
    return torch.allclose(got, y, rtol=0.01, atol=0.05)


def cosine(got, y):
    """1 - 2 <got, y> / (|got|^2 + |y|^2) < 1e-3."""
    size = (got * got + y * y).sum()
    return bool(size == 0) or bool(1 - 2 * (got * y).sum() / size < 1e-3)


def within_10_percent(got, y):
    """97 % of the elements are."""
    near = ((got - y).abs() <= 0.1 * y.abs()) | (got == y)
    return bool(near.double().mean() >= 0.97) if near.numel() else True


RULES = {"allclose": allclose, "cosine": cosine, "97 %": within_10_percent}
# Failures that any test sees whatever its tolerance, by the start of their kind.
OBVIOUS = ("raised", "result")


class Rules:
    """Counts, over examples, how many wrong results each rule refuses: of a result's numbers the first comparison counts, with what ref says.

    What a rule refuses though it is admissible (quantized activations may be off by a code) does not count.
    """

    def __init__(self):
        self.refused, self.compared = dict.fromkeys(RULES, 0), False
        self.seen, self.now = set(), set()

    def start(self):
        self.seen, self.now = set(), set()

    def blame(self, kind):
        """A failure of this kind came of the example."""
        if kind.startswith(OBVIOUS):
            self.now = set(RULES)

    def end(self, failed):
        """What has been counted, None where nothing was compared so far. failed: the example's result is wrong."""
        for name in self.now if failed else ():
            self.refused[name] += 1
        self.compared |= bool(self.seen)
        return dict(self.refused) if self.compared else None

    def ask(self, got, y, name):
        if name in self.seen or not got.is_floating_point():
            return
        self.seen.add(name)
        got, y = got.double(), y.to(got.dtype).double()
        finite = y.isfinite()
        if not torch.equal(torch.nan_to_num(got[~finite], 0.0), torch.nan_to_num(y[~finite], 0.0)) or not bool(
            got[finite].isfinite().all()
        ):
            self.now = set(RULES)
            return
        self.now |= {rule for rule, accepts in RULES.items() if not accepts(got[finite], y[finite])}

    @contextlib.contextmanager
    def listening(self):
        """Stand between the operations and oracle.compare."""
        compare = oracle.compare

        def heard(got, y, error, name="y", **rest):
            self.ask(got, y, name)
            return compare(got, y, error, name, **rest)

        places = [m for n, m in sys.modules.items() if n.startswith("conformance.") and getattr(m, "compare", None) is compare]
        for module in places:
            module.compare = heard
        try:
            yield
        finally:
            for module in places:
                module.compare = compare
