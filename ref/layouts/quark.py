"""AMD Quark (quant_method "quark"): every dtype under scales by tensor, channel, group or block.

    weight                  codes, packed by dtype (quark_codes)
    weight_scale            qscheme per_tensor (), per_channel (n,), per_group (n, k/g), per_block (n/bn, k/bk); floats, or
                            scale_format "e8m0" (biased by 127) or "e5m3" (unsigned, biased by 15) as uint8
    weight_zero_point       integers, packed as codes; or like weight_scale (zero_point_type "float32")
    w = (code - zero_point) * scale

per_group integers are stored transposed, weight_scale with them: (k/g, n). Quark's file-to-file export leaves weight_scale
as it is, so (n, k/g) is read, too.

A weight can have two stages, a list in the config; tensors of the second end in _2:
    the scale is quantized (is_scale_quant), as in NVFP4:    w = value * weight_scale * weight_scale_2, weight_scale fp8 codes
    the quantized tensor is quantized again (progressive):   w = (code - weight_zero_point_2) * weight_scale_2 * weight_scale

dtype "mx" (older exports, now fp4 or fp6 with scale_format e8m0) stores exponents without bias, in a weight_scale or in front
of each block of weight. Scales and zero points of inputs, outputs and biases are passed over.

Source: amd-quark 0.13, quark.torch.export (nn.modules.realquantizer, utils), quark.torch.quantization.config.
"""

import torch

from ..element import Int
from ..format import Format
from ..pack import pack, unpack
from ..qtensor import QTensor, check_parts, validate
from . import rules
from .check import need, one_of, part
from .quark_codes import (
    FLOATS,
    INTEGERS,
    REORDER,
    read_floats,
    read_integers,
    read_mx,
    transposed,
    write_floats,
    write_integers,
    write_mx,
)
from .quark_config import SECOND, options, spec_of, stages_of

UINT2 = Int(2, signed=False)
FORMATS = (
    "int8",
    "int4_g128",
    "int4_tensor",
    "int3_g128",
    "int2_g64",
    "uint4z_g128",
    Format(UINT2, group=(1, 64), zero="fp32"),
    "fp8_tensor",
    "fp8",
    "fp8_e5m2",
    "fp8_e4m3_b128x128",
    "mxfp4",
    "mxfp6_e2m3",
    "mxfp6_e3m2",
    "mxfp8",
    "nvfp4",
    "fp4_e2m1_g32_ue5m3",
    Format(Int(4), scale_2="tensor"),
)

# What is part of a layout and lives beside it.
__all__ = ["FORMATS", "config_of", "find", "options", "read", "write"]

FLOAT8_SCALES = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
PARTS = ("weight_scale", "weight_scale_2", "weight_zero_point", "weight_zero_point_2")
PASSED = tuple(f"{t}_{p}{i}" for t in ("input", "output", "bias") for p in ("scale", "zero_point") for i in ("", "_2"))
ROTATIONS = ("input_rotation", "input_prescale")


def find(names, config):
    """{layer: {part: tensor name}}: layers with a weight_scale; with dtype "mx" also those whose config says so.

    The one-tensor form of "mx" has nothing but a weight, as norms and embeddings have: names with "norm" or "embed" are left out.
    """
    others = ("weight", *PARTS, *PASSED, *ROTATIONS)
    layers = rules.layers(names, ("weight_scale",), others)
    for layer, parts in rules.layers(names, ("weight",), others).items():
        if layer not in layers and "norm" not in layer and "embed" not in layer:
            stages = stages_of(config, layer)
            if stages is not None and stages[0]["dtype"] == "mx":
                layers[layer] = parts
    return layers


