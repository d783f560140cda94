"""Cases of the grouped products, and how they are drawn."""

import random
from dataclasses import dataclass, replace

from hypothesis import strategies as st

from ref.format import Format, parse_format

from .case import Case
from .formats import ACTIVATIONS, GENERATED, choose, generated, matching_activations, short
from .moe_case import Route
from .moe_strategies import routes
from .strategies import GENERATED_POOL, SEEDS, TILES, near

DATA = ("exact",) * 6 + ("one_hot",) * 2 + ("normal", "positive", "heavy", "cancelling", "outlier", "zero_row", "nan", "inf")
QUANTIZED_DATA = ("exact",) * 6 + ("normal", "positive", "heavy", "outlier", "zero_row")
NOBODY = Route()
# Experts of a rank where configurations come from a pool: kernels are made for a number of them.
POOLED = 4


@dataclass(frozen=True, repr=False)
class GroupedLinearCase(Case):
    """One call of grouped_linear: the rows of each expert one behind the other, `more` rows behind them.

    route: how many rows each expert has. n, k, format: of each expert's weight. x_format, static: how x is quantized first, and whether
    x_scale is given. dtype: of x. bias: its dtype, or None. int64: dtype of offsets and counts, else int32.
    pad, offset, transposed: x is a view. data: a regime of ops.linear_data. seed: of all tensors.
    """

    op = "grouped_linear"
    route: Route = NOBODY
    n: int = 1
    k: int = 1
    format: str | Format = "int8"
    x_format: str | Format | None = None
    static: bool = False
    dtype: str = "bf16"
    bias: str | None = None
    more: int = 0
    int64: bool = False
    pad: int = 0
    offset: int = 0
    transposed: bool = False
    data: str = "exact"
    seed: int = 0


@dataclass(frozen=True, repr=False)
class MaskedLinearCase(GroupedLinearCase):
    """One call of masked_linear: planes that hold `more` rows beyond those of the fullest expert."""

    op = "masked_linear"


@dataclass(frozen=True, repr=False)
class IndexedLinearCase(GroupedLinearCase):
    """One call of indexed_linear, on blocks of moe_align_block_size.

    block_size, whole, ignore: its block_size, pad_sorted_ids and ignore_invalid_experts. told: the product is told block_size.
    second: a row of x for each slot (top_k = 1), else for each token. weights: dtype of topk_weights, or None.
    """

    op = "indexed_linear"
    block_size: int = 16
    whole: bool = True
    ignore: bool = False
    told: bool = False
    second: bool = False
    weights: str | None = None


def pool(label, size, seed):
    """A strategy of `size` configurations, for implementations that take long to prepare one: compiled ones, on a GPU."""
    chooser, found = random.Random(f"{label} {seed}"), []
    while len(found) < size:
        name = label if label != GENERATED else chooser.choice(GENERATED_POOL)
        x_name = chooser.choice(matching_activations(label)) if len(found) % 4 == 3 else None
        fmt = parse_format(name) if x_name is None else replace(parse_format(name), hadamard=0)
        unit = max(fmt.hadamard, 1)
        dtype = "fp32" if len(found) % 4 == 2 else chooser.choice(("bf16", "bf16", "fp16"))
        found.append(
            (short(fmt), x_name, chooser.choice((128, 256, 72, 130)), -(-chooser.choice((128, 256, 192, 136)) // unit) * unit, dtype)
        )
    return st.sampled_from(found)


@st.composite
def pooled(draw, config, **limits):
    """parts of a configuration from a pool: for a number of experts, now and then with many rows."""
    name, x_name, n, k, dtype = draw(config)
    route = draw(routes(slots=900, tokens=40, experts=POOLED, most_t=3, **limits))
    ranks = min(route.ranks, 3)
    route = replace(route, e=POOLED * max(ranks, 1), cuts=route.cuts, ranks=ranks, rank=min(route.rank, max(ranks - 1, 0)))
    x_format = None if x_name is None else parse_format(x_name)
    return {
        "route": route,
        "n": n,
        "k": k,
        "format": name,
        "x_format": x_name,
        "static": x_format is not None and (x_format.group == (0, 0) or x_format.scale_2 == "tensor"),
        "dtype": dtype,
        "bias": draw(st.sampled_from((None, None, dtype, "fp32"))),
        "int64": draw(st.booleans()),
        "data": draw(st.sampled_from(QUANTIZED_DATA if x_name else DATA)),
        "seed": draw(SEEDS),
    }


@st.composite
def parts(draw, label, config=None, **limits):
    """What the cases of all three layouts have in common."""
    if config is not None:
        return draw(pooled(config, **limits))
    name = draw(choose(label, generated()))
    x_name, static = None, False
    if draw(st.integers(0, 3)) == 3:
        x_name = draw(st.one_of(st.sampled_from(matching_activations(label)), st.sampled_from(ACTIVATIONS)))
        static = parse_format(x_name).group == (0, 0) or parse_format(x_name).scale_2 == "tensor"
        # A rotation of both sides is linear_x's business.
        name = short(replace(parse_format(name), hadamard=0))
    fmt = parse_format(name)
    unit, group = max(fmt.hadamard, 1), fmt.group[1]
    k = unit * draw(near((1, 2), 1, max(1, 192 // unit))) if unit > 1 else draw(near(TILES, 1, 200))
    if 1 < group <= 128 and unit == 1 and draw(st.booleans()):
        k = group * draw(st.integers(1, max(1, 200 // group))) + draw(st.sampled_from((0, 0, 1, -1)))
    dtype = draw(st.sampled_from(("bf16", "bf16", "fp16", "fp32")))
    viewed = draw(st.integers(0, 3)) == 3
    return {
        "route": draw(routes(slots=48, tokens=40, experts=5, most_t=3, **limits)),
        "n": draw(near((16, 32), 1, 40)),
        "k": max(1, k),
        "format": name,
        "x_format": x_name,
        "static": static,
        "dtype": dtype,
        "bias": draw(st.sampled_from((None, None, dtype, "fp32"))),
        "int64": draw(st.booleans()),
        "pad": draw(st.sampled_from((0, 1, 3, 8))) if viewed else 0,
        "offset": draw(st.sampled_from((0, 1, 2, 8))) if viewed else 0,
        "transposed": viewed and draw(st.booleans()),
        "data": draw(st.sampled_from(QUANTIZED_DATA if x_name else DATA)),
        "seed": draw(SEEDS),
    }


@st.composite
def grouped_cases(draw, label, config=None, case=GroupedLinearCase):
    return case(**draw(parts(label, config, maps=False)), more=draw(st.sampled_from((0, 0, 1, 5))))


@st.composite
def indexed_cases(draw, label, config=None):
    block = draw(st.sampled_from((16, 16, 16, 32, 64, 1, 5, 8, 48) if config is None else (16, 32, 64, 128, 16, 8, 48)))
    whole = draw(st.booleans())
    return IndexedLinearCase(
        **draw(parts(label, config)),
        block_size=block,
        whole=whole,
        ignore=draw(st.booleans()),
        told=not whole or draw(st.booleans()),
        second=draw(st.integers(0, 3)) == 3,
        weights=draw(st.sampled_from((None, "fp32", "fp32", "bf16", "fp64"))),
    )
