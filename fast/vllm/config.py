"""What becomes of each of a model's layers, and the configuration that vLLM asks for it."""

from dataclasses import dataclass, replace

import torch

from ref.format import Format
from ref.layouts import humming
from ref.layouts.check import check_keys

from ..eager import dequantize
from ..layers import environment
from ..layers.config import DTYPES, IGNORED, RULES, LayerConfig, resolve
from ..layers.fallback import on_device
from ..quantize import quantize

NAME = "quantref"


@dataclass(frozen=True)
class Choice:
    """How the tensors of one layer become its weight.

    config: what it is quantized to. stored: what ref.layouts.humming.options says of the tensors, None where they are of 16 bits. dtype: of the model.
    """

    config: LayerConfig
    stored: dict | None
    dtype: torch.dtype

    @property
    def parts(self):
        """Names of the tensors that each shard has."""
        if self.stored is None:
            return ("weight",)
        extra = {"zero_point": self.stored["zero"], "weight_scale_2": self.stored["scale_2"]}
        return ("weight", "weight_scale", *(name for name, there in extra.items() if there))

    @property
    def format(self):
        """Of the weight."""
        if self.config.weight is not None:
            return self.config.weight
        said = self.stored
        scale = said["scale"] or DTYPES[self.dtype]
        zero = {None: None, "int": "int", "float": scale}[said["zero"]]
        return Format(said["element"], scale, said["group"], zero, said["scale_2"], said["hadamard"])

    def x_format(self, name, device):
        """Of the input of a layer of this name, on a device; or None."""
        try:
            return on_device(self.config, device, self.dtype, self.format).x_format
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def read(self, tensors):
        """A QTensor of the tensors of one shard, {part: tensor}; what is stored is quantized anew by way of float32."""
        if self.stored is None:
            return quantize(tensors["weight"], self.config.weight)
        q = humming.read(tensors, self.stored)
        return q if self.config.weight is None else quantize(dequantize(q, torch.float32), self.config.weight)


def choose(online, checkpoint, names, dtype):
    """The Choice for a layer, or None where it stays unquantized.

    Args:
        online: QuantConfig of the environment. checkpoint: quantization_config of a checkpoint, or None.
        names: the layer's name in vLLM, and, where vLLM makes one layer of several, theirs. A rule for the former counts, else the latter agree.
        dtype: of the model.

    Raises:
        ValueError: a configuration that cannot be, or that says different things of one layer's parts.
        NotImplementedError: the scale of the layer's input would come from the checkpoint.
    """
    said = {name: resolve(name, checkpoint and ("humming", checkpoint), online, dtype) for name in names}
    plain = replace(online, weight=plain_of(online.weight), x=plain_of(online.x))
    if said[names[0]] != resolve(names[0], checkpoint and ("humming", plain_of(checkpoint)), plain, dtype):
        names = names[:1]
    config, *others = (said[name] for name in names[1:] or names)
    if any(other != config for other in others):
        found = "; ".join(f"{name}: {said[name] or 'left alone'}" for name in names[1:])
        raise ValueError(f"{NAME}: {names[0]} is one layer in vLLM, and the configuration says different things of its parts: {found}")
    if config is None:
        return None
    if config.static:
        raise NotImplementedError(
            f"{NAME}: {names[0]} would need the scale of its input, which {config.x_format} has in the checkpoint; FAST_INPUT_QUANT_CONFIG with"
            ' a dynamic quant_mode works, or with "dtype": "bfloat16"'
        )
    return Choice(config, checkpoint and humming.options(checkpoint, names[-1]), dtype)


def plain_of(document):
    """A document without the rules for single layers."""
    return {key: value for key, value in document.items() if key not in RULES}


def quantization_config(base, layers):
    """The class that vLLM asks for each layer's method.

    Args:
        base: vLLM's QuantizationConfig. layers: () -> vLLM's classes of layers and the methods for them, as fast.vllm.layers returns them.
    """

    class QuantrefConfig(base):
        def __init__(self, checkpoint=None):
            super().__init__()
            online = environment.quant_config()
            self.online, self.checkpoint = replace(online, weight=dict(online.weight), x=dict(online.x)), checkpoint and dict(checkpoint)
            if checkpoint is None and not online.weight:
                raise ValueError(
                    f"{NAME}: neither FAST_ONLINE_QUANT_CONFIG nor the checkpoint's config.json says how to quantize; set the former, as to"
                    ' \'{"dtype": "int4", "group_size": 128}\''
                )

        @classmethod
        def get_name(cls):
            return NAME

        @classmethod
        def get_supported_act_dtypes(cls):
            return [torch.bfloat16, torch.float16]

        @classmethod
        def get_min_capability(cls):
            return 75

        @staticmethod
        def get_config_filenames():
            return []

        @classmethod
        def from_config(cls, config):
            if config.get("quant_method") != "humming":
                raise NotImplementedError(
                    f"{NAME}: the checkpoint's quant_method is {config.get('quant_method')!r}, expected 'humming'; vLLM's own methods read the"
                    f" others, without --quantization {NAME}"
                )
            check_keys(config, humming.KEYS, humming.WHERE)
            return cls(config)

        @classmethod
        def override_quantization_method(cls, hf_quant_cfg, user_quant, hf_config=None):
            # vLLM has a method of its own for these checkpoints, so that this one has to be asked for.
            return NAME if user_quant == NAME and (hf_quant_cfg or {}).get("quant_method") == "humming" else None

        def apply_vllm_mapper(self, hf_to_vllm_mapper):
            for document in filter(None, (self.online.weight, self.online.x, self.checkpoint)):
                document |= {key: hf_to_vllm_mapper.apply_list(document[key]) for key in IGNORED if document.get(key)}

        def get_quant_method(self, layer, prefix):
            kinds = layers()
            is_linear = isinstance(layer, kinds.LinearBase)
            if is_linear:
                parent, dot, last = prefix.rpartition(".")
                parts = [parent + dot + part for part in self.packed_modules_mapping.get(last, ())]
            elif isinstance(layer, kinds.RoutedExperts):
                # A checkpoint names each expert's projections, and all experts are alike; who quantizes online names the layer.
                projections = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
                parts = [f"{prefix}.0.{part}" for part in projections if part and self.checkpoint]
            else:
                return None
            choice = choose(self.online, self.checkpoint, [prefix, *parts], layer.params_dtype)
            if is_linear:
                return kinds.UnquantizedLinearMethod() if choice is None else kinds.linear_method(choice, prefix)
            config = layer.moe_config
            return kinds.UnquantizedFusedMoEMethod(config) if choice is None else kinds.experts_method(choice, prefix, config)

    return QuantrefConfig
