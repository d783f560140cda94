"""The table of implementations: what is chosen as it was measured, others added and taken out again, names pinned by call, layer and environment."""

import sys
import types
from dataclasses import replace
from itertools import product

import pytest
import torch

import fast
import fast.eager
import ref
from fast import choose, registry
from fast.moe import grouped_eager
from fast.registry import Implementation
from fast.request import Request

from .test_linear import normal, same

CUDA = torch.device("cuda", 0)


def asked(x_format=None, device=CUDA, shape=(64, 128), name="fp8"):
    x_format = None if x_format is None else ref.parse_format(x_format)
    return Request(ref.parse_format(name), shape, torch.bfloat16, device, x_format)


def order(operation, request, rows):
    return [one.name for one in registry.by_cost(operation, request, rows)]


def test_the_order_that_was_measured():
    """Triton's kernels for integers up to 64 rows, else Humming; cuBLAS, which takes fp8 by fp8 alone, before both; plain torch last, and alone off
    a GPU."""
    for bucket in range(17):
        few, many = ["cublas", "triton", "humming", "torch"], ["cublas", "humming", "triton", "torch"]
        for request in (asked("fp8_e4m3_token"), asked(name="int4_g128_bf16"), asked(name="uint4z_g128"), asked(name="int8")):
            assert order("linear", request, 2**bucket) == (many if bucket >= 7 else few)
        for name in ("fp8", "mxfp4", "nvfp4", "int3_g128_bf16", "fp6_e3m2_bf16"):
            assert order("linear", asked(name=name), 2**bucket) == many
    assert "fp8 by fp8" in registry.module_of(registry.find("linear", "cublas"))._formats(asked())
    for block in (16, 32, 64, 128):
        assert order("grouped", asked(shape=(4, 64, 128)), block) == ["humming", "triton", "torch"]
    for operation, device in product(registry.OPERATIONS, ("cpu", "meta", "xpu", "mps")):
        assert order(operation, asked(device=torch.device(device)), 1) == ["torch"]


@pytest.fixture
def toy(monkeypatch):
    """Implementations by a module of one's own, which counts what it is asked: plain torch, but int4 only."""
    calls = []

    def why_not(request):
        return None if request.format == ref.parse_format("int4_g16") else "it is for int4_g16"

    def prepare(q, request, *bias):
        calls.append((request, *bias))
        return (grouped_eager if bias else fast.eager).prepare(q, request)

    module = types.ModuleType("toy_kernels")
    module.why_not, module.prepare, module.calls = why_not, prepare, calls
    monkeypatch.setitem(sys.modules, "toy_kernels", module)
    made = []

    def add(operation="linear", cost=1, **fields):
        one = Implementation("toy", operation, "toy_kernels", lambda request, rows: cost, **fields)
        fast.register(one)
        made.append(one)
        return one

    add.calls = calls
    yield add
    for one in made:
        if one in registry.IMPLEMENTATIONS[one.operation].values():
            fast.unregister(one)


def weight(name="int4_g16", *shape):
    return ref.quantize(normal(*(shape or (5, 48)), seed=9), name)


def test_one_that_is_registered_is_chosen_explained_and_removed(toy):
    x = normal(3, 48, dtype=torch.bfloat16)
    one = toy()
    assert "toy" in fast.IMPLEMENTATIONS and fast.IMPLEMENTATIONS["toy"] is one
    q = weight()
    text = str(fast.explain(q))
    assert text.splitlines()[1].split() == ["toy", "1", "taken"] and "torch      100  legal, but slower" in text
    assert not toy.calls
    assert same(fast.linear(x, q), ref.linear(x, q)) and len(toy.calls) == 1
    assert same(fast.linear(x, q, impl="toy"), ref.linear(x, q)) and same(
        fast.linear(x, fast.prepare(q, impl="toy"), impl="toy"), ref.linear(x, q)
    )
    made = len(toy.calls)
    other = weight("int3_g16")
    assert same(fast.linear(x, other), ref.linear(x, other)) and len(toy.calls) == made
    with pytest.raises(NotImplementedError, match="linear: impl 'toy' cannot run bfloat16 x int3_g16 5x48 on cpu: it is for int4_g16"):
        fast.linear(x, other, impl="toy")
    assert fast.why_not("linear", x, other, impl="toy") == "bfloat16 x int3_g16 5x48 on cpu: it is for int4_g16"
    fast.unregister(one)
    assert "toy" not in fast.IMPLEMENTATIONS and "toy" not in str(fast.explain(weight()))
    with pytest.raises(ValueError, match="linear: unknown impl 'toy', expected one of torch, triton, humming, cublas"):
        fast.linear(x, weight(), impl="toy")
    fast.linear(x, weight())
    assert len(toy.calls) == made


