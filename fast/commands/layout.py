"""How a layout writes what is quantized: sizes and names of its tensors, and the quantization config; tried before anything is written."""

import re

import torch

from ref.layouts import LAYOUTS
from ref.layouts.checkpoint import located
from ref.qtensor import QTensor, check_parts, equal, part_kinds

from ..layers.inputs import input_of

# The layouts that a checkpoint can be written in, and under which key of its config each lists the layers that are left alone.
IGNORE = {
    "humming": "ignore",
    "compressed_tensors": "ignore",
    "gptq": "dynamic",
    "awq": "modules_to_not_convert",
    "fp8": "modules_to_not_convert",
    "modelopt": "ignore",
    "quark": "exclude",
    "mxfp4": "modules_to_not_convert",
}
MODULES = {name: next(m for m in LAYOUTS.values() if m.__name__.endswith("." + name)) for name in IGNORE}


def blank(fmt, shape, device=None):
    """A QTensor of a format with next to nothing in it."""
    parts = {
        name: None if dtype is None else (torch.zeros if name == "packed" else torch.ones)(size, dtype=dtype, device=device)
        for name, (dtype, size) in part_kinds(fmt, shape).items()
    }
    return QTensor(fmt, tuple(shape), **parts)


def size_of(item, layout):
    """(bytes that a layer takes in a layout, the separator of its parts' names), once it is sure that it can be read back."""
    q = _one(item)
    with located(item.layer):
        check_parts(q, "quantize")
        try:
            size, separator = _written(q, layout, MODULES[layout].config_of)
        except (ValueError, NotImplementedError) as error:
            others = [name for name in IGNORE if name != layout and _holds(q, name)]
            note = f"--layout {' or '.join(others)} can" if others else "no layout that can be written does"
            raise ValueError(f"--layout {layout} cannot hold it: {error} ({note})") from None
    return size * (item.shape[0] if len(item.shape) == 3 else 1), separator


def _one(item):
    """The blank QTensor of a layer, of a stack with one expert."""
    return blank(item.format, (1, *item.shape[1:]) if len(item.shape) == 3 else item.shape)


def _written(q, layout, config_of, layer="layer"):
    """(bytes, separator) of what a layout writes; a ValueError where it does not give back what it was given."""
    module = MODULES[layout]
    parts, config = module.write(q), config_of(q)
    for separator in (".", "_"):
        names = {f"{layer}{separator}{part}": tensor for part, tensor in parts.items()}
        found = module.find(list(names), config)
        if found.keys() == {layer} and set(found[layer].values()) == set(names):
            back = module.read({part: names[name] for part, name in found[layer].items()}, module.options(config, layer))
            if not equal(back, q):
                raise ValueError(f"{layout}: reads {q.format} as {back.format}")
            x_format, static = input_of(layout, config, layer)
            if static:
                raise ValueError(f"{layout}: such layers have inputs in {x_format} whose scale is stored, too, and nobody has measured it")
            return sum(tensor.nbytes for tensor in parts.values()), separator
    raise ValueError(f"{layout}: has no names for {', '.join(parts)}")


def _holds(q, layout):
    try:
        _written(q, layout, MODULES[layout].config_of)
    except (ValueError, NotImplementedError):
        return False
    return True


def config_of(items, layout):
    """The quantization_config of all items."""
    module = MODULES[layout]
    of_format = {}
    for item in items:
        if item.format is not None:
            of_format.setdefault(item.format, []).append(item)
    base = max(of_format, key=lambda fmt: len(of_format[fmt]))
    document = {fmt: module.config_of(_one(of[0])) for fmt, of in of_format.items()}
    others = [item for fmt, of in of_format.items() if fmt != base for item in of]
    if others and layout != "humming":
        raise ValueError(
            f"--layout {layout}: {others[0].layer} is to be {others[0].format}, and others {base}; here only --layout humming holds both"
        )
    config, key = document[base], IGNORE[layout]
    formats = {}
    for item in items:
        if item.linear:
            formats.setdefault(_template(item.layer), set()).add(item.format)

    def pattern(item):
        """All layers alike but for the numbers in their names, where they are alike in their formats; else the one."""
        template = _template(item.layer)
        return _exactly(template if len(formats[template]) == 1 else item.layer)

    for item in others:
        override = {name: value for name, value in document[item.format].items() if name != "quant_method"}
        config.setdefault("dynamic", {})["+:" + pattern(item)] = override
    ignored = [item for item in items if item.linear and item.format is None]
    if key == "dynamic":
        config[key] = {"-:" + pattern(item): {} for item in ignored}
    else:
        config[key] = [*(config.get(key) or ()), *(item.layer for item in ignored)]
    return config


def _template(layer):
    """A layer's name with # for its numbers."""
    return re.sub("[0-9]+", "#", layer)


def _exactly(template):
    return "^" + "[0-9]+".join(re.escape(part) for part in template.split("#")) + "$"


def check_readable(items, config, layout):
    """Refuse a plan whose config would be read as another."""
    module, seen = MODULES[layout], set()
    for item in items:
        read = item.linear and module.options(config, item.layer) is not None
        if item.linear and read != (item.format is not None):
            was, would = ("left as it is", "mean it, too") if read else ("quantized", "leave it alone, too")
            raise ValueError(f"{item.layer}: is {was}, but the lists of --layout {layout} would {would}; quantize both or neither")
        if read and (item.format, item.shape) not in seen:
            seen.add((item.format, item.shape))
            with located(item.layer):
                _written(_one(item), layout, lambda q: config, item.layer)
