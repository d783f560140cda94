"""What is checked of several ranks: each case computes something on all of them, and on this one alone, and compares.

Weights, activations and tokens are small integers where a name says "exact": every sum then is exact, in whatever order, and results must
be equal, bit for bit. Where it says "random" they are normal: equal where the same sums are made, else within the bound that
RowParallelLinear states.
"""

import functools

import torch

from ref.element import value_list
from ref.format import SCALE_DTYPES, parse_format
from ref.qtensor import QTensor

from ..codes import pack
from ..eager import dequantize
from ..layers.experts import FusedExperts
from ..layers.shards import shard
from ..linear import linear
from ..moe.expert_map import expert_map
from ..moe.experts import fused_experts
from ..quantize import quantize
from .experts import ExpertParallel, take_experts
from .tensor import ColumnParallelLinear, RowParallelLinear

# Borders of 2 and 4 ranks lie inside of groups of 128 and blocks; those of the second shape anywhere, and ranks have different sizes.
SHAPES = ((256, 384), (131, 390))
FORMATS = ("int4_g128", "fp8_e4m3_b128x128", "nvfp4", "uint4z_g128", "int3_g32", "int8", "int4_tensor", "mxfp4", "uint4_g32_fp16_ofp16")
# Kernels compile at their first call, a second or two each.
CUDA_FORMATS = FORMATS[:4]
# Tokens of each rank, from the first on; who has which experts.
ROUTES = {
    "even": {"experts": 8, "tokens": (6, 6, 6, 6)},
    "uneven, a rank without tokens": {"experts": 5, "tokens": (7, 0, 3, 1), "placement": "round_robin"},
    "all tokens to one expert": {"experts": 8, "tokens": (5, 9, 2, 4), "only": 6},
    "fewer experts than ranks": {"experts": 1, "tokens": (3, 2, 0, 5)},
    "padding": {"experts": 6, "tokens": (8, 8, 8, 8), "padding": True},
    "no tokens": {"experts": 4, "tokens": (0, 0, 0, 0)},
}


def cases(device):
    """(name, function) of everything that is checked; function(rank, size, device) returns what is wrong, or None."""
    formats = FORMATS if device.type == "cpu" else CUDA_FORMATS
    shapes = [(n, k, name) for n, k in SHAPES for name in formats if device.type == "cpu" or (n, k) == SHAPES[0] or name == FORMATS[0]]
    for axis, layer in (("column", column), ("row", row)):
        for n, k, name in shapes:
            yield f"{axis} {name} {n}x{k} exact", functools.partial(layer, n=n, k=k, format=name, exact=True)
            yield f"{axis} {name} {n}x{k} random", functools.partial(layer, n=n, k=k, format=name, exact=False)
        yield (
            f"{axis} int4_g128, static int8 x, exact",
            functools.partial(layer, n=64, k=256, format="int4_g128", exact=True, x_format="int8_tensor"),
        )
        yield f"{axis} int4_g128 3x3 exact", functools.partial(layer, n=3, k=3, format="int4_g128", exact=True)
    yield "row int4_g128, int8 tokens, random", functools.partial(row_of_tokens, n=64, k=384)
    for route, given in ROUTES.items():
        yield f"experts, {route}, exact", functools.partial(experts, **given)
    yield "experts, int8 x, exact", functools.partial(experts, **ROUTES["padding"], format="int8", x_format="int8_token")
    if device.type == "cpu":
        yield "experts, random", functools.partial(experts, **ROUTES["padding"], exact=False)


def column(rank, size, device, n, k, format, exact, x_format=None):
    x, q, bias, x_scale = _linear(n, k, format, exact, x_format, device)
    given = {"x_format": x_format, "x_scale": x_scale}
    one = linear(x, q, bias, **given)
    # On the CPU a column's sum is the same one; a GPU's kernels may sum otherwise for another number of columns.
    bound = torch.zeros_like(one) if exact or device.type == "cpu" else _rounded(one, 2 * _sums(x, q))
    own = shard(q, "n", rank, size), bias.tensor_split(size)[rank]
    part, whole = (ColumnParallelLinear(*own, gather_output=gather, **given)(x) for gather in (False, True))
    mine = (t.tensor_split(size, -1)[rank] for t in (one, bound))
    return _compare(part, *mine) or _compare(whole, one, bound)


