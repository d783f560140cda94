"""Weights of the linear layer, prepared for the kernels that multiply by them."""

import itertools
import weakref

import torch

from ref.format import check_input_format, parse_format
from ref.qtensor import TENSORS, QTensor, check_parts

from . import choose, rearrange
from .registry import module_of
from .request import Request

X_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Plans are chosen anew for m in (2^(i-1), 2^i]; beyond 2^15 the last choice serves.
BUCKETS = 17

# Every Prepared that lives, by a number that a compiled graph can hold.
PREPARED_BY_NUMBER = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


class Prepared:
    """A weight with what its kernels need: plans by kind of call and by bucket of m.

    Plans are made at the first call of their kind, from the QTensor. prepare makes them all at once and lets go of it.
    """

    def __init__(self, q):
        self.q = q
        self.format = q.format
        self.shape = tuple(q.shape)
        self.n, self.k = self.shape
        self.device = q.packed.device
        self.group_index = q.group_index is not None
        self.kinds = {}
        # What implementations made of q by (implementation, request): plans, or sentences why not.
        self.made = {}
        self._take_number()

    def _take_number(self):
        self.number = next(_NUMBERS)
        PREPARED_BY_NUMBER[self.number] = self

    def __setstate__(self, state):
        # A copy, or what was read from a file, is another one.
        self.__dict__.update(state)
        self._take_number()

    def __repr__(self):
        return f"Prepared({self.format}, shape={self.shape}, device={self.device})"

    def open(self, kind, x_scale=None):
        """The plans of one kind of call, a list by bucket of m, empty at first; checks what every call of the kind has in common.

        Raises:
            TypeError, ValueError: parts of the weight that disagree, or an x_format that cannot be.
        """
        if kind not in self.kinds:
            parsed = (kind[0], None if kind[1] is None else parse_format(kind[1]), *kind[2:])
            if parsed not in self.kinds:
                if self.q is not None:
                    check_parts(self.q, "linear")
                self._check_input(parsed[1], x_scale)
                self.kinds[parsed] = [None] * BUCKETS
            self.kinds[kind] = self.kinds[parsed]
        return self.kinds[kind]

    def _check_input(self, x_format, x_scale):
        if x_format is None:
            if x_scale is not None:
                raise ValueError("linear: got x_scale without x_format")
            return
        check_input_format(x_format, x_scale, "linear")
        if x_format.hadamard and self.k % x_format.hadamard:
            raise ValueError(f"linear: k={self.k} is no multiple of the rotation's block {x_format.hadamard} in x_format={x_format}")

    def plan(self, kind, bucket):
        """The plan for one kind of call and bucket, made if need be."""
        plans = self.open(kind)
        if plans[bucket] is None:
            plans[bucket] = self._make(kind, bucket)
        return plans[bucket]

    def _make(self, kind, bucket):
        if self.q is None:
            call = f"{describe(self.request(kind))} with m up to {2**bucket}"
            raise NotImplementedError(f"linear: {self!r} was prepared for other calls than {call}: prepare the QTensor for this one, too")
        request = self.request(kind)

        def make(implementation):
            reason = refusal(implementation, request)
            if reason is not None:
                raise NotImplementedError(reason)
            return choose.once(self.made, (implementation, request), lambda: _prepare(implementation, self.q, request))

        return choose.plan("linear", kind[2], request, 2**bucket, make, "linear", describe(request))

    def request(self, kind):
        x_dtype, x_format, _, deterministic, no_bias, dynamic = kind
        x_format = None if x_format is None else parse_format(x_format)
        return Request(self.format, self.shape, x_dtype, self.device, x_format, not dynamic, deterministic, not no_bias, self.group_index)


def refusal(implementation, request):
    """Why an Implementation cannot do what is requested, as a sentence; None if it can. The weight's data may still refuse."""
    module = module_of(implementation)
    if implementation.as_is or not rearrange.needed(request):
        return module.why_not(request)
    return rearrange.why_not(request) or module.why_not(rearrange.plain(request))


def _prepare(implementation, q, request):
    module = module_of(implementation)
    as_is = implementation.as_is or not rearrange.needed(request)
    return module.prepare(q, request) if as_is else rearrange.prepare(module, q, request)


