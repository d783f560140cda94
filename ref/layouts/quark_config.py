"""The quantization_config of AMD Quark: which stages each layer's weight has, and which store a format.

Source: amd-quark 0.13, quark.torch.quantization.config.config (QConfig, QLayerConfig, QTensorConfig), quark.torch.export.config.
"""

import torch

from ..element import Int
from . import rules
from .check import check_keys, integer, one_of
from .quark_codes import FLOATS, INTEGERS, dtype_of

# dtype of a second stage that quantizes the scale -> the scale's name and torch dtype.
SECOND = {"fp8_e4m3": ("e4m3", torch.float8_e4m3fn), "fp8_e5m2": ("e5m2", torch.float8_e5m2), "fp8_e5m3": ("ue5m3", torch.uint8)}
QSCHEMES = ("per_tensor", "per_channel", "per_group", "per_block")
REFUSED = {"mx6": 6, "mx9": 9, "bfp16": 16, "int16": 16, "uint16": 16, "int32": 32, "bfloat16": 16, "float16": 16, "fp8_e5m3": 8}

KEYS = (
    *("global_quant_config", "layer_quant_config", "layer_type_quant_config", "exclude", "export", "quant_method", "quant_mode", "version"),
    *("algo_config", "softmax_quant_spec", "kv_cache_quant_config", "kv_cache_post_rope", "kv_cache_group", "min_kv_scale"),
    *("pre_quant_opt_config", "log_severity_level", "shared_scale_groups", "keep_prequantized_layers"),
)
EXPORT_KEYS = ("pack_method", "weight_format", "kv_cache_group", "min_kv_scale", "weight_merge_groups")
LAYER_KEYS = ("weight", "input_tensors", "output_tensors", "bias", "target_device")
STAGE_KEYS = (
    *("dtype", "qscheme", "ch_axis", "axis", "group_size", "block_size", "symmetric", "is_dynamic", "dynamic", "is_scale_quant"),
    *("scale_format", "scale_type", "scale_calculation_mode", "zero_point_type", "mx_element_dtype", "round_method"),
    *("observer_cls", "qat_spec", "enable_buffer_reuse", "max_input_numel"),
)


def options(config, layer):
    """{"spec": the weight's stages, "pack_method": ...}; None for a layer that the config leaves out.

    The first glob of layer_quant_config that matches, else layer_type_quant_config's "Linear", else global_quant_config; exclude
    (globs) overrides all. A stage has the keys that tell how it is stored: dtype, qscheme, ch_axis, group_size, block_size,
    symmetric, scale_format, zero_point_type, mx_element_dtype, is_scale_quant.

    Raises:
        ValueError: unknown keys or values, or stages that contradict each other.
        NotImplementedError: weights that are not quantized in the file (fake_quantized), or elements that no QTensor holds.
    """
    raw = stages_of(config, layer)
    export = config.get("export")
    export = {} if export is None else export
    check_keys(export, EXPORT_KEYS, "quark: export")
    pack_method = one_of(export.get("pack_method", "reorder"), ("reorder", "order"), "quark: export.pack_method")
    weight_format = one_of(
        export.get("weight_format", "real_quantized"), ("real_quantized", "fake_quantized"), "quark: export.weight_format"
    )
    if weight_format == "fake_quantized":
        raise NotImplementedError("quark: weight_format 'fake_quantized' stores weights that are not quantized")
    if raw is None:
        return None
    stages = [_stage(stage) for stage in raw]
    if any(stage["dtype"] == "mx" for stage in stages) and len(stages) > 1:
        raise ValueError("quark: dtype 'mx' is one stage of two, expected it alone: it has scales of its own")
    if stages[0]["is_scale_quant"]:
        raise ValueError("quark: is_scale_quant is true in the first stage, expected it in the second: it quantizes the first's scale")
    if len(stages) == 2:
        other = stages[1] if stages[1]["is_scale_quant"] else stages[0]
        if other["qscheme"] != "per_tensor":
            raise NotImplementedError(f"quark: two stages, of which one is {other['qscheme']}: a QTensor's scale_2 belongs to the tensor")
        if stages[1]["is_scale_quant"] and other["dtype"] not in SECOND:
            raise NotImplementedError(f"quark: scales quantized to {other['dtype']}, expected {', '.join(SECOND)}")
    return {"spec": stages, "pack_method": pack_method}


def stages_of(config, layer, tensor="weight"):
    """The stages of a layer's weight (or "input_tensors"), as the config has them, or None."""
    check_keys(config, KEYS, "quark: quantization_config")
    where, chosen = "global_quant_config", config.get("global_quant_config")
    by_type = config.get("layer_type_quant_config")
    if by_type is not None and not isinstance(by_type, dict):
        raise ValueError(f"quark: layer_type_quant_config is {by_type!r}, expected a dict")
    if (by_type or {}).get("Linear") is not None:
        where, chosen = "layer_type_quant_config.Linear", by_type["Linear"]
    by_name = config.get("layer_quant_config")
    if by_name is not None and not isinstance(by_name, dict):
        raise ValueError(f"quark: layer_quant_config is {by_name!r}, expected a dict")
    pattern = rules.by_glob(layer, rules.strings(list(by_name or {}), "quark: layer_quant_config"))
    if pattern is not None:
        where, chosen = f"layer_quant_config[{pattern!r}]", by_name[pattern]
    if rules.by_glob(layer, rules.strings(config.get("exclude"), "quark: exclude")) is not None or chosen is None:
        return None
    check_keys(chosen, LAYER_KEYS, f"quark: {where}")
    said = chosen.get(tensor)
    if said is None:
        return None
    stages = said if isinstance(said, list) else [said]
    if len(stages) not in (1, 2):
        raise ValueError(f"quark: {where}.{tensor} has {len(stages)} stages, expected one or two")
    for stage in stages:
        check_keys(stage, STAGE_KEYS, f"quark: {where}.{tensor}")
        if not isinstance(stage.get("dtype"), str):
            raise ValueError(
                f"quark: {where}.{tensor} has dtype {stage.get('dtype')!r}, expected one of {', '.join((*INTEGERS, *FLOATS, 'mx'))}"
            )
    return stages


