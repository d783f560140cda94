"""Models quantized in place, layer by layer."""

from torch import nn

from ..quantize import quantize
from .config import QuantConfig, read_config
from .linear import Linear


def quantize_(model, config, x=None):
    """Put quantized layers in the place of a model's nn.Linear layers, one after the other; each frees its weight before the next begins.

    Args:
        model: any nn.Module; lm_head and what the configuration leaves out stay as they are.
        config: what read_config takes for weights, or a QuantConfig. x: what it takes for activations.

    Returns:
        model.

    Raises:
        ValueError: a configuration that cannot be, or that no layer of the model follows; a layer whose scale would have to be known before
            (quant_mode "static_tensor"); the message names the layer.

    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> quantize_(model, {"dtype": "int4", "group_size": 32})[0]
    Linear(in_features=64, out_features=32, format=int4_g32, bias=True)
    """
    config = config if isinstance(config, QuantConfig) else read_config(config, x)
    count = 0
    for name, parent, attribute in list(_linears(model)):
        layer = getattr(parent, attribute)
        chosen = config.layer(name, layer.weight.dtype)
        if chosen is None:
            continue
        if chosen.static:
            raise ValueError(
                f"quantize_: {name} would need the scale of its input, which {chosen.x_format} has in the model; give a dynamic quant_mode"
            )
        try:
            q = quantize(layer.weight.detach(), chosen.weight)
        except ValueError as error:
            raise ValueError(f"quantize_: {name}: {error}") from None
        setattr(parent, attribute, Linear(q, layer.bias, x_format=chosen.x_format))
        count += 1
    if not count:
        raise ValueError("quantize_: the configuration leaves every layer of this model as it is")
    return model


def _linears(model):
    """(name, parent, attribute) of every nn.Linear below the model, in its order."""
    for name, parent in model.named_modules():
        for attribute, child in parent.named_children():
            if type(child) is nn.Linear:
                yield f"{name}.{attribute}" if name else attribute, parent, attribute
