"""GPT-OSS (quant_method "mxfp4"): stacks of experts in MXFP4, each block of 32 codes beside its power of two.

    X_blocks  uint8 (e, n, k/32, 16)  e2m1 codes: byte i of a block holds element 2i in its low half and 2i+1 in its high half
    X_scales  uint8 (e, n, k/32)      e8m0
    w[e, n, 32j + i] = value[code] * 2^(scale[e, n, j] - 127)

The layer is X (model.layers.0.mlp.experts.gate_up_proj). Rows stay as they are in the file: those of gate_up_proj alternate,
even rows belong to the gate and odd rows to up (deinterleave takes them apart).

transformers' module holds the transpose, (e, k, n), since it multiplies x @ w: its weight is ref.dequantize(q).transpose(-1, -2),
and its gate is [..., ::2] of that. Nothing is transposed here, k is the last axis as in the file.

Source: transformers.integrations.mxfp4.convert_moe_packed_tensors; openai/gpt-oss-20b.
"""

import torch

from ..combine import take_rows
from ..format import FORMATS as NAMED
from ..qtensor import QTensor, check_parts, validate
from . import bits, rules
from .check import check_keys, need, part

FORMATS = ("mxfp4",)
KEYS = ("quant_method", "modules_to_not_convert", "dequantize")


def find(names, config):
    """{layer: {"blocks": name, "scales": name}}; a layer that lacks one of the two is listed with the other."""
    layers = {}
    for name in names:
        for key in ("blocks", "scales"):
            if name.endswith("_" + key):
                layers.setdefault(name.removesuffix("_" + key), {})[key] = name
    return layers


def options(config, layer):
    """{} for a quantized layer, None for one in modules_to_not_convert (a module, a regular expression, or the end of a name).

    Raises:
        ValueError: unknown keys or values.
    """
    check_keys(config, KEYS, "mxfp4: quantization_config")
    kept = rules.strings(config.get("modules_to_not_convert"), "mxfp4: modules_to_not_convert")
    return {} if rules.by_module(layer, kept) is None else None


def read(parts, options):
    """The stack of experts.

    Args:
        parts: blocks uint8 (e, n, k/32, 16), scales uint8 or float8_e8m0fnu (e, n, k/32). One weight, without e, is read, too.

    Returns:
        QTensor mxfp4 of shape (e, n, k).

    Raises:
        ValueError: a part is missing, has another dtype or shape, or a scale is NaN (255).
    """
    need(parts, "mxfp4", ("blocks", "scales"))
    blocks = part(parts, "mxfp4", "blocks", (torch.uint8,))
    if blocks.dim() not in (3, 4) or blocks.shape[-1] != 16:
        raise ValueError(f"mxfp4: blocks has shape {tuple(blocks.shape)}, expected (e, n, k / 32, 16): 16 bytes are a block of 32 codes")
    *lead, n, groups, _ = blocks.shape
    why = "(e, n, k / 32) of blocks: one scale a block"
    scales = part(parts, "mxfp4", "scales", (torch.uint8, torch.float8_e8m0fnu), (*lead, n, groups), why)
    packed = bits.from_bytes(blocks.flatten(-2))
    return validate(QTensor(NAMED["mxfp4"], (*lead, n, 32 * groups), packed, scales.view(torch.uint8).clone()))


def write(q):
    """blocks and scales: the inverse of read.

    Raises:
        ValueError: q is not mxfp4, has a group_index, or k is no multiple of 32.
    """
    check_parts(q, "mxfp4")
    if q.format != NAMED["mxfp4"] or q.group_index is not None or len(q.shape) > 3:
        raise ValueError(f"mxfp4: got {q.format} of shape {tuple(q.shape)}, expected mxfp4 (n, k) or (e, n, k) without group_index")
    if q.shape[-1] % 32:
        raise ValueError(f"mxfp4: got k={q.shape[-1]}, expected a multiple of 32: the file has no partial block")
    data = bits.to_bytes(q.packed, q.shape[-1] // 2)
    return {"blocks": data.unflatten(-1, (q.shape[-1] // 32, 16)), "scales": q.scale.clone()}


def config_of(q):
    """The quantization_config of a checkpoint whose experts are all like q."""
    write(q)
    return {"quant_method": "mxfp4", "modules_to_not_convert": []}


def deinterleave(q):
    """(gate, up) of a gate_up_proj: rows 0, 2, 4, ... and rows 1, 3, 5, ..., each (e, n / 2, k).

    y = x @ ref.dequantize(q).T has gate and up alternating along n: gate = y[..., 0::2], up = y[..., 1::2].

    Raises:
        ValueError: n is odd.
    """
    check_parts(q, "mxfp4.deinterleave")
    n = q.shape[-2]
    if n % 2:
        raise ValueError(f"mxfp4.deinterleave: got n={n}, expected an even number of rows: gate and up alternate")
    rows = torch.arange(n)
    return take_rows(q, rows[0::2]), take_rows(q, rows[1::2])
