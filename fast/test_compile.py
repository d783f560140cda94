"""fast.linear under torch.compile, and the operator behind it."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing

import fast
import fast.ops
import ref
from ref.qtensor import TENSORS

from .test_linear import normal, same, weight


@pytest.fixture
def compiled():
    """fast.linear, compiled afresh, and doubled."""
    torch._dynamo.reset()
    with torch.no_grad():
        yield torch.compile(lambda x, w, bias, **kwargs: fast.linear(x, w, bias, **kwargs) * 2, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["int4_g16", "nvfp4", "uint4_g16_zfp16", "uint4_g16_obf16", "fp8_channel2div", "fp4_e0m3_g16_h8"])
def test_compiled(name, compiled):
    q, bias = weight(name, 5, 40), normal(5)
    for shape in ((3, 40), (2, 3, 40), (40,)):
        x = normal(*shape, dtype=torch.bfloat16)
        assert same(compiled(x, q, bias), fast.linear(x, q, bias) * 2)
    assert same(compiled(x, q, None, x_format="int8_token", impl="torch"), fast.linear(x, q, x_format="int8_token") * 2)


def test_compiled_with_every_kind_of_weight(compiled):
    x = normal(3, 40)
    w = normal(5, 40)
    assert same(compiled(x, w, None), torch.nn.functional.linear(x, w) * 2)
    with pytest.raises(Exception, match="w is a plain tensor"):
        compiled(x, w, None, x_format="int8_token")


def test_compiled_with_a_prepared_weight(compiled):
    q, bias = weight("int4_g16", 5, 40), normal(5)
    plain, with_bias = fast.prepare(q), fast.prepare(q, x_format="int8_token", bias=True)
    for shape in ((3, 40), (2, 3, 40), (40,)):
        x = normal(*shape, dtype=torch.bfloat16)
        assert same(compiled(x, plain, None), fast.linear(x, plain) * 2)
        y = fast.linear(x, with_bias, bias, x_format="int8_token")
        assert same(compiled(x, with_bias, bias, x_format="int8_token"), y * 2)
    other = fast.prepare(replace(q, scale=q.scale * 3))
    assert same(compiled(x, other, None), fast.linear(x, other) * 2)


def test_compiled_weights_are_forgotten(compiled):
    """With their last reference, as eager ones are; the compiled code that has seen them lives on."""
    q, x = weight("int4_g16", 5, 40), normal(3, 40)
    p = fast.prepare(q, x_dtype=torch.float32)
    compiled(x, q, None), compiled(x, p, None)
    alive = [weakref.ref(thing) for thing in (q, q.packed, q.scale, p)]
    del q, p
    gc.collect()
    assert [a() for a in alive] == [None] * 4
    q = weight("int4_g16", 5, 40)
    assert same(compiled(x, q, None), fast.linear(x, q) * 2)


def test_compiled_tells_apart_weights_that_share_their_codes(compiled):
    """The same packed codes and scales, read as another format."""
    x, q = normal(3, 40), weight("int4", 5, 40)
    other = ref.validate(replace(q, format=ref.parse_format("fp4_e2m1")))
    assert other.packed is q.packed and other.scale is q.scale and not same(fast.linear(x, other), fast.linear(x, q))
    for w in (q, other, q, replace(q, scale=q.scale * 3), other):
        assert same(compiled(x, w, None), fast.linear(x, w) * 2)


@pytest.mark.parametrize("name", ["int4_g128", "int4_g16"])
def test_compiled_once_for_all_weights_of_a_format(name):
    """Weights are inputs of the graph: another of the same format and shape compiles nothing, whether or not FORMATS lists the format."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda x, w: fast.linear(x, w), fullgraph=True, backend=counter)
    x = normal(3, 40)
    with torch.no_grad():
        for seed in range(3):
            q = ref.quantize(normal(5, 40, seed=seed), name)
            assert same(compiled(x, q), ref.linear(x, q))
    torch._dynamo.reset()
    assert counter.frame_count == 1


def test_compiled_codebook_of_ones_own(compiled):
    """A codebook is its values, not its name."""
    q = weight("nf4_g8", 5, 40)
    book = ref.Codebook("nf4", tuple(float(v) for v in range(16)))
    other = replace(q, format=replace(q.format, element=book), packed=q.packed.clone())
    x = normal(3, 40)
    assert same(fast.linear(x, other), ref.linear(x, other))
    assert same(compiled(x, other, None), ref.linear(x, other) * 2)


def test_compiled_refuses_shapes_that_do_not_fit(compiled):
    with pytest.raises(Exception, match="x has k=39"):
        compiled(normal(3, 39), weight("int4_g16", 5, 40), None)


def test_compiled_refuses_an_out_that_does_not_fit(compiled):
    with pytest.raises(Exception, match="out is"):
        compiled(normal(1, 40), weight("int4_g16", 5, 40), None, out=torch.empty(3, 5))


def test_compiled_refuses_what_x_cannot_be(compiled):
    with pytest.raises(Exception, match="linear: x cannot be quantized to nf4"):
        compiled(normal(3, 40), weight("int4_g16", 5, 40), None, x_format="nf4_token")


@pytest.mark.filterwarnings("ignore:Error detected in Generated:UserWarning")
def test_gradients_are_refused_in_the_backward_pass():
    """The operators by themselves, and compiled without a joint graph: x may require a gradient as long as nobody asks for it."""
    torch._dynamo.reset()
    q, x = weight("int4_g16", 5, 40), normal(3, 40).requires_grad_()
    p = fast.prepare(q, x_dtype=torch.float32)
    compiled = torch.compile(lambda x, w: fast.linear(x, w), fullgraph=True, backend="eager")
    for w in (q, p):
        y = compiled(x, w)
        assert same(y.detach(), ref.linear(x.detach(), q))
        with pytest.raises(NotImplementedError, match="linear: x requires a gradient"):
            y.sum().backward()
    y = torch.ops.quantref.linear(x, q.packed, q.scale, None, None, None, None, None, "int4_g16", 5, 40, None, None, None, True)
    with pytest.raises(NotImplementedError, match="linear: x requires a gradient"):
        y.sum().backward()
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:Error detected in Generated:UserWarning")
def test_compiled_refuses_gradients(compiled):
    with pytest.raises(Exception, match="requires a gradient"), torch.enable_grad():
        compiled(normal(3, 40).requires_grad_(), weight("int4_g16", 5, 40), None)


@pytest.mark.parametrize("name, x_format", [("int4_g16", None), ("nvfp4", "int8_token"), ("uint4z_g16", None), ("uint4_g16_obf16", None)])
def test_opcheck(name, x_format):
    q, x = weight(name, 5, 48), normal(2, 3, 48, dtype=torch.bfloat16)
    args = (x, *(getattr(q, part) for part in TENSORS), normal(5), name, 5, 48, x_format, None, None, True)
    assert set(torch.library.opcheck(torch.ops.quantref.linear.default, args).values()) == {"SUCCESS"}
    assert same(torch.ops.quantref.linear(*args), fast.linear(x, q, normal(5), x_format=x_format))


def test_the_operator_keeps_nothing_alive():
    q, x = weight("int4_g16", 5, 40), normal(3, 40)
    torch.ops.quantref.linear(x, q.packed, q.scale, None, None, None, None, None, "int4_g16", 5, 40, None, None, None, True)
    alive = weakref.ref(q.packed), weakref.ref(q.scale)
    del q
    gc.collect()
    assert [a() for a in alive] == [None] * 2
