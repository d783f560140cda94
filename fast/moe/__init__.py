"""Mixture of experts at speed: the names and signatures of ref.moe, with impl."""

from .activation import moe_activation, silu_and_mul
from .align import batched_moe_align_block_size, moe_align_block_size
from .compiled import compilable
from .expert_map import estimate_local_valid_shape_m, expert_map, get_global_valid_shape_m
from .experts import fused_experts
from .fused_mul_sum import moe_fused_mul_sum
from .grouped_linear import grouped_linear, indexed_linear, masked_linear
from .permute import moe_permute, moe_scatter_masked, moe_unpermute
from .stack import Stack, prepare_experts
from .topk import fused_topk, hash_topk

fused_topk, hash_topk = compilable(fused_topk), compilable(hash_topk)
moe_align_block_size, batched_moe_align_block_size = compilable(moe_align_block_size), compilable(batched_moe_align_block_size)
moe_permute, moe_unpermute, moe_scatter_masked = compilable(moe_permute), compilable(moe_unpermute), compilable(moe_scatter_masked)
moe_activation, silu_and_mul, moe_fused_mul_sum = compilable(moe_activation), compilable(silu_and_mul), compilable(moe_fused_mul_sum)
grouped_linear, masked_linear, indexed_linear = compilable(grouped_linear), compilable(masked_linear), compilable(indexed_linear)
fused_experts = compilable(fused_experts)

__all__ = [
    "Stack",
    "batched_moe_align_block_size",
    "estimate_local_valid_shape_m",
    "expert_map",
    "fused_experts",
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
    "prepare_experts",
    "silu_and_mul",
]
