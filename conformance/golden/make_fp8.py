"""Golden vectors of quant_method "fp8" and "fbgemm_fp8", by transformers' own quantizers and dequantizers (5.23, on a CPU).

    python conformance/golden/make_fp8.py

fp8: Fp8Quantize and Fp8Dequantize of integrations/finegrained_fp8.py, and its _dequantize_fp8_weight where a block is partial (the
former derives the blocks' size from the scales' shape and is wrong there). The fp4 experts of DeepSeek-V4 have no quantizer in
transformers: their bytes are random, and Fp8Dequantize says what they mean. fbgemm_fp8: FbgemmFp8Quantize of
integrations/fbgemm_fp8.py lays out the tensors; the GPU kernel that it calls is a function of five lines here, and what is
expected comes from torch._scaled_mm of the identity, which FbgemmFp8Linear and its experts call.
"""

import json
import pathlib
import sys
import types

import torch
import transformers
from safetensors.torch import save_file
from transformers import FineGrainedFP8Config
from transformers.integrations import fbgemm_fp8
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize, _dequantize_fp8_weight

FILE = pathlib.Path(__file__).with_name("fp8.safetensors")


def weight(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantizer(**config):
    return types.SimpleNamespace(quantization_config=FineGrainedFP8Config(**config))


def fp8(w, key="weight", scale=None, partial=False, **config):
    """Parts, expected and config of a layer as transformers quantizes it; the scale by another name or dtype where `scale` says so."""
    hf = quantizer(**config)
    padded = w
    if partial:  # its quantizer takes whole blocks only
        bn, bk = config["weight_block_size"]
        padded = torch.nn.functional.pad(w, (0, -w.shape[-1] % bk, 0, -w.shape[-2] % bn))
    data, scales = Fp8Quantize(hf)._quantize_one(key, padded).values()
    data = data[..., : w.shape[-2], : w.shape[-1]].contiguous()
    name, dtype = scale or ("weight_scale_inv", scales.dtype)
    scales = scales.view(dtype) if dtype == torch.uint8 else scales.to(dtype)
    if partial:
        expected = _dequantize_fp8_weight(data, scales, config["weight_block_size"], torch.float32)
    else:
        expected = Fp8Dequantize(hf)._dequantize_one(data, scales)
    stored = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"} | config
    return {"weight": data, name: scales}, expected, stored


def fp4_experts():
    generator = torch.Generator().manual_seed(9)
    data = torch.randint(-128, 128, (6, 48), generator=generator, dtype=torch.int8)
    data[0, :16] = torch.arange(-128, 128, 17, dtype=torch.int32).to(torch.int8)  # all codes
    scales = torch.randint(100, 140, (6, 3), generator=generator, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    config = {"scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    expected = Fp8Dequantize(quantizer(**config, expert_dtype="fp4"))._dequantize_one(data, scales)
    return {"weight": data, "scale": scales}, expected, {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"} | config


def per_row(x, *_):
    scale = x.float().abs().amax(-1) / torch.finfo(torch.float8_e4m3fn).max
    return (x / scale[:, None]).to(torch.float8_e4m3fn), scale


def fbgemm(w, name):
    """A linear layer (n, k) as "weight", or the experts of Llama 4 (e, k, n) as "gate_up_proj" or "down_proj"."""
    fbgemm_fp8.quantize_fp8_per_row = per_row
    module = torch.nn.Linear(1, 1) if name == "weight" else object.__new__(fbgemm_fp8.FbgemmFp8Llama4TextExperts)
    fbgemm_fp8.get_module_from_name = lambda model, key: (module, name)
    data, scale = fbgemm_fp8.FbgemmFp8Quantize(None).convert({name: [w]}).values()
    data, scale = data.data.contiguous(), scale.data.contiguous()
    rows = [data] if name == "weight" else [expert.T.contiguous() for expert in data]
    scales = [scale] if name == "weight" else [expert.reshape(-1, 1) for expert in scale]
    expected = [product(row, s) for row, s in zip(rows, scales, strict=True)]
    config = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    return {"weight": data, "weight_scale": scale}, expected[0] if name == "weight" else torch.stack(expected), config


def product(data, scale):
    """The identity times the layer, in bfloat16, transposed back."""
    eye, one = torch.eye(data.shape[1]).to(torch.float8_e4m3fn), torch.ones(data.shape[1], 1)
    return torch._scaled_mm(eye, data.t(), scale_a=one, scale_b=scale.t(), out_dtype=torch.bfloat16).T.contiguous()


def cases():
    block = {"weight_block_size": [16, 32]}
    yield "block", fp8(weight(1, 32, 96), **block)
    yield "block_bf16_scale", fp8(weight(2, 32, 96), scale=("weight_scale_inv", torch.bfloat16), **block)
    yield "block_partial", fp8(weight(3, 24, 80), partial=True, **block)
    yield "block_ue8m0", fp8(weight(4, 32, 96), scale=("scale", torch.float8_e8m0fnu), scale_fmt="ue8m0", **block)
    yield "block_ue8m0_bytes", fp8(weight(5, 32, 96), scale=("weight_scale_inv", torch.uint8), scale_fmt="ue8m0", weight_block_size=[1, 32])
    yield "block_ue8m0_fp32", fp8(weight(6, 32, 96), scale=("weight_scale_inv", torch.float32), scale_fmt="ue8m0", **block)
    yield "block_32x32", fp8(weight(7, 64, 64), scale=("scale", torch.float8_e8m0fnu), scale_fmt="ue8m0", weight_block_size=[32, 32])
    yield "block_silent", fp8(weight(8, 256, 128), scale=("weight_scale_inv", torch.bfloat16))
    parts, expected, config = fp8(weight(9, 16, 48), weight_block_size=None, activation_scheme="static")
    parts = {"weight": parts["weight"], "weight_scale_inv": parts["weight_scale_inv"].reshape(()), "activation_scale": torch.tensor(0.5)}
    yield "tensor_static", (parts, expected, config)
    yield "stack", fp8(weight(10, 3, 32, 64), key="experts.gate_up_proj", **block)
    yield "fp4_experts", fp4_experts()
    yield "fbgemm", fbgemm(weight(11, 16, 48), "weight")
    yield "fbgemm_gate_up", fbgemm(weight(12, 2, 48, 32), "gate_up_proj")
    yield "fbgemm_down", fbgemm(weight(13, 2, 32, 48), "down_proj")


def main():
    tensors, configs = {}, {}
    for name, (parts, expected, config) in cases():
        tensors |= {f"{name}/{part}": tensor.data.clone().contiguous() for part, tensor in (parts | {"expected": expected}).items()}
        configs[name] = {"config": config}
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    save_file(tensors, FILE, {"versions": json.dumps(versions), "cases": json.dumps(configs)})
    print(f"{len(configs)} cases, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
