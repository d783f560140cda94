"""How much a sum of products may be off: bounds for the adders that hardware has.

Notation: u = 2^-24. A dot product y = sum_k p_k of `terms` non-zero products, S = sum_k |p_k|. All bounds are coefficients c
with |computed - y| <= c S, for every order of summation.

A1, IEEE float32 in any order. A tree over t terms has at most t - 1 additions on any path from a leaf to the root, each with
    a relative error of u: c = gamma(t - 1), gamma(n) = n u / (1 - n u) (Higham, Accuracy and Stability, 3.1).
A2, block adders of matrix units (L, F, b). One step takes the running sum C and L products, aligns them to the largest
    magnitude M among the L + 1 and truncates each below M 2^-F, adds exactly, and keeps b bits of the result. M <= S and the
    result is at most S, so a step loses at most ((L + 1) 2^-F + 2^-b) S, and there are at most ceil(t / L) steps with something
    in them, or one a group where each group starts a block of its own. Partial sums of a split K meet in float32: u a block.
    A subnormal operand is aligned by its stored exponent, as though it were at least the smallest normal number; so the
    magnitudes in S have to be those (F then seems to shrink by the width of the mantissa).
A3, the same with k in ascending order: with C_j the prefix sums, step j loses at most (L + 1) 2^-F max(R_(j-1), max |p| in block j) + 2^-b R_j,
    R_j = max over i <= j of |C_j - C_i|, C and i at edges of blocks: far less than S on mixed signs, and sound at whichever of these edges a
    kernel begins anew (a split of k, a scale); its parts then meet in float32, in their order or in pairs: no sum exceeds max C - min C.
A4, A2 or A3 within chunks of `promote` products, each chunk's sum then added in float32: over the chunks the first part adds up to
    (steps in a chunk) ((L + 1) 2^-F + 2^-b) S, the second to gamma(chunks) S.
A5, the unit bit for bit (emulate.block_sum): nothing is lost but what float32 loses behind it.
Integer accumulators (int8 x int8 into int32) lose nothing below k = 133,152.

A candidate declares what it has: "ieee" (A1), a Block (A2; A4 where it promotes; A3 where its order is "ascending"; A5 where it is exact too), or
a dict of these by where they hold: a key is a kind of x ("fp32", "fp16", "bf16"; of quantized x "int", "float"), a device ("cpu", "cuda"), a
name or pattern of the weight's format, or several of these with spaces between; the first that fits counts.

Parameters measured on one H200, by probes and by bit-for-bit emulation: 16-bit operands L=16, F=25, b=23; fp8 L=32, F=13, b=13, promoted every 128.
"""

from dataclasses import dataclass, fields
from fnmatch import fnmatchcase

import torch

from ref.element import Int

U = 2.0**-24
# What one rounding to a subnormal float32 may lose.
ETA = 2.0**-149


def gamma(n):
    """n roundings in a row: n u / (1 - n u)."""
    return n * U / (1 - n * U)


@dataclass(frozen=True)
class Block:
    """A matrix unit's adder.

    length: products in a block. kept: bits below the largest magnitude. bits: of the accumulator. promote: after so many products a
    float32 sum takes over, 0: never. order: "any", or "ascending": along k. exact: bit for bit as emulate.block_sum; its order is ascending.
    """

    length: int
    kept: int
    bits: int
    promote: int = 0
    order: str = "any"
    exact: bool = False

    def __post_init__(self):
        numbers = (self.length, self.kept, self.bits, self.promote)
        if not all(isinstance(v, int) for v in numbers) or min(numbers[:3]) < 1 or self.promote < 0 or self.promote % self.length:
            raise ValueError(f"accumulator: {self!r}: length, kept and bits have to be positive integers, promote a multiple of length")
        if self.order not in ORDERS or (self.exact and self.order != "ascending"):
            raise ValueError(f"accumulator: {self!r}: order has to be one of {', '.join(ORDERS)}, and ascending where it is exact")

    @property
    def step(self):
        """What one step may lose, as a fraction of S."""
        return (self.length + 1) * 2.0**-self.kept + 2.0**-self.bits


ORDERS = ("any", "ascending")
KINDS = ("fp32", "fp16", "bf16", "int", "float")
DEVICES = ("cpu", "cuda")

MMA_16 = Block(16, 25, 23)
MMA_FP8 = Block(32, 13, 13, promote=128)
NAMED = {"ieee": "ieee", "mma_16": MMA_16, "mma_fp8": MMA_FP8, "mma_fp8_unpromoted": Block(32, 13, 13)}


def parse_accumulator(form):
    """What a declaration says of sums, hashable: None, "ieee", a Block, or ((key, one of these), ...).

    Args:
        form: one of these; a name of NAMED; a dict of a Block's fields; or a dict of any of them by where they hold.

    Raises:
        ValueError: it is none of these.

    >>> parse_accumulator({"cuda bf16": "mma_16", "fp32": "ieee"})[1]
    ('fp32', 'ieee')
    """
    if form is None or isinstance(form, Block):
        return form
    if isinstance(form, str) and form in NAMED:
        return NAMED[form]
    names = {f.name for f in fields(Block)}
    if isinstance(form, tuple):
        form = dict(form)
    if isinstance(form, dict) and {"length", "kept", "bits"} <= set(form) <= names:
        return Block(**form)
    if isinstance(form, dict) and form and all(isinstance(key, str) and not names & set(key.split()) for key in form):
        return tuple((key, parse_accumulator(one)) for key, one in form.items())
    raise ValueError(
        f"accumulator: got {form!r}, expected one of {', '.join(NAMED)}, the fields of a Block (length, kept, bits; promote, order, exact), "
        f"or a dict of these by kind of x ({', '.join(KINDS)}), device and format of the weight"
    )


