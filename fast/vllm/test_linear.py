"""Linear layers in vLLM's hands: online and from checkpoints, over ranks, with biases; and what is refused."""

import gc
import json
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch

import fast
import ref
from fast.layers import environment, fallback
from ref.layouts import humming

from .test_standins import (
    DTYPE,
    KINDS,
    ColumnParallelLinear,
    Config,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

INT4 = {"dtype": "int4", "group_size": 32}
ONLINE = {
    "int4_g32": INT4,
    "int8": {"dtype": "int8"},
    "fp8_block": {"dtype": "float8e4m3", "group_size": 32, "group_size_n": 24},
    "int8_tensor": {"dtype": "int8", "scale_type": "tensor"},
}


@pytest.fixture
def online(monkeypatch):
    """Sets FAST_ONLINE_QUANT_CONFIG and FAST_INPUT_QUANT_CONFIG."""
    for names in environment.NAMES.items():
        for name in names:
            monkeypatch.delenv(name, raising=False)

    def set_to(weight=None, x=None):
        environment.quant_config.cache_clear()
        for name, value in (("FAST_ONLINE_QUANT_CONFIG", weight), ("FAST_INPUT_QUANT_CONFIG", x)):
            if value is not None:
                monkeypatch.setenv(name, json.dumps(value))

    set_to()
    yield set_to
    environment.quant_config.cache_clear()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DTYPE)


def give(layer, tensors, *shard, prefix=""):
    """Hand a layer the tensors of a shard as vLLM's models do: {name of the parameter: tensor}."""
    parameters = dict(layer.named_parameters())
    for name, tensor in tensors.items():
        param = parameters[prefix + name]
        param.weight_loader(param, tensor, *shard)


def finish(layer):
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def rows(q, rank, ranks):
    size = q.shape[0] // ranks
    return ref.take_rows(q, torch.arange(rank * size, (rank + 1) * size))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("kind", ONLINE)
def test_qkv_over_ranks(online, kind, kv_heads, rank):
    """Heads of queries are split; those of keys and values are, or are on both ranks. All bits are those of the whole weights' slices."""
    online(ONLINE[kind])
    layer = QKVParallelLinear(Config(), "layers.0.qkv_proj", 64, 16, 4, kv_heads, rank=rank, ranks=2)
    sizes = {"q": 64, "k": 16 * kv_heads, "v": 16 * kv_heads}
    weights = {shard: normal(n, 64, seed=i) for i, (shard, n) in enumerate(sizes.items())}
    biases = {shard: normal(n, seed=9) for shard, n in sizes.items()}
    for shard in ("k", "q", "v"):
        give(layer, {"weight": weights[shard], "bias": biases[shard]}, shard)
    finish(layer)
    fmt = layer.quant_method.choice.format
    cut = {"q": (rank, 2), "k": (rank, 2) if kv_heads == 2 else (0, 1), "v": (rank, 2) if kv_heads == 2 else (0, 1)}
    q = ref.fuse([rows(fast.quantize(weights[shard], fmt), *cut[shard]) for shard in "qkv"])
    bias = torch.cat([biases[shard].chunk(cut[shard][1])[cut[shard][0]] for shard in "qkv"])
    for shape in ((5, 64), (2, 3, 64)):
        x = normal(*shape, seed=7)
        y, returned = layer(x)
        assert returned is None and torch.equal(y, fast.linear(x, q, bias))


def test_shards_that_are_one_on_disk(online):
    online(INT4)
    for layer, n, shard in (
        (QKVParallelLinear(Config(), "qkv_proj", 64, 16, 4, 2, rank=1, ranks=2, bias=False), 128, ()),
        (ColumnParallelLinear(Config(), "gate_up_proj", [48, 48], 64, bias=False, rank=1, ranks=2), 96, ()),
        (ColumnParallelLinear(Config(), "in_proj", [48, 48], 64, bias=False, rank=1, ranks=2), 96, ((0, 1),)),
    ):
        w = normal(n, 64)
        give(layer, {"weight": w}, *shard)
        sizes = layer.stored_sizes()
        q = ref.fuse([rows(fast.quantize(part, "int4_g32_bf16"), 1, 2) for part in w.split(sizes)])
        x = normal(3, 64, seed=1)
        assert torch.equal(finish(layer)(x)[0], fast.linear(x, q))


