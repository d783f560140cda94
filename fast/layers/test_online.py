"""Quantized layers in models: results, memory, moves, casts, state, refusals."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import fast
import ref

from .experts import FusedExperts
from .linear import Linear
from .online import CONVERTERS, quantize_

INT4 = {"dtype": "int4", "group_size": 32}


class Block(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.up, self.down = nn.Linear(64, 96, dtype=dtype), nn.Linear(96, 64, bias=False, dtype=dtype)
        self.lm_head = nn.Linear(64, 10, dtype=dtype)

    def forward(self, x):
        return self.lm_head(self.down(self.up(x).relu()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_computes_what_ref_says(dtype):
    model = Block(dtype)
    plain = copy.deepcopy(model)
    assert quantize_(model, INT4 | {"dynamic": {"+:down": {"dtype": "float8e4m3", "group_size": 0}}}) is model
    name = {torch.float32: "", torch.bfloat16: "_bf16", torch.float16: "_fp16"}[dtype]
    assert str(model.up.format) == f"int4_g32{name}" and str(model.down.format) == f"fp8_e4m3{name}".replace(
        "fp8_e4m3", "fp8" if not name else "fp8_e4m3"
    )
    assert type(model.lm_head) is nn.Linear
    x = torch.randn(5, 64, dtype=dtype)
    hidden = ref.linear(x, fast.quantize(plain.up.weight, model.up.format), plain.up.bias).relu()
    y = plain.lm_head(ref.linear(hidden, fast.quantize(plain.down.weight, model.down.format)))
    assert torch.equal(model(x), y)


def test_quantized_activations():
    model = quantize_(nn.Sequential(nn.Linear(64, 48)), {"dtype": "int8"}, {"dtype": "int8"})
    x = torch.randn(3, 64)
    assert str(model[0].x_format) == "int8"
    assert torch.equal(model(x), fast.linear(x, model[0].weight, model[0].bias, x_format="int8_token"))


def test_each_layer_is_freed_before_the_next():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    seen, weights = [], [weakref.ref(layer.weight) for layer in model]
    real = fast.quantize

    def watched(w, fmt):
        gc.collect()
        seen.append(sum(weight() is not None for weight in weights))
        return real(w, fmt)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fast.layers.online.quantize", watched)
        quantize_(model, INT4)
    assert seen == [3, 2, 1] and not any(weight() is not None for weight in weights)


class Experts(nn.Module):
    """A layer that quantize_ does not know by itself, with an nn.Linear inside that it must not find."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(2, 24, 32)), nn.Parameter(torch.randn(2, 32, 12))
        self.norm = nn.Linear(32, 32)


def converted(module, chosen):
    return FusedExperts(fast.quantize(module.first, chosen.weight), fast.quantize(module.second, chosen.weight), x_format=chosen.x_format)


@pytest.fixture
def experts_are_known(monkeypatch):
    monkeypatch.setattr("fast.layers.online.CONVERTERS", [*CONVERTERS, (lambda module: type(module) is Experts, converted)])


def test_other_modules(experts_are_known):
    model = nn.ModuleDict({"mlp": nn.ModuleList([nn.Linear(32, 8), Experts()])})
    plain = copy.deepcopy(model)
    quantize_(model, {"dtype": "int4", "group_size": 32, "dynamic": {"+:mlp.1": {"dtype": "int8"}}}, {"dtype": "int8"})
    experts = model["mlp"][1]
    assert type(model["mlp"][0]) is Linear and type(experts) is FusedExperts and str(experts.x_format) == "int8"
    assert ref.equal(experts.w13.weight, fast.quantize(plain["mlp"][1].first, "int8_g32"))
    quantize_(plain, INT4 | {"ignore": ["mlp.1"]})
    assert type(plain["mlp"][1]) is Experts and type(plain["mlp"][1].norm) is nn.Linear
    plain["mlp"][1].second.data[0, 1, 2] = torch.inf
    with pytest.raises(ValueError, match=r"^quantize_: mlp\.1: quantize: .*inf"):
        quantize_(plain, INT4)
    with pytest.raises(ValueError, match="the model is itself a Experts"):
        quantize_(Experts(), INT4)


def test_a_converter_that_refuses_is_named(monkeypatch):
    def refuse(module, chosen):
        raise NotImplementedError("no such gate")

    monkeypatch.setattr("fast.layers.online.CONVERTERS", [*CONVERTERS, (lambda module: type(module) is Experts, refuse)])
    with pytest.raises(NotImplementedError, match=r"^quantize_: experts: no such gate"):
        quantize_(nn.ModuleDict({"experts": Experts()}), INT4)


def test_a_layer_in_several_places_stays_one():
    layer = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Sequential(layer)})
    quantize_(model, INT4)
    assert type(model["a"]) is Linear and model["a"] is model["b"] is model["c"][0]


def test_a_weight_that_an_embedding_has_too_stays():
    model = nn.ModuleList([nn.Embedding(32, 64), nn.Linear(64, 32), nn.Linear(64, 32)])
    model[1].weight = model[0].weight
    quantize_(model, INT4)
    assert type(model[1]) is nn.Linear and model[1].weight is model[0].weight and type(model[2]) is Linear


