"""Acceptance: the interval test, element by element."""

from dataclasses import dataclass

import torch

from ref.rounding import round_to

# An element tells little when more than this many ulps are admissible; a cell, when more than this part of its elements does.
# Fewer examples than this do not show what a cell's bounds are like.
WIDE_ULPS, WIDE_SHARE, WIDE_EXAMPLES = 16, 0.25, 50


class Disagreement(Exception):
    """What a candidate got wrong. kind: a short name, by which shrinking keeps to one defect."""

    def __init__(self, kind, text):
        super().__init__(text)
        self.kind = kind


@dataclass
class Agreement:
    """What was measured on an example that agrees.

    worst: the largest error as a fraction of the bound (0 where bit equality was asked for). elements: how many were compared
    under a bound; wide: how many of those had more than WIDE_ULPS admissible ulps. variant: the one that matched.
    """

    worst: float = 0.0
    elements: int = 0
    wide: int = 0
    variant: str = ""


def interval(y, error, dtype):
    """The admissible results: RN(y - error) and RN(y + error), each rounded once to dtype."""
    return round_to(y - error, dtype), round_to(y + error, dtype)


def compare(got, y, error, name="y"):
    """The interval test: RN(y - error) <= got <= RN(y + error) in every element, NaN exactly where y is NaN.

    Args:
        got: the candidate's result, on the CPU.
        y: the exact result, float64, same shape.
        error: float64 bound, broadcastable to y. Where it is zero, bits have to agree; zeros of either sign are equal, as sums
            of zeros have no order.

    Returns:
        Agreement.

    Raises:
        Disagreement: with the first wrong coordinate, what came and what was admissible.
    """
    error = torch.as_tensor(error, dtype=torch.float64).expand(y.shape)
    low, high = interval(y, error, got.dtype)
    fits = ((got >= low) & (got <= high)) | (got.isnan() & y.isnan())
    if not bool(fits.all()):
        at = tuple((~fits).nonzero()[0].tolist())
        wrong = int((~fits).sum())
        raise Disagreement(
            f"{name}: value",
            f"{name}{list(at)} = {number(got[at])}, admissible {span(low[at], high[at])}, exact {y[at].item():.9g}"
            f" ({wrong} of {got.numel()} elements are wrong)",
        )
    bounded = error > 0
    count = int(bounded.sum())
    if not count:
        return Agreement()
    return Agreement(_worst(got, y, error), count, int((_ulps(low, high, y) > WIDE_ULPS)[bounded].sum()))


def equal(got, want, name):
    """Bit equality of two tensors of one dtype and shape, on the CPU; NaN equals NaN, -0 is not 0.

    Raises:
        Disagreement: with the first wrong coordinate.
    """
    differs = bits(got) != bits(want)
    if got.is_floating_point():
        differs &= ~(got.isnan() & want.isnan())
    if bool(differs.any()):
        at = tuple(differs.nonzero()[0].tolist())
        raise Disagreement(
            f"{name}: bits",
            f"{name}{list(at)} = {number(got[at])}, admissible {number(want[at])} only ({int(differs.sum())} of {got.numel()} elements are wrong)",
        )


def within(got, low, high, name, shown=None):
    """low <= got <= high in every element, for codes and scales seen as float64 values.

    Args:
        shown: what to print for the candidate's element, instead of got.
    """
    wrong = ~((got >= low) & (got <= high))
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise Disagreement(
            f"{name}: value",
            f"{name}{list(at)} = {number(got[at] if shown is None else shown[at])}, admissible {span(low[at], high[at])}"
            f" ({int(wrong.sum())} of {got.numel()} elements are wrong)",
        )


def bits(t):
    """A tensor as integers of its own width."""
    if not t.is_floating_point():
        return t
    return t.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[t.element_size()])


def number(value):
    """A scalar tensor for messages, with digits enough to tell neighbours apart."""
    return f"{value.item():.9g}" if value.is_floating_point() else str(value.item())


def span(low, high):
    return f"{number(low)} only" if bool(low == high) else f"[{number(low)}, {number(high)}]"


def _worst(got, y, error):
    """The largest error that the results need, over the bound: the distance from y to the edge of got's rounding cell."""
    differs = (got != round_to(y, got.dtype)) & got.isfinite() & y.isfinite()
    if not bool(differs.any()):
        return 0.0
    got, y, error = got[differs], y[differs], error[differs]
    toward = torch.nextafter(got, torch.where(y > got.double(), torch.inf, -torch.inf).to(got.dtype))
    # Beyond the largest number lies infinity: its cell ends half an ulp further on.
    step = got.double() - torch.nextafter(got, torch.zeros_like(got)).double()
    edge = torch.where(toward.isinf(), got.double() + step / 2, (got.double() + toward.double()) / 2)
    return float(((edge - y).abs() / error).max())


def _ulps(low, high, y):
    """How many ulps the admissible interval spans; float32 results count in ulps of float16, whose 11 bits are what quantized
    weights deserve: a float32 sum of k terms is k ulps of its own wide whatever the kernel does."""
    digits = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 11, torch.float64: 53}[low.dtype]
    exponent = torch.frexp(y).exponent.clamp(min=-14 if low.dtype == torch.float16 else -126)
    return (high.double() - low.double()) / torch.ldexp(torch.ones_like(y), exponent - digits)
