"""How cases are drawn: the structure by Hypothesis, shapes around tile edges, all data from one seed."""

import functools
import math
import random

from hypothesis import strategies as st

from ref.format import parse_format
from ref.rule import default_rule

from . import formats
from .case import DequantizeCase, LinearCase, PackCase, QuantizeCase, QuantizeInputCase, UnpackCase
from .formats import choose, generated, generated_activation, is_activation, matching_activations
from .regimes import RANDOM, SPECIAL

SEEDS = st.integers(0, 2**32 - 1)
TILES = (16, 32, 64, 128)
# n * k * m of a case stays below this: a few milliseconds, also in an interpreter.
LARGEST = 400_000

LINEAR_DATA = ("exact",) * 9 + ("one_hot", "one_hot", "unique") + RANDOM * 2 + SPECIAL
QUANTIZED_DATA = ("exact",) * 9 + RANDOM * 2
VALUE_DATA = ("normal", "normal", "positive", "heavy", "outlier", "huge", "tiny", "zero_row")


@functools.cache
def near(blocks, low, high):
    """Integers from low to high, half of them at, or one off, a multiple of a block; shrinks to small ones."""
    edges = sorted(
        {v for b in blocks for m in (1, 2) for v in (m * b - 1, m * b, m * b + 1) if low <= v <= high} | {low, min(low + 1, high)}
    )
    return st.one_of(st.integers(low, min(high, 40)), st.sampled_from(edges), st.sampled_from(edges), st.integers(low, high))


