"""torchao: tensor subclasses, taken apart for safetensors.

A parameter `weight` of class C is stored as tensors `_weight_<name>`, and the file's header says what they are: the entry "<layer>.weight"
is {"_type": C, "_data": {attributes}, "_tensor_data_names": [...]} as JSON. find and options take the headers' entries from
config["_metadata"], and where there are none they go by quant_type, the config that the model was quantized with.

What a QTensor cannot carry: Int4PreshuffledTensor (the shuffle is that of one kernel library and nowhere described), weights with
act_pre_scale (it multiplies the layer's input), sparse and opaque tensors. Checkpoints of .bin files hold pickled classes, and
nothing is ever unpickled. Int4TilePackedTo4dTensor is read as NVIDIA GPUs pack it; AMD GPUs pack another order in the same shape.

Source: torchao 0.18.0 (prototype/safetensors, core/config.py, quantization/quant_api.py), transformers' TorchAoConfig.
"""

import difflib
import json
import re

from ..element import Float, Int
from ..qtensor import validate
from . import rules
from . import torchao_tensors as tensors
from .check import check_keys, integer, need, one_of

FORMATS = (
    *("int8", "int8_tensor", "int8_g32", "uint8z", "int4_g32_bf16", "uint4z_g32_bf16", "int3_bf16", "uint3_g32_fp32_zfp32"),
    *("fp8_e4m3", "fp8_e5m2", "fp8_e4m3_tensor", "fp8_e4m3_b128x128", "fp8_e4m3_g128", "int4_g128_bf16_obf16"),
    *("mxfp8", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "nvfp4", "fp4_e2m1_g16_e4m3"),
)

# layouts.open puts what the files' headers say into config["_metadata"].
READS_METADATA = True

# Class: its reader, its tensors, and those that may be there.
CLASSES = {
    "Int8Tensor": (tensors.read_int8, ("qdata", "scale"), ("zero_point", "act_quant_scale", "act_quant_zero_point")),
    "IntxUnpackedToInt8Tensor": (tensors.read_intx, ("qdata", "scale", "zero_point"), ()),
    "Float8Tensor": (tensors.read_float8, ("qdata", "scale"), ()),
    "Int4Tensor": (tensors.read_int4, ("qdata", "scale", "zero_point"), ()),
    "Int4TilePackedTo4dTensor": (tensors.read_tiles, ("qdata", "scale_and_zero"), ()),
    "Int4PlainInt32Tensor": (tensors.read_plain_int32, ("qdata", "scale", "zero_point"), ()),
    "MXTensor": (tensors.read_mx, ("qdata", "scale"), ()),
    "NVFP4Tensor": (tensors.read_nvfp4, ("qdata", "scale"), ("per_tensor_scale", "act_per_tensor_scale")),
}
# Config: the class that it makes.
CONFIGS = {
    **dict.fromkeys(
        ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Int8StaticActivationInt8WeightConfig"), "Int8Tensor"
    ),
    **dict.fromkeys(("IntxWeightOnlyConfig", "Int8DynamicActivationIntxWeightConfig"), "IntxUnpackedToInt8Tensor"),
    **dict.fromkeys(("Float8WeightOnlyConfig", "Float8DynamicActivationFloat8WeightConfig"), "Float8Tensor"),
    **dict.fromkeys(("Int4WeightOnlyConfig", "Float8DynamicActivationInt4WeightConfig"), "Int4Tensor"),
    **dict.fromkeys(("NVFP4WeightOnlyConfig", "NVFP4DynamicActivationNVFP4WeightConfig"), "NVFP4Tensor"),
    "MXDynamicActivationMXWeightConfig": "MXTensor",
}
INT4 = {"PLAIN": "Int4Tensor", "TILE_PACKED_TO_4D": "Int4TilePackedTo4dTensor", "PLAIN_INT32": "Int4PlainInt32Tensor"}
RULES = {"FqnToConfig": ("fqn_to_config", "module_fqn_to_config"), "ModuleFqnToConfig": ("module_fqn_to_config", "fqn_to_config")}
# All inner tensors; the longer names first, so that none is taken for another's end.
NAMES = (
    *("per_tensor_scale", "act_per_tensor_scale", "act_quant_zero_point", "act_quant_scale", "act_pre_scale", "scale_and_zero"),
    *("group_scale", "group_zero", "row_scale", "zero_point", "qdata", "scale"),
)
CONFIG_KEYS = (
    *("quant_method", "quant_type", "quant_type_kwargs", "modules_to_not_convert", "include_input_output_embeddings"),
    *("untie_embedding_weights", "_metadata"),
)
PREFIX = "_weight_"


