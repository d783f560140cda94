"""Weights that are prepared: once, for a kind of call, and for as long as they live."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

import fast
import fast.eager
import ref

from .test_linear import REFUSED, Q, normal, same, weight


def test_prepare():
    q, x = weight("int4_g16", 5, 40), normal(3, 40, dtype=torch.bfloat16)
    y = ref.linear(x, q)
    p = fast.prepare(q)
    assert (p.format, p.shape, p.n, p.k, p.device) == (q.format, (5, 40), 5, 40, x.device)
    alive = weakref.ref(q.packed)
    del q
    gc.collect()
    assert p.q is None and all(same(fast.linear(x[:m], p), y[:m]) for m in (0, 1, 2, 3)) and same(fast.linear(x[0], p), y[0])
    out = torch.empty_like(y)
    assert same(fast.linear(x, p, out=out), y) and same(out, y)
    with pytest.raises(NotImplementedError, match="prepared for other calls"):
        fast.linear(x.half(), p)
    with pytest.raises(NotImplementedError, match="prepared for other calls"):
        fast.linear(x, p, torch.ones(5))
    with pytest.raises(ValueError, match="x has k=39, weight int4_g16 has k=40"):
        fast.linear(x[:, :39], p)
    del p
    gc.collect()
    assert alive() is None


def test_prepare_for_a_kind_of_call():
    q, x, bias = weight("int4_g16", 5, 40), normal(3, 40), normal(5)
    p = fast.prepare(
        q, x_dtype=torch.float32, x_format="int8_tensor", static_scale=True, bias=True, impl="torch", deterministic=False, m=[3, 100]
    )
    scale = torch.tensor(0.02)
    y = fast.linear(x, p, bias, x_format="int8_tensor", x_scale=scale, impl="torch", deterministic=False)
    assert same(y, fast.linear(x, q, bias, x_format="int8_tensor", x_scale=scale))
    with pytest.raises(NotImplementedError, match="prepared for other calls"):  # another number of rows
        fast.linear(x[:1], p, bias, x_format="int8_tensor", x_scale=scale, impl="torch", deterministic=False)


def about_the_weight(x, w, bias=None, **kwargs):
    """Nothing is wrong with x, bias or x_scale, which prepare does not see."""
    if not isinstance(w, ref.QTensor) or not isinstance(x, torch.Tensor) or bias is not None or "x_scale" in kwargs:
        return False
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.dim() == 2 and x.shape[1] == w.shape[-1]


@pytest.mark.parametrize(
    "w, kwargs, error, message",
    [
        (normal(5, 40), {}, TypeError, "prepare: w is Tensor, expected a QTensor"),
        ("int4", {}, TypeError, "prepare: w is str, expected a QTensor"),
        (ref.quantize(normal(2, 5, 40), "int4"), {}, ValueError, r"prepare: weight int4 has shape \(2, 5, 40\)"),
        (Q, {"impl": "cuda"}, ValueError, "unknown impl 'cuda'"),
        (Q, {"x_format": "int9"}, ValueError, "unknown name 'int9'"),
        (
            Q,
            {"x_format": "uint8z"},
            ValueError,
            "x cannot be quantized to uint8z: expected signed integers of 2 bits or more, or signed floats",
        ),
        (Q, {"x_format": "fp4_e2m1_g16_e4m3_tensor2"}, ValueError, "x_scale"),
        (Q, {"x_format": "int8_token", "static_scale": True}, ValueError, "dynamic"),
        (
            Q,
            {"x_dtype": torch.float64},
            TypeError,
            "prepare: x_dtype is torch.float64, expected torch.float16, torch.bfloat16 or torch.float32",
        ),
        *((Q, {"m": m}, ValueError, r"prepare: m is .*, expected one or several numbers of rows") for m in (2.0, [], [1, -1], "16")),
        (replace(Q, packed=Q.packed[:3]), {}, ValueError, r"packed of int4_g16 has shape \(3, 5\), expected \(5, 5\)"),
    ],
    ids=range(14),
)
def test_prepare_refuses(w, kwargs, error, message):
    with pytest.raises(error, match=message):
        fast.prepare(w, **kwargs)


@pytest.mark.parametrize("case", [i for i, (args, kwargs, _, _) in enumerate(REFUSED) if about_the_weight(*args, **kwargs)])
def test_prepare_refuses_what_linear_refuses(case):
    (_, w), kwargs, error, message = REFUSED[case]
    with pytest.raises(error, match=message.removeprefix("linear: ")):
        fast.prepare(w, x_dtype=torch.float32, **kwargs)


def test_the_same_bits_on_every_run():
    q, x = weight("nvfp4", 64, 512), normal(33, 512, dtype=torch.bfloat16)
    first = fast.linear(x, q)
    assert all(torch.equal(fast.linear(x, q), first) for _ in range(5))
    assert torch.equal(fast.linear(x, weight("nvfp4", 64, 512)), first) and torch.equal(fast.linear(x, fast.prepare(q)), first)


def test_a_weight_is_prepared_once_and_forgotten_with_it(monkeypatch):
    made = []
    prepare = fast.eager.prepare
    monkeypatch.setattr(fast.eager, "prepare", lambda q, request: made.append(request) or prepare(q, request))
    q, x = weight("int4_g16", 5, 40), normal(3, 40)
    for _ in range(3):
        fast.linear(x, q)
        fast.linear(x[:1], q)
    assert len(made) == 1
    alive = weakref.ref(q), weakref.ref(q.packed), weakref.ref(q.scale)
    del q
    gc.collect()
    assert [a() for a in alive] == [None] * 3
