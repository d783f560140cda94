"""Candidates that only look as if they computed: none of them may pass.

What cannot be told from a right kernel, because its results are those of one: a candidate that calls ref itself (UNSEEN says why), one that
computes when its result is first read, and one that reaches into the suite and changes the judge in its own process.
"""

import os
import time

import torch

from .. import wrong
from .engine import Cheat

UNSEEN = {
    "calls_ref": "its results are ref's: right, and slow. Only its speed, or a look at what it imports, gives it away",
    "lazy": "a tensor that computes when it is first read holds the right numbers whenever somebody looks",
    "patches_the_judge": "in the process that judges it, a candidate can do anything",
}


class Zeros(wrong.Right):
    def store(self, y, dtype):
        return torch.zeros(y.shape, dtype=dtype)


class FirstOfItsShape(wrong.Right):
    """Gives what it once computed for these shapes."""

    def __init__(self):
        self.kept = {}

    def linear(self, x, w, bias=None, *, x_format=None, x_scale=None, out=None):
        key = tuple(x.shape), tuple(w.shape), x.dtype
        if key not in self.kept:
            self.kept[key] = super().linear(x, w, bias, x_format=x_format, x_scale=x_scale)
        return self.give(self.kept[key].clone(), out)


class FirstAtItsAddress(FirstOfItsShape):
    """Gives what it once computed for tensors at these addresses."""

    def linear(self, x, w, bias=None, *, x_format=None, x_scale=None, out=None):
        key = x.data_ptr(), w.packed.data_ptr(), tuple(x.shape), tuple(w.shape), x.dtype
        if key not in self.kept:
            self.kept[key] = wrong.Right.linear(self, x, w, bias, x_format=x_format, x_scale=x_scale)
        return self.give(self.kept[key].clone(), out)


class FirstOfItsSum(FirstOfItsShape):
    """Gives what it once computed for an x with this sum."""

    def linear(self, x, w, bias=None, *, x_format=None, x_scale=None, out=None):
        key = float(x.float().sum()), tuple(x.shape), tuple(w.shape), x.dtype
        if key not in self.kept:
            self.kept[key] = wrong.Right.linear(self, x, w, bias, x_format=x_format, x_scale=x_scale)
        return self.give(self.kept[key].clone(), out)


class InputForScratch(wrong.Right):
    """Scales x in place, to save memory, and forgets to take it back."""

    def inputs(self, rows, x_format, x_scale):
        a = super().inputs(rows, x_format, x_scale)
        rows.mul_(0.5)
        return a


class InputForResult(wrong.Right):
    """Returns a view of x with the result in it, where that fits."""

    def give(self, y, out):
        return super().give(y, out)

    def linear(self, x, w, bias=None, *, x_format=None, x_scale=None, out=None):
        y = super().linear(x, w, bias, x_format=x_format, x_scale=x_scale, out=out)
        return y if w.shape[0] > w.shape[1] or out is not None else x[..., : w.shape[0]].copy_(y)


class OneBuffer(wrong.Right):
    """Returns the same memory at every call of a shape."""

    def __init__(self):
        self.kept = {}

    def give(self, y, out):
        if out is not None:
            return out.copy_(y)
        return self.kept.setdefault((tuple(y.shape), y.dtype), torch.empty_like(y)).copy_(y)


class Unwritten(wrong.Right):
    """Returns memory as it found it where the result is small."""

    def give(self, y, out):
        out = torch.empty_like(y) if out is None else out
        return torch.where(y.abs() > y.abs().amax() / 64, y, out, out=out) if y.numel() else out


class Wide(wrong.Right):
    def store(self, y, dtype):
        return y.float()


class NanWhereHard(wrong.Right):
    """Gives up where products cancel."""

    def product(self, a, b, x_format):
        y = a @ b.T
        return torch.where(y.abs() * 64 < a.abs() @ b.abs().T, torch.nan, y)


