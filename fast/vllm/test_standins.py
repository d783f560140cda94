"""Stand-ins for the classes of vLLM 0.33 that the method is written against, as far as it meets them; and that they are called alike."""

import inspect
from enum import Enum
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from .config import quantization_config
from .experts import experts_method
from .linear import linear_method

DTYPE = torch.bfloat16


class LinearMethodBase:
    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **extra_weight_attrs
    ):  # fmt: skip
        raise NotImplementedError

    def process_weights_after_loading(self, layer):
        return

    def apply(self, layer, x, bias=None):
        raise NotImplementedError


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype, **extra_weight_attrs
    ):  # fmt: skip
        weight = nn.Parameter(torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype), requires_grad=False)
        weight.output_dim, weight.input_dim, weight.weight_loader = 0, 1, extra_weight_attrs["weight_loader"]
        layer.register_parameter("weight", weight)

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, layer.weight, bias)


class LinearBase(nn.Module):
    """What the parallel layers have in common: n, k as the checkpoint has them; own_k and partitions as this rank does."""

    def __init__(self, config, prefix, n, k, partitions, own_k, bias, skip_bias_add, rank, ranks):
        super().__init__()
        self.skip_bias_add, self.tp_rank, self.tp_size, self.params_dtype = skip_bias_add, rank, ranks, DTYPE
        self.quant_method = config.get_quant_method(self, prefix)
        self.quant_method.create_weights(
            layer=self, input_size_per_partition=own_k, output_partition_sizes=partitions, input_size=k, output_size=n, params_dtype=DTYPE,
            weight_loader=self.weight_loader,
        )  # fmt: skip
        self.bias = nn.Parameter(torch.zeros(sum(partitions), dtype=DTYPE), requires_grad=False) if bias else None
        if bias:
            self.bias.output_dim, self.bias.weight_loader = 0, self.weight_loader

    def forward(self, x):
        y = self.quant_method.apply(self, x, None if self.skip_bias_add or self.no_bias_here() else self.bias)
        return y, self.bias if self.skip_bias_add else None

    def no_bias_here(self):
        return False


