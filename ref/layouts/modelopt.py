"""NVIDIA ModelOpt (quant_method "modelopt"): quantization_config of config.json, and hf_quant_config.json's older form of the same.

    quant_algo                   weight                       weight_scale                weight_scale_2
    FP8                          e4m3 (n, k)                  float32 (), or (n, 1)
    FP8_PER_CHANNEL_PER_TOKEN    e4m3 (n, k)                  float32 (n,)
    FP8_PB_WO, FP8_PB_REAL       e4m3 (n, k)                  float32 (n/128, 1, k/128, 1), or (n/128, k/128); rounded up
    NVFP4, W4A16_NVFP4,          uint8 (n, k/2): e2m1, the    e4m3 (n, k/16)              float32 (), multiplied too
      NVFP4_AWQ, W4A8_NVFP4_FP8    low half first
    MXFP4, W4A8_MXFP4_FP8        uint8 (n, k/2): e2m1         uint8 (n, k/32): e8m0
    MXFP8                        e4m3 (n, k)                  uint8 (n, k/32): e8m0
    W4A16_AWQ                    uint8 (n/2, k): int4, row    float32 (n, k/group_size)
                                   2i low, row 2i+1 high
    W8A16, W8A8_SQ_PER_CHANNEL   int8 (n, k)                  float32 (n,)

w = value * weight_scale * weight_scale_2 of its group; input_scale belongs to the activations and is passed over.

Stacks of experts (Llama 4, GPT-OSS) are tensors X, X_weight_scale, X_weight_scale_2 of a layer X, and hold the transpose:
FP8 (e, k, n) with one scale, NVFP4 (e, k/2, n) with scales (e, k/16, n). They are read as (e, n, k); ref.dequantize(q).transpose(-1, -2)
is what transformers' module holds. Other experts are plain layers, X.experts.0.gate_proj.

A pre_quant_scale (AWQ, SmoothQuant) multiplies x, one factor for each k. It cannot move into the weight's scales, which k's of a
group share, so a layer that has one is refused; one that modelopt has folded into the norm before it leaves no such tensor.

Source: nvidia-modelopt 0.47, modelopt.torch.export.quant_utils, .unified_export_hf, .convert_hf_config, modelopt.torch.quantization.qtensor.
"""

import torch

from ..element import NAMED, Float, Int
from ..format import Format
from ..pack import pack, unpack
from ..qtensor import QTensor, check_parts, validate
from . import bits, rules
from .check import check_keys, integer, need, one_of, part

E2M1, E4M3, INT4, INT8 = Float(2, 1), NAMED["e4m3"], Int(4), Int(8)
FLOATS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
FORMATS = (
    "fp8_tensor",
    "fp8",
    "fp8_e4m3_b128x128",
    "nvfp4",
    "mxfp4",
    "mxfp8",
    "int4_g128",
    "int8",
)

# The first of each is written: what says nothing of inputs, if there is such a one.
NVFP4 = ("W4A16_NVFP4", "NVFP4", "NVFP4_AWQ", "W4A8_NVFP4_FP8")
MXFP4 = ("MXFP4", "W4A8_MXFP4_FP8")
FP8_BLOCK = ("FP8_PB_WO", "FP8_PB_REAL")
INT8_ALGOS = ("W8A16", "W8A8_SQ_PER_CHANNEL")
# quant_algo -> the group size where the config gives none; 0: there are no groups; None: k over the number of scales, since
# modelopt leaves it out of config.json (it is in hf_quant_config.json).
ALGOS = {"FP8": 0, "FP8_PER_CHANNEL_PER_TOKEN": 0, "MXFP8": 32, "W4A16_AWQ": None}
ALGOS |= dict.fromkeys(FP8_BLOCK, 128) | dict.fromkeys(NVFP4, 16) | dict.fromkeys(MXFP4, 32) | dict.fromkeys(INT8_ALGOS, 0)
ALGOS["W4A8_NVFP4_FP8"] = None
REFUSED = {
    "W4A8_AWQ": "its weight is rounded twice, to int4 and then to e4m3 by weight_scale_2, and its input is multiplied by pre_quant_scale",
    "NVFP4_SVD": "a product of two low-rank matrices (svdquant_lora_a, svdquant_lora_b) is added to its result, and no QTensor holds that",
}

