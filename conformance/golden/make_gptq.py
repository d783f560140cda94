"""Makes gptq.safetensors: GPTQ layers as AutoGPTQ and GPTQModel pack them, and as they dequantize them.

Run with PYTHONPATH on folders that hold auto_gptq 0.7.1 (the wheel, unpacked), GPTQModel 7.7.0 (gptqmodel/ of the source
distribution) and the latter's small dependencies (logbar, device-smi, pypcre, threadpoolctl):

    pip install --no-deps --target site auto_gptq==0.7.1 logbar device-smi pypcre threadpoolctl
    PYTHONPATH=site:gptqmodel-7.7.0 python conformance/golden/make_gptq.py

The two packages' __init__ modules, which load whole models, are not run; the packing classes are.
"""

import importlib
import importlib.machinery
import json
import os
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file


def shell(name, **attributes):
    """A package without its __init__."""
    module = types.ModuleType(name)
    parent, _, last = name.rpartition(".")
    path = importlib.machinery.PathFinder.find_spec(last, sys.modules[parent].__path__ if parent else None)
    module.__path__ = list(path.submodule_search_locations)
    sys.modules[name] = module
    for key, value in attributes.items():
        setattr(module, key, value)
    return module


os.environ["GPTQMODEL_DISABLE_PACK_EXT"] = "1"  # the packer in Python; the one in C++ makes the same bytes
for package in ("auto_gptq", "auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear"):
    shell(package)
AutoGPTQ = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda").QuantLinear
shell("gptqmodel", DEBUG_ON=False)
shell("gptqmodel.models")
quantization = shell("gptqmodel.quantization", FORMAT=None, METHOD=None)
config = importlib.import_module("gptqmodel.quantization.config")
quantization.FORMAT, quantization.METHOD = config.FORMAT, config.METHOD
TorchLinear = importlib.import_module("gptqmodel.nn_modules.qlinear.torch").TorchLinear
revert = importlib.import_module("gptqmodel.utils.model_dequant")

N, K = 32, 96
tensors, cases = {}, {}


def layer(seed, bits, group, sym, order, lowest):
    """A weight that lies on its grid, the grid (n, groups), and g_idx."""
    draw = torch.Generator().manual_seed(seed)
    size = K if group == -1 else group
    groups = -(-K // size)
    g_idx = torch.arange(K) // size
    if order:
        g_idx = g_idx[torch.randperm(K, generator=draw)]
    codes = torch.randint(0, 2**bits, (N, K), generator=draw)
    scale = (0.5 + torch.rand(N, groups, generator=draw)) * 2.0**-bits
    zero = torch.full((N, groups), 2 ** (bits - 1)) if sym else torch.randint(lowest, 2**bits, (N, groups), generator=draw)
    if not sym:
        zero[0, 0] = lowest
    scale = scale.half().float()
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = (codes - zero[:, g_idx]) * scale[:, g_idx]
    return linear, scale, zero.float(), g_idx.int()


def add(name, version, parts, expected, bits, group, sym, order, checkpoint_format, **more):
    for part, tensor in parts.items():
        tensors[f"{name}/{part}"] = tensor.contiguous().clone()
    tensors[f"{name}/expected"] = expected.t().contiguous().clone()
    settings = {"bits": bits, "group_size": group, "sym": sym, "desc_act": order, "checkpoint_format": checkpoint_format}
    cases[name] = {"made_by": version, "config": {"quant_method": "gptq", **settings, **more}}


def parts_of(module):
    return {name: getattr(module, name) for name in ("qweight", "qzeros", "scales", "g_idx")}


def autogptq(name, seed, bits, group, sym, order=False, dtype=torch.float16):
    linear, scale, zero, g_idx = layer(seed, bits, group, sym, order, 1)
    linear.weight.data = linear.weight.data.to(dtype)
    module = AutoGPTQ(bits, group, K, N, bias=False, weight_dtype=dtype)
    module.pack(linear, scale.to(dtype), zero.clone(), g_idx)
    expected = module(torch.eye(K, dtype=dtype))  # one product by one: its dequantized weight
    add(name, "auto_gptq 0.7.1 nn_modules/qlinear/qlinear_cuda.py", parts_of(module), expected, bits, group, sym, order, "gptq")


def gptqmodel(name, seed, bits, group, sym, version, order=False, lowest=1):
    linear, scale, zero, g_idx = layer(seed, bits, group, sym, order, lowest)
    module = TorchLinear(
        bits=bits, group_size=group, sym=sym, desc_act=order, in_features=K, out_features=N, bias=False,
        pack_dtype=torch.int32, register_buffers=True, format=config.FORMAT(version),
    )  # fmt: skip
    module.pack_block(linear, scale, zero, g_idx)
    module.post_init()
    expected = module.dequantize_weight()
    parts = parts_of(module)
    if version == "gptq":  # what gptqmodel/utils/model.py does to qzeros before it saves version 1
        if 32 % bits:
            parts["qzeros"] = revert._revert_gptq_v1_qzeros_correction(parts["qzeros"], bits)
        else:
            parts["qzeros"] = parts["qzeros"] - sum(1 << i for i in range(0, 32, bits))
    add(
        name,
        "gptqmodel 7.7.0 nn_modules/qlinear",
        parts,
        expected,
        bits,
        group,
        sym,
        order,
        version,
        meta={"quantizer": ["gptqmodel:7.7.0"]},
    )


for bits in (2, 3, 4, 8):
    autogptq(f"autogptq_{bits}_sym", bits, bits, 32, True)
    autogptq(f"autogptq_{bits}_asym_order", bits + 10, bits, 32, False, order=True)
autogptq("autogptq_4_row", 20, 4, -1, False)
autogptq("autogptq_4_partial", 21, 4, 64, True)
autogptq("autogptq_4_bf16", 22, 4, 32, True, dtype=torch.bfloat16)
autogptq("autogptq_3_fp32", 23, 3, 32, False, dtype=torch.float32)
for bits in (2, 3, 4, 8):
    gptqmodel(f"gptqmodel_{bits}_v2", bits + 30, bits, 32, False, "gptq_v2", lowest=0)
    gptqmodel(f"gptqmodel_{bits}_v1_borrow", bits + 40, bits, 32, False, "gptq", lowest=0)
gptqmodel("gptqmodel_4_v1", 50, 4, 32, True, "gptq")
for bits in (3, 5, 6, 7):
    gptqmodel(f"gptqmodel_{bits}_planar", bits + 60, bits, 32, False, "gptq_p", order=bits == 5, lowest=0)
gptqmodel("gptqmodel_6_planar_sym", 70, 6, -1, True, "gptq_p")

versions = {"auto_gptq": "0.7.1", "gptqmodel": "7.7.0", "torch": torch.__version__}
path = Path(__file__).with_name("gptq.safetensors")
save_file(tensors, path, {"versions": json.dumps(versions), "cases": json.dumps(cases)})
print(path, path.stat().st_size, len(cases))
