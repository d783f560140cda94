"""Calls that write where they must not, leave the process changed, or keep what they should not."""

import os
import random

import pytest
import torch

from . import hygiene, metamorphic
from .attempt import attempt
from .candidate import Candidate
from .case import DequantizeCase, LinearCase, PackCase
from .declaration import Declaration
from .moe_case import MulSumCase, Route
from .ops import operations
from .oracle import Disagreement
from .wrong import Right

CASE = LinearCase(n=5, k=40, format="uint4z_g16", lead=(3,), dtype="fp32", bias="fp32", data="normal")


def run(target, case=CASE, seed=0, declared=None):
    op = operations()[case.op]
    return attempt(Candidate("test", target), op.FUNCTION, op.build(case, "cpu"), None, seed, declared)


def kernel(before=lambda x, w, bias: None, after=lambda y, x, w: None):
    """A right kernel that does something else besides."""

    class Kernel(Right):
        def linear(self, x, w, bias=None, *, x_format=None, x_scale=None, out=None):
            before(x, w, bias)
            y = super().linear(x, w, bias, x_format=x_format, x_scale=x_scale, out=out)
            after(y, x, w)
            return y

    return Kernel()


def beyond(tensor, elements):
    """The element so many behind the tensor's first one, in memory."""
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + elements)