@pytest.mark.parametrize("rank", [0, 1])
def test_gate_up_with_quantized_activations(online, rank):
    online(INT4, {"dtype": "int8"})
    layer = ColumnParallelLinear(Config(), "layers.0.gate_up_proj", [48, 48], 64, bias=False, rank=rank, ranks=2)
    gate, up = normal(48, 64), normal(48, 64, seed=1)
    give(layer, {"weight": up}, 1)
    give(layer, {"weight": gate}, 0)
    q = ref.fuse([rows(fast.quantize(w, "int4_g32_bf16"), rank, 2) for w in (gate, up)])
    x = normal(3, 64, seed=2)
    assert torch.equal(finish(layer)(x)[0], fast.linear(x, q, x_format="int8_token"))


@pytest.mark.parametrize("kind", ["int4_g32", "int8", "int8_tensor"])
def test_row_parallel_has_its_bias_once(online, kind):
    """Groups are cut where ranks meet (k = 80 over two: 40 each), and the scales are those of the whole rows."""
    online(ONLINE[kind])
    w, bias, x = normal(24, 80), normal(24, seed=1), normal(3, 80, seed=2)
    for rank in (0, 1):
        layer = RowParallelLinear(Config(), "layers.0.o_proj", 24, 80, rank=rank, ranks=2)
        give(layer, {"weight": w, "bias": bias})
        whole = fast.quantize(w, layer.quant_method.choice.format)
        own = slice(40 * rank, 40 * (rank + 1))
        y = fast.linear(x[:, own], ref.take_columns(whole, own.start, own.stop), None if rank else bias)
        assert torch.equal(finish(layer)(x[:, own])[0], y)


def test_a_bias_that_is_added_elsewhere(online):
    online(INT4)
    w, bias, x = normal(48, 64), normal(48, seed=1), normal(3, 64, seed=2)
    for layer in (
        ColumnParallelLinear(Config(), "layers.0.up", [48], 64, skip_bias_add=True),
        ReplicatedLinear(Config(), "layers.0.up", 48, 64, skip_bias_add=True),
    ):
        give(layer, {"weight": w, "bias": bias})
        y, returned = finish(layer)(x)
        assert returned is layer.bias and torch.equal(returned, bias) and torch.equal(y, fast.linear(x, fast.quantize(w, "int4_g32_bf16")))


STORED = ["int4_g32_bf16", "uint4z_g32_bf16", "uint4_g32_bf16_zbf16", "int8_bf16", "nvfp4", "mxfp4", "fp8_e4m3_b32x32", "int8_tensor"]


def stored(name, seed, n=64, k=128):
    """A weight as a checkpoint has it: QTensor, tensors, quantization_config."""
    q = ref.quantize(normal(n, k, seed=seed).float(), name)
    return q, humming.write(q), humming.config_of(q)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", STORED)
def test_checkpoints(online, name, rank):
    parts = [stored(name, seed) for seed in range(2)]
    config = Config.from_config(parts[0][2])
    merged = ColumnParallelLinear(config, "layers.0.gate_up_proj", [64, 64], 128, bias=False, rank=rank, ranks=2)
    for shard, (_, tensors, _) in enumerate(parts):
        give(merged, tensors, shard)
    x = normal(3, 128, seed=5)
    assert torch.equal(finish(merged)(x)[0], fast.linear(x, ref.fuse([rows(q, rank, 2) for q, _, _ in parts])))
    row = RowParallelLinear(config, "layers.0.down_proj", 64, 128, bias=False, rank=rank, ranks=2)
    give(row, parts[0][1])
    own = x[:, 64 * rank : 64 * (rank + 1)].contiguous()
    assert torch.equal(finish(row)(own)[0], fast.linear(own, ref.take_columns(parts[0][0], 64 * rank, 64 * (rank + 1))))


