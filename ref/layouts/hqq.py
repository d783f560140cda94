"""HQQ: integers with float zero points, in groups along a row (axis 1) or across the rows (axis 0).

w = (code - zero) * scale, with the weight reshaped to (-1, group_size) and one scale a row for axis 1, to (group_size, -1) and one
scale a column for axis 0. The reshaped codes are cut along their first axis in as many chunks as one word has codes, and a word holds
one code of each chunk, the first chunk highest: bytes for 1, 2 and 4 bits, int32 with ten codes for 3 bits (the last chunk padded);
5, 6 and 8 bits have a byte each, and 1.58 bits (codes 0 to 2) two bits.

Groups of axis 1 are groups along k. Groups of axis 0 run over rows that are (n k / group_size) entries apart: no block of a QTensor, so
scales and zeros are repeated for each weight, group (1, 1): exact, and as large as the weights themselves. Where a group is a whole
column it is group (0, 1).

HQQ itself rounds the difference and the product to the dtype of its scales.

Quantized scales and zeros (quant_scale, quant_zero of old checkpoints) were only ever pickled: HQQ refuses to write them as
safetensors, and read refuses them.

Source: hqq 0.2.8.post1 (core/quantize.py, core/bitpack.py, core/utils.py), transformers' HqqConfig and its integrations/hqq.py.
"""

import math

import torch

from ..element import Int
from ..format import Format
from ..pack import pack, unpack
from ..qtensor import QTensor, validate
from . import bits, rules
from .check import check_keys, integer, need, one_of, part

FORMATS = (*(f"uint{b}_g64_fp16_zfp16" for b in (8, 6, 5, 4, 3, 2, 1)), "uint4_g64_bf16_zbf16", "uint4_g1_fp16_zfp16")

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Packing: bits of a field, fields in a word, the word's dtype.
PACKINGS = {
    "8bit_u8": (8, 1, torch.uint8),
    "4bit_u8": (4, 2, torch.uint8),
    "3bit_32": (3, 10, torch.int32),
    "2bit_u8": (2, 4, torch.uint8),
    "1bit_u8": (1, 8, torch.uint8),
}
# nbits and packing, and the bits that codes need. HQQ loads nbits 1.58 as 1.
BITS = {(8, "8bit_u8"): 8, (6, "8bit_u8"): 6, (5, "8bit_u8"): 5, (4, "4bit_u8"): 4, (3, "3bit_32"): 3, (2, "2bit_u8"): 2}
BITS |= {(1.58, "2bit_u8"): 2, (1, "2bit_u8"): 2, (1, "1bit_u8"): 1}
REQUIRED = ("W_q", "shape", "nbits", "group_size", "axis", "packing")
OPTIONAL = (
    *("scale", "zero", "zero_scale", "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero", "compute_dtype"),
    *("channel_wise", "optimize", "round_zero", "offload_meta", "encoded_state_dict", "stores_quant_config"),
)
QUANTIZED = ("scale_q", "zero_q", "meta_scale", "meta_zero", "meta")
CONFIG_KEYS = (
    "quant_method",
    "quant_config",
    "skip_modules",
    "dynamic_config",
    "nbits",
    "group_size",
    "axis",
    "view_as_float",
    "quant_zero",
    "quant_scale",
    "offload_meta",
)
LAYER_KEYS = ("weight_quant_params", "scale_quant_params", "zero_quant_params", "offload_meta")
WEIGHT_KEYS = ("nbits", "channel_wise", "group_size", "optimize", "round_zero", "axis", "view_as_float")


def find(names, config):
    """{layer: {part: tensor name}}."""
    return rules.layers(names, ("W_q",), (*REQUIRED[1:], *OPTIONAL, *QUANTIZED))