def find(names, config):
    """{layer: {part: tensor name}}: what has a _<parameter>_qdata. A layer is the module, or the parameter where it is not `weight`."""
    known, found = set(names), {}
    for name in names:
        module, _, last = name.rpartition(".")
        if module and (match := re.fullmatch(r"_(.+)_qdata", last)):
            stem = f"{module}._{match[1]}_"
            layer = module if match[1] == "weight" else f"{module}.{match[1]}"
            found[layer] = {PREFIX + n: stem + n for n in NAMES if stem + n in known}
    return found


def options(config, layer):
    """What read has to know: {"type": the class, "block_size", "shape", "bits", "element", "swizzled"}; None for an unquantized layer.

    The header's entry decides where there is one. Else quant_type does, with modules_to_not_convert, and with the configs by layer of
    FqnToConfig: the layer's own name, else the first "re:" pattern that matches it, else "_default".
    """
    where = "torchao: quantization_config"
    check_keys(config, CONFIG_KEYS, where)
    metadata = config.get("_metadata") or {}
    if not isinstance(metadata, dict):
        raise ValueError(f"{where}: _metadata is {type(metadata).__name__}, expected a dict")
    for name in (f"{layer}.weight", layer):
        if name in metadata:
            return _of_metadata(metadata[name], name)
    found = kind_of(config, layer)
    if found is None:
        return None
    kind, data = found
    if kind not in CONFIGS:
        raise _unknown(kind, CONFIGS, f"{where}: quant_type")
    return _of_config(kind, data, f"{where}: {kind}")


def kind_of(config, layer):
    """(class, fields) of the config that quant_type has for a layer; None where it leaves the layer alone."""
    where = "torchao: quantization_config"
    skipped = rules.strings(config.get("modules_to_not_convert"), f"{where}: modules_to_not_convert")
    quant_type = config.get("quant_type")
    if isinstance(quant_type, str):
        raise NotImplementedError(
            f"{where}: quant_type {quant_type!r} is of a torchao that only pickled its tensors; expected safetensors with metadata"
        )
    check_keys(quant_type, ("default",), f"{where}: quant_type")
    if rules.by_module(layer, skipped):
        return None
    kind, data = _typed(quant_type.get("default"), f"{where}: quant_type")
    if kind in RULES:
        entry = _by_layer(next((data[key] for key in RULES[kind] if data.get(key)), {}), layer, f"{where}: {kind}")
        if entry is None:
            return None
        kind, data = _typed(entry, f"{where}: {kind}")
    return kind, data


def _of_metadata(entry, name):
    where = f"torchao: metadata of {name}"
    try:
        kind, data = _typed(json.loads(entry) if isinstance(entry, str) else entry, where, plain="Tensor")
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
    if kind == "Tensor":
        return None
    if kind not in CLASSES:
        raise _unknown(kind, CLASSES, where)
    found = {"type": kind}
    block = data.get("block_size")
    if block is not None:
        found["block_size"] = _sizes([block] if type(block) is int else block, f"{where}: block_size")
    if data.get("shape") is not None:
        found["shape"] = _sizes(data["shape"], f"{where}: shape")
    if "target_dtype" in data:
        found["bits"] = _bits(data["target_dtype"], f"{where}: target_dtype")
    if "elem_dtype" in data:
        found["element"] = one_of(_dtype(data["elem_dtype"]), tuple(tensors.MX), f"{where}: elem_dtype")
    if data.get("is_swizzled_scales") is not None:
        found["swizzled"] = one_of(data["is_swizzled_scales"], (False, True), f"{where}: is_swizzled_scales")
    return found