LAYER_KEYS = ("quant_algo", "group_size", "has_zero_point", "pre_quant_scale", "lora_rank")
OLD_KEYS = (*LAYER_KEYS, "kv_cache_quant_algo", "exclude_modules", "quantized_layers", "smoothquant_val", "clamp_val", "kv_cache_scheme")
KEYS = (*OLD_KEYS, "quant_method", "producer", "config_groups", "ignore", "quantization", "modules_to_not_convert")
GROUP_KEYS = ("weights", "input_activations", "output_activations", "targets", "format", *LAYER_KEYS)
QUANT_METHODS = ("modelopt", "modelopt_fp4", "modelopt_fp8", "modelopt_mxfp8", "modelopt_mixed")
KV_CACHE = ("FP8", "INT8", "NVFP4", "NVFP4_AFFINE")

SCALES = ("weight_scale", "weight_scale_2", "input_scale")
OTHERS = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")


def find(names, config):
    """{layer: {part: tensor name}}: layers with a weight_scale, and stacks X with an X_weight_scale."""
    known = set(names)
    layers = rules.layers(names, ("weight_scale",), ("weight", *SCALES[1:], *OTHERS))
    for name in names:
        stack = name.removesuffix("_weight_scale")
        if stack != name and stack in known:
            parts = {"weight": stack} | {p: f"{stack}_{p}" for p in (*SCALES, *OTHERS)}
            layers[stack] = {p: tensor for p, tensor in parts.items() if tensor in known}
    return layers


def options(config, layer):
    """{"quant_algo": in capitals, "group_size": 0 where there are no groups, None where the config does not say}; None for
    an excluded layer.

    A pattern of ignore or exclude_modules, or a key of quantized_layers, means the layer too when it means a module that the
    layer is in: modelopt names fused experts by their container.

    Raises:
        ValueError: unknown keys or values, or MIXED_PRECISION without quantized_layers.
        NotImplementedError: an algorithm whose weight no QTensor holds.
    """
    flat = _flatten(config)
    within = [layer[:i] for i, c in enumerate(layer) if c == "."][::-1]
    excluded = [
        key
        for name in ("ignore", "exclude_modules", "modules_to_not_convert")
        for key in rules.strings(flat.get(name), f"modelopt: {name}")
    ]
    if any(rules.by_glob(name, excluded) is not None for name in (layer, *within)):
        return None
    where = "modelopt: quantization_config"
    if _algo(flat.get("quant_algo"), where, ("MIXED_PRECISION",)) == "MIXED_PRECISION":
        per_layer = flat.get("quantized_layers")
        if not isinstance(per_layer, dict) or not per_layer:
            raise ValueError(f"modelopt: quantized_layers is {per_layer!r}, expected a dict of layers: quant_algo is MIXED_PRECISION")
        name = next((name for name in (layer, *within) if name in per_layer), None)
        if name is None:
            return None
        flat, where = per_layer[name], f"modelopt: quantized_layers[{name!r}]"
        check_keys(flat, LAYER_KEYS, where)
    algo = _algo(flat.get("quant_algo"), where)
    if algo is None:
        return None
    if algo in REFUSED:
        raise NotImplementedError(f"modelopt: quant_algo {algo}: {REFUSED[algo]}")
    if flat.get("has_zero_point") not in (None, False):
        raise ValueError(f"{where}: has_zero_point is {flat['has_zero_point']!r}, expected false: no algorithm of modelopt has one")
    size = flat.get("group_size")
    if size is None or ALGOS[algo] == 0:
        return {"quant_algo": algo, "group_size": ALGOS[algo]}
    return {"quant_algo": algo, "group_size": integer(size, f"{where}: group_size", 1, 2**20)}


def _algo(name, where, more=()):
    """quant_algo in capitals (modelopt writes some of them small), or None where nothing but the cache is quantized."""
    if name is None:
        return None
    return one_of(name.upper() if isinstance(name, str) else name, (*ALGOS, *REFUSED, *more), f"{where}: quant_algo")


