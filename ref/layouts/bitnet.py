"""BitNet (quant_method "bitnet"): weights of -1, 0 and 1, four to a byte, and one scale.

    weight        uint8 (n/4, k)  bits 2i and 2i+1 of weight[r] are the code of row r + i * n/4: rows are strided, not neighbours
    weight_scale  bfloat16 (1,)   (or another float dtype)

The stored codes 0, 1, 2 mean -1, 0, 1; 3 means nothing and is refused. What the scale does depends on the config:

    linear_class "bitlinear" (the default; 1bitLLM, Falcon3, Falcon-E)    w = (code - 1) / weight_scale
    linear_class "autobitlinear" (microsoft/bitnet-b1.58-2B-4T)           w = (code - 1) * weight_scale

A quotient stays one: scale_2 is a divisor then, and scale is 1. "autobitlinear" with quantization_mode "online" stores plain
weights, which are quantized anew at every use: there is nothing to read.

Source: transformers.integrations.bitnet (pack_weights, unpack_weights, BitLinear, AutoBitLinear).
"""

import torch

from ..element import Int
from ..format import Format
from ..pack import pack, unpack
from ..qtensor import QTensor, check_parts, validate
from . import rules
from .check import check_keys, need, one_of, part

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
DIVIDED = Format(Int(2), group=(0, 0), scale_2="tensor_divisor")
MULTIPLIED = {name: Format(Int(2), scale=name, group=(0, 0)) for name in DTYPES.values()}
FORMATS = (DIVIDED, MULTIPLIED["bf16"])
KEYS = ("quant_method", "modules_to_not_convert", "linear_class", "quantization_mode", "use_rms_norm", "rms_norm_eps")


def find(names, config):
    """{layer: {"weight": name, "weight_scale": name}}.

    Raises:
        ValueError, NotImplementedError: as options.
    """
    _linear_class(config)
    return rules.layers(names, ("weight_scale",), ("weight",))


def options(config, layer):
    """{"linear_class": "bitlinear" or "autobitlinear"}; None for a layer in modules_to_not_convert.

    Raises:
        ValueError: unknown keys or values.
        NotImplementedError: weights that are not quantized in the file (autobitlinear, online).
    """
    linear_class = _linear_class(config)
    kept = rules.strings(config.get("modules_to_not_convert"), "bitnet: modules_to_not_convert")
    return {"linear_class": linear_class} if rules.by_module(layer, kept) is None else None


def _linear_class(config):
    check_keys(config, KEYS, "bitnet: quantization_config")
    linear_class = one_of(config.get("linear_class", "bitlinear"), ("bitlinear", "autobitlinear"), "bitnet: linear_class")
    mode = one_of(config.get("quantization_mode", "offline"), ("offline", "online"), "bitnet: quantization_mode")
    if linear_class == "autobitlinear" and mode == "online":
        raise NotImplementedError(
            "bitnet: quantization_mode 'online' stores weights that are not quantized: each forward pass rounds them anew, by 1 / mean(|w|)"
        )
    return linear_class


def read(parts, options):
    """The weight.

    Args:
        parts: weight uint8 (n/4, k), weight_scale float (1,).
        options: {"linear_class": ...}, as options gives it.

    Returns:
        QTensor (n, k) of int2, {-1, 0, 1} of its {-2, ..., 1}: DIVIDED for bitlinear, MULTIPLIED for autobitlinear.

    Raises:
        ValueError: a part is missing, has another dtype or shape; a code of 3; a scale that is no finite number or divides by 0.
    """
    need(parts, "bitnet", ("weight", "weight_scale"))
    weight = part(parts, "bitnet", "weight", (torch.uint8,), (-1, -1), "(n / 4, k)")
    stored = part(parts, "bitnet", "weight_scale", tuple(DTYPES))
    if stored.numel() != 1 or stored.dim() > 2:
        raise ValueError(f"bitnet: weight_scale has shape {tuple(stored.shape)}, expected (1,): one scale for the tensor")
    if bool((weight & weight >> 1 & 0x55).any()):
        raise ValueError("bitnet: weight has the code 3, expected 0, 1 and 2 (-1, 0 and 1)")
    codes = torch.cat([weight >> 2 * i & 3 for i in range(4)]) + 1  # offset binary of two bits: value + 2
    packed, shape = pack(codes, 2), tuple(codes.shape)
    if options["linear_class"] == "autobitlinear":
        return validate(QTensor(MULTIPLIED[DTYPES[stored.dtype]], shape, packed, stored.reshape(1, 1).clone()))
    if bool((stored == 0).any()):
        raise ValueError("bitnet: weight_scale is 0, and linear_class 'bitlinear' divides by it")
    return validate(QTensor(DIVIDED, shape, packed, torch.ones(1, 1), scale_2=stored.reshape(1, 1).to(torch.float32, copy=True)))


def write(q, linear_class=None, dtype=None):
    """weight and weight_scale: the inverse of read.

    Args:
        linear_class: "bitlinear" or "autobitlinear"; None: the one that q's format is read from.
        dtype: of weight_scale; None: q's own, and for bitlinear bfloat16 where that holds the scale, else float16, else float32.

    Raises:
        ValueError: q is of another format, has a value of -2 or a scale that is not 1, n is no multiple of 4, or dtype does not
            hold the scale.
    """
    check_parts(q, "bitnet")
    divided = q.format == DIVIDED
    if q.format not in (DIVIDED, *MULTIPLIED.values()) or q.group_index is not None or len(q.shape) != 2:
        raise ValueError(f"bitnet: got {q.format} of shape {tuple(q.shape)}, expected {DIVIDED} or {MULTIPLIED['bf16']} (n, k)")
    own = "bitlinear" if divided else "autobitlinear"
    if linear_class not in (None, own):
        raise ValueError(f"bitnet: got linear_class={linear_class!r} for {q.format}, expected {own!r}")
    n, k = q.shape
    codes = unpack(q.packed, 2, k)
    if n % 4:
        raise ValueError(f"bitnet: got n={n}, expected a multiple of 4: each byte has codes of 4 rows")
    if bool((codes == 0).any()):
        raise ValueError("bitnet: q has the value -2, expected -1, 0 and 1")
    if divided and not bool((q.scale == 1).all()):
        raise ValueError("bitnet: q has a scale beside its divisor that is not 1")
    codes = (codes - 1).unflatten(0, (4, n // 4))
    weight = codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6
    value = (q.scale_2 if divided else q.scale).reshape(1)
    candidates = [dtype] if dtype else [torch.bfloat16, torch.float16, torch.float32] if divided else [value.dtype]
    for candidate in candidates:
        stored = value.to(candidate, copy=True)
        if torch.equal(stored.double(), value.double()):
            return {"weight": weight, "weight_scale": stored}
    raise ValueError(f"bitnet: weight_scale {value.item()} is no {dtype}")


def config_of(q, linear_class=None, dtype=None):
    """The quantization_config of a checkpoint whose layers are all like q."""
    write(q, linear_class, dtype)
    linear_class = "bitlinear" if q.format == DIVIDED else "autobitlinear"
    return {"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": "offline", "modules_to_not_convert": []}
