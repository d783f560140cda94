"""Codes held against a quantizer's own scales: what may differ passes, one code beyond that does not."""

from dataclasses import replace

import pytest
import torch

from ref import quantize, quantize_input
from ref.element import decode, encode
from ref.format import parse_format
from ref.pack import pack, unpack

from .case import QuantizeCase, QuantizeInputCase
from .ops import quantize as quantize_op
from .ops import quantize_input as input_op
from .oracle import Disagreement
from .quantizer import CODE, judge_codes, rotated, scale_range, step_of
from .regimes import draw_x


def with_codes(q, codes):
    return replace(q, packed=pack(codes, q.format.element.bits))


def codes_of(q):
    return unpack(q.packed, q.format.element.bits, q.shape[-1])


@pytest.mark.parametrize("name", ["int8_token", "fp8_e4m3_token", "int4_g64", "fp8_e4m3_g32_e8m0", "fp4_e2m1_g16_e4m3_tensor2"])
def test_another_rounding_of_the_scale_passes_with_its_own_codes(name):
    fmt = parse_format(name)
    for seed in range(4):
        problem = input_op.build(QuantizeInputCase(k=256, format=name, lead=(32,), static=fmt.scale_2 == "tensor", seed=seed), "cpu")
        x, q = problem.args[0], quantize_input(*problem.args, **problem.kwargs)
        problem.check(q)
        if fmt.scale != "fp32":
            continue
        values, error = rotated(x, fmt.hadamard)
        ends = scale_range(values, error, fmt, None)
        assert not torch.equal(ends[0][0], ends[2][0])
        for scale, _ in ends:
            off = replace(q, scale=scale)
            t = x.double() / step_of(scale, None, fmt, x.shape)
            problem.check(with_codes(off, encode(t, fmt.element)))
        with pytest.raises(Disagreement, match="scale"):
            problem.check(with_codes(replace(q, scale=q.scale * (1 + 2.0**-20)), encode(t, fmt.element)))


@pytest.mark.parametrize("name", ["int8_token", "fp8_e4m3_token", "fp8_e4m3_g32_e8m0"])
def test_one_code_that_is_next_to_the_right_one_is_caught(name):
    fmt = parse_format(name)
    problem = input_op.build(QuantizeInputCase(k=64, format=name, lead=(4,), seed=1), "cpu")
    q = quantize_input(*problem.args)
    codes = codes_of(q)
    value = decode(codes, fmt.element)
    neighbour = encode(value[2, 7] * (1 + 2.0**-1) if value[2, 7].abs() > 4 else value[2, 7] + 2, fmt.element)
    assert neighbour != codes[2, 7]
    codes[2, 7] = neighbour
    with pytest.raises(Disagreement, match=r"code value\[2, 7\]"):
        problem.check(with_codes(q, codes))


@pytest.mark.parametrize("rounding", ["nearest_away", "nearest_zero"])
def test_ties_go_to_even_where_the_scale_is_a_power_of_two(rounding):
    """No rounding stands between x and the tie there, so that the rule decides."""
    fmt = parse_format("int8_g32_e8m0")
    x = (torch.arange(256).view(4, 64) - 128).float() / 2
    x[:, ::32] = 127.0
    q = quantize_input(x, fmt)
    t = x.double() / step_of(q.scale, None, fmt, x.shape)
    assert int((t.abs() % 1 == 0.5).sum()) > 50
    judge_codes(q, x.double(), torch.zeros_like(t))
    with pytest.raises(Disagreement):
        judge_codes(with_codes(q, encode(t, fmt.element, rounding)), x.double(), torch.zeros_like(t))


def test_half_of_a_band_may_be_beyond_the_edge_and_not_all_of_it():
    fmt = parse_format("int8_token")
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(-100, 100, (1, 4096), generator=generator) + 0.5
    t = edges + (torch.rand(1, 4096, generator=generator).double() - 0.5) * edges.abs() * CODE
    t[:, 0] = 127
    scale = torch.tensor([[1.0 + 2.0**-10]])
    x = (t * scale.double()).double()
    q = replace(quantize_input(x.float(), fmt), scale=scale)
    t = x / scale.double()
    no_error = torch.zeros_like(t)
    for moved in (t, t * (1 + CODE / 2), t * (1 - CODE)):
        judge_codes(with_codes(q, encode(moved, fmt.element)), x, no_error)
    right = encode(t, fmt.element)
    other = torch.where(
        right == encode(t * (1 + CODE), fmt.element), encode(t * (1 - CODE), fmt.element), encode(t * (1 + CODE), fmt.element)
    )
    assert int((other != right).sum()) > 2000
    with pytest.raises(Disagreement, match="values near an edge have the code beyond it"):
        judge_codes(with_codes(q, other), x, no_error)


@pytest.mark.parametrize("name", ["int4_g32", "uint4z_g64", "nf4_g64", "mxfp4", "nvfp4", "fp8_e4m3_b128x128", "uint4_g32_fp16_ofp16"])
def test_weights_quantized_by_way_of_a_reciprocal_pass(name):
    fmt = parse_format(name)
    problem = quantize_op.build(QuantizeCase(n=40, k=160, format=name, dtype="bf16", seed=5), "cpu")
    q = quantize(*problem.args, **problem.kwargs)
    problem.check(q)
    w = draw_x(5, 40, 160, "bf16", "normal")
    if fmt.zero is None and fmt.offset is None:
        step = step_of(q.scale, q.scale_2, fmt, w.shape).float()
        given = problem.args[0].float()
        t = torch.where(step == 0, 0.0, given * (1 / step))
        problem.check(with_codes(q, encode(t.double(), fmt.element)))
    codes = codes_of(q)
    codes[7, 3] = (codes[7, 3].long() + 2 ** (fmt.element.bits - 2)) % 2**fmt.element.bits
    with pytest.raises(Disagreement):
        problem.check(with_codes(q, codes))
