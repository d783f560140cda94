"""fp8 (quant_method "fp8", "fbgemm_fp8" or "mxfp8"): 8-bit floats with scales by tensor, row or block, and DeepSeek-V4's fp4 experts.

    weight  float8_e4m3fn (or e5m2) (n, k)   w = value * scale of its block; every scale multiplies, also the one called weight_scale_inv
    weight  int8 (n, k / 2)                  w = e2m1 value * scale of 32 along k; low nibble first (routed experts, expert_dtype "fp4")

The scale is weight_scale_inv, weight_scale, scale (DeepSeek-V4) or qscale_weight (Mistral): () or (1,) for the tensor, (n,) or
(n, 1) by row, (ceil(n / bn), ceil(k / bk)) by block of weight_block_size, the last block of a row or column partial; a float
dtype, or powers of two as float8_e8m0fnu or as their bytes. Stacks (e, n, k) of experts have scales (e, ...), and those of
transformers are called experts.gate_up_proj, experts.gate_up_proj_scale_inv and experts.gate_up_proj_activation_scale.

Source: transformers 5.23 integrations/finegrained_fp8.py and fbgemm_fp8.py; DeepSeek-V3 inference/kernel.py (weight_dequant).
"""

import torch

from ..element import NAMED, Float
from ..format import Format
from ..qtensor import QTensor, validate
from . import bits as bits_of
from .check import check_keys, integer, need, one_of, part
from .rules import compiled, strings

