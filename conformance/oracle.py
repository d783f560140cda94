"""Acceptance: the interval test, element by element."""

from dataclasses import dataclass, field

import torch

from ref.rounding import round_to

# An element tells little when more than this many ulps are admissible; a cell, when on average more than this part of an example's elements does.
# Fewer examples than this do not show what a cell's bounds are like.
WIDE_ULPS, WIDE_SHARE, WIDE_EXAMPLES = 16, 0.25, 50
# Bins of an Agreement.
WIDTHS, ERRORS = 16, 10


class Disagreement(Exception):
    """What a candidate got wrong. kind: a short name, by which shrinking keeps to one defect. hint: None, or what gives a guess at the cause,
    asked for when the message is read."""

    def __init__(self, kind, text, hint=None):
        super().__init__(text)
        self.kind, self.hint = kind, hint

    def __str__(self):
        guess = self.hint and self.hint()
        return f"{self.args[0]}; {guess}" if guess else self.args[0]


@dataclass
class Agreement:
    """What was measured on an example that agrees.

    worst: the largest error as a fraction of the bound (0 where bit equality was asked for). elements: how many were compared
    under a bound; of these, wide: how many had more than WIDE_ULPS admissible ulps; widths: how many by floor(log2(1 + admissible ulps)),
    the last for all beyond; errors: how many by tenths of the bound; matches: how many equal y rounded once; signed: how many were rounded
    away from zero, and how many toward it, where the bound leaves a choice (rounded_away). variant: the one that matched.
    """

    worst: float = 0.0
    elements: int = 0
    wide: int = 0
    variant: str = ""
    widths: list = field(default_factory=lambda: [0] * WIDTHS)
    errors: list = field(default_factory=lambda: [0] * ERRORS)
    matches: int = 0
    signed: tuple = (0, 0)


def interval(y, error, dtype):
    """The admissible results: RN(y - error) and RN(y + error), each rounded once to dtype."""
    return round_to(y - error, dtype), round_to(y + error, dtype)


def admitted(got, y, error):
    """bool: where a result is admissible."""
    low, high = interval(y, error, got.dtype)
    return ((got >= low) & (got <= high)) | (got.isnan() & y.isnan())


def compare(got, y, error, name="y", fair=True):
    """The interval test: RN(y - error) <= got <= RN(y + error) in every element, NaN exactly where y is NaN.

    Args:
        got: the candidate's result, on the CPU.
        y: the exact result, float64, same shape.
        error: float64 bound, broadcastable to y. Where it is zero, bits have to agree; zeros of either sign are equal, as sums
            of zeros have no order.
        fair: the rows, bool (m,), or whether any, that the rounding-bias test counts: not those whose error comes from a choice made
            once for many elements.

    Returns:
        Agreement.

    Raises:
        Disagreement: with the first wrong coordinate, what came and what was admissible.
    """
    error = torch.as_tensor(error, dtype=torch.float64).expand(y.shape)
    low, high = interval(y, error, got.dtype)
    fits = admitted(got, y, error)
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
    fair = torch.as_tensor(fair, device=y.device)
    fair = fair.reshape(-1, *[1] * (y.dim() - 1)).expand(y.shape)[bounded] if y.dim() else fair.reshape(1)
    got, y, error, low, high = (t[bounded] for t in (got, y, error, low, high))
    top = torch.finfo(low.dtype).max
    ulps, needed = _ulps(low.clamp(-top, top), high.clamp(-top, top), y).nan_to_num(0.0, 0.0, 0.0), _needed(got, y, error)
    return Agreement(
        worst=float(needed.max()),
        elements=count,
        wide=int((ulps > WIDE_ULPS).sum()),
        widths=torch.bincount((1 + ulps).log2().long().clamp(0, WIDTHS - 1), minlength=WIDTHS).tolist(),
        errors=torch.bincount((needed * ERRORS).long().clamp(0, ERRORS - 1), minlength=ERRORS).tolist(),
        matches=int((needed == 0).sum()),
        signed=rounded_away(*(t[fair] for t in (got, y, error, low, high))),
    )


def rounded_away(got, y, error, low, high):
    """The rounding-bias test's count: (away from zero, toward zero), of the elements where the bound leaves a choice and y decides.

    Counted are elements that admit just two neighbours, low and high, with y between error / 2 and error away from the midpoint of these
    two. A kernel that rounds its sum to nearest, and whose sum is off by at most half of the bound, takes the neighbour that y is nearer
    to, whatever bias its sums have (adders that truncate have one), and y is as often on the one side of a midpoint as on the other: so
    away and toward are a fair coin, and |away - toward| / sqrt(away + toward) is beyond 8 with a probability of 1e-15. Results that are
    truncated, or sums that are always off in one direction by most of the bound, come down on one side only. Elements whose y is nearer
    to the midpoint tell about the sum's bias, those further off are decided, by interval(), for every kernel. Elements with one |y| are
    counted once, since they are one throw of the coin.
    """
    usable = y.isfinite() & low.isfinite() & high.isfinite() & (low != high) & (low.signbit() == high.signbit())
    usable &= torch.nextafter(low, high) == high
    if not bool(usable.any()):
        return 0, 0
    got, y, error, low, high = (t[usable] for t in (got, y, error, low, high))
    off = (y - (low.double() + high.double()) / 2).abs()
    counted = (off >= error / 2) & (off <= error)
    away = got[counted].double().abs() > torch.minimum(low.double().abs(), high.double().abs())[counted]
    size, order = y[counted].abs().sort()
    first = torch.ones_like(away)
    first[1:] = size[1:] != size[:-1]
    up = int((away[order] & first).sum())
    return up, int(first.sum()) - up


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


def _needed(got, y, error):
    """The error that each result needs, over the bound: the distance from y to the edge of got's rounding cell; 0 where got is y rounded."""
    differs = (got != round_to(y, got.dtype)) & got.isfinite() & y.isfinite()
    toward = torch.nextafter(got, torch.where(y > got.double(), torch.inf, -torch.inf).to(got.dtype))
    # Beyond the largest number lies infinity: its cell ends half an ulp further on.
    step = got.double() - torch.nextafter(got, torch.zeros_like(got)).double()
    edge = torch.where(toward.isinf(), got.double() + step / 2, (got.double() + toward.double()) / 2)
    return torch.where(differs, (edge - y).abs() / error, 0.0)


def _ulps(low, high, y):
    """How many ulps the admissible interval spans; float32 results count in ulps of float16, whose 11 bits are what quantized
    weights deserve: a float32 sum of k terms is k ulps of its own wide whatever the kernel does."""
    digits = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 11, torch.float64: 53}[low.dtype]
    exponent = torch.frexp(y).exponent.clamp(min=-14 if low.dtype == torch.float16 else -126)
    return (high.double() - low.double()) / torch.ldexp(torch.ones_like(y), exponent - digits)
