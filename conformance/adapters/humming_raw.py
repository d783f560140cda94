"""humming-kernels' own layer with its own choice of tiles, as its README shows it: HummingLayer, load, transform, call. CUDA only.

`fast` uses the same kernels with choices that round once and repeat; this is what they do by default, stream-K included. n and k are padded
by the layer to multiples of PAD. Only the kernel for the m at hand is compiled, not the whole table.

Source: humming-kernels 0.1.19, layer.py, schema/humming.py, forward.py.
"""

import torch

from ref.element import NAMED, Int
from ref.format import parse_format
from ref.layouts import humming as layout

from . import exactly, need, package, plain, version_of, written

DISTRIBUTION = "humming-kernels"
__version__ = version_of(DISTRIBUTION)

FORMATS = ("int4_g128_bf16", "int8", "uint4z_g128", "fp8", "mxfp4", "nvfp4", "fp8_e4m3_b128x128", "fp6_e3m2", "int2_g64")
VARIANTS = {"linear": ("exact", "weight_rounded")}

PAD, ROWS = 128, 8
INPUTS = {Int(8): "int8", NAMED["e4m3"]: "float8e4m3"}
MODES = {(1, 0): "dynamic_token", (0, 0): "static_tensor"}


def linear(x, w, bias=None, *, x_format=None, x_scale=None):
    need(__version__ is None or x.is_cuda, "Humming runs on CUDA only")
    layers = package("humming.layer", DISTRIBUTION)
    need(x.dtype in (torch.float16, torch.bfloat16) and x.numel() and w.shape[0], "Humming takes float16 or bfloat16, and no empty x")
    plain(w, "Humming")
    step = ROWS if x_format is None else 2 * ROWS
    need(w.shape[0] % ROWS == 0 and w.shape[1] % step == 0, f"Humming takes n as a multiple of {ROWS} and k of {step}: rows of 16 bytes")
    parts = written(layout, w)
    for name in ("weight_scale", "zero_point", "weight_scale_2"):
        kept = parts.get(name)
        if kept is not None and kept.dtype in (torch.float32, torch.float16, torch.bfloat16) and not _float32(w.format, name):
            parts[name] = exactly(kept, x.dtype, f"Humming's {name}s")
    config = layout.config_of(w)
    if w.format.scale in ("fp32", "fp16", "bf16") and not _float32(w.format, "weight_scale"):
        config["bs_dtype"] = "bfloat16" if x.dtype == torch.bfloat16 else "float16"
    inputs = {} if x_format is None else _input(parse_format(x_format), x_scale, parts, x.device)
    if bias is not None:
        parts["bias"] = exactly(bias, x.dtype, "Humming's bias")
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    with torch.cuda.device(x.device):
        layer, tuning = _layer(layers, config, inputs, parts, w.shape, rows)
        y = layer(rows, tuning_config=tuning)
    return y[:, : w.shape[0]].reshape(*x.shape[:-1], w.shape[0])


def _float32(fmt, name):
    """Whether Humming keeps a part in float32: the scales of blocks and of tensors."""
    return (name == "weight_scale" and fmt.group[0] != 1) or (name == "weight_scale_2" and fmt.scale_2 == "tensor")


def _input(fmt, x_scale, parts, device):
    need(fmt.element in INPUTS and fmt.group in MODES and fmt.scale == "fp32", f"Humming is asked for int8 and e4m3 by token, not {fmt}")
    need(not fmt.hadamard and (fmt.group != (0, 0) or x_scale is not None), "Humming has no dynamic scale of a tensor")
    if x_scale is not None:
        parts["input_scale"] = x_scale.float().reshape(1).to(device)
    return {"a_dtype": INPUTS[fmt.element], "input_quant_mode": MODES[fmt.group]}


def _layer(layers, config, inputs, parts, shape, x):
    """The layer, and the tuning that it would choose for so many rows."""
    n, k = shape
    try:
        layer = layers.HummingLayer(
            shape_n=n, shape_k=k, weight_config=config, input_config=inputs, pad_n_to_multiple=PAD, pad_k_to_multiple=PAD,
            has_bias="bias" in parts, torch_dtype=x.dtype,
        ).to(x.device)  # fmt: skip
        layer.load_from_tensors(parts)
        layer.transform()
        return layer, dict(layers.get_heuristics_config(layer.humming_config, shape_m=len(x), device=x.device))
    except (AssertionError, ValueError, NotImplementedError) as error:
        raise NotImplementedError(f"Humming does not prepare {config['b_dtype']}: {type(error).__name__}: {error}") from None
