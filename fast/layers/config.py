"""What is quantized how: the configuration of weights and of activations, layer by layer, in the keys that Humming's engines use."""

import json
import os
import re
from dataclasses import dataclass, field

import torch

from ref.format import Format
from ref.layouts import humming, rules
from ref.layouts.check import check_keys, integer, one_of
from ref.layouts.gptq import pick

IGNORED = humming.IGNORED
WEIGHT_KEYS = (
    *humming.B_DTYPE, *humming.BS_DTYPE, *humming.GROUP, *humming.GROUP_N, *humming.TYPE, *humming.TYPE_2,
    "has_zero_point", "is_fp_zero_point", "hadamard_block_size",
)  # fmt: skip
A_DTYPE, X_GROUP, X_SCALE = (
    ("a_dtype", "input_dtype", "dtype"),
    ("input_scale_group_size", "group_size"),
    ("input_scale_dtype", "scale_dtype"),
)
MODE = ("input_quant_mode", "quant_mode", "quantization_mode")
INPUT_KEYS = (*A_DTYPE, *X_GROUP, *X_SCALE, *MODE)
RULES = (*IGNORED, "dynamic")
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
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class LayerConfig:
    """How one layer is quantized. weight: its Format. x_format: of its input, or None. static: x_scale comes with the model."""

    weight: Format
    x_format: Format | None = None
    static: bool = False
    allow_fallback: bool = False


@dataclass(frozen=True)
class QuantConfig:
    """A configuration as it was given, its keys and values checked.

    weight: keys WEIGHT_KEYS; empty: nothing is quantized online. x: keys INPUT_KEYS; empty: 16-bit activations. Both may have IGNORED and
    "dynamic" (RULES). force_requant: layers of a checkpoint that is quantized already, too.
    """

    weight: dict = field(default_factory=dict)
    x: dict = field(default_factory=dict)
    force_requant: bool = False
    allow_fallback: bool = False

    def layer(self, name, dtype=torch.bfloat16):
        """LayerConfig of the layer called `name`, or None where it is left alone.

        Args:
            dtype: of the model: of scales that have none.

        Raises:
            ValueError: an override for this layer that cannot be.
        """
        chosen = of_layer(self.weight, name)
        if chosen is None:
            return None
        return LayerConfig(weight_format(chosen, dtype), *self.input(name), self.allow_fallback)

    def input(self, name):
        """The format of a layer's input, or None, and whether it is static."""
        chosen = of_layer(self.x, name)
        return (None, False) if chosen is None else input_format(chosen)


def read_config(value, x=None):
    """A QuantConfig.

    Args:
        value: of weights: a dict, a string of JSON, the path of a JSON file, or None. As a checkpoint's config.json has it, too:
            its quantization_config then counts.
        x: of activations, likewise.

    Raises:
        ValueError: JSON that cannot be read, an unknown key or a wrong value; the message names it, and the nearest right one.
        FileNotFoundError: no such file.

    >>> read_config('{"dtype": "int4", "group_size": 128}').layer("model.layers.0.mlp.up_proj").weight
    Format(element=Int(bits=4, signed=True), scale='bf16', group=(1, 128), zero=None, scale_2=None, hadamard=0, offset=None)
    """
    weight, x = _document(value, "quantization config"), _document(x, "input config")
    weight = weight.get("quantization_config", weight)
    if weight.get("quant_method", "humming") != "humming":
        raise ValueError(
            f"quantization config: quant_method is {weight['quant_method']!r}, and only 'humming' says how to quantize;"
            " a checkpoint that is quantized already is read by its own layout (ref.layouts)"
        )
    weight = {key: v for key, v in weight.items() if key != "quant_method"}
    check_keys(weight, (*WEIGHT_KEYS, *RULES, "force_requant"), "quantization config")
    check_keys(x, (*INPUT_KEYS, *RULES, "allow_fallback"), "input config")
    force = one_of(weight.pop("force_requant", False), (True, False), "quantization config: force_requant")
    fallback = one_of(x.pop("allow_fallback", False), (True, False), "input config: allow_fallback")
    config = QuantConfig(weight, x, force, fallback)
    # All that can be wrong is said now, and not at the first layer that it concerns.
    for document, keys, make in ((weight, WEIGHT_KEYS, weight_format), (x, INPUT_KEYS, input_format)):
        where = "input config" if document is x else "quantization config"
        _ignored(document, where)
        for pattern, override in _dynamic(document, where).items():
            if pattern.startswith("+"):
                check_keys(override, keys, f"{where}: dynamic {pattern!r}")
                make(_overridden(_own(document), override))
        if _own(document):
            make(_own(document))
    return config


