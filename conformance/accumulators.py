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
A3, the same with the order of k given: C_j is a known prefix sum, and step j loses at most
    (L + 1) 2^-F max(|C_(j-1)|, max |p| in block j) + 2^-b |C_j|, which is far less than S on mixed signs.
A4, A2 within chunks of `promote` products, each chunk's sum then added in float32: over the chunks the first part adds up to
    (steps in a chunk) ((L + 1) 2^-F + 2^-b) S, the second to gamma(chunks) S.
Integer accumulators (int8 x int8 into int32) lose nothing below k = 133,152.

Parameters measured on one H200, by probes and by bit-for-bit emulation: 16-bit operands L=16, F=25, b=23; fp8 L=32, F=13, b=13, promoted every 128.
"""

from dataclasses import dataclass

import torch

U = 2.0**-24
# What one rounding to a subnormal float32 may lose.
ETA = 2.0**-149


def gamma(n):
    """n roundings in a row: n u / (1 - n u)."""
    return n * U / (1 - n * U)


@dataclass(frozen=True)
class Block:
    """A matrix unit's adder: block length, kept bits, accumulator bits, and after how many products a float32 sum takes over."""

    length: int
    kept: int
    bits: int
    promote: int = 0

    @property
    def step(self):
        """What one step may lose, as a fraction of S."""
        return (self.length + 1) * 2.0**-self.kept + 2.0**-self.bits


MMA_16 = Block(16, 25, 23)
MMA_FP8 = Block(32, 13, 13, promote=128)


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


def running(x, w, unit, order=None):
    """A3: the bound itself, float64 (m, n), of x (m, k) times w (n, k) summed in blocks along k.

    Args:
        order: the sequence of k, (k,); None: ascending.
    """
    if order is not None:
        x, w = x[:, order], w[:, order]
    total = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float64)
    bound = torch.zeros_like(total)
    for start in range(0, x.shape[1], unit.length):
        products = x[:, None, start : start + unit.length] * w[None, :, start : start + unit.length]
        after = total + products.sum(-1)
        largest = torch.maximum(total.abs(), products.abs().amax(-1))
        bound += (unit.length + 1) * 2.0**-unit.kept * largest + 2.0**-unit.bits * after.abs()
        total = after
    # The prefix sums that the unit sees are off by what it has lost so far: once more around.
    return bound * (1 + 2 * blocks(torch.tensor(x.shape[1]), Block(unit.length, unit.kept, unit.bits)).item())


def coefficient(terms, groups, device, fp8, wide):
    """The loosest coefficient of the adders that a correct kernel may use here.

    Args:
        terms: how many products of each sum are not zero, int64.
        groups: how many parts the sum may be cut into by scales.
        device: "cpu" has float32 only; "cuda" may use its matrix units.
        fp8: both operands fit an 8-bit float unit. wide: x is float32, so that no matrix unit takes it.
    """
    c = ieee(terms)
    if torch.device(device).type == "cpu" or wide:
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
