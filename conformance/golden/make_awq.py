"""Makes awq.safetensors: AWQ layers as AutoAWQ and AutoRound pack them, and as they dequantize them.

Run with PYTHONPATH on folders that hold autoawq 0.2.9 (awq/ of the source distribution), auto_round 0.16.1 (the wheel, unpacked)
and py-cpuinfo:

    PYTHONPATH=autoawq-0.2.9:auto_round-site python conformance/golden/make_awq.py

awq's own __init__, which loads whole models, is not run, and modules that AutoRound imports for data sets are stand-ins. GEMV's and
GEMV-fast's only decoders are CUDA kernels: there, "expected" is the weight that went into from_linear, which lies on its grid; in
GEMV-fast it is code * scale + qzeros with the scales and qzeros that AutoAWQ stored, summed in float32 and rounded to float16.
"""

import importlib
import importlib.machinery
import json
import sys
import types
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file


def shell(name):
    """A package without its __init__."""
    module = types.ModuleType(name)
    parent, _, last = name.rpartition(".")
    path = importlib.machinery.PathFinder.find_spec(last, sys.modules[parent].__path__ if parent else None)
    module.__path__ = list(path.submodule_search_locations)
    sys.modules[name] = module


for package in ("awq", "awq.modules", "awq.modules.linear", "awq.utils"):
    shell(package)
gemm, gemv, gemv_fast, marlin = (importlib.import_module(f"awq.modules.linear.{m}") for m in ("gemm", "gemv", "gemv_fast", "marlin"))
dequantize_gemm = importlib.import_module("awq.utils.packing_utils").dequantize_gemm
sys.modules["datasets"] = mock.MagicMock()
auto_round = importlib.import_module("auto_round.export.export_to_awq.utils")

tensors, cases = {}, {}


def layer(seed, n, k, bits, group, sym):
    """A weight that lies on its grid, and the grid: scale and zero (n, groups)."""
    draw = torch.Generator().manual_seed(seed)
    size = k if group == -1 else group
    codes = torch.randint(0, 2**bits, (n, k), generator=draw)
    scale = ((0.5 + torch.rand(n, k // size, generator=draw)) * 2.0**-bits).half()
    zero = torch.full((n, k // size), 2 ** (bits - 1)) if sym else torch.randint(0, 2**bits, (n, k // size), generator=draw)
    columns = torch.arange(k) // size
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight.data = (codes - zero[:, columns]) * scale[:, columns].float()
    return linear, scale, zero, codes, columns


def add(name, maker, module, expected, bits, group, **config):
    for part in ("qweight", "qzeros", "scales"):
        if hasattr(module, part):
            tensors[f"{name}/{part}"] = getattr(module, part).contiguous().clone()
    tensors[f"{name}/expected"] = expected.contiguous().clone()
    cases[name] = {"made_by": maker, "config": {"quant_method": "awq", "bits": bits, "group_size": group, **config}}


def autoawq(name, seed, kind, version, n, k, group, **more):
    linear, scale, zero, codes, columns = layer(seed, n, k, 4, group, False)
    size = k if group == -1 else group
    if version == "gemm":
        module = kind.from_linear(linear, 4, size, False, scale.float().t().contiguous(), zero.float().t().contiguous())
        expected = dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, size).t()
    else:
        module = kind.from_linear(linear, 4, size, False, scale.float(), zero.float())
        expected = linear.weight.data.half()
    if version == "gemv_fast":
        offset = module.qzeros[: k // size].t().float()
        expected = (codes * scale[:, columns].float() + offset[:, columns]).half()
    add(name, f"autoawq 0.2.9 modules/linear/{version}.py", module, expected, 4, group, zero_point=True, version=version)


autoawq("gemm_g32", 1, gemm.WQLinear_GEMM, "gemm", 32, 64, 32)
autoawq("gemm_row", 2, gemm.WQLinear_GEMM, "gemm", 64, 32, -1)
autoawq("gemv_g32", 3, gemv.WQLinear_GEMV, "gemv", 32, 96, 32)
autoawq("gemv_g64", 4, gemv.WQLinear_GEMV, "gemv", 16, 192, 64)
autoawq("gemv_g128", 5, gemv.WQLinear_GEMV, "gemv", 8, 256, 128)
autoawq("gemv_fast_g32", 6, gemv_fast.WQLinear_GEMVFast, "gemv_fast", 32, 64, 32)
autoawq("gemv_fast_g128", 7, gemv_fast.WQLinear_GEMVFast, "gemv_fast", 16, 256, 128)
linear, scale, zero, codes, columns = layer(8, 128, 64, 4, 32, True)
module = marlin.WQLinear_Marlin.from_linear(linear, 4, 32, False, scale.float().t().contiguous().t())
add("marlin_g32", "autoawq 0.2.9 modules/linear/marlin.py", module, linear.weight.data.half(), 4, 32, zero_point=False, version="marlin")
for bits in (4, 5, 6, 7):
    for sym in (True, False):
        linear, scale, zero, codes, columns = layer(bits + 10 * sym, 32, 64, bits, 32, sym)
        zeros = 2 ** (bits - 1) if sym else zero.float().t().contiguous()
        module = auto_round.WQLinear_GEMM.from_linear(linear, bits, 32, False, scale.float().t().contiguous(), zeros)
        expected = auto_round.dequantize_gemm(module.qweight, module.qzeros, module.scales, bits, 32).t()
        name = f"auto_round_{bits}_{'sym' if sym else 'asym'}"
        add(
            name,
            "auto_round 0.16.1 export/export_to_awq/utils.py",
            module,
            expected,
            bits,
            32,
            zero_point=not sym,
            version="gemm",
            provider="auto-round",
        )

versions = {"autoawq": "0.2.9", "auto_round": "0.16.1", "torch": torch.__version__}
path = Path(__file__).with_name("awq.safetensors")
save_file(tensors, path, {"versions": json.dumps(versions), "cases": json.dumps(cases)})
print(path, path.stat().st_size, len(cases))
