"""PyTorch's own products of quantized weights, on the CPU and on CUDA.

    integers of 4 bits    _weight_int4pack_mm, _weight_int4pack_mm_for_cpu: w = (code - 8) * scale + zero by group, both in x's dtype
    int8                  _weight_int8pack_mm: scales by row, in x's dtype
    fp8 x fp8             _scaled_mm, float32 scales by tensor or by row; PyTorch has no quantizer of x: ref's is used
    experts               _grouped_mm of weights that ref dequantizes to x's dtype; _scaled_grouped_mm of fp8, scales by row

Weights and x are padded with zeros to the sizes that a kernel takes. Its own output is returned, without the padding.

Source: PyTorch 2.11 and 2.13, aten/src/ATen/native: LinearAlgebra.cpp, cpu/int4mm_kernel.cpp, cpu/int8mm_kernel.cpp, cuda/int4mm.cu,
cuda/int8mm.cu, cuda/GroupMM.cu, GroupedMMUtils.h.
"""

import torch

from ref.activation import quantize_input
from ref.element import NAMED, Int
from ref.format import parse_format
from ref.layouts.bits import join_nibbles, sign_extended
from ref.quantize import dequantize

from . import aligned, codes_of, exactly, need, padded, plain

__version__ = torch.__version__

FORMATS = ("int4_g128_bf16", "int4_g32", "int4_g64_bf16_obf16", "uint4z_g128", "int8", "fp8", "fp8_e5m2", "fp8_e4m3_tensor")
VARIANTS = {"linear": ("exact", "weight_rounded"), "grouped_linear": ("exact", "weight_rounded")}

FLOAT8 = {NAMED["e4m3"]: torch.float8_e4m3fn, NAMED["e5m2"]: torch.float8_e5m2}
INT4_GROUPS = (32, 64, 128, 256)
BY_TENSOR, BY_ROW = (0, 0), (1, 0)
TILES = 2  # _convert_weight_to_int4pack's innerKTiles, of 16 columns each
AVX512_COLUMNS, ALIGNMENT = 16, 32


def linear(x, w, bias=None, *, x_format=None, x_scale=None):
    plain(w, "torch")
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if x_format is not None:
        y = _scaled(rows, w, bias, parse_format(x_format), x_scale)
    else:
        need(bias is None, "_weight_int4pack_mm and _weight_int8pack_mm take no bias")
        need(w.format.scale_2 is None, "_weight_int4pack_mm and _weight_int8pack_mm have no second scale")
        y = _int4(rows, w) if w.format.element in (Int(4), Int(4, False)) else _int8(rows, w)
    return y[:, : w.shape[0]].reshape(*x.shape[:-1], w.shape[0])


def _int4(x, w):
    (gn, gk), cuda, aten = w.format.group, x.is_cuda, torch.ops.aten
    gk = gk or w.shape[1]
    need(gn == 1 and gk in INT4_GROUPS, f"_weight_int4pack_mm has groups of {INT4_GROUPS} along k")
    need(not cuda or x.dtype == torch.bfloat16, "_weight_int4pack_mm on CUDA takes bfloat16")
    both = torch.stack([padded(t, rows=16) for t in _scale_and_zero(w, x.dtype)], -1).transpose(0, 1).contiguous()
    codes, x = padded(codes_of(w), rows=16, columns=gk), padded(x, columns=gk)
    if cuda:
        x = aligned(x)  # one that does not start at 4 bytes ends the process (README, findings)
        packed = aten._convert_weight_to_int4pack(join_nibbles(codes, high_first=True), TILES)
        return aten._weight_int4pack_mm(x, packed, gk, both)
    return aten._weight_int4pack_mm_for_cpu(x, aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1), gk, both)


def _scale_and_zero(w, dtype):
    """w = (code - 8) * scale + zero, as (value - zero of w) * scale + offset, where value is code - 8 or code: (n, groups) each."""
    need(w.scale.dtype.is_floating_point, f"_weight_int4pack_mm has scales in x's dtype, not {w.format.scale}")
    scale = w.scale.double()
    zero = torch.zeros_like(scale) if w.offset is None else w.offset.double()
    if not w.format.element.signed:
        zero = zero + (8 - (0 if w.zero is None else w.zero.double())) * scale
    return exactly(scale, dtype, "_weight_int4pack_mm's scales"), exactly(zero, dtype, "_weight_int4pack_mm's zeros")