def _of_config(kind, data, where):
    found = {"type": CONFIGS[kind]}
    if found["type"] == "Int4Tensor":
        packing = data.get("int4_packing_format", "PLAIN")
        packing = packing.get("_data") if isinstance(packing, dict) else packing
        packing = packing.upper() if isinstance(packing, str) else packing
        if packing == "PRESHUFFLED":
            raise _unknown("Int4PreshuffledTensor", CLASSES, where)
        found["type"] = INT4[one_of(packing, tuple(INT4), f"{where}: int4_packing_format")]
        found["block_size"] = [1, integer(data.get("group_size", 128), f"{where}: group_size", 1, 2**31 - 1)]
    if found["type"] == "IntxUnpackedToInt8Tensor":
        found["bits"] = _bits(data.get("weight_dtype", "int8"), f"{where}: weight_dtype")
    if found["type"] == "MXTensor":
        found["element"] = one_of(_dtype(data.get("weight_dtype", "float8_e4m3fn")), tuple(tensors.MX), f"{where}: weight_dtype")
        found["block_size"] = [integer(data.get("block_size", 32), f"{where}: block_size", 1, 2**31 - 1)]
    return found


def _by_layer(table, layer, where):
    if not isinstance(table, dict):
        raise ValueError(f"{where} is {type(table).__name__}, expected a dict of names")
    for name in (f"{layer}.weight", layer):
        if name in table:
            return table[name]
    for pattern, entry in table.items():
        if pattern.startswith("re:") and any(rules.compiled(pattern[3:]).fullmatch(name) for name in (f"{layer}.weight", layer)):
            return entry
    return table.get("_default")


def _typed(entry, where, plain=None):
    """(_type, _data) of torchao's JSON objects."""
    if not isinstance(entry, dict) or not isinstance(entry.get("_type"), str):
        raise ValueError(f"{where} is {str(entry)[:80]!r}, expected a dict with _type and _data")
    data = entry.get("_data", {} if entry["_type"] == plain else None)
    if not isinstance(data, dict):
        raise ValueError(f"{where}: _data of {entry['_type']} is {type(data).__name__}, expected a dict")
    return entry["_type"], data


def _dtype(entry):
    return entry.get("_data") if isinstance(entry, dict) else entry


def _bits(entry, where):
    return int(one_of(_dtype(entry), tuple(f"int{b}" for b in range(1, 9)), where)[3:])


def _sizes(value, where):
    if not isinstance(value, list) or not value or not all(type(v) is int and v > 0 for v in value):
        raise ValueError(f"{where} is {value!r}, expected sizes of at least 1")
    return value


def _unknown(kind, known, where):
    if "reshuffled" in kind:
        return NotImplementedError(f"{where}: {kind} is shuffled for one kernel library, in an order that is nowhere described")
    nearest = difflib.get_close_matches(kind, known, n=1, cutoff=0.0)[0]
    return NotImplementedError(f"{where}: {kind!r} has no reader; there is {', '.join(known)}; the nearest is {nearest}")


def read(parts, options):
    """The QTensor of one layer.

    Integers are signed where all zero points are 0; else unsigned with integer zeros, or float32 zeros where they are floats; Int4Tensor
    has an offset. Groups are the blocks of the scales; one that is a whole row is (1, 0), a whole tensor
    (0, 0). Scales in tiles are put in rows.

    Args:
        parts: _weight_qdata, _weight_scale...
        options: what `options` gives.

    Raises:
        ValueError: parts that are missing, of a wrong dtype or shape, or out of range, or that contradict the metadata.
        NotImplementedError: an act_pre_scale, or zero points that no QTensor can carry.
    """
    if not isinstance(options, dict) or options.get("type") not in CLASSES:
        raise ValueError(f"torchao: options are {options!r}, expected what options() gives")
    if f"{PREFIX}act_pre_scale" in parts:
        raise NotImplementedError("torchao: act_pre_scale multiplies the layer's input, which is no part of a weight")
    reader, required, optional = CLASSES[options["type"]]
    need(parts, "torchao", tuple(PREFIX + n for n in required), tuple(PREFIX + n for n in optional))
    return validate(reader({name.removeprefix(PREFIX): tensor for name, tensor in parts.items()}, options))


