"""The experts of a mixture."""

import torch

from ref.moe.check import ACTIVATIONS

from ..layers import environment
from ..layers.experts import FusedExperts
from ..layers.loader import ExpertsLoader
from ..moe import fused_experts
from .slots import slots

# What vLLM calls an expert's shards, with a gate and without one.
SHARDS = {True: {"w1": "gate", "w3": "up", "w2": "down"}, False: {"w1": "up", "w2": "down"}}


def experts_method(base):
    """The class of the method for experts.

    Args:
        base: vLLM's FusedMoEMethodBase.
    """

    class QuantrefExpertsMethod(base):
        def __init__(self, choice, name, moe):
            """
            Args:
                choice: config.Choice. name: the layer's, for messages. moe: vLLM's FusedMoEConfig.
            """
            super().__init__(moe)
            self.choice, self.name, self.arrived = choice, f"quantref: {name}", {}

        def create_weights(
            self, layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, weight_loader, **extra_weight_attrs
        ):  # fmt: skip
            slots(layer, {f"{stack}_{part}": part for stack in ("w13", "w2") for part in self.choice.parts}, params_dtype, self.load)
            self.options = activation_of(layer, self.moe) | {"x_format": self.choice.x_format(self.name, layer.w2_weight.device)}
            empty = FusedExperts.empty(num_experts, hidden_size, intermediate_size_per_partition, self.choice.format, **self.options)
            self.loader = ExpertsLoader(empty, self.name, rank=self.moe.tp_rank, size=self.moe.tp_size)
            self.dtype, self.shards = params_dtype, SHARDS[self.moe.is_act_and_mul]
            # Local numbers of experts, -1 where they are another rank's.
            self.local = range(num_experts) if layer.expert_map is None else layer.expert_map.tolist()
            if self.moe.has_bias:
                for name, n in (("w13_bias", empty.w13.shape[1]), ("w2_bias", hidden_size)):
                    bias = torch.nn.Parameter(torch.zeros(num_experts, n, dtype=params_dtype), requires_grad=False)
                    bias.weight_loader = weight_loader
                    layer.register_parameter(name, bias)

        def load(self, layer, part, tensor, weight_name, shard_id, expert_id, return_success=False):
            """Take one tensor of one expert; with the last of its shard, the weight goes to its place in the stack."""
            if self.loader is None:
                raise NotImplementedError(f"{self.name}: weights cannot be loaded again; make the model anew")
            expert = self.local[expert_id]
            if expert >= 0:
                tensors = self.arrived.setdefault((expert, shard_id), {})
                tensors[part] = tensor.to(layer.w2_weight.device)
                if len(tensors) == len(self.choice.parts):
                    try:
                        q = self.choice.read(self.arrived.pop((expert, shard_id)))
                    except (TypeError, ValueError) as error:
                        raise ValueError(f"{self.name}: {shard_id} of expert {expert_id}: {error}") from None
                    self.loader.load(q, expert, self.shards.get(shard_id, shard_id))
            return expert >= 0 if return_success else None

        def process_weights_after_loading(self, layer):
            if self.loader is None:
                return
            experts = self.loader.finish()
            if self.moe.has_bias:
                experts.bias13, experts.bias2 = layer.w13_bias.data, layer.w2_bias.data
            experts.prepare(self.dtype)
            layer.prepared = {"w13": experts.w13.weight, "w2": experts.w2.weight, "bias13": experts.bias13, "bias2": experts.bias2}
            self.loader = None

        def get_fused_moe_quant_config(self, layer):
            """None: it is for vLLM's own kernels."""

        def apply(self, layer, x, topk_weights, topk_ids, shared_experts=None, shared_experts_input=None):
            return fused_experts(
                x, topk_weights=topk_weights, topk_ids=topk_ids, expert_map=layer.expert_map, gemm_type=environment.gemm_type(),
                apply_router_weight_on_input=layer.apply_router_weight_on_input, **self.options, **layer.prepared,
            )  # fmt: skip

    return QuantrefExpertsMethod


def activation_of(layer, moe):
    """The activation of a layer of vLLM and those of its parameters that it takes, as arguments of FusedExperts.

    Raises:
        NotImplementedError: an activation that there is not, or that has gate and up interleaved, as gpt-oss: vLLM's models write such weights
            to their place by themselves.
    """
    name = layer.activation.value
    legal = [known for known, kind in ACTIVATIONS.items() if not kind.interleaved]
    if name not in legal:
        raise NotImplementedError(f"quantref: experts with activation {name!r} cannot be loaded, only those with {', '.join(legal)}")
    given = {"limit": layer.swiglu_limit, "alpha": layer.swiglu_alpha, "beta": layer.swiglu_beta}
    if name == "situ":
        given = {"beta": moe.activation_situ_beta, "up_beta": moe.activation_situ_linear_beta}
    return {"activation": name} | {key: value for key, value in given.items() if key in ACTIVATIONS[name].takes}
