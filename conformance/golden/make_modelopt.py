"""Golden tensors of NVIDIA ModelOpt, made by its own exporter.

    pip install --no-deps --target SITE nvidia-modelopt==0.47.0
    PYTHONPATH=SITE python conformance/golden/make_modelopt.py

modelopt.torch.quantization.quantize calibrates small layers on the CPU, unified_export_hf._export_quantized_weight packs them (it
is what export_hf_checkpoint calls for each layer), and the qtensor classes' dequantize gives what is expected. requests, omegaconf,
pulp and scipy, which modelopt imports and none of this needs, are empty modules here.

Two things are not modelopt's: it has no dequantizer of the int4 that it exports, so "expected" of those cases is the codes of
its own rounding (pack_int4_in_uint8's, before they are packed) times its scales; and NVFP4_AWQ needs a GPU to calibrate.
"""

import copy
import importlib.abc
import importlib.machinery
import json
import pathlib
import sys
import types
import warnings

import torch
from safetensors.torch import save_file


class Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules that are not installed and not needed: any attribute of theirs is a class that does nothing."""

    names = ("requests", "omegaconf", "pulp", "scipy")

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = self.attribute
        return module

    @staticmethod
    def attribute(name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *a, **k: None})

    def exec_module(self, module):
        pass


sys.meta_path.append(Empty())
warnings.filterwarnings("ignore")

import modelopt  # noqa: E402
import modelopt.torch.quantization as mtq  # noqa: E402
import transformers  # noqa: E402
from modelopt.torch.export import quant_utils, unified_export_hf  # noqa: E402
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format  # noqa: E402
from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP4QTensor, MXFP8QTensor, NVFP4QTensor  # noqa: E402
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig  # noqa: E402
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts  # noqa: E402

# name -> (modelopt's config, n, k, dtype of the weight)
CASES = {
    "fp8": ("FP8_DEFAULT_CFG", 24, 80, torch.bfloat16),
    "fp8_channel": ("FP8_PER_CHANNEL_PER_TOKEN_CFG", 24, 80, torch.bfloat16),
    "fp8_block": ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", 136, 144, torch.bfloat16),
    "nvfp4": ("NVFP4_DEFAULT_CFG", 24, 96, torch.bfloat16),
    "nvfp4_fp32": ("NVFP4_DEFAULT_CFG", 7, 48, torch.float32),
    "w4a16_nvfp4": ("W4A16_NVFP4_CFG", 24, 96, torch.bfloat16),
    "w4a8_nvfp4_fp8": ("W4A8_NVFP4_FP8_CFG", 24, 96, torch.bfloat16),
    "mxfp4": ("MXFP4_DEFAULT_CFG", 24, 96, torch.bfloat16),
    "w4a8_mxfp4_fp8": ("W4A8_MXFP4_FP8_CFG", 24, 96, torch.float32),
    "mxfp8": ("MXFP8_DEFAULT_CFG", 24, 96, torch.bfloat16),
    "int4": ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", 6, 256, torch.bfloat16),
    "int4_awq": ("INT4_AWQ_CFG", 4, 256, torch.bfloat16),
    "w4a8_awq": ("W4A8_AWQ_BETA_CFG", 4, 256, torch.bfloat16),
    "int8_smoothquant": ("INT8_SMOOTHQUANT_CFG", 10, 96, torch.bfloat16),
    "w8a8": ("INT8_DEFAULT_CFG", 10, 96, torch.bfloat16),
    "w8a16": ("INT8_WEIGHT_ONLY_CFG", 10, 96, torch.float32),
    "stack_fp8": ("FP8_DEFAULT_CFG", None, None, torch.bfloat16),
    "stack_nvfp4": ("NVFP4_DEFAULT_CFG", None, None, torch.bfloat16),
}


class Model(torch.nn.Module):
    """One layer, and one that modelopt's configs leave alone."""

    def __init__(self, layer, k):
        super().__init__()
        self.proj = layer
        self.lm_head = torch.nn.Linear(k, 8, bias=False)

    def forward(self, x):
        return self.proj(x), self.lm_head(x)