def row(rank, size, device, n, k, format, exact, x_format=None):
    x, q, bias, x_scale = _linear(n, k, format, exact, x_format, device)
    given = {"x_format": x_format, "x_scale": x_scale}
    one = linear(x, q, bias, **given)
    many = RowParallelLinear(shard(q, "k", rank, size), bias, **given)(x.tensor_split(size, -1)[rank])
    return _compare(many, one, torch.zeros_like(one) if exact else _row_bound(x, q, bias, one, size))


def row_of_tokens(rank, size, device, n, k):
    """Each rank quantizes its own columns: the parts are what linear computes of these, and the sum is within its roundings."""
    x, q, bias, _ = _linear(n, k, "int4_g128", False, None, device)
    mine = [part.contiguous() for part in x.tensor_split(size, -1)]
    parts = torch.stack([linear(mine[r], shard(q, "k", r, size), x_format="int8_token").double() for r in range(size)])
    many = RowParallelLinear(shard(q, "k", rank, size), bias, x_format="int8_token")(mine[rank])
    total = parts.sum(0) + bias.double()
    added = _added(size, parts.abs().sum(0) + bias.abs())
    return _compare(many.double(), total, added + _half_ulp(total.abs() + added, x.dtype))


def _row_bound(x, q, bias, one, size):
    """RowParallelLinear's bound, and one rank's own: |many - one| is at most their sum."""
    parts = [a.double() @ w.T for a, w in zip(x.tensor_split(size, -1), dequantize(q).tensor_split(size, -1), strict=True)]
    error = _sums(x, q)
    rounded = sum(_half_ulp(part.abs() + error, x.dtype) for part in parts)
    added = _added(size, sum(part.abs() for part in parts) + error + rounded + bias.abs())
    return _rounded(one, error + rounded + added + error)


def _rounded(one, apart):
    """How far from `one` another result can be, if the two are so far apart before each is rounded once."""
    return apart + 2 * _half_ulp(one.double().abs() * (1 + torch.finfo(one.dtype).eps) + apart, one.dtype)


def _added(size, magnitude):
    """What float32 sums of so many ranks and a bias, of this magnitude together, may be off by: size additions."""
    return size * 2.0**-24 / (1 - size * 2.0**-24) * magnitude


def _sums(x, q):
    """What linear's sums may be off by before they are rounded: float64 on the CPU; on a GPU float32, of weights rounded to x's dtype."""
    k = x.shape[-1]
    unit = k * 2.0**-53 if x.device.type == "cpu" else k * 2.0**-23 + torch.finfo(x.dtype).eps / 2
    return unit / (1 - unit) * (x.double().abs() @ dequantize(q).abs().T)


def _half_ulp(t, dtype):
    """Half the distance of neighbouring numbers of a dtype, at t: what rounding to it changes at most."""
    info = torch.finfo(dtype)
    power = torch.ldexp(torch.ones_like(t, dtype=torch.float64), torch.frexp(t.double()).exponent)
    return info.eps / 4 * power.clamp(min=2 * info.tiny)


