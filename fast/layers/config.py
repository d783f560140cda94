"""What is quantized how: the configuration of weights and of activations, layer by layer, in the keys that Humming's engines use."""

import json
import os
import re
from dataclasses import dataclass, field

import torch

from ref.format import Format
from ref.layouts import humming, mxfp4, rules
from ref.layouts.check import check_keys, one_of

from .input_config import INPUT_KEYS, input_format, overridden
from .inputs import input_of, layout_of

IGNORED = humming.IGNORED
WEIGHT_KEYS = (
    *humming.B_DTYPE, *humming.BS_DTYPE, *humming.GROUP, *humming.GROUP_N, *humming.TYPE, *humming.TYPE_2,
    "has_zero_point", "is_fp_zero_point", "hadamard_block_size",
)  # fmt: skip
RULES = (*IGNORED, "dynamic")
# Names of experts, or of what is below them.
EXPERTS = re.compile(r"(^|\.)experts(\.|$)")
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class LayerConfig:
    """How one layer is quantized.

    weight: the Format that it is quantized to, or None: it stays as the checkpoint stores it. x_format: of its input, or None.
    static: x_scale comes with the model. allow_fallback: another x_format may take the place of one that the device does not multiply.
    """

    weight: Format | None
    x_format: Format | None = None
    static: bool = False
    allow_fallback: bool = False


@dataclass(frozen=True)
class QuantConfig:
    """A configuration as it was given, its keys and values checked.

    weight: keys WEIGHT_KEYS; empty: nothing is quantized online. x: keys INPUT_KEYS; empty: 16-bit activations, or what the checkpoint
    says of them. Both may have IGNORED and "dynamic" (RULES). force_requant: layers of a checkpoint that is quantized already, too.
    checkpoint: (layout, quantization config) of a checkpoint that is quantized already, or None.
    """

    weight: dict = field(default_factory=dict)
    x: dict = field(default_factory=dict)
    force_requant: bool = False
    allow_fallback: bool = False
    checkpoint: tuple | None = None

    def layer(self, name, dtype=torch.bfloat16):
        """LayerConfig of the layer called `name`, or None where it is left alone: resolve, with the config's own checkpoint."""
        return resolve(name, self.checkpoint, self, dtype)

    def check_online(self, where):
        """Refuse what says how a checkpoint is quantized, where something is to be quantized by it."""
        if self.checkpoint is not None:
            raise ValueError(
                f"{where}: the config is that of a checkpoint that is quantized already ({self.checkpoint[0]}), which fast.load reads; "
                "expected how to quantize (quant_method 'humming', or none)"
            )

    def online(self, name, dtype=torch.bfloat16):
        """As layer, for a weight that is quantized now: nothing is known of its input.

        Raises:
            ValueError: the scale of the input would have to be known.
        """
        chosen = self.layer(name, dtype)
        if chosen is not None and chosen.static:
            raise ValueError(f"would need the scale of its input, which {chosen.x_format} has in the model; give a dynamic quant_mode")
        return chosen

    def input(self, name):
        """The format of a layer's input, or None, and whether it is static."""
        chosen = of_layer(self.x, name)
        return (None, False) if chosen is None else input_format(chosen)