def _document(value, where):
    """A dict out of a dict, JSON or a file."""
    if value is None or value == "":
        return {}
    if isinstance(value, dict):
        return dict(value)
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"{where} is a {type(value).__name__}, expected a dict, JSON or the path of a JSON file")
    text, source = os.fspath(value), where
    if not text.lstrip().startswith("{"):
        try:
            with open(text) as file:
                text, source = file.read(), f"{where} {text!r}"
        except FileNotFoundError:
            raise FileNotFoundError(f"{where}: {text!r} is neither JSON (which begins with a brace) nor a file") from None
        except OSError as error:
            raise ValueError(f"{where}: cannot read {text!r}: {error.strerror}") from None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{source}: no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{source}: a JSON {type(found).__name__}, expected an object")
    return found


def of_layer(document, name):
    """The document's own keys for a layer, overrides put in; None where it is empty, or leaves the layer alone.

    A layer is left alone that has a name from the ignore list in its own, or matches one that begins with "re:"; the lm_head; and those that
    a "-" pattern of `dynamic` matches. A "+" pattern's keys replace the document's; the first pattern that matches decides.
    """
    own = _own(document)
    if not own and not document.get("dynamic"):
        return None
    listed = rules.by_substring(name, [p for p in _ignored(document) if not p.startswith("re:")])
    if listed or rules.by_name_or_re(name, _ignored(document)) or "lm_head" in name:
        return None
    for pattern, override in _dynamic(document).items():
        if re.match(rules.compiled(pattern[2:]), name):
            return None if pattern[0] == "-" else _overridden(own, override)
    return own or None


def _own(document):
    return {key: value for key, value in document.items() if key not in RULES}


def _ignored(document, where="config"):
    """The first list of layers to leave alone that is there."""
    return next((rules.strings(document[key], f"{where}: {key}") for key in IGNORED if key in document), [])


def _dynamic(document, where="config"):
    overrides = document.get("dynamic") or {}
    if not isinstance(overrides, dict) or not all(isinstance(v, dict) for v in overrides.values()):
        raise ValueError(f"{where}: dynamic is {overrides!r}, expected a dict of dicts")
    for pattern in overrides:
        if pattern[:2] not in ("+:", "-:"):
            raise ValueError(f"{where}: dynamic has the pattern {pattern!r}, expected '+:' or '-:' and a regular expression")
        rules.compiled(pattern[2:])
    return overrides


def _overridden(own, override):
    """Keys replaced, under whatever of their names they are given."""
    same = (
        humming.B_DTYPE,
        humming.BS_DTYPE,
        humming.GROUP,
        humming.GROUP_N,
        humming.TYPE,
        humming.TYPE_2,
        A_DTYPE,
        X_GROUP,
        X_SCALE,
        MODE,
    )
    replaced = {key for keys in same if set(keys) & set(override) for key in keys}
    return {key: value for key, value in own.items() if key not in replaced} | override


def weight_format(keys, dtype=torch.bfloat16):
    """The Format that keys of WEIGHT_KEYS say; scales without a dtype have the model's, those of blocks and tensors float32."""
    said = humming.options(keys, "")
    scale = said["scale"] or DTYPES[dtype]
    zero = {None: None, "int": "int", "float": scale}[said["zero"]]
    return Format(said["element"], scale, said["group"], zero, said["scale_2"], said["hadamard"])


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
    return Format(element, scale, (1, group) if grouped else (0, 0) if static else (1, 0), None, scale_2), static
