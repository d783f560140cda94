"""Humming's own checkpoints: bitstreams along k, and every element, scale and zero point that its kernels know."""

import re

import torch

from ..element import NAMED, Float, Int
from ..format import SCALE_DTYPES, Format
from ..pack import pack, unpack, words_per_row
from ..qtensor import QTensor, check_parts, validate
from . import rules
from .check import check_keys, integer, need, one_of, part
from .gptq import finite, pick

FORMATS = ("int2_g128_bf16", "uint4z_g64_fp16", "uint4_g64_bf16_zbf16", "fp8_e4m3_b128x128", "mxfp4", "nvfp4", "fp6_e3m2_bf16")

# An element's name in Humming -> here, where its codes do not all mean numbers.
FLOATS = {"float8e4m3": NAMED["e4m3"], "float8e5m2": NAMED["e5m2"], "float8e3m4": Float(3, 4, specials="fn")}
# A scale's name here -> the tensor dtypes that hold it (the first is what is written), and Humming's name.
STORED = {
    "bf16": ((torch.bfloat16,), "bfloat16"),
    "fp16": ((torch.float16,), "float16"),
    "fp32": ((torch.float32,), "float32"),
    "e4m3": ((torch.float8_e4m3fn,), "float8e4m3"),
    "e5m2": ((torch.float8_e5m2,), "float8e5m2"),
    "ue5m3": ((torch.uint8,), "float8e5m3"),
    "e8m0": ((torch.float8_e8m0fnu, torch.uint8), "float8e8m0"),
}
BY_DTYPE = {dtypes[0]: name for name, (dtypes, _) in STORED.items() if name != "ue5m3"}
ZEROS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TYPES = ("group", "block", "channel", "tensor")
TYPES_2 = ("none", "tensor", "channel")
# Synonyms in config.json, as the schema's aliases.
B_DTYPE, BS_DTYPE = ("b_dtype", "weight_dtype", "dtype"), ("bs_dtype", "weight_scale_dtype", "scale_dtype")
GROUP, GROUP_N = ("weight_scale_group_size", "group_size"), ("weight_scale_group_size_n", "group_size_n")
TYPE, TYPE_2 = ("weight_scale_type", "scale_type"), ("weight_scale_2_type", "scale_2_type")
IGNORED = ("ignored_layers", "ignore", "modules_to_not_convert")
INPUT = ("a_dtype", "input_dtype", "input_scale_group_size", "input_scale_dtype", "input_quant_mode", "quant_mode", "quantization_mode")
KEYS = ("quant_method", "has_zero_point", "is_fp_zero_point", "hadamard_block_size", "dynamic", "packed_modules_mapping")
KEYS = (*KEYS, *B_DTYPE, *BS_DTYPE, *GROUP, *GROUP_N, *TYPE, *TYPE_2, *IGNORED, *INPUT)
WHERE = "humming: quantization_config"


def find(names, config):
    """{layer: {part: tensor name}}: every layer that has weight_scale."""
    return rules.layers(names, ("weight_scale",), ("weight", "zero_point", "weight_scale_2", "input_scale", "input_scale_2"))