class PowersOfTwo(wrong.Right):
    """Takes scales for powers of two."""

    def weight(self, q):
        w = super().weight(q)
        mantissa, exponent = torch.frexp(w)
        return torch.ldexp(torch.round(mantissa * 256) / 256, exponent)


class EvenShapes(wrong.Right):
    """Leaves out the last column of an odd k."""

    def product(self, a, b, x_format):
        k = a.shape[1] // 2 * 2
        return a[:, :k] @ b[:, :k].T


class RightOnce(wrong.Right):
    """The first call of a weight is right, all others give nothing."""

    seen = None

    def linear(self, x, w, bias=None, *, x_format=None, x_scale=None, out=None):
        y = super().linear(x, w, bias, x_format=x_format, x_scale=x_scale)
        y = y if self.seen is not w else torch.zeros_like(y)
        self.seen = w
        return self.give(y, out)


class WrongNowAndThen(wrong.Right):
    """One call in seven is off by an ulp or so."""

    calls = 0

    def store(self, y, dtype):
        self.calls += 1
        return super().store(y * (1 + 2.0**-7) if self.calls % 7 == 0 else y, dtype)


class IgnoresOut(wrong.Right):
    def give(self, y, out):
        return y


class AddsToOut(wrong.Right):
    def give(self, y, out):
        return y if out is None else out.add_(y)


class Declines(wrong.Right):
    """Takes all formats, it says, and declines whatever is not small."""

    DECLARATIONS = {"linear": {"formats": ("*",)}}  # noqa: RUF012

    def linear(self, x, w, bias=None, *, x_format=None, x_scale=None, out=None):
        if w.shape[1] > 32:
            raise NotImplementedError("k is more than 32")
        return super().linear(x, w, bias, x_format=x_format, x_scale=x_scale, out=out)


class Sleeps(wrong.Right):
    def linear(self, x, w, bias=None, *, x_format=None, x_scale=None, out=None):
        time.sleep(3600)


class Exits(wrong.Right):
    def linear(self, x, w, bias=None, *, x_format=None, x_scale=None, out=None):
        os._exit(0)


class Reseeds(wrong.Right):
    """Leaves the generator of random numbers at a seed of its own."""

    def linear(self, x, w, bias=None, *, x_format=None, x_scale=None, out=None):
        torch.manual_seed(0)
        return super().linear(x, w, bias, x_format=x_format, x_scale=x_scale, out=out)


class OtherDefaults(wrong.Right):
    """Computes in float64 by changing the default dtype for everybody."""

    def linear(self, x, w, bias=None, *, x_format=None, x_scale=None, out=None):
        torch.set_default_dtype(torch.float64)
        return super().linear(x, w, bias, x_format=x_format, x_scale=x_scale, out=out)


zeros = Zeros()
first_of_its_shape = FirstOfItsShape()
first_at_its_address = FirstAtItsAddress()
first_of_its_sum = FirstOfItsSum()
input_for_scratch = InputForScratch()
input_for_result = InputForResult()
one_buffer = OneBuffer()
unwritten = Unwritten()
wide = Wide()
nan_where_hard = NanWhereHard()
powers_of_two = PowersOfTwo()
even_shapes = EvenShapes()
right_once = RightOnce()
wrong_now_and_then = WrongNowAndThen()
ignores_out = IgnoresOut()
adds_to_out = AddsToOut()
declines = Declines()
sleeps = Sleeps()
exits = Exits()
reseeds = Reseeds()
other_defaults = OtherDefaults()

_NAMES = [name for name, value in list(globals().items()) if isinstance(value, wrong.Right)]
CHEATS = tuple(
    Cheat(
        name,
        f"{__name__}:{name}",
        "linear",
        "int8",
        (type(globals()[name]).__doc__ or name.replace("_", " ")).strip(),
        20 if name == "sleeps" else None,
    )
    for name in _NAMES
)
