"""Cases of the grouped products, and how they are drawn."""

from dataclasses import dataclass, replace

from hypothesis import strategies as st

from ref.format import Format, parse_format

from .case import Case
from .formats import ACTIVATIONS, choose, generated, matching_activations, short
from .moe_case import Route
from .moe_strategies import routes
from .strategies import SEEDS, TILES, near

DATA = ("exact",) * 6 + ("one_hot",) * 2 + ("normal", "positive", "heavy", "cancelling", "outlier", "zero_row", "nan", "inf")
QUANTIZED_DATA = ("exact",) * 6 + ("normal", "positive", "heavy", "outlier", "zero_row")
NOBODY = Route()


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


@st.composite
def parts(draw, label, **limits):
    """What the cases of all three layouts have in common."""
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
def grouped_cases(draw, label, case=GroupedLinearCase):
    return case(**draw(parts(label, maps=False)), more=draw(st.sampled_from((0, 0, 1, 5))))


@st.composite
def indexed_cases(draw, label):
    block = draw(st.sampled_from((16, 16, 16, 32, 64, 1, 5, 8, 48)))
    whole = draw(st.booleans())
    return IndexedLinearCase(
        **draw(parts(label)),
        block_size=block,
        whole=whole,
        ignore=draw(st.booleans()),
        told=not whole or draw(st.booleans()),
        second=draw(st.integers(0, 3)) == 3,
        weights=draw(st.sampled_from((None, "fp32", "fp32", "bf16", "fp64"))),
    )
