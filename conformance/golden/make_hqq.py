"""Golden vectors of HQQ: HQQLinear quantizes on the CPU, writes its safetensors state dict and dequantizes.

    pip download --no-deps --no-binary :all: hqq==0.2.8.post1 && tar xzf hqq-0.2.8.post1.tar.gz
    PYTHONPATH=hqq-0.2.8.post1 python conformance/golden/make_hqq.py

hqq imports termcolor (colours of its warnings), which a stub stands in for; everything else is hqq's own code.
"""

import importlib.metadata
import json
import pathlib
import sys
import types

import torch
from safetensors.torch import save_file

sys.modules.setdefault("termcolor", types.SimpleNamespace(colored=lambda text, *_, **__: text))
from hqq.core.quantize import HQQLinear, hqq_base_quant_config  # noqa: E402

CASES = {
    # name: (shape, nbits, group_size, axis, dtype, view_as_float)
    **{f"b{str(b).replace('.', '_')}_axis1": ((16, 128), b, 64, 1, "float16", False) for b in (8, 6, 5, 4, 3, 2, 1.58, 1)},
    **{f"b{b}_axis0": ((32, 48), b, 16, 0, "bfloat16", False) for b in (8, 4, 3, 2, 1)},
    "b3_padded": ((7, 64), 3, 32, 1, "bfloat16", False),
    "b4_fp32": ((8, 64), 4, 32, 1, "float32", False),
    "b4_row": ((8, 64), 4, None, 1, "bfloat16", False),
    "b4_column": ((16, 24), 4, None, 0, "float16", False),
    "b4_across_rows": ((16, 48), 4, 64, 1, "bfloat16", False),
    "b4_as_float": ((16, 64), 4, 32, 1, "bfloat16", True),
    "b2_as_float": ((16, 64), 2, 32, 1, "float32", True),
    "b3_as_float": ((16, 64), 3, 32, 1, "float16", True),
}


def main():
    torch.manual_seed(0)
    tensors, cases = {}, {}
    for name, (shape, nbits, size, axis, dtype, as_float) in CASES.items():
        config = hqq_base_quant_config(nbits=nbits, group_size=size, axis=axis, view_as_float=as_float)
        linear = torch.nn.Linear(shape[1], shape[0], bias=False)
        linear.weight.data = torch.randn(shape) * torch.logspace(-2, 1, shape[0])[:, None]
        layer = HQQLinear(linear, config, compute_dtype=getattr(torch, dtype), device="cpu")
        tensors |= {f"{name}/{part}": t.detach().clone().contiguous() for part, t in layer.state_dict().items()}
        tensors[f"{name}/expected"] = layer.dequantize().detach().clone()
        config["weight_quant_params"]["group_size"] = size
        cases[name] = {
            "config": {"quant_method": "hqq", "quant_config": config, "skip_modules": ["lm_head"]},
            "options": {"axis": axis, "group_size": size, "view_as_float": as_float},
        }
    try:
        version = importlib.metadata.version("hqq")
    except importlib.metadata.PackageNotFoundError:
        import hqq

        version = hqq.__version__
    path = pathlib.Path(__file__).with_name("hqq.safetensors")
    save_file(tensors, path, {"versions": json.dumps({"hqq": version, "torch": torch.__version__}), "cases": json.dumps(cases)})
    print(path, path.stat().st_size, version)


if __name__ == "__main__":
    main()
