"""transformers' own dequantizers: GPT-OSS' MXFP4, fine-grained FP8, GGUF blocks, and the affine integers of MLX.

    mxfp4          integrations.mxfp4.convert_moe_packed_tensors
    fp8            integrations.finegrained_fp8.Fp8Dequantize, which sees only the shape of the scales
    GGUF blocks    integrations.gguf.dequant.dequantize
    uint, offset   integrations.metal_quantization._affine_dequantize_tensor

Source: transformers 5.23.0.
"""

import torch

from ref.layouts import fp8, mxfp4

from . import need, package, plain, version_of, written
from .gguf import block_of

__version__ = version_of("transformers")

FORMATS = (
    *("mxfp4", *fp8.FORMATS[:-1], "int4_g32_fp16", "uint4_g32_fp16_ofp16", "int8_g32_fp16"),
    *("uint4_g64_bf16_obf16", "uint8_g64_bf16_obf16", "uint2_g32_bf16_obf16"),
)


def dequantize(q, dtype=torch.float64):
    need(dtype != torch.float64, "transformers dequantizes to float32, float16 or bfloat16")
    plain(q, "transformers")
    fmt = q.format
    if str(fmt) == "mxfp4":
        return _mxfp4(q, dtype)
    if fmt.element in fp8.ELEMENTS.values():
        return _fp8(q, dtype)
    if fmt.offset == fmt.scale == "bf16":
        return _affine(q, dtype)
    return _gguf(q, dtype)


def _mxfp4(q, dtype):
    convert = package("transformers.integrations.mxfp4").convert_moe_packed_tensors
    parts = written(mxfp4, q)
    blocks, scales = (t if len(q.shape) == 3 else t[None] for t in (parts["blocks"], parts["scales"]))
    w = convert(blocks, scales, dtype=dtype)  # (e, k, n)
    return w.mT.reshape(q.shape).contiguous()


def _fp8(q, dtype):
    dequantizer = package("transformers.integrations.finegrained_fp8").Fp8Dequantize(None)
    parts = written(fp8, q, quant_method="fp8", scale_name="weight_scale_inv")
    return dequantizer._dequantize_one(parts["weight"], parts["weight_scale_inv"], dtype)


def _gguf(q, dtype):
    dequant = package("transformers.integrations.gguf.dequant")
    name, data = block_of(q)
    types = {name: number for number, name in dequant.GGML_NAME.items()}
    need(name in types, f"transformers has no dequantizer of {name}")
    return dequant.dequantize(data.contiguous().flatten(), types[name], dtype).reshape(q.shape)


def _affine(q, dtype):
    affine = package("transformers.integrations.metal_quantization")._affine_dequantize_tensor
    bits, k, (gn, group) = q.format.element.bits, q.shape[-1], q.format.group
    whole = len(q.shape) == 2 and gn == 1 and group in (32, 64, 128) and k % group == 0
    need(whole and bits in (2, 4, 8) and not q.format.element.signed, "MLX has unsigned integers of 2, 4 and 8 bits in groups, (n, k)")
    w = affine(q.packed.view(torch.uint32), q.scale, q.offset, group, bits)
    need(w.dtype == dtype, f"transformers dequantizes MLX weights to {w.dtype}")
    return w
