"""Experts in vLLM's hands: shards in any order, over ranks of tensor and of expert parallelism, with biases; and what is refused."""

import pytest
import torch

import fast
import ref
from ref.layouts import humming

from .test_linear import INT4, finish, normal, online  # noqa: F401
from .test_standins import Config, RoutedExperts

HIDDEN, INNER, EXPERTS, SLOTS = 64, 96, 4, 2
SHAPES = {"w1": (INNER, HIDDEN), "w3": (INNER, HIDDEN), "w2": (HIDDEN, INNER)}


def weights(shards=("w2", "w3", "w1"), experts=EXPERTS):
    """{(expert, shard): tensor}, in an order that is not the stacks'."""
    pairs = [(e, shard) for shard in shards for e in reversed(range(experts))]
    return {pair: normal(*SHAPES[pair[1]], seed=seed) / 4 for seed, pair in enumerate(pairs)}


def give(layer, part, tensors):
    """Hand over tensors as RoutedExperts.load_weights does; whether each was taken."""
    taken = {}
    for (e, shard), tensor in tensors.items():
        name = f"{'w2' if shard == 'w2' else 'w13'}_{part}"
        taken[e, shard] = getattr(layer, name).weight_loader(
            param=getattr(layer, name),
            loaded_weight=tensor,
            weight_name=f"experts.{name}",
            shard_id=shard,
            expert_id=e,
            return_success=True,
        )
    return taken


def stacks(qs, rank=0, ranks=1, own=range(EXPERTS), first=("w1", "w3")):
    """w13 and w2 of QTensors {(expert, shard): q} on one rank."""

    def cut(q, axis):
        size = q.shape[axis] // ranks
        return (
            ref.take_columns(q, size * rank, size * (rank + 1)) if axis else ref.take_rows(q, torch.arange(size * rank, size * (rank + 1)))
        )

    w13 = ref.stack([ref.fuse([cut(qs[e, shard], 0) for shard in first]) for e in own])
    return w13, ref.stack([cut(qs[e, "w2"], 1) for e in own])


