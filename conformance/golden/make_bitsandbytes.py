"""Golden vectors of bitsandbytes: its own modules quantize, write their state dict and dequantize.

    pip install --no-deps --target site_bitsandbytes bitsandbytes==0.50.2
    PYTHONPATH=site_bitsandbytes python conformance/golden/make_bitsandbytes.py

4 bits: Linear4bit.state_dict() and functional.dequantize_4bit. Where rows are no multiple of the blocksize, the compiled CPU kernel
of 0.50.2 starts a block at every row, but the quantizer, the GPU kernels and the "default" backend run blocks through; there the
expected weight is the default backend's. 8 bits: Linear8bitLt.state_dict() and functional.int8_vectorwise_dequant.
"""

import json
import pathlib

import bitsandbytes as bnb
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from safetensors.torch import save_file

CASES = {
    # name: (shape, quant_type, blocksize, double quantization, dtype, quant_storage)
    "nf4": ((24, 128), "nf4", 64, False, "bfloat16", "uint8"),
    "nf4_fp32": ((24, 128), "nf4", 64, False, "float32", "uint8"),
    "fp4": ((24, 128), "fp4", 64, False, "float16", "uint8"),
    "nf4_b128_storage_bf16": ((24, 256), "nf4", 128, False, "bfloat16", "bfloat16"),
    "fp4_b32_storage_fp32": ((24, 64), "fp4", 32, False, "bfloat16", "float32"),
    "nf4_double": ((160, 128), "nf4", 64, True, "bfloat16", "uint8"),
    "fp4_double": ((40, 64), "fp4", 64, True, "float32", "uint8"),
    "nf4_rows_in_blocks": ((41, 32), "nf4", 64, False, "float16", "uint8"),
    "nf4_blocks_across_rows": ((17, 96), "nf4", 64, False, "float32", "uint8"),
    "nf4_double_across_rows": ((33, 272), "nf4", 64, True, "bfloat16", "uint8"),
    "fp4_odd": ((5, 33), "fp4", 64, False, "float32", "uint8"),
}


def linear4bit(shape, quant_type, blocksize, double, dtype, storage):
    dtype = getattr(torch, dtype)
    layer = bnb.nn.Linear4bit(
        shape[1], shape[0], bias=False, compress_statistics=double, quant_type=quant_type, quant_storage=getattr(torch, storage)
    )
    weight = torch.randn(shape, dtype=dtype) * torch.logspace(-2, 1, shape[0], dtype=dtype)[:, None]
    layer.weight = bnb.nn.Params4bit(weight, False, None, blocksize, double, quant_type, getattr(torch, storage), layer)
    layer = layer.to("cpu")
    parts = {name: t.clone() for name, t in layer.state_dict().items()}
    return parts, dequantized(layer.weight.data, layer.weight.quant_state)


def dequantized(data, state):
    if state.shape[-1] % state.blocksize == 0:
        return bnb.functional.dequantize_4bit(data, state)
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    compute = getattr(_dequantize_4bit_compute, "__wrapped__", _dequantize_4bit_compute)
    return compute(data.view(torch.uint8).reshape(-1), absmax, state.code, state.blocksize, state.shape, state.dtype)


def main():
    torch.manual_seed(0)
    tensors, cases = {}, {}
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "llm_int8_skip_modules": ["lm_head"]}
    for name, case in CASES.items():
        parts, expected = linear4bit(*case)
        tensors |= {f"{name}/{part}": t.contiguous() for part, t in parts.items()} | {f"{name}/expected": expected.contiguous()}
        _, quant_type, blocksize, double, dtype, storage = case
        cases[name] = {
            "config": config
            | {"bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": double}
            | {"bnb_4bit_compute_dtype": dtype, "bnb_4bit_quant_storage": storage},
            "options": {"blocksize": blocksize, "dtype": dtype, "quant_storage": storage},
        }

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.randn(3, 16, 64, dtype=torch.bfloat16))

    experts = Experts()
    replace_parameter_4bit(experts, "gate_up_proj", quant_type="nf4")
    state = experts.state_dict()
    tensors |= {f"experts/{name.replace('gate_up_proj', 'weight', 1)}": t.clone() for name, t in state.items()}
    tensors["experts/expected"] = experts.gate_up_proj.detach().clone().contiguous()
    cases["experts"] = {"config": cases["nf4"]["config"], "options": {"blocksize": 64}, "names": sorted(state)}

    layer = bnb.nn.Linear8bitLt(96, 24, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(torch.randn(24, 96, dtype=torch.float16), requires_grad=False)
    layer = layer.to("cpu")
    state = layer.state_dict()
    tensors |= {f"int8/{name}": t.clone() for name, t in state.items()}
    tensors["int8/expected"] = bnb.functional.int8_vectorwise_dequant(state["weight"], state["SCB"])
    cases["int8"] = {"config": {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}, "options": {}}

    versions = {"bitsandbytes": bnb.__version__, "torch": torch.__version__}
    path = pathlib.Path(__file__).with_name("bitsandbytes.safetensors")
    save_file(tensors, path, {"versions": json.dumps(versions), "cases": json.dumps(cases)})
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