def _flatten(config):
    """Both forms of the config as one flat dict; the group size of config_groups is the one of all."""
    check_keys(config, KEYS, "modelopt: quantization_config")
    if "quant_method" in config:
        one_of(config["quant_method"], QUANT_METHODS, "modelopt: quant_method")
    if "quantization" in config:
        flat = config["quantization"]
        check_keys(flat, OLD_KEYS, "modelopt: quantization")
    else:
        flat = dict(config)
        sizes = _group_sizes(config.get("config_groups"))
        if flat.get("group_size") is not None:
            sizes.add(integer(flat["group_size"], "modelopt: group_size", 1, 2**20))
        if isinstance(flat.get("quant_algo"), str) and flat["quant_algo"].upper() != "MIXED_PRECISION":
            if len(sizes) > 1:
                raise ValueError(
                    f"modelopt: group_size is {' and '.join(map(repr, sizes))}, expected one: quant_algo is {flat['quant_algo']}"
                )
            flat["group_size"] = next(iter(sizes), None)
    cache = flat.get("kv_cache_quant_algo")
    if cache is not None:
        one_of(cache.upper() if isinstance(cache, str) else cache, KV_CACHE, "modelopt: kv_cache_quant_algo")
    return flat


def _group_sizes(groups):
    sizes = set()
    if groups is None:
        return sizes
    if not isinstance(groups, dict):
        raise ValueError(f"modelopt: config_groups is {groups!r}, expected a dict")
    for name, group in groups.items():
        check_keys(group, GROUP_KEYS, f"modelopt: config_groups[{name!r}]")
        weights = group.get("weights")
        if weights is not None and not isinstance(weights, dict):
            raise ValueError(f"modelopt: config_groups[{name!r}].weights is {weights!r}, expected a dict")
        if (size := (weights or {}).get("group_size")) is not None:
            sizes.add(integer(size, f"modelopt: config_groups[{name!r}].weights.group_size", 1, 2**20))
    return sizes


def read(parts, options):
    """The weight (n, k), or the stack of experts (e, n, k).

    Args:
        parts: the table above; input_scale may be there.
        options: {"quant_algo": ..., "group_size": ...}, as options gives it.

    Raises:
        ValueError: a part is missing or unexpected, has another dtype or shape, or a scale is NaN or inf.
        NotImplementedError: a pre_quant_scale, low-rank matrices, or a stack of an algorithm for which modelopt has no sound one.
    """
    algo, size = options["quant_algo"], options["group_size"]
    for name in OTHERS:
        if parts.get(name) is not None:
            what = "multiplies the input by a factor for each k" if name == "pre_quant_scale" else "adds a low-rank product to the result"
            raise NotImplementedError(f"modelopt: {name} {what}; the scales of a QTensor belong to groups of the weight and cannot hold it")
    need(parts, "modelopt", ("weight", "weight_scale", *(("weight_scale_2",) if algo in NVFP4 else ())), ("input_scale",))
    weight = parts["weight"]
    if isinstance(weight, torch.Tensor) and weight.dim() == 3:
        if algo not in ("FP8", *NVFP4):
            raise NotImplementedError(
                f"modelopt: weight is a stack {tuple(weight.shape)} of {algo}: only those of FP8 and NVFP4 have one layout"
            )
        parts = parts | {"weight": weight.mT}
        if algo in NVFP4 and isinstance(parts["weight_scale"], torch.Tensor) and parts["weight_scale"].dim() == 3:
            parts["weight_scale"] = parts["weight_scale"].mT
    if algo in NVFP4 or algo in MXFP4:
        return _read_fp4(parts, algo, size)
    if algo == "W4A16_AWQ":
        return _read_int4(parts, size)
    if algo in INT8_ALGOS:
        weight = part(parts, "modelopt", "weight", (torch.int8,), (-1, -1))
        n, k = weight.shape
        scale = part(parts, "modelopt", "weight_scale", tuple(FLOATS))
        part(parts, "modelopt", "weight_scale", tuple(FLOATS), (n, 1) if scale.dim() == 2 else (n,), "(n,)")
        packed = bits.from_bytes(bits.from_twos(weight, 8))
        return validate(QTensor(Format(INT8, FLOATS[scale.dtype]), (n, k), packed, scale.reshape(n, 1).clone()))
    return _read_fp8(parts, algo, size)


