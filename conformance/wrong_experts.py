"""Layers of experts that are wrong on purpose, each in one way, and one that is right: what the suite's own tests hold it to.

python -m conformance --candidate conformance.wrong_experts:halves_swapped --ops fused_experts
"""

import torch

from ref import QTensor, quantize_input
from ref.combine import take_rows
from ref.moe import fused_experts_variant
from ref.moe.check import ACTIVATIONS
from ref.moe.expert_map import local_ids
from ref.quantize import dequantize


class Right:
    """What engines store between the stages, rounded. Its steps are what the others override."""

    def fused_experts(self, x, w13, w2, topk_weights, topk_ids, *, expert_map=None, activation="silu", **given):
        """ref.fused_experts."""
        everywhere = w13.shape[0] if expert_map is None else expert_map.shape[0]
        ids = self.ids(local_ids(topk_ids, everywhere, expert_map), topk_ids)
        weights = self.weights(topk_weights)
        x = self.inputs(x, weights, given)
        w13 = self.first(w13, activation)
        return self.run(x, w13, w2, weights, ids, activation=activation, **self.options(given))

    def ids(self, local, topk_ids):
        return local

    def weights(self, weights):
        return weights

    def inputs(self, x, weights, given):
        return x

    def first(self, w13, activation):
        return w13

    def options(self, given):
        return given

    def run(self, *args, **kwargs):
        return fused_experts_variant(*args, variant="stored", **kwargs)


class WeightTwice(Right):
    """The router's weight in the second product's epilogue, and in the sum again."""

    def weights(self, weights):
        return weights * weights


class HalvesSwapped(Right):
    """up where gate belongs."""

    def first(self, w13, activation):
        if not ACTIVATIONS[activation].gated:
            return w13
        n = w13.shape[1]
        order = torch.arange(n).roll(n // 2)
        return take_rows(w13, order) if isinstance(w13, QTensor) else w13[:, order]


class OtherRanksCounted(Right):
    """Experts of other ranks, -1 in the map, are taken for the first one here, as on every other rank."""

    def ids(self, local, topk_ids):
        return torch.where(topk_ids < 0, -1, local.clamp(min=0))


class NegativeIdWraps(Right):
    """An empty slot is the last expert's."""

    def fused_experts(self, x, w13, w2, topk_weights, topk_ids, *, expert_map=None, **given):
        end = w13.shape[0] if expert_map is None else expert_map.shape[0]
        ids = torch.where(topk_ids < 0, end - 1, topk_ids) if end else topk_ids
        return super().fused_experts(x, w13, w2, topk_weights, ids, expert_map=expert_map, **given)


class InputWeightIgnored(Right):
    """apply_router_weight_on_input leaves the weight out at the end, and nobody puts it in."""

    def fused_experts(self, x, w13, w2, topk_weights, topk_ids, **given):
        weights = torch.ones_like(topk_weights) if given.get("apply_router_weight_on_input") else topk_weights
        return super().fused_experts(x, w13, w2, weights, topk_ids, **given)


class LimitIgnored(Right):
    def options(self, given):
        return given | {"limit": None} if "limit" in given else given


class BiasDropped(Right):
    """The second product's."""

    def options(self, given):
        return given | {"bias2": None}


class SecondNotQuantized(Right):
    """x is quantized for the first product only."""

    def inputs(self, x, weights, given):
        x_format = given.get("x_format")
        if x_format is None or given.get("apply_router_weight_on_input"):
            return x
        return dequantize(quantize_input(x, x_format))

    def run(self, x, *args, x_format=None, apply_router_weight_on_input=False, **kwargs):
        if apply_router_weight_on_input:
            kwargs |= {"x_format": x_format, "apply_router_weight_on_input": True}
        return super().run(x.to(self.dtype), *args, **kwargs)

    def fused_experts(self, x, *args, **given):
        self.dtype = x.dtype
        return super().fused_experts(x, *args, **given)


right = Right()
weight_twice = WeightTwice()
halves_swapped = HalvesSwapped()
other_ranks_counted = OtherRanksCounted()
negative_id_wraps = NegativeIdWraps()
input_weight_ignored = InputWeightIgnored()
limit_ignored = LimitIgnored()
bias_dropped = BiasDropped()
second_not_quantized = SecondNotQuantized()