def describe(request):
    """One kind of call in words, for messages."""
    inputs = f"{request.x_format} ({request.x_dtype})" if request.x_format else str(request.x_dtype)
    return f"{inputs} x {request.format} {request.shape[0]}x{request.shape[1]} on {request.device}".replace("torch.", "")


def call_kind(x, bias, x_format, x_scale, impl, deterministic):
    """What tells one kind of call from another, as a key."""
    return x.dtype, x_format, impl, deterministic, bias is None, x_scale is None


# Kernels that differ above this many rows compile at their first call.
WARM_UP_ROWS = 4096


def _warm_up(plan, prepared, kind, m):
    """Run a plan once where that makes it compile."""
    if prepared.device.type == "cuda" and prepared.n and prepared.k:
        x = torch.zeros(m, prepared.k, dtype=kind[0], device=prepared.device)
        x_scale = None if kind[5] else torch.ones(1, device=prepared.device)
        for bias in [None] if kind[4] else [x.new_ones(prepared.n), x.new_ones(prepared.n, dtype=torch.float32)]:
            plan.run(x, bias, x_scale, x.new_empty(m, prepared.n))


_PREPARED = weakref.WeakKeyDictionary()


def remember(w):
    """The Prepared of a QTensor: the same one at every call, for as long as the QTensor lives."""
    if isinstance(w, Prepared):
        return w
    prepared = _PREPARED.get(w)
    if prepared is None:
        prepared = _PREPARED[w] = Prepared(_detached(w))
    return prepared


def _detached(q):
    """The same tensors in another QTensor, so that a Prepared does not keep alive the key that it is remembered under."""
    return QTensor(q.format, q.shape, *(getattr(q, name) for name in TENSORS))


def bucket_of(m):
    """The bucket of m rows: 0 for 0 and 1, else the i with 2^(i-1) < m <= 2^i."""
    return min((m - 1).bit_length(), BUCKETS - 1) if m > 1 else 0


def prepare(w, *, x_dtype=torch.bfloat16, x_format=None, static_scale=False, bias=False, impl=None, deterministic=True, m=None):
    """Put a weight into its kernels' own layouts, once, and let go of the packed codes that no kernel reads.

    fast.linear does the same by itself, and remembers it, when handed a QTensor; then the QTensor stays in memory too. Do
    this before capturing a CUDA graph: it may compile and synchronise. linear after it does neither, for up to 4096 rows, x and
    out aligned to 16 bytes and a bias in x_dtype or float32; for anything else, call linear once before.

    Args:
        w: QTensor (n, k). It may be dropped afterwards.
        x_dtype, x_format, impl, deterministic: as linear will be called with.
        static_scale: linear will be given x_scale. bias: linear will be given a bias.
        m: how many rows x will have, an int or several; None prepares for any number.

    Returns:
        Prepared: what linear takes in place of w, for calls of this kind.

    Raises:
        NotImplementedError, ExceptionGroup: as linear.
    """
    if not isinstance(w, QTensor):
        raise TypeError(f"prepare: w is {type(w).__name__}, expected a QTensor")
    if len(w.shape) != 2:
        raise ValueError(f"prepare: weight {w.format} has shape {tuple(w.shape)}, expected (n, k)")
    prepared = Prepared(w)
    if x_dtype not in X_DTYPES:
        raise TypeError(f"prepare: x_dtype is {x_dtype}, expected torch.float16, torch.bfloat16 or torch.float32")
    kind = (x_dtype, x_format, impl, deterministic, not bias, not static_scale)
    prepared.open(kind, torch.ones(1, device=prepared.device) if static_scale else None)
    numbers = m if m is None or isinstance(m, (list, tuple, range)) else [m]
    if numbers is not None and (not numbers or not all(isinstance(rows, int) and rows >= 0 for rows in numbers)):
        raise ValueError(f"prepare: m is {m!r}, expected one or several numbers of rows, or None for any")
    buckets = range(BUCKETS) if numbers is None else sorted({bucket_of(rows) for rows in numbers})
    for bucket in buckets:
        _warm_up(prepared.plan(kind, bucket), prepared, kind, min(2**bucket, WARM_UP_ROWS))
    prepared.q = None
    return prepared