def read(parts, options):
    """The weight.

    Args:
        parts: weight, weight_scale and so on, as above; those of inputs, outputs and biases may be there.
        options: {"spec": ..., "pack_method": ...}, as options gives it.

    Returns:
        QTensor (n, k), or (e, n, k) for a stack of float weights with scales by group or block.

    Raises:
        ValueError: a part is missing or unexpected, has another dtype or shape, values out of range or scales that are no numbers.
        NotImplementedError: an input_rotation or input_prescale, which the weight alone does not hold.
    """
    stages = options["spec"]
    for name in ROTATIONS:
        if parts.get(name) is not None:
            raise NotImplementedError(f"quark: {name} transforms the input before the product; the scales of a QTensor cannot hold it")
    progressive = len(stages) == 2 and not stages[1]["is_scale_quant"]
    main, end = (stages[1], "_2") if progressive else (stages[0], "")
    if main["dtype"] == "mx":
        need(parts, "quark", ("weight",), ("weight_scale", *PASSED))
        packed, scale, shape = read_mx(parts, main["mx_element_dtype"])
        return validate(QTensor(Format(FLOATS[main["mx_element_dtype"]], "e8m0", (1, 32)), shape, packed, scale))
    second = ("weight_scale", "weight_scale_2") if len(stages) == 2 else ("weight_scale",)
    zero_name = "weight_zero_point" + end
    need(parts, "quark", ("weight", *second), (*PARTS[2:4], *PASSED))
    for name in PARTS[2:4]:
        if name != zero_name or main["dtype"] in FLOATS:
            _no_zero(parts, name)
    order = REORDER if options["pack_method"] == "reorder" else None
    if main["dtype"] in FLOATS:
        packed, shape = read_floats(parts, main["dtype"])
        element, codes = FLOATS[main["dtype"]], None
    else:
        codes, shape, element = *_read_codes(parts, main, order, "weight_scale" + end), None
    group = _group(main)
    scale_name, scale = _read_scale(parts, "weight_scale" + end, main, stages, shape)
    zero, zero_format = None, None
    if codes is not None:
        width, signed = INTEGERS[main["dtype"]]
        element = Int(width, signed and main["symmetric"])
        packed = pack(codes, width)
        zero, zero_format = _read_zero(parts, zero_name, main, order, scale.shape)
    scale_2 = None
    if len(stages) == 2:
        other = part(parts, "quark", "weight_scale" if progressive else "weight_scale_2", tuple(SCALES))
        if other.numel() != 1 or other.dim() > 2 or len(shape) > 2:
            raise ValueError(f"quark: the tensor's scale has shape {tuple(other.shape)} for a weight {shape}, expected () for (n, k)")
        scale_2 = other.reshape(1, 1).to(torch.float32, copy=True)
    fmt = Format(element, scale_name, group, zero=zero_format, scale_2=None if scale_2 is None else "tensor")
    return validate(QTensor(fmt, shape, packed, scale, zero, scale_2))


def _group(stage):
    """(gn, gk) of a stage."""
    if stage["qscheme"] == "per_channel":
        return (1, 0) if stage["ch_axis"] == 0 else (0, 1)
    if stage["qscheme"] == "per_group":
        return (1, stage["group_size"])
    return (0, 0) if stage["qscheme"] == "per_tensor" else tuple(stage["block_size"])


def _no_zero(parts, name):
    """Refuse a zero point that is not zero, where a weight has none (Quark stores zeros for symmetric ones, too)."""
    if parts.get(name) is not None:
        zero = part(parts, "quark", name, (torch.int32, torch.int8, torch.uint8, *SCALES))
        if bool((zero != 0).any()):
            raise ValueError(f"quark: {name} is not zero, but the config says that the weight has no zero point")


def _read_codes(parts, stage, order, scale_name):
    """(codes uint8 (n, k), shape) of integers."""
    codes = read_integers(parts, "weight", stage["dtype"], order)
    if parts["weight"].dim() != 2:
        raise ValueError(f"quark: weight has shape {tuple(parts['weight'].shape)}, expected two axes")
    if transposed(stage["dtype"], stage["qscheme"]):
        k, padded = codes.shape
        n = _across(parts, scale_name, k, stage)[0]
        if not 0 <= padded - n < 8 or (padded != n and INTEGERS[stage["dtype"]][0] != 4):
            shape, scales = tuple(parts["weight"].shape), tuple(parts[scale_name].shape)
            raise ValueError(f"quark: weight has shape {shape}, {padded} columns of codes, but {scale_name} {scales} is for {n} rows")
        codes = codes[:, :n].T.contiguous()
    return codes, tuple(codes.shape)


