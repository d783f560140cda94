"""Packed codes: the little-endian bitstream."""

import math

import torch
from torch.nn.functional import pad

# A run of 1, 2, 4 or 8 codes fills whole bytes of the stream; apart, one code a byte, it is one integer of this dtype.
RUN_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(codes, bits):
    """Codes as a little-endian bitstream along the last axis.

    Code i of a row takes bits [i*bits, (i+1)*bits) of the row's words, lowest bit first; codes of 3, 5, 6 and 7 bits straddle
    words. Bits behind the last code are zero.

    Args:
        codes: (..., k), integer, 0 <= code < 2^bits.
        bits: 1 to 8.

    Returns:
        int32 (..., ceil(k * bits / 32)).

    Raises:
        ValueError: bits out of range, or a code that does not fit.

    >>> pack(torch.tensor([1, 2, 3]), 4)
    tensor([801], dtype=torch.int32)
    """
    _check_bits("pack", bits)
    if codes.dtype.is_floating_point or codes.dtype == torch.bool:
        raise TypeError(f"pack: codes have dtype {codes.dtype}, expected an integer dtype")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ValueError(f"pack: codes range from {int(codes.min())} to {int(codes.max())}, expected 0 to {2**bits - 1} ({bits} bits)")
    k, (count, size) = codes.shape[-1], _run(bits)
    runs = _view(pad(codes.to(torch.uint8), (0, -k % count)), RUN_DTYPES[count])
    for low, shift in reversed(_moves(bits)):
        runs.sub_((runs & (low << shift)) >> shift, alpha=2**shift - 1)
    stream = _view(runs, torch.uint8).unflatten(-1, (-1, count))[..., :size].flatten(-2)
    return _view(pad(stream, (0, 4 * words_per_row(k, bits) - stream.shape[-1])), torch.int32)


def unpack(packed, bits, k):
    """The first k codes of each row: the inverse of pack.

    Args:
        packed: int32 (..., ceil(k * bits / 32)).

    Returns:
        uint8 (..., k).

    Raises:
        ValueError: bits out of range, or a row whose length does not belong to k codes.

    >>> unpack(torch.tensor([801], dtype=torch.int32), 4, 3)
    tensor([1, 2, 3], dtype=torch.uint8)
    """
    _check_bits("unpack", bits)
    if packed.dtype != torch.int32:
        raise TypeError(f"unpack: packed has dtype {packed.dtype}, expected torch.int32")
    if packed.shape[-1] != words_per_row(k, bits):
        raise ValueError(
            f"unpack: packed has {packed.shape[-1]} words a row, expected {words_per_row(k, bits)} (k={k} codes of {bits} bits)"
        )
    count, size = _run(bits)
    stream = _view(packed.clone(memory_format=torch.contiguous_format), torch.uint8)
    stream = pad(stream, (0, -(-k // count) * size - stream.shape[-1])).unflatten(-1, (-1, size))
    runs = _view(pad(stream, (0, count - size)).flatten(-2), RUN_DTYPES[count])
    for low, shift in _moves(bits):
        runs.add_(runs & low, alpha=2**shift - 1)
    return _view(runs, torch.uint8)[..., :k].contiguous()


def words_per_row(k, bits):
    """int32 words that k codes of `bits` bits take."""
    return -(-k * bits // 32)


def _run(bits):
    """The fewest codes that fill whole bytes, and how many bytes."""
    count = 8 // math.gcd(8, bits)
    return count, count * bits // 8


def _moves(bits):
    """The steps that take a run of codes apart, from close together to one code a byte: [(mask, shift)].

    Each step halves all pieces: the upper halves (the bits in mask) move up by shift, to where their own bytes begin. With p the
    pieces to move, x - p + (p << shift) = x + p * (2^shift - 1).
    """
    count, _ = _run(bits)
    moves, half = [], count // 2
    while half:
        width, place = half * bits, half * 8
        mask = sum((2**width - 1) << (2 * place * i + width) for i in range(count // (2 * half)))
        moves.append((mask, place - width))
        half //= 2
    return moves


def _view(rows, dtype):
    """The bytes of each row as integers of another size; rows.view(dtype) would refuse rows without any."""
    return rows.contiguous().view(-1).view(dtype).view(*rows.shape[:-1], rows.shape[-1] * rows.element_size() // dtype.itemsize)


def _check_bits(operation, bits):
    if not 1 <= bits <= 8:
        raise ValueError(f"{operation}: got {bits} bits, expected 1 to 8")
