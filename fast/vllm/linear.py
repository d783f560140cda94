"""Linear layers."""

import warnings

import torch

from ref.combine import fuse, take_columns, take_rows

from ..dispatch import prepare
from ..linear import linear
from .slots import columns_of, rows_of, slots


def linear_method(base, unquantized):
    """The class of the method for linear layers.

    Args:
        base: vLLM's LinearMethodBase. unquantized: its UnquantizedLinearMethod.
    """

    class QuantrefLinearMethod(base):
        def __init__(self, choice, name):
            """
            Args:
                choice: config.Choice. name: the layer's, for messages.
            """
            super().__init__()
            self.choice, self.name = choice, f"quantref: {name}"
            # Tensors of shards that are not complete; this rank's part of those that are, by their places in the layer.
            self.arrived, self.shards = {}, {}

        def create_weights(
            self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **extra_weight_attrs
        ):  # fmt: skip
            self.sizes = (input_size_per_partition, list(output_partition_sizes), input_size, output_size, params_dtype)
            slots(layer, {part: part for part in self.choice.parts}, params_dtype, self.load)
            self.x_format = self.choice.x_format(self.name, layer.weight.device)

        def load(self, layer, part, tensor, *shard):
            """Take one tensor of the checkpoint; with the last of its shard, cut out this rank's part of the weight."""
            if hasattr(layer, "prepared"):
                raise NotImplementedError(f"{self.name}: weights cannot be loaded again; make the model anew")
            if part == "weight" and self.choice.stored and tensor.is_floating_point() and layer.quant_method is self:
                self.fall_back(layer)
            if layer.quant_method is not self:
                if part != "weight" or not tensor.is_floating_point():
                    raise self.mixed()
                layer.weight.weight_loader(layer.weight, tensor, *shard)
                return
            tensors = self.arrived.setdefault(shard, {})
            tensors[part] = tensor.to(layer.weight.device)
            if len(tensors) == len(self.choice.parts):
                try:
                    self.cut(layer, self.choice.read(self.arrived.pop(shard)), shard)
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{self.name}{f', shard {shard[0]!r}' if shard else ''}: {error}") from None

        def cut(self, layer, q, shard):
            k, partitions, whole_k, *_ = self.sizes
            # vLLM's loaders refuse by assert, and by what torch says.
            try:
                rows = rows_of(layer.weight_loader, q.shape[0], sum(partitions), *shard)
                start = columns_of(layer.weight_loader, q.shape[1], k, *shard) if q.shape[1] == whole_k else None
            except (AssertionError, RuntimeError):
                start = None
            if start is None:
                raise ValueError(f"a weight of shape {tuple(q.shape)} does not fit the layer, which has n={partitions}, k={k} on this rank")
            q = take_columns(q, start, start + k)
            for index, part in enumerate(rows.split(partitions)):
                if (part >= 0).all():
                    self.shards[index] = take_rows(q, part)

        def fall_back(self, layer):
            """Make it one of vLLM's unquantized layers: its weights are of 16 bits although the configuration says otherwise."""
            if self.arrived or self.shards:
                raise self.mixed()
            warnings.warn(f"{self.name} has unquantized weights in the checkpoint, and stays unquantized", stacklevel=2)
            device = layer.weight.device
            for part in self.choice.parts:
                delattr(layer, part)
            layer.quant_method = unquantized()
            with device:
                layer.quant_method.create_weights(layer, *self.sizes, weight_loader=layer.weight_loader)

        def mixed(self):
            return ValueError(f"{self.name}: some of its shards are quantized and some are not, and vLLM has one layer for all")

        def process_weights_after_loading(self, layer):
            if hasattr(layer, "prepared"):
                return
            count = len(self.sizes[1])
            missing = ", ".join(str(index) for index in range(count) if index not in self.shards)
            if missing:
                halves = "".join(f"; for {shard or 'one'} there is only {', '.join(found)}" for shard, found in self.arrived.items())
                raise ValueError(f"{self.name}: of {count} shards the checkpoint lacks {missing}{halves}")
            q = fuse([self.shards.pop(index) for index in range(count)])
            layer.prepared = prepare(q, x_dtype=self.sizes[-1], x_format=self.x_format, bias=layer.bias is not None)
            # For calls that bring none although the layer has one: on ranks after the first, and with skip_bias_add.
            layer.no_bias = None if layer.bias is None else torch.zeros_like(layer.bias)

        def apply(self, layer, x, bias=None):
            return linear(x, layer.prepared, layer.no_bias if bias is None else bias, x_format=self.x_format)

    return QuantrefLinearMethod
