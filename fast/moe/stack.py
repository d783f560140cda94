"""Stacks of expert weights, prepared for the kernels that multiply by them."""

import itertools
import weakref
from dataclasses import replace

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ref.format import check_input_format, parse_format
from ref.qtensor import TENSORS, QTensor, check_parts

from .. import choose
from ..registry import module_of
from ..request import Request

X_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rows that a block may have; plans are chosen for each.
BLOCK_SIZES = (16, 32, 64, 128)

# Every Stack that lives, by a number that a compiled graph can hold.
BY_NUMBER = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


class Stack:
    """The weights of all experts, (e, n, k), with their plans by kind of call and by block size. prepare_experts lets go of the QTensor."""

    def __init__(self, w):
        self.quantized = isinstance(w, QTensor)
        if self.quantized:
            check_parts(w, "grouped_linear")
        self.w = w
        self.format = w.format if self.quantized else None
        self.shape = tuple(w.shape)
        self.device = w.packed.device if self.quantized else w.device
        self.group_index = self.quantized and w.group_index is not None
        # The first bias that came, which kernels may build into the weights; calls with another, or after it was written to, are of another kind.
        self.bias, self.version = None, 0
        self.kinds = {}
        # What implementations made of w by (implementation, request, whether without a bias built in): plans, or sentences why not.
        self.made = {}
        self._take_number()

    def _take_number(self):
        self.number = next(_NUMBERS)
        BY_NUMBER[self.number] = self

    def __getstate__(self):
        # Tensors are copied without their counts: what is told is whether the bias was written to.
        return self.__dict__ | {"version": self.bias is None or self.owns(self.bias)}

    def __setstate__(self, state):
        # A copy, or what was read from a file, is another one.
        self.__dict__.update(state)
        self.version = -1 if not state["version"] else 0 if self.bias is None else _version(self.bias)
        self._take_number()

    def __repr__(self):
        return f"Stack({self.format or self.w.dtype}, shape={self.shape}, device={self.device})"

    def plan(self, operation, x_dtype, x_format, impl, deterministic, bias, x_scale, rows, weighed=False):
        """The plan for one kind of call and for `rows` rows of an expert, made at the first call of its kind. weighed: with topk_weights.

        Raises:
            TypeError, ValueError: an x_format that cannot be, or no such impl.
            NotImplementedError, ExceptionGroup: no implementation can do it.
        """
        if self.bias is None and bias is not None:
            self.bias, self.version = bias.detach(), _version(bias)
        own = self.owns(bias)
        kind = (x_dtype, x_format, impl, deterministic, bias is None, own, x_scale is None, block_size_for(rows), weighed)
        plan = self.kinds.get(kind)
        if plan is None:
            parsed = (x_dtype, None if x_format is None else parse_format(x_format), *kind[2:])
            if parsed not in self.kinds:
                self.check_input(operation, parsed[1], x_scale)
                self.kinds[parsed] = self._make(operation, parsed)
            plan = self.kinds[kind] = self.kinds[parsed]
        return plan

    def owns(self, bias):
        """Whether a bias is the one that kernels may have built into the weights."""
        return bias is not None and _same(bias, self.bias) and _version(bias) == self.version

    def request(self, kind):
        """The Request of a kind of call; x_format is a Format."""
        x_dtype, x_format, _, deterministic, no_bias, _, dynamic, _, weighed = kind
        return Request(
            self.format, self.shape, x_dtype, self.device, x_format, not dynamic, deterministic, not no_bias, self.group_index, weighed
        )  # fmt: skip

    def check_input(self, operation, x_format, x_scale):
        if x_format is None:
            if x_scale is not None:
                raise ValueError(f"{operation}: got x_scale without x_format")
            return
        check_input_format(x_format, x_scale, operation)
        if x_format.hadamard and self.shape[2] % x_format.hadamard:
            raise ValueError(
                f"{operation}: k={self.shape[2]} is no multiple of the rotation's block {x_format.hadamard} in x_format={x_format}"
            )

    def _make(self, operation, kind):
        request, own = self.request(kind), kind[5]
        if self.w is None:
            other = " with this bias" if request.bias else ""
            raise NotImplementedError(
                f"{operation}: {self!r} was prepared for other calls than {describe(request)}{other}: prepare it for this one, too"
            )
        # Whoever takes a router's weights has the same plan with and without.
        plain = replace(request, weighed=False)

        def make(implementation):
            module = module_of(implementation)
            reason = module.why_not(request)
            if reason is not None:
                raise NotImplementedError(reason)
            key = implementation, plain, not own
            return choose.once(self.made, key, lambda: module.prepare(self.w, plain, self.bias if own else None))

        return choose.plan("grouped", kind[2], request, kind[7], make, operation, describe(request))


