"""Codes of GGUF's blocks that are no plain bit fields: vectors of a grid with signs (IQ1, IQ2, IQ3), and trits (TQ1_0, TQ2_0).

A code of a grid type has the vector's digit in its low bits and, above it, one bit: the weight's sign (IQ2, IQ3) or that of
the shift by 1/8 (IQ1). A vector of 8 codes is handled as one int64, a code a byte.
"""

import functools

import torch

from . import gguf_grids as grids
from .gguf_fields import Field, refuse


def grid(name, low, signs, high=None):
    """Vectors of a grid, with a bit on top of each digit.

    Args:
        name: of the grid.
        low, high: fields with the low 8 bits of each vector's index, and the bits above them.
        signs: a field with the bits on top, a byte for each 8 weights, the first weight's lowest.
    """
    bits = grids.digit_bits(name)

    def get(blocks):
        index = low.get(blocks).int()
        if high is not None:
            index |= high.get(blocks).int() << 8
        vectors = grids.words(name)[index].view(torch.int64)
        return (vectors | _on_top(bits)[signs.get(blocks).int()]).view(torch.uint8)

    def put(blocks, codes):
        digits = (codes & (2**bits - 1)).unflatten(-1, (-1, grids.digits(name).shape[-1]))
        index = grids.indices(name)[grids.number(digits, bits)]
        refuse(index < 0, f"codes have a vector that is not in the grid of {name}")
        low.put(blocks, (index & 255).to(torch.uint8))
        if high is not None:
            high.put(blocks, (index >> 8).to(torch.uint8))
        top = (codes >> bits).unflatten(-1, (-1, 8))
        signs.put(blocks, sum(top[..., i] << i for i in range(8)))

    return Field(get, put)


@functools.cache
def _on_top(bits):
    """int64 (256,): bit i of each byte, as bit `bits` of byte i."""
    return ((torch.arange(256).unsqueeze(-1) >> torch.arange(8) & 1) << bits).to(torch.uint8).view(torch.int64).squeeze(-1)


def even(sevens):
    """Signs in fields of 7 bits: the number of negative weights of each 8 is even, which gives the 8th."""
    parity = torch.tensor([v | v.bit_count() % 2 << 7 for v in range(128)], dtype=torch.uint8)

    def put(blocks, signs):
        refuse(parity[(signs & 127).int()] != signs, "codes have an odd number of negative weights among 8, expected an even one")
        sevens.put(blocks, signs & 127)

    return Field(lambda blocks: parity[sevens.get(blocks).int()], put)


def alike(bit, vectors):
    """One bit on top that all weights of so many vectors share."""

    def put(blocks, signs):
        signs = signs.unflatten(-1, (-1, vectors))
        refuse((signs != signs[..., :1]) | (signs % 255 != 0), f"codes are shifted up and down within {8 * vectors} weights")
        bit.put(blocks, signs[..., 0] & 1)

    return Field(lambda blocks: bit.get(blocks).repeat_interleave(vectors, -1) * 255, put)


def quads(start, step, count):
    """count times 4 bytes, `step` bytes apart."""

    def split(blocks):
        return blocks[..., start:].unfold(-1, 4, step)[..., :count, :]

    return Field(lambda blocks: split(blocks).flatten(-2), lambda blocks, values: split(blocks).bitwise_or_(values.unflatten(-1, (-1, 4))))


def half_of_nibbles(nibbles):
    """A float16 in four nibbles, the lowest first (IQ1_M)."""
    shifts = torch.tensor([0, 4, 8, 12])

    def put(blocks, value):
        nibbles.put(blocks, (value.view(torch.int16).long() >> shifts & 15).to(torch.uint8))

    return Field(lambda blocks: (nibbles.get(blocks).long() << shifts).sum(-1, keepdim=True).to(torch.int16).view(torch.float16), put)


def trits(*runs):
    """TQ1_0: base 3, codes 1 to 3 for -1, 0, 1. A run (start, count, trits): the first trits of count bytes, then their second ones, ...

    A byte holds 5 trits t (the first one most significant, missing ones zero) as ceil(t * 256 / 243): each product with 3,
    taken modulo 256, carries the next trit out on top. Other bytes decode, too, but are not written.
    """
    powers = 3 ** torch.arange(4, -1, -1)
    table = ((torch.arange(256).unsqueeze(-1) * powers.flip(0) % 256 * 3 >> 8) + 1).to(torch.uint8)

    def get(blocks):
        return torch.cat([table[blocks[..., a : a + c].int()][..., :t].transpose(-1, -2).flatten(-2) for a, c, t in runs], dim=-1)

    def put(blocks, codes):
        refuse(codes == 0, "codes have -2, expected -1 to 1")
        for (a, c, t), part in zip(runs, codes.split([c * t for _, c, t in runs], -1), strict=True):
            number = ((part.unflatten(-1, (t, c)).transpose(-1, -2).long() - 1) * powers[:t]).sum(-1)
            blocks[..., a : a + c] |= ((number * 256 + 242) // 243).to(torch.uint8)

    return Field(get, put)


def ternary(field):
    """TQ2_0: 0, 1, 2 for -1, 0, 1, as codes 1 to 3. A 3 would be 2; no quantizer writes it, and it is refused."""

    def get(blocks):
        stored = field.get(blocks)
        refuse(stored == 3, "codes have a 3, expected 0 to 2")
        return stored + 1

    def put(blocks, codes):
        refuse(codes == 0, "codes have -2, expected -1 to 1")
        field.put(blocks, codes - 1)

    return Field(get, put)


def unsigned_e4m3(field):
    """NVFP4: e4m3 codes without a sign. 0x7F is no NaN here but zero, and read as the code 0."""

    def get(blocks):
        stored = field.get(blocks)
        refuse(stored > 127, "a scale has its sign bit set, expected an unsigned e4m3")
        return torch.where(stored == 127, 0, stored)

    def put(blocks, scale):
        refuse(scale > 126, "a scale is negative, expected an unsigned e4m3")
        field.put(blocks, scale)

    return Field(get, put)
