"""Golden vectors of torchao: its own classes quantize, are taken apart by its own safetensors code, and dequantize.

    pip install --no-deps --target site_torchao torchao==0.18.0
    pip download --no-deps fbgemm-gpu-genai==1.9.0, of which fbgemm_gpu/experimental/gen_ai/quantize.py is put into site_fbgemm
    PYTHONPATH=site_torchao:site_fbgemm python conformance/golden/make_torchao.py

Int4Tensor quantizes with int4_row_quantize_zp and pack_int4 of MSLK, whose wheels need CUDA; the same functions of FBGEMM, where
MSLK has them from, are put in their place (Triton's quantize_fp8_row, which that file imports, is not called). It has no
dequantize: expected is torchao's _dequantize_affine_tinygemm in float32, of the values as int4_row_quantize_zp returned them. Int4TilePackedTo4dTensor
is packed by a CUDA kernel (_convert_weight_to_int4pack): its cases are made where there is a GPU, and kept in
torchao_cuda.safetensors.
"""

import importlib
import json
import pathlib
import sys
import types

import torch
import torchao
from safetensors.torch import save_file
from torchao.core.config import config_to_dict
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Float8Tensor,
    Float8WeightOnlyConfig,
    Int4Tensor,
    Int4WeightOnlyConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    MappingType,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
)
from torchao.quantization.quant_primitives import _dequantize_affine_tinygemm

SYMMETRIC, ASYMMETRIC = MappingType.SYMMETRIC, MappingType.ASYMMETRIC


def weight(*shape, dtype=torch.bfloat16):
    return (torch.randn(shape) * torch.logspace(-2, 1, shape[-2])[:, None]).to(dtype)


def intx(bits, block, mapping, w):
    return IntxUnpackedToInt8Tensor.from_hp(w, block, getattr(torch, f"int{bits}"), mapping_type=mapping)


def cases():
    """(name, tensor, config)."""
    int8, float8 = Int8WeightOnlyConfig(version=2), Float8WeightOnlyConfig()
    yield "int8_row", Int8Tensor.from_hp(weight(24, 64), PerRow()), int8
    yield "int8_tensor_fp32", Int8Tensor.from_hp(weight(24, 64, dtype=torch.float32), PerTensor()), int8
    yield "int8_group_fp16", Int8Tensor.from_hp(weight(24, 64, dtype=torch.float16), PerGroup(32)), int8
    yield "int8_row_asym", Int8Tensor.from_hp(weight(24, 64) + 1, PerRow(), mapping_type=ASYMMETRIC), int8
    yield "int8_experts", Int8Tensor.from_hp(weight(3, 8, 32), PerRow()), int8
    for bits in range(1, 9):
        config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(32))
        if bits > 1:
            yield f"intx{bits}_sym", intx(bits, (1, 32), SYMMETRIC, weight(8, 64)), config
        yield f"intx{bits}_asym", intx(bits, (1, 32), ASYMMETRIC, weight(8, 64, dtype=torch.float32) + 0.5), config
    yield "float8_row", Float8Tensor.from_hp(weight(24, 64), granularity=PerRow()), float8
    yield "float8_tensor", Float8Tensor.from_hp(weight(24, 64), granularity=PerTensor()), float8
    yield "float8_block", Float8Tensor.from_hp(weight(32, 64), granularity=PerBlock([16, 32])), float8
    yield "float8_e5m2", Float8Tensor.from_hp(weight(8, 64), float8_dtype=torch.float8_e5m2, granularity=PerRow()), float8
    yield "float8_experts", Float8Tensor.from_hp(weight(3, 8, 32), granularity=PerRow()), float8
    for name, element in (
        ("mxfp8", torch.float8_e4m3fn),
        ("mxfp8_e5m2", torch.float8_e5m2),
        ("mxfp6_e2m3", "fp6_e2m3"),
        ("mxfp6_e3m2", "fp6_e3m2"),
        ("mxfp4", torch.float4_e2m1fn_x2),
    ):
        yield name, MXTensor.to_mx(weight(8, 64), element, 32, ScaleCalculationMode.RCEIL), None
    yield "mxfp8_swizzled", MXTensor.to_mx(weight(136, 160), torch.float8_e4m3fn, 32, is_swizzled_scales=True), None
    w = weight(40, 96)
    second = per_tensor_amax_to_scale(w.abs().max())
    yield "nvfp4", NVFP4Tensor.to_nvfp4(w, per_tensor_scale=second), None
    yield "nvfp4_one_level", NVFP4Tensor.to_nvfp4(w), None
    yield "nvfp4_swizzled", NVFP4Tensor.to_nvfp4(weight(136, 96), per_tensor_scale=second, is_swizzled_scales=True), None
    w = weight(3, 8, 64)
    yield "nvfp4_experts", NVFP4Tensor.to_nvfp4(w, per_tensor_scale=per_tensor_amax_to_scale(w.abs().amax((1, 2), keepdim=True))), None
    for name, w, size in (
        ("int4", weight(24, 128), 32),
        ("int4_partial", weight(8, 80, dtype=torch.float16), 32),
        ("int4_experts", weight(3, 8, 64), 64),
    ):
        yield name, Int4Tensor.from_hp(w, [1] * (w.dim() - 1) + [size]), Int4WeightOnlyConfig(group_size=size)


