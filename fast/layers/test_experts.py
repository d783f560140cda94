"""The module of experts: what fused_experts computes, in every shape; created empty, moved, cast, prepared, compiled; refusals."""

import copy

import pytest
import torch

import fast
import ref
from conformance.weights import draw_weight
from ref.moe.check import ACTIVATIONS

from . import environment
from .experts import FusedExperts

PARAMETERS = {"swigluoai_uninterleave": {"limit": 7.0}, "situ": {"beta": 2.0}, "silu": {"limit": 4.0}}


def case(name, activation="silu", e=3, hidden=40, inner=24, m=5):
    """w13, w2, biases of both, and x, topk_weights, topk_ids; with name None, plain weights."""
    rows = inner * (1 + ACTIVATIONS[activation].gated)
    shapes = (e, rows, hidden), (e, hidden, inner)
    ws = [torch.randn(s) for s in shapes] if name is None else [draw_weight(i, name, s) for i, s in enumerate(shapes)]
    biases = {"bias13": torch.randn(e, rows), "bias2": torch.randn(e, hidden)}
    return *ws, biases, (torch.randn(m, hidden), torch.rand(m, 2), torch.randint(-1, e, (m, 2)))


@pytest.mark.parametrize("name", [None, *ref.FORMATS, "int5_g32", "int3_b7x24", "fp8_e4m3_tensor"])
def test_odd_shapes(name):
    for hidden, inner in ((40, 24), (72, 100), (104, 7)):
        w13, w2, biases, args = case(name, hidden=hidden, inner=inner)
        layer = FusedExperts(w13, w2, **biases)
        y = fast.fused_experts(args[0], w13, w2, *args[1:], **biases)
        assert torch.equal(layer(*args), y)
        assert (layer.experts, layer.hidden, layer.intermediate) == (3, hidden, inner)
        assert torch.equal(layer.prepare(torch.float32)(*args), y)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_maps(activation):
    w13, w2, biases, args = case("int4_g32", activation)
    options = {"activation": activation, "x_format": "int8_token", **PARAMETERS.get(activation, {})}
    here = torch.tensor([2, -1, 0, 1, -1])
    y = fast.fused_experts(args[0], w13, w2, *args[1:], **biases, **options, expert_map=here)
    assert torch.equal(FusedExperts(w13, w2, **biases, **options)(*args, expert_map=here), y)


def test_gemm_type_is_the_environments(monkeypatch):
    monkeypatch.setattr(environment, "gemm_type", lambda: "grouped_contiguous")
    w13, w2, _, args = case("int4_g32")
    layer = FusedExperts(w13, w2)
    assert layer.gemm_type == "grouped_contiguous"
    assert torch.equal(layer(*args), fast.fused_experts(args[0], w13, w2, *args[1:], gemm_type="grouped_contiguous"))


@pytest.mark.parametrize("name", ["nvfp4", "uint4z_g128", "fp8_e4m3_b128x128", None])
def test_created_empty_and_filled_by_a_state(name):
    w13, w2, biases, args = case(name)
    filled = FusedExperts(w13, w2, **biases, x_format="int8_token" if name else None)
    layer = FusedExperts.empty(3, 40, 24, name, bias=True, dtype=torch.float32, x_format="int8_token" if name else None)
    assert all(t.is_meta for t in layer.buffers()) and repr(layer) == repr(filled)
    layer.to_empty(device="cpu").load_state_dict(filled.state_dict())
    assert torch.equal(layer(*args), filled(*args))
    assert FusedExperts.empty(3, 40, 24, name, activation="relu2_no_mul").w13.shape == (3, 24, 40)


def test_moves_casts_and_copies():
    w13, w2, biases, args = case("int4_g32")
    layer = FusedExperts(w13, w2, **biases)
    y = layer(*args)
    assert torch.equal(copy.deepcopy(layer)(*args), y) and not list(layer.parameters())
    layer.bfloat16()
    assert layer.w13.scale.dtype == torch.float32 and layer.w2.packed.dtype == torch.int32 and layer.bias13.dtype == torch.bfloat16
    assert FusedExperts(*case(None)[:2]).bfloat16().w13.weight.dtype == torch.bfloat16
    layer.float()
    assert layer.prepare(torch.float32) is layer and layer.to("cpu") is layer
    copied = copy.deepcopy(layer)
    assert copied.w13.weight.number != layer.w13.weight.number and torch.equal(copied(*args), layer(*args))
    # A bias that was written to may be another than the kernels have, also in a copy.
    layer.bias13 += 1
    for written in (layer, copy.deepcopy(layer)):
        with pytest.raises(NotImplementedError, match=r"was prepared for other calls than .* with this bias"):
            written(*args)
    with pytest.raises(RuntimeError, match="Weight: it was prepared for cpu, and cannot go to meta"):
        layer.to("meta")
    with pytest.raises(RuntimeError, match=r"^w13: the weight was prepared, and has no state any more"):
        layer.state_dict()


def test_compiled():
    w13, w2, biases, args = case("int4_g32")
    layer = FusedExperts(w13, w2, **biases)
    y = layer(*args)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(*args), y)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda a, b: FusedExperts(a, "b"), TypeError, "w2 is str, expected a QTensor or a tensor"),
        (lambda a, b: FusedExperts(a[0], b), ValueError, r"w13 has shape \(6, 4\), expected \(experts, n, k\)"),
        (lambda a, b: FusedExperts(a, b[:1]), ValueError, r"w13 has 2 experts, w2 has 1 \(both must match\)"),
        (lambda a, b: FusedExperts(a, b[..., :2]), ValueError, r"silu makes 3 columns of w13's n=6, w2 has k=2 \(both must match\)"),
        (lambda a, b: FusedExperts(a[:, :5], b), ValueError, "even number of columns"),
        (lambda a, b: FusedExperts(a, b, activation="silo"), ValueError, "unknown activation 'silo'"),
        (lambda a, b: FusedExperts(a, b, activation="situ"), ValueError, "situ needs beta"),
        (lambda a, b: FusedExperts(a, b, alpha=1.0), ValueError, "silu has no parameter alpha"),
        (lambda a, b: FusedExperts(a, b, bias13=torch.ones(2, 5)), ValueError, r"bias13 has shape \(2, 5\), expected \(2, 6\)"),
        (lambda a, b: FusedExperts(a, b, bias2=torch.ones(4)), ValueError, r"bias2 has shape \(4,\), expected \(2, 4\)"),
        (lambda a, b: FusedExperts(a, b, x_format="uint8"), ValueError, "FusedExperts: x cannot be quantized to uint8"),
        (lambda a, b: FusedExperts.empty(2, 4, 3, "int4", activation="silo"), ValueError, "unknown activation 'silo'"),
        (lambda a, b: FusedExperts.empty(2, 4, 3, "int44"), ValueError, "nearest is 'int4'"),
    ],
    ids=range(13),
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make(torch.ones(2, 6, 4), torch.ones(2, 4, 3))
