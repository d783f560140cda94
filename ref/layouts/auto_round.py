"""AutoRound (Intel's INC): its own config over GPTQ's, AWQ's, fp8's and compressed-tensors' tensors, layer by layer."""

import torch

from ..element import NAMED, Float, Int
from ..format import Format
from ..qtensor import QTensor, check_parts, validate
from . import awq, compressed_tensors, fp8, gptq, rules
from . import bits as codes_of
from .check import check_keys, integer, need, one_of, part
from .recipe import RECIPE

FORMATS = (
    "int4_g128_fp16",
    "uint4z_g128_fp16",
    "uint2z_g64_fp16",
    "int5_g128_fp16",
    "fp8_e4m3_bf16",
    "mxfp4",
    "mxfp8",
    "fp4_e2m1_g16_e4m3_tensor2div",
)

# packing_format (without "auto_round:", and what stands behind a second colon: a kernel's name) -> how integers are stored.
PACKINGS = {
    **dict.fromkeys(("auto_gptq", "gptq", "auto"), "gptq"),
    **dict.fromkeys(("auto_round", "gptqmodel"), "gptq_v2"),
    **dict.fromkeys(("auto_awq", "awq"), "awq"),
    **dict.fromkeys(("llm_compressor", "llm_compressor_nvfp4_e5m3", "fp8", "fp8_static", "fp8_block"), "float"),
}
# The start of data_type (the longest that fits) -> the kind of weight.
KINDS = {"int": "int", "mx_int": "mxint", "mx_fp": "mxfp", "nv_fp": "nvfp", "nvfp4_v2": "nvfp4_v2", "fp": "fp8"}
E5M3 = {16: Format(Float(2, 1), "ue5m3", (1, 16)), 32: Format(Float(2, 1), "ue5m3", (1, 32))}
MXINT4 = Format(Float(0, 3), "e8m0", (1, 32))
SCHEME = (
    *("bits", "group_size", "sym", "data_type", "act_bits", "act_group_size", "act_sym", "act_data_type", "act_dynamic"),
    *("super_bits", "super_group_size", "rotation_config", "scale_dtype", "in_blocks", "fixed_by_user"),
)
KEYS = (
    *("quant_method", "packing_format", "extra_config", "regex_config", "lm_head", "desc_act", "modules_to_not_convert"),
    *("modules_in_block_to_quantize", "dynamic", "fmt", "activation_scheme", "weight_block_size", "checkpoint_format"),
    *SCHEME,
    *RECIPE,
)
WHERE = "auto_round: quantization_config"
METHODS = ("auto-round", "auto_round", "intel/auto-round", "inc")
PARTS = ("qzeros", "scales", "g_idx", "weight", "weight_global_scale", "input_global_scale", "input_scale")


def find(names, config):
    """{layer: {part: tensor name}}: every layer that has qweight, weight_packed, weight_scale or weight_scale_inv."""
    return rules.layers(names, ("qweight", "weight_packed", "weight_scale", "weight_scale_inv"), PARTS)


