"""How cases of the MoE operations are drawn: empty experts by construction (cut points), empty slots by a bit mask."""

from hypothesis import strategies as st

from ref.moe import ACTIVATIONS, SCORING
from ref.moe.expert_map import PLACEMENTS

from .moe_case import (
    ActivationCase,
    AlignCase,
    BatchedAlignCase,
    ExpertMapCase,
    HashTopkCase,
    MulSumCase,
    PermuteCase,
    Route,
    ScatterCase,
    TopkCase,
    UnpermuteCase,
)
from .strategies import SEEDS, leads, near

ROWS = (8, 16, 32)
# Which of 32 slots in a row are empty: none, one, any, all.
BITS = st.integers(0, 31).map(lambda bit: 1 << bit)
MASKS = st.one_of(st.just(0), st.just(0), BITS, BITS, st.integers(1, 2**32 - 1), st.sampled_from((0, 1, 2**32 - 1)))
# Engines write -1; any negative number is an empty slot.
EMPTY = st.sampled_from((-1, -1, -2, -(2**31)))
FLOATS = st.sampled_from(("bf16", "fp16", "fp32", "fp32"))
# Regimes of ops.moe_sum_data.
SUM_DATA = ("exact", "exact", "exact", "normal", "normal", "cancelling", "huge", "tiny", "nan", "inf")
WEIGHTS = st.sampled_from(("fp32", "fp32", "fp32", "bf16", "fp16", "fp64"))