L = "fp8"
FORMATS = (
    *("fp8_e4m3_b128x128", "fp8_e4m3_b128x128_bf16", "fp8_e4m3_b128x128_e8m0", "fp8_e4m3_b32x32_e8m0", "fp8_tensor", "fp8_tensor_bf16"),
    *("fp8", "fp8_e5m2_tensor", "mxfp8", "mxfp4"),
)
KEYS = (
    *("quant_method", "activation_scheme", "fmt", "weight_block_size", "scale_fmt", "ignored_layers", "modules_to_not_convert"),
    *("modules_to_convert", "dequantize", "expert_dtype", "activation_scale_ub", "kv_cache_scheme", "packed_modules_mapping"),
)
METHODS = ("fp8", "fbgemm_fp8", "mxfp8")
SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
ACTIVATIONS = ("input_scale", "activation_scale", "qscale_act", "input_scale_ub", "output_scale")
# A stack of experts is named like a layer, and its other tensors by these endings.
STACK = {"_scale_inv": "weight_scale_inv", "_scale": "weight_scale"}
ELEMENTS = {torch.float8_e4m3fn: NAMED["e4m3"], torch.float8_e5m2: NAMED["e5m2"]}
NIBBLES = (torch.int8, torch.uint8, torch.float4_e2m1fn_x2)
SCALE_DTYPES = {
    **{torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"},
    **{torch.float8_e8m0fnu: "e8m0", torch.uint8: "e8m0"},
}
E2M1 = Float(2, 1)


def find(names, config):
    """{layer: {part: tensor name}} of the layers with a scale: X.weight with X.weight_scale_inv (or another name), and stacks X, X_scale_inv."""
    known, found = set(names), {}
    for name in names:
        layer, _, last = name.rpartition(".")
        # Other modules have a "scale", too.
        if last in SCALES[:2] or (last in SCALES and f"{layer}.weight" in known):
            every = ("weight", *SCALES, *ACTIVATIONS)
            found[layer] = {p: f"{layer}.{p}" for p in every if f"{layer}.{p}" in known}
            continue
        for ending, scale in STACK.items():
            stack = name.removesuffix(ending)
            if stack != name and stack in known and not stack.endswith(".weight"):
                extra = {"activation_scale": f"{stack}_activation_scale"}
                found[stack] = {"weight": stack, scale: name} | {p: tensor for p, tensor in extra.items() if tensor in known}
    return found


def options(config, layer):
    """What config says about a layer; None where it is on the list of those that stay as they are.

    An entry of the list means the layers that it names, as a regular expression from the start up to a dot or the end, or as
    an ending: transformers' should_convert_module.

    Returns:
        dict: method; block (bn, bk), None, or "128x128 or none" where the config is silent; dtype ("e4m3", "e5m2" or None);
        expert_dtype ("fp8", "fp4" or None).

    Raises:
        ValueError: unknown keys or values.
    """
    where = f"{L}: quantization_config"
    check_keys(config, KEYS, where)
    method = one_of(config.get("quant_method", "fp8"), METHODS, f"{where}: quant_method")
    one_of(config.get("activation_scheme", "dynamic"), ("dynamic", "static"), f"{where}: activation_scheme")
    one_of(config.get("scale_fmt"), (None, "float", "ue8m0"), f"{where}: scale_fmt")
    dtype = one_of(config.get("fmt"), (None, "e4m3", "e5m2", "e4m3fn", "float8_e4m3fn", "float8_e5m2"), f"{where}: fmt")
    expert_dtype = one_of(config.get("expert_dtype"), (None, "fp8", "fp4"), f"{where}: expert_dtype")
    block = config.get("weight_block_size", None if method == "fbgemm_fp8" else "128x128 or none")
    if isinstance(block, (list, tuple)) and len(block) == 2:
        block = tuple(integer(size, f"{where}: weight_block_size", 1, 2**31 - 1) for size in block)
    elif block is not None and block != "128x128 or none":
        raise ValueError(f"{where}: weight_block_size is {block!r}, expected [rows, columns] or null")
    kept = [entry for key in ("ignored_layers", "modules_to_not_convert") for entry in strings(config.get(key), f"{where}: {key}")]
    if kept and _means(kept, layer):
        return None
    dtype = None if dtype is None else "e4m3" if "e4m3" in dtype else "e5m2"
    return {"method": method, "block": block, "dtype": dtype, "expert_dtype": expert_dtype}


def read(parts, options):
    """The QTensor of a layer.

    Args:
        parts: weight, one of the scales; input scales are accepted and not used.
        options: as the function of this name returns them.

    Raises:
        ValueError: missing, unexpected or contradictory parts, shapes, dtypes or values that do not fit.
    """
    names = [name for name in SCALES if name in parts]
    if len(names) > 1:
        raise ValueError(f"{L}: there are both {names[0]} and {names[1]}, expected one scale")
    name = names[0] if names else SCALES[0]
    need(parts, L, ("weight", name), ACTIVATIONS)
    weight = part(parts, L, "weight", (*ELEMENTS, *NIBBLES))
    if weight.dim() not in (2, 3) or not weight.numel():
        raise ValueError(f"{L}: weight has shape {tuple(weight.shape)}, expected (n, k) or (e, n, k), not empty")
    scale = part(parts, L, name, tuple(SCALE_DTYPES))
    kind = SCALE_DTYPES[scale.dtype]
    scale = scale.view(torch.uint8) if kind == "e8m0" else scale
    fp4 = weight.dtype in NIBBLES
    if fp4 and options["expert_dtype"] == "fp8":
        raise ValueError(f"{L}: weight has dtype {weight.dtype}, which holds fp4, but the config says expert_dtype 'fp8'")
    if not fp4 and options["dtype"] not in (None, str(ELEMENTS[weight.dtype])):
        raise ValueError(f"{L}: weight has dtype {weight.dtype}, but the config says fmt {options['dtype']!r}")
    data = weight.view(torch.uint8)
    if options["method"] == "fbgemm_fp8" and weight.dim() == 3:  # fbgemm's stacks are (e, k, n)
        data = bits_of.transposed(data)
        scale = bits_of.transposed(scale) if scale.dim() == 3 and scale.shape[-2] == 1 else scale
    *lead, n, k = (*data.shape[:-1], data.shape[-1] * (1 + fp4))
    group, scale = _by_32(scale, (*lead, n, k), name) if fp4 else _grouped(scale, (*lead, n, k), options, name)
    fmt = Format(E2M1 if fp4 else ELEMENTS[weight.dtype], kind, group)
    try:
        return validate(QTensor(fmt, (*lead, n, k), bits_of.from_bytes(data.contiguous()), scale.contiguous()))
    except ValueError as error:
        raise ValueError(f"{L}: {name}: {str(error).removeprefix('validate: ')}") from None


def write(q, quant_method=None, scale_name=None):
    """The tensors of a QTensor: weight and its scale, the inverse of read.

    Args:
        quant_method: "fp8" or "fbgemm_fp8"; None takes fbgemm_fp8 for scales by row, and fp8 for all others.
        scale_name: None takes weight_scale_inv for blocks, scale for fp4, else weight_scale.

    Raises:
        ValueError: q cannot be stored so, exactly.
    """
    method, fmt = _method(q, quant_method), q.format
    fp4, lead, k = fmt.element == E2M1, q.shape[:-2], q.shape[-1]
    default = "scale" if fp4 else "weight_scale" if fmt.group in ((0, 0), (1, 0)) else "weight_scale_inv"
    name = one_of(scale_name, (None, *SCALES), f"{L}: scale_name") or default
    if fp4 and k % 2:
        raise ValueError(f"{L}: rows of k={k} codes of 4 bits do not fill bytes")
    data = bits_of.to_bytes(q.packed, k // (1 + fp4))
    if method == "fbgemm_fp8" and lead:
        data = bits_of.transposed(data)
    dtypes = {element: dtype for dtype, element in ELEMENTS.items()} | {E2M1: torch.int8}
    scale = q.scale.clone().view(torch.float8_e8m0fnu) if fmt.scale == "e8m0" else q.scale.clone()
    return {"weight": data.view(dtypes[fmt.element]), name: scale.reshape(()) if fmt.group == (0, 0) and not lead else scale}


def config_of(q, quant_method=None, scale_name=None):
    """A quantization_config of a checkpoint whose layers are all like q."""
    method, fmt = _method(q, quant_method), q.format
    if method == "fbgemm_fp8":
        return {"quant_method": method, "activation_scale_ub": 1200.0, "modules_to_not_convert": []}
    config = {"quant_method": method, "activation_scheme": "dynamic", "modules_to_not_convert": []}
    if fmt.element == E2M1:
        return config | {"expert_dtype": "fp4", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    config |= {"fmt": str(fmt.element), "weight_block_size": list(fmt.group) if fmt.group[1] else None}
    return config | ({"scale_fmt": "ue8m0"} if fmt.scale == "e8m0" else {})


def _by_32(scale, shape, name):
    *lead, n, k = shape
    expected = (*lead, n, -(-k // 32))
    if tuple(scale.shape) != expected:
        raise ValueError(f"{L}: {name} has shape {tuple(scale.shape)}, expected {expected}: fp4 has one scale for each 32 of k={k}")
    return (1, 32), scale


def _grouped(scale, shape, options, name):
    """The group, and the scale in its shape: by block if the config says so, else by what the scale's shape means."""
    *lead, n, k = shape
    lead, got, block = tuple(lead), tuple(scale.shape), options["block"]
    rows_alone = got in ((*lead, n), (*lead, n, 1))
    halves = lead and got[:-1] == (*lead, 2) and n % 2 == 0  # a stack's gate and up, each with a scale of its own
    if options["method"] == "fbgemm_fp8" and rows_alone:
        return (1, 0), scale.reshape(*lead, n, 1)
    if isinstance(block, str):
        grid = (*lead, -(-n // 128), -(-k // 128))
        block = (128, 128) if got == grid and not rows_alone and scale.numel() > torch.Size(lead).numel() else None
    if block is not None:
        columns = -(-k // block[1])
        if got == (*lead, -(-n // block[0]), columns):
            return block, scale
        if halves and n <= block[0] and got[-1] == columns:
            return (n // 2, block[1]), scale
        expected = (*lead, -(-n // block[0]), columns)
        raise ValueError(f"{L}: {name} has shape {got}, expected {expected}: one for each block of {block[0]} x {block[1]} of {shape}")
    if got in (lead, (*lead, 1), (*lead, 1, 1)) or (not lead and got == ()):
        return (0, 0), scale.reshape(*lead, 1, 1)
    if rows_alone:
        return (1, 0), scale.reshape(*lead, n, 1)
    if halves and got[-1] == 1:
        return (n // 2, 0), scale
    raise ValueError(
        f"{L}: {name} has shape {got}, expected one value, or one for each of n={n} rows (the config has no weight_block_size)"
    )


def _method(q, method):
    """The quant_method that stores q; ValueError where none does."""
    fmt, (*lead, n, _) = validate(q).format, q.shape
    if len(q.shape) not in (2, 3) or not q.packed.numel():
        raise ValueError(f"{L}: got shape {tuple(q.shape)}, expected (n, k) or (e, n, k), not empty")
    if fmt.element not in (*ELEMENTS.values(), E2M1) or fmt.scale not in SCALE_DTYPES.values():
        raise ValueError(f"{L}: {fmt} cannot be stored: expected e4m3, e5m2 or e2m1, with scales in float32, float16, bfloat16 or e8m0")
    if fmt.scale_2 or fmt.offset or fmt.hadamard or q.group_index is not None:
        raise ValueError(f"{L}: {fmt} has a second scale, an offset, a rotation or a group_index, and there is no tensor for it")
    if fmt.element == E2M1 and fmt.group != (1, 32):
        raise ValueError(f"{L}: {fmt} cannot be stored: e2m1 has one scale for each 32 along k")
    gn, gk = fmt.group
    halves = lead and gk == 0 and gn > 1 and 2 * gn == n
    if fmt.group not in ((0, 0), (1, 0)) and not gn * gk and not halves:
        raise ValueError(f"{L}: {fmt} has one scale for {gn} rows and {gk} columns (0: all), expected the tensor, rows or blocks")
    method = one_of(method, (None, "fp8", "fbgemm_fp8"), f"{L}: quant_method")
    by_row = fmt.group == (1, 0)
    if (method == "fbgemm_fp8" and not by_row) or (method == "fp8" and by_row and n == 1):
        raise ValueError(f"{L}: {fmt} with n={n} cannot be stored by {method}: rows belong to fbgemm_fp8, all else to fp8")
    return method or ("fbgemm_fp8" if by_row else "fp8")


def _means(entries, layer):
    # One expression of all of them: a list of hundreds is held against tens of thousands of layers.
    every = "|".join(f"(?:{entry})" for entry in entries)
    try:
        return layer.endswith(tuple(entries)) or compiled(f"(?:{every})(?:(?<=\\.)|(?=\\.|$))").match(layer) is not None
    except ValueError as error:
        raise ValueError(f"{L}: quantization_config: modules_to_not_convert: {error}") from None
