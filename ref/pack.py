"""Packed codes: the little-endian bitstream."""

import torch

# 32 codes of b bits fill exactly b words, so a row is a run of such blocks.
BLOCK = 32


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
    k = codes.shape[-1]
    blocks = torch.nn.functional.pad(codes.to(torch.int64), (0, -k % BLOCK)).unflatten(-1, (-1, BLOCK))
    words = torch.zeros(*blocks.shape[:-1], bits + 1, dtype=torch.int64, device=codes.device)
    for i in range(BLOCK):
        word, shift = divmod(i * bits, 32)
        shifted = blocks[..., i] << shift
        words[..., word] |= shifted & 0xFFFFFFFF
        words[..., word + 1] |= shifted >> 32
    words = words[..., :bits].flatten(-2)[..., : words_per_row(k, bits)]
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()


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
    words = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
    codes = torch.empty(*words.shape[:-1], BLOCK, dtype=torch.uint8, device=packed.device)
    for i in range(BLOCK):
        word, shift = divmod(i * bits, 32)
        code = words[..., word] >> shift  # arithmetic: the mask below removes what the sign brought in
        if shift + bits > 32:
            code = (code & (2 ** (32 - shift) - 1)) | (words[..., word + 1] << (32 - shift))
        codes[..., i] = (code & (2**bits - 1)).to(torch.uint8)
    return codes.flatten(-2)[..., :k].contiguous()


def words_per_row(k, bits):
    """int32 words that k codes of `bits` bits take."""
    return -(-k * bits // 32)


def _check_bits(operation, bits):
    if not 1 <= bits <= 8:
        raise ValueError(f"{operation}: got {bits} bits, expected 1 to 8")
