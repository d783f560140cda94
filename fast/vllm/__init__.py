"""vLLM's quantization method "quantref": its linear layers and experts on fast. vLLM finds register by itself (vllm.general_plugins).

FAST_ONLINE_QUANT_CONFIG='{"dtype": "int4", "group_size": 128}' vllm serve MODEL --quantization quantref    # a 16-bit checkpoint
vllm serve MODEL --quantization quantref    # a checkpoint whose quant_method is "humming", as `python -m fast quantize` writes it

Checkpoints of other layouts stay with vLLM's own methods. Written against vLLM 0.33; importing this package does not import vLLM.
"""

import functools
import importlib
from types import SimpleNamespace

from ..layers import environment
from .config import NAME, quantization_config
from .experts import experts_method
from .linear import linear_method

LAYERS = "vllm.model_executor.layers"


def register():
    """Make vLLM know the method. What is done once may be done again, as vLLM does in each of its processes.

    Raises:
        ImportError: there is no vLLM, or it lacks something that 0.33 has; the message says what.
    """
    enlist = _find(f"{LAYERS}.quantization", "register_quantization_config")
    enlist(NAME)(quantization_config(_find(f"{LAYERS}.quantization.base_config", "QuantizationConfig"), layers))
    # vLLM keeps compiled graphs on disk by what it knows of their making, and weights are numbered in them.
    _find("vllm.envs", "environment_variables")["FAST_QUANT_CONFIG"] = lambda: repr(environment.quant_config())


@functools.cache
def layers():
    """vLLM's kinds of layers, and the methods for them; imported with the first layer, since register runs before vLLM has a device."""
    linear = {name: _find(f"{LAYERS}.linear", name) for name in ("LinearBase", "LinearMethodBase", "UnquantizedLinearMethod")}
    experts = {name: _find(f"{LAYERS}.fused_moe", name) for name in ("RoutedExperts", "FusedMoEMethodBase")}
    experts["UnquantizedFusedMoEMethod"] = _find(f"{LAYERS}.fused_moe.unquantized_fused_moe_method", "UnquantizedFusedMoEMethod")
    return SimpleNamespace(
        **linear,
        **experts,
        linear_method=linear_method(linear["LinearMethodBase"], linear["UnquantizedLinearMethod"]),
        experts_method=experts_method(experts["FusedMoEMethodBase"]),
    )


def _find(module, name):
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"fast.vllm: needs the package vllm, and {module}.{name} in it, as vLLM 0.33 has it: {error}. Where this plugin is not wanted,"
            " VLLM_PLUGINS lists the names of those that vLLM loads",
            name="vllm",
        ) from error
