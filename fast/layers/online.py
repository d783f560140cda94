"""Models quantized in place, layer by layer."""

import sys
from collections import Counter

from torch import nn

from ..quantize import quantize
from . import environment
from .fallback import on_device
from .linear import Linear


def linear_of(layer, chosen):
    """The Linear that takes an nn.Linear's place."""
    return Linear(quantize(layer.weight.detach(), chosen.weight), layer.bias, x_format=chosen.x_format)


def is_experts(module):
    """Whether a module is one of transformers' experts: these attributes are what use_experts_implementation gives to all of them."""
    return all(hasattr(module, name) for name in ("_apply_gate", "is_transposed", "is_concatenated", "has_gate", "has_bias"))


def experts_of(module, chosen):
    """What takes the place of transformers' experts; where there are any, transformers is loaded."""
    from ..hf.experts import convert

    return convert(module, chosen)


# Which modules are quantized, and what takes the place of one: functions of the module, and of the module and its LayerConfig. Who knows other
# modules, as experts, adds a pair.
CONVERTERS = [(lambda module: type(module) is nn.Linear, linear_of), (is_experts, experts_of)]


def converter(module):
    """The function of CONVERTERS that makes what takes this module's place, or None."""
    return next((convert for fits, convert in CONVERTERS if fits(module)), None)


def quantize_(model, config=None, x=None):
    """Put quantized layers in the place of a model's nn.Linear layers, one after the other; each frees its weight before the next begins.

    Other modules that CONVERTERS knows, as experts, likewise.

    Args:
        model: any nn.Module; lm_head, layers whose weight another module has too, as an embedding, and what the configuration leaves out stay
            as they are.
        config: what read_config takes for weights, or a QuantConfig. x: what it takes for activations.
            Without both, FAST_ONLINE_QUANT_CONFIG and FAST_INPUT_QUANT_CONFIG count.

    Returns:
        model.

    Raises:
        ValueError: a configuration that cannot be, or that no layer of the model follows; a layer whose scale would have to be known before
            (quant_mode "static_tensor"); a model that is itself a layer; the message names the layer.

    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> quantize_(model, {"dtype": "int4", "group_size": 32})[0]
    Linear(in_features=64, out_features=32, format=int4_g32, bias=True)
    """
    config = environment.given(config, x)
    config.check_online("quantize_")
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_: model is {type(model).__name__}, expected a torch.nn.Module")
    if converter(model) is not None:
        raise ValueError(
            f"quantize_: the model is itself a {type(model).__name__}, and nothing can take its place in it; hand over the module that has it"
            " (torch.nn.Sequential(model) is one)"
        )
    owners = Counter(id(tensor) for module in model.modules() for tensor in module._parameters.values())
    made = {}
    for name, parent, attribute in list(_layers(model)):
        layer = getattr(parent, attribute)
        weight = next(layer.parameters())
        if owners[id(weight)] > 1:
            continue
        try:
            chosen = config.online(name, weight.dtype)
            if chosen is None:
                continue
            if weight.is_meta:
                raise ValueError(
                    "its weight is on the meta device, where there are no numbers to quantize; Linear.empty makes a layer without any"
                )
            # A layer that is in several places stays one.
            if id(layer) not in made:
                made[id(layer)] = converter(layer)(layer, on_device(chosen, weight.device, weight.dtype))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise type(error)(f"quantize_: {name}: {error}") from None
        setattr(parent, attribute, made[id(layer)])
        if isinstance(parent, nn.TransformerEncoderLayer):
            # torch's fused path would read the weights by itself; it is not taken for other activations.
            parent.activation_relu_or_gelu = 0
    if not made:
        raise ValueError("quantize_: the configuration leaves every layer of this model as it is")
    if "transformers.modeling_utils" in sys.modules:
        from ..hf.quantizer import adopt

        adopt(model, config)
    return model


def _layers(model):
    """(name, parent, attribute) of every layer below the model that can be converted, in its order; not of what is inside of one."""
    inside = set()
    for name, parent in model.named_modules():
        # Not named_children, which has a child that is there twice only once.
        for attribute, child in () if parent in inside else parent._modules.items():
            if converter(child) is not None:
                inside.update(child.modules())
                yield f"{name}.{attribute}" if name else attribute, parent, attribute
