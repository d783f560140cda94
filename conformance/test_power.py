"""Known-wrong kernels are caught, and shrink to small cases; right ones pass."""

from dataclasses import replace

import pytest
import torch

from . import cell, wrong
from .accumulators import Block
from .case import DequantizeCase, LinearCase, read_case
from .emulate import block_sum
from .ops import dequantize, linear
from .ops.linear_data import draw
from .oracle import Disagreement


def run(name, op, label, examples=200):
    task = cell.Task(f"conformance.wrong:{name}", op, label, (None,), "cpu", examples)
    return cell.run(task)[0]


# The kernel, the cell, and what the case it shrinks to must fulfil.
WRONG = [
    ("swapped_nibbles", "linear", "int4_g128", lambda c: c.n == c.m == 1 and c.data == "exact"),
    ("group_off_by_one", "linear", "int4_g32", lambda c: c.m == 1 and c.k > 32),
    ("zero_ignored", "linear", "uint4z_g128", lambda c: c.n == c.k == c.m == 1),
    ("offset_of_wrong_group", "linear", "uint4_g32_fp16_ofp16", lambda c: c.n == c.m == 1 and 32 < c.k <= 64),
    ("divisor_multiplied", "linear", "fp4_e2m1_g16_e4m3_tensor2div", lambda c: c.n == c.k == c.m == 1),
    ("group_index_ignored", "linear", "int4_g32", lambda c: c.order and c.n <= 2 and c.m == 1 and 32 < c.k <= 64),
    ("last_group_missing", "linear", "int4_g128", lambda c: c.n == c.m == 1 and c.k % 128 != 0),
    ("scale_of_wrong_row", "linear", "int8", lambda c: c.n == 2 and c.m == c.k == 1),
    ("bias_dropped", "linear", "int8", lambda c: c.n == c.m == c.k == 1 and c.bias is not None),
    ("half_accumulation", "linear", "int8", lambda c: c.n == 1 and c.m < 10),
    ("truncating_store", "linear", "int4", lambda c: c.n * c.m * c.k <= 20),
    ("double_rounding", "linear", "int4", lambda c: c.n * c.m * c.k <= 20),
    ("bias_after_rounding", "linear", "int4", lambda c: c.bias is not None),
    ("unpromoted", "linear_x", "fp8", lambda c: c.x_format.startswith(("fp8", "fp4"))),
    ("mutates_input", "linear", "int8", lambda c: c.n == c.m == c.k == 1),
    ("unwritten_tail", "linear", "int8", lambda c: c.n == 17 and c.m == c.k == 1),
    ("undecided", "linear", "int8", lambda c: c.dtype == "fp32" and c.k > 2),
    ("wrong_dtype", "linear", "int8", lambda c: c.n == c.k == 1),
    ("ignores_bias_stride", "linear", "int8", lambda c: c.bias is not None and (c.pad or c.seed % 8 == 1)),
    ("ignores_stride", "linear", "int8", lambda c: c.m == 2 and (c.pad or c.transposed)),
]


@pytest.mark.parametrize(("name", "op", "label", "small"), WRONG, ids=[row[0] for row in WRONG])
def test_wrong_kernels_are_caught(name, op, label, small):
    found = run(name, op, label)
    assert found.status == "fail"
    case = read_case(found.case)
    assert small(case), found.case
    tries = 20 if name == "undecided" else 1
    again = (cell.run_case(case, f"conformance.wrong:{name}", (None,), "cpu")[0].status for _ in range(tries))
    assert "fail" in again
    assert found.case in found.reproduce.replace("'\"'\"'", "'")
    assert "admissible" in found.error or "changed" in found.error or "expected" in found.error


@pytest.mark.parametrize(
    ("op", "label"), [("linear", "int4_g128"), ("linear", "generated"), ("linear_x", "int8"), ("linear_x", "generated")]
)
def test_a_right_kernel_passes(op, label):
    found = run("right", op, label, 60)
    assert (found.status, found.examples) == ("pass", 60), found.error


