"""What a candidate says of its functions, and is then held to."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from .accumulators import Block

Accumulator = Block | str | tuple  # as accumulators.parse_accumulator gives it


@dataclass(frozen=True)
class Declaration:
    """What a candidate declares of one function, or of one function and impl; None: not declared.

    variants: names of those that it keeps to. accumulator: how it sums. deterministic: the same call gives the same bits.
    batch_invariant: a row's result does not depend on the other rows. formats: names, or patterns with *, of what it takes; to
    refuse those is a failure. Where x is quantized the name is that of the weight, a space, and that of x.

    >>> Declaration(formats=("int4_*", "fp8 fp8_*")).promises("fp8", "fp8_e4m3_token")
    True
    >>> Declaration(formats=("int4_*", "fp8 fp8_*")).promises("int4_g128", "int8_token")
    False
    """

    variants: tuple | None = None
    accumulator: Accumulator | None = None
    deterministic: bool = True
    batch_invariant: bool = False
    formats: tuple | None = None

    def promises(self, *names):
        """Whether the formats of these names are declared."""
        return any(_match(pattern.split(), names) for pattern in self.formats or ())


def _match(patterns, names):
    return len(patterns) == len(names) and all(map(fnmatchcase, names, patterns))
