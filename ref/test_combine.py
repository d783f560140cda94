"""Stacks, fused shards, chosen rows and slices of columns stand for the same numbers as their parts."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.formats import generated
from conformance.weights import draw_weight

from .combine import by_row, fuse, stack, take_columns, take_rows
from .format import FORMATS, Format, parse_format
from .qtensor import equal, validate
from .quantize import dequantize, quantize

SEEDS = st.integers(0, 2**16)


def same(got, expected):
    return torch.equal(dequantize(validate(got)), expected)


@st.composite
def shards(draw):
    """Some weights of one format and k."""
    fmt, k, order, seed = parse_format(draw(generated())), 64 * draw(st.integers(1, 2)), draw(st.booleans()), draw(SEEDS)
    rows = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    qs = [draw_weight(seed + i, fmt, (n, k), order=order) for i, n in enumerate(rows)]
    return [replace(q, group_index=qs[0].group_index) for q in qs]


@settings(max_examples=150)
@given(shards())
def test_fused_shards_keep_their_own_scales(qs):
    assert same(fuse(qs), torch.cat([dequantize(q) for q in qs]))
    assert fuse(qs[:1]) is qs[0]


@settings(max_examples=100)
@given(generated(), st.integers(1, 3), st.booleans(), SEEDS)
def test_a_stack_is_its_experts(fmt, e, order, seed):
    qs = [draw_weight(seed + i, fmt, (5, 64), order=order) for i in range(e)]
    q = stack(qs)
    assert q.shape == (e, 5, 64) and same(q, torch.stack([dequantize(q) for q in qs]))
    assert same(fuse([q, q]), torch.cat([dequantize(q)] * 2, dim=1))


@settings(max_examples=100)
@given(generated(), st.lists(st.integers(0, 9), max_size=12), st.booleans(), SEEDS)
def test_rows_in_any_order(fmt, index, order, seed):
    q = draw_weight(seed, fmt, (10, 64), order=order)
    for one in (q, stack([q, q])):
        assert same(take_rows(one, torch.tensor(index, dtype=torch.long)), dequantize(one)[..., index, :])
    assert same(by_row(q), dequantize(q))


@settings(max_examples=100)
@given(generated(), st.integers(0, 12), st.integers(0, 12), SEEDS)
def test_rows_that_are_neighbours(fmt, a, b, seed):
    q, rows = draw_weight(seed, fmt, (12, 64)), torch.arange(min(a, b), max(a, b))
    taken = take_rows(q, rows)
    assert same(taken, dequantize(q)[rows])
    gn = q.format.group[0]
    assert not len(rows) or gn == 0 or taken.format.group[0] == (1 if min(a, b) % gn else gn)


# Borders on and off words and groups, in the first group and in the last one, which is partial.
BORDERS = ((0, 300), (0, 128), (128, 300), (128, 256), (64, 192), (32, 96), (40, 104), (7, 300), (1, 2), (299, 300), (150, 150), (256, 290))


@pytest.mark.parametrize("name", [*FORMATS, "int5_g32", "int7_b2x64", "uint6z_b3x48", "fp8_e4m3_tensor", "int4_g32_tensor2div"])
@pytest.mark.parametrize("order", [False, True])
def test_columns_of_every_format(name, order):
    for shape in ((5, 300), (2, 5, 300)):
        q = draw_weight(3, name, shape, order=order)
        w = dequantize(q)
        for start, stop in BORDERS:
            assert same(take_columns(q, start, stop), w[..., start:stop])
        assert take_columns(q, 0, 300) is q


@settings(max_examples=150)
@given(generated(), st.integers(0, 100), st.integers(0, 100), st.booleans(), st.booleans(), SEEDS)
def test_columns_of_any_format(fmt, a, b, order, stacked, seed):
    fmt = replace(parse_format(fmt), hadamard=0)
    q = draw_weight(seed, fmt, (3, 100), order=order)
    q = stack([q, draw_weight(seed + 1, fmt, (3, 100), order=order)]) if stacked else q
    start, stop = min(a, b), max(a, b)
    assert same(take_columns(q, start, stop), dequantize(q)[..., start:stop])


def test_what_slicing_makes_of_groups():
    q = quantize(torch.randn(4, 256), "int4_g128")
    made = {(0, 64): 128, (128, 200): 128, (64, 256): 64, (96, 256): 32, (1, 9): 1}
    assert {borders: take_columns(q, *borders).format.group[1] for borders in made} == made
    index = torch.arange(256, dtype=torch.int32) % 2
    ordered = take_columns(replace(q, group_index=index), 0, 128)
    assert ordered.format.group == (1, 64) and torch.equal(ordered.group_index, index[:128])
    sorted_by_group = take_columns(replace(q, group_index=index.sort().values), 128, 256)
    assert sorted_by_group.format.group == (1, 128) and not sorted_by_group.group_index.any()
    assert take_columns(q, 128, 256).packed.is_contiguous()


def test_columns_that_cannot_be_taken():
    q = quantize(torch.ones(4, 64), "int4_g32")
    for start, stop in ((-1, 4), (3, 2), (0, 65)):
        with pytest.raises(ValueError, match=rf"take_columns: got columns {start} to {stop} of a weight with k=64"):
            take_columns(q, start, stop)
    q = quantize(torch.randn(4, 64), "int4_g32_h16")
    assert torch.equal(dequantize(take_columns(q, 16, 64)), dequantize(q)[:, 16:])
    for start, stop in ((8, 64), (16, 40)):
        with pytest.raises(ValueError, match="cut a block of 16 that was rotated together; both must be multiples of it"):
            take_columns(q, start, stop)


def test_what_fusing_makes_of_scales():
    ones = torch.ones(4, 64)
    made = {
        ("fp8_e4m3_tensor", 4): "fp8",
        ("nvfp4", 4): "fp4_e2m1_channel2_g16_e4m3",
        ("fp4_e2m1_g16_e4m3_tensor2div", 4): "fp4_e2m1_channel2div_g16_e4m3",
        ("fp8_e4m3_b2x32", 4): "fp8_e4m3_b2x32",
        ("fp8_e4m3_b2x32", 3): "fp8_g32",
        ("int4_g32", 3): "int4_g32",
    }
    for (name, n), fused in made.items():
        q = quantize(ones[:n], name)
        assert fuse([q, q]).format == parse_format(fused), name
    for names in (("fp8_e4m3_b2x32", "fp8_g32"), ("fp8_e4m3_b4x32", "fp8_e4m3_b2x32"), ("nvfp4", "fp4_e2m1_channel2_g16_e4m3")):
        qs = [quantize(ones, name) for name in names]
        assert fuse(qs).format.group[0] == 1 and same(fuse(qs), torch.cat([dequantize(q) for q in qs]))
    assert equal(fuse([quantize(ones, "int4_g32"), quantize(2 * ones, "int4_g32")]), quantize(torch.cat([ones, 2 * ones]), "int4_g32"))


def test_what_does_not_go_together():
    a, b = quantize(torch.ones(4, 64), "int4_g32"), quantize(torch.ones(4, 64), "int4_g16")
    ordered = [replace(a, group_index=torch.tensor(g, dtype=torch.int32)) for g in ([0] * 32 + [1] * 32, [1] * 32 + [0] * 32)]
    for operation in (stack, fuse):
        name = operation.__name__
        with pytest.raises(ValueError, match=f"{name}: got no QTensor"):
            operation([])
        with pytest.raises(ValueError, match=f"{name}: got formats int4_g32 and int4_g16"):
            operation([a, b])
        with pytest.raises(ValueError, match=f"{name}: some have a group_index"):
            operation([a, ordered[0]])
        with pytest.raises(ValueError, match=rf"{name}: got shapes \(4, 64\) and \(4, 32\)"):
            operation([a, quantize(torch.ones(4, 32), "int4_g32")])
    with pytest.raises(ValueError, match="different group_index"):
        fuse(ordered)
    assert stack(ordered).group_index.shape == (2, 64)
    with pytest.raises(ValueError, match="stack: got shapes"):
        stack([a, quantize(torch.ones(3, 64), "int4_g32")])
    for index in ([4], [-1], [[0]]):
        with pytest.raises(ValueError, match=r"take_rows: .*\[0, 4\)"):
            take_rows(a, torch.tensor(index))


def test_offset_goes_with_neither_zero_nor_scale_2():
    element = parse_format("uint4").element
    for other in ({"zero": "int"}, {"scale_2": "tensor"}):
        with pytest.raises(ValueError, match="without zero and scale_2"):
            Format(element, offset="fp16", **other)
