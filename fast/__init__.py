"""ref's functions at speed. linear is a drop-in for torch.nn.functional.linear.

>>> import torch, ref, fast
>>> q = ref.quantize(torch.randn(64, 128), "int4_g128")
>>> fast.linear(torch.randn(3, 128), q).shape
torch.Size([3, 64])
"""

import importlib

from .dispatch import Prepared, prepare
from .eager import dequantize
from .explain import explain
from .hadamard import hadamard
from .linear import linear, why_not
from .moe import (
    Stack,
    batched_moe_align_block_size,
    estimate_local_valid_shape_m,
    expert_map,
    fused_experts,
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
    prepare_experts,
    silu_and_mul,
)
from .quantize import quantize
from .quantize_input import quantize_input
from .registry import IMPLEMENTATIONS as _IMPLEMENTATIONS
from .registry import Implementation, register, unregister

# What impl= of linear may be, by name: the suite tries each.
IMPLEMENTATIONS = _IMPLEMENTATIONS["linear"]

# What is promised beyond ref's definition: the suite holds these functions to it.
VARIANTS = {
    "fused_topk": ("best first",),
    "moe_align_block_size": ("stable",),
    "moe_permute": ("stable",),
    "moe_scatter_masked": ("stable",),
    "moe_activation": ("exact",),
}

# How linear adds up what is quantized on both sides, as the suite's probes see it on an H200: an fp8 unit keeps 13 bits in chunks of 128 along k.
FP8_UNIT = {"length": 32, "kept": 13, "bits": 13, "promote": 128, "order": "ascending"}
DECLARATIONS = {
    ("linear", "torch"): {"accumulator": {"float": "ieee"}},
    ("linear", "triton"): {
        "accumulator": {
            **dict.fromkeys(("cuda *_g16* float", "cuda nvfp4 float", "cuda int8* float"), "mma_16"),
            "cuda float": FP8_UNIT,
            "cpu float": "ieee",
        }
    },
    ("linear", "humming"): {"accumulator": {"cuda float": FP8_UNIT}},
    ("linear", "cublas"): {"accumulator": {"cuda float": FP8_UNIT}},
}
# What can be captured in a CUDA graph, after a call of its kind.
GRAPHS = (
    *("linear", "quantize_input", "grouped_linear", "masked_linear", "indexed_linear", "fused_experts", "fused_topk", "hash_topk"),
    *("moe_align_block_size", "batched_moe_align_block_size", "moe_permute", "moe_unpermute", "moe_scatter_masked"),
    *("moe_activation", "moe_fused_mul_sum"),
)

__all__ = [
    "DECLARATIONS",
    "GRAPHS",
    "IMPLEMENTATIONS",
    "VARIANTS",
    "ExpertsLoader",
    "FusedExperts",
    "Implementation",
    "Linear",
    "LinearLoader",
    "Prepared",
    "Stack",
    "batched_moe_align_block_size",
    "dequantize",
    "estimate_local_valid_shape_m",
    "expert_map",
    "explain",
    "fused_experts",
    "fused_topk",
    "get_global_valid_shape_m",
    "grouped_linear",
    "hadamard",
    "hash_topk",
    "indexed_linear",
    "linear",
    "load",
    "masked_linear",
    "moe_activation",
    "moe_align_block_size",
    "moe_fused_mul_sum",
    "moe_permute",
    "moe_scatter_masked",
    "moe_unpermute",
    "prepare",
    "prepare_experts",
    "quantize",
    "quantize_",
    "quantize_input",
    "read_config",
    "register",
    "silu_and_mul",
    "unregister",
    "why_not",
]

# Layers, and with them the readers of configurations, are loaded when they are first asked for.
_LAYERS = {
    "ExpertsLoader": "layers.loader",
    "FusedExperts": "layers.experts",
    "Linear": "layers.linear",
    "LinearLoader": "layers.loader",
    "load": "hf.load",
    "quantize_": "layers.online",
    "read_config": "layers.config",
}


def __getattr__(name):
    if name not in _LAYERS:
        raise AttributeError(f"module 'fast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fast.{_LAYERS[name]}"), name)
