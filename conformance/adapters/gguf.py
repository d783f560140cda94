"""gguf's dequantizers (NumPy, float32): every block type that the package can decode.

A format may belong to several block types (TQ1_0 and TQ2_0); the first that can hold the weight is taken. FORMATS are those with plain
scales: scales in two levels, and codes on a grid, are not drawn by a suite that knows no blocks.

Source: gguf 0.19.0, gguf/quants.py.
"""

import torch

from ref.layouts import gguf as layout
from ref.quantize import dequantize as exact

from . import need, package, version_of, written

__version__ = version_of("gguf")

FORMATS = (
    *("int4_g32_fp16", "uint4_g32_fp16_ofp16", "int5_g32_fp16", "uint5_g32_fp16_ofp16", "int8_g32_fp16", "iq4nl_g32_fp16"),
    *("int2_g256_fp16", "mxfp4", "fp4_e2m1_g16_e4m3"),
)


def dequantize(q, dtype=torch.float64):
    gguf = package("gguf")
    need(dtype == torch.float32, "gguf dequantizes to float32")
    need(not q.packed.is_cuda, "gguf works on the CPU")
    name, data = block_of(q)
    try:
        w = torch.from_numpy(gguf.quants.dequantize(data.numpy(), getattr(gguf.GGMLQuantizationType, name)))
    except NotImplementedError:
        raise NotImplementedError(f"gguf has no dequantizer of {name}") from None
    # ggml's tables of fp4 are integers, where -0 is 0: its sign is not gguf's to keep.
    return torch.where(w == 0, w.copysign(exact(q, torch.float32)), w)


def block_of(q):
    """(the name of a block type that holds q, its bytes)."""
    reason = f"gguf has no block type for {q.format}"
    for name, block in layout.BLOCKS.items():
        if block.format == q.format:
            try:
                return name, written(layout, q, type=name)["weight"]
            except NotImplementedError as error:
                reason = str(error)
    raise NotImplementedError(reason)
