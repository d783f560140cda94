"""compressed-tensors (quant_method "compressed-tensors" or "sparseml"): every format that vLLM's quantizers have written.

Weights (n, k), or stacks (e, n, k) of them; scales by tensor, channel, group or block, weight_scale (n / gn, k / gk):

    pack-quantized    weight_packed int32: codes q + 2^(b-1) along k; weight_shape; zero points packed alike, but along n
    int-quantized     weight int8, two's complement; zero points int8                         w = (q - zero) * scale
    float-quantized   weight float8_e4m3fn                                                    w = value * scale
    nvfp4-pack-quantized          weight_packed uint8 (e2m1, low nibble first), scales e4m3   w = value * scale / weight_global_scale
    mxfp4-, mxfp6-pack-quantized  weight_packed uint8 (e2m1; e2m3 as a 6-bit stream)          w = value * 2^(scale - 127)
    mxfp8-quantized               weight float8_e4m3fn                                        w = value * 2^(scale - 127)

naive-quantized is int- or float-quantized by another name. weight_g_idx (k,) gives the group of each column (actorder "group").
sparse-24-bitmask and sparse-bitmask wrap weight: its bytes that are not zero, and a mask of where they go.

Source: compressed_tensors 0.20.0 (compressors/*/base.py and helpers.py); 0.10.2 for what later versions dropped.
"""

import torch

from ..element import NAMED, Float, Int
from ..format import Format
from ..pack import pack, unpack
from ..qtensor import QTensor, validate
from . import bits as bits_of
from .check import need, one_of, part
from .compressed_tensors_codes import dense, pack_words, packs_zero, read_words, unpack_words, wrap
from .compressed_tensors_config import QUANTIZED, L, options
from .rules import layers

__all__ = ["FORMATS", "config_of", "dense", "find", "options", "read", "write"]

