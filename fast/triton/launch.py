"""Launches at little cost to the host, for kernels most of whose arguments never change."""

import torch

from .jit import stream_of


class Launch:
    """One kernel for one weight: called with x, bias and the output, it launches.

    Triton's own launch looks at every argument for what the compiler should know of it, and asks the driver about every pointer. Here the
    compiled kernel is kept for each kind of call, and addresses are passed as numbers. Launch hooks (of a profiler) are not called.
    """

    def __init__(self, kernel, weight, constants, warps):
        """
        Args:
            kernel: (y, x, bias, parts, tickets, m, stride_x, *weight, ALIGNED, *constants).
            weight: tensors, numbers and None.
            constants: dict of constexprs, in the order of the kernel's signature.
        """
        self.kernel, self.weight, self.constants, self.warps = kernel, weight, constants, warps
        self.addresses = tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in weight)
        self.compiled = {}

    def __call__(self, blocks, parts, workspace, out, x, bias, m):
        """Launch on the current device and stream.

        Args:
            blocks, parts: the grid. workspace: addresses, or two times None.
            out: (m, n) contiguous. x: (m, k), its columns adjacent. bias: (n,) contiguous, or None.
        """
        stride = x.stride(0) if m > 1 else 0
        y_at, x_at = out.data_ptr(), x.data_ptr()
        bias_at = bias_kind = None
        if bias is not None:
            bias_at = bias.data_ptr()
            bias_kind = bias.dtype, bias_at % 16 == 0
        # All that Triton would tell calls apart by.
        kind = y_at % 16 == 0, x_at % 16 == 0, stride % 8 == 0, stride >> 31 == 0, workspace[0] is None, bias_kind
        compiled = self.compiled.get(kind)
        if compiled is None:
            compiled = self.compiled[kind] = self._compile(out, x, bias, stride, workspace[0] is None)
        run, function, metadata, rest = compiled
        run(blocks, parts, 1, stream_of(x.device), function, metadata, None, None, None, y_at, x_at, bias_at, *workspace, m, stride, *rest)

    def _compile(self, out, x, bias, stride, alone):
        words = None if alone else torch.int32
        constants = {"ALIGNED": stride % 8 == 0} | self.constants
        args = (out, x, bias, words, words, 2, stride, *self.weight)
        compiled = self.kernel.warmup(*args, grid=(1,), num_warps=self.warps, enable_fp_fusion=True, **constants)
        return compiled.run, compiled.function, compiled.packed_metadata, (*self.addresses, *constants.values())

    def interpret(self, blocks, parts, out, x, bias, m):
        """The same in the interpreter, on CPU tensors."""
        stride = x.stride(0) if m > 1 else 0
        constants = {"ALIGNED": stride % 8 == 0} | self.constants
        workspace = (None, None)
        if parts > 1:
            size = parts * blocks * constants["BN"] * constants.get("BM", 8)
            workspace = torch.empty(size, dtype=torch.int32), torch.zeros(2 * blocks, dtype=torch.int32)
        self.kernel.interpret((blocks, parts), out, x, bias, *workspace, m, stride, *self.weight, **constants)