def class_of(q):
    """The class that stores q.

    Raises:
        ValueError: none does.
    """
    fmt, (*_, n, k) = q.format, q.shape
    element, (gn, gk) = fmt.element, fmt.group
    plain = fmt.scale in tensors.FLOATS and fmt.scale_2 is None
    regular = n % (gn or 1) == 0 and k % (gk or 1) == 0 and min(q.shape) > 0 and len(q.shape) in (2, 3)
    if fmt.hadamard or q.group_index is not None or not regular:
        raise ValueError(f"torchao: cannot store {fmt} of shape {tuple(q.shape)}: expected whole groups, (n, k) or (e, n, k), no rotation")
    if fmt.offset is not None:
        if element == Int(4) and fmt.offset == fmt.scale and gn == 1 and gk and k % 2 == 0:
            return "Int4Tensor"
    elif fmt.scale == "e8m0":
        if element in tensors.MX.values() and gn == 1 and gk and fmt.scale_2 is None and (element.bits > 4 or k % 2 == 0):
            return "MXTensor"
    elif fmt.scale == "e4m3":
        if element == Float(2, 1) and fmt.group == (1, 16) and fmt.scale_2 in (None, "tensor"):
            return "NVFP4Tensor"
    elif plain and tensors.whole((gn or n, gk or k), n, k) != fmt.group:
        raise ValueError(
            f"torchao: group {fmt.group} of shape {tuple(q.shape)} is read as {tensors.whole((gn or n, gk or k), n, k)}; expected that"
        )
    elif plain and isinstance(element, Int) and element.signed == (fmt.zero is None) and fmt.zero in (None, "int", "fp32"):
        return "Int8Tensor" if element.bits == 8 and fmt.scale == "fp32" and fmt.zero != "fp32" else "IntxUnpackedToInt8Tensor"
    elif plain and element in tensors.FLOAT8.values() and fmt.scale == "fp32":
        return "Float8Tensor"
    raise ValueError(f"torchao: cannot store {fmt}: no class has such values, scales, zeros and groups")


def write(q, *, swizzled=False):
    """The parts of a QTensor, of the class that stores it.

    Args:
        swizzled: MX and NVFP4 scales in the tiles of the tensor cores.

    Raises:
        ValueError: no class of torchao stores it.
    """
    validate(q)
    writer = {"Int4Tensor": tensors.write_int4, "Float8Tensor": tensors.write_float8}.get(kind := class_of(q), tensors.write_integers)
    if kind in ("MXTensor", "NVFP4Tensor"):
        inner = (tensors.write_mx if kind == "MXTensor" else tensors.write_nvfp4)(q, swizzled)
    else:
        inner = writer(q)
    return {PREFIX + name: tensor for name, tensor in inner.items()}