def test_activations_as_checkpoint_and_environment_say(online):
    q, tensors, config = stored("int8_bf16", 0)
    x = normal(3, 128, seed=5)
    for extra, environs, x_format in (
        ({"a_dtype": "int8"}, None, "int8_token"),
        ({"a_dtype": "int8"}, {"dtype": "bfloat16"}, None),
        ({}, {"dtype": "float8e4m3"}, "fp8_e4m3_token"),
    ):
        online(None, environs)
        layer = ColumnParallelLinear(Config.from_config(config | extra), "layers.0.up", [64], 128, bias=False)
        give(layer, tensors, 0)
        assert torch.equal(finish(layer)(x)[0], fast.linear(x, q, x_format=x_format))


def test_requantized(online):
    online(INT4 | {"force_requant": True})
    q, tensors, config = stored("int8_bf16", 0)
    layer = ColumnParallelLinear(Config.from_config(config), "layers.0.up", [64], 128, bias=False)
    give(layer, tensors, 0)
    x = normal(3, 128, seed=5)
    new = fast.quantize(fast.dequantize(q, torch.float32), "int4_g32_bf16")
    assert torch.equal(finish(layer)(x)[0], fast.linear(x, new))


def test_unquantized_weights_in_a_quantized_checkpoint(online):
    _, tensors, config = stored("int4_g32_bf16", 0)
    config = Config.from_config(config)
    layer = ColumnParallelLinear(config, "layers.0.gate_up_proj", [64, 64], 128, rank=1, ranks=2)
    before = layer.weight
    gate, up = normal(64, 128), normal(64, 128, seed=1)
    with pytest.warns(UserWarning, match=r"^quantref: layers.0.gate_up_proj has unquantized weights"):
        before.weight_loader(before, gate, 0)
    before.weight_loader(before, up, 1)  # vLLM's models keep the parameters that they saw first
    assert type(layer.quant_method) is UnquantizedLinearMethod and [n for n, _ in layer.named_parameters()] == ["bias", "weight"]
    x = normal(3, 128, seed=5)
    w = torch.cat([gate[32:], up[32:]])
    assert torch.equal(finish(layer)(x)[0], torch.nn.functional.linear(x, w, layer.bias))
    mixed = ColumnParallelLinear(config, "layers.0.gate_up_proj", [64, 64], 128)
    give(mixed, tensors, 0)
    with pytest.raises(ValueError, match=r"layers.0.gate_up_proj: some of its shards are quantized and some are not"):
        give(mixed, {"weight": up}, 1)
    for part in ("weight", "weight_scale"):  # the other way around
        mixed = ColumnParallelLinear(config, "layers.0.gate_up_proj", [64, 64], 128)
        parameter = getattr(mixed, part)
        with pytest.warns(UserWarning, match="has unquantized weights"):
            give(mixed, {"weight": up}, 1)
        with pytest.raises(ValueError, match=r"layers.0.gate_up_proj: some of its shards are quantized and some are not"):
            parameter.weight_loader(parameter, tensors[part], 0)


def test_what_was_read_is_let_go_of(online):
    online(INT4)
    layer = ColumnParallelLinear(Config(), "layers.0.gate_up_proj", [48, 48], 64, bias=False)
    seen = []
    for shard in (0, 1):
        w = normal(48, 64)
        seen.append(weakref.ref(w))
        give(layer, {"weight": w}, shard)
        del w
        seen.append(weakref.ref(layer.quant_method.shards[shard].packed))
    gc.collect()
    assert [one() is None for one in seen] == [True, False, True, False]
    finish(layer)
    assert not layer.quant_method.shards and layer.weight.numel() == 0 and layer.weight.dtype == DTYPE
    assert finish(layer) is layer  # a second time is none
    with pytest.raises(NotImplementedError, match=r"layers.0.gate_up_proj: weights cannot be loaded again"):
        give(layer, {"weight": normal(48, 64)}, 0)


def test_vllm_lets_go_of_layers(online):
    """vLLM's records keep the parameters' attributes, less what is bound to the layer as a method."""
    online(INT4)
    layer = ColumnParallelLinear(Config(), "layers.0.up", [48], 64, bias=False)
    loader = layer.weight.weight_loader
    assert loader.__self__ is layer and loader.supports_moe_loading
    kept, gone = loader.__func__, weakref.ref(layer)
    del layer, loader
    gc.collect()
    assert callable(kept) and gone() is None