class ColumnParallelLinear(LinearBase):
    """One projection, or several of different sizes; their rows are shared among the ranks."""

    def __init__(self, config, prefix, sizes, k, bias=True, skip_bias_add=False, rank=0, ranks=1):
        self.sizes = sizes
        super().__init__(config, prefix, sum(sizes), k, [size // ranks for size in sizes], k, bias, skip_bias_add, rank, ranks)

    def index_of(self, shard):
        return shard

    def stored_sizes(self):
        return self.sizes

    def first_row(self, index, size):
        return self.tp_rank * size

    def weight_loader(self, param, loaded_weight, loaded_shard_id=None):
        dim = getattr(param, "output_dim", None)
        target, source = param.data, loaded_weight
        if dim is not None and (loaded_shard_id is None or isinstance(loaded_shard_id, tuple)):
            every = "qkv" if isinstance(self, QKVParallelLinear) else range(len(self.sizes))
            shards, start = every if loaded_shard_id is None else loaded_shard_id, 0
            for shard in shards:
                size = self.stored_sizes()[self.index_of(shard)]
                self.weight_loader(param, loaded_weight.narrow(dim, start, size), shard)
                start += size
            return
        if dim is not None:
            index = self.index_of(loaded_shard_id)
            size = self.sizes[index] // self.tp_size
            target = target.narrow(dim, sum(self.sizes[:index]) // self.tp_size, size)
            source = source.narrow(dim, self.first_row(index, size), size)
        assert target.shape == source.shape
        target.copy_(source)


class QKVParallelLinear(ColumnParallelLinear):
    """Heads of queries are shared among the ranks; those of keys and values too, or each is on several ranks where there are fewer than ranks."""

    def __init__(self, config, prefix, k, head, heads, kv_heads, rank=0, ranks=1, **options):
        self.head, self.heads, self.kv_heads, self.replicas = head, heads, kv_heads, max(ranks // kv_heads, 1)
        super().__init__(config, prefix, [head * h for h in (heads, *[kv_heads * self.replicas] * 2)], k, rank=rank, ranks=ranks, **options)

    def index_of(self, shard):
        return "qkv".index(shard)

    def stored_sizes(self):
        return [self.head * h for h in (self.heads, self.kv_heads, self.kv_heads)]

    def first_row(self, index, size):
        return (self.tp_rank if index == 0 else self.tp_rank // self.replicas) * size


class RowParallelLinear(LinearBase):
    """Columns are shared among the ranks; the first adds the bias."""

    def __init__(self, config, prefix, n, k, bias=True, skip_bias_add=False, rank=0, ranks=1):
        super().__init__(config, prefix, n, k, [n], k // ranks, bias, skip_bias_add, rank, ranks)

    def no_bias_here(self):
        return self.tp_rank > 0

    def weight_loader(self, param, loaded_weight):
        dim, source = getattr(param, "input_dim", None), loaded_weight
        if dim is not None:
            source = source.narrow(dim, self.tp_rank * param.shape[dim], param.shape[dim])
        assert param.shape == source.shape
        param.data.copy_(source)


class ReplicatedLinear(LinearBase):
    """The same on every rank."""

    def __init__(self, config, prefix, n, k, bias=True, skip_bias_add=False):
        super().__init__(config, prefix, n, k, [n], k, bias, skip_bias_add, 0, 1)

    def weight_loader(self, param, loaded_weight):
        assert param.shape == loaded_weight.shape
        param.data.copy_(loaded_weight)


class FusedMoEMethodBase:
    def __init__(self, moe):
        self.moe, self.moe_kernel = moe, None

    def create_weights(self, layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **extra_weight_attrs):
        raise NotImplementedError

    def process_weights_after_loading(self, layer):
        return

    def get_fused_moe_quant_config(self, layer):
        raise NotImplementedError

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input):
        raise NotImplementedError


class UnquantizedFusedMoEMethod(FusedMoEMethodBase):
    pass


class RoutedExperts(nn.Module):
    def __init__(
        self, config, prefix, experts, hidden, inner, rank=0, ranks=1, expert_map=None, activation="silu", has_bias=False, on_input=False,
        swiglu_limit=None,
    ):  # fmt: skip
        super().__init__()
        self.ckpt_gate_proj_name, self.ckpt_up_proj_name, self.ckpt_down_proj_name = "gate_proj", "up_proj", "down_proj"
        self.activation, self.params_dtype, self.expert_map = Enum("Activation", {"IT": activation}).IT, DTYPE, expert_map
        self.swiglu_limit, self.swiglu_alpha, self.swiglu_beta, self.apply_router_weight_on_input = swiglu_limit, None, None, on_input
        self.moe_config = SimpleNamespace(
            tp_rank=rank, tp_size=ranks, is_act_and_mul=not activation.endswith("_no_mul"), has_bias=has_bias,
            activation_situ_beta=1.5, activation_situ_linear_beta=2.5,
        )  # fmt: skip
        self.quant_method = config.get_quant_method(self, prefix)
        self.quant_method.create_weights(
            layer=self, num_experts=experts if expert_map is None else int((expert_map >= 0).sum()), hidden_size=hidden,
            unpadded_hidden_size=hidden, intermediate_size_per_partition=inner // ranks, params_dtype=DTYPE,
            weight_loader=self.weight_loader, global_num_experts=experts,
        )  # fmt: skip

    def weight_loader(self, param, loaded_weight, weight_name, shard_id, expert_id, return_success=False):
        """Of biases, all that vLLM's own is asked for."""
        expert = expert_id if self.expert_map is None else int(self.expert_map[expert_id])
        if expert >= 0:
            target = param.data[expert]
            if shard_id != "w2":
                half = len(target) // 2
                loaded_weight = loaded_weight.narrow(0, self.moe_config.tp_rank * half, half)
                target = target.narrow(0, 0 if shard_id == "w1" else half, half)
            target.copy_(loaded_weight)
        return expert >= 0 if return_success else None

    def forward_modular(self, x, topk_weights, topk_ids):
        method = self.quant_method
        return method.apply(
            layer=self, x=x, topk_weights=topk_weights, topk_ids=topk_ids, shared_experts=None, shared_experts_input=None
        )  # fmt: skip


class QuantizationConfig:
    def __init__(self):
        self.packed_modules_mapping = {}

    def apply_vllm_mapper(self, hf_to_vllm_mapper):
        pass


KINDS = SimpleNamespace(
    LinearBase=LinearBase,
    UnquantizedLinearMethod=UnquantizedLinearMethod,
    RoutedExperts=RoutedExperts,
    UnquantizedFusedMoEMethod=UnquantizedFusedMoEMethod,
    linear_method=linear_method(LinearMethodBase, UnquantizedLinearMethod),
    experts_method=experts_method(FusedMoEMethodBase),
)
Config = quantization_config(QuantizationConfig, lambda: KINDS)


@pytest.mark.parametrize("method, base", [(KINDS.linear_method, LinearMethodBase), (KINDS.experts_method, FusedMoEMethodBase)])
def test_methods_take_what_vllm_gives(method, base):
    for name in ("create_weights", "process_weights_after_loading", "apply"):
        ours, theirs = (list(inspect.signature(getattr(of, name)).parameters) for of in (method, base))
        assert [p for p in ours if p != "weight_loader"] == theirs, name


def test_stand_ins_are_called_as_vllm_is():
    """Where vLLM is installed."""
    pytest.importorskip("vllm")
    from . import layers

    kinds = layers()
    for ours in (LinearMethodBase, FusedMoEMethodBase):
        for name in ("create_weights", "process_weights_after_loading", "apply"):
            theirs = getattr(getattr(kinds, ours.__name__), name)
            assert list(inspect.signature(getattr(ours, name)).parameters) == list(inspect.signature(theirs).parameters)
