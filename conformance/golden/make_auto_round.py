# ruff: noqa: E402
"""Makes auto_round.safetensors: layers as AutoRound's exporters pack them, and as its own inference modules dequantize them.

Run with PYTHONPATH on a folder that holds auto_round 0.16.1 (the wheel, unpacked) and py-cpuinfo:

    PYTHONPATH=auto_round-site python conformance/golden/make_auto_round.py

datasets, which AutoRound imports for calibration, is a stand-in. The integer modules are run on a product by one, which is their
dequantized weight; fp8 with a scale for each row, MX and NVFP4 go through experimental/qmodules. fp8 by tensor and by block has no
decoder there: "expected" is the weight times its scale in float64, rounded once to bfloat16.
"""

import json
import sys
import types
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

sys.modules["datasets"] = mock.MagicMock()
from auto_round.experimental.qmodules.fp8_static import WeightFP8ActFP8StaticQuantLinear
from auto_round.experimental.qmodules.mx import MXFP4QuantLinear, MXFP8QuantLinear, MXINT4QuantLinear
from auto_round.experimental.qmodules.nvfp4 import NVFP4QuantLinear
from auto_round.experimental.qmodules.nvfp4_e5m3 import NVFP4E5M3QuantLinear
from auto_round.export.export_to_autoround.export_to_fp8 import pack_layer as pack_fp8
from auto_round.export.export_to_autoround.qlinear_fp import QuantLinear as FloatQuantLinear
from auto_round.export.export_to_autoround.qlinear_int import QuantLinear as MXIntQuantLinear
from auto_round.export.export_to_awq.utils import WQLinear_GEMM, dequantize_gemm
from auto_round.schemes import QuantizationScheme
from auto_round_extension.torch.qlinear_torch import QuantLinear
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear as QuantLinearV1

N, K = 32, 64
tensors, cases = {}, {}


def add(name, maker, module, expected, parts, **config):
    for part in parts:
        tensors[f"{name}/{part}"] = getattr(module, part).detach().contiguous().clone()
    tensors[f"{name}/expected"] = expected.detach().contiguous().clone()
    cases[name] = {"made_by": f"auto_round 0.16.1 {maker}", "config": {"quant_method": "auto-round", **config}}