def options(config, layer):
    """What config.json says about a layer, or None where its bits are 16 or more.

    extra_config stands above the common settings: the entry of this name, or else the first that, as a regular expression, is
    found in it. Which blocks are quantized at all (block_name_to_quantize) is not asked: those names are the running
    model's, and for composite models not the file's.

    Returns:
        {"layout": "gptq", "awq", "fp8", "compressed_tensors", "mxint4" or "nvfp4_v2", "options": what that layout's read takes}.

    Raises:
        ValueError: unknown keys or values. NotImplementedError: MLX's layout, rotations, weights with quantized activations in int.
    """
    check_keys(config, KEYS, WHERE)
    one_of(config.get("quant_method", "auto-round"), METHODS, f"{WHERE}: quant_method")
    settings = settings_of(config, layer)
    bits = integer(settings["bits"], f"{WHERE}: bits", 1, 32)
    if bits >= 16:
        return None
    if settings["rotation_config"]:
        raise NotImplementedError(f"{WHERE}: rotation_config of {layer}: rotations that the model applies as it runs are not read")
    sym = one_of(settings["sym"] if settings["sym"] is not None else True, (True, False), f"{WHERE}: sym")
    kind = _kind(settings["data_type"] or "int")
    packing = _packing(config)
    if kind == "int":
        if packing == "float":
            raise ValueError(f"{WHERE}: packing_format {config['packing_format']!r} is for floats, but data_type is 'int'")
        group_size = _group_size(settings["group_size"])
        if packing == "awq":
            one_of(bits, (4, 5, 6, 7), f"{WHERE}: bits (auto_awq)")
            return {"layout": "awq", "options": {"bits": bits, "group_size": group_size, "zero_point": not sym, "version": "gemm"}}
        integer(bits, f"{WHERE}: bits", 2, 8)
        found = {"bits": bits, "group_size": group_size, "sym": sym, "desc_act": None, "checkpoint_format": packing, "word_zeros": False}
        return {"layout": "gptq", "options": found}
    if not sym:
        raise ValueError(f"{WHERE}: sym is false, but data_type {settings['data_type']!r} has no zero points")
    if kind in ("mxint", "nvfp4_v2"):
        one_of(bits, (4,), f"{WHERE}: bits ({settings['data_type']})")
        group_size = one_of(
            settings["group_size"], (32,) if kind == "mxint" else (16, 32), f"{WHERE}: group_size ({settings['data_type']})"
        )
        return {"layout": "mxint4" if kind == "mxint" else kind, "options": {"group_size": group_size}}
    if kind == "fp8":
        one_of(bits, (8,), f"{WHERE}: bits ({settings['data_type']})")
        return {"layout": "fp8", "options": _fp8(settings, config, layer)}
    one_of((kind, bits), (("mxfp", 4), ("mxfp", 8), ("nvfp", 4)), f"{WHERE}: data_type and bits")
    one_of(settings["group_size"], (32,) if kind == "mxfp" else (16,), f"{WHERE}: group_size ({settings['data_type']})")
    return {"layout": "compressed_tensors", "options": compressed_tensors.options(_as_compressed_tensors(kind, bits), layer)}


def read(parts, options):
    """A layer's tensors as a QTensor: by the layout that options names.

    auto_gptq is GPTQ's version 1 and gptqmodel and plain auto_round its version 2, with 5, 6 and 7 bits as bitstreams (no planes),
    mostly without g_idx; auto_awq is AWQ's GEMM. fp8 has weight_scale flat, (n,) or (n * groups,). mx_fp and nv_fp have
    compressed-tensors' tensors. Two are AutoRound's alone: mx_int (weight_packed, sign and three bits, times 2^(scale - 129)) and
    nvfp4_v2 (weight_packed uint8 (n, k / 2), e2m1; weight_scale uint8, ue5m3).

    Raises:
        ValueError, NotImplementedError: as that layout.

    Source: AutoRound 0.16.1 export, auto_round_extension/torch and experimental/qmodules.
    """
    layout, inner = options["layout"], options["options"]
    if layout in ("mxint4", "nvfp4_v2"):
        return _read_nibbles(parts, MXINT4 if layout == "mxint4" else E5M3[inner["group_size"]])
    if layout == "fp8":
        parts = dict(parts)
        weight, scale = parts.get("weight"), parts.get("weight_scale")
        flat = isinstance(weight, torch.Tensor) and isinstance(scale, torch.Tensor) and weight.dim() == 2 and scale.dim() == 1
        if flat and inner["block"] is not None and len(weight) and scale.numel() % len(weight) == 0:
            parts["weight_scale"] = scale.reshape(len(weight), -1)
    return {"gptq": gptq, "awq": awq, "fp8": fp8, "compressed_tensors": compressed_tensors}[layout].read(parts, inner)


