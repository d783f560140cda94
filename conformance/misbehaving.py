"""Candidates that do what no kernel should, each in one way; what the suite's own tests hold it to.

python -m conformance --candidate conformance.misbehaving:segfaults --ops linear
"""

import ctypes
import os
import pathlib
import signal
import sys
import tempfile
import time

import torch

import ref


class Candidate:
    """A right linear, but for what behave(x, w) does; behave may return a result, or None for the right one."""

    def __init__(self, behave, declarations=None):
        self.behave = behave
        if declarations is not None:
            self.DECLARATIONS = declarations

    def linear(self, x, w, bias=None, *, x_format=None, x_scale=None):
        y = self.behave(x, w)
        return ref.linear(x, w, bias, x_format=x_format, x_scale=x_scale) if y is None else y


class Two(Candidate):
    """Two implementations, of which the first misbehaves, and a pack that is right."""

    IMPLEMENTATIONS = ("bad", "good")
    pack = staticmethod(ref.pack)

    def linear(self, x, w, bias=None, *, impl, x_format=None, x_scale=None):
        if impl == "bad":
            self.behave(x, w)
        return ref.linear(x, w, bias, x_format=x_format, x_scale=x_scale)


class Base(BaseException):
    """No Exception."""


class Mute(Exception):
    """Cannot be printed."""

    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


class MuteRefusal(Mute, NotImplementedError):
    """A refusal that cannot be printed."""


class Unpicklable(Exception):
    """Cannot be sent to another process."""

    def __reduce__(self):
        raise TypeError("stays here")


def wide(x, w):
    """More than three rows."""
    return w.shape[0] > 3


def throw(error):
    raise error


def spin():
    while True:
        pass


def twice(x, w):
    """Return in both processes."""
    if os.fork() and wide(x, w):
        os.wait()


def leave_a_child(x, w):
    """A process of its own, that never returns."""
    if os.fork() == 0:
        time.sleep(5)
        os._exit(0)


def set_then_throw():
    torch.set_default_dtype(torch.float64)
    raise KeyError("k")


# End the process.
exits = Candidate(lambda x, w: sys.exit(3))
leaves = Candidate(lambda x, w: os._exit(7))
segfaults = Candidate(lambda x, w: ctypes.string_at(0))
segfaults_when_wide = Candidate(lambda x, w: ctypes.string_at(0) if wide(x, w) else None)
kills_itself = Candidate(lambda x, w: os.kill(os.getpid(), signal.SIGKILL))
one_segfaults = Two(lambda x, w: ctypes.string_at(0) if wide(x, w) else None)
# Never return.
sleeps = Candidate(lambda x, w: time.sleep(1e6) if wide(x, w) else None)
spins = Candidate(lambda x, w: spin())
# Raise.
raises_base = Candidate(lambda x, w: throw(Base("base")))
raises_mute = Candidate(lambda x, w: throw(Mute()))
raises_unpicklable = Candidate(lambda x, w: throw(Unpicklable("u")))
raises_interrupt = Candidate(lambda x, w: throw(KeyboardInterrupt()))
raises_group = Candidate(lambda x, w: throw(ExceptionGroup("all failed", [Mute(), Mute()])))
raises_stop = Candidate(lambda x, w: throw(StopIteration(3)))
refuses_mute = Candidate(lambda x, w: throw(MuteRefusal()))
refuses_declared = Candidate(
    lambda x, w: throw(NotImplementedError("linear: at most 3 rows")) if wide(x, w) else None, {"linear": {"formats": ("int8",)}}
)
# Return what is no result.
returns_list = Candidate(lambda x, w: [[0.0]])
returns_meta = Candidate(lambda x, w: torch.empty(*x.shape[:-1], w.shape[0], dtype=x.dtype, device="meta"))
# Where this file is, a process has crashed before.
CRASHED = pathlib.Path(tempfile.gettempdir(), f"quantref-crashed-{os.getuid()}")


def _segfault_once(x, w):
    if not CRASHED.exists():
        CRASHED.touch()
        ctypes.string_at(0)


class RefusesAgain(Candidate):
    """Declines every call that it has answered before."""

    def __init__(self):
        super().__init__(self.decline)
        self.last = None

    def decline(self, x, w):
        if self.last is w:
            raise NotImplementedError("once only")
        self.last = w


segfaults_once = Candidate(_segfault_once)
refuses_again = RefusesAgain()
returns_sparse = Candidate(lambda x, w: torch.zeros(*x.shape[:-1], w.shape[0], dtype=x.dtype).to_sparse())
returns_class = Candidate(lambda x, w: torch.Tensor)
# Do something to the process.
prints = Candidate(lambda x, w: print("noise", flush=True) or (os.write(1, b"noise\n") and None))
forks = Candidate(twice)
forks_a_child = Candidate(leave_a_child)
sets_dtype = Candidate(lambda x, w: torch.set_default_dtype(torch.float64))
sets_threads = Candidate(lambda x, w: torch.set_num_threads(torch.get_num_threads() + 1))
sets_device = Candidate(lambda x, w: torch.set_default_device("meta"))
sets_grad = Candidate(lambda x, w: torch.set_grad_enabled(False) and None)
sets_and_raises = Candidate(lambda x, w: set_then_throw())
closes_files = Candidate(lambda x, w: os.closerange(3, 100))
# Are called wrongly.
takes_nothing = type("Nothing", (), {"linear": staticmethod(lambda: None)})
no_function = type("NoFunction", (), {"linear": 3})


class Undecided(Candidate):
    """Right within rounding, but every call adds the products of float32 in another order."""

    def linear(self, x, w, bias=None, *, x_format=None, x_scale=None):
        self.calls = getattr(self, "calls", 0) + 1
        if x_format is not None or x.dtype != torch.float32 or not x.isfinite().all():
            raise NotImplementedError("linear: finite float32 only")
        order = torch.arange(x.shape[-1]).roll(self.calls)
        y = torch.zeros(*x.shape[:-1], w.shape[0])
        weight = ref.dequantize(w)
        for k in order.tolist():
            y += x[..., k, None] * weight[:, k]
        return y if bias is None else (y.double() + bias.double()).float()


undecided = Undecided(None)
undecided_and_says_so = Undecided(None, {"linear": {"deterministic": False}})
