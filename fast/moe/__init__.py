"""Mixture of experts at speed: the names and signatures of ref.moe, with impl."""

from .activation import moe_activation, silu_and_mul
from .align import batched_moe_align_block_size, moe_align_block_size
from .expert_map import estimate_local_valid_shape_m, expert_map, get_global_valid_shape_m
from .fused_mul_sum import moe_fused_mul_sum
from .permute import moe_permute, moe_scatter_masked, moe_unpermute
from .topk import fused_topk, hash_topk

__all__ = [
    "batched_moe_align_block_size",
    "estimate_local_valid_shape_m",
    "expert_map",
    "fused_topk",
    "get_global_valid_shape_m",
    "hash_topk",
    "moe_activation",
    "moe_align_block_size",
    "moe_fused_mul_sum",
    "moe_permute",
    "moe_scatter_masked",
    "moe_unpermute",
    "silu_and_mul",
]
