"""Triton kernels that run compiled on a GPU and, from the same source, in Triton's interpreter on the CPU.

Triton decides by an environment variable, when it is imported, between the two. Here the device of the tensors decides, at the call, so
that one process can do both.

What the interpreter gets wrong is kept out of the kernels: tensors of bfloat16 reach it as int16 (see `bits`), to be widened by a shift and
rounded by integer arithmetic, and products are taken in float32 (the constexpr INTERPRET).
"""

import threading

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

# The interpreter replaces functions of triton.language while a kernel runs.
_interpreting = threading.Lock()


class DeviceFunction(triton.JITFunction):
    """A function that kernels call: inlined by the compiler, called as Python by the interpreter."""

    def __call__(self, *args, **kwargs):
        if getattr(self, "_python", None) is None:
            self._python = InterpretedFunction(self.fn).rewrite()
        return self._python(*args, **kwargs)


class Kernel(triton.JITFunction):
    """A kernel: kernel[grid](...) compiles and launches, kernel.interpret(grid, ...) runs it on CPU tensors."""

    def interpret(self, grid, *args, **constants):
        """Run on the CPU; tensors of bfloat16 are passed as int16."""
        # The interpreter brings it along; nothing else needs it.
        import numpy

        if getattr(self, "_interpreted", None) is None:
            self._interpreted = InterpretedFunction(self.fn)
        # Infinity and NaN are numbers here as on a GPU.
        with _interpreting, numpy.errstate(all="ignore"):
            self._interpreted[grid](*(bits(a) if isinstance(a, torch.Tensor) else a for a in args), **constants)


def interprets(device):
    """Whether kernels run in the interpreter there."""
    return device.type == "cpu"


def bits(tensor):
    """The tensor, bfloat16 seen as int16."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def device_function(fn):
    return DeviceFunction(fn)


def kernel(do_not_specialize=()):
    return lambda fn: Kernel(fn, do_not_specialize=list(do_not_specialize))


def stream_of(device):
    """The current stream's handle, and no object around it."""
    return torch._C._cuda_getCurrentRawStream(device.index)


class Launcher:
    """Launches one kernel for one plan, by the compiled kernel in hand wherever the arguments are of a kind seen before.

    Triton compiles for what it sees: pointers and strides that 16 divides give wide loads. `kind` must therefore tell apart all that Triton
    does: everything in args that differs between calls, constexprs included, by dtype and by divisibility.
    """

    def __init__(self, function):
        self.function = function
        self.compiled = {}

    def __call__(self, kind, grid, args, constants, options):
        """Launch on the current stream of the first tensor's device; args and constants in the order of the kernel's signature."""
        first = args[0]
        if interprets(first.device):
            self.function.interpret(grid, *args, **constants)
            return
        if first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                self(kind, grid, args, constants, options)
            return
        held = self.compiled.get(kind)
        if held is None:
            self.compiled[kind] = self.function[grid](*args, **constants, enable_fp_fusion=True, **options), tuple(constants.values())
            return
        compiled, values = held
        compiled.run(*grid, stream_of(first.device), compiled.function, compiled.packed_metadata, None, None, None, *args, *values)


def multiple_of_16(tensor):
    return tensor.data_ptr() % 16 == 0


def stride_kind(stride):
    """What the compiler is told of a stride: whether 16 divides it, whether it is 1, and whether it fits in 32 bits."""
    return stride % 16 == 0, stride == 1, stride >> 31 == 0


class Counters:
    """Counters at zero for launches that may run at the same time, each of which leaves them at zero.

    Launches on one stream follow each other and share theirs. A launch that is captured into a CUDA graph, which may be replayed on any
    stream, has its own: out of a stock, and after that in the graph's memory, set to zero by a launch of their own.
    """

    STOCK = 32

    def __init__(self, device, count):
        # Rows of the stock start at 16 bytes, as the compiler is told.
        self.device, self.count = device, -(-count // 4) * 4
        # Held whole: rows that graphs have taken stay theirs.
        self.zeros = torch.zeros(self.STOCK, self.count, dtype=torch.int32, device=device)
        self.stock = list(self.zeros)
        self.of_stream = {}

    def current(self):
        """int32, at least `count`, for a launch on the current stream."""
        if torch.cuda.is_current_stream_capturing():
            return self.stock.pop() if self.stock else self._new()
        stream = stream_of(self.device)
        held = self.of_stream.get(stream)
        if held is None:
            held = self.of_stream[stream] = self._new()
        return held

    def _new(self):
        return torch.zeros(self.count, dtype=torch.int32, device=self.device)