def grid(seed, bits, group, sym, lowest):
    """A weight that lies on its grid, its scale (n, groups), and its zeros: an int, or (n, groups)."""
    draw = torch.Generator().manual_seed(seed)
    size = K if group == -1 else group
    codes = torch.randint(0, 2**bits, (N, K), generator=draw)
    scale = ((0.5 + torch.rand(N, K // size, generator=draw)) * 2.0**-bits).half().float()
    zero = 2 ** (bits - 1) if sym else torch.randint(lowest, 2**bits, (N, K // size), generator=draw).float()
    linear = torch.nn.Linear(K, N, bias=False)
    spread = zero if sym else zero.repeat_interleave(size, 1)
    linear.weight.data = (codes - spread) * scale.repeat_interleave(size, 1)
    return linear, scale, zero


def integers(name, seed, kind, maker, packing, bits, group, sym, g_idx=False):
    linear, scale, zero = grid(seed, bits, group, sym, 1 if kind is QuantLinearV1 else 0)
    module = kind(bits, group, K, N, False, g_idx=g_idx)
    module.device = "cpu"
    module.pack(linear, scale, zero)
    parts = ("qweight", "qzeros", "scales", *(("g_idx",) if g_idx else ()))
    expected = module(torch.eye(K, dtype=torch.float16)).t()
    add(name, maker, module, expected, parts, bits=bits, group_size=group, sym=sym, data_type="int", packing_format=packing)


for bits in range(2, 9):
    integers(f"auto_gptq_{bits}", bits, QuantLinearV1, "qlinear_torch_zp.py", "auto_round:auto_gptq", bits, 32, bits % 2 == 0)
    integers(f"auto_round_{bits}", bits + 10, QuantLinear, "qlinear_torch.py", "auto_round", bits, 32 if bits != 4 else -1, bits % 2 == 1)
integers("gptqmodel_4", 20, QuantLinear, "qlinear_torch.py", "auto_round:gptqmodel", 4, 32, False, g_idx=True)
integers("auto_gptq_4_asym", 21, QuantLinearV1, "qlinear_torch_zp.py", "auto_round:auto_gptq", 4, 32, False)
linear, scale, zero = grid(22, 4, 32, False, 0)
module = WQLinear_GEMM.from_linear(linear, 4, 32, False, scale.t().contiguous(), zero.t().contiguous())
expected = dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, 32).t()
settings = {"bits": 4, "group_size": 32, "sym": False, "packing_format": "auto_round:auto_awq"}
add("auto_awq_4", "export_to_awq/utils.py", module, expected, ("qweight", "qzeros", "scales"), **settings)


def floats(name, seed, kind, runner, group, bits, data_type, packing):
    draw = torch.Generator().manual_seed(seed)
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = torch.randn(N, K, generator=draw)
    # The largest is 2.625, which makes NVFP4's global scale 2688 / 2.625 = 1024, so that its decoder rounds once only.
    linear.weight.data *= 2.625 / linear.weight.data.abs().max()
    linear.weight.data[0, 0] = 2.625
    amax = linear.weight.data.view(N, -1, group).abs().amax(-1)
    top = {"mx_fp": 6.0 if bits == 4 else 448.0, "mx_int": 1.75, "nv_fp": 6.0, "nvfp4_v2": 6.0}[data_type]
    more = {}
    if data_type in ("mx_fp", "mx_int"):
        scale = torch.ceil(torch.log2(amax / top))
    elif data_type == "nv_fp":
        more["global_scale"] = (448 * 6 / linear.weight.data.abs().max()).reshape(1)
        scale = (amax / 6 * more["global_scale"]).to(torch.float8_e4m3fn).float()
    else:
        scale = amax / 6
    module = kind(bits, group, K, N, False, data_type=data_type, sym=True, act_bits=16)
    module.pack(linear, scale.view(-1, 1), device="cpu", **more)
    parts = ["weight" if bits == 8 else "weight_packed", "weight_scale"] + (["weight_global_scale"] if more else [])
    scheme = QuantizationScheme(bits=bits, group_size=group, data_type=data_type, act_bits=bits, act_group_size=group, sym=True)
    decoder = runner(in_features=K, out_features=N, config=scheme, bias=None, dtype=torch.float32)
    for part in parts:
        tensor = getattr(module, part)
        # Its shape in the file: (n, groups).
        tensor = tensor.reshape(N, -1) if part == "weight_scale" else tensor
        setattr(module, part, tensor)
        decoder._parameters.pop(part, None)
        decoder._buffers[part] = tensor
    expected = decoder.dequant_weight_online()
    config = {"bits": bits, "group_size": group, "sym": True, "data_type": data_type, "packing_format": packing}
    add(name, f"{kind.__module__.split('.')[-1]}.py", module, expected, parts, **config)


floats("mxfp4", 30, FloatQuantLinear, MXFP4QuantLinear, 32, 4, "mx_fp", "auto_round:llm_compressor")
floats("mxfp8", 31, FloatQuantLinear, MXFP8QuantLinear, 32, 8, "mx_fp", "auto_round:llm_compressor")
floats("nvfp4", 32, FloatQuantLinear, NVFP4QuantLinear, 16, 4, "nv_fp", "auto_round:llm_compressor")
floats("mxint4", 33, MXIntQuantLinear, MXINT4QuantLinear, 32, 4, "mx_int", "auto_round")
floats("nvfp4_v2", 34, FloatQuantLinear, NVFP4E5M3QuantLinear, 16, 4, "nvfp4_v2", "auto_round:llm_compressor_nvfp4_e5m3")


def fp8(name, seed, group, data_type="fp"):
    draw = torch.Generator().manual_seed(seed)
    model = torch.nn.Module()
    model.dtype = torch.bfloat16
    model.layer = torch.nn.Linear(K, N, bias=False)
    model.layer.weight.data = torch.randn(N, K, generator=draw)
    weight = model.layer.weight.data
    if isinstance(group, tuple):
        amax = weight.view(N // group[0], group[0], K // group[1], group[1]).abs().amax((1, 3))
    else:
        amax = weight.abs().max().reshape(1) if group == 0 else weight.view(N, -1, K if group == -1 else group).abs().amax(-1)
    top = 57344.0 if "e5m2" in data_type else 448.0
    layer = types.SimpleNamespace(group_size=group, scale=amax / top, zp=None, bits=8, act_bits=16, data_type=data_type)
    for key, value in vars(layer).items():
        setattr(model.layer, key, value)
    pack_fp8("layer", model, data_type, device="cpu")
    module = model.layer
    scale = module.weight_scale_inv if isinstance(group, tuple) else module.weight_scale
    if group == -1:
        runner = WeightFP8ActFP8StaticQuantLinear(K, N, weight=module.weight.data, weight_scale=scale)
        expected = runner.dequant_weight_online()
    else:
        rows, columns = group if isinstance(group, tuple) else (N, K) if group == 0 else (1, group)
        spread = scale.double().reshape(N // rows, K // columns).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        expected = (module.weight.data.double() * spread).to(torch.bfloat16)
    parts = ("weight", "weight_scale_inv" if isinstance(group, tuple) else "weight_scale")
    size = list(group) if isinstance(group, tuple) else group
    config = {"bits": 8, "group_size": size, "sym": True, "data_type": data_type, "fmt": "e5m2" if "e5m2" in data_type else "e4m3"}
    add(name, "export_to_fp8.py", module, expected, parts, **config)


fp8("fp8_row", 40, -1)
fp8("fp8_tensor", 41, 0)
fp8("fp8_group", 42, 32)
fp8("fp8_block", 43, (16, 32))
fp8("fp8_e5m2_row", 44, -1, "fp8_e5m2")

versions = {"auto_round": "0.16.1", "torch": torch.__version__}
path = Path(__file__).with_name("auto_round.safetensors")
save_file(tensors, path, {"versions": json.dumps(versions), "cases": json.dumps(cases)})
print(path, path.stat().st_size, len(cases))
