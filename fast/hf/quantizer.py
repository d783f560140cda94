"""Humming's quant_method in transformers: models quantized while they are loaded, and loaded quantized."""

import os

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ref.layouts import open as open_checkpoint
from ref.layouts.checkpoint import located

from ..layers import environment
from ..layers.config import read_config
from ..layers.fallback import on_device
from ..layers.online import is_experts
from ..quantize import quantize
from .experts import activation, quantized, weight_names
from .fill import Filling, replacement, take_out
from .save import saved

# transformers has no such method of its own, and a config.json with it is what ref.layouts.humming reads.
METHOD = "humming"


@register_quantization_config(METHOD)
class FastConfig(QuantizationConfigMixin):
    """from_pretrained's quantization_config: how layers are quantized while they are loaded.

    >>> FastConfig({"dtype": "int4", "group_size": 128}).to_dict()
    {'dtype': 'int4', 'group_size': 128, 'quant_method': 'humming'}
    """

    def __init__(self, config=None, x=None):
        """
        Args:
            config: what fast.read_config takes for weights, or a QuantConfig. x: for activations.
                Without both, FAST_ONLINE_QUANT_CONFIG and FAST_INPUT_QUANT_CONFIG count.

        Raises:
            ValueError, FileNotFoundError: as read_config.
        """
        self.quant_method = METHOD
        self.config = environment.given(config, x)
        self.config.check_online("FastConfig")
        self.document = dict(self.config.weight)
        # What fast.load sets: the layers are in the checkpoint already, in whatever layout, and are to go to the device.
        self.stored, self.device = False, None

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """As transformers makes it of a config.json, whose keys are read together with the layers."""
        made = cls.__new__(cls)
        made.quant_method, made.config, made.document = METHOD, None, dict(config_dict)
        made.stored, made.device = False, None
        return (made, kwargs) if return_unused_kwargs else made

    def to_dict(self):
        return self.document | {"quant_method": METHOD}


@register_quantizer(METHOD)
class FastQuantizer(HfQuantizer):
    """Puts fast's layers into a model that transformers loads, and writes them in Humming's layout."""

    def __init__(self, quantization_config, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.filling, self.chosen, self.arrived, self.failed = None, {}, {}, None
        self.online = not (self.pre_quantized or quantization_config.stored)
        if self.online and quantization_config.config is None:
            quantization_config.config = read_config(quantization_config.document)

    def validate_environment(self, device_map=None, **kwargs):
        if isinstance(device_map, dict) and len(set(map(str, device_map.values()))) > 1:
            raise NotImplementedError(
                f"fast.hf: device_map has {len(set(map(str, device_map.values())))} devices; expected one (fast.parallel is for several)"
            )

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        if self.online:
            self.chosen = self._choose(model)
        else:
            checkpoint = open_checkpoint(os.path.dirname(checkpoint_files[0]))
            self.filling = Filling(model, checkpoint, strict=self.quantization_config.stored)

    def _choose(self, model):
        """{module name: its LayerConfig} of what is quantized while it is loaded."""
        tied = {name for pair in getattr(model, "all_tied_weights_keys", {}).items() for name in pair}
        chosen = {}
        for name, module in model.named_modules():
            if not (is_experts(module) or (type(module) is nn.Linear and f"{name}.weight" not in tied)):
                continue
            with located("fast.hf", name):
                layer = self.quantization_config.config.online(name, model.config.dtype)
                if layer is None:
                    continue
                if is_experts(module):
                    activation(module)
            chosen[name] = layer
        if not chosen:
            raise ValueError("fast.hf: the configuration leaves every layer of this model as it is")
        return chosen

    def param_needs_quantization(self, model, param_name, **kwargs):
        name, _, parameter = param_name.rpartition(".")
        return name in self.chosen and parameter in weight_names(model.get_submodule(name))

    def get_quantize_ops(self):
        return Quantize(self)

    def arrive(self, model, key, tensor):
        """A weight of a chosen module is here: quantize it, and let go of the place that the model has for it."""
        name, _, parameter = key.rpartition(".")
        module, fmt = model.get_submodule(name), self.chosen[name].weight
        with located("fast.hf", key):
            q = quantized(module, parameter, tensor, fmt) if is_experts(module) else quantize(tensor, fmt)
        self.arrived.setdefault(name, {})[parameter] = q
        take_out(module, parameter)

    def _process_model_after_weight_loading(self, model, **kwargs):
        if self.failed is not None:
            raise self.failed
        if self.quantization_config.device is not None:
            model.to(self.quantization_config.device)
        if self.filling is not None:
            self.filling.finish(model.device)
        for name in list(self.arrived):
            module, qs = model.get_submodule(name), self.arrived.pop(name)
            if lacking := [parameter for parameter in weight_names(module) if parameter not in qs]:
                raise ValueError(f"fast.hf: {name}: the checkpoint lacks {', '.join(lacking)}")
            with located("fast.hf", name):
                x_format = on_device(self.chosen[name], model.device, model.config.dtype).x_format
            model.set_submodule(name, replacement(module, qs, x_format))
        self.filling = None
        return model.requires_grad_(False)

    def get_state_dict_and_metadata(self, model):
        state, self.quantization_config.document = saved(model)
        model.config.quantization_config = self.quantization_config
        return state, {}

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return False


def adopt(model, config):
    """Let save_pretrained write a model of transformers that was quantized in place, as one that was quantized while it was loaded."""
    if isinstance(model, PreTrainedModel) and getattr(model, "hf_quantizer", None) is None:
        model.hf_quantizer = FastQuantizer(FastConfig(config), pre_quantized=False)


class Quantize(ConversionOps):
    """transformers' last step for a parameter that is quantized as it arrives: what it has loaded goes no further."""

    def __init__(self, quantizer):
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(self, input_dict, model=None, missing_keys=None, **kwargs):
        left = {}
        for key, value in input_dict.items():
            if not self.quantizer.param_needs_quantization(model, key):
                left[key] = value
                continue
            missing_keys.discard(key)
            try:
                self.quantizer.arrive(model, key, value[0] if isinstance(value, list) else value)
            except (ValueError, NotImplementedError) as error:
                # transformers would log what is raised here, and raise something that does not say what it was.
                self.quantizer.failed = self.quantizer.failed or error
        return left