@st.composite
def columns(draw, *fmts):
    """k: around tile edges, or around multiples of a format's group; a multiple of every rotation's block."""
    block = math.lcm(*(max(f.hadamard, 1) for f in fmts))
    if block > 1:
        return block * draw(near((1, 2, 4), 1, max(1, 512 // block)))
    group = max(f.group[1] for f in fmts)
    if group and draw(st.booleans()):
        return max(1, group * draw(st.integers(1, max(1, min(5, 600 // group)))) + draw(st.sampled_from((0, 0, 1, -1, 4, 8))))
    return draw(near((*TILES, 256), 1, 600))


@st.composite
def rows(draw, cap):
    """m: around the tile edges of small batches; now and then 0."""
    m = draw(near((8, 16, 32), 1, min(40, cap)))
    return 0 if draw(st.integers(0, 15)) == 15 else m


@st.composite
def many_rows(draw):
    """m for kernels that come with a pool, which are compiled: one in three around their larger tiles."""
    if draw(st.integers(0, 2)) < 2:
        return draw(rows(40))
    return draw(st.one_of(st.sampled_from((63, 64, 65, 127, 128, 129, 255, 256, 257)), st.integers(41, 300)))


@st.composite
def leads(draw, m):
    """Leading dimensions whose product is m."""
    shapes = [(m,), (m,), (1, m), (m, 1)]
    shapes += [()] if m == 1 else [(2, m // 2)] if m % 2 == 0 else [(m, 1, 1)]
    return draw(st.sampled_from(shapes))


@st.composite
def configs(draw, label, quantized):
    """What a kernel has to be prepared for: (format, n, k, dtype, x_format, static)."""
    name = draw(choose(label, generated()))
    fmt = parse_format(name)
    x_name = None
    if quantized:
        x_name = draw(st.one_of(st.sampled_from(matching_activations(label)), st.sampled_from(formats.ACTIVATIONS), generated_activation()))
    x_format = None if x_name is None else parse_format(x_name)
    fmts = (fmt,) if x_format is None else (fmt, x_format)
    if draw(st.integers(0, 15)) == 15:  # long sums of few results: what an accumulator loses grows with k
        block = math.lcm(*(max(f.hadamard, 1) for f in fmts))
        n, k = draw(st.integers(1, 8)), draw(st.sampled_from((1024, 2048, 1600, 2000))) // block * block
    else:
        k = draw(columns(*fmts))
        n = draw(near(TILES[:3] if k > 200 else TILES, 1, 130))
    static = quantized and (x_format.scale_2 == "tensor" or (x_format.group == (0, 0) and draw(st.booleans())))
    return name, n, k, draw(st.sampled_from(("bf16", "bf16", "fp16", "fp16", "fp32"))), x_name, static


@st.composite
def linear_cases(draw, label, config=None, quantized=False):
    name, n, k, dtype, x_name, static = draw(configs(label, quantized) if config is None else config)
    fmt = parse_format(name)
    m = draw(rows(max(1, LARGEST // (n * k))) if config is None else many_rows())
    data = draw(st.sampled_from(QUANTIZED_DATA if x_name else LINEAR_DATA))
    if data == "subnormal_scale" and dtype == "fp16" and fmt.scale in ("fp32", "bf16", "e8m0"):
        data = "tiny"  # an fp16 result of such a scale is zero whatever the kernel does
    plain = draw(st.booleans())
    return LinearCase(
        n=n,
        k=k,
        format=name,
        lead=(m,) if plain else draw(leads(m)),
        x_format=x_name,
        static=static,
        dtype=dtype,
        bias=draw(st.sampled_from((None, None, dtype, dtype, "fp32", "bf16"))),
        order=bool(fmt.group[1]) and not plain and draw(st.integers(0, 3)) == 3,
        pad=0 if plain else draw(st.sampled_from((0, 1, 3, 8))),
        offset=0 if plain else draw(st.sampled_from((0, 1, 2, 8))),
        transposed=not plain and draw(st.integers(0, 3)) == 3,
        data=data,
        seed=draw(SEEDS),
    )


@st.composite
def quantize_input_cases(draw, label):
    name = draw(choose(label, generated_activation()))
    fmt = parse_format(name)
    k, m = draw(columns(fmt)), draw(rows(40))
    return QuantizeInputCase(
        k=k,
        format=name,
        lead=draw(leads(m)),
        static=fmt.scale_2 == "tensor" or (fmt.group == (0, 0) and draw(st.booleans())),
        dtype=draw(st.sampled_from(("bf16", "fp16", "fp32"))),
        pad=draw(st.sampled_from((0, 0, 1, 8))),
        offset=draw(st.sampled_from((0, 0, 1, 8))),
        data=draw(st.sampled_from(VALUE_DATA)),
        seed=draw(SEEDS),
    )


@st.composite
def weight_shapes(draw, fmt):
    k = draw(columns(fmt))
    n = draw(near(TILES[:2] if k > 100 else TILES, 1, 40 if k > 100 else 130))
    return n, k, draw(st.sampled_from((None, None, None, 1, 3))) if n * k < 4000 else None


@st.composite
def dequantize_cases(draw, label):
    name = draw(choose(label, generated()))
    fmt = parse_format(name)
    n, k, experts = draw(weight_shapes(fmt))
    return DequantizeCase(
        n=n,
        k=k,
        experts=experts,
        format=name,
        dtype=draw(st.sampled_from(("fp32", "bf16", "fp16", "fp64"))),
        order=bool(fmt.group[1]) and draw(st.integers(0, 3)) == 3,
        data=draw(st.sampled_from(("normal", "normal", "exact", "subnormal_scale"))),
        seed=draw(SEEDS),
    )


@st.composite
def quantize_cases(draw, label):
    name = draw(choose(label, generated()))
    fmt = parse_format(name)
    n, k, experts = draw(weight_shapes(fmt))
    return QuantizeCase(
        n=n,
        k=k,
        experts=experts,
        format=name,
        dtype=draw(st.sampled_from(("fp32", "bf16", "fp16"))),
        rule=draw(st.sampled_from((None, None, None, default_rule(fmt), "absmax" if fmt.zero is None else "minmax"))),
        rounding=draw(st.sampled_from((None, None, None, "nearest_even", "nearest_zero", "nearest_away", "truncate"))),
        data=draw(st.sampled_from(VALUE_DATA)),
        seed=draw(SEEDS),
    )


CODE_LEADS = st.sampled_from(((1,), (3,), (), (2, 5), (0,), (17,), (1, 1, 2)))
CODE_COLUMNS = near((8, 16, 32, 64, 128), 0, 300)


def pack_cases(label):
    integers = st.sampled_from(("uint8", "int32", "int64"))
    return st.builds(PackCase, st.just(bits_of(label)), CODE_LEADS, CODE_COLUMNS, integers, pad=st.sampled_from((0, 0, 1, 5)), seed=SEEDS)


def unpack_cases(label):
    return st.builds(
        UnpackCase, st.just(bits_of(label)), CODE_LEADS, CODE_COLUMNS, st.booleans(), pad=st.sampled_from((0, 0, 1, 5)), seed=SEEDS
    )


def bits_of(label):
    return int(label.split()[0])


def bit_labels(names):
    """The rows of pack and unpack: the widths of the formats' codes; all of them where formats are generated."""
    widths = set(range(1, 9)) if formats.GENERATED in names else {parse_format(name).element.bits for name in names}
    return [f"{bits} bits" for bits in sorted(widths)]


def activation_labels(names):
    """The rows of quantize_input: the usual activation formats; of formats given by name, those that it takes."""
    if formats.GENERATED in names:
        return [*formats.ACTIVATIONS, formats.GENERATED]
    return [name for name in names if is_activation(name)]


def pool(label, quantized, size, seed):
    """A strategy of `size` configurations, for implementations that take long to prepare one: compiled ones, on a GPU.

    One in four is as long along k, or as wide, as what kernels split among blocks, or have their largest tiles for; another one in four has
    float32 x.
    """
    found = []
    chooser = random.Random(f"{label} {quantized} {seed}")
    while len(found) < size:
        name = label if label != formats.GENERATED else chooser.choice(GENERATED_POOL)
        fmt = parse_format(name)
        x_name = None
        if quantized:
            matching = matching_activations(label)
            x_name = matching[(len(found) + seed) % len(matching)]
        group = max(fmt.group[1], 64)
        k = chooser.choice((group, 2 * group, 256 + group, 192)) + chooser.choice((0, 0, 0, 8))
        n, dtype = chooser.choice((128, 256, 64, 72, 130)), chooser.choice(("bf16", "bf16", "fp16"))
        if len(found) % 4 == 1:
            n, k = (8704, 512) if len(found) % 8 == 5 else (512, 4096)
        elif len(found) % 4 == 3:
            dtype = "fp32"
        k = math.ceil(k / max(fmt.hadamard, 1)) * max(fmt.hadamard, 1)
        whole = x_name is not None and parse_format(x_name).group == (0, 0)
        static = x_name is not None and (parse_format(x_name).scale_2 == "tensor" or (whole and chooser.random() < 0.5))
        found.append((name, n, k, dtype, x_name, static))
    return st.sampled_from(found)


# Generated formats of a pool: one of each kind of part.
GENERATED_POOL = (
    *("int5_g64_bf16", "uint3z_g32_fp16", "fp6_e3m2_g64", "fp8_e4m3_tensor", "int4_g16_e4m3_tensor2", "fp5_e2m2_g128_bf16"),
    *("uint2_g16_ofp32", "fp4_e2m1_g16_e4m3_tensor2div", "iq4nl_g32_fp16"),
)