def test_fp8_units_on_a_gpu_have_to_promote():
    """On a GPU the bound is that of 13-bit sums in chunks of 128: wide enough for these, too narrow for one chain of them."""
    refused = set()
    for seed in (0, 3, 4):
        for data in ("exact", "positive", "normal"):
            dtype = "fp32" if data == "exact" else "bf16"  # 8 bits of a result hide the last of 15
            case = LinearCase(n=8, k=2048, format="fp8", lead=(8,), x_format="fp8_e4m3_token", dtype=dtype, data=data, seed=seed)
            drawn = draw(case)
            truth = linear.Truth(drawn, torch.device("cuda"), ("exact",))
            truth.check(wrong.promoted.linear(drawn.x, drawn.q, x_format=case.x_format))
            try:
                truth.check(wrong.unpromoted.linear(drawn.x, drawn.q, x_format=case.x_format))
            except Disagreement:
                refused.add(data)
    assert refused == {"exact", "positive"}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bit_units_of_a_gpu_stay_within_its_bound(dtype):
    for seed, data in enumerate(("exact", "normal", "positive", "heavy", "cancelling", "outlier", "huge", "tiny", "one_hot")):
        case = LinearCase(n=20, k=300, format="int4", lead=(9,), dtype=dtype, data=data, seed=seed)
        drawn = draw(case)
        truth = linear.Truth(drawn, torch.device("cuda"), ("weight_rounded",) if data != "exact" else ("exact",))
        y, error = truth.answer(truth.variants[0])
        rounded = drawn.x.double(), linear.linear_operands(drawn.x, drawn.q, variant=truth.variants[0])[1]
        got = block_sum(*rounded, Block(16, 25, 23))
        assert bool(((got - y).abs() <= error).all())


class Float32(wrong.Right):
    """Weights in float32 all the way, by a divisor's reciprocal, and then the product in float32."""

    def second(self, w, q):
        w = w.float()
        if q.scale_2 is not None:
            w = w * (1 / q.scale_2 if q.format.scale_2.endswith("divisor") else q.scale_2)
        return w.double()

    def add_offset(self, w, offset, column):
        return (w.float() + offset.float()[:, column]).double()

    def product(self, a, b, x_format):
        return a.float() @ b.float().T


class OffsetApart(Float32):
    """Offsets times the sums of their groups' x, added to the rest in float32."""

    def linear(self, x, w, bias=None):
        index = self.column(w, torch.arange(w.shape[1]))
        row = self.row(w, torch.arange(w.shape[0]))
        x_sum = torch.zeros(len(x), w.scale.shape[1]).index_add_(1, index, x.float())
        rest = x.float() @ self.weight(replace(w, offset=None)).float().T
        y = rest + x_sum @ w.offset.float()[row].T
        return self.store((y if bias is None else y + bias.float()).double(), x.dtype)


@pytest.mark.parametrize("data", ["exact", "one_hot", "normal", "positive", "cancelling", "huge", "tiny", "subnormal_scale"])
@pytest.mark.parametrize("name", ["uint4_g32_fp16_ofp16", "nf4_g7_ofp32", "int8_channel2div", "fp4_e2m1_g16_e4m3_tensor2div"])
def test_other_ways_to_the_same_weight_pass(name, data):
    for seed, order in ((1, False), (2, True), (6, False)):
        case = LinearCase(n=20, k=150, format=name, lead=(6,), dtype=("bf16", "fp32")[seed % 2], data=data, order=order, seed=seed)
        drawn = draw(case)
        truth = linear.Truth(drawn, torch.device("cpu"), ("exact",))
        for kernel in (Float32(), *([OffsetApart()] if drawn.q.offset is not None else [])):
            truth.check(kernel.linear(drawn.x, drawn.q, drawn.bias))


@pytest.mark.parametrize("name", ["uint4_g32_fp16_ofp16", "nf4_g7_ofp32", "int8_channel2div", "fp4_e2m1_g16_e4m3_tensor2div"])
def test_dequantized_in_float32(name):
    for data in ("exact", "normal", "subnormal_scale"):
        for seed in range(4):
            problem = dequantize.build(DequantizeCase(n=9, k=70, format=name, data=data, seed=seed, order=seed % 2 == 1), "cpu")
            problem.check(Float32().weight(problem.args[0]).float())
            with pytest.raises(Disagreement):
                problem.check(Float32().weight(problem.args[0]).float() * (1 + 2.0**-12))


def test_a_variant_is_accepted_and_named():
    class Rounded(wrong.Right):
        def weight(self, q):
            return super().weight(q).bfloat16().double()

    case = LinearCase(n=30, k=200, format="int4_g64", lead=(5,), dtype="bf16", data="normal", seed=3)
    drawn = draw(case)
    truth = linear.Truth(drawn, torch.device("cpu"), ("exact", "weight_rounded"))
    assert truth.check(Rounded().linear(drawn.x, drawn.q)).variant == "weight_rounded"
    assert truth.check(wrong.right.linear(drawn.x, drawn.q)).variant == "exact"
    with pytest.raises(Disagreement):
        linear.Truth(drawn, torch.device("cpu"), ("exact",)).check(Rounded().linear(drawn.x, drawn.q))
