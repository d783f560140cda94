"""Mixture of experts: routing, alignment, permutation, grouped products, activations, the weighted sum, the whole layer."""

from .activation import moe_activation, silu_and_mul
from .align import batched_moe_align_block_size, moe_align_block_size
from .check import ACTIVATIONS, DENOMINATORS, SCORING
from .expert_map import estimate_local_valid_shape_m, expert_map, get_global_valid_shape_m
from .experts import fused_experts, fused_experts_variant
from .fused_mul_sum import moe_fused_mul_sum
from .grouped_linear import grouped_linear, indexed_linear, masked_linear
from .permute import moe_permute, moe_scatter_masked, moe_unpermute
from .topk import fused_topk, hash_topk

__all__ = [
    "ACTIVATIONS",
    "DENOMINATORS",
    "SCORING",
    "batched_moe_align_block_size",
    "estimate_local_valid_shape_m",
    "expert_map",
    "fused_experts",
    "fused_experts_variant",
    "fused_topk",
    "get_global_valid_shape_m",
    "grouped_linear",
    "hash_topk",
    "indexed_linear",
    "masked_linear",
    "moe_activation",
    "moe_align_block_size",
    "moe_fused_mul_sum",
    "moe_permute",
    "moe_scatter_masked",
    "moe_unpermute",
    "silu_and_mul",
]
