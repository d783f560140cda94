"""GGUF: the files of llama.cpp. One tensor a weight, in one of 24 block types (gguf_blocks has them as a table).

    <layer>.weight  uint8 (..., n, bytes of a row)   blocks along k
    <layer>.scale   float32 (1,) or (e,)             multiplies the layer's result (NVFP4): the second-level scale
    <layer>.input_scale                              for activations; not part of the weight

There is no config.json: the file says each tensor's type. What other layouts call config is {"quant_method": "gguf", "types":
{tensor name: type}} here, which file_config makes of a file; "*" stands for all weights.

A GGUF weight is what llama.cpp multiplies with: converters permute the rows of some models' q and k, and fold constants into norms.

Source: ggml and llama.cpp; checked against gguf 0.19.0 (see gguf_blocks). What ".scale" means is read (llama.cpp pull request
19769), not checked: that package does not multiply with it.
"""

import functools
import math
from dataclasses import replace

import torch

from ..pack import pack, unpack
from ..qtensor import QTensor, validate
from .check import check_keys, need, one_of, part
from .gguf_blocks import BLOCKS, PLAIN
from .gguf_fields import BadBlock
from .gguf_file import read_tensor, write_tensors

FORMATS = tuple(dict.fromkeys(block.format for block in BLOCKS.values()))
PARTS = ("weight", "scale", "input_scale")
# Codes that are handled at a time: what lies between a file's bytes and packed codes stays in a core's cache.
CHUNK = 2**20


def find(names, config):
    """The layers whose weights have a block type, with their tensors: {layer: {part: tensor name}}.

    Args:
        names: of all tensors.
        config: as file_config returns it.
    """
    names, found = set(names), {}
    for name in sorted(names):
        if _type_of(config, name) in BLOCKS:
            layer = name.removesuffix(".weight")
            if layer in found:
                raise ValueError(f"gguf: {name} and {found[layer]['weight']} are both weights of the layer {layer}")
            found[layer] = {"weight": name} | {p: f"{layer}.{p}" for p in PARTS[1:] if f"{layer}.{p}" in names}
    return found


def options(config, layer):
    """{"type": the layer's block type}, or None where the layer is a plain tensor.

    Raises:
        ValueError: unknown keys or types.
    """
    check_keys(config, ("quant_method", "types"), "gguf: config")
    name = _type_of(config, f"{layer}.weight") or _type_of(config, layer)
    if name is None or name in PLAIN:
        return None
    return {"type": one_of(name, tuple(BLOCKS), f"gguf: type of {layer}")}


def _type_of(config, name):
    """The type of a tensor, or None where the config does not say."""
    types = config.get("types")
    if not isinstance(types, dict):
        raise ValueError(f"gguf: types is {type(types).__name__}, expected a dict of tensor names to types")
    return types.get(name, types.get("*") if name.endswith(".weight") else None)


def file_config(file):
    """The config that find and options take, of a gguf_file.File."""
    return {"quant_method": "gguf", "types": {name: tensor.type for name, tensor in file.tensors.items()}}


def config_of(q, type):
    """The config of a file whose layers all have the type."""
    _block(q, type)
    return {"quant_method": "gguf", "types": {"*": type}}


def layers(file):
    """The quantized layers of a gguf_file.File, one at a time: (layer, parts, options), as read takes them."""
    config = file_config(file)
    for layer, names in find(file.tensors, config).items():
        k = file.tensors[names["weight"]].shape[-1]
        yield layer, {p: read_tensor(file, name) for p, name in names.items()}, options(config, layer) | {"k": k}


