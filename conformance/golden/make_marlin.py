"""Makes marlin.safetensors: Marlin weights as AutoGPTQ packs them (4 bits) and as vLLM's reference permutes them (4 and 8 bits).

Run with PYTHONPATH on folders that hold auto_gptq 0.7.1 (the wheel, unpacked) and GPTQModel 7.7.0 with its small dependencies (as
for make_gptq.py), and with the root of vLLM's sources at commit 04aa528e4876f866d0548e3de8e36454c640deb2:

    PYTHONPATH=site:gptqmodel-7.7.0 python conformance/golden/make_marlin.py vllm

AutoGPTQ's constructor asks for a GPU; its pack() is run on an object without it. Of vLLM, get_weight_perm, marlin_permute_weights
and marlin_weights are run, by themselves; the scales of those cases are permuted by GPTQModel's marlin_permute_scales. The kernels
have no decoder on the CPU: "expected" is the float16 weight that was packed, which lies on its grid.
"""

import ast
import importlib
import importlib.machinery
import json
import sys
import types
from pathlib import Path

import numpy as np
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


def functions(path, names, scope):
    """The named functions of a source file, without the rest of it."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    exec(compile(tree, str(path), "exec"), scope)
    return [scope[name] for name in names]


for package in ("auto_gptq", "auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear"):
    shell(package)
AutoGPTQ = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_marlin").QuantLinear
get_scale_perms, permute_scales = functions(
    Path(importlib.machinery.PathFinder.find_spec("gptqmodel").submodule_search_locations[0]) / "utils" / "marlin.py",
    ("get_scale_perms", "marlin_permute_scales"),
    {"torch": torch, "List": list, "_get_scale_perm_tensors": lambda device: tuple(map(torch.tensor, get_scale_perms()))},
)
get_weight_perm, _, marlin_weights = functions(
    Path(sys.argv[1]) / "vllm" / "model_executor" / "layers" / "quantization" / "utils" / "marlin_utils_test.py",
    ("get_weight_perm", "marlin_permute_weights", "marlin_weights"),
    {"np": np, "torch": torch, "GPTQ_MARLIN_TILE": 16, "get_pack_factor": lambda bits: 32 // bits},
)

tensors, cases = {}, {}


def layer(seed, n, k, bits, group):
    """A float16 weight that lies on its grid, its scales (n, groups) and its codes."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, k), generator=draw)
    scale = torch.exp2(torch.randint(-8, -3, (n, k // group), generator=draw).float()) * (
        1 + torch.randint(0, 8, (n, k // group), generator=draw) / 8
    )
    return ((codes - 2 ** (bits - 1)) * scale.repeat_interleave(group, 1)).half(), scale.half(), codes


def add(name, maker, stored, s, weight, bits, group, k):
    tensors.update({f"{name}/B": stored.clone(), f"{name}/s": s.contiguous().clone(), f"{name}/expected": weight})
    config = {"quant_method": "marlin", "bits": bits, "group_size": -1 if group == k else group, "checkpoint_format": "marlin"}
    cases[name] = {"made_by": maker, "config": config}


for seed, n, k, group in ((1, 256, 128, 128), (2, 256, 256, 128)):
    weight, scale, _ = layer(seed, n, k, 4, group)
    module = AutoGPTQ.__new__(AutoGPTQ)
    torch.nn.Module.__init__(module)
    module.infeatures, module.outfeatures, module.group_size, module.bias = k, n, group, None
    module.B, module.s = torch.empty(k // 16, n * 2, dtype=torch.int32), torch.empty(k // group, n, dtype=torch.half)
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight.data = weight
    module.pack(linear, scale)
    add(f"autogptq_{k}", "auto_gptq 0.7.1 nn_modules/qlinear/qlinear_marlin.py", module.B, module.s, weight, 4, group, k)
for seed, n, k, bits, group in ((3, 64, 64, 4, 32), (4, 128, 48, 8, 16), (5, 64, 32, 8, 32)):
    weight, scale, codes = layer(seed, n, k, bits, group)
    stored = marlin_weights(codes.t(), k, n, bits, get_weight_perm(bits))
    add(f"vllm_{bits}_{k}", "vLLM 04aa528e marlin_utils_test.py", stored, permute_scales(scale.t(), k, n, group), weight, bits, group, k)

versions = {"auto_gptq": "0.7.1", "gptqmodel": "7.7.0", "vllm": "04aa528e4876f866d0548e3de8e36454c640deb2", "torch": torch.__version__}
path = Path(__file__).with_name("marlin.safetensors")
save_file(tensors, path, {"versions": json.dumps(versions), "cases": json.dumps(cases)})
print(path, path.stat().st_size, len(cases))