def _across(parts, name, k, stage):
    """(n, whether it is transposed) of a scale of groups of integers: (k/g, n), or (n, k/g) in file-to-file exports."""
    scale, size = part(parts, "quark", name, (*SCALES, torch.uint8, torch.float8_e8m0fnu, *FLOAT8_SCALES), (-1, -1)), stage["group_size"]
    if k % size:
        raise ValueError(f"quark: weight has k={k}, expected a multiple of group_size={size}: groups of integers are whole")
    if k // size not in scale.shape:
        raise ValueError(f"quark: {name} has shape {tuple(scale.shape)}, expected ({k // size}, n) or (n, {k // size}): k={k} of weight")
    return (scale.shape[1], True) if scale.shape[0] == k // size else (scale.shape[0], False)


def _read_scale(parts, name, stage, stages, shape):
    """(the scale's name, the scale in its QTensor's shape)."""
    if len(stages) == 2 and stages[1]["is_scale_quant"]:
        scale_name, dtype = SECOND[stages[1]["dtype"]]
        names = {dtype: scale_name}
    else:
        names = SCALES | {torch.float8_e8m0fnu: "e8m0"}
        names |= {"e8m0": {torch.uint8: "e8m0"}, "e5m3": {torch.uint8: "ue5m3"}}.get(stage["scale_format"], {})
    *lead, n, k = shape
    scale = part(parts, "quark", name, tuple(names))
    scale_name = names[scale.dtype]
    scale = scale.view(torch.uint8) if scale.dtype.itemsize == 1 else scale
    qscheme, gk = stage["qscheme"], _group(stage)[1]
    if qscheme in ("per_tensor", "per_channel"):
        count = {(0, 0): 1, (1, 0): n, (0, 1): k}[_group(stage)]
        if lead or scale.numel() != count or scale.dim() > 2 or (scale.dim() == 2 and 1 not in scale.shape):
            expected = f"({count},)" if qscheme == "per_channel" else "()"
            raise ValueError(
                f"quark: {name} has shape {tuple(scale.shape)} for a weight {shape}, expected {expected} for (n, k): {qscheme}"
            )
        return scale_name, scale.reshape((n, 1) if _group(stage) == (1, 0) else (1, count)).clone()
    if stage["dtype"] in INTEGERS:
        rows, exchanged = _across(parts, name, k, stage)
        if rows != n:
            raise ValueError(f"quark: {name} has shape {tuple(scale.shape)}, expected ({k // gk}, {n}): weight is {shape}")
        return scale_name, (scale.T if exchanged else scale).clone(memory_format=torch.contiguous_format)
    expected = Format(FLOATS[stage["dtype"]], group=_group(stage)).scale_shape(shape)
    part(parts, "quark", name, tuple(names), expected, f"{qscheme} of weight {shape}")
    return scale_name, scale.clone()


