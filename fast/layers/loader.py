"""Layers that were created empty, filled shard by shard.

>>> from fast.layers.linear import Linear
>>> loader = LinearLoader(Linear.empty(96, 64, "int4_g32"), "layers.0.qkv_proj", {"q": 64, "k": 16, "v": 16}, online=True)
>>> for shard, rows in (("q", 64), ("k", 16), ("v", 16)):
...     loader.load(torch.randn(rows, 64), shard)
>>> loader.finish()
Linear(in_features=64, out_features=96, format=int4_g32, bias=False)
"""

import warnings

import torch
from torch import nn

from ref.moe.check import ACTIVATIONS
from ref.qtensor import QTensor

from .shards import Shards
from .stacked import Stacked

# How many missing shards a message names.
NAMED = 12


class LinearLoader:
    """Fills a Linear. The layer takes the format that comes out of the shards, whose scales may be finer than those that it was created with.

    Shards may be QTensors, or plain tensors. With online=True plain ones are quantized to the layer's format, each by itself as it arrives.
    Otherwise the layer falls back: it becomes a plain torch.nn.Linear, and a warning says so.
    """

    def __init__(self, layer, name, shards=None, *, online=False, rank=0, size=1, axis="n"):
        """
        Args:
            layer: what Linear.empty returned, of the shape that it has on this rank. What is in it is let go of.
            name: of the layer, for messages.
            shards: the rows of each shard of a fused layer on this rank, {name: rows} or a list; None for a layer that has no shards.
            online: quantize plain shards.
            rank, size, axis: the slice of each shard that is this rank's: rows for axis "n", columns for "k". Shards arrive whole, are quantized,
                and then sliced, so that results do not depend on how many ranks there are.

        Raises:
            ValueError: shards that are not the layer, or no such rank or axis.
        """
        rows = {0: layer.out_features} if shards is None else shards if isinstance(shards, dict) else dict(enumerate(shards))
        if sum(rows.values()) != layer.out_features:
            raise ValueError(f"{name}: shards have {sum(rows.values())} rows, the layer has n={layer.out_features} (both must match)")
        self.layer, self.name, self.x_scale = layer, name, None
        self.shards = Shards(
            name,
            rows,
            layer.in_features,
            layer.format,
            online=online,
            rank=rank,
            size=size,
            axis=axis,
            device=_emptied(layer, layer.packed),
        )

    def load(self, tensor, shard=0):
        """A shard of the weight: QTensor or plain tensor (n, k), of all ranks.

        Raises:
            TypeError, ValueError: it does not fit, or has arrived before; the message names layer, shard, what was got and what was expected.
        """
        _open(self)
        self.shards.add(tensor, shard)

    def load_bias(self, tensor, shard=0):
        """A shard of the bias: (n,), of all ranks. Where columns are sliced it is rank 0's, so that the sum over ranks has it once.

        Raises: as load; ValueError, too, if the layer was created without a bias.
        """
        if _open(self).bias is None:
            raise ValueError(f"{self.name}: a bias arrived, and the layer was created without one")
        self.shards.add_bias(tensor, shard)

    def load_x_scale(self, tensor):
        """The static scale of the input; of several shards' scales the largest, as vLLM takes it.

        Raises:
            ValueError: it is more than one value, or the layer was created without one.
        """
        if _open(self).x_scale is None:
            raise ValueError(f"{self.name}: x_scale arrived, and the layer was created without one")
        if tensor.numel() != 1:
            raise ValueError(f"{self.name}: x_scale has shape {tuple(tensor.shape)}, expected one value")
        tensor = tensor.detach().reshape(1).to(self.shards.device, torch.float32)
        self.x_scale = tensor if self.x_scale is None else torch.maximum(self.x_scale, tensor)

    def finish(self, prepare=None):
        """The layer, filled.

        Args:
            prepare: the dtype of x to prepare it for, or None.

        Returns:
            The layer, or, where unquantized weights arrived that are not to be quantized, a torch.nn.Linear to put in its place.

        Raises:
            ValueError: shards are missing; the message names layer and shards.
        """
        layer = _open(self)
        missing = self.shards.missing(layer.bias is not None)
        _complain(self.name, missing + (["x_scale"] if layer.x_scale is not None and self.x_scale is None else []))
        weight, bias, self.layer = self.shards.weight(), None if layer.bias is None else self.shards.bias(), None
        if not isinstance(weight, QTensor):
            _warn(self.name, weight.dtype, layer.format, "it becomes a plain torch.nn.Linear")
            return _plain(weight, bias)
        layer.put(weight)
        layer.bias, layer.x_scale = bias, self.x_scale
        return layer if prepare is None else layer.prepare(prepare)


