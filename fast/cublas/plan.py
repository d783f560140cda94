"""A prepared fp8 weight: x quantized, one product, and scales applied inside cuBLAS or by one kernel after it.

cuBLAS takes a scale for each row and column (slow on few rows) or one scale for all (fast everywhere). With the second, the product
leaves in float32 and the kernel below scales it, which costs 8 bytes of traffic for each output: nothing while there are few.
"""

import contextlib

import torch
import triton.language as tl
from torch.nn.functional import pad

from fast.scale import decoded_scale
from fast.triton.jit import Launcher, kernel, multiple_of_16
from fast.triton.quantize_input import InputQuantizer
from ref.element import NAMED

from . import FP8

# From this many outputs on, scales of rows and columns are left to cuBLAS. Measured on an H200, for n from 4096 to 28672.
SCALED_INSIDE = 2**21
# Weight scales beyond these could, times a scale of x, leave float32's normal range before they meet the sum.
LOWEST_SCALE, HIGHEST_SCALE = 2.0**-26, 2.0**8
COLUMNS = 1024


@kernel()
def scale_kernel(out, sums, x_scale, w_scale, bias, n, stride, BY_ROW: tl.constexpr, BIAS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[m, n] = sums[m, n] x_scale[m] w_scale[n] + bias[n], in float32, rounded once."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < n
    v = tl.load(sums + row * stride + column, mask=inside)
    v = v * tl.load(x_scale + (row if BY_ROW else 0)) * tl.load(w_scale + column, mask=inside)
    if BIAS:
        v += tl.load(bias + column, mask=inside).to(tl.float32)
    tl.store(out + row * n + column, v.to(out.dtype.element_ty), mask=inside)


class Plan:
    """codes (n, k) in fp8, both padded to multiples of 16 with zeros; w_scale (n,) float32, padded with zeros."""

    def __init__(self, q, request):
        self.n, self.k = q.shape
        self.device = q.packed.device
        rows, columns = (-(-size // 16) * 16 for size in q.shape)
        codes = q.packed.contiguous().view(torch.uint8)[:, : self.k]
        codes = pad(codes, (0, columns - self.k, 0, rows - self.n)).contiguous() if (rows, columns) != tuple(q.shape) else codes
        self.weight = codes.view(FP8[q.format.element]).T
        scale = decoded_scale(q.scale, q.format.scale).float()
        self.w_scale = pad(scale.reshape(-1).expand(self.n), (0, rows - self.n)).contiguous()
        self.tensor_scale = scale.reshape(()) if q.format.group == (0, 0) else None
        self.one = torch.ones((), device=self.device)
        self.quantizer = InputQuantizer(request.x_format, FP8[request.x_format.element])
        self.by_row = request.x_format.group == (1, 0)
        # cuBLAS rounds such a product once, and there is nothing to add or to cut off.
        size = scale.abs()
        usual = bool((((size >= LOWEST_SCALE) & (size <= HIGHEST_SCALE)) | (size == 0)).all())
        self.whole = rows == self.n and not request.bias and usual
        self.scales_rows = (
            self.whole and request.x_dtype == torch.bfloat16 and q.format.element == request.x_format.element == NAMED["e4m3"]
        )
        self.scaler = Launcher(scale_kernel)

    def run(self, x, bias, x_scale, out):
        """out[m, n] = x w^T + bias, rounded once."""
        with contextlib.nullcontext() if self.device.index == torch.cuda.current_device() else torch.cuda.device(self.device):
            codes, _, x_scale, _ = self.quantizer(x, x_scale)
            if codes.shape[1] != self.k:
                codes.view(torch.uint8)[:, self.k :] = 0
            m, whole = x.shape[0], self.whole and multiple_of_16(out)
            if whole and self.tensor_scale is not None and x_scale.numel() == 1:
                self._product(codes, x_scale.view(()), self.tensor_scale, out.dtype, out)
            elif whole and self.scales_rows and m * self.n >= SCALED_INSIDE:
                rows = x_scale.view(-1, 1) if self.by_row else x_scale.expand(m).contiguous().view(m, 1)
                self._product(codes, rows, self.w_scale.view(1, -1), out.dtype, out)
            else:
                sums = self._product(codes, self.one, self.one, torch.float32)
                kind = (multiple_of_16(out), x_scale.data_ptr() % 16, bias is not None and (bias.dtype, multiple_of_16(bias)))
                constants = {"BY_ROW": self.by_row, "BIAS": bias is not None, "COLUMNS": COLUMNS}
                args = (out, sums, x_scale, self.w_scale, sums if bias is None else bias, self.n, sums.stride(0))
                self.scaler(kind, (m, -(-self.n // COLUMNS), 1), args, constants, {"num_warps": 4})

    def _product(self, codes, x_scale, w_scale, dtype, out=None):
        # Without fast accumulation sums go to float32 every 128 columns; with it, all of k stays in 13 bits.
        return torch._scaled_mm(codes, self.weight, scale_a=x_scale, scale_b=w_scale, out_dtype=dtype, use_fast_accum=False, out=out)