def _same(a, b):
    """Whether two biases are the same numbers in the same memory."""
    return (a.data_ptr(), a.dtype, a.stride()) == (b.data_ptr(), b.dtype, b.stride())


def _version(t):
    """Counts how often a tensor was written to, where that is counted."""
    return 0 if t.is_inference() else t._version


def block_size_for(rows):
    """The least block that holds so many rows of an expert, or the largest there is."""
    return next((block for block in BLOCK_SIZES if rows <= block), BLOCK_SIZES[-1])


def describe(request):
    """One kind of call in words, for messages."""
    e, n, k = request.shape
    inputs = f"{request.x_format} ({request.x_dtype})" if request.x_format else str(request.x_dtype)
    return f"{inputs} x {e} experts {request.format or 'plain'} {n}x{k} on {request.device}".replace("torch.", "")


_STACKS = WeakIdKeyDictionary()


def remember(w):
    """The Stack of a QTensor or a plain tensor: the same one at every call, for as long as w lives."""
    if isinstance(w, Stack):
        return w
    stack = _STACKS.get(w)
    if stack is None:
        # Other objects around the same memory: a Stack must not keep alive the key that it is remembered under.
        held = QTensor(w.format, w.shape, *(getattr(w, name) for name in TENSORS)) if isinstance(w, QTensor) else w.detach()
        stack = _STACKS[w] = Stack(held)
    return stack


def prepare_experts(w, *, x_dtype=torch.bfloat16, x_format=None, static_scale=False, bias=False, impl=None, deterministic=True):
    """Put a stack of expert weights into its kernels' own layouts, once, and let go of the packed codes that no kernel reads.

    grouped_linear, masked_linear, indexed_linear and fused_experts do the same by themselves, and remember it, when handed a QTensor;
    then the QTensor stays in memory too. Kernels are compiled at the first call of their kind: make one before capturing a CUDA graph.

    Args:
        w: QTensor (e, n, k).
        bias: whether calls bring one; or the one (e, n) that they all bring, which must not be written to: Humming can build it in.
        The rest: as fast.prepare.

    Returns:
        Stack: what the grouped operations take in place of w, for calls of this kind.

    Raises:
        TypeError, ValueError: arguments that do not fit each other. NotImplementedError, ExceptionGroup: no implementation can do it.
    """
    if not isinstance(w, QTensor):
        raise TypeError(f"prepare_experts: w is {type(w).__name__}, expected a QTensor")
    if len(w.shape) != 3:
        raise ValueError(f"prepare_experts: weight {w.format} has shape {tuple(w.shape)}, expected (experts, n, k)")
    if x_dtype not in X_DTYPES:
        raise TypeError(f"prepare_experts: x_dtype is {x_dtype}, expected torch.float16, torch.bfloat16 or torch.float32")
    if isinstance(bias, torch.Tensor) and tuple(bias.shape) != tuple(w.shape[:2]):
        raise ValueError(f"prepare_experts: bias has shape {tuple(bias.shape)}, expected {tuple(w.shape[:2])}: (experts, n) of w")
    stack = Stack(w)
    given = torch.ones(1, device=stack.device)
    if bias is True:
        # None that a call brings is this one.
        bias, stack.bias = given, torch.empty(0, device=stack.device)
    for block in BLOCK_SIZES:
        stack.plan(
            "prepare_experts",
            x_dtype,
            x_format,
            impl,
            deterministic,
            None if bias is False else bias,
            given if static_scale else None,
            block,
        )
    stack.w = None
    return stack