OUTSIDE = {
    "behind x": (lambda x, w, bias: beyond(x, x.numel() + 2).fill_(0), "guard: x", "4 bytes, the first 4 bytes behind its end"),
    "before the bias": (lambda x, w, bias: beyond(bias, -1).fill_(0), "guard: bias", "4 bytes, the first 4 bytes before its start"),
    "behind codes": (
        lambda x, w, bias: beyond(w.packed, w.packed.numel()).fill_(-1),
        "guard: w.packed",
        "2 bytes, the first 2 bytes behind its end",
    ),
    "far behind scales": (lambda x, w, bias: beyond(w.scale, w.scale.numel() + 127).fill_(1), "guard: w.scale", "508 bytes behind its end"),
    "in x": (lambda x, w, bias: x[2, 7].fill_(5), "input: x", "x[87] is 5 now"),
    "in zeros": (lambda x, w, bias: w.zero[4, 1].fill_(77), "input: w.zero", "w.zero[4, 1] is 77 now"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_writes_outside_of_the_result_are_caught(name):
    write, kind, text = OUTSIDE[name]
    with pytest.raises(Disagreement) as error:
        run(kernel(write))
    assert error.value.kind == kind and text in str(error.value)


def test_a_problem_is_put_right_after_a_write():
    op = operations()["linear"]
    problem = op.build(CASE, "cpu")
    for write, kind, _ in OUTSIDE.values():
        for _ in range(2):
            with pytest.raises(Disagreement) as error:
                attempt(Candidate("test", kernel(write)), "linear", problem)
            assert error.value.kind == kind
    attempt(Candidate("test", Right()), "linear", problem)


@pytest.mark.parametrize("at", [-1, 15])
def test_writes_around_out_are_caught(at):
    with pytest.raises(Disagreement, match="wrote outside of out: 4 bytes") as error:
        run(kernel(after=lambda y, x, w: y.storage_offset() and beyond(y, at).fill_(1)))
    assert error.value.kind == "guard: out"


def test_what_lies_behind_a_buffer_shows():
    class Reads(Right):
        def add_bias(self, y, bias):
            return y + torch.cat((bias[1:], beyond(bias, len(bias)))).double()

    with pytest.raises(Disagreement, match=r"\(3 of 15 elements are wrong\)|y\[0, 0\]"):
        run(Reads())
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for seen in hygiene.PATTERN.repeat(4).view(dtype):
            assert seen.isnan() or seen.abs() > 2.0**14


STATE = {
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "default device": lambda: torch.set_default_device("meta"),
    "grad mode": lambda: torch.set_grad_enabled(False),
    "number of threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True),
    "float32 matmul precision": lambda: torch.set_float32_matmul_precision("medium"),
    "flushing of subnormals": lambda: torch.set_flush_denormal(True),
    "working directory": lambda: os.chdir("/"),
    "random state": lambda: torch.rand(1),
}


@pytest.mark.parametrize("name", STATE)
def test_state_is_left_as_it_was(name):
    assert STATE.keys() == hygiene.STATE.keys()
    before = hygiene.state()
    with pytest.raises(Disagreement) as error:
        run(kernel(after=lambda y, x, w: STATE[name]()))
    assert error.value.kind == f"state: {name}"
    hygiene.check_state(before)


def test_seeding_is_caught_and_a_generator_of_ones_own_is_not():
    with pytest.raises(Disagreement, match="seeded them anew"):
        run(kernel(lambda *args: torch.manual_seed(1)))
    run(kernel(lambda *args: torch.rand(1, generator=torch.Generator().manual_seed(1))))


class Undecided(Right):
    """Another order of k at every call."""

    def __init__(self):
        self.random = random.Random(0)

    def product(self, a, b, x_format):
        total = torch.zeros(a.shape[0], b.shape[0])
        for k in self.random.sample(range(a.shape[1]), a.shape[1]):
            total = total + (a[:, None, k] * b[None, :, k]).float()
        return total


def test_only_what_is_declared_deterministic_has_to_repeat_itself():
    with pytest.raises(Disagreement, match="on the second run") as error:
        run(Undecided())
    assert error.value.kind == "rerun"
    run(Undecided(), declared=Declaration(deterministic=False))

    class Worse(Undecided):
        def store(self, y, dtype):
            return super().store(y + (self.random.random() < 0.3), dtype)

    worse = Worse()
    with pytest.raises(Disagreement):
        for _ in range(20):
            run(worse, declared=Declaration(deterministic=False))


class Kept(Right):
    """Returns what it returned for the same memory and shape."""

    def __init__(self):
        self.results = {}

    def linear(self, x, w, bias=None, *, x_format=None, x_scale=None):
        key = x.data_ptr(), tuple(x.shape), x.stride()
        if key not in self.results:
            self.results[key] = super().linear(x, w, bias)
        return self.results[key].clone()


def test_results_kept_by_address_are_caught(monkeypatch):
    case = LinearCase(n=5, k=32, lead=(6,), format="int8", data="exact")
    with pytest.raises(Disagreement, match="with tokens in another order, admissible") as error:
        run(Kept(), case, 32)
    assert error.value.kind == "relation: tokens in another order"
    monkeypatch.setattr(metamorphic, "RELATIONS", {})
    run(Kept(), case, 32)


class Workspace(Right):
    """Keeps the longest result, and gives a shorter one from its end: right unless shapes alternate."""

    last = None

    def linear(self, x, w, bias=None, *, x_format=None, x_scale=None):
        y = super().linear(x, w, bias)
        if self.last is not None and self.last.shape[1:] == y.shape[1:] and len(self.last) < len(y):
            y[: len(self.last)] = self.last
        self.last = y
        return y.clone()


def test_what_a_shorter_call_leaves_behind_is_caught(monkeypatch):
    case = LinearCase(n=5, k=32, lead=(6,), format="int8", data="normal")
    with pytest.raises(Disagreement) as error:
        run(Workspace(), case, 8 + 1024)
    assert error.value.kind == "rerun"
    monkeypatch.setattr(metamorphic, "RELATIONS", {})
    run(Workspace(), case, 8 + 1024)


class TakesIdsAsTheyLie:
    """Reads ids and weights as though their rows lay side by side."""

    @staticmethod
    def moe_fused_mul_sum(inputs, topk_weights, topk_ids=None, expert_map=None):
        weights = topk_weights.as_strided(topk_weights.shape, (topk_weights.shape[1], 1))
        return (weights[..., None].double() * inputs.double()).sum(1).to(inputs.dtype)


def test_small_operands_are_views_now_and_then():
    case = MulSumCase(route=Route(m=3, t=2), k=4, weights="fp32", data="exact", dtype="fp32")
    run(TakesIdsAsTheyLie, case, 0)
    with pytest.raises(Disagreement, match=r"\(here inputs, topk_ids, topk_weights are views with gaps\)"):
        run(TakesIdsAsTheyLie, case, hygiene.APART_SEED)


@pytest.mark.parametrize("case", [DequantizeCase(n=4, k=33, format="nvfp4"), PackCase(bits=3, lead=(4,), k=7)])
def test_views_hold_what_the_buffers_held(case):
    op = operations()[case.op]
    for seed in range(hygiene.APART):
        plain, laid = op.build(case, "cpu"), op.build(case, "cpu")
        hygiene.lay(laid, seed)
        for name, tensor in plain.owned.items():
            view = laid.owned[name]
            assert torch.equal(hygiene.bits(view), hygiene.bits(tensor)) and view.data_ptr() % tensor.element_size() == 0
            assert view.storage_offset() * view.element_size() >= hygiene.BAND
        hygiene.check_inputs(laid)


def test_the_first_argument_is_moved_in_memory():
    x = torch.randn(6, 9)[1:, ::2]
    there = hygiene.moved(x)
    assert torch.equal(there, x) and there.stride() == x.stride() and there.data_ptr() % 16 == (x.data_ptr() + 4) % 16

    class Aligned(Right):
        """Reads what lies at the aligned address below."""

        def linear(self, x, w, bias=None, **options):
            start = x.data_ptr() % 16 // x.element_size()
            return super().linear(x.as_strided(x.shape, x.stride(), x.storage_offset() - start), w, bias, **options)

    run(Aligned(), seed=0)
    with pytest.raises(Disagreement, match="its first argument one element further in memory"):
        run(Aligned(), seed=1)