def _stage(stage):
    """One stage, checked: what of it tells how tensors are stored."""
    scale_quant = one_of(stage.get("is_scale_quant", False), (False, True), "quark: is_scale_quant")
    dtype = stage["dtype"]
    if dtype in REFUSED and not (scale_quant and dtype in SECOND):
        raise NotImplementedError(
            f"quark: weights of dtype {dtype} ({REFUSED[dtype]} bits) have no element of a QTensor, or no scales of groups"
        )
    one_of(dtype, (*INTEGERS, *FLOATS, *SECOND, "mx"), "quark: dtype")
    if one_of(stage.get("is_dynamic", stage.get("dynamic", False)), (None, False, True), "quark: is_dynamic"):
        raise NotImplementedError("quark: is_dynamic is true for weights: they are not quantized in the file")
    element = stage.get("mx_element_dtype")
    axis = stage.get("ch_axis", stage.get("axis"))
    axis = {-2: 0, 1: -1}.get(axis, axis) if isinstance(axis, int) else axis
    qscheme = "per_group" if dtype == "mx" else one_of(stage.get("qscheme"), QSCHEMES, "quark: qscheme")
    group_size = block_size = None
    if dtype == "mx":
        if element == "int8":
            raise NotImplementedError("quark: mx_element_dtype int8: Quark packs no such weights")
        one_of(element, ("fp4", "fp6_e2m3", "fp6_e3m2"), "quark: mx_element_dtype")
        group_size = one_of(stage.get("group_size", stage.get("block_size", 32)), (32,), "quark: group_size of dtype 'mx'")
    elif qscheme == "per_channel":
        one_of(axis, (0, -1), "quark: ch_axis of per_channel")
    elif qscheme == "per_group":
        one_of(axis, (-1,), "quark: ch_axis of per_group")
        group_size = integer(stage.get("group_size"), "quark: group_size", 1, 2**20)
    elif qscheme == "per_block":
        block_size = stage.get("block_size")
        if not isinstance(block_size, (list, tuple)) or len(block_size) != 2:
            raise ValueError(f"quark: block_size is {block_size!r}, expected two integers")
        block_size = [integer(size, "quark: block_size", 1, 2**20) for size in block_size]
    if dtype in INTEGERS and qscheme == "per_block":
        raise ValueError(f"quark: qscheme is per_block for {dtype}, expected per_tensor, per_channel or per_group: only floats have blocks")
    symmetric = stage.get("symmetric")
    if dtype in INTEGERS:
        one_of(symmetric, (False, True), f"quark: symmetric of {dtype}")
    scale_format = stage.get("scale_format")
    one_of(scale_format, (None, "float32", "float16", "bfloat16", "e4m3", "e5m3", "e8m0"), "quark: scale_format")
    zero_point_type = stage.get("zero_point_type")
    return {
        "dtype": dtype,
        "qscheme": qscheme,
        "ch_axis": axis,
        "group_size": group_size,
        "block_size": block_size,
        "symmetric": symmetric,
        "scale_format": "e8m0" if dtype == "mx" else scale_format,
        "zero_point_type": one_of("int32" if zero_point_type is None else zero_point_type, ("int32", "float32"), "quark: zero_point_type"),
        "mx_element_dtype": element,
        "is_scale_quant": scale_quant,
    }


def spec_of(fmt):
    """The stages that store a format.

    Raises:
        ValueError: none do.
    """
    dtype, symmetric, zero_type = dtype_of(fmt.element), None, "int32"
    if isinstance(fmt.element, Int):
        symmetric = fmt.zero is None
        dtype = dtype or dtype_of(Int(fmt.element.bits))  # int3: unsigned codes are signed ones and a zero point
        zero_type = "int32" if fmt.zero in (None, "int") else "float32"
    if dtype is None:
        raise ValueError(f"quark: got {fmt}, expected an element that it has: {', '.join((*INTEGERS, *FLOATS))}")
    qscheme = {(0, 0): "per_tensor", (1, 0): "per_channel", (0, 1): "per_channel"}.get(fmt.group)
    qscheme = qscheme or ("per_group" if fmt.group[0] == 1 else "per_block")
    if qscheme == "per_block" and (dtype in INTEGERS or 0 in fmt.group):
        raise ValueError(f"quark: got {fmt}, expected scales by tensor, channel or group, or by whole blocks of a float")
    stage = {
        "dtype": dtype,
        "qscheme": qscheme,
        "ch_axis": None if qscheme in ("per_tensor", "per_block") else 0 if fmt.group == (1, 0) else -1,
        "group_size": fmt.group[1] if qscheme == "per_group" else None,
        "block_size": list(fmt.group) if qscheme == "per_block" else None,
        "symmetric": symmetric,
        "scale_format": {"e8m0": "e8m0", "ue5m3": "e5m3"}.get(fmt.scale),
        "zero_point_type": zero_type,
        "mx_element_dtype": None,
        "is_scale_quant": False,
    }
    if fmt.scale_2 is None:
        return [stage]
    other = dict.fromkeys(stage) | {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "zero_point_type": "int32", "is_scale_quant": False}
    second = next((name for name, (scale, _) in SECOND.items() if scale == fmt.scale), None)
    if second is None:
        return [other, stage]
    return [stage | {"scale_format": None}, other | {"dtype": second, "is_scale_quant": True}]