def kind_of(x_dtype, x_format):
    """The kind of x: its dtype as it is, "int" or "float" where it is quantized."""
    return x_dtype if x_format is None else "int" if isinstance(x_format.element, Int) else "float"


def accumulator_of(declared, kind, device="cpu", fmt=""):
    """What a parsed declaration says of x of a kind, on a device, with a weight of a format: "ieee", a Block, or None: nothing.

    >>> accumulator_of((("cuda *_g16* float", "ieee"), ("cuda", None)), "float", "cuda", "nvfp4_g16")
    'ieee'
    """
    if not isinstance(declared, tuple):
        return declared
    here = {word: word in (kind, device) for word in (*KINDS, *DEVICES)}
    fits = (one for key, one in declared if all(here.get(word, fnmatchcase(str(fmt), word)) for word in key.split()))
    return next(fits, None)


def ieee(terms):
    """A1 for a tensor of numbers of terms."""
    return gamma((terms - 1).clamp(min=0))


def blocks(terms, unit, groups=1):
    """A2 and A4: terms products that lie in at most `groups` groups, each starting a block of its own."""
    steps = torch.minimum(terms, terms.div(unit.length, rounding_mode="floor") + groups)
    if unit.promote:
        chunks = torch.minimum(terms, terms.div(unit.promote, rounding_mode="floor") + groups)
        return steps.clamp(max=unit.promote // unit.length) * unit.step + gamma(chunks)
    return steps * (unit.step + U)


def running(x, w, unit, cuts=(), sizes=None):
    """A3: the bound itself, float64 (m, n), of x (m, k) times w (n, k) summed in blocks along k, in chunks where unit promotes.

    A kernel may begin anew at the edge of any block, and add up in float32 what lies between.

    Args:
        cuts: columns where blocks and chunks begin anew, besides 0.
        sizes: the magnitudes by which the factors are aligned, where that is not their own (subnormal ones).
    """
    k = x.shape[1]
    x_size, w_size = sizes or (x.abs(), w.abs())
    starts = sorted({0, *cuts})
    edges = [a for s, e in zip(starts, [*starts[1:], k], strict=True) for a in range(s, e, unit.promote or max(k, 1))]
    bound = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float64)
    total, low, high = (torch.zeros_like(bound) for _ in range(3))
    steps = blocks = 0
    for start, end in zip(edges, [*edges[1:], k], strict=True):
        part, lowest, highest, after = _chain(*(t[:, start:end] for t in (x, w, x_size, w_size)), unit)
        low, high = torch.minimum(low, total + lowest), torch.maximum(high, total + highest)
        bound, total = bound + part, total + after
        count = -(-(end - start) // unit.length)
        steps, blocks = max(steps, count), blocks + count
    # The sums that the unit sees are off by what it has lost so far.
    bound = bound * (1 + unit.step) ** steps
    return bound + gamma(blocks) * (high - low + bound)


def _chain(x, w, x_size, w_size, unit):
    """What a chain of blocks loses at most, and the lowest, the highest and the last of its sums."""
    bound = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float64)
    before, low, high = (torch.zeros_like(bound) for _ in range(3))
    for start in range(0, x.shape[1], unit.length):
        block = slice(start, start + unit.length)
        largest = (x_size[:, None, block] * w_size[None, :, block]).amax(-1)
        begun = torch.maximum(before - low, high - before)
        after = before + x[:, block] @ w[:, block].T
        low, high = torch.minimum(low, after), torch.maximum(high, after)
        reach = torch.maximum(after - low, high - after)
        bound += (unit.length + 1) * 2.0**-unit.kept * torch.maximum(begun, largest) + 2.0**-unit.bits * reach
        before = after
    return bound, low, high, before


def coefficient(terms, groups, device, fp8, wide, declared=None):
    """The coefficient of what is declared ("ieee" or a Block), or the loosest of the adders that a correct kernel may use here.

    Args:
        terms: how many products of each sum are not zero, int64.
        groups: how many parts the sum may be cut into by scales.
        device: "cpu" has float32 only; "cuda" may use its matrix units.
        fp8: both operands fit an 8-bit float unit. wide: x is float32, so that no matrix unit takes it.
    """
    if isinstance(declared, Block):
        return blocks(terms, declared, groups)
    c = ieee(terms)
    if declared == "ieee" or torch.device(device).type == "cpu" or wide:
        return c
    c = torch.maximum(c, blocks(terms, MMA_16, groups))
    return torch.maximum(c, blocks(terms, MMA_FP8, groups)) if fp8 else c


# A sum is exact on every adder when all its products are multiples of q and S / q is at most this: 2^24, less one bit for
# scales that are applied to partial sums.
BUDGET = 2.0**23
# Within each `promote` products of an fp8 unit: it keeps 13 bits below the leading one.
BUDGET_FP8 = 2.0**14


def exact(s, q, chunk_s=None):
    """Whether sums of multiples of q are exact in every adder; s: S of each, chunk_s: the largest S in a chunk of an fp8 unit."""
    return bool((s <= BUDGET * q).all()) and (chunk_s is None or bool((chunk_s <= BUDGET_FP8 * q).all()))


def quantum(t):
    """The largest power of two that divides every number of each row of t (float64, finite): inf where all are zero.

    >>> quantum(torch.tensor([[6.0, 0.0, -0.75]], dtype=torch.float64))
    tensor([0.2500], dtype=torch.float64)
    """
    mantissa, exponent = torch.frexp(t)
    integer = (mantissa.abs() * 2.0**53).long()
    lowest = torch.ldexp((integer & -integer).double(), exponent - 53)
    return torch.where(t == 0, torch.inf, lowest).amin(-1)
