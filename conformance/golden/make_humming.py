"""Makes humming.safetensors: layers as humming-kernels' schema checks and dequantizes them.

Run with humming-kernels 0.1.19 and ml_dtypes installed, and PYTHONPATH on a folder with auto_round 0.16.1 (the wheel, unpacked):

    PYTHONPATH=auto_round-site python conformance/golden/make_humming.py

Humming packs, unpacks and decodes on a GPU only. What runs here of it is HummingWeightSchema (from_config, validate_tensors,
dequant_tensors) and dequantize_weight, on the CPU, with three stand-ins: AutoRound's pack_bitstream and unpack_bitstream, which
it documents as Humming's layout, for ops.pack_weight and ops.unpack_weight, and ml_dtypes for ops.dequant_weight.
"""

import importlib
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import save_file

os.environ["HUMMING_DISABLE_PARALLEL_BUILD"] = "1"
from humming import ops
from humming.schema import HummingWeightSchema

source = importlib.util.find_spec("auto_round").submodule_search_locations[0]
spec = importlib.util.spec_from_file_location("bit_packing", Path(source) / "utils" / "bit_packing.py")
bit_packing = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bit_packing)

FLOATS = {(2, 1): "float4_e2m1fn", (3, 2): "float6_e3m2fn", (2, 3): "float6_e2m3fn", (4, 3): "float8_e4m3fn", (5, 2): "float8_e5m2"}


def decode(codes, exponent_bits, mantissa_bits, is_signed):
    values = codes.numpy().astype(np.uint8).view(getattr(ml_dtypes, FLOATS[exponent_bits, mantissa_bits]))
    return torch.from_numpy(values.astype(np.float32))


ops.unpack_weight = lambda words, bits: bit_packing.unpack_bitstream(words, bits, dim=-1)
ops.dequant_weight = decode
torch.Tensor.cuda = lambda self: self

N, K = 32, 64
tensors, cases = {}, {}


def add(name, seed, b_dtype, group=0, group_n=0, scale="bfloat16", zero=None, scale_2="none", kind=None, lead=()):
    kind = kind or ("block" if group_n else "group" if group else "channel")
    config = {
        "quant_method": "humming", "b_dtype": b_dtype, "bs_dtype": scale, "weight_scale_group_size": group,
        "weight_scale_group_size_n": group_n, "weight_scale_type": kind, "weight_scale_2_type": scale_2,
        "has_zero_point": zero is not None, "is_fp_zero_point": zero == "float",
    }  # fmt: skip
    schema = HummingWeightSchema.from_config(config)
    draw = torch.Generator().manual_seed(seed)
    bits = schema.b_dtype.num_bits
    codes = torch.randint(0, 2**bits, (*lead, N, K), generator=draw)
    if b_dtype in ("float8e4m3", "float8e5m2"):
        codes %= 120  # no NaN, no inf
    parts = {}
    dtype = torch.float16 if scale == "float16" else torch.bfloat16
    for part, about in schema.get_tensors_attrs(N, K, dtype, lead[0] if lead else None).items():
        shape = about["shape"]
        if part == "weight":
            parts[part] = bit_packing.pack_bitstream(codes, bits, dim=-1)
        elif part == "zero_point" and zero == "int":
            zeros = torch.randint(0, 2**bits, (*lead, N, shape[-1]), generator=draw)
            parts[part] = bit_packing.pack_bitstream(zeros, bits, dim=-2).contiguous()
        elif part == "zero_point":
            parts[part] = (torch.randint(0, 4 * 2**bits, shape, generator=draw) / 4).to(about["dtype"])
        else:
            parts[part] = ((0.5 + torch.rand(shape, generator=draw)) / 16).to(about["dtype"])
    schema.validate_tensors(parts, N, K, dtype, lead[0] if lead else None)
    for part, tensor in parts.items():
        tensors[f"{name}/{part}"] = tensor
    tensors[f"{name}/expected"] = schema.dequant_tensors(parts)
    cases[name] = {"made_by": "humming-kernels 0.1.19 schema/humming.py, utils/weight.py", "config": config}


add("uint1_g64", 1, "uint1", 64)
add("uint2_g32", 2, "uint2", 32)
add("int4_g32_fp16", 3, "int4", 32, scale="float16")
add("uint3_zero", 4, "uint3", 32, zero="int")
add("uint4_zero_channel", 5, "uint4", zero="int")
add("uint5_float_zero", 6, "uint5", 32, zero="float")
add("uint8_channel_tensor", 7, "uint8", scale_2="tensor")
add("uint7_group_channel", 8, "uint7", 32, scale_2="channel")
add("fp8_block", 9, "float8e4m3", 32, group_n=16, scale="float32")
add("fp8_tensor", 10, "float8e5m2", scale="float32", kind="tensor")
add("fp6_e3m2", 11, "float6e3m2", 64, scale="float16")
add("fp6_e2m3", 12, "float6e2m3")
add("mxfp4", 13, "float4e2m1", 32, scale="float8e8m0")
add("nvfp4", 14, "float4e2m1", 16, scale="float8e4m3", scale_2="tensor")
add("experts", 15, "uint4", 32, zero="int", lead=(2,))
add("experts_tensor", 16, "float4e2m1", 16, scale="float8e4m3", scale_2="tensor", lead=(2,))

versions = {"humming-kernels": "0.1.19", "auto_round": "0.16.1", "ml_dtypes": ml_dtypes.__version__, "torch": torch.__version__}
path = Path(__file__).with_name("humming.safetensors")
save_file(tensors, path, {"versions": json.dumps(versions), "cases": json.dumps(cases)})
print(path, path.stat().st_size, len(cases))
