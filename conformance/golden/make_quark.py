"""Golden tensors of AMD Quark, made by its own exporter.

    pip install --no-deps --target SITE amd-quark==0.13
    PYTHONPATH=SITE python conformance/golden/make_quark.py

FakeQuantizeBase observes a weight, get_real_quantizer makes the exporter's quantizer of it, and that packs in the order of
quark's ExportBuilder: to_real_quantize_params, maybe_convert_and_transpose_scale, pack_zero_point. Calling the quantizer on the
packed weight gives what is expected, float32. scipy, onnx, onnxslim and psutil, which quark imports and none of this needs, are
empty modules here.

Where that is not all of it: dtype "mx" has no dequantizer in 0.13, but its packer's unpack gives scales and values, which are multiplied.
Two stages with an e5m3 scale are written by 0.13 but not read (it casts the codes to float before it looks them up), so its
dequantizers are called one by one. Blocks of fp8, which quark only keeps from files that have them, are made by casting here and
read by its dequantizer. fp8 under scales by group is neither packed nor read by 0.13, and is not here. Float zero points lose
their fraction in 0.13's exporter, which stores them as int32 (uint2_float_zero).
"""

import importlib.abc
import importlib.machinery
import json
import logging
import pathlib
import sys
import types

import torch
from safetensors.torch import save_file


class Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules that are not installed and not needed: any attribute of theirs is a class that does nothing."""

    names = ("scipy", "onnx", "onnxslim", "psutil")

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
logging.disable(logging.WARNING)

import quark  # noqa: E402
import quark.torch.kernel  # noqa: E402
from quark.torch.export.nn.modules.realquantizer import get_real_quantizer  # noqa: E402
from quark.torch.export.utils import _fix_state_dict_key_on_save, apply_export_state_dict_mappings  # noqa: E402
from quark.torch.quantization.config import config as qc  # noqa: E402
from quark.torch.quantization.config.config import QConfig, QLayerConfig, QTensorConfig  # noqa: E402
from quark.torch.quantization.config.type import Dtype, QSchemeType, RoundType, ScaleType, ZeroPointType  # noqa: E402
from quark.torch.quantization.observer.observer import PerBlock2DMinMaxObserver, PerChannelMinMaxObserver, PerGroupMinMaxObserver  # noqa: E402
from quark.torch.quantization.tensor_quantize import FakeQuantizeBase  # noqa: E402

STATIC = {"is_dynamic": False}
GROUP = {"ch_axis": -1, "group_size": 32, "is_dynamic": False}


UINT2 = {"dtype": Dtype.uint2, "symmetric": False, "round_method": RoundType.half_even, "scale_type": ScaleType.float, "is_dynamic": False}
UINT2_GROUP = {"qscheme": QSchemeType.per_group, "observer_cls": PerGroupMinMaxObserver, "ch_axis": -1, "group_size": 32}
UINT2_CHANNEL = {"qscheme": QSchemeType.per_channel, "observer_cls": PerChannelMinMaxObserver, "ch_axis": 0}

# name -> (spec, n, k, pack_method)
CASES = {
    "uint2_group": (QTensorConfig(**UINT2, **UINT2_GROUP), 12, 64, "reorder"),
    "uint2_float_zero": (QTensorConfig(**UINT2, **UINT2_GROUP, zero_point_type=ZeroPointType.float32), 12, 64, "reorder"),
    "uint2_channel": (QTensorConfig(**UINT2, **UINT2_CHANNEL), 12, 20, "reorder"),
    "int4_group": (qc.Int4PerGroupSpec(**GROUP), 24, 64, "reorder"),
    "int4_group_order": (qc.Int4PerGroupSpec(**GROUP), 24, 64, "order"),
    "int4_group_padded": (qc.Int4PerGroupSpec(**GROUP), 21, 64, "reorder"),
    "int4_group_asymmetric": (qc.Int4PerGroupSpec(symmetric=False, **GROUP), 16, 96, "reorder"),
    "uint4_group": (qc.Uint4PerGroupSpec(**GROUP), 24, 64, "reorder"),
    "uint4_group_order": (qc.Uint4PerGroupSpec(**GROUP), 24, 64, "order"),
    "uint4_group_padded": (qc.Uint4PerGroupSpec(**GROUP), 19, 64, "reorder"),
    "int4_channel": (qc.Int4PerChannelSpec(symmetric=True, ch_axis=0, **STATIC), 16, 40, "reorder"),
    "int4_channel_asymmetric": (qc.Int4PerChannelSpec(symmetric=False, ch_axis=0, **STATIC), 16, 40, "order"),
    "uint4_channel": (qc.Uint4PerChannelSpec(symmetric=False, ch_axis=0, **STATIC), 12, 40, "reorder"),
    "int4_tensor": (qc.Int4PerTensorSpec(**STATIC), 10, 40, "reorder"),
    "uint4_tensor": (qc.Uint4PerTensorSpec(**STATIC), 10, 40, "reorder"),
    "int3_group": (qc.Int3PerGroupSpec(**GROUP), 8, 256, "reorder"),
    "int3_channel": (qc.Int3PerChannelSpec(symmetric=True, ch_axis=0, **STATIC), 16, 40, "reorder"),
    "int3_channel_asymmetric": (qc.Int3PerChannelSpec(symmetric=False, ch_axis=0, **STATIC), 16, 40, "reorder"),
    "int2_group": (qc.Int2PerGroupSpec(**GROUP), 10, 64, "reorder"),
    "int2_group_asymmetric": (qc.Int2PerGroupSpec(symmetric=False, **GROUP), 10, 64, "reorder"),
    "int8_tensor": (qc.Int8PerTensorSpec(**STATIC), 10, 20, "reorder"),
    "int8_channel": (qc.Int8PerChannelSpec(symmetric=True, ch_axis=0, **STATIC), 10, 20, "reorder"),
    "int8_channel_asymmetric": (qc.Int8PerChannelSpec(symmetric=False, ch_axis=0, **STATIC), 10, 20, "reorder"),
    "int8_group": (qc.Int8PerGroupSpec(**GROUP), 10, 64, "reorder"),
    "uint8_tensor": (qc.Uint8PerTensorSpec(**STATIC), 10, 20, "reorder"),
    "uint8_channel": (qc.Uint8PerChannelSpec(symmetric=False, ch_axis=0, **STATIC), 10, 20, "reorder"),
    "uint8_group": (qc.Uint8PerGroupSpec(**GROUP), 10, 64, "reorder"),
    "fp8_tensor": (qc.FP8E4M3PerTensorSpec(**STATIC), 10, 20, "reorder"),
    "fp8_channel": (qc.FP8E4M3PerChannelSpec(ch_axis=0, **STATIC), 10, 20, "reorder"),
    "fp8_e5m2_tensor": (qc.FP8E5M2PerTensorSpec(**STATIC), 10, 20, "reorder"),
    "fp8_e5m2_channel": (qc.FP8E5M2PerChannelSpec(ch_axis=0, **STATIC), 10, 20, "reorder"),
    "fp4_group": (qc.FP4PerGroupSpec(**GROUP), 10, 64, "reorder"),
    "fp6_e2m3_group": (qc.FP6E2M3PerGroupSpec(**GROUP), 10, 64, "reorder"),
    "fp6_e3m2_group": (qc.FP6E3M2PerGroupSpec(**GROUP), 10, 64, "reorder"),
    "mxfp4": (qc.OCP_MXFP4Spec(ch_axis=-1, **STATIC), 10, 64, "reorder"),
    "mxfp6_e2m3": (qc.OCP_MXFP6E2M3Spec(ch_axis=-1, **STATIC), 10, 64, "reorder"),
    "mxfp6_e3m2": (qc.OCP_MXFP6E3M2Spec(ch_axis=-1, **STATIC), 10, 64, "reorder"),
    "amdfp4": (qc.AmdFP4Spec(ch_axis=-1, group_size=16, **STATIC), 10, 64, "reorder"),
    "nvfp4": (
        qc.ScaleQuantSpec(qc.FP4PerGroupSpec(ch_axis=-1, group_size=16, **STATIC), qc.FP8E4M3PerTensorSpec(**STATIC)),
        10,
        64,
        "reorder",
    ),
    "amdfp4_two_stages": (
        qc.ScaleQuantSpec(qc.FP4PerGroupSpec(ch_axis=-1, group_size=16, **STATIC), qc.FP8E5M3PerTensorSpec(**STATIC)),
        10,
        64,
        "reorder",
    ),
    "progressive": (
        qc.ProgressiveSpec(qc.FP8E4M3PerTensorSpec(**STATIC), qc.Int4PerChannelSpec(symmetric=True, ch_axis=0, **STATIC)),
        16,
        40,
        "reorder",
    ),
    "progressive_asymmetric": (
        qc.ProgressiveSpec(qc.FP8E4M3PerTensorSpec(**STATIC), qc.Int4PerChannelSpec(symmetric=False, ch_axis=0, **STATIC)),
        16,
        40,
        "reorder",
    ),
    "mx_fp4": (QTensorConfig(dtype=Dtype.mx, mx_element_dtype=Dtype.fp4, ch_axis=-1, group_size=32), 10, 64, "reorder"),
    "mx_fp6_e2m3": (QTensorConfig(dtype=Dtype.mx, mx_element_dtype=Dtype.fp6_e2m3, ch_axis=-1, group_size=32), 10, 64, "reorder"),
    "mx_fp6_e3m2": (QTensorConfig(dtype=Dtype.mx, mx_element_dtype=Dtype.fp6_e3m2, ch_axis=-1, group_size=32), 10, 64, "reorder"),
    "fp8_block": (
        QTensorConfig(
            dtype=Dtype.fp8_e4m3,
            qscheme=QSchemeType.per_block,
            block_size=[16, 32],
            observer_cls=PerBlock2DMinMaxObserver,
            is_dynamic=False,
        ),
        48,
        64,
        "reorder",
    ),
}


def saved(quantizer, weight):
    """The tensors under the names that quark saves them by."""
    state = {f"weight_quantizer.{name}": tensor for name, tensor in quantizer.state_dict().items()}
    module = types.SimpleNamespace(weight_quantizer=quantizer, weight=weight, _custom_mode="quark")
    tensors = {"layer.weight": weight} | {f"layer.{name}": tensor for name, tensor in state.items()}
    tensors = {_fix_state_dict_key_on_save(name)[0]: tensor for name, tensor in tensors.items()}
    apply_export_state_dict_mappings(module, tensors, "layer.")
    return {name.removeprefix("layer."): tensor for name, tensor in tensors.items()}


def make(spec, n, k, pack_method):
    """(tensors by part, expected, the spec)."""
    spec = spec if isinstance(spec, QTensorConfig) else spec.to_quantization_spec()
    weight = torch.randn(n, k) * (torch.rand(n, 1) + 0.05) + 0.1
    first = spec[0] if isinstance(spec, list) else spec
    if first.qscheme == QSchemeType.per_block:
        rows, columns = first.block_size
        blocks = weight.reshape(n // rows, rows, k // columns, columns)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).reshape(n, k).to(torch.float8_e4m3fn)
        expected = quark.torch.kernel.dequantize("fp8_e4m3", codes, scale, None, -1, -1, "per_block")
        return {"weight": codes, "weight_scale": scale}, expected, spec
    fake = FakeQuantizeBase.get_fake_quantize(spec)
    fake.enable_observer()
    fake.disable_fake_quant()
    fake(weight)
    real = get_real_quantizer(
        qspec=spec,
        quantizer=fake,
        reorder=pack_method == "reorder",
        real_quantized=True,
        float_dtype=torch.float32,
        device=torch.device("cpu"),
    )
    packed = real.to_real_quantize_params(weight)
    real.maybe_convert_and_transpose_scale()
    real.pack_zero_point()
    parts = saved(real, packed)
    if isinstance(spec, list) and spec[1].dtype is Dtype.fp8_e5m3:
        dequantize = quark.torch.kernel.dequantize
        scale = dequantize("fp8_e5m3", parts["weight_scale"], None, None, -1, -1, "per_tensor") * parts["weight_scale_2"]
        expected = dequantize("fp4", real[0].unpack_tensor(packed), scale, None, first.ch_axis, first.group_size, "per_group")
    elif first.dtype is Dtype.mx:
        blocks = real.pack_method.unpack(packed, True).reshape(n, k // 32, 33)
        expected = (blocks[..., 1:] * blocks[..., :1]).reshape(n, k)
        parts["joined"] = packed
    else:
        expected = real(packed)
    return parts, expected.to(torch.float32), spec


def main():
    torch.manual_seed(0)
    tensors, cases = {}, {}
    for name, (spec, n, k, pack_method) in CASES.items():
        parts, expected, spec = make(spec, n, k, pack_method)
        for part, tensor in (parts | {"expected": expected}).items():
            tensors[f"{name}/{part}"] = tensor.detach().contiguous().clone()
        config = QConfig(global_quant_config=QLayerConfig(weight=spec), exclude=["lm_head", "*.mlp.gate"]).to_dict()
        config["export"] = {"kv_cache_group": [], "min_kv_scale": 0.0, "pack_method": pack_method, "weight_format": "real_quantized"}
        cases[name] = {"config": config}
        if name.startswith("mx_"):  # older exports leave out the step that puts the exponents into a tensor of their own
            tensors[f"{name}_joined/weight"] = tensors.pop(f"{name}/joined")
            tensors[f"{name}_joined/expected"] = tensors[f"{name}/expected"].clone()
            cases[f"{name}_joined"] = {"config": config}
        print(name, {part: (str(t.dtype), tuple(t.shape)) for part, t in parts.items()})
    versions = {"amd-quark": "0.13", "torch": torch.__version__}
    path = pathlib.Path(__file__).with_name("quark.safetensors")
    save_file(tensors, path, metadata={"versions": json.dumps(versions), "cases": json.dumps(cases)})


if __name__ == "__main__":
    main()