def resolve(layer_name, checkpoint, quant_config, dtype=torch.bfloat16):
    """How a layer of a checkpoint is quantized, by what the checkpoint's config and a QuantConfig say together.

    Weights: those of a checkpoint that is not quantized follow the QuantConfig. A quantized checkpoint's stay as they are stored, also where
    its config leaves them unquantized; with force_requant those that it has quantized are quantized anew, where the QuantConfig means them.
    Of a GPT-OSS checkpoint ("mxfp4") only experts are quantized, whatever its list of exceptions leaves out: the layout stores no others.
    Inputs: the QuantConfig's x counts first, and its allow_fallback. Then the checkpoint's own, with allow_fallback; but x is not quantized
    for weights quantized anew, whose input nobody has spoken of.

    Args:
        layer_name: as the checkpoint has it.
        checkpoint: (layout, quantization config), as Checkpoint.layout and Checkpoint.config are; None: it is not quantized.
        quant_config: QuantConfig. dtype: of the model: of scales that have none.

    Returns:
        LayerConfig, or None: the layer is not quantized.

    Raises:
        ValueError, NotImplementedError: as the layout's options, input_of, and for an override that cannot be.

    >>> resolve("layers.0.up", ("fp8", {"quant_method": "fp8"}), QuantConfig(x={"dtype": "int8"}))
    LayerConfig(weight=None, x_format=Format(element=Int(bits=8, signed=True), scale='fp32', group=(1, 0), zero=None, scale_2=None, \
hadamard=0, offset=None), static=False, allow_fallback=False)
    """
    keys = of_layer(quant_config.weight, layer_name)
    if checkpoint is None:
        if keys is None:
            return None
    else:
        layout, config = checkpoint
        module = layout_of(layout)
        if module.options(config, layer_name) is None or (module is mxfp4 and not EXPERTS.search(layer_name)):
            return None
        keys = keys if quant_config.force_requant else None
    weight = None if keys is None else weight_format(keys, dtype)
    if (said := of_layer(quant_config.x, layer_name)) is not None:
        return LayerConfig(weight, *input_format(said), quant_config.allow_fallback)
    if weight is not None:
        return LayerConfig(weight)
    return LayerConfig(None, *input_of(layout, config, layer_name), allow_fallback=True)


def read_config(value, x=None):
    """A QuantConfig.

    Args:
        value: of weights: a dict, a string of JSON, the path of a JSON file, or None. As a checkpoint's config.json has it, too:
            its quantization_config then counts. That of a quantized checkpoint (quant_method other than "humming") says what its layers are.
        x: of activations, likewise.

    Raises:
        ValueError: JSON that cannot be read, an unknown key or a wrong value; the message names it, and the nearest right one.
        FileNotFoundError: no such file.

    >>> read_config('{"dtype": "int4", "group_size": 128}').layer("model.layers.0.mlp.up_proj").weight
    Format(element=Int(bits=4, signed=True), scale='bf16', group=(1, 128), zero=None, scale_2=None, hadamard=0, offset=None)
    """
    weight, x = _document(value, "quantization config"), _document(x, "input config")
    if "quantization_config" in weight:
        weight = weight["quantization_config"]
        if not isinstance(weight, dict):
            raise ValueError(f"quantization config: quantization_config is {weight!r}, expected an object")
    checkpoint = None
    if weight.get("quant_method", "humming") != "humming":
        checkpoint, weight = (weight["quant_method"], weight), {}
        # Refuses a layout that there is not, and keys that are wrong whatever the layer.
        layout_of(checkpoint[0]).options(checkpoint[1], "")
    weight = {key: v for key, v in weight.items() if key != "quant_method"}
    check_keys(weight, (*WEIGHT_KEYS, *RULES, "force_requant"), "quantization config")
    check_keys(x, (*INPUT_KEYS, *RULES, "allow_fallback"), "input config")
    force = one_of(weight.pop("force_requant", False), (True, False), "quantization config: force_requant")
    fallback = one_of(x.pop("allow_fallback", False), (True, False), "input config: allow_fallback")
    config = QuantConfig(weight, x, force, fallback, checkpoint)
    # All that can be wrong is said now, and not at the first layer that it concerns.
    for document, keys, make in ((weight, WEIGHT_KEYS, weight_format), (x, INPUT_KEYS, input_format)):
        where = "input config" if document is x else "quantization config"
        _ignored(document, where)
        for pattern, override in _dynamic(document, where).items():
            if pattern.startswith("+"):
                check_keys(override, keys, f"{where}: dynamic {pattern!r}")
                make(overridden(_own(document), override))
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
            return None if pattern[0] == "-" else overridden(own, override)
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


def weight_format(keys, dtype=torch.bfloat16):
    """The Format that keys of WEIGHT_KEYS say; scales without a dtype have the model's, those of blocks and tensors float32.

    Raises:
        TypeError: a model of a dtype that linear does not have.
    """
    if dtype not in DTYPES:
        raise TypeError(f"weights are {dtype}, expected float16, bfloat16 or float32")
    said = humming.options(keys, "")
    scale = said["scale"] or DTYPES[dtype]
    zero = {None: None, "int": "int", "float": scale}[said["zero"]]
    return Format(said["element"], scale, said["group"], zero, said["scale_2"], said["hadamard"])