def write(q, packing_format=None):
    """The tensors of a QTensor: the inverse of read.

    Args:
        packing_format: for integers "auto_round:auto_gptq" (for symmetric ones the default), "auto_round" (for others),
            "auto_round:gptqmodel" or "auto_round:auto_awq"; floats have one packing each, None.

    Raises:
        ValueError: a format that AutoRound has no packing for, or what gptq, awq, fp8 and compressed_tensors refuse.
    """
    check_parts(q, "auto_round")
    if isinstance(q.format.element, Int):
        name = packing_format or ("auto_round:auto_gptq" if q.zero is None else "auto_round")
        packing = _packing({"packing_format": name})
        if packing == "float":
            raise ValueError(f"auto_round: packing_format {name!r} is for floats, got {q.format}")
        if packing == "awq":
            return awq.write(q)
        if q.group_index is not None:
            raise ValueError("auto_round: q has a group_index, expected groups in order")
        return gptq.write_integers(q, "auto_round", packing, g_idx=packing_format == "auto_round:gptqmodel")
    if packing_format is not None:
        raise ValueError(f"auto_round: packing_format is {packing_format!r}, expected None for {q.format}")
    if q.format in (MXINT4, *E5M3.values()):
        return _write_nibbles(q)
    kind = _float_kind(q)
    if kind != "fp8":
        return compressed_tensors.write(q)
    written = fp8.write(q)
    if q.format.group[0] > 1:
        return written
    scale = next(t for name, t in written.items() if name != "weight")
    return {"weight": written["weight"], "weight_scale": scale.reshape(-1)}


def config_of(q, packing_format=None):
    """A quantization_config for a checkpoint whose layers are all like q."""
    fmt = q.format
    group = fmt.group[1] or -1
    config = {"quant_method": "auto-round", "bits": fmt.element.bits, "group_size": group, "sym": fmt.zero is None, "act_bits": 16}
    if isinstance(fmt.element, Int):
        name = packing_format or ("auto_round:auto_gptq" if fmt.zero is None else "auto_round")
        return config | {"data_type": "int", "packing_format": name}
    if fmt == MXINT4:
        return config | {"data_type": "mx_int", "packing_format": "auto_round"}
    if fmt in E5M3.values():
        return config | {"data_type": "nvfp4_v2", "packing_format": "auto_round:llm_compressor_nvfp4_e5m3"}
    kind = _float_kind(q)
    if kind != "fp8":
        return config | {"data_type": "mx_fp" if kind == "mxfp" else "nv_fp", "packing_format": "auto_round:llm_compressor"}
    size = {(0, 0): 0, (1, 0): -1}.get(fmt.group, list(fmt.group) if fmt.group[0] > 1 else fmt.group[1])
    return config | {"data_type": "fp", "group_size": size, "fmt": str(fmt.element), "packing_format": "auto_round:fp8"}


def settings_of(config, layer):
    """The keys of SCHEME for a layer, those of extra_config above the common ones; None where nothing is said."""
    return {key: config.get(key) for key in SCHEME} | _extra(config, layer)


def _extra(config, layer):
    extra = config.get("extra_config") or {}
    if not isinstance(extra, dict) or not all(isinstance(v, dict) for v in extra.values()):
        raise ValueError(f"{WHERE}: extra_config is {extra!r}, expected a dict of dicts")
    name = layer if layer in extra else next((p for p in extra if extra[p] and rules.compiled(p).search(layer)), None)
    found = extra.get(name, {})
    check_keys(found, SCHEME, f"{WHERE}: extra_config[{name!r}]")
    return {key: value for key, value in found.items() if value is not None}


def _kind(data_type):
    starts = [start for start in KINDS if isinstance(data_type, str) and data_type.startswith(start)]
    if not starts:
        raise ValueError(f"{WHERE}: data_type is {data_type!r}, expected a name that starts with {', '.join(KINDS)}")
    return KINDS[max(starts, key=len)]


def _packing(config):
    name = config.get("packing_format")
    if name is None:
        return "gptq"
    head, *rest = str(name).split(":")
    if "mlx" in (head, *rest[:1]):
        raise NotImplementedError(f"{WHERE}: packing_format is {name!r}: MLX's own layout is not read")
    short = (rest[0] if rest else "auto_round") if head == "auto_round" else head
    if short not in PACKINGS:
        raise ValueError(f"{WHERE}: packing_format is {name!r}, expected 'auto_round', or 'auto_round:' and one of {', '.join(PACKINGS)}")
    return PACKINGS[short]