def test_it_is_taken_by_its_cost_and_where_it_says(toy):
    x = normal(3, 48)
    fast.unregister(toy(cost=101))
    fast.unregister(toy(devices=("cuda",)))
    toy(cost=101)
    fast.linear(x, weight())
    assert not toy.calls
    fast.linear(x, weight(), impl="toy")
    assert len(toy.calls) == 1


def test_a_cost_may_depend_on_the_call(toy):
    seen = []
    one = Implementation(
        "toy", "linear", "toy_kernels", lambda request, rows: seen.append((request.shape, rows)) or (1 if rows > 4 else 200)
    )
    fast.register(one)
    try:
        q = weight()
        for m in (1, 4, 5):
            fast.linear(normal(m, 48), q)
        assert seen == [((5, 48), 1), ((5, 48), 4), ((5, 48), 8)] and len(toy.calls) == 1
    finally:
        fast.unregister(one)


def test_rotations_reach_those_that_take_them_as_they_are(toy):
    q = weight("int4_g16_h16")
    one = toy()
    assert fast.why_not("linear", normal(2, 48), q, impl="toy") is None  # asked about int4_g16: the rotation goes to x
    fast.unregister(one)
    toy(as_is=True)
    assert "it is for int4_g16" in fast.why_not("linear", normal(2, 48), q, impl="toy")


def test_products_of_experts(toy):
    q, x, offsets = weight("int4_g16", 3, 9, 48), normal(4, 48), torch.tensor([0, 1, 3, 4])
    y = ref.moe.grouped_linear(x, q, offsets)
    with pytest.raises(ValueError, match="grouped_linear: unknown impl 'toy', expected one of torch, triton, humming"):
        fast.grouped_linear(x, q, offsets, impl="toy")
    toy("grouped")
    with pytest.raises(NotImplementedError, match="linear: there is no impl 'toy' of it; expected one of torch, triton, humming, cublas"):
        fast.linear(x, weight(), impl="toy")
    with pytest.raises(NotImplementedError, match="moe_permute: there is no impl 'toy' of it"):
        fast.moe_permute(x, torch.zeros(4, 1, dtype=torch.int32), 3, impl="toy")
    assert same(fast.grouped_linear(x, q, offsets), y) and len(toy.calls) == 1 and toy.calls[0][1] is None
    assert same(fast.grouped_linear(x, q, offsets, impl="toy"), y) and len(toy.calls) == 1
    w2, ids, weights = weight("int4_g16", 3, 48, 9), torch.zeros(4, 1, dtype=torch.int32), torch.ones(4, 1)
    call = (x.bfloat16(), q, w2, weights, ids)
    assert same(
        fast.fused_experts(*call, activation="relu2_no_mul", impl="toy"), fast.fused_experts(*call, activation="relu2_no_mul", impl="torch")
    )


def test_a_refusal_of_the_values_is_asked_for_once(toy, monkeypatch):
    toy()

    def refuse(q, request):
        toy.calls.append(request)
        raise NotImplementedError("there is a 7 in it")

    monkeypatch.setattr(sys.modules["toy_kernels"], "prepare", refuse)
    q = weight()
    assert [one.name for one in fast.explain(q).candidates if one.chosen] == ["toy"]
    for m in (1, 2, 4, 8):
        fast.linear(normal(m, 48), q)
    with pytest.raises(NotImplementedError, match="there is a 7 in it"):
        fast.linear(normal(1, 48), q, impl="toy")
    assert len(toy.calls) == 1
    reasons = {one.name: (one.reason, one.chosen) for one in fast.explain(q, x_dtype=torch.float32).candidates}
    assert reasons["toy"] == ("there is a 7 in it", False) and reasons["torch"] == (None, True)