def options(config, layer):
    """What config.json says about a layer, or None where an ignore list or a "-:" pattern leaves it alone.

    Returns:
        {"element": Int (unsigned: with zero points) or Float, "scale": its name here or None (as it is stored), "group": as a Format
        has it, "zero": None, "int" or "float", "scale_2": None, "tensor" or "channel", "hadamard"}.

    Raises:
        ValueError: unknown keys or values, contradictions.
    """
    check_keys(config, KEYS, WHERE)
    one_of(config.get("quant_method", "humming"), ("humming",), f"{WHERE}: quant_method")
    ignored = rules.strings(pick(config, IGNORED, None, WHERE), f"{WHERE}: ignore")
    overrides = config.get("dynamic") or {}
    if not isinstance(overrides, dict) or not all(isinstance(v, dict) for v in overrides.values()):
        raise ValueError(f"{WHERE}: dynamic is {overrides!r}, expected a dict of dicts")
    override = rules.dynamic(layer, overrides)
    if override is None or rules.by_module(layer, ignored):
        return None
    check_keys(override, KEYS, f"{WHERE}: dynamic override of {layer}")
    config = {
        key: value
        for key, value in config.items()
        if not any(key in same and set(same) & set(override) for same in (B_DTYPE, BS_DTYPE, GROUP, GROUP_N, TYPE, TYPE_2))
    } | override
    has_zero = one_of(config.get("has_zero_point") or False, (True, False), f"{WHERE}: has_zero_point")
    is_float = one_of(config.get("is_fp_zero_point") or False, (True, False), f"{WHERE}: is_fp_zero_point")
    group = _whole(config, GROUP)
    group_n = _whole(config, GROUP_N)
    kind = pick(config, TYPE, "block" if group_n > 1 else "group" if group else "channel", WHERE)
    one_of(kind, TYPES, f"{WHERE}: weight_scale_type")
    scale_2 = one_of(pick(config, TYPE_2, "none", WHERE), TYPES_2, f"{WHERE}: weight_scale_2_type")
    if scale_2 != "none" and kind != "group" and (kind, scale_2) != ("channel", "tensor"):
        raise ValueError(f"{WHERE}: weight_scale_2_type {scale_2!r} does not go with weight_scale_type {kind!r}")
    if (group > 0) != (kind in ("group", "block")) or (group_n > 1) != (kind == "block"):
        raise ValueError(f"{WHERE}: weight_scale_type {kind!r} does not go with groups of {group_n} x {group}")
    scale = scale_of(pick(config, BS_DTYPE, None, WHERE))
    if kind in ("block", "tensor"):
        if scale not in (None, "fp32"):
            raise ValueError(f"{WHERE}: bs_dtype is {scale}, but scales by {kind} are float32")
        scale = "fp32"
    element = element_of(pick(config, B_DTYPE, None, WHERE), has_zero)
    if has_zero and (isinstance(element, Float) or kind not in ("group", "channel")):
        raise NotImplementedError(f"{WHERE}: has_zero_point is true for {element} by {kind}, expected integers by group or channel")
    hadamard = integer(config.get("hadamard_block_size") or 0, f"{WHERE}: hadamard_block_size", 0, 2**20)
    if hadamard & (hadamard - 1):
        raise ValueError(f"{WHERE}: hadamard_block_size is {hadamard}, expected 0 or a power of two")
    return {
        "element": element,
        "scale": scale,
        "group": {"group": (1, group), "block": (group_n, group), "channel": (1, 0), "tensor": (0, 0)}[kind],
        "zero": ("float" if is_float else "int") if has_zero else None,
        "scale_2": None if scale_2 == "none" else scale_2,
        "hadamard": hadamard if hadamard > 1 else 0,
    }