def make(config, n, k, dtype):
    """(tensors by part, hf_quant_config, expected)."""
    if n is None:
        # Rows of gate_up_proj, (e, k, 2i): experts of different sizes, so that one amax is not that of every expert.
        shape = Llama4TextConfig(hidden_size=32, intermediate_size=16, num_local_experts=3)
        layer, k, name = Llama4TextExperts(shape), 32, "gate_up_proj"
        for i, weight in enumerate(layer.gate_up_proj.data):
            weight.normal_(0, 0.5**i)
        layer.down_proj.data.normal_()
        x = torch.randn(3 * 4, k, dtype=dtype)
    else:
        layer, name = torch.nn.Linear(k, n, bias=False), "weight"
        layer.weight.data.normal_().mul_(torch.rand(n, 1) + 0.01)
        layer.weight.data[n // 2, : k // 2] = 0
        x = torch.randn(16, k, dtype=dtype)
    model = Model(layer, k).to(dtype)
    mtq.quantize(model, copy.deepcopy(getattr(mtq, config)), lambda model: model(x))
    hf_config = quant_utils.get_quant_config(model)
    module = model.proj
    before = getattr(module, name).detach().clone()
    block = quant_utils.get_weight_block_size(module, name)
    unified_export_hf._export_quantized_weight(module, dtype, name)
    state = quant_utils.postprocess_state_dict({key: v for key, v in model.state_dict().items() if key.startswith("proj.")}, 0, None)
    prefix = "" if name == "weight" else name + "_"
    parts = {"weight": state[f"proj.{name}"]}
    parts |= {
        key: state[f"proj.{prefix}{key}"] for key in ("weight_scale", "weight_scale_2", "input_scale") if f"proj.{prefix}{key}" in state
    }
    parts |= {"pre_quant_scale": state["proj.pre_quant_scale"]} if "proj.pre_quant_scale" in state else {}
    return parts, hf_config, expected(parts, hf_config["quantization"]["quant_algo"].upper(), before, block)


def expected(parts, algo, weight, block):
    """What modelopt's own dequantizer returns for the exported tensors, float32."""
    codes, scale = parts["weight"], parts["weight_scale"]
    if weight.dim() == 3:
        codes, scale, weight = codes.mT.contiguous(), scale.mT.contiguous() if scale.dim() == 3 else scale, weight.mT
    shape = weight.shape
    if "NVFP4" in algo:
        second = parts["weight_scale_2"]
        second = second.view(-1, 1, 1) if second.dim() else second
        tensor = NVFP4QTensor(shape, torch.float32, codes)
        return tensor.dequantize(torch.float32, scale=scale, double_scale=second, block_sizes={-1: block})
    if "MXFP4" in algo:
        return MXFP4QTensor(shape, torch.float32, codes).dequantize(torch.float32, scale=scale, block_sizes={-1: block})
    if algo == "MXFP8":
        return MXFP8QTensor(shape, torch.float32, codes).dequantize(torch.float32, scale=scale)
    if algo == "FP8_PB_WO":
        scale = scale.reshape(scale.shape[0], scale.shape[2])
        return FP8QTensor(shape, torch.float32, codes).dequantize(torch.float32, scale=scale, block_sizes={-1: block, -2: block})
    if algo.startswith("FP8"):
        scale = scale[:, None] if scale.dim() == 1 else scale
        return FP8QTensor(shape, torch.float32, codes).dequantize(torch.float32, scale=scale)
    if algo.startswith("W8"):
        return quant_utils.from_quantized_weight(codes, scale, "int8_sq", torch.float32)
    spread = scale[..., torch.arange(shape[-1]) // block]
    return (weight / spread).round().clamp(-8, 7).to(torch.int8).float() * spread


def main():
    torch.manual_seed(0)
    tensors, cases = {}, {}
    for name, (config, n, k, dtype) in CASES.items():
        parts, hf_config, weight = make(config, n, k, dtype)
        for part, tensor in (parts | {"expected": weight}).items():
            tensors[f"{name}/{part}"] = tensor.contiguous().clone()
        cases[name] = {"config": convert_hf_quant_config_format(hf_config), "hf_quant_config": hf_config, "made_by": config}
        print(name, {part: (str(t.dtype), tuple(t.shape)) for part, t in parts.items()})
    versions = {"nvidia-modelopt": modelopt.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    path = pathlib.Path(__file__).with_name("modelopt.safetensors")
    save_file(tensors, path, metadata={"versions": json.dumps(versions), "cases": json.dumps(cases)})


if __name__ == "__main__":
    main()