GOOD = Implementation("mine", "linear", "mine", lambda request, rows: 1)
WRONG = [
    ("mine", TypeError, "register: got str, expected an Implementation"),
    (replace(GOOD, name="triton"), ValueError, r"register: linear has an implementation 'triton' already \(fast.triton\)"),
    (replace(GOOD, name="a=b"), ValueError, "register: name is 'a=b', expected a word of letters, digits and underscores"),
    (replace(GOOD, operation="lineal"), ValueError, "register: operation of 'mine' is 'lineal', expected one of 'linear', 'grouped'"),
    (replace(GOOD, cost=3), TypeError, r"register: cost of 'mine' is 3, expected a function \(request, rows\) -> number"),
    (replace(GOOD, devices="cuda"), TypeError, "register: devices of 'mine' are 'cuda', expected a tuple of types of devices, or None"),
]


@pytest.mark.parametrize("wrong, error, message", WRONG, ids=range(len(WRONG)))
def test_register_refuses(wrong, error, message):
    before = {operation: dict(table) for operation, table in registry.IMPLEMENTATIONS.items()}
    with pytest.raises(error, match=message):
        fast.register(wrong)
    with pytest.raises(ValueError, match=r"unregister: .* is not registered"):
        fast.unregister(wrong)
    assert before == registry.IMPLEMENTATIONS


@pytest.fixture
def pin(monkeypatch):
    def pin(text):
        monkeypatch.setenv("FAST_IMPL", text)
        choose.pins.cache_clear()

    monkeypatch.delenv("FAST_IMPL", raising=False)
    choose.pins.cache_clear()
    yield pin
    choose.pins.cache_clear()


@pytest.mark.parametrize(
    "text, pins",
    [
        ("", {}),
        ("  ", {}),
        ("triton", {"linear": "triton", "grouped": "triton"}),
        ("linear=triton", {"linear": "triton"}),
        (" linear = triton , grouped=humming ", {"linear": "triton", "grouped": "humming"}),
        ("cublas", {"linear": "cublas", "grouped": "cublas"}),
    ],
)
def test_what_the_environment_pins(pin, text, pins):
    pin(text)
    assert choose.pins() == pins


@pytest.mark.parametrize(
    "text, message",
    [
        ("tritn", "FAST_IMPL: there is no implementation 'tritn'; the nearest is 'triton'"),
        ("linaer=triton", r"FAST_IMPL: there is no operation 'linaer'; the nearest is 'linear' \(of linear, grouped\)"),
        ("grouped=huming", "FAST_IMPL: there is no implementation of grouped 'huming'; the nearest is 'humming'"),
        ("grouped=cublas", "FAST_IMPL: there is no implementation of grouped 'cublas'; the nearest is .* \\(of torch, triton, humming\\)"),
        ("linear=", "FAST_IMPL: there is no implementation of linear ''"),
        ("triton,grouped=torch", "FAST_IMPL is 'triton,grouped=torch', expected a name, or operation=name separated by commas"),
        ("linear=torch,linear=triton", "FAST_IMPL is .*, which pins linear twice"),
    ],
)
def test_a_wrong_pin_is_an_error_at_every_call(pin, text, message):
    pin(text)
    q = weight()
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            fast.linear(normal(1, 48), q)
    with pytest.raises(ValueError, match=message):
        fast.explain(q)
    assert fast.linear(normal(1, 48), q, impl="torch").shape == (1, 5)


