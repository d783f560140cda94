"""What the quantization config that a checkpoint came with says of a layer's input."""

from dataclasses import replace

import torch

from ref.element import Int
from ref.format import Format, parse_format
from ref.layouts import (
    LAYOUTS,
    auto_round,
    bitnet,
    compressed_tensors,
    compressed_tensors_config,
    fp8,
    humming,
    modelopt,
    quark,
    quark_codes,
    quark_config,
    rules,
    torchao,
)
from ref.layouts.check import integer, one_of

from .input_config import NOT_QUANTIZED, TENSOR, TOKEN, input_format, overridden

# Activations as they are, and not static.
AS_IT_IS = (None, False)


def input_of(layout, config, layer):
    """What a checkpoint's own config says of the input of a layer.

    Args:
        layout: the layout's name, as Checkpoint.layout or quant_method has it.
        config: the quantization config. layer: the layer's name in the checkpoint.

    Returns:
        (Format, static): static: the scale of the tensor is stored with the layer (static_scale reads it).
        (None, False): x is not quantized; so it is with all layouts that are of weights alone, and for layers left alone.
        An upper bound of activations' scales (fbgemm_fp8) is not applied: nothing is clipped. Columns of outliers that LLM.int8 keeps in 16
        bits have no format: its x stays as it is.

    Raises:
        ValueError: no such layout; unknown keys or wrong values.
        NotImplementedError: activations that have no Format here, as asymmetric ones.

    >>> config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    >>> str(input_of("fp8", config, "model.layers.0.mlp.up_proj")[0])
    'fp8_e4m3_g128'
    """
    module = layout_of(layout)
    return READERS[module](config, layer) if module in READERS else AS_IT_IS


def layout_of(name):
    """The module of ref.layouts with this name, or for this quant_method.

    Raises:
        ValueError: there is none.
    """
    known = {module.__name__.rpartition(".")[2]: module for module in LAYOUTS.values()} | LAYOUTS
    return known[one_of(name, tuple(known), "layout")]


def static_scale(parts):
    """The scale of a layer's input, as linear's x_scale: float32, one value, or one for each expert of a stack.

    Args:
        parts: {part: tensor} of what the checkpoint stores for the layer. input_global_scale (compressed-tensors) divides.

    Raises:
        ValueError: there is none, or it is no positive number.
    """
    for name in ("input_scale_2", "input_scale", "activation_scale", "qscale_act", "input_global_scale"):
        if parts.get(name) is not None:
            scale = parts[name].float().reshape(-1)
            if not bool((scale.isfinite() & (scale > 0)).all()):
                raise ValueError(f"{name} is {scale.tolist()}, expected positive numbers: it is the scale of the layer's input")
            return 1 / scale if name == "input_global_scale" else scale
    raise ValueError(f"there is no input_scale (there is {', '.join(sorted(parts)) or 'nothing'}), but the config says that it is static")


def _refused(where, what, nearest):
    return NotImplementedError(
        f"{where}: {what} have no format here; the nearest that has one is {nearest}; an input config (FAST_INPUT_QUANT_CONFIG) counts first"
    )


def _compressed_tensors(config, layer):
    group = compressed_tensors_config.scheme(config, layer)
    said = None if group is None else group.get("input_activations")
    if said is None:
        return AS_IT_IS
    where = f"compressed-tensors: input_activations of {layer}"
    kind, bits = str(said.get("type") or "int").lower(), said.get("num_bits", 8)
    one_of(kind, ("int", "float"), f"{where}: type")
    element = compressed_tensors.ELEMENTS.get(bits) if kind == "float" else Int(bits) if bits in range(2, 9) else None
    if element is None:
        raise _refused(where, f"{kind}s of {bits!r} bits", "num_bits 8")
    if not one_of(said.get("symmetric", True), (True, False), f"{where}: symmetric"):
        raise _refused(where, "activations with zero points (symmetric false)", "symmetric true")
    dynamic = one_of(said.get("dynamic") or False, (True, False, "local"), f"{where}: dynamic")
    size, strategy = said.get("group_size"), said.get("strategy")
    strategy = (strategy or ("group" if size not in (None, -1) else "tensor")).lower()
    if strategy == "tensor" and dynamic != "local":
        return Format(element, "fp32", TENSOR), not dynamic
    if strategy == "token" and dynamic is True:
        return Format(element, "fp32", TOKEN), False
    if strategy in ("group", "tensor_group"):
        size = integer(size, f"{where}: group_size", 1, 2**20)
    if strategy == "group" and dynamic is True:
        mx = str(group.get("format") or config.get("format")).startswith("mx")
        stored = str(said.get("scale_dtype")).removeprefix("torch.")
        scale = {"uint8": "e8m0", "float8_e8m0fnu": "e8m0", "float8_e4m3fn": "e4m3"}.get(stored, "e8m0" if mx else "fp32")
        return Format(element, scale, (1, size)), False
    if strategy == "tensor_group":
        second = "channel" if dynamic is True else "tensor"
        return Format(element, "e4m3", (1, size), scale_2=second), second == "tensor"
    raise _refused(where, f"scales with strategy {strategy!r} and dynamic {dynamic!r}", "strategy 'token' with dynamic true")