def read(parts, options):
    """A tensor of blocks as a QTensor.

    Args:
        parts: {"weight": uint8 (..., n, bytes of a row)}, perhaps with "scale" and "input_scale".
        options: {"type": a key of BLOCKS}, perhaps with "k": the length of a row, which must agree.

    Returns:
        QTensor (..., n, k) of BLOCKS[type].format; with scale_2="tensor" where there is a scale.

    Raises:
        ValueError: a wrong dtype or shape, a scale that is NaN or inf, or codes that mean nothing.
        NotImplementedError: a "scale" beside a type with minima.
    """
    check_keys(options, ("type", "k"), "gguf: options")
    name = one_of(options.get("type"), tuple(BLOCKS), "gguf: type")
    block = BLOCKS[name]
    need(parts, "gguf", ("weight",), PARTS[1:])
    data = part(parts, "gguf", "weight", (torch.uint8,))
    if data.dim() < 2 or data.shape[-1] % block.nbytes:
        raise ValueError(f"gguf: weight has shape {tuple(data.shape)}, expected (..., n, bytes of {name} blocks, {block.nbytes} each)")
    *lead, n, row = data.shape
    k = row // block.nbytes * block.size
    if options.get("k", k) != k:
        raise ValueError(f"gguf: weight has shape {tuple(data.shape)}, expected (..., n, {name} blocks for k={options['k']})")
    rows = data.reshape(math.prod(lead) * n, row // block.nbytes, block.nbytes)
    found = {part: t.view(*lead, n, t.shape[-1]) for part, t in _read_rows(name, rows).items()}
    fmt = block.format
    if parts.get("scale") is not None:
        if fmt.offset:
            raise NotImplementedError(f"gguf: scale multiplies the minima of {name}, too, and the scale_2 of a QTensor does not")
        fmt = replace(fmt, scale_2="tensor")
        scale_2 = part(parts, "gguf", "scale", (torch.float32,), (math.prod(lead),), "(one for each expert)")
        found["scale_2"] = scale_2.reshape(*lead, 1, 1).clone()
    return validate(QTensor(fmt, (*lead, n, k), **found))


def _read_rows(name, rows):
    """{"packed", "scale", perhaps "offset"} of blocks (rows, blocks, bytes), some rows at a time."""
    block = BLOCKS[name]
    found = []
    for start, some in _chunks(rows, block.size):
        try:
            packed = pack(block.codes.get(some).flatten(1), block.format.element.bits)
            scales = [f.get(some).flatten(1) for f in (block.scale, block.offset) if f is not None]
        except BadBlock as error:
            raise ValueError(f"gguf: weight of type {name}, row {start + error.row}, block {error.block}: {error.why}") from None
        found.append((packed, *scales))
    return {part: torch.cat(t) for part, t in zip(("packed", "scale", "offset"), zip(*found, strict=True), strict=False)}


def _chunks(rows, size):
    step = max(CHUNK // max(rows.shape[1] * size, 1), 1)
    return [(i, rows[i : i + step]) for i in range(0, max(len(rows), 1), step)]


def write(q, type):
    """A QTensor as blocks: the inverse of read.

    Args:
        q: of BLOCKS[type].format, perhaps with scale_2="tensor" on top; k a multiple of the block's size.
        type: a key of BLOCKS.

    Returns:
        {"weight": uint8 (..., n, bytes of a row)}, and "scale" where q has a scale_2.

    Raises:
        ValueError: another format or k, scales that no float16 and integers make, codes that are not in the type's grid.
    """
    block = _block(q, type)
    *lead, n, k = q.shape
    count = k // block.size
    rows = torch.zeros(math.prod(lead) * n, count, block.nbytes, dtype=torch.uint8)
    packed, *scales = [None if t is None else t.reshape(len(rows), t.shape[-1]) for t in (q.packed, q.scale, q.offset)]
    for start, some in _chunks(rows, block.size):
        here = slice(start, start + len(some))
        try:
            block.codes.put(some, unpack(packed[here], block.format.element.bits, k).view(len(some), count, block.size))
            for field, scale in zip((block.scale, block.offset), scales, strict=True):
                if field is not None:
                    field.put(some, scale[here].view(len(some), count, block.size // block.format.group[1]))
        except BadBlock as error:
            raise ValueError(f"gguf: no {type}: row {start + error.row}, block {error.block}: {error.why}") from None
    parts = {"weight": rows.view(*lead, n, count * block.nbytes)}
    return parts if q.scale_2 is None else parts | {"scale": q.scale_2.reshape(-1).clone()}


def _block(q, type):
    """BLOCKS[type], if q has its format."""
    block = BLOCKS[one_of(type, tuple(BLOCKS), "gguf: type")]
    validate(q)
    if q.format.scale_2 not in (None, "tensor") or replace(q.format, scale_2=None) != block.format:
        raise ValueError(f"gguf: no {type}: the format is {q.format}, expected {block.format}")
    if q.group_index is not None:
        raise ValueError(f"gguf: no {type}: there is a group_index, and blocks are groups of neighbours")
    if q.shape[-1] % block.size:
        raise ValueError(f"gguf: no {type}: k={q.shape[-1]}, expected a multiple of {block.size}")
    return block


def write_file(path, tensors, metadata, types=None):
    """Write a GGUF file.

    Args:
        tensors: {name: (type, QTensor or plain tensor)}; type is a key of BLOCKS or PLAIN. Blocks are made one tensor at a
            time; the scale_2 of "<layer>.weight" becomes "<layer>.scale".
        metadata, types: {key: value} and {key: type}, as in gguf_file.write_tensors.

    Raises:
        ValueError: as write and write_tensors, or a plain tensor of another dtype.
    """
    stored = {}
    for name, (type, tensor) in tensors.items():
        if isinstance(tensor, QTensor):
            _block(tensor, type)
            stored[name] = (type, tuple(tensor.shape), functools.partial(lambda q, type: write(q, type)["weight"], tensor, type))
            if tensor.scale_2 is not None:
                scale = tensor.scale_2.reshape(-1)
                stored[name.removesuffix(".weight") + ".scale"] = ("F32", tuple(scale.shape), lambda scale=scale: scale)
        else:
            dtype = PLAIN[one_of(type, tuple(PLAIN), f"gguf: type of {name}")][1]
            if tensor.dtype != dtype:
                raise ValueError(f"gguf: {name} has dtype {tensor.dtype}, expected {dtype} for {type}")
            stored[name] = (type, tuple(tensor.shape), lambda tensor=tensor: tensor)
    write_tensors(path, stored, metadata, types)
