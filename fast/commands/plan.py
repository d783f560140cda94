"""What quantize will write: which tensors in which formats, in which files, under which config; all checked before anything is written."""

import itertools
from collections import Counter
from dataclasses import dataclass, replace

import torch

from ref.format import Format
from ref.layouts.checkpoint import located, natural

from ..layers.config import of_layer
from .layout import check_readable, config_of, size_of

STACKS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
ROUTERS = ("gate", "router", "shared_expert_gate")
HEADS = ("lm_head", "embed_out", "score", "classifier")
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


@dataclass(frozen=True)
class Item:
    """A tensor of the source, and what becomes of it.

    format: None where it is left alone, for this reason. shape: (n, k) or (e, n, k). out_bytes: what it will take.
    linear: it may be a linear layer's weight, so that readers must be told where it is left alone.
    """

    tensor: str
    nbytes: int
    shape: tuple
    format: Format | None = None
    reason: str = ""
    linear: bool = False
    out_bytes: int = 0

    @property
    def layer(self):
        return self.tensor.removesuffix(".weight")


@dataclass(frozen=True)
class Plan:
    """items: in the order in which they are written. shards: how many items each file has. config: the quantization_config.

    separator: what is between a layer's name and its parts'.
    """

    items: tuple
    shards: tuple
    config: dict
    layout: str
    separator: str

    def files(self):
        """{file: its items}."""
        count, items = len(self.shards), iter(self.items)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else ["model.safetensors"]
        return {name: tuple(itertools.islice(items, size)) for name, size in zip(names, self.shards, strict=True)}


def make(source, choose, ignore, layout, shard_size):
    """The Plan.

    Args:
        source: a Source. choose: (layer, dtype) to a Format, or None. ignore: patterns of layers to leave alone, beyond choose's.

    Raises:
        ValueError: no layer is quantized, or one that the layout cannot hold; the message names it, and a layout that can.
    """
    items = [_item(source, name, choose, ignore) for name in sorted(source.entries, key=natural)]
    quantized = [item for item in items if item.format is not None]
    if not quantized:
        raise ValueError(f"{source.folder}: no tensor is to be quantized: {'; '.join(left_alone(items)) or 'there is none'}")
    sizes, separators = {}, set()
    for item in quantized:
        key = (item.format, item.shape)
        if key not in sizes:
            sizes[key], separator = size_of(item, layout)
            separators.add(separator)
    items = tuple(replace(i, out_bytes=sizes[i.format, i.shape] if i.format else i.nbytes) for i in items)
    config = config_of(items, layout)
    check_readable(items, config, layout)
    return Plan(items, _shards(items, shard_size), config, layout, separators.pop())


def left_alone(items):
    """Lines: why tensors are left as they are, how many, how much, and which first."""
    reasons = {}
    for item in items:
        if item.format is None:
            reasons.setdefault(item.reason, []).append(item)
    return [
        f"{reason}: {len(of)} ({sum(i.nbytes for i in of) / 2**20:.1f} MiB), as {', '.join(i.tensor for i in of[:2])}"
        for reason, of in reasons.items()
    ]


def _item(source, name, choose, ignore):
    entry = source.entries[name]
    item = Item(name, entry.nbytes, entry.shape)
    reason = _not_linear(source, name, entry)
    if reason is not None:
        return replace(item, reason=reason)
    item = replace(item, linear=True)
    parts = item.layer.split(".")
    if parts[-1] in ROUTERS or any("router" in part for part in parts):
        return replace(item, reason="routers")
    if "lm_head" in item.layer or item.layer == "output" or parts[-1] in HEADS:
        return replace(item, reason="heads")
    if of_layer({"format": "", "ignore": list(ignore)}, item.layer) is None:
        return replace(item, reason="--ignore")
    with located(item.layer):
        chosen = choose(item.layer, entry.dtype)
    if chosen is None:
        return replace(item, reason="the config leaves them alone")
    return replace(item, format=chosen, shape=_of_experts(source, name, entry.shape) if len(entry.shape) == 3 else entry.shape)


def _not_linear(source, name, entry):
    """Why a tensor is no linear layer's weight; None where it is one."""
    parts = name.removesuffix(".weight").split(".")
    if not isinstance(entry.dtype, torch.dtype):
        return f"{entry.dtype}, no floats of 16 or 32 bits"
    if len(entry.shape) < 2:
        return "vectors"
    if any("embed" in part or part in ("wte", "wpe", "relative_attention_bias") for part in parts) or parts == ["shared"]:
        return "embeddings"
    if "norm" in parts[-1] or parts[-1] == "ln" or parts[-1].startswith("ln_"):
        return "norms"
    stacked = len(entry.shape) == 3 and "experts" in parts and (name.endswith(".weight") or parts[-1] in STACKS)
    if not stacked and not (len(entry.shape) == 2 and name.endswith(".weight")):
        return "no linear layers by their names and shapes"
    if 0 in entry.shape:
        return "empty"
    return "stored transposed, which no layout has" if source.config.get("model_type") in CONV1D else None


def _of_experts(source, name, shape):
    """(e, n, k) of a stack."""
    n, k = (shape[2], shape[1]) if source.transposed else shape[1:]
    hidden, last = source.hidden_size(), name.removesuffix(".weight").rpartition(".")[2]
    if hidden and last in STACKS and (n if last == "down_proj" else k) != hidden:
        kind = "(e, k, n)" if source.transposed else "(e, n, k)"
        raise ValueError(
            f"{name}: has shape {shape}, which is no {kind} of a model with hidden_size={hidden}; --ignore {last} leaves it as it is"
        )
    return (shape[0], n, k)


def _shards(items, shard_size):
    """How many items each file has, so that none takes more than shard_size, but for one item that does."""
    counts, size = [0], 0
    for item in items:
        if counts[-1] and size + item.out_bytes > shard_size:
            counts.append(0)
            size = 0
        counts[-1] += 1
        size += item.out_bytes
    return tuple(counts)


def formats(items):
    """{format: how many layers}, the most frequent first."""
    return dict(Counter(str(item.format) for item in items if item.format is not None).most_common())