def metadata_of(layers, *, swizzled=False, dtype="bfloat16"):
    """The header's entries ({str: str}) of a safetensors file with these layers, as torchao reads them back.

    Args:
        layers: {layer: QTensor}.
        dtype: of the weights before quantization, which the classes remember.
    """
    entries = {}
    of_dtype = {"_type": "torch.dtype", "_data": dtype}
    for layer, q in layers.items():
        kind, (*lead, n, k), (gn, gk) = class_of(q), q.shape, q.format.group
        block = [1] * len(lead) + [gn or n, gk or k]
        names = ["qdata", "scale"]
        if kind == "Int8Tensor":
            data = {"act_quant_kwargs": None, "reduce_range": False, "block_size": block, "dtype": of_dtype}
            names = ["zero_point", *names]
        elif kind == "IntxUnpackedToInt8Tensor":
            target = {"_type": "torch.dtype", "_data": f"int{q.format.element.bits}"}
            data = {"target_dtype": target, "block_size": block, "dtype": of_dtype, "activation_quantization": None}
            names = [*names, "zero_point"]
        elif kind == "Float8Tensor":
            preference = {"_type": "KernelPreference", "_data": "AUTO"}
            data = {"block_size": block, "mm_config": None, "act_quant_kwargs": None, "kernel_preference": preference, "dtype": of_dtype}
        elif kind == "Int4Tensor":
            data = {"activation_dtype": {"_type": "torch.dtype", "_data": "bfloat16"}, "block_size": block, "shape": [*lead, n, k]}
            names = [*names, "zero_point"]
        elif kind == "MXTensor":
            element = next(name for name, e in tensors.MX.items() if e == q.format.element)
            element = element if element.startswith("fp6") else {"_type": "torch.dtype", "_data": element}
            data = {
                "elem_dtype": element,
                "block_size": gk,
                "orig_dtype": of_dtype,
                "kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"},
            }
            data |= {"act_quant_kwargs": None, "is_swizzled_scales": swizzled}
        else:
            data = {
                "is_swizzled_scales": swizzled,
                "use_triton_kernel": False,
                "act_quant_kwargs": None,
                "block_size": 16,
                "orig_dtype": of_dtype,
            }
            names = names if q.scale_2 is None else ["per_tensor_scale", *names]
        entries[f"{layer}.weight"] = json.dumps({"_type": kind, "_data": data, "_tensor_data_names": names})
    return entries | {"tensor_names": json.dumps([f"{layer}.weight" for layer in layers])}


def config_of(q, *, swizzled=False):
    """The quantization_config of a checkpoint whose layers are like q; what it says is what read needs without metadata."""
    kind, (gn, gk) = class_of(q), q.format.group
    if (gn, gk) in ((0, 0), (1, 0)):
        granularity = {"_type": "PerTensor", "_data": {}} if gn == 0 else {"_type": "PerRow", "_data": {"dim": -1}}
    elif gn == 1:
        granularity = {"_type": "PerGroup", "_data": {"group_size": gk}}
    else:
        granularity = {"_type": "PerBlock", "_data": {"block_size": [gn or q.shape[-2], gk or q.shape[-1]]}}
    version, data = 1, {}
    if kind == "Int8Tensor":
        name, version, data = "Int8WeightOnlyConfig", 2, {"granularity": granularity}
    elif kind == "IntxUnpackedToInt8Tensor":
        weight = {"_type": "torch.dtype", "_data": f"int{q.format.element.bits}"}
        granularity = {"_type": "PerAxis", "_data": {"axis": 0}} if (gn, gk) == (1, 0) else granularity
        name, version, data = "IntxWeightOnlyConfig", 2, {"weight_dtype": weight, "granularity": granularity}
    elif kind == "Float8Tensor":
        name, version, data = "Float8WeightOnlyConfig", 2, {"granularity": granularity}
    elif kind == "Int4Tensor":
        packing = {"_type": "Int4PackingFormat", "_data": "PLAIN"}
        name, version, data = "Int4WeightOnlyConfig", 2, {"group_size": gk, "int4_packing_format": packing}
    elif kind == "MXTensor":
        element = next(n for n, e in tensors.MX.items() if e == q.format.element)
        weight = element if element.startswith("fp6") else {"_type": "torch.dtype", "_data": element}
        name, data = "MXDynamicActivationMXWeightConfig", {"block_size": gk, "weight_dtype": weight}
    else:
        name, data = "NVFP4WeightOnlyConfig", {"use_dynamic_per_tensor_scale": q.scale_2 is not None}
    default = {"_type": name, "_version": version, "_data": data}
    return {"quant_method": "torchao", "quant_type": {"default": default}, "modules_to_not_convert": None}
