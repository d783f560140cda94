"""Codes in and out of a QTensor's bitstream."""

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
    """The bitstream of codes (rows, k): int32 (rows, ceil(k * bits / 32)), the bits behind the last code zero."""
    rows, k = codes.shape
    words = -(-k * bits // 32)
    if not rows * words:
        return torch.empty(rows, words, dtype=torch.int32, device=codes.device)
    if 8 % bits == 0:
        # Whole codes in each byte: two bytes become one, until it is full.
        codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, words * 32 // bits - k)).contiguous()
        while bits < 8:
            pair = codes.view(torch.int16)
            codes, bits = (pair | pair >> (8 - bits)).to(torch.uint8), 2 * bits
        return codes.view(torch.int32)
    # 32 codes are `bits` words: where code i begins, and what of it lies in the next word, is the same in each 32.
    groups = -(-k // 32)
    codes = torch.nn.functional.pad(codes, (0, groups * 32 - k)).view(rows, groups, 32)
    stream = torch.zeros(rows, groups, bits, dtype=torch.int64, device=codes.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = codes[..., i].long()
        stream[..., word] |= code << shift
        if shift + bits > 32:
            stream[..., word + 1] |= code >> (32 - shift)
    return stream.to(torch.int32).view(rows, groups * bits)[:, :words].contiguous()
