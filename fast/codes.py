"""Codes in and out of a QTensor's bitstream."""

import math

import torch


def unpack(packed, bits, columns):
    """Codes of some columns: int64 (rows, len(columns)).

    Args:
        packed: int32 (rows, words), each row's codes as a little-endian bitstream. columns: int64, each in [0, k).
    """
    start = columns * bits
    word = start // 32
    packed = packed.to(torch.int64) & 0xFFFFFFFF
    pair = packed[:, word] | (packed[:, (word + 1).clamp(max=packed.shape[1] - 1)] << 32)
    return (pair >> (start % 32)) & (2**bits - 1)


def pack(codes, bits):
    """The bitstream of codes (rows, k), by way of single bits: int32 (rows, ceil(k * bits / 32))."""
    rows, k = codes.shape
    shifts = torch.arange(bits, device=codes.device)
    stream = ((codes.int()[..., None] >> shifts) & 1).reshape(rows, k * bits)
    words = math.ceil(k * bits / 32)
    stream = torch.nn.functional.pad(stream, (0, words * 32 - k * bits)).view(rows, words, 32)
    # int32 addition wraps, as two's complement wants it: the sum of the set bits is the word.
    return (stream << torch.arange(32, device=codes.device, dtype=torch.int32)).sum(-1, dtype=torch.int32)