def read(parts, options):
    """A layer's tensors, or a stack of experts' (one axis more in front), as a QTensor.

    w[n, k] = (value[code] - zero) * weight_scale * weight_scale_2; integers without zero points are offset binary.

    Args:
        parts: weight int32 (n, k * bits / 32), a bitstream along k; weight_scale (n, k / group) or (n, 1), by block float32
            (n / group_n, k / group), by tensor float32 (1,), for a stack (e,); zero_point int32 (n * bits / 32, groups), a
            bitstream along n, or floats (n, groups); weight_scale_2 float32 (1,) or (e,), by channel float (n,).
            input_scale and input_scale_2 are the activations' and are left alone.
        options: as options returns them.

    Raises:
        ValueError: parts that disagree with one another or with the options.

    Source: humming-kernels 0.1.19 schema/humming.py and include/humming/kernel/pack_weight.cuh.
    """
    element, (gn, gk) = options["element"], options["group"]
    required = ["weight", "weight_scale"]
    required += ["zero_point"] if options["zero"] else []
    required += ["weight_scale_2"] if options["scale_2"] else []
    need(parts, "humming", required, ("input_scale", "input_scale_2"))
    weight = part(parts, "humming", "weight", (torch.int32,))
    if weight.dim() not in (2, 3):
        raise ValueError(f"humming: weight has shape {tuple(weight.shape)}, expected (n, k * bits / 32), or (e, n, k * bits / 32)")
    *lead, n, words = weight.shape
    k, rest = divmod(words * 32, element.bits)
    if rest or (gk and k % gk) or (gn > 1 and n % gn):
        raise ValueError(
            f"humming: weight has shape {tuple(weight.shape)}, which fits no whole groups of {gn} x {gk} at {element.bits} bits"
        )
    scale_name = options["scale"] or _named(parts["weight_scale"])
    shape = {(0, 0): (*lead, 1, 1), (1, 0): (*lead, n, 1)}.get((gn, gk), (*lead, n // max(gn, 1), k // max(gk, 1)))
    stored = tuple(lead) or (1,) if gn == 0 else shape
    scale = part(parts, "humming", "weight_scale", STORED[scale_name][0], stored, f"of groups of {gn} x {gk}, n={n}, k={k}")
    scale = scale.reshape(shape) if isinstance(SCALE_DTYPES[scale_name], torch.dtype) else scale.view(torch.uint8).reshape(shape)
    zero = zero_name = None
    if options["zero"] == "int":
        zero = part(
            parts,
            "humming",
            "zero_point",
            (torch.int32,),
            (*lead, words_per_row(n, element.bits), shape[-1]),
            f"(n * bits / 32, groups) with n={n}",
        )
        zero, zero_name = unpack(zero.transpose(-1, -2).contiguous(), element.bits, n).transpose(-1, -2).contiguous(), "int"
    elif options["zero"] == "float":
        zero = finite(
            part(parts, "humming", "zero_point", tuple(ZEROS), shape, "of the shape of weight_scale"), "humming: zero_point"
        ).contiguous()
        zero_name = ZEROS[zero.dtype]
    scale_2 = None
    if options["scale_2"] == "tensor":
        scale_2 = part(parts, "humming", "weight_scale_2", (torch.float32,), tuple(lead) or (1,)).reshape(*lead, 1, 1)
    elif options["scale_2"] == "channel":
        scale_2 = part(parts, "humming", "weight_scale_2", tuple(ZEROS), (*lead, n)).to(torch.float32).reshape(*lead, n, 1)
    fmt = Format(element, scale_name, (gn, gk), zero_name, options["scale_2"], options["hadamard"])
    if fmt.hadamard and k % fmt.hadamard:
        raise ValueError(f"humming: weight has k={k}, which is no multiple of hadamard_block_size={fmt.hadamard}")
    try:
        return validate(QTensor(fmt, (*lead, n, k), weight.contiguous(), scale.contiguous(), zero, scale_2))
    except ValueError as error:  # says scale and scale_2
        raise ValueError(f"humming: weight_{str(error).removeprefix('validate: ')}") from None


def write(q):
    """The tensors of a QTensor, (n, k) or (e, n, k): the inverse of read.

    weight_scale_2 by channel is written in the dtype of the 16-bit scales, or else bfloat16, where that is exact; else float32.

    Raises:
        ValueError: elements or scales that Humming has no name for, rows or zero points that do not end with a word, partial groups,
            a group_index, an offset, divisors.
    """
    check_parts(q, "humming")
    config = config_of(q)
    *lead, n, k = q.shape
    fmt, bits = q.format, q.format.element.bits
    gn, gk = fmt.group
    if len(q.shape) > 3 or k * bits % 32 or (gk and k % gk) or (gn > 1 and n % gn):
        raise ValueError(
            f"humming: got {fmt} of shape {tuple(q.shape)}, expected (n, k) or (e, n, k) of whole groups and rows of whole words"
        )
    if q.group_index is not None:
        raise ValueError("humming: q has a group_index, expected groups in order")
    out = {"weight": q.packed.clone()}
    scale = q.scale if isinstance(SCALE_DTYPES[fmt.scale], torch.dtype) else q.scale.view(STORED[fmt.scale][0][0])
    out["weight_scale"] = scale.reshape(lead or (1,)).clone() if gn == 0 else scale.clone()
    if fmt.zero == "int":
        if n * bits % 32:
            raise ValueError(f"humming: q has n={n}, whose zero points at {bits} bits do not end with a word")
        out["zero_point"] = pack(q.zero.transpose(-1, -2), bits).transpose(-1, -2).contiguous()
    elif fmt.zero:
        out["zero_point"] = q.zero.clone()
    if config["weight_scale_2_type"] == "tensor":
        out["weight_scale_2"] = q.scale_2.reshape(lead or (1,)).clone()
    elif config["weight_scale_2_type"] == "channel":
        narrow = q.scale_2.to(torch.float16 if fmt.scale == "fp16" else torch.bfloat16)
        out["weight_scale_2"] = (narrow if torch.equal(narrow.float(), q.scale_2) else q.scale_2.clone()).reshape(*lead, n)
    return out


def config_of(q):
    """A quantization_config for a checkpoint whose layers are all like q.

    Raises:
        ValueError: as write, as far as the format is to blame.
    """
    fmt = q.format
    gn, gk = fmt.group
    kind = {(0, 0): "tensor", (1, 0): "channel"}.get(fmt.group, "group" if gn == 1 else "block")
    named = isinstance(fmt.element, (Int, Float)) and element_of(_name(fmt.element), fmt.zero is not None) == fmt.element
    whole = fmt.scale == "fp32" or kind not in ("tensor", "block")
    second = fmt.scale_2 is None or (fmt.scale_2 in TYPES_2 and (kind == "group" or (kind, fmt.scale_2) == ("channel", "tensor")))
    zeros = fmt.zero is None or kind in ("group", "channel")
    if not (named and whole and second and zeros) or fmt.offset or (kind == "block" and not (gn > 1 and gk)):
        raise ValueError(f"humming: got {fmt}, which Humming has no schema for")
    return {
        "quant_method": "humming",
        "b_dtype": _name(fmt.element),
        "bs_dtype": STORED[fmt.scale][1],
        "weight_scale_group_size": gk,
        "weight_scale_group_size_n": gn if kind == "block" else 0,
        "weight_scale_type": kind,
        "weight_scale_2_type": fmt.scale_2 or "none",
        "has_zero_point": fmt.zero is not None,
        "is_fp_zero_point": fmt.zero not in (None, "int"),
        "hadamard_block_size": fmt.hadamard,
    }


def element_of(name, has_zero):
    """The element of Humming's name; all its integers are stored without a sign, and symmetric ones are offset binary."""
    if isinstance(name, str):
        if match := re.fullmatch(r"u?int([1-8])", name.lower()):
            return Int(int(match[1]), signed=not has_zero)
        if name.lower().replace("_", "") in FLOATS:
            return FLOATS[name.lower().replace("_", "")]
        if (match := re.fullmatch(r"float(\d)_*e(\d)m(\d)", name.lower())) and int(match[1]) == 1 + int(match[2]) + int(match[3]) <= 8:
            return Float(int(match[2]), int(match[3]))
    raise ValueError(f"{WHERE}: b_dtype is {name!r}, expected uint1 to uint8, or a signed float of up to 8 bits as 'float4e2m1'")


def _name(element):
    if isinstance(element, Int):
        return f"uint{element.bits}"
    return f"float{element.bits}e{element.exponent}m{element.mantissa}"


def scale_of(name):
    known = {theirs: ours for ours, (_, theirs) in STORED.items()} | {"half": "fp16"}
    return None if name is None else known[one_of(name, tuple(known), f"{WHERE}: bs_dtype")]


def _named(tensor):
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in BY_DTYPE:
        got = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"humming: weight_scale has dtype {got}, which says no scale dtype by itself; expected bs_dtype in the config")
    return BY_DTYPE[tensor.dtype]


def _whole(config, keys):
    """A group size; 0, -1 or nothing: the whole axis."""
    value = pick(config, keys, 0, WHERE)
    return 0 if value == -1 and type(value) is int else integer(value, f"{WHERE}: {keys[0]}", 0, 2**31 - 1)