def options(config, layer):
    """What the config says of a layer: {"nbits", "group_size", "axis"} as far as they are there; None for a layer it leaves out.

    quant_config is the same for all layers, or {tag: quant_config}, where a tag is the layer's name without "model", "layers" and
    numbers ("self_attn.q_proj"); a tag that is not there leaves its layers out.
    """
    where = "hqq: quantization_config"
    check_keys(config, CONFIG_KEYS, where)
    tag = ".".join(word for word in layer.split(".") if word not in ("model", "layers") and not word.isnumeric())
    if {tag, layer} & set(rules.strings(config.get("skip_modules"), f"{where}: skip_modules")):
        return None
    of_layer = config.get("quant_config")
    if isinstance(of_layer, dict) and of_layer and not set(of_layer) & set(LAYER_KEYS):
        if of_layer.get(tag) is None:
            return None
        of_layer = of_layer[tag]
    check_keys(of_layer, LAYER_KEYS, f"{where}: quant_config")
    said = of_layer.get("weight_quant_params")
    check_keys(said, WEIGHT_KEYS, f"{where}: weight_quant_params")
    for key in ("scale_quant_params", "zero_quant_params"):
        if of_layer.get(key) is not None and not isinstance(of_layer[key], dict):
            raise ValueError(f"{where}: {key} is {of_layer[key]!r}, expected None or a dict")
    found = {}
    if "nbits" in said:
        found["nbits"] = one_of(said["nbits"], (8, 6, 5, 4, 3, 2, 1.58, 1), f"{where}: nbits")
    if "axis" in said:
        found["axis"] = one_of(said["axis"], (0, 1), f"{where}: axis")
    if said.get("group_size") is not None:  # None is a whole row (axis 1) or column
        found["group_size"] = integer(said["group_size"], f"{where}: group_size", 1, 2**31 - 1)
    return found


def read(parts, options):
    """The QTensor of one layer: unsigned integers with float scales and zeros of one dtype.

    Args:
        parts: the layer's state dict as HQQ encodes it for safetensors: W_q; scale and zero (or zero_scale, both stacked); shape,
            nbits, group_size, axis, packing and flags as small tensors, strings as their characters.

    Raises:
        ValueError: parts that are missing, of a wrong dtype or shape, or that contradict each other or the config.
        NotImplementedError: quantized scales or zeros, or one scale for the whole tensor (channel_wise False), which HQQ uses for
            scales only.
    """
    if quantized := [p for p in QUANTIZED if p in parts] or [p for p in ("quant_scale", "quant_zero") if p in parts and _number(parts, p)]:
        raise NotImplementedError(
            f"hqq: {quantized[0]} says that scales or zeros are quantized themselves, with tensors that HQQ never wrote as safetensors"
        )
    stacked = "zero_scale" in parts
    need(parts, "hqq", (*REQUIRED, *(("zero_scale",) if stacked else ("scale", "zero"))), OPTIONAL)
    if "channel_wise" in parts and not _number(parts, "channel_wise"):
        raise NotImplementedError("hqq: channel_wise is 0, one scale for the whole tensor: HQQ stores no weights so")
    shape = part(parts, "hqq", "shape", (torch.int64, torch.int32), (2,)).tolist()
    if min(shape) < 1:
        raise ValueError(f"hqq: shape is {shape}, expected two sizes of at least 1")
    axis, nbits = one_of(_number(parts, "axis"), (0, 1), "hqq: axis"), round(_number(parts, "nbits"), 2)
    size = integer(_number(parts, "group_size"), "hqq: group_size", 1, math.prod(shape))
    packing = one_of(_string(parts, "packing"), tuple(PACKINGS), "hqq: packing")
    if (nbits, packing) not in BITS:
        raise ValueError(
            f"hqq: nbits is {nbits}, expected one of {', '.join(str(b) for b, p in BITS if p == packing)} with packing {packing}"
        )
    for name, got in (("nbits", nbits), ("axis", axis), ("group_size", size)):
        said = (options or {}).get(name, got)
        if said != got and {said, got} != {1, 1.58}:
            raise ValueError(f"hqq: {name} is {got}, the config says {said}")
    if math.prod(shape) % size:
        raise ValueError(f"hqq: group_size {size} does not divide the {math.prod(shape)} weights of shape {shape}")
    groups = math.prod(shape) // size
    rows, columns = (groups, size) if axis else (size, groups)
    codes = _unpack(parts, packing, rows, columns).reshape(shape)
    width = BITS[nbits, packing]
    if packing == "8bit_u8" and int(codes.max()) >= 2**width:
        raise ValueError(f"hqq: W_q reaches {int(codes.max())}, expected at most {2**width - 1} ({width} bits)")
    of_group = (groups, 1) if axis else (1, groups)
    if stacked:
        zero, scale = part(parts, "hqq", "zero_scale", tuple(DTYPES.values()), (2, *of_group))
    else:
        scale = part(parts, "hqq", "scale", tuple(DTYPES.values()), of_group, f"for group_size {size} of axis {axis}")
        zero = part(parts, "hqq", "zero", (scale.dtype,), of_group)
    for name, tensor in (("scale", scale), ("zero", zero)):
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"hqq: {name} is NaN or inf at {tuple((~tensor.isfinite()).nonzero()[0].tolist())}")
    dtype = next(name for name, d in DTYPES.items() if d == scale.dtype)
    group, index = _groups(shape, size, axis)
    fmt = Format(Int(width, signed=False), dtype, group, zero=dtype)
    scale, zero = (_spread(t.flatten(), size, index).reshape(fmt.scale_shape(shape)).clone() for t in (scale, zero))
    return validate(QTensor(fmt, tuple(shape), pack(codes, width), scale, zero))