def experts(
    rank, size, device, experts, tokens, placement="linear", only=None, padding=False, exact=True, format="int4_g32", x_format=None
):
    h, inner, t = 64, 32, 3
    g = torch.Generator().manual_seed(5)
    w13, w2 = (_weight((experts, *shape), format, exact, g, device) for shape in ((2 * inner, h), (h, inner)))
    bias13, bias2 = (torch.randint(-1, 2, (experts, n), generator=g).float().to(device) for n in (2 * inner, h))
    # Each rank has tokens of its own.
    m, g = tokens[rank], torch.Generator().manual_seed(rank)
    x, weights = _x(m, h, exact, 4, g, device), torch.rand(m, t, generator=g)
    ids = torch.randint(experts, (m, t), generator=g) if only is None else torch.full((m, t), only)
    if padding:
        # Half of the rows are nobody's, and of the others some slots, one of them with an expert that does not exist.
        ids[m // 2 :], ids[0, 0], ids[1, 1:] = -1, experts + 3, -1
        weights = torch.where((ids < 0) | (ids >= experts), torch.nan, weights)
    ids, weights = ids.to(device), weights.to(device)
    given = {"activation": "relu2" if exact else "silu", "x_format": x_format, "impl": "triton" if device.type == "cuda" else None}
    here = expert_map(experts, size, rank, placement)
    mine = [take_experts(w, here) for w in (w13, w2, bias13, bias2)]
    many = ExpertParallel(FusedExperts(*mine[:2], bias13=mine[2], bias2=mine[3], **given), experts, placement=placement, device=device)
    one = fused_experts(x, w13, w2, weights, ids, bias13=bias13, bias2=bias2, **given)
    return _compare(many(x, weights, ids), one, torch.zeros_like(one))


def _linear(n, k, format, exact, x_format, device):
    """The same on all ranks: x, a weight, a bias and x_scale."""
    g = torch.Generator().manual_seed(n + k)
    q = _weight((n, k), format, exact, g, device)
    bias = torch.randint(-3, 4, (n,), generator=g).float().to(device)
    return _x(5, k, exact, 16, g, device), q, bias, None if x_format is None else torch.ones(1, device=device)


def _x(m, k, exact, most, g, device):
    """bfloat16 (m, k): normal, or of each row at most so many 1 or -1, and the others 0."""
    x = torch.randn(m, k, generator=g)
    if exact:
        x = torch.where(torch.rand(m, k, generator=g).argsort(-1) < most, x.sign(), 0)
    return x.to(device, torch.bfloat16)


def _weight(shape, format, exact, g, device):
    """A weight: a normal one quantized, or one of integers of magnitude 8 at most: values of magnitude 2, zero points of 1, scales of 1, 2.

    16 of these together are below 256, so that a row-parallel rank's part is a bfloat16, too.
    """
    fmt = parse_format(format)
    if not exact:
        return quantize(torch.randn(shape, generator=g).to(device), fmt)
    small = torch.tensor([code for code, value in enumerate(value_list(fmt.element)) if value in (-2, -1, 0, 1, 2)])
    codes = small[torch.randint(len(small), shape, generator=g)]
    parts = {"packed": pack(codes.flatten(0, -2), fmt.element.bits).unflatten(0, shape[:-1])}
    groups = fmt.scale_shape(shape)
    parts["scale"] = _stored(fmt.scale, 1 + torch.randint(2, groups, generator=g))
    if fmt.zero is not None:
        parts["zero"] = torch.ones(groups, dtype=torch.uint8) if fmt.zero == "int" else _stored(fmt.zero, torch.ones(groups))
    if fmt.scale_2 is not None:
        parts["scale_2"] = torch.full((*shape[:-2], shape[-2] if fmt.scale_2.startswith("channel") else 1, 1), 2.0)
    if fmt.offset is not None:
        parts["offset"] = _stored(fmt.offset, torch.ones(groups))
    return QTensor(fmt, shape, **{name: part.to(device) for name, part in parts.items()})


def _stored(name, numbers):
    """1 and 2 as scales of a dtype."""
    dtype = SCALE_DTYPES[name]
    if isinstance(dtype, torch.dtype):
        return numbers.to(dtype)
    known = value_list(dtype)
    return torch.where(numbers == 2, known.index(2.0), known.index(1.0)).to(torch.uint8)


def _compare(got, expected, bound):
    """What is wrong, or None."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"got {tuple(got.shape)} {got.dtype}, expected {tuple(expected.shape)} {expected.dtype}"
    error = (got.double() - expected.double()).abs()
    # Not "error > bound": NaN is wrong, too.
    wrong = ~(error <= bound)
    return f"{int(wrong.sum())} of {wrong.numel()} differ by more than they may, the worst by {error.max():g}" if wrong.any() else None
