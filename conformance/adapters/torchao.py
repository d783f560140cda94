"""torchao's tensor subclasses, made as torchao's own loader makes them from a checkpoint, on the CPU and on CUDA.

    dequantize    the subclass's dequantize (to_dtype of MXTensor and NVFP4Tensor)
    linear        torch.nn.functional.linear(x, subclass), weights only; sums of k whole (whole_sums)

Source: torchao 0.18.0: prototype/safetensors, quantization/quantize_/workflows, prototype/mx_formats.
"""

import importlib.util

import torch

from ref.layouts import torchao as layout

from . import need, package, plain, version_of, whole_sums, written

__version__ = version_of("torchao")

FORMATS = (*layout.FORMATS, "int4_g128_bf16", "int8_bf16")
VARIANTS = {"linear": ("exact", "weight_rounded")}
LAYER = "layer"
ADDS_LATER = ("Int8Tensor", "Float8Tensor")


def dequantize(q, dtype=torch.float64):
    need(dtype in (torch.float32, torch.float16, torch.bfloat16), "torchao dequantizes to float32, float16 or bfloat16")
    w = _tensor(q, dtype)
    need(type(w).dequantize is not torch.Tensor.dequantize, f"torchao has no dequantize of {type(w).__name__}")
    return w.dequantize() if w.dtype == dtype else w.dequantize(dtype)


def linear(x, w, bias=None, *, x_format=None, x_scale=None):
    need(x_format is None, "torchao quantizes x by rules of its own")
    need(bias is None or bias.dtype == x.dtype, "torchao takes a bias in x's dtype")
    weight, rows = _tensor(w, x.dtype), x.reshape(-1, x.shape[-1])
    kind = type(weight).__name__
    need(kind != "MXTensor", "torchao multiplies MXTensor by quantized x only")
    need(kind != "Int4Tensor" or importlib.util.find_spec("mslk"), "torchao multiplies Int4Tensor by kernels of mslk: pip install mslk")
    need(bias is None or kind not in ADDS_LATER, f"torchao adds the bias of {kind} to the rounded result")
    with whole_sums(x):
        return torch.nn.functional.linear(rows, weight, bias).reshape(*x.shape[:-1], w.shape[0])


def _tensor(q, dtype):
    loader = package("torchao.prototype.safetensors.safetensors_support", "torchao").unflatten_tensor_state_dict
    plain(q, "torchao")
    parts = {f"{LAYER}._weight_{name.removeprefix(layout.PREFIX)}": tensor for name, tensor in written(layout, q).items()}
    metadata = layout.metadata_of({LAYER: q}, dtype=str(dtype).removeprefix("torch."))
    return loader(parts, metadata)[0][f"{LAYER}.weight"]
