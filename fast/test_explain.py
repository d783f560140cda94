"""fast.explain: what runs is what it says, and saying it runs nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fast
import fast.eager
import ref
from fast import choose, registry
from fast.explain import Candidate, _candidates
from fast.layers.experts import FusedExperts
from fast.request import Request

from .test_linear import normal

BF16 = torch.bfloat16


def weight(name="int4_g16", *shape):
    return ref.quantize(normal(*(shape or (5, 48)), seed=9), name)


def taken(*args, **kwargs):
    return [one.name for one in fast.explain(*args, **kwargs).candidates if one.chosen]


def experts(**options):
    return FusedExperts(weight("int4_g16", 3, 64, 48), weight("int4_g16", 3, 48, 32), **options)


def test_a_table():
    assert str(fast.explain(weight("int4_g16_bf16"), 65, x_format="int8_token", impl="humming")) == (
        "linear: int8 (bfloat16) x int4_g16_bf16 5x48 on cpu, m=65\n"
        "  humming      -  not taken: Humming runs on NVIDIA GPUs only\n"
        "  torch      100  not taken: 'humming' is asked for\n"
        "  triton       -  not taken: 'humming' is asked for\n"
        "  cublas       -  not taken: cuBLAS runs on NVIDIA GPUs only\n"
        "  nothing can run it"
    )
    q = weight()
    assert repr(fast.explain(q)) == str(fast.explain(q))
    assert fast.explain(q).candidates[0] == Candidate("linear: bfloat16 x int4_g16 5x48 on cpu, m=1", "torch", 100.0, None, True)
    (triton,) = [one for one in fast.explain(q).candidates if one.name == "triton"]
    assert triton.reason == "it is tried on cuda; on cpu only as impl='triton'" and triton.cost is None


def test_every_implementation_is_there_once():
    for w, operation in ((weight(), "linear"), (weight("int4_g16", 3, 5, 48), "grouped")):
        names = [one.name for one in fast.explain(w).candidates]
        assert sorted(names) == sorted(registry.IMPLEMENTATIONS[operation])
    assert [one.name for one in fast.explain(experts()).candidates] == ["torch", "triton", "humming"] * 2


def test_it_is_what_runs(monkeypatch):
    ran = []
    run = fast.eager.Plan.run
    monkeypatch.setattr(fast.eager.Plan, "run", lambda *args: ran.append("torch") or run(*args))
    q, x = weight(), normal(2, 48)
    said = taken(q, 2, x_dtype=torch.float32)
    assert not ran
    fast.linear(x, q)
    assert ran == said == ["torch"] == taken(q, 2, x_dtype=torch.float32)


def test_nothing_is_launched_loaded_or_prepared(monkeypatch):
    def no(*_):
        raise AssertionError("prepared")

    monkeypatch.setattr(fast.eager, "prepare", no)
    assert taken(weight()) == ["torch"] and taken(weight(), impl="triton") == ["triton"] and taken(experts(impl="torch")) == ["torch"] * 2
    code = (
        "import sys, torch, ref, fast\n"
        "fast.explain(ref.quantize(torch.ones(4, 32), 'int4'), impl='triton')\n"
        "fast.explain(ref.quantize(torch.ones(2, 4, 32), 'int4'))\n"
        "print([name for name in ('triton', 'humming') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=120)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_layers():
    q, bias = weight(), torch.ones(5)
    for layer, call in (
        (fast.Linear(q), "bfloat16 x int4_g16"),
        (fast.Linear(q, bias, x_format="int8_tensor", x_scale=torch.ones(1)), "int8_tensor (bfloat16) x int4_g16"),
    ):
        assert fast.explain(layer).candidates[0].call == f"linear: {call} 5x48 on cpu, m=1" and taken(layer) == ["torch"]
    assert taken(fast.Linear(q, impl="triton")) == ["triton"] and taken(fast.Linear(q, impl="triton"), impl="torch") == ["torch"]
    assert taken(fast.Linear(q, impl="humming")) == []
    assert fast.explain(fast.Linear(q, impl="humming")).candidates[0].reason == "Humming runs on NVIDIA GPUs only"
    for made in (experts(), experts(bias13=torch.ones(3, 64), bias2=torch.ones(3, 48), x_format="int8_token")):
        assert (
            taken(made) == ["torch", "torch"]
            and [one.call.partition(":")[0] for one in fast.explain(made).candidates] == ["w13"] * 3 + ["w2"] * 3
        )
        made.prepare()
        assert taken(made, 7) == ["torch", "torch"] and taken(made, x_dtype=torch.float16) == []
    plain = FusedExperts(torch.ones(3, 64, 48), torch.ones(3, 48, 32))
    assert taken(plain) == ["torch", "torch"] and "3 experts plain 64x48" in str(fast.explain(plain))


def test_what_is_prepared():
    q = weight()
    p = fast.prepare(q, m=1)
    assert taken(p) == ["torch"] and taken(p, 2) == [] and taken(p, bias=True) == []
    assert fast.explain(p, 2).candidates[0].reason == "the weight was prepared for other calls"
    s = fast.prepare_experts(weight("int4_g16", 3, 5, 48), x_format="int8_token", bias=True)
    assert taken(s, 1000, x_format="int8_token", bias=True) == ["torch"] and taken(s, x_format="int8_token") == []
    own = torch.ones(3, 5)
    s = fast.prepare_experts(weight("int4_g16", 3, 5, 48), bias=own)
    assert taken(s, bias=True) == taken(s, bias=own) == ["torch"] and taken(s, bias=own.clone()) == []


def test_a_plan_that_is_there_stays(monkeypatch):
    """One that is registered later is not taken for a weight that has a plan; one that is gone still runs what it has prepared."""
    one = fast.Implementation("toy", "linear", "fast.eager", lambda request, rows: 1, as_is=True)
    q, late = weight(), weight()
    fast.linear(normal(1, 48), q)
    fast.register(one)
    try:
        first, second = fast.explain(q, x_dtype=torch.float32).candidates[:2]
        assert (first.name, first.reason, second.name, second.chosen) == ("toy", "the weight has a plan by 'torch' already", "torch", True)
        fast.linear(normal(1, 48), late)
    finally:
        fast.unregister(one)
    assert taken(late, x_dtype=torch.float32) == ["toy"] and taken(late) == ["torch"]


def test_on_a_gpu(monkeypatch):
    """The order of tries on a GPU, what refuses there said by itself; no GPU is there, so each is asked by a stand-in."""
    request = Request(ref.parse_format("int4_g128_bf16"), (64, 128), BF16, torch.device("cuda", 0))
    reasons = {"cublas": "it multiplies fp8 by fp8"}

    def names(rows, impl=None):
        found = _candidates("linear", impl, request, rows, "call", lambda one: reasons.get(one.name), None, False)
        return [(one.name, one.cost, one.reason, one.chosen) for one in found]

    assert names(64) == [
        ("cublas", 0.5, "it multiplies fp8 by fp8", False),
        ("triton", 1.0, None, True),
        ("humming", 1.4, None, False),
        ("torch", 100.0, None, False),
    ]
    assert [name for name, _, _, chosen in names(128) if chosen] == ["humming"]
    assert names(128, "cublas")[0] == ("cublas", 0.5, "it multiplies fp8 by fp8", False) and not any(row[3] for row in names(128, "cublas"))


def test_pins_are_named(monkeypatch):
    monkeypatch.setenv("FAST_IMPL", "grouped=triton")
    choose.pins.cache_clear()
    try:
        assert taken(weight()) == ["torch"] and taken(weight("int4_g16", 3, 5, 48)) == ["triton"]
        assert fast.explain(weight("int4_g16", 3, 5, 48)).candidates[1].reason == "'triton' is pinned by FAST_IMPL"
        assert taken(weight("int4_g16", 3, 5, 48), impl="torch") == ["torch"]
    finally:
        monkeypatch.undo()
        choose.pins.cache_clear()


@pytest.mark.parametrize(
    "w, kwargs, error, message",
    [
        (
            "int4",
            {},
            TypeError,
            "explain: got str, expected a quantized layer or weight: fast.Linear, FusedExperts, QTensor, Prepared or Stack",
        ),
        (torch.ones(5, 48), {}, TypeError, r"explain: got Tensor \(5, 48\), expected a quantized layer"),
        (torch.nn.Linear(48, 5), {}, TypeError, r"explain: got Parameter \(5, 48\), expected a quantized layer"),
        (torch.nn.ReLU(), {}, TypeError, "explain: got ReLU, expected a quantized layer"),
        (weight("int4_g16", 2, 3, 5, 48), {}, TypeError, r"explain: got QTensor \(2, 3, 5, 48\)"),
        (weight(), {"m": -1}, ValueError, "explain: m is -1, expected a number of rows"),
        (weight(), {"m": 1.0}, ValueError, "explain: m is 1.0"),
        (weight(), {"x_dtype": torch.float64}, TypeError, "explain: x_dtype is torch.float64, expected torch.float16, torch.bfloat16"),
        (weight(), {"x_format": "int9"}, ValueError, "unknown name 'int9'"),
        (weight(), {"static_scale": True}, ValueError, "x_scale without x_format"),
        (weight("int4_g16", 3, 5, 48), {"static_scale": True}, ValueError, "explain: got x_scale without x_format"),
        (weight(), {"impl": "cuda"}, ValueError, "explain: unknown impl 'cuda', expected one of torch, triton, humming, cublas"),
        (weight("int4_g16", 3, 5, 48), {"impl": "cublas"}, NotImplementedError, "explain: there is no impl 'cublas' of it"),
        (fast.Linear(weight()), {"x_format": "int8_token"}, ValueError, "x_format, static_scale and bias of a Linear are its own"),
        (fast.Linear(weight()), {"bias": True}, ValueError, "x_format, static_scale and bias of a Linear are its own"),
    ],
    ids=range(15),
)
def test_refusals(w, kwargs, error, message):
    with pytest.raises(error, match=message):
        fast.explain(w, **kwargs)