def _read_zero(parts, name, stage, order, shape):
    """(the zero point in the scale's shape, "int" or its float dtype), or (None, None) for symmetric signed integers."""
    width, signed = INTEGERS[stage["dtype"]]
    if signed and stage["symmetric"]:
        _no_zero(parts, name)
        return None, None
    need({name: parts.get(name)}, "quark", (name,))
    exchanged = transposed(stage["dtype"], stage["qscheme"])
    rows, columns = shape[::-1] if exchanged else shape if stage["qscheme"] == "per_group" else (1, shape[0] * shape[1])
    if stage["zero_point_type"] == "float32":
        if signed:
            raise NotImplementedError(
                f"quark: {name} has float zero points for {stage['dtype']}: a QTensor has them for unsigned integers only"
            )
        # 0.13 writes int32, without the fractions that it has quantized with; its reader takes them as they are.
        zero = part(parts, "quark", name, (*SCALES, torch.int32))
        if zero.numel() != shape[0] * shape[1] or (exchanged and tuple(zero.shape) != shape[::-1]):
            raise ValueError(f"quark: {name} has shape {tuple(zero.shape)}, expected {tuple(shape[::-1] if exchanged else shape)}")
        if zero.dtype == torch.int32 and zero.numel() and not 0 <= int(zero.min()) <= int(zero.max()) < 2**width:
            raise ValueError(f"quark: {name} ranges from {int(zero.min())} to {int(zero.max())}, expected 0 to {2**width - 1}")
        zero = zero.T if exchanged else zero.reshape(shape)
        zero = zero.to(torch.float32 if zero.dtype == torch.int32 else zero.dtype, copy=True).contiguous()
        return zero, SCALES[zero.dtype]
    if stage["qscheme"] == "per_tensor":
        zero = part(parts, "quark", name, (torch.int32, torch.int8, torch.uint8))
        if zero.numel() != 1:
            raise ValueError(f"quark: {name} has shape {tuple(zero.shape)}, expected (): per_tensor")
        value = int(zero) + signed * 2 ** (width - 1)
        if not 0 <= value < 2**width:
            raise ValueError(f"quark: {name} is {int(zero)}, expected an integer in the range of {stage['dtype']}")
        return torch.full((1, 1), value, dtype=torch.uint8), "int"
    zero = read_integers(parts, name, stage["dtype"], order)
    if zero.shape[0] != rows or not 0 <= zero.shape[1] - columns < 8:
        raise ValueError(
            f"quark: {name} has shape {tuple(parts[name].shape)}, expected {rows} rows of {columns} zero points of {stage['dtype']}"
        )
    zero = zero[:, :columns]
    return (zero.T if exchanged else zero.reshape(shape)).contiguous(), "int"


def write(q, spec=None, pack_method="reorder", joined=False):
    """The tensors, as Quark writes them: the inverse of read.

    Args:
        spec: the weight's stages, as options gives them; None: one stage (two where q has a scale_2) that stores q's format.
        pack_method: "reorder" or "order", of 4-bit integers.
        joined: with dtype "mx", exponents in front of their blocks, in weight, as older exports had them.

    Raises:
        ValueError: q cannot be stored so, exactly.
    """
    check_parts(q, "quark")
    one_of(pack_method, ("reorder", "order"), "quark: pack_method")
    stages = spec_of(q.format) if spec is None else spec
    progressive = len(stages) == 2 and not stages[1]["is_scale_quant"]
    main = stages[1] if progressive else stages[0]
    _check_stored(q, main, stages, progressive)
    if main["dtype"] == "mx":
        if q.shape[-1] % 32:
            raise ValueError(f"quark: got k={q.shape[-1]}, expected a multiple of 32: dtype 'mx' has whole blocks")
        return write_mx(q, main["mx_element_dtype"], joined)
    fmt, k = q.format, q.shape[-1]
    order = REORDER if pack_method == "reorder" else None
    scale = q.scale.view(SECOND[stages[1]["dtype"]][1]) if len(stages) == 2 and not progressive else q.scale
    integers = main["dtype"] in INTEGERS
    if main["qscheme"] in ("per_tensor", "per_channel"):
        scale = scale.reshape(() if main["qscheme"] == "per_tensor" else -1)
    elif integers:
        scale = scale.T
        if k % main["group_size"]:
            raise ValueError(f"quark: got k={k}, expected a multiple of group_size={main['group_size']}: groups of integers are whole")
    end = "_2" if progressive else ""
    parts = {"weight_scale" + end: scale.clone(memory_format=torch.contiguous_format)}
    if integers:
        exchanged = transposed(main["dtype"], main["qscheme"])
        codes = unpack(q.packed, fmt.element.bits, k)
        parts["weight"] = write_integers(codes.T.contiguous() if exchanged else codes, "weight", main["dtype"], order, exchanged)
        zero = _write_zero(q, main, order)
        parts |= {} if zero is None else {"weight_zero_point" + end: zero}
    else:
        parts["weight"] = write_floats(q, main["dtype"])
    if q.scale_2 is not None:
        parts["weight_scale" if progressive else "weight_scale_2"] = q.scale_2.reshape(()).clone()
    return parts


