"""The quantized layers of a checkpoint, put into one of transformers' models, one after the other; no 16-bit copy of them ever exists."""

import re
from dataclasses import replace

import torch
from torch import nn

from ref.combine import stack, take_expert
from ref.layouts.checkpoint import located

from ..eager import dequantize
from ..layers import environment
from ..layers.config import LayerConfig, resolve
from ..layers.fallback import on_device
from ..layers.inputs import static_scale
from ..layers.linear import Linear
from ..layers.online import is_experts
from ..layers.weight import moved
from ..quantize import quantize
from .experts import Experts, activation, weight_names
from .names import Names

# Scales of a cache of keys and values, which transformers keeps in 16 bits: checkpoints have them, and nothing here is for them.
OF_THE_CACHE = r"\.([qkv]|kv)_scale$|\.[kv]_proj\.(output|[kv])_scale$"


class Filling:
    """What a checkpoint has for a model that is on the meta device still.

    Made before transformers loads the other tensors, it takes the weights that are quantized out of the model, so that nothing is allocated for
    them; finish puts quantized layers in their modules' places.
    """

    def __init__(self, model, checkpoint, strict):
        """
        Args:
            strict: refuse tensors that are missing or left over, too, which transformers itself only warns of.

        Raises:
            ValueError: layers that the model has no place for, that are missing, or tensors of other shapes; the message names them.
            NotImplementedError: a module that no quantized layer can take the place of.
        """
        self.model, self.checkpoint, self.names = model, checkpoint, Names(model)
        with located("load"):
            self.groups, left = self.names.groups(checkpoint.layers)
        left = [layer for layer in left if not self._ignored(f"{layer}.weight")]
        if left:
            raise ValueError(f"load: {_listed(left)}: quantized in the checkpoint, and {type(model).__name__} has no such layer")
        self.modules = {}  # name: the names of its parameters that are quantized
        for group in self.groups:
            for key in group.keys:
                module, _, parameter = key.rpartition(".")
                self.modules.setdefault(module, set()).add(parameter)
        for name, parameters in self.modules.items():
            _check(name, model.get_submodule(name), parameters)
        self.dropped = self._extra_biases() if strict else []
        if strict:
            self._check_plain()
        self._take_out()

    def _ignored(self, name):
        """Whether transformers leaves a tensor of this name aside for this model, or everybody does."""
        patterns = [*(self.model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", OF_THE_CACHE]
        return any(re.search(pattern, name) for pattern in patterns)

    def _extra_biases(self):
        """Biases that are all zero of layers that have none in the model: old packers of GPTQ wrote them everywhere."""
        biases = (f"{name}.bias" for name in self.modules if isinstance(self.model.get_submodule(name), nn.Linear))
        plain, known = set(self.checkpoint.plain), self.names.parameters
        return [name for name in biases if name in plain and name not in known and not self.checkpoint.tensor(name).any()]

    def _check_plain(self):
        """Every parameter and buffer that is not quantized is in the checkpoint, in its shape, and nothing else is."""
        known, quantized = self.names.parameters, {key for group in self.groups for key in group.keys}
        found, left = {}, []
        for name in self.checkpoint.plain:
            key, pattern = self.names.parameter(name)
            if key in quantized:
                raise ValueError(f"load: {name}: not quantized in the checkpoint, and other parts of {key} are (all must match)")
            if key not in known and not self._ignored(name) and name not in self.dropped:
                left.append(name)
            if key in known and pattern is None and self.checkpoint.shape(name) != tuple(known[key].shape):
                raise ValueError(
                    f"load: {key}: {name} has shape {self.checkpoint.shape(name)}, the model's config says {tuple(known[key].shape)}"
                )
            found[key] = name
        if left:
            raise ValueError(f"load: {_listed(left)}: in the checkpoint, and {type(self.model).__name__} has no such tensor")
        tied = getattr(self.model, "all_tied_weights_keys", {})
        optional = self.model._keys_to_ignore_on_load_missing or ()
        missing = [
            key
            for key in known
            if key not in found
            and key not in quantized
            and not any(re.search(pattern, key) for pattern in optional)
            and not (key in tied and (tied[key] in found or tied[key] in quantized))
        ]
        if missing:
            raise ValueError(f"load: {_listed(missing)}: the checkpoint lacks what {type(self.model).__name__} needs")

    def _take_out(self):
        """Take the quantized weights out of the model, and tell transformers that the checkpoint's tensors for them are not left over."""
        stored = [part for layer in self.checkpoint.layers for part in self.checkpoint.parts(layer).values()] + self.dropped
        # Numbers as patterns: there are few kinds of layers, and many experts.
        kinds = {re.sub(r"\d+", r"\\d+", re.escape(self.names.parameter(name)[0])) for name in stored}
        ignored = {f"^{kind}$" for kind in kinds} | {OF_THE_CACHE}
        self.model._keys_to_ignore_on_load_unexpected = set(self.model._keys_to_ignore_on_load_unexpected or ()) | ignored
        for name, parameters in self.modules.items():
            module = self.model.get_submodule(name)
            for parameter in parameters:
                take_out(module, parameter)

    def finish(self, device):
        """Read the layers, and put them in their places.

        Raises:
            ValueError: a layer that cannot be read, or of another shape than the model's; the message names it.
        """
        waiting = {}
        for group in self.groups:
            with located("load", group.keys[0]):
                weights = self.names.read(group, self.checkpoint)
            for key, q in weights.items():
                self._check_shape(key, group, q)
                name, _, parameter = key.rpartition(".")
                parts = waiting.setdefault(name, {})
                parts[parameter] = moved(q, device), group.layers
                if len(parts) == len(self.modules[name]):
                    self.model.set_submodule(name, self._layer(name, waiting.pop(name), device))

    def _check_shape(self, key, group, q):
        """Refuse a weight that is not the model's."""
        shape = tuple(self.names.parameters[key].shape)
        if getattr(self.model.get_submodule(key.rpartition(".")[0]), "is_transposed", False):
            shape = (*shape[:-2], shape[-1], shape[-2])
        if tuple(q.shape) != shape:
            raise ValueError(
                f"load: {key}: {_listed(group.layers)} in {q.format} has shape {tuple(q.shape)}, the model's config says {shape}"
            )

    def _layer(self, name, parts, device):
        """The quantized layer for a module.

        Args:
            parts: {parameter: (QTensor, the layers of the checkpoint that it is of)}.
        """
        module, checkpoint, dtype = self.model.get_submodule(name), self.checkpoint, self.model.config.dtype
        first, layers = next(iter(parts.values()))
        qs = {parameter: q for parameter, (q, _) in parts.items()}
        with located("load", layers[0]):
            chosen = resolve(layers[0], (checkpoint.layout, checkpoint.config), environment.quant_config(), dtype) or LayerConfig(None)
            if chosen.weight is not None:
                qs = {parameter: requantized(q, chosen.weight) for parameter, q in qs.items()}
            chosen = on_device(dynamic(chosen) if is_experts(module) else chosen, device, dtype, weight=first.format)
            x_scale = torch.stack([self._x_scale(layer) for layer in layers]).amax(0).to(device) if chosen.static else None
            return replacement(module, qs, chosen.x_format, x_scale)

    def _x_scale(self, layer):
        """The scale of a layer's input, as it is stored. Layers that the model has as one have one input: the largest is for all."""
        parts = {part: name for part, name in self.checkpoint.parts(layer).items() if part.startswith(("input", "activation", "qscale"))}
        return static_scale({part: self.checkpoint.tensor(name) for part, name in parts.items()})


def dynamic(chosen):
    """The LayerConfig for experts, since fused_experts takes scales of its own: a token's in the place of a stored one."""
    if not chosen.static:
        return chosen
    fmt = chosen.x_format
    return replace(chosen, static=False, x_format=replace(fmt, scale_2="channel") if fmt.scale_2 else replace(fmt, group=(1, 0)))


def requantized(q, format):
    """A weight in another format; a stack expert by expert, since its float32 numbers would be many."""
    if len(q.shape) == 3:
        return stack([requantized(take_expert(q, expert), format) for expert in range(q.shape[0])])
    return quantize(dequantize(q, torch.float32), format)


def replacement(module, qs, x_format, x_scale=None):
    """The quantized layer that takes the place of an nn.Linear, or of transformers' experts.

    Args:
        qs: {parameter: QTensor}, of weight_names.
    """
    if is_experts(module):
        return Experts(module, *(qs[name] for name in weight_names(module)), x_format)
    return Linear(qs["weight"], module.bias, x_format=x_format, x_scale=x_scale)


def take_out(module, parameter):
    """Take a weight out of a module; what is left is no parameter, and has no memory, but a shape for who initializes weights, which skips it."""
    left = torch.empty_like(getattr(module, parameter).detach(), device="meta")
    left._is_hf_initialized = True
    delattr(module, parameter)
    setattr(module, parameter, left)


def _check(name, module, parameters):
    """Refuse a module that no quantized layer can take the place of."""
    if is_experts(module):
        with located("load", name):
            activation(module)
        if lacking := set(weight_names(module)) - parameters:
            raise NotImplementedError(
                f"load: {name}: {_listed(lacking)} is not quantized, and its other weight is; expected both or neither"
            )
    elif type(module) is not nn.Linear or parameters != {"weight"}:
        raise NotImplementedError(
            f"load: {name}: {_listed(parameters)} of {type(module).__name__} is quantized; there are nn.Linear and transformers' experts"
        )


def _listed(names, most=4):
    """The first few names, and how many there are more."""
    names = sorted(names) if isinstance(names, (set, frozenset)) else list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
