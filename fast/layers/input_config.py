"""What an input config says: its keys, under all their names, and the format that they mean."""

from ref.format import Format
from ref.layouts import humming
from ref.layouts.check import integer, one_of
from ref.layouts.gptq import pick

A_DTYPE, X_GROUP, X_SCALE = (
    ("a_dtype", "input_dtype", "dtype"),
    ("input_scale_group_size", "group_size"),
    ("input_scale_dtype", "scale_dtype"),
)
MODE = ("input_quant_mode", "quant_mode", "quantization_mode")
INPUT_KEYS = (*A_DTYPE, *X_GROUP, *X_SCALE, *MODE)
# Names of the same key, of weights and of activations.
SYNONYMS = (
    *(humming.B_DTYPE, humming.BS_DTYPE, humming.GROUP, humming.GROUP_N, humming.TYPE, humming.TYPE_2),
    *(A_DTYPE, X_GROUP, X_SCALE, MODE),
)
# How activations get their scales: whether there are groups, the second-level scale, and whether one scale is given with the model.
MODES = {
    "none": (False, None, False),
    "static_tensor": (False, None, True),
    "dynamic_token": (False, None, False),
    "dynamic_group": (True, None, False),
    "static_tensor_dynamic_group": (True, "tensor", True),
    "dynamic_group_token": (True, "channel", False),
}
NOT_QUANTIZED = ("bfloat16", "float16", "half", "float32")
TENSOR, TOKEN = (0, 0), (1, 0)


def input_format(keys):
    """The Format that keys of INPUT_KEYS say, or None for activations as they are; and whether its scale is static.

    Scales are those that the group size stands for where nothing is said: of 16 e4m3, of 32 e8m0, else float32.
    """
    where = "input config"
    name = pick(keys, A_DTYPE, None, where)
    group = integer(pick(keys, X_GROUP, 0, where), f"{where}: group_size", 0, 2**20)
    mode = one_of(pick(keys, MODE, "dynamic_group" if group else "dynamic_token", where), tuple(MODES), f"{where}: quant_mode")
    if name is None or name in NOT_QUANTIZED or mode == "none":
        return None, False
    grouped, scale_2, static = MODES[mode]
    if grouped != (group > 0):
        raise ValueError(f"{where}: quant_mode {mode!r} {'needs a group_size' if grouped else f'has no groups, and group_size is {group}'}")
    scale = humming.scale_of(pick(keys, X_SCALE, None, where)) or {16: "e4m3", 32: "e8m0"}.get(group, "fp32")
    element = humming.element_of(name, False)
    return Format(element, scale, (1, group) if grouped else TENSOR if static else TOKEN, None, scale_2), static


def overridden(own, override):
    """Keys replaced, under whatever of their names they are given."""
    replaced = {key for keys in SYNONYMS if set(keys) & set(override) for key in keys}
    return {key: value for key, value in own.items() if key not in replaced} | override