def _groups(shape, size, axis):
    """(group, None) where the stored scales are those of the group in their order; else (group, index) as flat_groups has it for
    axis 1, and (group, "tiled") for axis 0: row after row of the reshaped weight has the same scales."""
    if axis:
        return bits.flat_groups(shape, size)
    return ((0, 1), None) if size == shape[0] else ((1, 1), "tiled")


def _spread(t, size, index):
    return t if index is None else t.repeat(size) if isinstance(index, str) else t[index]


def _collect(t, groups, index):
    """The inverse of _spread; None where scales differ within a group."""
    if not isinstance(index, str):
        return t.clone() if index is None else bits.unflat(t, index, groups)
    return t[:groups].clone() if torch.equal(t, t[:groups].repeat(len(t) // groups)) else None


def _unpack(parts, packing, rows, columns):
    """W_q as uint8 (rows, columns)."""
    width, chunks, dtype = PACKINGS[packing]
    data = part(parts, "hqq", "W_q", (dtype, *DTYPES.values()))
    if data.dim() == 2 and data.dtype != dtype:  # view_as_float
        length = data.shape[1] * data.itemsize
        data = data.contiguous().view(dtype) if length % dtype.itemsize == 0 else data
    padded = -(-rows // chunks) * chunks if packing == "3bit_32" else rows
    if padded % chunks or tuple(data.shape) != (padded // chunks, columns) or data.dtype != dtype:
        raise ValueError(
            f"hqq: W_q has shape {tuple(parts['W_q'].shape)} and dtype {parts['W_q'].dtype}, expected ({padded // chunks}, {columns}) of "
            f"{dtype} (or its bytes as floats) for {rows} x {columns} codes packed as {packing}"
        )
    fields = [(data >> (width * (chunks - 1 - i)) & (2**width - 1)).to(torch.uint8) for i in range(chunks)]
    return torch.cat(fields)[:rows] if chunks > 1 else data


def _number(parts, name):
    tensor = part(parts, "hqq", name, (torch.uint8, torch.int32, torch.int64, torch.bool, torch.float32))
    if tensor.numel() != 1:
        raise ValueError(f"hqq: {name} has shape {tuple(tensor.shape)}, expected one value")
    value = tensor.item()
    return int(value) if value == value and abs(value) < 2**62 and value == int(value) else value


def _string(parts, name):
    return "".join(map(chr, part(parts, "hqq", name, (torch.uint8,), (-1,)).tolist()))


def write(q, *, axis=1, group_size=None, view_as_float=False):
    """The parts of a QTensor of unsigned integers (1 to 6 or 8 bits) with float scales and zeros of one dtype.

    Args:
        axis, group_size: of HQQ's groups; None: the group's size along k, or for axis 0 the number of rows. Groups that cross rows, and
            all but whole columns of axis 0, need it.
        view_as_float: store the codes' bytes as numbers of the scale's dtype.

    Raises:
        ValueError: HQQ has no such format, or no such groups.
    """
    validate(q)
    fmt, shape, width = q.format, tuple(q.shape), q.format.element.bits
    dtype = DTYPES.get(fmt.scale)
    if dtype is None or fmt != Format(Int(width, signed=False), fmt.scale, fmt.group, zero=fmt.scale) or q.group_index is not None:
        raise ValueError(f"hqq: cannot store {fmt}: expected unsigned integers with scales and zeros in one of {', '.join(DTYPES)}")
    if width == 7 or len(shape) != 2 or 0 in shape:
        raise ValueError(f"hqq: cannot store {width} bits of shape {shape}: expected 1 to 6 or 8 bits of shape (n, k)")
    one_of(axis, (0, 1), "hqq: axis")
    size = group_size or (fmt.group[1] or (fmt.group[0] or shape[0]) * shape[1] if axis else shape[0])
    if math.prod(shape) % integer(size, "hqq: group_size", 1, math.prod(shape)):
        raise ValueError(f"hqq: group_size {size} does not divide the {math.prod(shape)} weights of shape {shape}")
    groups = math.prod(shape) // size
    group, index = _groups(shape, size, axis)
    if group != fmt.group:
        raise ValueError(
            f"hqq: group_size {size} of axis {axis} over shape {shape} is groups of {group}, and the weight has groups of {fmt.group}"
        )
    of_group = (groups, 1) if axis else (1, groups)
    scale, zero = (_collect(t.flatten(), groups, index) for t in (q.scale, q.zero))
    if scale is None or zero is None:
        raise ValueError(f"hqq: scales or zeros differ within a group of {size} of axis {axis}")
    packing = "1bit_u8" if width == 1 else next(p for b, p in BITS if b == width)
    field, chunks, word = PACKINGS[packing]
    codes = unpack(q.packed, width, shape[1]).reshape((groups, size) if axis else (size, groups))
    if packing == "3bit_32":
        codes = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % chunks))
    if len(codes) % chunks:
        raise ValueError(
            f"hqq: {len(codes)} rows of {codes.shape[1]} codes (group_size {size}, axis {axis}), expected a multiple of "
            f"{chunks} for {packing}"
        )
    joined = torch.zeros(len(codes) // chunks, codes.shape[1], dtype=word)
    for i, chunk in enumerate(codes.chunk(chunks)):
        joined |= chunk.to(word) << (field * (chunks - 1 - i))
    if view_as_float:
        if codes.shape[1] * word.itemsize % dtype.itemsize:
            raise ValueError(
                f"hqq: view_as_float with rows of {codes.shape[1] * word.itemsize} bytes, expected a multiple of {dtype.itemsize}"
            )
        joined = joined.view(dtype)
    flags = {"view_as_float": view_as_float, "quant_scale": False, "quant_zero": False, "channel_wise": True, "optimize": True}
    flags |= {"round_zero": width == 4, "offload_meta": False, "encoded_state_dict": True, "stores_quant_config": True}
    strings = {"packing": packing, "unpack_view_dtype": str(word), "compute_dtype": str(dtype)}
    return (
        {"W_q": joined, "scale": scale.reshape(of_group), "zero": zero.reshape(of_group), "shape": torch.tensor(shape)}
        | {name: torch.tensor(v, dtype=torch.int32) for name, v in (("nbits", width), ("group_size", size), ("axis", axis))}
        | {name: torch.tensor(int(v), dtype=torch.uint8) for name, v in flags.items()}
        | {name: torch.tensor(list(v.encode()), dtype=torch.uint8) for name, v in strings.items()}
    )


def config_of(q, *, axis=1, group_size=None, view_as_float=False):
    """The quantization_config of a checkpoint whose layers are like q."""
    width, (gn, gk), (n, k) = q.format.element.bits, q.format.group, q.shape
    size = group_size or (gk or (gn or n) * k if axis else n)
    weight = {"nbits": width, "channel_wise": True, "group_size": size, "optimize": True, "round_zero": width == 4, "axis": axis}
    of_layer = {"weight_quant_params": weight | {"view_as_float": view_as_float}, "scale_quant_params": None, "zero_quant_params": None}
    return {"quant_method": "hqq", "quant_config": of_layer | {"offload_meta": False}, "skip_modules": ["lm_head"]}
