"""Linear layers: created empty, filled by a state, of shapes that fill neither words nor groups; refusals."""

import pytest
import torch
from torch import nn

import fast
import ref
from conformance.weights import draw_weight

from .linear import Linear
from .weight import Weight, empty

FORMATS = (*ref.FORMATS, "int5_g32", "int7_b3x24", "uint6z_g100", "fp8_e4m3_tensor", "int4_g32_channel2div", "int4_g24_h4")
# Neither rows nor columns are multiples of a word, a group, or a kernel's tile.
SHAPES = ((100, 72), (7, 40), (1, 8), (3, 104))


@pytest.mark.parametrize("name", FORMATS)
def test_empty_has_the_shapes_of_what_fills_it(name):
    for shape in SHAPES:
        q = draw_weight(1, name, shape)
        filled = Linear(q, torch.zeros(shape[0], dtype=torch.bfloat16))
        layer = Linear.empty(*shape, name, bias=True)
        assert layer.format == q.format and all(t.is_meta for t in layer.buffers())
        described = ({key: (t.shape, t.dtype) for key, t in of.state_dict().items()} for of in (layer, filled))
        assert next(described) == next(described)
        layer.to_empty(device="cpu").load_state_dict(filled.state_dict())
        assert ref.equal(layer.weight, q)
        assert repr(layer) == repr(filled)


@pytest.mark.parametrize("name", FORMATS)
def test_odd_shapes_give_what_ref_gives(name):
    """Sums of these codes and these x are exact, so that no order of them has a say."""
    for shape in SHAPES:
        q = draw_weight(2, name, shape, data="exact", order=shape[0] == 7)
        x, bias = torch.randint(-3, 4, (2, 3, shape[1])).float(), torch.randint(-9, 9, shape[:1]).float()
        layer = Linear(q, bias)
        assert torch.equal(layer(x), ref.linear(x, q, bias))
        assert torch.equal(layer.prepare(torch.float32)(x), ref.linear(x, q, bias))


def test_what_empty_may_have():
    layer = Linear.empty(8, 64, "int8", bias=True, x_format="int8_tensor", static=True, dtype=torch.float16, device="cpu")
    assert layer.bias.dtype == torch.float16 and layer.x_scale.shape == (1,) and layer.x_scale.dtype == torch.float32
    layer.bfloat16()
    assert layer.bias.dtype == torch.bfloat16 and layer.x_scale.dtype == torch.float32
    assert Linear.empty(8, 64, "int8").bias is None and Linear.empty(8, 64, "int8").x_scale is None
    assert empty(None, (2, 3), torch.float16).dtype == torch.float16


def test_a_layer_in_a_model_created_on_meta():
    q = fast.quantize(torch.randn(16, 64), "int4_g32")
    model = nn.Sequential(Linear.empty(16, 64, "int4_g32"), nn.ReLU())
    state = {f"0.{key}": value for key, value in Linear(q).state_dict().items()}
    model.load_state_dict(state, assign=True)
    x = torch.randn(3, 64)
    assert torch.equal(model(x), ref.linear(x, q).relu())


def test_states_of_other_dtypes_are_refused():
    """torch would convert the numbers of what are codes here, and round scales."""
    q = fast.quantize(torch.randn(16, 64), "mxfp4")
    layer = Linear.empty(16, 64, "mxfp4", device="cpu")
    with pytest.raises(RuntimeError, match=r"dtype mismatch for scale: the state has torch.float8_e8m0fnu, mxfp4 has torch.uint8"):
        layer.load_state_dict({"packed": q.packed, "scale": q.scale.view(torch.float8_e8m0fnu)})


def test_a_static_scale_of_any_shape_has_one_state():
    q, scale = fast.quantize(torch.randn(16, 64), "int8"), torch.tensor(0.1, requires_grad=True)
    layer = Linear.empty(16, 64, "int8", x_format="int8_tensor", static=True, device="cpu")
    layer.load_state_dict(Linear(q, x_format="int8_tensor", x_scale=scale).state_dict())
    assert torch.equal(layer.x_scale, torch.tensor([0.1])) and not layer.x_scale.requires_grad


def test_another_weight_in_the_same_place():
    layer = Weight(fast.quantize(torch.randn(4, 64), "uint4z_g128"))
    first = layer.weight
    assert set(layer.state_dict()) == {"packed", "scale", "zero"} and layer.weight is first
    layer.put(torch.ones(2, 3))
    assert set(layer.state_dict()) == {"plain"} and torch.equal(layer.weight, torch.ones(2, 3)) and layer.format is None
    assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: Linear(torch.ones(4, 8)), TypeError, "weight is Tensor, expected a QTensor; torch.nn.Linear takes a plain tensor"),
        (lambda: Linear(draw_weight(0, "int4", (2, 4, 8))), ValueError, r"int4 has shape \(2, 4, 8\), expected \(n, k\)"),
        (lambda: Linear(draw_weight(0, "int4", (4, 8)), x_scale=torch.ones(1)), ValueError, "x_scale without x_format"),
        (lambda: Linear(draw_weight(0, "int4", (4, 8)), x_format="int8_g4", x_scale=torch.ones(1)), ValueError, "are dynamic"),
        (lambda: Linear(draw_weight(0, "int4", (4, 8)), x_format="uint8"), ValueError, "x cannot be quantized to uint8"),
        (lambda: Linear.empty(4, 8, "int4_g32x"), ValueError, "nearest is 'int4_g32'"),
        (lambda: Linear.empty(4, 8, "int4_h16"), ValueError, "k=8 is no multiple of the rotation's block 16"),
        (lambda: Linear.empty(4, -8, "int4"), ValueError, r"shape \(4, -8\), expected no negative size"),
        (lambda: Linear.empty(4, 8, "int4", static=True), ValueError, "x_scale without x_format"),
    ],
    ids=range(9),
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()
