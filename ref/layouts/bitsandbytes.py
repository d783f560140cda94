"""bitsandbytes: NF4 and FP4 by blocks of the flattened weight, and LLM.int8.

4 bits: w = quant_map[code] * absmax[block], where a block is `blocksize` weights in a row of the flattened (row-major) weight.
The table is the one that is stored. Where blocks end with rows they are groups along k, or whole rows; where they do not, the scale
is repeated for groups of gcd(k, blocksize), which no block border cuts: exact, too.

Double quantization: absmax[b] = nested_quant_map[code[b]] * nested_absmax[b // nested_blocksize] + nested_offset, a product and a
sum that bitsandbytes rounds to float32 each, and so does read: the result is the float32 scale. Its second level cannot be told
from it any more, so write stores one level.

8 bits: w = weight * SCB / 127 (rows); bitsandbytes itself multiplies by the float32 next to 1 / 127, and rounds twice.

Source: bitsandbytes 0.50.2 (functional.py, backends/default/ops.py, nn/modules.py), transformers' BitsAndBytesConfig.
"""

import json
import math

import torch

from ..element import NAMED, Codebook, Int
from ..format import Format
from ..pack import pack, unpack
from ..qtensor import QTensor, validate
from . import bits, rules
from .check import check_keys, integer, need, one_of, part

