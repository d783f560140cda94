"""Declared accumulators: each model accepts the kernels that it describes, and the tighter ones refuse what the looser ones let pass."""

from dataclasses import replace

import pytest
import torch

from ref import quantize_input
from ref.element import decode
from ref.linear import linear_operands
from ref.pack import unpack
from ref.rounding import round_to

from .accumulators import MMA_16, MMA_FP8, Block
from .bounds import weight_parts
from .case import LinearCase
from .declaration import Declaration
from .emulate import block_sum, ieee_sum
from .ops import linear
from .ops.linear_data import draw
from .oracle import Disagreement
from .quantizer import step_of

DATA = ("exact", "one_hot", "normal", "positive", "heavy", "cancelling", "outlier", "huge", "tiny", "subnormal_scale")
EXACT_16 = replace(MMA_16, order="ascending", exact=True)
EXACT_FP8 = replace(MMA_FP8, order="ascending", exact=True)
SMALLEST = {"bf16": 2.0**-126, "fp16": 2.0**-14}


def rounded_weights(drawn, unit):
    """A kernel that rounds weights to x's dtype, sums in a unit and adds the bias in float32."""
    case = drawn.case
    w = linear_operands(drawn.x[:0], drawn.q, variant="weight_rounded")[1]
    y = block_sum(drawn.x.double(), w, unit, smallest=(SMALLEST[case.dtype],) * 2)
    y = y if drawn.bias is None else (y + drawn.bias.double()).float().double()
    return round_to(y, drawn.x.dtype)


def fp8_products(drawn, unit):
    """A kernel that quantizes x to e4m3, sums products of codes in a unit between the edges of groups, and scales the sums in float32."""
    q, x = drawn.q, quantize_input(drawn.x, drawn.case.x_format, drawn.x_scale)
    a = decode(unpack(x.packed, 8, x.shape[1]), x.format.element)
    value, _, scale, _ = weight_parts(q)
    group = q.format.group[1] or q.shape[1]
    total = torch.zeros(len(a), q.shape[0])
    for start in range(0, q.shape[1], group):
        block = slice(start, start + group)
        part = block_sum(a[:, block], value[:, block], unit, smallest=(2.0**-6, 2.0**-6))
        total += part.float() * scale.expand(value.shape)[:, start].float()
    total = total * step_of(x.scale, x.scale_2, x.format, x.shape)[:, :1].float()
    return round_to(total.double(), drawn.x.dtype)


def judge(drawn, y, accumulator, variants=None, device="cuda"):
    return linear.Truth(drawn, torch.device(device), Declaration(variants=variants, accumulator=accumulator)).check(y)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("data", DATA)
def test_a_16_bit_unit_is_accepted_by_each_of_its_models(data, dtype):
    for seed, bias in ((1, None), (2, "fp32")):
        drawn = draw(LinearCase(n=12, k=300, format="int4_g32", lead=(9,), dtype=dtype, data=data, bias=bias, seed=seed))
        y = rounded_weights(drawn, MMA_16)
        variants = ("exact",) if drawn.exact else ("weight_rounded",)
        for accumulator in (None, MMA_16, replace(MMA_16, order="ascending"), EXACT_16):
            judge(drawn, y, accumulator, variants)


@pytest.mark.parametrize("name", ["fp8", "fp8_e4m3_b128x128", "mxfp4", "int4_g128"])
@pytest.mark.parametrize("data", ["exact", "normal", "positive", "heavy", "outlier", "tiny", "zero_row"])
def test_an_fp8_unit_is_accepted_by_each_of_its_models(name, data):
    for seed in (1, 2):
        drawn = draw(LinearCase(n=12, k=300, format=name, lead=(9,), dtype="fp16", x_format="fp8_e4m3_token", data=data, seed=seed))
        y = fp8_products(drawn, MMA_FP8)
        for accumulator in (None, MMA_FP8, replace(MMA_FP8, order="ascending"), EXACT_FP8):
            judge(drawn, y, accumulator)


def refused(kernel, wrong, right, variants=None, **given):
    """By which accumulators some result of a kernel with the wrong unit is refused."""
    found = set()
    for seed in range(2):
        for data in ("normal", "positive"):
            drawn = draw(LinearCase(**{"n": 16, "k": 512, "lead": (16,), "seed": seed, "data": data} | given))
            for name, accumulator in right.items():
                try:
                    judge(drawn, kernel(drawn, wrong), accumulator, variants)
                except Disagreement:
                    found.add(name)
    return found


def test_tighter_models_refuse_more():
    fp8 = {"promoted": MMA_FP8, "in order": replace(MMA_FP8, order="ascending"), "exact": EXACT_FP8}
    given = {"format": "fp8", "x_format": "fp8_e4m3_token", "dtype": "bf16"}
    assert refused(fp8_products, MMA_FP8, fp8, **given) == set()
    assert refused(fp8_products, replace(MMA_FP8, promote=64), fp8, **given) == {"exact"}
    assert refused(fp8_products, Block(32, 10, 10, 128), fp8, **given) == {"in order", "exact"}
    assert refused(fp8_products, Block(32, 13, 13), fp8, **given | {"k": 2048, "n": 4, "lead": (4,)}) == set(fp8)
    bf16 = {"in order": replace(MMA_16, order="ascending"), "exact": EXACT_16}
    given = {"format": "int4_g32", "dtype": "fp16"}
    assert refused(rounded_weights, MMA_16, bf16, ("weight_rounded",), **given) == set()
    assert refused(rounded_weights, Block(16, 20, 20), bf16, ("weight_rounded",), **given) == {"in order", "exact"}


def test_ieee_is_declared_on_a_gpu():
    """Float32 sums pass; a unit of 13 bits, which a GPU may have where nothing is declared, does not."""
    given = {"n": 8, "k": 1024, "format": "fp8", "lead": (8,), "dtype": "fp16", "x_format": "fp8_e4m3_token", "data": "positive", "seed": 1}
    drawn = draw(LinearCase(**given))
    x, w = linear_operands(drawn.x, drawn.q, x_format=drawn.case.x_format)
    judge(drawn, round_to(ieee_sum(x, w, torch.arange(1024).flip(0)), torch.float16), "ieee")
    y = fp8_products(drawn, MMA_FP8)
    judge(drawn, y, None)
    with pytest.raises(Disagreement):
        judge(drawn, y, "ieee")


def test_what_is_declared_for_other_places_does_not_count():
    drawn = draw(LinearCase(n=8, k=256, format="fp8", lead=(8,), dtype="fp16", x_format="fp8_e4m3_token", data="positive", seed=1))
    y = fp8_products(drawn, MMA_FP8)
    judge(drawn, y, (("bf16", "ieee"), ("cpu float", "ieee"), ("mx* float", "ieee"), ("float", MMA_FP8)))
    with pytest.raises(Disagreement):
        judge(drawn, y, (("cuda fp8* float", "ieee"), ("float", MMA_FP8)))