def _fp8(config, layer):
    said = fp8.options(config, layer)
    if said is None:
        return AS_IT_IS
    if said["method"] == "mxfp8":
        return parse_format("mxfp8"), False
    if config.get("activation_scheme") == "static":
        return parse_format("fp8_e4m3_tensor"), True
    if isinstance(said["block"], tuple):
        return Format(
            fp8.ELEMENTS[torch.float8_e4m3fn], "e8m0" if config.get("scale_fmt") == "ue8m0" else "fp32", (1, said["block"][1])
        ), False
    return parse_format("fp8_e4m3_token"), False


# quant_algo -> the input of a layer, and whether its scale is stored; all others are of weights alone.
MODELOPT = {
    **dict.fromkeys(("NVFP4", "NVFP4_AWQ"), ("nvfp4", True)),
    **dict.fromkeys(("FP8", "W4A8_NVFP4_FP8"), ("fp8_e4m3_tensor", True)),
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8_e4m3_token", False),
    "W4A8_MXFP4_FP8": ("fp8_e4m3_tensor", False),
    "MXFP4": ("mxfp4", False),
    "MXFP8": ("mxfp8", False),
    "W8A8_SQ_PER_CHANNEL": ("int8_tensor", True),
}


def _modelopt(config, layer):
    said = modelopt.options(config, layer)
    if said is None or said["quant_algo"] not in MODELOPT:
        return AS_IT_IS
    name, static = MODELOPT[said["quant_algo"]]
    fmt = parse_format(name)
    return replace(fmt, group=(1, said["group_size"])) if fmt.group[1] and said["group_size"] else fmt, static


def _quark(config, layer):
    stages = quark_config.stages_of(config, layer, "input_tensors")
    where = f"quark: input_tensors of {layer}"
    if quark_config.options(config, layer) is None or stages is None or stages[0]["dtype"] in NOT_QUANTIZED:
        return AS_IT_IS
    said, second = stages[0], stages[1] if len(stages) == 2 else None
    dtype = said.get("mx_element_dtype") if said["dtype"] == "mx" else said["dtype"]
    bits, signed = quark_codes.INTEGERS.get(dtype, (8, True))
    element = Int(bits) if dtype in quark_codes.INTEGERS and signed else quark_codes.FLOATS.get(dtype)
    if element is None or (isinstance(element, Int) and said.get("symmetric") is False):
        raise _refused(where, f"activations of dtype {dtype!r}, symmetric {said.get('symmetric')!r}", "int8 with symmetric true")
    dynamic = said["dtype"] == "mx" or bool(said.get("is_dynamic", said.get("dynamic")))
    qscheme = "per_group" if said["dtype"] == "mx" else said.get("qscheme")
    axis = said.get("ch_axis", said.get("axis"))
    if qscheme == "per_group" and dynamic:
        size = integer(said.get("group_size") or (32 if said["dtype"] == "mx" else None), f"{where}: group_size", 1, 2**20)
        if second is None:
            mx = said["dtype"] == "mx" or said.get("scale_format") == "e8m0"
            return Format(element, "e8m0" if mx else "fp32", (1, size)), False
        by = {"per_tensor": "tensor", "per_channel": "channel"}.get(second.get("qscheme"))
        if second.get("is_scale_quant") and second["dtype"] == "fp8_e4m3" and by and bool(second.get("is_dynamic")) == (by == "channel"):
            return Format(element, "e4m3", (1, size), scale_2=by), by == "tensor"
    if qscheme == "per_tensor" and second is None:
        return Format(element, "fp32", TENSOR), not dynamic
    # x has the axes (..., tokens, k): its scales are those of tokens unless the axis is the last one.
    if qscheme == "per_channel" and dynamic and second is None and axis in (0, 1, -2):
        return Format(element, "fp32", TOKEN), False
    what = f"scales with qscheme {qscheme!r}, ch_axis {axis!r}, is_dynamic {dynamic}" + (", quantized in turn" if second else "")
    raise _refused(where, what, "per_channel with ch_axis 1 and is_dynamic true (by token)")