def _group_size(value):
    return value if value == -1 and type(value) is int else integer(value, f"{WHERE}: group_size (-1: all of k)", 1, 2**31 - 1)


def _fp8(settings, config, layer):
    """fp8.options for AutoRound's group_size: 0 the tensor, -1 a row, g along k, [gn, gk] a block."""
    size = settings["group_size"]
    if isinstance(size, (list, tuple)):
        block = list(size)
    else:
        size = integer(size, f"{WHERE}: group_size", -1, 2**31 - 1)
        block = [1, size] if size > 0 else None
    e5m2 = "e5m2" in str(settings["data_type"]) or config.get("fmt") == "e5m2"
    asked = {"quant_method": "fp8", "fmt": "e5m2" if e5m2 else "e4m3", "activation_scheme": "dynamic", "weight_block_size": block}
    return fp8.options(asked, layer)


def _as_compressed_tensors(kind, bits):
    name = "nvfp4-pack-quantized" if kind == "nvfp" else "mxfp4-pack-quantized" if bits == 4 else "mxfp8-quantized"
    weights = {"num_bits": bits, "type": "float", "symmetric": True, "strategy": "tensor_group" if kind == "nvfp" else "group"}
    weights["group_size"] = 16 if kind == "nvfp" else 32
    return {"quant_method": "compressed-tensors", "format": name, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def _float_kind(q):
    fmt = q.format
    if fmt in (Format(Float(2, 1), "e8m0", (1, 32)), Format(NAMED["e4m3"], "e8m0", (1, 32))):
        return "mxfp"
    if fmt == Format(Float(2, 1), "e4m3", (1, 16), scale_2="tensor_divisor"):
        return "nvfp"
    plain = fmt.scale in ("fp32", "fp16", "bf16") and fmt.scale_2 is None and not fmt.hadamard and q.group_index is None
    if fmt.element in (NAMED["e4m3"], NAMED["e5m2"]) and plain and len(q.shape) == 2:
        return "fp8"
    raise ValueError(f"auto_round: got {fmt}, expected integers of 2 to 8 bits, fp8, mxfp4, mxfp8, NVFP4, or e2m1 with ue5m3 scales")


def _read_nibbles(parts, fmt):
    need(parts, "auto_round", ("weight_packed", "weight_scale"), ("input_global_scale", "input_scale"))
    weight = part(parts, "auto_round", "weight_packed", (torch.uint8,), (-1, -1))
    n, k, group = len(weight), weight.shape[1] * 2, fmt.group[1]
    if k % group:
        raise ValueError(f"auto_round: weight_packed has k={k}, expected a multiple of {group}")
    scale = part(parts, "auto_round", "weight_scale", (torch.uint8,), (n, k // group), f"(n, k / {group})")
    if fmt == MXINT4:  # the values are quarters: 2^(scale - 127) / 4 is 2^(scale - 2 - 127)
        if bool((scale < 2).any()) or bool((scale == 255).any()):
            raise ValueError(f"auto_round: weight_scale ranges from {int(scale.min())} to {int(scale.max())}, expected 2 to 254 (mx_int)")
        scale = scale - 2
    try:
        return validate(QTensor(fmt, (n, k), codes_of.from_bytes(weight.contiguous()), scale.contiguous()))
    except ValueError as error:
        raise ValueError(f"auto_round: weight_{str(error).removeprefix('validate: ')}") from None


def _write_nibbles(q):
    if len(q.shape) != 2 or q.shape[1] % q.format.group[1]:
        raise ValueError(f"auto_round: got {q.format} of shape {tuple(q.shape)}, expected (n, k) of whole groups")
    if q.format == MXINT4 and bool((q.scale > 252).any()):
        raise ValueError("auto_round: q has a scale above 2^125, which mx_int stores four times as large, and cannot")
    scale = q.scale + 2 if q.format == MXINT4 else q.scale.clone()
    return {"weight_packed": codes_of.to_bytes(q.packed, q.shape[1] // 2), "weight_scale": scale}
