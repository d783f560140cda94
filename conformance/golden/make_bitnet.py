"""Golden tensors of BitNet, made by transformers' own code.

    TORCH_COMPILE_DISABLE=1 python conformance/golden/make_bitnet.py

transformers.integrations.bitnet.pack_weights packs. What is expected comes from its layers, in float32: of bitlinear,
unpack_weights and BitLinear.post_quant_process with an input scale of 1; of autobitlinear, AutoBitLinear's forward pass of the
identity, whose rows its 8-bit activations hold exactly.
"""

import json
import pathlib

import torch
import transformers
from safetensors.torch import save_file
from transformers.integrations.bitnet import AutoBitLinear, BitLinear, pack_weights, unpack_weights


def main():
    generator = torch.Generator().manual_seed(0)
    tensors, cases = {}, {}
    # name -> n, k, linear_class, dtype of weight_scale
    for name, (n, k, linear_class, dtype) in {
        "bitlinear": (24, 40, "bitlinear", torch.bfloat16),
        "bitlinear_fp16": (8, 33, "bitlinear", torch.float16),
        "bitlinear_fp32": (4, 16, "bitlinear", torch.float32),
        "autobitlinear": (24, 40, "autobitlinear", torch.bfloat16),
        "autobitlinear_fp32": (12, 7, "autobitlinear", torch.float32),
    }.items():
        values = torch.randint(-1, 2, (n, k), generator=generator)
        packed = pack_weights(values.clone().to(torch.int8))  # adds 1 to its argument, in place
        scale = (torch.rand(1, generator=generator) * 3 + 0.1).to(dtype)
        unpacked = unpack_weights(packed, torch.float32)
        assert torch.equal(unpacked, values.float())
        if linear_class == "bitlinear":
            layer = BitLinear(k, n, bias=False, dtype=torch.float32)
            expected = layer.post_quant_process(unpacked, torch.ones(()), scale)
        else:
            layer = AutoBitLinear(k, n, bias=False, dtype=torch.float32)
            layer.weight.data.copy_(unpacked)
            layer.weight_scale = scale
            expected = layer(torch.eye(k)).T.contiguous().detach()
        tensors |= {f"{name}/weight": packed, f"{name}/weight_scale": scale, f"{name}/expected": expected}
        config = {"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": "offline", "modules_to_not_convert": None}
        cases[name] = {"config": config}
    cases["bitlinear"]["config"] = {
        "modules_to_not_convert": ["lm_head"],
        "quant_method": "bitnet",
    }  # as HF1BitLLM's and Falcon3's files have it
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    path = pathlib.Path(__file__).with_name("bitnet.safetensors")
    save_file(tensors, path, metadata={"versions": json.dumps(versions), "cases": json.dumps(cases)})


if __name__ == "__main__":
    main()
