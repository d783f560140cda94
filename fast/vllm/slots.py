"""How the tensors of a checkpoint arrive at a layer, and which part of them belongs to it on this rank."""

import torch


def slots(layer, parts, params_dtype, load):
    """Parameters by which tensors arrive at a layer. They hold nothing, but what models ask of a weight: its dtype and its device.

    Args:
        parts: {name of the parameter: what load calls it}. load: (layer, part, tensor, ...) for each tensor that arrives.
    """
    for name, part in parts.items():

        def arrive(layer, param, loaded_weight, *args, part=part, **kwargs):
            return load(layer, part, loaded_weight, *args, **kwargs)

        arrive.supports_moe_loading = True
        param = torch.nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
        # A method of the layer: of these vLLM's own records let go when the model is dropped.
        param.weight_loader = arrive.__get__(layer)
        layer.register_parameter(name, param)


def rows_of(load, rows, size, *shard):
    """Which rows of a checkpoint's tensor the rows of a layer are: int64 (size,), -1 where they are of another shard.

    vLLM's own loader is asked, with the rows' numbers in place of weights: then tensor parallelism, fused shards and heads that several
    ranks share are what they are in vLLM.

    Args:
        load: the layer's weight_loader. rows: how many the tensor has. size: how many the layer has. shard: its id, if it has one.
    """
    return _ask(load, rows, size, shard, 0)


def columns_of(load, columns, size, *shard):
    """The first column of a checkpoint's tensor that is the layer's; the others are its neighbours."""
    return 0 if size == columns else int(_ask(load, columns, size, shard, 1)[0])


def _ask(load, count, size, shard, axis):
    answer = torch.nn.Parameter(torch.full((size, 1) if axis == 0 else (1, size), -1), requires_grad=False)
    answer.output_dim, answer.input_dim = (0, None) if axis == 0 else (None, 1)
    answer.ignore_warning = True
    load(answer, torch.arange(count).view(-1, 1) if axis == 0 else torch.arange(count).view(1, -1), *shard)
    return answer.data.flatten()
