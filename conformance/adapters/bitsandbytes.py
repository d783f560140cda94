"""bitsandbytes on the CPU and on CUDA: NF4 and FP4 by blocks of the flattened weight, and LLM.int8.

    dequantize    functional.dequantize_4bit, functional.int8_vectorwise_dequant (float32)
    linear        matmul_4bit; without x's quantization LLM.int8 has no product; sums of k whole (whole_sums)

Source: bitsandbytes 0.50.2: functional.py, autograd/_functions.py, backends/.
"""

import torch

from ref.layouts import bitsandbytes as layout

from . import aligned, need, package, plain, version_of, whole_sums, written

__version__ = version_of("bitsandbytes")

FORMATS = ("nf4_g64", "nf4_g32", "nf4_g128", "nf4_b2x0")
VARIANTS = {"linear": ("exact", "weight_rounded")}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dequantize(q, dtype=torch.float64):
    functional = package("bitsandbytes.functional")
    need(dtype in DTYPES, "bitsandbytes dequantizes to float32, float16 or bfloat16")
    plain(q, "bitsandbytes")
    if q.format == layout.INT8:
        need(dtype == torch.float32, "bitsandbytes dequantizes int8 to float32")
        parts = written(layout, q)
        return functional.int8_vectorwise_dequant(parts["weight"], parts["SCB"])
    data, state = _four_bits(functional, q, dtype)
    return functional.dequantize_4bit(data, state)


def linear(x, w, bias=None, *, x_format=None, x_scale=None):
    functional = package("bitsandbytes.functional")
    need(x_format is None, "bitsandbytes quantizes x only together with the int8 weight's outliers")
    plain(w, "bitsandbytes")
    need(w.format != layout.INT8, "bitsandbytes multiplies int8 by x quantized to int8")
    need(bias is None or bias.dtype == x.dtype, "bitsandbytes takes a bias in x's dtype")
    data, state = _four_bits(functional, w, x.dtype)
    # torch.nn.functional.linear adds the bias to a rounded result where x has three axes and is not contiguous.
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    # On CUDA an x that does not start at 16 bytes ends the process, and a bias's stride is ignored (README, findings).
    if x.is_cuda:
        rows, bias = aligned(rows), None if bias is None else bias.contiguous()
    with whole_sums(x):
        return package("bitsandbytes").matmul_4bit(rows, data.t(), state, bias=bias).reshape(*x.shape[:-1], w.shape[0])


def _four_bits(functional, q, dtype):
    parts = written(layout, q, dtype=str(dtype).removeprefix("torch."))
    return parts["weight"], functional.QuantState.from_dict(_packed(parts), device=q.packed.device)


def _packed(parts):
    """What QuantState.from_dict takes: all parts but the weight, without the name of the parameter."""
    return {name.removeprefix("weight."): tensor for name, tensor in parts.items() if name != "weight"}