def routed(m=7, slots=SLOTS):
    ids = torch.randint(0, EXPERTS, (m, slots), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    return normal(m, HIDDEN, seed=8), normal(m, slots, seed=4).float().sigmoid(), ids


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("weight", [INT4, {"dtype": "int8"}], ids=["int4_g32", "int8"])
def test_tensor_parallel(online, weight, rank):  # noqa: F811
    online(weight, {"dtype": "int8"} if weight is INT4 else None)
    layer = RoutedExperts(Config(), "layers.0.mlp.experts", EXPERTS, HIDDEN, INNER, rank, 2)
    given = weights()
    assert all(give(layer, "weight", given).values())
    fmt = layer.quant_method.choice.format
    w13, w2 = stacks({pair: fast.quantize(w, fmt) for pair, w in given.items()}, rank, 2)
    x, topk_weights, ids = routed()
    y = fast.fused_experts(x, w13, w2, topk_weights, ids, x_format="int8_token" if weight is INT4 else None)
    assert torch.equal(finish(layer).forward_modular(x, topk_weights, ids), y)


def test_expert_parallel(online):  # noqa: F811
    online(INT4)
    expert_map = torch.tensor([-1, 1, -1, 0], dtype=torch.int32)
    layer = RoutedExperts(Config(), "layers.0.mlp.experts", EXPERTS, HIDDEN, INNER, expert_map=expert_map)
    given = weights()
    assert give(layer, "weight", given) == {(e, shard): e in (1, 3) for e, shard in given}
    w13, w2 = stacks({pair: fast.quantize(w, "int4_g32_bf16") for pair, w in given.items()}, own=(3, 1))
    x, topk_weights, ids = routed()
    y = fast.fused_experts(x, w13, w2, topk_weights, ids, expert_map=expert_map)
    assert torch.equal(finish(layer).forward_modular(x, topk_weights, ids), y)


@pytest.mark.parametrize("activation, limit", [("silu", 0.5), ("situ", None), ("relu2_no_mul", None), ("swigluoai_uninterleave", 0.7)])
def test_activations_and_biases(online, activation, limit):  # noqa: F811
    online(INT4)
    first = ("w1",) if activation.endswith("_no_mul") else ("w1", "w3")
    layer = RoutedExperts(
        Config(), "layers.0.mlp.experts", EXPERTS, HIDDEN, INNER, activation=activation, has_bias=True, swiglu_limit=limit
    )  # fmt: skip
    given = weights((*first, "w2"))
    give(layer, "weight", given)
    layer.w13_bias.data.copy_(normal(*layer.w13_bias.shape, seed=5))
    give(layer, "bias", {(e, "w2"): normal(HIDDEN, seed=20 + e) for e in range(EXPERTS)})
    w13, w2 = stacks({pair: fast.quantize(w, "int4_g32_bf16") for pair, w in given.items()}, first=first)
    x, topk_weights, ids = routed()
    parameters = {"beta": 1.5, "up_beta": 2.5} if activation == "situ" else {"limit": limit}
    y = fast.fused_experts(
        x, w13, w2, topk_weights, ids, activation=activation, bias13=layer.w13_bias.data, bias2=layer.w2_bias.data, **parameters
    )
    assert torch.equal(finish(layer).forward_modular(x, topk_weights, ids), y)


def test_weights_of_the_router_on_the_input(online):  # noqa: F811
    online(INT4)
    layer = RoutedExperts(Config(), "layers.0.mlp.experts", EXPERTS, HIDDEN, INNER, on_input=True)
    given = weights()
    give(layer, "weight", given)
    w13, w2 = stacks({pair: fast.quantize(w, "int4_g32_bf16") for pair, w in given.items()})
    x, topk_weights, ids = routed(slots=1)
    y = fast.fused_experts(x, w13, w2, topk_weights, ids, apply_router_weight_on_input=True)
    assert torch.equal(finish(layer).forward_modular(x, topk_weights, ids), y)


@pytest.mark.parametrize("name", ["uint4z_g32_bf16", "nvfp4", "fp8_e4m3_b32x32"])
def test_checkpoints(online, name):  # noqa: F811
    qs = {pair: ref.quantize(w.float(), name) for pair, w in weights().items()}
    layer = RoutedExperts(Config.from_config(humming.config_of(qs[0, "w1"])), "layers.0.mlp.experts", EXPERTS, HIDDEN, INNER)
    for part in layer.quant_method.choice.parts:
        give(layer, part, {pair: humming.write(q)[part] for pair, q in qs.items()})
    w13 = ref.stack([ref.fuse([qs[e, "w1"], qs[e, "w3"]]) for e in range(EXPERTS)])
    w2 = ref.stack([qs[e, "w2"] for e in range(EXPERTS)])
    x, topk_weights, ids = routed()
    y = fast.fused_experts(x, w13, w2, topk_weights, ids)
    assert torch.equal(finish(layer).forward_modular(x, topk_weights, ids), y)


def test_checkpoints_that_name_each_expert(online):  # noqa: F811
    config = humming.config_of(ref.quantize(torch.zeros(HIDDEN, HIDDEN), "int4_g32_bf16"))

    def choice(rules):
        options = RoutedExperts(Config.from_config(config | rules), "a.experts", EXPERTS, HIDDEN, INNER).quant_method
        return str(options.choice.format)

    assert choice({"dynamic": {"+:^a[.]experts[.][0-9]+[.].*_proj$": {"dtype": "uint8"}}}) == "int8_g32_bf16"
    with pytest.raises(ValueError, match=r"a.experts is one layer in vLLM, .* a.experts.0.up_proj: left alone"):
        choice({"modules_to_not_convert": [f"a.experts.{e}.up_proj" for e in range(EXPERTS)]})


def test_refusals(online):  # noqa: F811
    online(INT4)

    def layer(**options):
        return RoutedExperts(Config(), "layers.0.mlp.experts", EXPERTS, HIDDEN, INNER, **options)

    with pytest.raises(NotImplementedError, match=r"activation 'swigluoai' cannot be loaded, only those with silu, .*uninterleave"):
        layer(activation="swigluoai")
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts: expert 2: weight of 'gate' has shape \(96, 60\), expected \(96, 64\)"):
        give(layer(), "weight", {(2, "w1"): torch.zeros(INNER, 60)})
    with pytest.raises(ValueError, match=r"^quantref: layers.0.mlp.experts: w2 of expert 1: .*nan"):
        give(layer(), "weight", {(1, "w2"): torch.full((HIDDEN, INNER), torch.nan)})
    with pytest.raises(ValueError, match="there is no shard 'w4'"):
        layer().w2_weight.weight_loader(None, torch.zeros(HIDDEN, INNER), "", "w4", 0)
    partial = layer()
    give(partial, "weight", {pair: w for pair, w in weights().items() if pair != (3, "w3")})
    with pytest.raises(ValueError, match=r"^quantref: layers.0.mlp.experts: .*missing: weight of 'up' of expert 3$"):
        finish(partial)
    whole = layer()
    give(whole, "weight", weights())
    finish(whole)
    assert finish(whole).quant_method.get_fused_moe_quant_config(whole) is None
    with pytest.raises(NotImplementedError, match=r"layers.0.mlp.experts: weights cannot be loaded again"):
        give(whole, "weight", {(0, "w1"): torch.zeros(INNER, HIDDEN)})
    config = humming.config_of(ref.quantize(torch.zeros(INNER, HIDDEN), "int4_g32"))
    stored = RoutedExperts(Config.from_config(config), "layers.0.mlp.experts", EXPERTS, HIDDEN, INNER)
    give(stored, "weight_scale", {(0, "w1"): torch.ones(INNER, 2)})
    with pytest.raises(ValueError, match=r"w1 of expert 0: humming: weight has dtype torch.bfloat16"):
        give(stored, "weight", {(0, "w1"): normal(INNER, HIDDEN)})