def test_a_pin_never_falls_back_and_gives_way_to_the_call(pin):
    pin("humming")
    q, x = weight(), normal(2, 48)
    with pytest.raises(
        NotImplementedError, match=r"linear: FAST_IMPL: impl 'humming' cannot run float32 x int4_g16 .*: Humming runs on NVIDIA"
    ):
        fast.linear(x, q)
    with pytest.raises(NotImplementedError, match="linear: FAST_IMPL: impl 'humming' cannot run"):
        fast.prepare(q, x_dtype=torch.float32)
    assert same(fast.linear(x, q, impl="torch"), ref.linear(x, q))
    assert same(fast.Linear(q, impl="torch")(x), ref.linear(x, q))
    w, offsets = weight("int4_g16", 3, 9, 48), torch.tensor([0, 1, 2, 2])
    with pytest.raises(NotImplementedError, match="grouped_linear: FAST_IMPL: impl 'humming' cannot run"):
        fast.grouped_linear(x, w, offsets)
    assert same(fast.grouped_linear(x, w, offsets, impl="torch"), ref.moe.grouped_linear(x, w, offsets))
    pin("cublas")
    with pytest.raises(
        NotImplementedError, match="grouped_linear: FAST_IMPL: there is no impl 'cublas' of it; expected one of torch, triton"
    ):
        fast.grouped_linear(x, weight("int4_g16", 3, 9, 48), offsets)
    pin("linear=cublas")
    assert same(fast.grouped_linear(x, weight("int4_g16", 3, 9, 48), offsets), ref.moe.grouped_linear(x, w, offsets))


def test_what_is_pinned_runs(pin, toy):
    toy(cost=1000)
    pin("linear=toy")
    q, x = weight(), normal(2, 48)
    assert same(fast.linear(x, q), ref.linear(x, q)) and len(toy.calls) == 1
    fast.linear(x, torch.ones(3, 48))  # a plain weight is nobody's but torch's


def test_the_environment_is_read_once(pin, monkeypatch):
    pin("torch")
    assert choose.pins() == {"linear": "torch", "grouped": "torch"}
    monkeypatch.setenv("FAST_IMPL", "nonsense")
    assert same(fast.linear(normal(1, 48), weight()), ref.linear(normal(1, 48), weight()))


def test_a_layer_has_its_own(toy):
    from fast.layers.experts import FusedExperts

    toy(cost=1000), toy("grouped", cost=1000)
    q, x = weight(), normal(2, 48)
    layer = fast.Linear(q, impl="toy")
    assert layer.impl == "toy" and "impl=toy" in repr(layer) and fast.Linear(q).impl is None
    assert same(layer(x), ref.linear(x, q)) and len(toy.calls) == 1
    assert same(layer.prepare(torch.float32)(x), ref.linear(x, q)) and len(toy.calls) == 2
    with pytest.raises(ValueError, match="Linear: unknown impl 'tojo', expected one of"):
        fast.Linear(q, impl="tojo")
    with pytest.raises(NotImplementedError, match="linear: impl 'humming' cannot run"):
        fast.Linear(q, impl="humming")(x)
    toy.calls.clear()
    experts = FusedExperts(weight("int4_g16", 3, 64, 48), weight("int4_g16", 3, 48, 32), impl="toy")
    ids, weights = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)
    y = experts(x, weights, ids)
    assert len(toy.calls) == 2 and same(experts.prepare(torch.float32)(x, weights, ids), y) and len(toy.calls) == 4
    with pytest.raises(ValueError, match="FusedExperts: unknown impl 'tojo'"):
        FusedExperts(weight("int4_g16", 3, 64, 48), weight("int4_g16", 3, 48, 32), impl="tojo")
    with pytest.raises(NotImplementedError, match="FusedExperts: there is no impl 'cublas' of it"):
        FusedExperts(weight("int4_g16", 3, 64, 48), weight("int4_g16", 3, 48, 32), impl="cublas")


def test_humming_has_no_place_for_a_routers_weights(monkeypatch):
    from fast.humming import grouped

    monkeypatch.setattr(grouped, "rules", lambda request: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    request = Request(ref.parse_format("int4_g128_bf16"), (4, 256, 512), torch.bfloat16, CUDA)
    assert grouped.why_not(request) is None
    assert "applies a router's weight to nothing" in grouped.why_not(replace(request, weighed=True))
    w, x = weight("int4_g16", 3, 9, 48), normal(2, 48)
    blocks = ref.moe.moe_align_block_size(torch.tensor([[0], [2]]), 16, 3)
    call = dict(zip(("sorted_token_ids", "expert_ids", "num_tokens_post_padded"), blocks, strict=True))
    for weights, phrase in ((torch.ones(2), "router's weight"), (None, None)):
        reason = fast.why_not("indexed_linear", x, w, *call.values(), 1, topk_weights=weights, impl="humming")
        assert reason is None if phrase is None else phrase in reason
