"""Cases of fused_experts, and how they are drawn."""

import random
from dataclasses import dataclass, replace

from hypothesis import strategies as st

from ref.format import Format, parse_format
from ref.moe import ACTIVATIONS

from .case import Case
from .formats import GENERATED, choose, generated, short
from .grouped_case import POOLED
from .moe_case import Route
from .moe_strategies import routes
from .strategies import GENERATED_POOL, SEEDS, near

PLAIN = "plain"
EXACT_ACTIVATIONS = ("silu", "silu", "silu", "silu_no_mul", "relu2", "relu2_no_mul")
PARAMETERS = {
    "silu": ({}, {}, {"limit": 10.0}),
    "swigluoai": ({}, {"limit": 3.0, "alpha": 1.25, "beta": 0.5}),
    "swigluoai_uninterleave": ({"limit": 7.0}, {"limit": 2.0, "alpha": 1.0}),
    "swiglustep": ({}, {"limit": 2.0}),
    "situ": ({"beta": 2.0}, {"beta": 1.5, "up_beta": 3.0}),
}
DATA = ("exact",) * 6 + ("normal", "normal", "positive", "heavy", "outlier", "cancelling", "zero_row")
# With float32 scales, as quantizer.hull has to know how far they can be off.
X_FORMATS = ("int8_token", "fp8_e4m3_token", "fp8_e4m3_g128", "int8_g128", "int8_tensor", "int4_token")


@dataclass(frozen=True, repr=False)
class ExpertsCase(Case):
    """One call of fused_experts.

    h, n: columns of x and of the result. i: rows of each of gate and up. format: of both weights, or "plain": tensors of x's dtype.
    limit, alpha, beta, up_beta, x_format, on_input (apply_router_weight_on_input): as its arguments. bias: dtype of both, or None.
    dtype: of x. weights: of topk_weights. pad, offset, transposed: x is a view. data: a regime of ops.experts_data.
    """

    op = "fused_experts"
    route: Route = Route()  # noqa: RUF009 (it is frozen)
    h: int = 2
    i: int = 1
    n: int = 1
    format: str | Format | None = None
    x_format: str | Format | None = None
    activation: str = "silu"
    limit: float | None = None
    alpha: float | None = None
    beta: float | None = None
    up_beta: float | None = None
    on_input: bool = False
    bias: str | None = None
    dtype: str = "bf16"
    weights: str = "fp32"
    pad: int = 0
    offset: int = 0
    transposed: bool = False
    data: str = "exact"
    seed: int = 0

    @property
    def parameters(self):
        """The activation's parameters that are set."""
        given = {name: getattr(self, name) for name in ("limit", "alpha", "beta", "up_beta")}
        return {name: value for name, value in given.items() if value is not None}


@st.composite
def configs(draw, label):
    """What kernels have to be prepared for: (format, x_format, h, i, n, dtype)."""
    plain = label == PLAIN
    name = None if plain else short(replace(parse_format(draw(choose(label, generated()))), hadamard=0))
    x_name = None if plain or draw(st.integers(0, 2)) < 2 else draw(st.sampled_from(X_FORMATS))
    h = draw(near((16, 32, 64), 2, 130))
    i, other = draw(near((16, 32), 1, 70)), draw(near((16, 32), 1, 70))
    return name, x_name, h, i, h if draw(st.booleans()) else other, draw(st.sampled_from(("bf16", "bf16", "bf16", "fp16", "fp32")))


def pool(label, size, seed):
    """A strategy of `size` configurations, for implementations that take long to prepare one."""
    chooser, found = random.Random(f"{label} {seed}"), []
    while len(found) < size:
        name = None if label == PLAIN else label if label != GENERATED else chooser.choice(GENERATED_POOL)
        x_name = None if name is None or len(found) % 2 == 0 else chooser.choice(X_FORMATS)
        h, i, n = (chooser.choice(sizes) for sizes in ((128, 256, 192, 136), (64, 128, 192), (128, 64, 72, 130)))
        found.append((name, x_name, h, i, n, chooser.choice(("bf16", "bf16", "fp16"))))
    return st.sampled_from(found)


@st.composite
def experts_cases(draw, label, config=None):
    name, x_name, h, i, n, dtype = draw(configs(label) if config is None else config)
    route = draw(routes(slots=64, tokens=24, experts=6, most_t=4) if config is None else routes(slots=900, tokens=24, experts=6, most_t=4))
    if config is not None:
        ranks = min(route.ranks, 3)
        route = replace(route, e=POOLED * max(ranks, 1), ranks=ranks, rank=min(route.rank, max(ranks - 1, 0)))
    data = draw(st.sampled_from(DATA))
    exactly = ("silu",) if x_name else EXACT_ACTIVATIONS
    activation = draw(st.sampled_from(exactly if data == "exact" else tuple(ACTIVATIONS)))
    if config is not None and not ACTIVATIONS[activation].gated:
        activation = activation.removesuffix("_no_mul")
    given = draw(st.sampled_from(PARAMETERS.get(activation, ({},))))
    if data == "exact":
        given = draw(st.sampled_from(({}, {}, {"limit": 64.0}))) if activation == "silu" and not x_name else {}
    if dtype == "fp16" and data in ("heavy", "outlier"):
        data = "normal"  # what float16 has no number for is not to be compared
    viewed = draw(st.integers(0, 3)) == 3
    return ExpertsCase(
        route=route,
        h=h,
        i=i,
        n=n,
        format=name,
        x_format=x_name,
        activation=activation,
        **given,
        on_input=route.t == 1 and draw(st.booleans()),
        bias=None if x_name and data == "exact" else draw(st.sampled_from((None, None, None, dtype, "fp32"))),
        dtype=dtype,
        weights=draw(st.sampled_from(("fp32", "fp32", dtype))),
        pad=draw(st.sampled_from((1, 3, 8))) if viewed else 0,
        offset=draw(st.sampled_from((0, 1, 2, 8))) if viewed else 0,
        transposed=viewed and draw(st.booleans()),
        data=data,
        seed=draw(SEEDS),
    )