def _humming(config, layer):
    if humming.options(config, layer) is None:
        return AS_IT_IS
    # "dtype", "group_size" and "scale_dtype" are the weight's in a checkpoint.
    said = {key: value for key, value in config.items() if key in humming.INPUT}
    override = rules.dynamic(layer, config.get("dynamic") or {})
    return input_format(overridden(said, {key: value for key, value in override.items() if key in humming.INPUT}))


def _bitnet(config, layer):
    return AS_IT_IS if bitnet.options(config, layer) is None else (parse_format("int8_token"), False)


def _auto_round(config, layer):
    said = auto_round.settings_of(config, layer)
    where = f"auto_round: input of {layer}"
    bits = 16 if said["act_bits"] is None else integer(said["act_bits"], f"{where}: act_bits", 2, 32)
    if bits >= 16 or auto_round.options(config, layer) is None:
        return AS_IT_IS
    kind, size, dynamic = said["act_data_type"] or said["data_type"] or "int", said["act_group_size"], said["act_dynamic"] is not False
    if kind.startswith("nv_fp") and bits == 4 and "static" in kind:
        return parse_format("nvfp4"), True
    if kind.startswith("mx_fp") and bits in (4, 8):
        return parse_format(f"mxfp{bits}"), False
    element = {"fp": compressed_tensors.ELEMENTS.get(bits), "in": Int(bits) if bits <= 8 else None}.get(kind[:2])
    if element is None or (isinstance(element, Int) and said["act_sym"] is False):
        raise _refused(where, f"activations of {bits} bits of {kind!r}, act_sym {said['act_sym']!r}", "int8 with act_sym true")
    size = -1 if size is None else integer(size, f"{where}: act_group_size", -1, 2**20)
    if not dynamic and size:
        raise _refused(where, f"static scales with act_group_size {size}", "act_group_size 0")
    return Format(element, "fp32", {0: TENSOR, -1: TOKEN}.get(size, (1, size))), not dynamic


# torchao's configs -> the input, where they say no more of it. Others that name an activation mean one that has no Format.
TORCHAO = {
    "Int8DynamicActivationInt8WeightConfig": "int8_token",
    "Float8DynamicActivationFloat8WeightConfig": "fp8_e4m3_tensor",
    "Float8DynamicActivationInt4WeightConfig": "fp8_e4m3_token",
    "MXDynamicActivationMXWeightConfig": "mxfp8",
}


def _torchao(config, layer):
    found = torchao.kind_of(config, layer) if config.get("quant_type") is not None else None
    if found is None or "Activation" not in found[0]:
        return AS_IT_IS
    kind, data = found
    granularity = data.get("granularity")
    granularity = granularity[0] if isinstance(granularity, list) else granularity  # of activations, and then of weights
    said = [data.get("act_mapping_type"), data.get("activation_dtype"), granularity and {"_data": granularity["_type"]}]
    mapping, dtype, granularity = (one.get("_data") if isinstance(one, dict) else one for one in said)
    groups = {None: None, "PerTensor": TENSOR, "PerRow": TOKEN}
    plain = mapping in (None, "SYMMETRIC") and dtype in (None, "float8_e4m3fn") and granularity in groups
    if kind not in TORCHAO or not plain:
        what = f"activations of {kind} with act_mapping_type {mapping}, activation_dtype {dtype}, granularity {granularity}"
        raise _refused(f"torchao: {layer}", what, "Int8DynamicActivationInt8WeightConfig")
    fmt = parse_format(TORCHAO[kind])
    return (fmt if groups[granularity] is None else replace(fmt, group=groups[granularity])), False


READERS = {
    auto_round: _auto_round,
    bitnet: _bitnet,
    compressed_tensors: _compressed_tensors,
    fp8: _fp8,
    humming: _humming,
    modelopt: _modelopt,
    quark: _quark,
    torchao: _torchao,
}