def _int8(x, w):
    fmt = w.format
    need(fmt.element == Int(8) and fmt.group == BY_ROW and fmt.offset is None, f"torch has no product with {fmt}")
    need(w.scale.dtype.is_floating_point, f"_weight_int8pack_mm has scales in x's dtype, not {fmt.scale}")
    need(len(x) or not x.is_cuda, "_weight_int8pack_mm on CUDA launches an empty grid where there are no tokens, which is an error")
    scale = exactly(w.scale[:, 0], x.dtype, "_weight_int8pack_mm's scales").contiguous()
    # On a CPU other k, and an x that does not start at 32 bytes, end the process (README, findings).
    codes, x = padded(sign_extended(codes_of(w), 8), columns=AVX512_COLUMNS), padded(x, columns=AVX512_COLUMNS)
    return torch.ops.aten._weight_int8pack_mm(aligned(x, ALIGNMENT), codes, scale)


def _scaled(x, w, bias, x_format, x_scale):
    need(bias is None or bias.dtype == x.dtype != torch.float32, "_scaled_mm takes a bias in the dtype of a 16-bit result")
    a, a_scale = _float8(quantize_input(x, x_format, x_scale), "x")
    b, b_scale = _float8(w, "a weight")
    by_tensor = a_scale.numel() == b_scale.numel() == 1
    if x.is_cuda:
        need(x.dtype == torch.bfloat16 or by_tensor, "_scaled_mm by row on CUDA gives bfloat16")
        need(bias is None or by_tensor, "_scaled_mm by row on CUDA is asked for without a bias")
        e4m3 = torch.float8_e4m3fn
        need(e4m3 in (a.dtype, b.dtype) if by_tensor else a.dtype == b.dtype == e4m3, "_scaled_mm on CUDA has no such pair of fp8 dtypes")
    b_scale = padded(b_scale.expand(len(w.packed), 1), rows=16)
    scales = (a_scale.reshape(()), w.scale.reshape(())) if by_tensor else (a_scale.expand(len(a), 1).contiguous(), b_scale.contiguous().T)
    a, b = padded(a.view(torch.uint8), columns=16).view(a.dtype), padded(b.view(torch.uint8), rows=16, columns=16).view(b.dtype)
    bias = bias if bias is None else padded(bias[None], columns=16)[0]
    return torch._scaled_mm(a, b.T, *scales, bias=bias, out_dtype=x.dtype, use_fast_accum=False)


def _float8(q, what):
    """Codes as a float8 tensor, and float32 scales (..., 1, 1) or (..., rows, 1)."""
    fmt = q.format
    need(fmt.element in FLOAT8, f"_scaled_mm multiplies e4m3 and e5m2, and {what} is {fmt}")
    scales = fmt.scale == "fp32" and fmt.group in (BY_TENSOR, BY_ROW) and fmt.scale_2 is None and fmt.offset is None
    need(scales and not fmt.hadamard, f"_scaled_mm has float32 scales by tensor or by row, and {what} is {fmt}")
    return codes_of(q).view(FLOAT8[fmt.element]), q.scale


def grouped_linear(x, w, expert_first_token_offset, bias=None, *, x_format=None, x_scale=None):
    plain(w, "torch")
    need(bias is None, "_grouped_mm takes no bias")
    need(x.dtype == torch.bfloat16 or not x.is_cuda, "_grouped_mm on CUDA takes bfloat16")
    need(x_format is None or x.is_cuda, "_scaled_grouped_mm takes CUDA tensors")
    # On CUDA the stride of offsets is ignored (README, findings), and x has to begin at 16 bytes, as torch says.
    (n, _), offsets = w.shape[1:], expert_first_token_offset[1:].int().contiguous()
    if x_format is None:
        rows = padded(x, columns=16).contiguous()
        rows = aligned(rows) if x.is_cuda else rows
        y = torch._grouped_mm(rows, padded(dequantize(w, x.dtype), 16, 16).mT, offs=offsets)
    else:
        a, a_scale = _float8(quantize_input(x, x_format, x_scale), "x")
        b, b_scale = _float8(w, "a weight")
        need(a.dtype == b.dtype == torch.float8_e4m3fn, "_scaled_grouped_mm multiplies e4m3 by e4m3")
        a_scale, b_scale = a_scale.expand(len(a), 1)[:, 0].contiguous(), padded(b_scale.expand(-1, n, 1), rows=16)[..., 0].contiguous()
        a, b = (padded(t.view(torch.uint8), rows, 16).view(t.dtype) for t, rows in ((a, 1), (b, 16)))
        y = torch._scaled_grouped_mm(a, b.mT, a_scale, b_scale, offs=offsets, out_dtype=x.dtype)
    y = y[:, :n].contiguous()
    y[int(expert_first_token_offset[-1]) :] = 0  # torch leaves what is behind the last expert's rows as it was
    return y