def fbgemm():
    """Puts FBGEMM's functions where Int4Tensor expects MSLK's."""
    for name in ("fbgemm_gpu", "fbgemm_gpu.experimental", "fbgemm_gpu.experimental.gemm", "fbgemm_gpu.experimental.gemm.triton_gemm"):
        sys.modules.setdefault(name, types.ModuleType(name))
    uncalled = types.ModuleType("fp8_gemm")
    uncalled.quantize_fp8_row = None
    sys.modules["fbgemm_gpu.experimental.gemm.triton_gemm.fp8_gemm"] = uncalled
    import quantize

    module = sys.modules["torchao.quantization.quantize_.workflows.int4.int4_tensor"]
    values = []

    def remember(w, size):
        found = quantize.int4_row_quantize_zp(w, size)
        values.append(found[0])
        return found

    module.int4_row_quantize_zp, module.pack_int4 = remember, quantize.pack_int4
    return values


def expected(tensor, values):
    if not isinstance(tensor, Int4Tensor):
        return tensor.dequantize()
    q, size = torch.stack(values).reshape(tensor.shape), tensor.block_size[-1]
    pad = -tensor.shape[-1] % size
    q = torch.nn.functional.pad(q, (0, pad))
    scale, zero = tensor.scale.mT.contiguous(), tensor.zero_point.mT.contiguous()
    block = [1] * (q.dim() - 1) + [size]
    w = _dequantize_affine_tinygemm(q, block, scale.float(), zero.float(), torch.int8, -8, 7, output_dtype=torch.float32)
    return w[..., : tensor.shape[-1]]


def main():
    torch.manual_seed(0)
    values = fbgemm()
    tensors, described = {}, {}
    for name, tensor, config in cases():
        flat, metadata = flatten_tensor_state_dict({"layer.weight": tensor})
        tensors |= {f"{name}/{key.removeprefix('layer.')}": t.contiguous() for key, t in flat.items()}
        tensors[f"{name}/expected"] = expected(tensor, values).contiguous()
        values.clear()
        quant_type = None if config is None else {"default": config_to_dict(config)}
        described[name] = {"config": {"quant_method": "torchao", "quant_type": quant_type}, "metadata": metadata}
    versions = {"torchao": torchao.__version__, "fbgemm-gpu-genai": "1.9.0", "torch": torch.__version__}
    path = pathlib.Path(__file__).with_name("torchao.safetensors")
    save_file(tensors, path, {"versions": json.dumps(versions), "cases": json.dumps(described)})
    print(path, path.stat().st_size)
    if torch.cuda.is_available():
        tiles(versions)


def tiles(versions):
    """What needs the CUDA kernel; expected is torchao's _dequantize_affine_tinygemm of the codes before packing, in float32."""
    # torchao.quantization has a function named like this package.
    module = importlib.import_module("torchao.quantization.quantize_.workflows.int4.int4_tile_packed_to_4d_tensor")

    seen = {}
    quantize = module._quantize_affine_tinygemm

    def remember(w, block, scale, zero, *args, **kwargs):
        seen.update(codes=quantize(w, block, scale, zero, *args, **kwargs), block=block, scale=scale, zero=zero)
        return seen["codes"]

    module._quantize_affine_tinygemm = remember
    tensors, described = {}, {}
    for name, w, size in (("tiles", weight(16, 1024), 128), ("tiles_padded", weight(12, 640), 32)):
        tensor = module.Int4TilePackedTo4dTensor.from_hp(w.cuda(), [1, size])
        flat, metadata = flatten_tensor_state_dict({"layer.weight": tensor})
        w32 = _dequantize_affine_tinygemm(
            seen["codes"], seen["block"], seen["scale"].float(), seen["zero"].float(), torch.int32, 0, 15, output_dtype=torch.float32
        )
        tensors |= {f"{name}/{key.removeprefix('layer.')}": t.cpu().contiguous() for key, t in flat.items()}
        tensors[f"{name}/expected"] = w32[: w.shape[0], : w.shape[1]].cpu().contiguous()
        described[name] = {"config": {"quant_method": "torchao", "quant_type": None}, "metadata": metadata}
    path = pathlib.Path(__file__).with_name("torchao_cuda.safetensors")
    save_file(tensors, path, {"versions": json.dumps(versions), "cases": json.dumps(described)})
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