class ExpertsLoader:
    """Fills a FusedExperts, expert by expert, with shards "gate", "up" and "down"; without a gate "up" and "down".

    Each expert is written to its place in the stack as soon as its shards are there. Otherwise as LinearLoader; what falls back are the
    stacks, which stay plain.
    """

    def __init__(self, layer, name, *, online=False, rank=0, size=1):
        """
        Args:
            layer: what FusedExperts.empty returned, of the shape that it has on this rank. What is in it is let go of.
            rank, size: the slice of each expert that is this rank's: rows of gate and up, columns of down. The rest: as LinearLoader.
        """
        kind = ACTIVATIONS[layer.activation]
        inner, hidden = layer.intermediate, layer.hidden
        order = torch.arange(2 * inner).view(2, inner).T.flatten() if kind.interleaved else None
        shared = {"online": online, "rank": rank, "size": size}
        formats = layer.w13.format, layer.w2.format
        self.device = shared["device"] = _emptied(layer, layer.w2.packed if layer.w2.plain is None else layer.w2.plain)
        first = {shard: inner for shard in (("gate", "up") if kind.gated else ("up",))}
        self.layer, self.name = layer, name
        self.first = Stacked(name, layer.experts, order, first, hidden, formats[0], axis="n", **shared)
        self.second = Stacked(name, layer.experts, None, {"down": hidden}, inner, formats[1], axis="k", **shared)

    def load(self, tensor, expert, shard):
        """A shard of an expert's weight: QTensor or plain tensor (n, k), of all ranks. Raises: as LinearLoader.load."""
        self._side(shard).add(tensor, expert, shard)

    def load_bias(self, tensor, expert, shard):
        """A shard of an expert's bias: (n,), of all ranks; those of "down" are rank 0's. Raises: as LinearLoader.load_bias."""
        side = self._side(shard)
        if (self.layer.bias2 if side is self.second else self.layer.bias13) is None:
            raise ValueError(f"{self.name}: a bias of {shard!r} arrived, and the layer was created without one")
        side.add_bias(tensor, expert, shard)

    def finish(self, prepare=None):
        """The layer, filled. Args and Raises: as LinearLoader.finish."""
        layer = _open(self)
        if not layer.experts:
            # A rank may have none; then nothing says where the layer is.
            return layer.to_empty(device=self.device or torch.get_default_device())
        _complain(self.name, self.first.missing(layer.bias13 is not None) + self.second.missing(layer.bias2 is not None))
        for side, weight, bias in ((self.first, layer.w13, "bias13"), (self.second, layer.w2, "bias2")):
            if weight.format is not None and not isinstance(side.weight, QTensor):
                _warn(self.name, side.weight.dtype, weight.format, "it stays plain, and so do its activations")
                layer.x_format = None
            weight.put(side.weight)
            setattr(layer, bias, side.bias)
        self.layer = self.first = self.second = None
        return layer if prepare is None else layer.prepare(prepare)

    def _side(self, shard):
        _open(self)
        return self.second if shard in self.second.rows else self.first


def _open(loader):
    """The layer of a loader that is not finished."""
    if loader.layer is None:
        raise ValueError(f"{loader.name}: the layer was finished before")
    return loader.layer


def _emptied(layer, tensor):
    """The device that a layer is on, or None for meta, where it is afterwards: what it holds is not kept beside what it will hold."""
    device = tensor.device
    if device.type == "meta":
        return None
    layer.to("meta")
    return device


def _complain(name, missing):
    if missing:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise ValueError(f"{name}: not all shards have arrived; missing: {', '.join(missing[:NAMED])}{more}")


def _warn(name, dtype, format, becomes):
    warnings.warn(f"{name}: an unquantized weight ({dtype}) arrived for a layer that was to be {format}; {becomes}", stacklevel=3)


def _plain(weight, bias):
    n, k = weight.shape
    layer = nn.Linear(k, n, bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return layer
