"""Golden tensors of GPT-OSS MXFP4: blocks and scales, and what transformers makes of them.

    python conformance/golden/make_mxfp4.py

The packer of GPT-OSS (triton_kernels) needs a GPU, so the tensors are made of bytes: every pair of codes, every scale but NaN.
transformers.integrations.mxfp4.convert_moe_packed_tensors decodes them ("expected", which it returns transposed: (e, k, n)).
"""

import json
import pathlib

import torch
import transformers
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors


def main():
    generator = torch.Generator().manual_seed(0)
    tensors, cases = {}, {}
    # name -> (e, n, k), lowest scale, highest scale + 1, dtype of the result
    for name, (shape, low, high, dtype) in {
        "gate_up": ((3, 16, 64), 110, 130, torch.bfloat16),
        "down": ((2, 24, 96), 100, 140, torch.bfloat16),
        "every_scale": ((1, 255, 32), 0, 255, torch.float32),
        "every_scale_bf16": ((1, 255, 32), 0, 255, torch.bfloat16),
    }.items():
        e, n, k = shape
        blocks = torch.randint(0, 256, (e, n, k // 32, 16), generator=generator, dtype=torch.uint8)
        blocks.view(-1)[:256] = torch.arange(256).to(torch.uint8)
        scales = torch.randint(low, high, (e, n, k // 32), generator=generator, dtype=torch.uint8)
        if name.startswith("every"):
            scales = torch.arange(255).to(torch.uint8).reshape(1, 255, 1)
        tensors[f"{name}/blocks"], tensors[f"{name}/scales"] = blocks, scales.contiguous()
        tensors[f"{name}/expected"] = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
        cases[name] = {"config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}}
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    path = pathlib.Path(__file__).with_name("mxfp4.safetensors")
    save_file(tensors, path, metadata={"versions": json.dumps(versions), "cases": json.dumps(cases)})


if __name__ == "__main__":
    main()
