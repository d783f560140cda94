"""Codes as checkpoints pack them: nibbles, bytes, words with an order of their own, two's complement."""

import math

import torch

from ..pack import pack, unpack


def nibbles(data, high_first=False):
    """Two codes of 4 bits from each byte of the last axis: the low half first, or the high half.

    >>> nibbles(torch.tensor([0x21], dtype=torch.uint8))
    tensor([1, 2], dtype=torch.uint8)
    """
    halves = (data & 15, data >> 4)
    return torch.stack(halves[::-1] if high_first else halves, dim=-1).flatten(-2)


def join_nibbles(codes, high_first=False):
    """The inverse of nibbles; an even number of codes."""
    first, second = codes[..., 0::2], codes[..., 1::2]
    return second | first << 4 if high_first else first | second << 4


def words(data, bits, order=None):
    """Codes from int32 words that each hold 32 // bits of them, lowest bits first: uint8 (..., words * (32 // bits)).

    order: where the i-th field of a word (from the lowest bits) goes among the word's codes; None: field i is code i.
    Bits above the last field are ignored.

    >>> words(torch.tensor([0x76543210], dtype=torch.int32), 4, (0, 2, 4, 6, 1, 3, 5, 7))
    tensor([0, 4, 1, 5, 2, 6, 3, 7], dtype=torch.uint8)
    """
    fields = 32 // bits
    codes = torch.empty(*data.shape, fields, dtype=torch.uint8, device=data.device)
    for i in range(fields):
        codes[..., i if order is None else order[i]] = (data >> (i * bits) & (2**bits - 1)).to(torch.uint8)
    return codes.flatten(-2)


def join_words(codes, bits, order=None):
    """The inverse of words: int32 (..., codes // (32 // bits)); the number of codes is a multiple of 32 // bits."""
    fields = 32 // bits
    split = codes.unflatten(-1, (-1, fields))
    joined = torch.zeros(split.shape[:-1], dtype=torch.int32, device=codes.device)
    for i in range(fields):
        joined |= split[..., i if order is None else order[i]].to(torch.int32) << (i * bits)
    return joined


def stream(data, bits, k):
    """The first k codes of each row of a little-endian byte stream, uint8 (..., ceil(k * bits / 8)) or longer."""
    return unpack(from_bytes(data)[..., : -(-k * bits // 32)], bits, k)


def join_stream(codes, bits):
    """The inverse of stream: uint8 (..., ceil(k * bits / 8))."""
    return to_bytes(pack(codes, bits), -(-codes.shape[-1] * bits // 8))


def from_twos(codes, bits):
    """Two's complement fields of `bits` bits (int8 or uint8) as offset binary, uint8: code = value + 2^(bits-1)."""
    return (codes.view(torch.uint8) & (2**bits - 1)) ^ (1 << (bits - 1))


def to_twos(codes, bits):
    """Offset binary as two's complement fields of `bits` bits, uint8: the inverse of from_twos."""
    return codes ^ (1 << (bits - 1))


def sign_extended(codes, bits):
    """Offset binary as int8 values."""
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def from_bytes(data):
    """A little-endian byte stream, one-byte dtype (..., bytes), as the int32 words of ref.pack: no code is touched."""
    data = data.view(torch.uint8)
    return _viewed(torch.nn.functional.pad(data, (0, -data.shape[-1] % 4)).contiguous(), torch.int32)


def to_bytes(packed, count):
    """The first `count` bytes of each row of packed words: the inverse of from_bytes."""
    return _viewed(packed, torch.uint8)[..., :count].contiguous()


def flat_groups(shape, size):
    """The groups of a weight whose every `size` entries of the flattened (row-major) tensor share a scale: (group, index).

    index None: the stored scales, reshaped, are those of the group. Else blocks cross rows: groups are the largest that no border
    cuts, and index (int64, one for each group) says in which block each is.

    >>> flat_groups((4, 128), 64), flat_groups((4, 32), 64)
    (((1, 64), None), ((2, 0), None))
    """
    *lead, n, k = shape
    if k % size == 0:
        return (1, size), None
    if size % k == 0 and (not lead or n % (size // k) == 0):
        return (size // k, 0), None
    g = math.gcd(k, size)
    return (1, g if g < k else 0), torch.arange(math.prod(shape) // g) * g // size


def unflat(scale, index, count):
    """The inverse of scale[index]: one value for each of `count` blocks, or None where the groups of a block differ."""
    blocks = torch.zeros(count, dtype=scale.dtype)
    blocks[index] = scale
    return blocks if torch.equal(blocks[index], scale) else None


def _viewed(t, dtype):
    """t.view(dtype) of a contiguous t; torch refuses it where an axis has size 0."""
    return t.view(dtype) if t.numel() else t.new_empty((*t.shape[:-1], t.shape[-1] * t.element_size() // dtype.itemsize), dtype=dtype)


def transposed(t):
    """The last two axes swapped, in memory too: contiguous() alone leaves the strides of an axis of size 1 as they were."""
    return t.mT.clone(memory_format=torch.contiguous_format)
