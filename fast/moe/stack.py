"""Stacks of expert weights, prepared for the kernels that multiply by them."""

import importlib
import itertools
import weakref

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ref.format import check_input_format, parse_format
from ref.qtensor import TENSORS, QTensor, check_parts

from .. import dispatch
from ..request import Request

# Each has why_not(request) and prepare(w, request, bias) -> a plan as fast.moe.blocks.ByBlocks describes it. request.shape is (e, n, k), and
# request.format is None where w is a plain tensor; bias: what every call of the plan brings, or None. Imported when they are first asked for.
IMPLEMENTATIONS = {"torch": "fast.moe.grouped_eager", "triton": "fast.triton.grouped", "humming": "fast.humming.grouped"}
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
        self.kinds, self.made = {}, {}
        self.number = next(_NUMBERS)
        BY_NUMBER[self.number] = self

    def __repr__(self):
        return f"Stack({self.format or self.w.dtype}, shape={self.shape}, device={self.device})"

    def plan(self, operation, x_dtype, x_format, impl, deterministic, bias, x_scale, rows, weighed=False):
        """The plan for one kind of call and for `rows` rows of an expert, made at the first call of its kind. weighed: with topk_weights.

        Raises:
            TypeError, ValueError: an x_format that cannot be, or no such impl.
            NotImplementedError, ExceptionGroup: no implementation can do it.
        """
        block = block_size_for(rows)
        if self.bias is None and bias is not None:
            self.bias, self.version = bias.detach(), _version(bias)
        own = bias is not None and _same(bias, self.bias) and _version(bias) == self.version
        kind = (x_dtype, x_format, impl, deterministic, bias is None, own, x_scale is None, block, weighed)
        plan = self.kinds.get(kind)
        if plan is None:
            parsed = None if x_format is None else parse_format(x_format)
            self._check_input(operation, parsed, x_scale)
            request = Request(
                self.format,
                self.shape,
                x_dtype,
                self.device,
                parsed,
                x_scale is not None,
                deterministic,
                bias is not None,
                self.group_index,
            )
            plan = self.kinds[kind] = self._make(operation, request, impl, weighed, self.bias if own else None)
        return plan

    def _check_input(self, operation, x_format, x_scale):
        if x_format is None:
            if x_scale is not None:
                raise ValueError(f"{operation}: got x_scale without x_format")
            return
        check_input_format(x_format, x_scale, operation)
        if x_format.hadamard and self.shape[2] % x_format.hadamard:
            raise ValueError(
                f"{operation}: k={self.shape[2]} is no multiple of the rotation's block {x_format.hadamard} in x_format={x_format}"
            )

    def _make(self, operation, request, impl, weighed, bias):
        if self.w is None:
            other = " with this bias" if request.bias else ""
            raise NotImplementedError(
                f"{operation}: {self!r} was prepared for other calls than {describe(request)}{other}: prepare it for this one, too"
            )
        reasons = []
        # Humming has no place for a router's weights.
        order = [name for name in preference(request) if not (weighed and name == "humming")]
        for name in [impl] if impl is not None else order:
            reason = refusal(operation, name, request)
            if reason is None:
                try:
                    made = name, request, bias is None
                    if made not in self.made:
                        self.made[made] = implementation(operation, name).prepare(self.w, request, bias)
                    return self.made[made]
                except NotImplementedError as error:
                    reason = str(error)
            reasons.append(NotImplementedError(f"{operation}: impl {name!r} cannot run {describe(request)}: {reason}"))
        if len(reasons) == 1:
            raise reasons[0]
        raise ExceptionGroup(f"{operation}: no implementation can run {describe(request)}", reasons)


def _same(a, b):
    """Whether two biases are the same numbers in the same memory."""
    return (a.data_ptr(), a.dtype, a.stride()) == (b.data_ptr(), b.dtype, b.stride())


def _version(t):
    """Counts how often a tensor was written to, where that is counted."""
    return 0 if t.is_inference() else t._version


def preference(request):
    """Names of implementations, fastest first, as measured on one H200 (conformance.bench_moe): where Humming takes a format, it has the better tiles."""
    return ["humming", "triton", "torch"] if request.device.type == "cuda" else ["torch"]


def block_size_for(rows):
    """The least block that holds so many rows of an expert, or the largest there is."""
    return next((block for block in BLOCK_SIZES if rows <= block), BLOCK_SIZES[-1])


def implementation(operation, name):
    """The module of an implementation.

    Raises:
        ValueError: there is none of this name. NotImplementedError: there is, but not of this operation.
    """
    if name not in IMPLEMENTATIONS:
        legal = f"expected one of {', '.join(IMPLEMENTATIONS)}"
        if name in dispatch.IMPLEMENTATIONS:
            raise NotImplementedError(f"{operation}: there is no impl {name!r} of it; {legal}")
        raise ValueError(f"{operation}: unknown impl {name!r}, {legal}")
    return importlib.import_module(IMPLEMENTATIONS[name])


def refusal(operation, name, request):
    """Why an implementation cannot do what is requested, as a sentence; None if it can. The weights' data may still refuse."""
    return implementation(operation, name).why_not(request)


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
        NotImplementedError, ExceptionGroup: no implementation can do it.
    """
    if not isinstance(w, QTensor) or len(w.shape) != 3:
        raise ValueError(f"prepare_experts: w is {w!r}, expected a QTensor (experts, n, k)")
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
    stack.made.clear()
    return stack
