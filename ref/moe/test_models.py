"""The expert layers of real architectures, at small size with random weights: our routing and experts give what the modules give."""

import pytest
import torch

from ref import dequantize, quantize

from .experts import fused_experts
from .topk import fused_topk

transformers = pytest.importorskip("transformers")

H, INNER, E, TOKENS = 64, 32, 16, 40
# Sums of at most 2^7 products in float64, through two products and a weighted sum: K 2^-53 of the sum of magnitudes, with room for exp.
ROUNDINGS = 2.0**-53 * 2**10


def models():
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
    from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
    from transformers.models.mixtral import modeling_mixtral as mixtral
    from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

    shape = {"hidden_size": H, "intermediate_size": INNER, "moe_intermediate_size": INNER, "num_local_experts": E, "num_experts": E}
    groups = {
        "n_group": 4,
        "topk_group": 2,
        "n_routed_experts": E,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
    }
    v3 = {"scoring_func": "sigmoid", "num_expert_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "renormalize": "sum_1e-20"}
    return {
        "mixtral": (mixtral.MixtralSparseMoeBlock, mixtral.MixtralConfig, {"num_experts_per_tok": 2}, {}, "gate", {}),
        "qwen3_moe": (qwen3_moe.Qwen3MoeSparseMoeBlock, qwen3_moe.Qwen3MoeConfig, {"num_experts_per_tok": 4, "norm_topk_prob": True}, {}, "gate", {}),
        "qwen3_moe, not renormalized": (
            qwen3_moe.Qwen3MoeSparseMoeBlock, qwen3_moe.Qwen3MoeConfig, {"num_experts_per_tok": 4, "norm_topk_prob": False}, {"renormalize": False},
            "gate", {}),
        "deepseek_v3": (deepseek.DeepseekV3MoE, deepseek.DeepseekV3Config, {"num_experts_per_tok": 4} | groups, v3, "gate", {}),
        "gpt_oss": (gpt_oss.GptOssMLP, gpt_oss.GptOssConfig, {"num_experts_per_tok": 4}, {}, "router", {"activation": "swigluoai"}),
    }, shape  # fmt: skip


NAMES = ("mixtral", "qwen3_moe", "qwen3_moe, not renormalized", "deepseek_v3", "gpt_oss")


def build(name):
    """The module in float64 with random weights, and how it routes and activates."""
    made, shape = models()
    cls, config, fields, routing, router, activation = made[name]
    known = {f for f in shape if hasattr(config(), f)}
    torch.manual_seed(0)
    block = cls(config(**{f: shape[f] for f in known} | fields, hidden_act="silu", experts_implementation="eager")).double().eval()
    with torch.no_grad():
        for tensor in [*block.parameters(), *block.buffers()]:
            tensor.copy_(torch.randn(tensor.shape, dtype=torch.float64) * 0.3)
    return block, getattr(block, router), routing, activation, fields["num_experts_per_tok"]


def stacked(block):
    """w13, w2 and biases, (e, n, k): GPT-OSS keeps (e, k, n)."""
    experts = block.experts
    w13, w2 = experts.gate_up_proj.detach(), experts.down_proj.detach()
    biases = {"bias13": getattr(experts, "gate_up_proj_bias", None), "bias2": getattr(experts, "down_proj_bias", None)}
    turned = biases["bias13"] is not None
    return (w13.mT, w2.mT, biases) if turned else (w13, w2, biases)


@pytest.mark.parametrize("name", NAMES)
def test_routing(name):
    _, router, routing, _, top_k = build(name)
    x = torch.randn(TOKENS, H, dtype=torch.float64)
    with torch.no_grad():
        logits, weights, ids = router(x)
    bias = getattr(router, "e_score_correction_bias", None)
    got_ids, got_weights = fused_topk(logits, top_k, correction_bias=bias, **routing)
    order, got_order = ids.sort(dim=1), got_ids.sort(dim=1)
    assert torch.equal(order.values.int(), got_order.values.int())
    theirs, ours = weights.double().gather(1, order.indices), got_weights.double().gather(1, got_order.indices)
    # float32 all the way there: a few units for exp, one for each addend of the two sums, one for each quotient; logits to float32 cost |logit| units.
    units = E + top_k + 16 + 4 * logits.abs().max()
    assert ((theirs - ours).abs() <= ours.abs() * units * 2.0**-24).all()


@pytest.mark.parametrize("form", ["plain", "int4_g32", "mxfp4", "fp8_e4m3_b16x32"])
@pytest.mark.parametrize("name", NAMES)
def test_experts(name, form):
    """Plain and quantized: the module holds the dequantized weights then."""
    block, router, _, activation, _ = build(name)
    w13, w2, biases = stacked(block)
    if form != "plain":
        w13, w2 = quantize(w13, form), quantize(w2, form)
        with torch.no_grad():
            for parameter, q in ((block.experts.gate_up_proj, w13), (block.experts.down_proj, w2)):
                w = dequantize(q)
                parameter.copy_(w if w.shape == parameter.shape and biases["bias13"] is None else w.mT)
    x = torch.randn(TOKENS, H, dtype=torch.float64)
    with torch.no_grad():
        _, weights, ids = router(x)
        expected = block.experts(x, ids, weights.double())
    got = fused_experts(x, w13, w2, weights, ids, **activation, **biases)
    assert ((got - expected).abs() <= ROUNDINGS * magnitudes(x, w13, w2, weights, ids, **biases)).all()


def magnitudes(x, w13, w2, weights, ids, bias13, bias2):
    """The sum of magnitudes behind each output: |act(g, u)| <= (|g| + 1) (|u| + 1)."""
    a, b = (w.detach().abs() if isinstance(w, torch.Tensor) else dequantize(w).abs() for w in (w13, w2))
    total = torch.zeros_like(x)
    for slot in range(ids.shape[1]):
        inner = torch.einsum("mk,mnk->mn", x.abs(), a[ids[:, slot]]) + (0 if bias13 is None else bias13.detach().abs()[ids[:, slot]])
        hidden = (inner + 1).reshape(len(x), 2, -1).amax(1) ** 2
        out = torch.einsum("mk,mnk->mn", hidden, b[ids[:, slot]]) + (0 if bias2 is None else bias2.detach().abs()[ids[:, slot]])
        total += weights[:, slot, None].abs() * out
    return total
