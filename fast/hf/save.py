"""Quantized models of transformers as checkpoints in Humming's layout."""

import re
from collections import Counter

from torch import nn

from ref.element import Int
from ref.layouts import humming
from ref.layouts.checkpoint import located

from ..layers.input_config import MODES, input_format
from ..layers.linear import Linear
from .experts import Experts
from .names import Names


def saved(model):
    """What a quantized model's checkpoint holds.

    Returns:
        ({name: tensor}, quantization_config): names as transformers has them before it reverts its renamings.

    Raises:
        ValueError: a layer that Humming has no schema for; the message names it. RuntimeError: one that was prepared, likewise.
    """
    names, state, configs = Names(model), dict(model.state_dict()), {}
    for name, module in model.named_modules():
        if not isinstance(module, (Linear, Experts)):
            continue
        state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.")}
        weights, others = _parts(name, module)
        state |= others
        for key, q in weights.items():
            for layer, part in names.write(key, q).items():
                with located("fast.hf", layer):
                    tensors, configs[layer] = _written(part, module)
                state |= {f"{layer}.{suffix}": tensor for suffix, tensor in tensors.items()}
    if not configs:
        raise ValueError("fast.hf: no layer of this model is quantized")
    plain = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    stored = names.stored([*configs, *plain])
    return state, document({stored[layer]: config for layer, config in configs.items()}, [stored[name] for name in plain])


def _parts(name, module):
    """{parameter: QTensor} of a quantized layer, and {name: tensor} of what else it has, under transformers' names."""
    if isinstance(module, Linear):
        return {f"{name}.weight": module.weight}, {} if module.bias is None else {f"{name}.bias": module.bias}
    pairs = zip(module.names, (module.w13, module.w2), (module.bias13, module.bias2), strict=True)
    weights, biases = {}, {}
    for weight, part, bias in pairs:
        weights[f"{name}.{weight}"] = part.weight
        if bias is not None:
            biases[f"{name}.{weight}_bias"] = bias
    return weights, biases


def _written(q, module):
    """A weight's tensors in Humming's layout, and the keys of its quantization config."""
    tensors, x_scale = humming.write(q), getattr(module, "x_scale", None)
    if x_scale is not None:
        tensors["input_scale_2" if module.x_format.scale_2 else "input_scale"] = x_scale.clone()
    return tensors, humming.config_of(q) | input_keys(module.x_format, x_scale is not None)


def input_keys(x_format, static):
    """The keys of a quantization config that say what layers' inputs are quantized to: the inverse of input_format.

    Raises:
        ValueError: a format that they have no words for.
    """
    if x_format is None:
        return {"input_quant_mode": "none"}
    element, grouped = x_format.element, x_format.group[1] > 0
    mode = next((mode for mode, said in MODES.items() if mode != "none" and said == (grouped, x_format.scale_2, static)), None)
    keys = {
        "a_dtype": f"int{element.bits}" if isinstance(element, Int) else f"float{element.bits}e{element.exponent}m{element.mantissa}",
        "input_scale_group_size": x_format.group[1],
        "input_scale_dtype": humming.STORED[x_format.scale][1],
        "input_quant_mode": mode,
    }
    if mode is None or input_format(keys) != (x_format, static):
        raise ValueError(f"inputs in {x_format} have no name in Humming's config")
    return keys


def document(configs, plain):
    """A quantization config for layers that are quantized each in its own way.

    The commonest way is the config; the others are patterns in `dynamic`, of all layers that differ in their numbers only if these are alike.

    Args:
        configs: {layer: its keys}. plain: names of layers that are not quantized.
    """
    kinds = {}  # pattern: the layers that it matches
    for layer in configs:
        kinds.setdefault(_pattern(layer), []).append(layer)
    alike = {pattern: all(configs[layer] == configs[layers[0]] for layer in layers) for pattern, layers in kinds.items()}
    counted = Counter(tuple(sorted(config.items())) for config in configs.values())
    common = dict(counted.most_common(1)[0][0])
    said = {}
    for layer, config in configs.items():
        if config != common:
            pattern = _pattern(layer)
            override = {key: value for key, value in config.items() if common.get(key) != value}
            said["+:" + (pattern if alike[pattern] else re.escape(layer) + "$")] = override
    ignored = {_pattern(name) for name in plain}
    ignored = [f"re:{p}" for p in sorted(ignored - set(kinds))] + [f"re:{re.escape(n)}$" for n in sorted(plain) if _pattern(n) in kinds]
    return common | {"ignored_layers": ignored} | ({"dynamic": said} if said else {})


def _pattern(name):
    """A regular expression for the names that differ from this one in the numbers of layers and experts only."""
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split(".")) + "$"