# The 4-bit float's values by code, over its largest, as float32 holds them: the last three bits are not sorted.
_POSITIVE = (torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12).tolist()
FP4 = Codebook("bnbfp4", tuple(_POSITIVE + [0.0] + [-v for v in _POSITIVE[1:]]))
INT8 = Format(Int(8), scale_2="tensor_divisor")
FORMATS = ("nf4_g64", Format(FP4, group=(1, 64)), INT8)

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = ("bfloat16", "float16", "float32")
STORAGE = {
    "uint8": torch.uint8,
    "int8": torch.int8,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
STATE = "weight.quant_state.bitsandbytes__"
SINGLE = ("weight", "weight.absmax", "weight.quant_map")
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
STATE_KEYS = ("quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset")
CONFIG_KEYS = (
    *("quant_method", "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "bnb_4bit_quant_type"),
    *("bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "llm_int8_skip_modules"),
    *("llm_int8_threshold", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight"),
)


def find(names, config):
    """{layer: {part: tensor name}}: what has an absmax (also a parameter that is not called weight, as stacked experts) or an SCB."""
    known, found = set(names), {}
    for name in names:
        if name.endswith(".absmax"):
            parameter = name.removesuffix(".absmax")
            layer = parameter.removesuffix(".weight")
            suffixes = (*SINGLE, *NESTED, STATE + "nf4", STATE + "fp4")
        elif name.endswith(".SCB"):
            layer = name.removesuffix(".SCB")
            parameter, suffixes = layer + ".weight", ("weight",)
        else:
            continue
        found[layer] = {s: t for s in suffixes if (t := parameter + s.removeprefix("weight")) in known}
        if name.endswith(".SCB"):
            found[layer] |= {s: t for s in ("SCB", "weight_format") if (t := f"{layer}.{s}") in known}
    return found


def options(config, layer):
    """{"bits": 4 or 8}, or None for a layer of llm_int8_skip_modules. All else is in the layer's quant_state."""
    where = "bitsandbytes: quantization_config"
    check_keys(config, CONFIG_KEYS, where)
    flags = {}
    for key, default in (("load_in_4bit", False), ("load_in_8bit", False), ("bnb_4bit_use_double_quant", False)):
        flags[key] = one_of(config.get(key, config.get("_" + key, default)), (False, True), f"{where}: {key}")
    one_of(config.get("bnb_4bit_quant_type", "fp4"), ("nf4", "fp4"), f"{where}: bnb_4bit_quant_type")
    one_of(config.get("bnb_4bit_quant_storage") or "uint8", tuple(STORAGE), f"{where}: bnb_4bit_quant_storage")
    one_of(config.get("bnb_4bit_compute_dtype") or "float32", DTYPES, f"{where}: bnb_4bit_compute_dtype")
    if flags["load_in_4bit"] == flags["load_in_8bit"]:
        raise ValueError(f"{where}: load_in_4bit and load_in_8bit are both {flags['load_in_4bit']}, expected one of them to be True")
    skipped = rules.strings(config.get("llm_int8_skip_modules"), f"{where}: llm_int8_skip_modules")
    return None if rules.by_module(layer, skipped) else {"bits": 4 if flags["load_in_4bit"] else 8}


def read(parts, options):
    """The QTensor of one layer.

    4 bits: element nf4, bnbfp4, or a Codebook of the stored table where it is neither; float32 scales in groups of the blocksize,
    of whole rows, or of the largest size that no block border cuts. 8 bits: int8 by row with scale_2 "tensor_divisor" 127.

    Args:
        parts: weight (any dtype of STORAGE: its bytes are meant), weight.absmax, weight.quant_map, weight.quant_state...; or weight,
            SCB, weight_format.

    Raises:
        ValueError: parts that are missing, of a wrong dtype or shape, or that disagree; a config of other bits.
        NotImplementedError: LLM.int8 in the tiled weight formats of old GPUs.
    """
    stored = 8 if "SCB" in parts else 4
    if options and options.get("bits", stored) != stored:
        raise ValueError(
            f"bitsandbytes: the layer has parts of {stored} bits ({', '.join(sorted(parts))}), the config says {options['bits']}"
        )
    return validate(_read_int8(parts) if stored == 8 else _read_4bit(parts))


def _read_int8(parts):
    need(parts, "bitsandbytes", ("weight", "SCB"), ("weight_format",))
    weight = part(parts, "bitsandbytes", "weight", (torch.int8,), (-1, -1))
    n, k = weight.shape
    absmax = part(parts, "bitsandbytes", "SCB", (torch.float32,), (n,), f"with n={n} of weight")
    if parts.get("weight_format") is not None:
        tiles = part(parts, "bitsandbytes", "weight_format", (torch.uint8,), ()).item()
        if tiles:
            raise NotImplementedError(
                f"bitsandbytes: weight_format is {tiles}, expected 0 (rows): 1 to 3 are tiles of old GPU kernels, "
                "which bitsandbytes no longer reads"
            )
    return QTensor(
        INT8, (n, k), pack(bits.from_twos(weight, 8), 8), _finite(absmax, "SCB")[:, None].clone(), None, torch.full((1, 1), 127.0)
    )


def _read_4bit(parts):
    kinds = [p for p in parts if p.startswith(STATE)]
    if len(kinds) != 1 or kinds[0].removeprefix(STATE) not in ("nf4", "fp4"):
        raise ValueError(f"bitsandbytes: expected one {STATE}nf4 or {STATE}fp4, got {', '.join(kinds) or 'neither'}")
    nested = any(p in parts for p in NESTED)
    need(parts, "bitsandbytes", (*SINGLE, *(NESTED if nested else ()), *kinds))
    state = _state(parts, kinds[0], nested)
    shape, blocksize = tuple(state["shape"]), state["blocksize"]
    count, k = math.prod(shape), shape[-1]
    weight = part(parts, "bitsandbytes", "weight", tuple(STORAGE.values()))
    data = weight.contiguous().view(-1).view(torch.uint8)
    if weight.dim() != 2 or 1 not in weight.shape or data.numel() != -(-count // 2):
        raise ValueError(
            f"bitsandbytes: weight has shape {tuple(weight.shape)} and dtype {weight.dtype}, expected one column of "
            f"{-(-count // 2)} bytes, two codes of 4 bits each, for shape {list(shape)} of quant_state"
        )
    table = _finite(part(parts, "bitsandbytes", "weight.quant_map", (torch.float32,), (16,)), "weight.quant_map").tolist()
    blocks = -(-count // blocksize)
    if nested:
        code = part(parts, "bitsandbytes", "weight.absmax", (torch.uint8,), (blocks,), "for the blocks of quant_state")
        second = -(-blocks // state["nested_blocksize"])
        step = part(parts, "bitsandbytes", NESTED[0], (torch.float32,), (second,), "for the nested blocks of quant_state")
        step = step.repeat_interleave(state["nested_blocksize"])[:blocks]
        absmax = part(parts, "bitsandbytes", NESTED[1], (torch.float32,), (256,))[code.int()] * step + torch.tensor(state["nested_offset"])
    else:
        absmax = part(parts, "bitsandbytes", "weight.absmax", (torch.float32,), (blocks,), "for the blocks of quant_state")
    group, block = bits.flat_groups(shape, blocksize)
    fmt = Format(_element(state["quant_type"], tuple(table)), group=group)
    scale = (absmax if block is None else absmax[block]).reshape(fmt.scale_shape(shape)).clone()
    if k % 8 == 0:  # rows are whole words: only the halves of each byte change places
        packed = ((data << 4) | (data >> 4)).view(torch.int32).reshape(*shape[:-1], k // 8)
    else:
        packed = pack(bits.nibbles(data, high_first=True)[:count].reshape(shape), 4)
    return QTensor(fmt, shape, packed, _finite(scale, "weight.absmax"))


def _state(parts, name, nested):
    """The JSON of quant_state, checked."""
    data = part(parts, "bitsandbytes", name, (torch.uint8,), (-1,))
    where = f"bitsandbytes: {name}"
    try:
        state = json.loads(bytes(data.tolist()).decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
    check_keys(state, STATE_KEYS, where)
    one_of(state.get("quant_type"), (name.removeprefix(STATE),), f"{where}: quant_type")
    one_of(state.get("blocksize"), BLOCKSIZES, f"{where}: blocksize")
    one_of(state.get("dtype"), DTYPES, f"{where}: dtype")
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) not in (2, 3) or not all(type(s) is int and s > 0 for s in shape):
        raise ValueError(f"{where}: shape is {shape!r}, expected [n, k] or [e, n, k]")
    if nested != ("nested_offset" in state):
        raise ValueError(
            f"{where}: nested_offset {'is missing' if nested else 'is there'}, but {NESTED[0]} {'is there' if nested else 'is not'}"
        )
    if nested:
        integer(state.get("nested_blocksize"), f"{where}: nested_blocksize", 1, 2**20)
        one_of(state.get("nested_dtype", "float32"), ("float32",), f"{where}: nested_dtype")
        if type(state["nested_offset"]) not in (int, float):
            raise ValueError(f"{where}: nested_offset is {state['nested_offset']!r}, expected a number")
        state["nested_offset"] = float(state["nested_offset"]) if abs(state["nested_offset"]) < 2**1000 else math.inf
    return state


def _element(quant_type, table):
    nominal = {"nf4": NAMED["nf4"], "fp4": FP4}[quant_type]
    return nominal if table == nominal.values else Codebook("bnb" + quant_type, table)


def write(q, *, blocksize=None, dtype="bfloat16", quant_storage="uint8"):
    """The parts of a QTensor of nf4, bnbfp4, a table that read has made, or int8 under the divisor 127.

    Args:
        blocksize: of the 4-bit blocks; None: what the group says by itself. Groups that read has made out of blocks which cross rows
            need it.
        dtype: of the weight before quantization, which quant_state remembers.
        quant_storage: the dtype that the bytes of 4-bit codes are stored as.

    Raises:
        ValueError: bitsandbytes has no such format, or no such blocks.
    """
    validate(q)
    fmt, shape = q.format, tuple(q.shape)
    if q.group_index is not None:
        raise ValueError(f"bitsandbytes: {fmt} has a group_index, and bitsandbytes has none")
    if fmt == INT8:
        if len(shape) != 2 or q.scale_2.item() != 127:
            raise ValueError(f"bitsandbytes: int8 of shape {shape} with scale_2 {q.scale_2.flatten().tolist()}, expected (n, k) and 127")
        weight = bits.to_twos(unpack(q.packed, 8, shape[-1]), 8).view(torch.int8)
        return {"weight": weight, "SCB": q.scale[:, 0].clone(), "weight_format": torch.tensor(0, dtype=torch.uint8)}
    kind = _kind(fmt)
    one_of(dtype, DTYPES, "bitsandbytes: dtype")
    one_of(quant_storage, tuple(STORAGE), "bitsandbytes: quant_storage")
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"bitsandbytes: shape is {shape}, expected (n, k) or (e, n, k) without zeros")
    absmax, blocksize = _absmax(q, blocksize)
    codes = unpack(q.packed, 4, shape[-1]).flatten()
    data = bits.join_nibbles(torch.nn.functional.pad(codes, (0, codes.numel() % 2)), high_first=True)
    size = STORAGE[quant_storage].itemsize
    if data.numel() % size:
        raise ValueError(f"bitsandbytes: quant_storage {quant_storage} takes {size} bytes each, and there are {data.numel()} of codes")
    state = {"quant_type": kind, "blocksize": blocksize, "dtype": dtype, "shape": list(shape)}
    return {
        "weight": data.view(STORAGE[quant_storage])[:, None],
        "weight.absmax": absmax,
        "weight.quant_map": torch.tensor(fmt.element.values, dtype=torch.float32),
        STATE + kind: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def _kind(fmt):
    """nf4 or fp4."""
    element = fmt.element
    kind = {"nf4": "nf4", "bnbnf4": "nf4", "bnbfp4": "fp4"}.get(element.name) if isinstance(element, Codebook) else None
    if (
        kind is None
        or fmt != Format(element, group=fmt.group)
        or torch.tensor(element.values, dtype=torch.float32).tolist() != list(element.values)
    ):
        raise ValueError(
            f"bitsandbytes: cannot store {fmt}: expected nf4 or bnbfp4 with float32 scales and nothing else, or int8 with "
            "scale_2 'tensor_divisor'"
        )
    return kind


def _absmax(q, blocksize):
    """(absmax, blocksize): one value for each block of the flattened weight."""
    (gn, gk), shape = q.format.group, tuple(q.shape)
    wanted = blocksize or gk or (gn or shape[-2]) * shape[-1]
    if wanted not in BLOCKSIZES:
        raise ValueError(f"bitsandbytes: group {q.format.group} is blocks of {wanted}, expected one of {', '.join(map(str, BLOCKSIZES))}")
    group, block = bits.flat_groups(shape, wanted)
    if group != q.format.group:
        raise ValueError(
            f"bitsandbytes: blocks of {wanted} over shape {shape} are groups of {group}, and the weight has groups of {q.format.group}"
        )
    scale = q.scale.flatten()
    if block is None:
        return scale.clone(), wanted
    absmax = bits.unflat(scale, block, int(block[-1]) + 1)
    if absmax is None:
        raise ValueError(f"bitsandbytes: scales differ within a block of {wanted}, which crosses rows")
    return absmax, wanted


def config_of(q, *, blocksize=None, dtype="bfloat16", quant_storage="uint8"):
    """The quantization_config of a checkpoint whose layers are like q; blocksize is in quant_state."""
    config = {"quant_method": "bitsandbytes", "load_in_4bit": q.format != INT8, "load_in_8bit": q.format == INT8}
    if q.format == INT8:
        return config | {"llm_int8_threshold": 6.0}
    return config | {
        "bnb_4bit_quant_type": _kind(q.format),
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": quant_storage,
    }


def _finite(tensor, name):
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"bitsandbytes: {name} is NaN or inf at {tuple((~tensor.isfinite()).nonzero()[0].tolist())}")
    return tensor