def test_a_model_that_is_a_layer():
    with pytest.raises(ValueError, match=r"^quantize_: the model is itself a Linear, .*torch\.nn\.Sequential\(model\) is one"):
        quantize_(nn.Linear(32, 8), INT4)


def test_moves_casts_copies_and_states():
    layer = quantize_(nn.Sequential(nn.Linear(64, 16)), INT4)[0]
    x = torch.randn(2, 64)
    y = layer(x)
    assert layer.weight is layer.weight
    assert torch.equal(copy.deepcopy(layer)(x), y)
    layer.to(torch.bfloat16)
    assert layer.scale.dtype == torch.float32 and layer.packed.dtype == torch.int32 and layer.bias.dtype == torch.bfloat16
    layer.float()
    other = Linear(ref.quantize(torch.zeros(16, 64), layer.format), torch.zeros(16))
    assert not torch.equal(other(x), y)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert layer.to("meta").packed.is_meta


def test_prepared():
    layer = quantize_(nn.Sequential(nn.Linear(64, 16)), INT4)[0]
    x = torch.randn(2, 64)
    y, bare = layer(x), fast.linear(x, layer.weight)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    assert layer.prepare(torch.float32) is layer and layer.packed is None
    assert torch.equal(layer(x), y)
    for refused in (layer.state_dict, lambda: layer.load_state_dict(state, strict=False)):
        with pytest.raises(RuntimeError, match=r"^Linear: the weight was prepared, and has no state any more"):
            refused()
    layer.load_state_dict({"bias": torch.zeros(16)}, strict=False)
    assert torch.equal(layer(x), bare)


def test_prepared_layers_are_cast_but_not_moved():
    q = ref.quantize(torch.randn(16, 64), "int8")
    layer = Linear(q, torch.zeros(16), x_format="int8_tensor", x_scale=torch.tensor(0.1)).prepare(torch.bfloat16)
    assert layer.to("cpu") is layer and layer.bfloat16().bias.dtype == torch.bfloat16 and layer.x_scale.dtype == torch.float32
    x = torch.randn(2, 64).bfloat16()
    assert torch.equal(layer(x), fast.linear(x, q, layer.bias, x_format="int8_tensor", x_scale=torch.tensor([0.1])))
    with pytest.raises(RuntimeError, match=r"^Linear: it was prepared for cpu, and cannot go to meta; move a model before prepare"):
        layer.to("meta")


def test_a_copy_of_a_prepared_layer_is_compiled_by_itself():
    model = quantize_(nn.Sequential(nn.Linear(64, 16)), INT4)
    x = torch.randn(2, 64)
    y = model(x)
    model[0].prepare(torch.float32)
    copied = copy.deepcopy(model)
    assert copied[0].weight.number != model[0].weight.number
    del model
    gc.collect()
    assert torch.equal(torch.compile(copied, fullgraph=True, backend="eager")(x), y)


def test_an_encoder_layer_that_torch_would_fuse():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 96, batch_first=True), 2).eval()
    quantize_(model, INT4)
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        y, (first, second) = model(x), model.layers
        assert type(first.linear1) is type(first.linear2) is Linear and torch.equal(y, second(first(x)))


def test_static_scales_of_inputs():
    q = ref.quantize(torch.randn(8, 64), "int8")
    layer = Linear(q, x_format="int8_tensor", x_scale=torch.tensor([0.05]))
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), fast.linear(x, q, x_format="int8_tensor", x_scale=torch.tensor([0.05])))


@pytest.mark.parametrize(
    "config, x, message",
    [
        ({"dtype": "int4", "ignore": ["0"]}, None, "every layer of this model"),
        ({}, None, "every layer of this model"),
        (INT4, {"dtype": "int8", "quant_mode": "static_tensor"}, "^quantize_: 0: would need the scale"),
        ({"dtype": "int4", "hadamard_block_size": 128}, None, "^quantize_: 0: .*multiple of the rotation"),
        ({"dtyp": "int4"}, None, "nearest known one"),
    ],
    ids=str,
)
def test_refusals(config, x, message):
    with pytest.raises(ValueError, match=message):
        quantize_(nn.Sequential(nn.Linear(64, 16)), config, x)
    with pytest.raises(TypeError, match=r"^quantize_: model is str, expected a torch.nn.Module"):
        quantize_("0", INT4)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\)"):
        Linear(ref.quantize(torch.zeros(16, 64), "int4"), torch.zeros(3))


def test_weights_that_are_no_numbers_are_named():
    with pytest.raises(TypeError, match=r"^quantize_: 0: weights are torch.float64, expected float16, bfloat16 or float32"):
        quantize_(nn.Sequential(nn.Linear(64, 16)).double(), INT4)
    with pytest.raises(ValueError, match=r"^quantize_: 0: its weight is on the meta device"):
        quantize_(nn.Sequential(nn.Linear(64, 16, device="meta")), INT4)
    model = nn.Sequential(nn.Linear(64, 16))
    model[0].weight.data[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"^quantize_: 0: .*nan"):
        quantize_(model, INT4)