def _write_zero(q, stage, order):
    """weight_zero_point: the zeros of symmetric weights too, as far as Quark can pack them."""
    width, signed = INTEGERS[stage["dtype"]]
    if q.zero is not None and q.format.zero != "int":
        return (q.zero.T if stage["qscheme"] == "per_group" else q.zero.reshape(q.zero.shape[0])).contiguous().clone()
    symmetric = q.zero is None
    zero = torch.full(q.scale.shape, 2 ** (width - 1), dtype=torch.uint8) if symmetric else q.zero
    if stage["qscheme"] == "per_tensor":
        if stage["dtype"] in ("int3", "uint2"):
            if symmetric:
                return None
            raise ValueError(f"quark: got a zero point of the tensor, which {stage['dtype']} does not pack")
        container = {"int8": torch.int8, "uint8": torch.uint8}.get(stage["dtype"], torch.int32)
        return (zero.to(torch.int32) - signed * 2 ** (width - 1)).to(container).reshape(())
    exchanged = transposed(stage["dtype"], stage["qscheme"])
    rows = zero.T.contiguous() if exchanged else zero.reshape(1, -1) if stage["qscheme"] == "per_channel" else zero
    try:
        stored = write_integers(rows, "weight_zero_point", stage["dtype"], order, fill=True)
    except ValueError:
        if symmetric:
            return None
        raise
    return stored[0] if stage["qscheme"] == "per_channel" else stored


def _check_stored(q, main, stages, progressive):
    """Refuse a q that these stages do not store."""
    fmt, dtype = q.format, main["dtype"]
    element, zero = FLOATS.get(main["mx_element_dtype"] if dtype == "mx" else dtype), None
    if dtype in INTEGERS:
        width, signed = INTEGERS[dtype]
        element = Int(width, signed and main["symmetric"])
        zero = None if element.signed else "int" if main["zero_point_type"] == "int32" else fmt.zero
    if len(stages) == 2 and not progressive:
        scales = (SECOND[stages[1]["dtype"]][0],)
    elif dtype == "mx":
        scales = ("e8m0",)
    else:
        scales = (*SCALES.values(), *{"e8m0": ("e8m0",), "e5m3": ("ue5m3",)}.get(main["scale_format"], ()))
    stored = Format(element, fmt.scale, (1, 32) if dtype == "mx" else _group(main), zero, "tensor" if len(stages) == 2 else None)
    stack = len(q.shape) == 3 and dtype in FLOATS and main["qscheme"] in ("per_group", "per_block") and len(stages) == 1
    if stored != fmt or fmt.scale not in scales or q.group_index is not None or (len(q.shape) != 2 and not stack):
        index = " with group_index" if q.group_index is not None else ""
        told = f"{dtype} {main['qscheme']}, {' or '.join(scales)} scales{', two stages' if len(stages) == 2 else ''}"
        raise ValueError(f"quark: got {fmt} of shape {tuple(q.shape)}{index}, expected what {told} stores: {stored}")
    if fmt.zero not in (None, "int") and main["zero_point_type"] != "float32":
        raise ValueError(f"quark: got {fmt}, expected integer zero points: zero_point_type is int32")


def config_of(q, spec=None, pack_method="reorder", joined=False):
    """The quantization_config of a checkpoint whose layers are all like q."""
    write(q, spec, pack_method, joined)
    stages = spec_of(q.format) if spec is None else spec
    return {
        "quant_method": "quark",
        "global_quant_config": {
            "weight": stages[0] if len(stages) == 1 else stages,
            "input_tensors": None,
            "output_tensors": None,
            "bias": None,
        },
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "exclude": [],
        "export": {"pack_method": pack_method, "weight_format": "real_quantized"},
    }
