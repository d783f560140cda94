"""What every quantization format and every operation on it means: pure functions, exact, one rounding written out.

>>> import torch, ref
>>> q = ref.quantize(torch.randn(64, 128), "int4_g128")
>>> ref.linear(torch.randn(3, 128), q).shape
torch.Size([3, 64])
"""

from .activation import quantize_input
from .combine import fuse, stack, take_columns, take_rows
from .element import Codebook, Float, Int, decode, encode, parse_element
from .format import FORMATS, Format, parse_format
from .hadamard import hadamard
from .linear import VARIANTS, linear, linear_variant
from .moe import (
    ACTIVATIONS,
    batched_moe_align_block_size,
    estimate_local_valid_shape_m,
    expert_map,
    fused_experts,
    fused_experts_variant,
    fused_topk,
    get_global_valid_shape_m,
    grouped_linear,
    hash_topk,
    indexed_linear,
    masked_linear,
    moe_activation,
    moe_align_block_size,
    moe_fused_mul_sum,
    moe_permute,
    moe_scatter_masked,
    moe_unpermute,
    silu_and_mul,
)
from .pack import pack, unpack
from .qtensor import QTensor, equal, validate
from .quantize import dequantize, quantize
from .rule import RULES

__all__ = [
    "ACTIVATIONS",
    "FORMATS",
    "RULES",
    "VARIANTS",
    "Codebook",
    "Float",
    "Format",
    "Int",
    "QTensor",
    "batched_moe_align_block_size",
    "decode",
    "dequantize",
    "encode",
    "equal",
    "estimate_local_valid_shape_m",
    "expert_map",
    "fuse",
    "fused_experts",
    "fused_experts_variant",
    "fused_topk",
    "get_global_valid_shape_m",
    "grouped_linear",
    "hadamard",
    "hash_topk",
    "indexed_linear",
    "linear",
    "linear_variant",
    "masked_linear",
    "moe_activation",
    "moe_align_block_size",
    "moe_fused_mul_sum",
    "moe_permute",
    "moe_scatter_masked",
    "moe_unpermute",
    "pack",
    "parse_element",
    "parse_format",
    "quantize",
    "quantize_input",
    "silu_and_mul",
    "stack",
    "take_columns",
    "take_rows",
    "unpack",
    "validate",
]