def test_compiled(online):
    online(INT4, {"dtype": "int8"})
    layer = ColumnParallelLinear(Config(), "layers.0.up", [48], 64)
    give(layer, {"weight": normal(48, 64), "bias": normal(48)}, 0)
    finish(layer)
    x = normal(3, 64, seed=1)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x)[0], layer(x)[0])
    torch._dynamo.reset()


def merged(online, **options):
    online(INT4)
    return ColumnParallelLinear(Config(), "layers.0.gate_up_proj", [48, 48], 64, bias=False, **options)


@pytest.mark.parametrize(
    "tensor, message",
    [
        (
            torch.zeros(48, 60),
            r"^quantref: layers.0.gate_up_proj, shard 1: a weight of shape \(48, 60\) does not fit .* n=\[24, 24\], k=64",
        ),
        (torch.zeros(40, 64), r"^quantref: layers.0.gate_up_proj, shard 1: a weight of shape \(40, 64\)"),
        (torch.full((48, 64), torch.nan), "^quantref: layers.0.gate_up_proj, shard 1: .*nan"),
        (torch.zeros(48, 64, dtype=torch.int32), "^quantref: layers.0.gate_up_proj, shard 1: .*int32"),
    ],
    ids=["k", "n", "nan", "dtype"],
)
def test_weights_that_cannot_be(online, tensor, message):
    with pytest.raises(ValueError, match=message):
        give(merged(online, rank=1, ranks=2), {"weight": tensor}, 1)


def test_activations_that_a_device_does_not_multiply(online, monkeypatch):
    """They are replaced where that is allowed; the message names the layer where it is not."""
    monkeypatch.setattr("fast.vllm.config.on_device", partial(pretend, capability=80))
    online(INT4, {"dtype": "float8e4m3", "allow_fallback": True})
    layer = ColumnParallelLinear(Config(), "layers.0.up", [48], 64, bias=False)
    w, x = normal(48, 64), normal(3, 64, seed=1)
    give(layer, {"weight": w})
    y = fast.linear(x, fast.quantize(w, "int4_g32_bf16"), x_format="int8_token")
    assert torch.equal(finish(layer)(x)[0], y)
    online(INT4, {"dtype": "float8e4m3"})
    with pytest.raises(ValueError, match=r"^quantref: layers.0.up: activations in fp8 do not go with weights .* int8 or none would work"):
        ColumnParallelLinear(Config(), "layers.0.up", [48], 64)


def pretend(config, device, x_dtype, weight, capability):
    """on_device of a GPU of this compute capability."""
    x_format, static = fallback.choose(config.x_format, config.static, weight, capability, x_dtype, config.allow_fallback)
    return replace(config, x_format=x_format, static=static)


def test_wrong_columns_of_a_row_parallel_layer(online):
    online(INT4)
    layer = RowParallelLinear(Config(), "layers.0.o_proj", 24, 128, rank=0, ranks=2)
    with pytest.raises(ValueError, match=r"o_proj: a weight of shape \(24, 256\) does not fit the layer, which has n=\[24\], k=64"):
        give(layer, {"weight": torch.zeros(24, 256)})


def test_missing_shards(online):
    layer = merged(online)
    give(layer, {"weight": normal(48, 64)}, 0)
    with pytest.raises(ValueError, match=r"^quantref: layers.0.gate_up_proj: of 2 shards the checkpoint lacks 1$"):
        finish(layer)
    _, tensors, config = stored("uint4z_g32_bf16", 0)
    layer = ColumnParallelLinear(Config.from_config(config), "layers.0.up", [64], 128, bias=False)
    give(layer, {name: tensor for name, tensor in tensors.items() if name != "zero_point"}, 0)
    with pytest.raises(
        ValueError, match=r"layers.0.up: of 1 shards the checkpoint lacks 0; for \(0,\) there is only weight, weight_scale$"
    ):
        finish(layer)
    assert type(layer.quant_method) is KINDS.linear_method