FORMATS = (
    *("int4_g32_bf16", "int4_g128_fp16", "int4_bf16", "uint4z_g128_bf16", "uint4z_fp16", "int8_bf16", "int8_tensor", "uint8z_bf16"),
    *("int1_g128_bf16", "int2_g128_bf16", "int3_g128_bf16", "int5_g128_bf16", "int6_g128_bf16", "int7_g128_bf16", "int8_g128_bf16"),
    *("fp8_bf16", "fp8_tensor_bf16", "fp8_e4m3_g128_bf16", "fp8_e4m3_b128x128_bf16", "fp4_e2m1_g16_e4m3_tensor2div"),
    *("mxfp4", "mxfp6_e2m3", "mxfp8"),
)
GROUP_INDEX = ("int4_g128_fp16", "uint4z_g128_bf16", "int3_g128_bf16", "int8_g128_bf16")  # integers in groups may have one
KEYS = ("weight_packed", "weight_scale")
ACTIVATIONS = tuple(f"{side}_{what}" for side in ("input", "output") for what in ("scale", "zero_point", "global_scale"))
SPARSE = ("compressed", "bitmask", "shape", "row_offsets")
PARTS = ("weight", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale", *SPARSE, *ACTIVATIONS)
FLOATS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
MX = {torch.uint8: "e8m0", torch.float8_e8m0fnu: "e8m0"}
# The element of each float width, and the dtypes of the scales of each format that has its own.
ELEMENTS = {4: Float(2, 1), 6: Float(2, 3), 8: NAMED["e4m3"]}
SCALES = {"nvfp4-pack-quantized": {torch.float8_e4m3fn: "e4m3"}} | {name: MX for name in QUANTIZED if name.startswith("mx")}


def find(names, config):
    """{layer: {part: tensor name}} of the layers with quantized weights."""
    return layers(names, KEYS, PARTS)


def read(parts, options):
    """The QTensor of a layer.

    Args:
        parts: weight_packed or weight (or compressed, bitmask, shape, row_offsets), weight_scale, and what belongs to them.
        options: as the function of this name returns them.

    Raises:
        ValueError: missing or unexpected parts, shapes, dtypes or values that do not fit, a width that is ambiguous.
        NotImplementedError: floats with zero points, a rotation in blocks that are no power of two.
    """
    name, bits, is_int = options["format"], options["bits"], options["type"] == "int"
    if "compressed" in parts:
        parts = {key: tensor for key, tensor in parts.items() if key not in SPARSE} | {"weight": dense(parts)}
    data = "weight_packed" if "pack" in name else "weight"
    wants = {
        data: True,
        "weight_scale": True,
        "weight_shape": name == "pack-quantized",
        "weight_zero_point": not options["symmetric"],
        "weight_global_scale": options["strategy"] == "tensor_group",
    }
    need(parts, L, [key for key, wanted in wants.items() if wanted], ("weight_g_idx", "weight_zero_point", *ACTIVATIONS))
    if not is_int and not options["symmetric"]:
        raise NotImplementedError(f"{L}: weight_zero_point of floats (symmetric is false): a QTensor has zero points of integers only")
    packing = None
    if name == "pack-quantized":
        packed, shape, packing = read_words(parts, options)
    else:
        packed, shape = _read_int8(parts, bits) if is_int else _read_float(parts, data, bits)
    kinds = SCALES.get(name, FLOATS)
    scale = part(parts, L, "weight_scale", tuple(kinds))
    fmt = Format(
        Int(bits, signed=options["symmetric"]) if is_int else ELEMENTS[bits],
        kinds[scale.dtype],
        {"tensor": (0, 0), "channel": (1, 0), "block": options["block"]}.get(options["strategy"], (1, options["group_size"])),
        None if options["symmetric"] else "int",
        "tensor_divisor" if options["strategy"] == "tensor_group" else None,
        _hadamard(options["hadamard"], shape[-1]),
    )
    scale = _by_group(scale, "weight_scale", fmt, shape)
    scale = scale.view(torch.uint8) if fmt.scale in ("e4m3", "e8m0") else scale
    zero = _read_zero(parts, options, fmt, shape, packing)
    scale_2 = _by_tensor(parts, shape) if fmt.scale_2 else None
    try:
        return validate(QTensor(fmt, shape, packed, scale, zero, scale_2, _group_index(parts, options, shape)))
    except ValueError as error:
        raise ValueError(f"{L}: {str(error).removeprefix('validate: ')}") from None


def write(q, format=None, packing="dense", sparse=None):
    """The tensors of a QTensor: the inverse of read.

    Args:
        format: a name from the table above; None takes the first that can hold q.
        packing: of 3, 5, 6 and 7 bits in pack-quantized: "dense" (version 0.18 and later) or "padded".
        sparse: None, "sparse-24-bitmask" or "sparse-bitmask": how weight is wrapped.

    Raises:
        ValueError: q cannot be stored so, exactly.
    """
    scheme = _scheme(q, format)
    one_of(packing, ("dense", "padded"), f"{L}: packing")
    one_of(sparse, (None, "sparse-24-bitmask", "sparse-bitmask"), f"{L}: sparse")
    bits, k, by_tensor = scheme["bits"], q.shape[-1], scheme["strategy"] == "tensor" and len(q.shape) == 2
    if scheme["format"] == "pack-quantized":
        same = packing == "dense" or 32 % bits == 0
        words = q.packed.clone() if same else pack_words(unpack(q.packed, bits, k), bits, packing)
        parts = {"weight_packed": words, "weight_shape": torch.tensor(q.shape)}
    elif scheme["type"] == "int":
        parts = {"weight": bits_of.sign_extended(unpack(q.packed, bits, k), bits)}
    elif k * bits % (8 if bits != 6 else 24):
        raise ValueError(f"{L}: rows of k={k} codes of {bits} bits do not fill bytes")
    else:
        data = bits_of.to_bytes(q.packed, k * bits // 8)
        parts = {"weight": data.view(torch.float8_e4m3fn)} if bits == 8 else {"weight_packed": data}
    if sparse is not None:
        if "weight" not in parts or len(q.shape) != 2:
            raise ValueError(f"{L}: {sparse} wraps a weight (n, k) of bytes, not a packed one or a stack")
        parts = wrap(parts["weight"], sparse)
    scale = q.scale.clone().view(torch.float8_e4m3fn) if q.format.scale == "e4m3" else q.scale.clone()
    parts["weight_scale"] = scale.flatten() if by_tensor else scale
    if packs_zero(scheme):
        parts["weight_zero_point"] = bits_of.transposed(pack_words(bits_of.transposed(q.zero), bits, packing))
    elif q.zero is not None:
        parts["weight_zero_point"] = bits_of.sign_extended(q.zero, bits).reshape(parts["weight_scale"].shape)
    if q.scale_2 is not None:
        parts["weight_global_scale"] = q.scale_2.flatten()
    if q.group_index is not None:
        parts["weight_g_idx"] = q.group_index.clone()
    return parts


def config_of(q, format=None, packing="dense", sparse=None):
    """A quantization_config of a checkpoint whose layers are all like q."""
    scheme = _scheme(q, format)
    args = {"num_bits": scheme["bits"], "type": scheme["type"], "symmetric": scheme["symmetric"], "strategy": scheme["strategy"]}
    args |= {"group_size": scheme["group_size"]} if scheme["group_size"] else {}
    args |= {"block_structure": list(scheme["block"])} if scheme["block"] else {}
    args |= {"actorder": "group"} if q.group_index is not None else {}
    args |= {"scale_dtype": {"e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}[q.format.scale]} if q.scale.dtype == torch.uint8 else {}
    config = {
        "quant_method": L,
        "format": scheme["format"],
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args, "input_activations": None, "output_activations": None}},
        "ignore": [],
        "version": "0.20.0" if packing == "dense" else "0.17.1",
    }
    if sparse is not None:
        config["sparsity_config"] = {"format": sparse, "targets": ["Linear"], "ignore": []}
    if q.format.hadamard:
        apply = [{"targets": ["Linear"], "location": "weight_input", "inverse": True}, {"targets": ["Linear"], "location": "input"}]
        config["transform_config"] = {"config_groups": {"R": {"type": "hadamard", "head_dim": q.format.hadamard, "apply": apply}}}
    return config


def _read_int8(parts, bits):
    weight = part(parts, L, "weight", (torch.int8,))
    shape = _shape(weight, "weight")
    if bits == 8:
        return bits_of.from_bytes(bits_of.from_twos(weight, 8)), shape
    _check_range(weight, "weight", bits)
    return pack(bits_of.from_twos(weight, bits), bits), shape


def _read_float(parts, name, bits):
    data = part(parts, L, name, (torch.float8_e4m3fn,) if bits == 8 else (torch.uint8,))
    *lead, n, count = _shape(data, name)
    if count * 8 % bits:
        raise ValueError(f"{L}: {name} has rows of {count} bytes, expected whole groups of {bits // 2} (codes of {bits} bits)")
    return bits_of.from_bytes(data.contiguous()), (*lead, n, count * 8 // bits)


def _shape(tensor, name):
    if tensor.dim() not in (2, 3) or not tensor.numel():
        raise ValueError(f"{L}: {name} has shape {tuple(tensor.shape)}, expected (n, k) or (e, n, k), not empty")
    return tuple(tensor.shape)


def _by_group(tensor, name, fmt, shape):
    """A tensor of one value for each group, in the shape of the scale."""
    expected = fmt.scale_shape(shape)
    if fmt.group == (0, 0) and tuple(tensor.shape) in ((), (1,)):
        return tensor.reshape([1] * len(expected)).expand(expected).contiguous()
    if tuple(tensor.shape) != expected:
        gn, gk = fmt.group
        whose = f"each {gn} rows and {gk} columns" if gn * gk else "each row" if gn else "the tensor"
        raise ValueError(f"{L}: {name} has shape {tuple(tensor.shape)}, expected {expected}, one for {whose} of {shape}")
    return tensor.contiguous()


def _by_tensor(parts, shape):
    scale, expected = part(parts, L, "weight_global_scale", (torch.float32,)), (*shape[:-2], 1, 1)
    if scale.numel() not in (1, torch.Size(expected).numel()):
        raise ValueError(f"{L}: weight_global_scale has shape {tuple(scale.shape)}, expected one value")
    return scale.reshape(-1, 1, 1).expand(expected).contiguous() if len(expected) > 2 else scale.reshape(expected)


def _hadamard(block, k):
    block = k if block == -1 else block
    if block & (block - 1) or (block and k % block):
        raise NotImplementedError(f"{L}: an input of k={k} rotated in blocks of {block}: expected a power of two that divides k")
    return block


def _read_zero(parts, options, fmt, shape, packing):
    """Zero points as the codes that stand for them, uint8 in the shape of the scale; None where there are none."""
    bits = options["bits"]
    if options["symmetric"]:
        if bool((parts.get("weight_zero_point", torch.zeros(1)).to(torch.float32) != 0).any()):
            raise ValueError(f"{L}: weight_zero_point is not zero, but the config says symmetric")
        return None
    if packs_zero(options):
        *lead, n, groups = fmt.scale_shape(shape)
        words = part(parts, L, "weight_zero_point", (torch.int32,), (*lead, -1, groups), "as weight_scale has so many groups")
        return bits_of.transposed(unpack_words(bits_of.transposed(words), bits, n, packing, "weight_zero_point"))
    zero = _by_group(part(parts, L, "weight_zero_point", (torch.int8,)), "weight_zero_point", fmt, shape)
    _check_range(zero, "weight_zero_point", bits)
    return bits_of.from_twos(zero, bits)


def _check_range(tensor, name, bits):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if bits < 8 and (int(tensor.min()) < low or int(tensor.max()) > high):
        raise ValueError(f"{L}: {name} ranges from {int(tensor.min())} to {int(tensor.max())}, expected {low} to {high} ({bits} bits)")


def _group_index(parts, options, shape):
    if "weight_g_idx" not in parts:
        return None
    *lead, _, k = shape
    index = part(parts, L, "weight_g_idx", (torch.int32, torch.int64), (*lead, k), "one group for each column")
    if bool((index == -1).all()):
        return None
    if options["strategy"] not in ("group", "tensor_group"):
        raise ValueError(f"{L}: weight_g_idx gives groups, but the strategy is {options['strategy']!r}")
    low, high, groups = int(index.min()), int(index.max()), -(-k // options["group_size"])
    if low < 0 or high >= groups:
        raise ValueError(f"{L}: weight_g_idx ranges from {low} to {high}, expected 0 to {groups - 1}, or -1 everywhere (no order)")
    return index.to(torch.int32).contiguous()


def _scheme(q, format):
    """What options says of a checkpoint of q, or the reason why there is none."""
    fmt = validate(q).format
    is_int = isinstance(fmt.element, Int)
    if not is_int and fmt.element not in ELEMENTS.values():
        raise ValueError(f"{L}: no format has the element {fmt.element}, expected integers, e2m1, e2m3 or e4m3")
    if is_int and (fmt.zero or "none") != ("none" if fmt.element.signed else "int"):
        raise ValueError(f"{L}: {fmt} has unsigned integers with zero {fmt.zero!r}, expected integer zero points, or signed integers")
    bits = fmt.element.bits
    scales = {name: set(SCALES.get(name, FLOATS).values()) for name in QUANTIZED}
    kind = ("int" if is_int else "float", bits)
    can = [name for name in QUANTIZED if kind in QUANTIZED[name] and fmt.scale in scales[name]]
    if fmt.scale_2 is not None:
        can = [name for name in can if name == "nvfp4-pack-quantized" and fmt.scale_2 == "tensor_divisor" and fmt.group[1]]
    if not can or fmt.offset is not None:
        raise ValueError(
            f"{L}: no format holds {fmt}: its scale, scale_2 or offset has no tensor (nvfp4's weight_global_scale is a divisor)"
        )
    one_of(format, (None, *can), f"{L}: format for {fmt}")
    gn, gk = fmt.group
    strategy = {(0, 0): "tensor", (1, 0): "channel"}.get(fmt.group, "group" if gn == 1 else "block")
    if strategy == "block" and not gn * gk:
        raise ValueError(f"{L}: {fmt} has one scale for {gn} rows and {gk} columns (0: all), expected tensor, channel, group or block")
    if fmt.scale_2 is not None and strategy != "group":
        raise ValueError(f"{L}: {fmt} has weight_global_scale under blocks, expected groups")
    if q.group_index is not None and strategy != "group":
        raise ValueError(f"{L}: {fmt} has a group_index, which needs groups along k")
    if len(q.shape) not in (2, 3) or not q.packed.numel():
        raise ValueError(f"{L}: got shape {tuple(q.shape)}, expected (n, k) or (e, n, k), not empty")
    return {
        **{"format": format or can[0], "type": kind[0], "bits": bits, "symmetric": fmt.zero is None},
        **{"strategy": "tensor_group" if fmt.scale_2 else strategy, "group_size": gk if strategy == "group" else None},
        "block": fmt.group if strategy == "block" else None,
    }