@st.composite
def routes(draw, slots=160, tokens=40, experts=9, most_t=5, maps=True):
    """A Route of at most so many slots, tokens, experts and slots of a token.

    Now and then it has no token, or all go to one expert; where `slots` allows 600, two of six have that many.
    """
    e, t = draw(st.integers(1, experts)), draw(st.integers(1, most_t))
    kind = draw(st.sampled_from(("any", "any", "many", "none", "one", "many")))
    m = 0 if kind == "none" and draw(st.booleans()) else draw(near(ROWS, 1, max(1, min(tokens, slots // t))))
    if kind == "many" and slots >= 600:
        # Around what kernels sort at a time.
        t = min(t, 2)
        m = draw(st.one_of(st.sampled_from((128, 129, 256, 257)), st.integers(100, 600 // t)))
    distinct = draw(st.booleans()) and t <= e
    end = m if distinct else m * t
    cuts = draw(st.lists(st.one_of(st.integers(0, end), st.sampled_from((0, end))), max_size=e - 1)) if e > 1 else []
    if kind == "one" and e > 1:
        cuts = [0] * draw(st.integers(0, e - 1))
    ranks, rank = 0, 0
    if maps and draw(st.booleans()):
        ranks = draw(st.sampled_from((1, 2, 2, 3, e, e + 1)))
        rank = draw(st.integers(0, ranks - 1))
    return Route(
        m=m,
        t=t,
        e=e,
        cuts=tuple(sorted(cuts)),
        mixed=draw(st.booleans()),
        distinct=distinct,
        neg=draw(MASKS),
        empty=draw(EMPTY),
        ranks=ranks,
        rank=rank,
        placement=draw(st.sampled_from(("linear", "round_robin", "shuffled"))) if ranks else "linear",
        int64=draw(st.booleans()),
        map_int64=bool(ranks) and draw(st.booleans()),
    )


# Regimes of ops.moe_activation.
ACTIVATION_DATA = ("normal", "far", "far", "wide", "mixed", "mixed", "mixed", "huge", "small", "nan", "inf")

# Few rows, for kernels whose programs are rows: an interpreter runs them one after the other.
SMALL = routes(slots=40, tokens=12)
SMALL_SUMS = routes(slots=40, tokens=9, most_t=9)

BLOCKS = st.sampled_from((1, 2, 3, 4, 8, 16, 32, 64))
COLUMNS = near((16, 32, 64, 128), 1, 300)
VIEWS = {"pad": st.sampled_from((0, 0, 1, 3, 8)), "offset": st.sampled_from((0, 0, 1, 8)), "seed": SEEDS}


# Regimes of ops.fused_topk.
LOGITS = ("integers", "ties", "ties", "equal", "normal", "normal", "low", "close", "wide", "masked", "nan", "inf")
RENORMALIZE = st.sampled_from((True, True, False, "sum", "sum_1e-20"))
# float32 holds them.
FACTORS = st.sampled_from((1.0, 1.0, 2.5, 0.5))


@st.composite
def topk_cases(draw, scoring):
    """Experts around the width of vectors and of powers of two; groups are of two experts or more, but one of the times."""
    m = 0 if draw(st.integers(0, 15)) == 15 else draw(near(ROWS, 1, 34))
    groups = draw(st.sampled_from((0, 0, 1, 2, 4, 8)))
    e = draw(near((8, 16, 64), 1, 40 if m > 4 else 130))
    kept = draw(st.integers(1, groups)) if groups else 0
    if groups:
        e = groups * draw(st.sampled_from((1, 2, 2, 3, 4)))
    return TopkCase(
        m=m,
        e=e,
        top_k=draw(st.integers(1, min(8, e // groups * kept if groups else e))),
        renormalize=draw(RENORMALIZE),
        scoring_func=scoring,
        bias=draw(st.sampled_from((None, None, "fp32", "fp32", "bf16"))),
        groups=groups,
        topk_group=kept,
        data=draw(st.sampled_from(LOGITS)),
        transposed=draw(st.integers(0, 7)) == 7,
        **draw(routing_parts(m)),
    )


@st.composite
def routing_parts(draw, m):
    """What fused_topk and hash_topk share."""
    shared = draw(st.sampled_from((0, 0, 0, 1, 2)))
    found = {"factor": draw(FACTORS), "shared": shared, "shared_weight": draw(st.sampled_from((1.0, 0.25))) if shared else 1.0}
    found |= {"num_valid": draw(st.one_of(st.none(), st.none(), st.integers(0, m))), "dtype": draw(FLOATS)}
    return found | {"pad": draw(VIEWS["pad"]), "seed": draw(SEEDS)}


@st.composite
def hash_topk_cases(draw):
    m = 0 if draw(st.integers(0, 15)) == 15 else draw(near(ROWS, 1, 34))
    e = draw(near((8, 16), 1, 40))
    return HashTopkCase(
        m=m,
        e=e,
        top_k=draw(st.integers(1, min(8, e))),
        vocabulary=draw(st.integers(1, 20)),
        renormalize=draw(RENORMALIZE),
        scoring_func=draw(st.sampled_from(SCORING)),
        int64=draw(st.booleans()),
        data=draw(st.sampled_from(LOGITS)),
        **draw(routing_parts(m)),
    )


def align_cases():
    route = st.one_of(routes(), routes(slots=600))
    return st.builds(AlignCase, route, BLOCKS, st.booleans(), st.booleans(), SEEDS)


@st.composite
def batched_align_cases(draw):
    most = draw(near((8, 16), 1, 20))
    count = st.one_of(st.integers(0, most), st.sampled_from((0, most)))
    counts = tuple(draw(st.lists(count, max_size=8)))
    return BatchedAlignCase(max_tokens=most, block_size=draw(BLOCKS), counts=counts, int64=draw(st.booleans()), seed=draw(SEEDS))


def permute_cases():
    route = st.integers(0, 11).flatmap(lambda i: routes(slots=600) if i == 11 else SMALL)
    aligns = st.sampled_from((1, 1, 2, 3, 4))
    k = near((16, 32, 64), 1, 80)
    return st.builds(PermuteCase, route, k, FLOATS, aligns, st.booleans(), st.booleans(), **VIEWS)


def scatter_cases():
    k = near((16, 32, 64), 1, 80)
    return st.builds(ScatterCase, SMALL, k, FLOATS, st.integers(0, 3), st.booleans(), **VIEWS)


def unpermute_cases():
    aligns, data = st.sampled_from((1, 1, 2, 4)), st.sampled_from(SUM_DATA)
    return st.builds(UnpermuteCase, SMALL_SUMS, COLUMNS, FLOATS, WEIGHTS, aligns, data=data, **VIEWS)


@st.composite
def mul_sum_cases(draw):
    layout = draw(st.sampled_from(("rows", "rows", "rows", "slots", "columns", "far", "far slots")))
    far = layout.startswith("far")
    route = draw(routes(slots=24, tokens=4) if far else SMALL_SUMS)
    k = draw(near((16, 32, 64), 1, 80) if far else COLUMNS)
    pad, offset, seed = (draw(VIEWS[name]) for name in ("pad", "offset", "seed"))
    ids, dtype, weights, data = draw(st.integers(0, 3)) > 0, draw(FLOATS), draw(WEIGHTS), draw(st.sampled_from(SUM_DATA))
    return MulSumCase(route, k, dtype, weights, ids, layout, pad, offset, data, seed)


@st.composite
def expert_map_cases(draw):
    ranks = draw(st.integers(1, 9))
    return ExpertMapCase(draw(near((8, 64), 0, 130)), ranks, draw(st.integers(0, ranks - 1)), draw(st.sampled_from(PLACEMENTS)))


# Parameters that float32 holds, and 1.702, which it does not.
LIMITS = st.sampled_from((7.0, 7.0, 1.0, 0.5, 10.0))
QUANTIZED = ("int8_token", "fp8_e4m3_token", "fp8_e4m3_g128", "int8_g32", "mxfp8")


@st.composite
def activation_cases(draw):
    activation = draw(st.sampled_from(("silu", "silu", "silu", *ACTIVATIONS)))
    described = ACTIVATIONS[activation]
    values = {"limit": LIMITS, "alpha": st.sampled_from((1.702, 1.0)), "beta": st.sampled_from((1.0, 4.0, 0.25, 2.0))}
    values["up_beta"] = st.sampled_from((1.0, 2.0, 25.0))
    given = {}
    for name in described.takes:
        if name in described.needs or draw(st.booleans()):
            given[name] = draw(values[name])
    m = 0 if draw(st.integers(0, 15)) == 15 else draw(near((4, 8), 1, 9))
    quantized = m > 0 and draw(st.integers(0, 7)) == 7
    return ActivationCase(
        n=draw(near((16, 64, 128), 1, 200)),
        lead=draw(leads(m)),
        activation=activation,
        **given,
        format=draw(st.sampled_from(QUANTIZED)) if quantized else None,
        dtype=draw(FLOATS),
        pad=draw(VIEWS["pad"]),
        offset=draw(VIEWS["offset"]),
        transposed=draw(st.integers(0, 7)) == 7,
        data="normal" if quantized else draw(st.sampled_from(ACTIVATION_DATA)),
        seed=draw(SEEDS),
    )
