"""Models quantized in place, layer by layer."""

from torch import nn

from ..quantize import quantize
from .config import QuantConfig, read_config
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


def quantize_(model, config, x=None):
    """Put quantized layers in the place of a model's nn.Linear layers, one after the other; each frees its weight before the next begins.

    Other modules that CONVERTERS knows, as experts, likewise.

    Args:
        model: any nn.Module; lm_head and what the configuration leaves out stay as they are.
        config: what read_config takes for weights, or a QuantConfig. x: what it takes for activations.

    Returns:
        model.

    Raises:
        ValueError: a configuration that cannot be, or that no layer of the model follows; a layer whose scale would have to be known before
            (quant_mode "static_tensor"); a model that is itself a layer; the message names the layer.

    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> quantize_(model, {"dtype": "int4", "group_size": 32})[0]
    Linear(in_features=64, out_features=32, format=int4_g32, bias=True)
    """
    config = config if isinstance(config, QuantConfig) else read_config(config, x)
    if config.checkpoint is not None:
        raise ValueError(
            f"quantize_: the config is that of a checkpoint that is quantized already ({config.checkpoint[0]}); fast.load reads it"
        )
    if converter(model) is not None:
        raise ValueError(
            f"quantize_: the model is itself a {type(model).__name__}, and nothing can take its place in it; hand over the module that has it"
            " (torch.nn.Sequential(model) is one)"
        )
    made = {}
    for name, parent, attribute in list(_layers(model)):
        layer = getattr(parent, attribute)
        weight = next(layer.parameters())
        chosen = config.layer(name, weight.dtype)
        if chosen is None:
            continue
        if chosen.static:
            raise ValueError(
                f"quantize_: {name} would need the scale of its input, which {chosen.x_format} has in the model; give a dynamic quant_mode"
            )
        # A layer that is in several places stays one.
        if id(layer) not in made:
            try:
                made[id(layer)] = converter(layer)(layer, on_device(chosen, weight.device, weight.dtype))
            except (TypeError, ValueError, NotImplementedError) as error:
                raise type(error)(f"quantize_: {name}: {error}") from None
        setattr(parent, attribute, made[id(layer)])
    if not made:
        raise ValueError("quantize_: the configuration leaves every layer of this model as it is")
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