def _read_fp4(parts, algo, size):
    weight = part(parts, "modelopt", "weight", (torch.uint8,))
    if weight.dim() not in (2, 3):
        raise ValueError(f"modelopt: weight has shape {tuple(weight.shape)}, expected (n, k / 2), or (e, k / 2, n) for a stack")
    *lead, n, half = weight.shape
    k, nv = 2 * half, algo in NVFP4
    dtypes = (torch.float8_e4m3fn,) if nv else (torch.uint8, torch.float8_e8m0fnu)
    size = size or _size(parts, k)
    scale = part(parts, "modelopt", "weight_scale", dtypes, (*lead, n, -(-k // size)), f"(n, k / {size}), k={k} of weight")
    fmt = Format(E2M1, "e4m3" if nv else "e8m0", (1, size), scale_2="tensor" if nv else None)
    scale_2 = None
    if nv:
        second = part(parts, "modelopt", "weight_scale_2", (torch.float32,))
        scale_2 = _per_expert(second, "weight_scale_2", lead)
    packed = bits.from_bytes(weight.contiguous())
    return validate(QTensor(fmt, (*lead, n, k), packed, scale.contiguous().view(torch.uint8).clone(), scale_2=scale_2))


def _read_fp8(parts, algo, size):
    weight = part(parts, "modelopt", "weight", (torch.float8_e4m3fn,))
    if weight.dim() not in (2, 3):
        raise ValueError(f"modelopt: weight has shape {tuple(weight.shape)}, expected (n, k), or (e, k, n) for a stack")
    *lead, n, k = shape = tuple(weight.shape)
    packed = bits.from_bytes(weight.contiguous().view(torch.uint8))
    if algo == "MXFP8":
        why = f"(n, k / {size}), k={k} of weight"
        scale = part(parts, "modelopt", "weight_scale", (torch.uint8, torch.float8_e8m0fnu), (n, -(-k // size)), why)
        return validate(QTensor(Format(E4M3, "e8m0", (1, size)), shape, packed, scale.view(torch.uint8).clone()))
    scale = part(parts, "modelopt", "weight_scale", tuple(FLOATS))
    name = FLOATS[scale.dtype]
    if algo in FP8_BLOCK:
        rows, columns = -(-n // size), -(-k // size)
        expected = (rows, columns) if scale.dim() == 2 else (rows, 1, columns, 1)
        part(parts, "modelopt", "weight_scale", tuple(FLOATS), expected, f"a scale for each block of {size} x {size}")
        return validate(QTensor(Format(E4M3, name, (size, size)), shape, packed, scale.reshape(rows, columns).clone()))
    if algo == "FP8_PER_CHANNEL_PER_TOKEN" or (scale.numel() != 1 and not lead):
        part(parts, "modelopt", "weight_scale", tuple(FLOATS), (n, 1) if scale.dim() == 2 else (n,), "(n,)")
        return validate(QTensor(Format(E4M3, name), shape, packed, scale.reshape(n, 1).clone()))
    return validate(QTensor(Format(E4M3, name, (0, 0)), shape, packed, _per_expert(scale, "weight_scale", lead)))


def _read_int4(parts, size):
    weight = part(parts, "modelopt", "weight", (torch.uint8,), (-1, -1), "(n / 2, k)")
    n, k = 2 * weight.shape[0], weight.shape[1]
    size = size or _size(parts, k)
    scale = part(parts, "modelopt", "weight_scale", tuple(FLOATS), (n, -(-k // size)), f"(n, k / {size}), k={k} of weight")
    rows = torch.stack([weight & 15, weight >> 4], dim=1).flatten(0, 1)
    packed = pack(bits.from_twos(rows, 4), 4)
    return validate(QTensor(Format(INT4, FLOATS[scale.dtype], (1, size)), (n, k), packed, scale.clone()))


def _size(parts, k):
    """The group size that the config does not tell."""
    scale = part(parts, "modelopt", "weight_scale", (*FLOATS, torch.float8_e4m3fn))
    groups = scale.shape[-1] if scale.dim() else 0
    if not groups or k % groups or not k:
        raise ValueError(f"modelopt: weight_scale has shape {tuple(scale.shape)}, expected k={k} to be a multiple of its columns")
    return k // groups


def _per_expert(scale, name, lead):
    """One scale for the tensor, or for each expert of a stack, as (..., 1, 1)."""
    count = torch.Size(lead).numel()
    if scale.numel() not in (1, count) or scale.dim() > len(lead) + 2:
        expected = f"() or ({count},)" if lead else "()"
        raise ValueError(f"modelopt: {name} has shape {tuple(scale.shape)}, expected {expected}")
    return scale.reshape(-1).expand(count).reshape(*lead, 1, 1).clone()


def write(q, quant_algo=None, group_size=None):
    """The tensors, as modelopt writes them: the inverse of read.

    Args:
        quant_algo: one that stores q's format; None: the first that does, in the order of the table above (W8A16 for int8).
        group_size: None, or q's own.

    Raises:
        ValueError: no algorithm stores q exactly so.
    """
    check_parts(q, "modelopt")
    algo = quant_algo or _algos(q)[0]
    if algo not in _algos(q):
        raise ValueError(f"modelopt: quant_algo {algo} does not store {q.format}, expected {' or '.join(_algos(q))}")
    if group_size not in (None, q.format.group[1]):
        raise ValueError(f"modelopt: got group_size={group_size} for {q.format}, expected {q.format.group[1]}")
    fmt, (*lead, n, k) = q.format, q.shape
    if lead and (len(lead) > 1 or algo not in ("FP8", *NVFP4)):
        raise ValueError(f"modelopt: got shape {tuple(q.shape)}, expected (n, k): only FP8 and NVFP4 have stacks of experts")
    if fmt.element == INT4:
        if n % 2:
            raise ValueError(f"modelopt: got n={n}, expected an even number: each byte of {algo} has two rows")
        codes = bits.to_twos(unpack(q.packed, 4, k), 4)
        return {"weight": codes[0::2] | codes[1::2] << 4, "weight_scale": q.scale.clone()}
    if fmt.element == E2M1 and k % 2:
        raise ValueError(f"modelopt: got k={k}, expected an even number: each byte has two codes")
    weight = bits.to_bytes(q.packed, k * fmt.element.bits // 8)
    weight = weight.view(torch.float8_e4m3fn) if fmt.element == E4M3 else weight
    if fmt.element == INT8:
        return {"weight": bits.to_twos(weight, 8).view(torch.int8), "weight_scale": q.scale.reshape(n).clone()}
    scale = q.scale.view(torch.float8_e4m3fn) if fmt.scale == "e4m3" else q.scale
    if lead:
        weight = weight.mT.contiguous()
        scale = scale.mT if algo in NVFP4 else scale
    if algo in FP8_BLOCK:
        scale = scale.reshape(q.scale.shape[0], 1, q.scale.shape[1], 1)
    elif fmt.group == (1, 0):
        scale = scale.reshape(n)
    elif fmt.group == (0, 0):
        scale = _one_or_each(scale)
    parts = {"weight": weight, "weight_scale": scale.clone(memory_format=torch.contiguous_format)}
    return parts if q.scale_2 is None else parts | {"weight_scale_2": _one_or_each(q.scale_2).clone()}


def _one_or_each(scale):
    """A scale of a tensor as (), those of a stack as (e,) where they differ."""
    scale = scale.reshape(-1)
    return scale[0] if scale.numel() and bool((scale == scale[0]).all()) else scale


def _algos(q):
    """The algorithms that store q's format."""
    fmt = q.format
    gn, gk = fmt.group
    plain = fmt.zero is None and fmt.offset is None and not fmt.hadamard and q.group_index is None
    found = ()
    if plain and fmt.scale_2 is None and fmt.scale in FLOATS.values():
        if fmt.element == E4M3:
            found = {(0, 0): ("FP8",), (1, 0): ("FP8_PER_CHANNEL_PER_TOKEN", "FP8")}.get(fmt.group, FP8_BLOCK if gn == gk else ())
        elif fmt.element == INT4 and gn == 1 and gk:
            found = ("W4A16_AWQ",)
        elif fmt.element == INT8 and fmt.group == (1, 0):
            found = INT8_ALGOS
    elif plain and fmt.scale_2 == "tensor" and (fmt.element, fmt.scale, gn) == (E2M1, "e4m3", 1) and gk:
        found = NVFP4
    elif plain and fmt.scale_2 is None and fmt.scale == "e8m0" and gn == 1 and gk:
        found = {E2M1: MXFP4, E4M3: ("MXFP8",)}.get(fmt.element, ())
    if not found:
        names = ", ".join(FORMATS)
        raise ValueError(f"modelopt: got {fmt}{' with group_index' if q.group_index is not None else ''}, expected one like {names}")
    return found


def config_of(q, quant_algo=None, group_size=None):
    """The quantization_config of a checkpoint whose layers are all like q."""
    write(q, quant_algo, group_size)
    config = {"quant_method": "modelopt", "quant_algo": quant_algo or _algos(q)[0], "ignore": [], "producer": {"name": "modelopt"}}
    return config | ({"group_size": q.format.group[1]} if q.format.group[1] else {})
