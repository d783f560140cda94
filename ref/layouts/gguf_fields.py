"""Fields of GGUF's blocks: where in a block's bytes codes and scales are, and how to put them back.

A field is a pair of functions on blocks, uint8 (rows, blocks, bytes): get takes its values out of them, put writes values into
blocks whose bits there are zero. Values are (rows, blocks, count), uint8 for codes and integers.
"""

import functools
from typing import NamedTuple

import torch


class Field(NamedTuple):
    """get(blocks) -> values; put(blocks, values) -> None."""

    get: object
    put: object


def planes(*parts, flip=0):
    """Codes whose bits lie in planes, the lowest bits in the first one; flip: bits of the code that are stored inverted.

    A plane (start, count, bits, run) is count bytes from start on. They hold fields of `bits` bits in runs: the lowest fields
    of `run` bytes are `run` codes, the next fields of the same bytes are the next `run` codes, and so on.
    """

    def get(blocks):
        codes, up = None, 0
        for start, count, bits, run in parts:
            data = blocks[..., start : start + count].clone(memory_format=torch.contiguous_format)
            # Eight codes at a time: the fields of a byte do not meet those of the next one.
            plane = (_runs(data, bits, run) if run % 4 == 0 and bits < 8 else _spread(data, bits)).view(torch.int64)
            codes = plane if codes is None else codes.bitwise_or_(plane << up)
            up += bits
        return (codes ^ (flip * 0x0101010101010101 - (flip >> 7 << 64)) if flip else codes).view(torch.uint8)

    def put(blocks, codes):
        codes = codes ^ flip
        for start, count, bits, run in parts:
            fields = (codes & (2**bits - 1)).unflatten(-1, (-1, 8 // bits, run))
            for i in range(8 // bits):
                blocks[..., start : start + count] |= (fields[..., i, :] << (bits * i)).flatten(-2)
            codes = codes >> bits

    return Field(get, put)


def _runs(data, bits, run):
    dtype, size = (torch.int64, 8) if run % 8 == 0 else (torch.int32, 4)
    words = data.view(dtype).unflatten(-1, (-1, 1, run // size))
    mask = int.from_bytes(bytes([2**bits - 1]) * size, "little")
    fields = torch.empty(*words.shape[:-2], 8 // bits, words.shape[-1], dtype=dtype)
    for i in range(8 // bits):
        torch.bitwise_and(words[..., 0, :] >> (bits * i), mask, out=fields[..., i, :])
    return fields.flatten(-3).view(torch.uint8)


def _spread(data, bits):
    return data if bits == 8 else _fields_of_bytes(bits)[data.int()].view(torch.uint8).flatten(-2)


@functools.cache
def _fields_of_bytes(bits):
    """(256, 1) words that hold the fields of a byte, a field a byte."""
    fields = torch.arange(256).unsqueeze(-1) >> torch.arange(0, 8, bits) & (2**bits - 1)
    return fields.to(torch.uint8).view({1: torch.int64, 2: torch.int32, 4: torch.int16}[bits])


def half(at):
    """One float16."""

    def put(blocks, value):
        blocks[..., at : at + 2] = value.contiguous().view(torch.uint8)

    return Field(lambda blocks: blocks[..., at : at + 2].clone(memory_format=torch.contiguous_format).view(torch.float16), put)


def strided(start, step, count, shift=0, bits=8):
    """The `bits` bits from bit `shift` on, of every step-th byte."""
    where = slice(start, start + step * (count - 1) + 1, step)

    def put(blocks, values):
        blocks[..., where] |= values << shift

    return Field(lambda blocks: blocks[..., where] >> shift & (2**bits - 1), put)


def words(dtype, start, step, count, shifts, bits):
    """The `bits` bits (up to 7) from each of the shifts on, of count words of 16 or 32 bits, `step` bytes apart."""
    size, shifts = dtype.itemsize, torch.tensor(shifts)

    def split(blocks):
        return blocks[..., start:].unfold(-1, size, step)[..., :count, :]

    def get(blocks):
        found = split(blocks).clone(memory_format=torch.contiguous_format).view(dtype)
        return (found >> shifts.to(dtype) & (2**bits - 1)).to(torch.uint8).flatten(-2)

    def put(blocks, values):
        whole = (values.unflatten(-1, (count, len(shifts))).long() << shifts).sum(-1, keepdim=True)
        split(blocks).bitwise_or_(whole.view(torch.uint8)[..., :size])

    return Field(get, put)


def sub(field, shift, bits):
    """Some bits of each of a field's values."""
    return Field(lambda blocks: field.get(blocks) >> shift & (2**bits - 1), lambda blocks, values: field.put(blocks, values << shift))


def six_bits(at, mins):
    """The 8 scales, or the 8 minima, of 6 bits each in 12 bytes of Q4_K and Q5_K.

    Bytes 0 to 3 (4 to 7 for minima) have the first four in their low 6 bits; the other four are in the low (high) nibbles of
    bytes 8 to 11, with their top 2 bits on top of the first four.
    """
    first, second = slice(at + 4 * mins, at + 4 * mins + 4), slice(at + 8, at + 12)

    def get(blocks):
        return torch.cat((blocks[..., first] & 63, blocks[..., second] >> 4 * mins & 15 | blocks[..., first] >> 6 << 4), dim=-1)

    def put(blocks, values):
        low, high = values[..., :4], values[..., 4:]
        blocks[..., first] |= low | high >> 4 << 6
        blocks[..., second] |= (high & 15) << 4 * mins

    return Field(get, put)


def levels(d, integers, top, low=0, step=1, unit=1.0, zero=0):
    """Scales in two levels, folded: scale = d * s * unit with s = low + step * i, i the stored integers from 0 to top.

    d has 11 bits, s up to 8, and unit is a power of two, so the float32 product is exact. Writing finds d and s again: of all
    float16 d that make every scale of the block d * s * unit, the smallest in magnitude, which is what quantizers
    choose: they give the largest scale the largest integer. Where all scales are zero, d is zero and i is `zero`.
    """

    def get(blocks):
        return integers.get(blocks).float().mul_(step * unit).add_(low * unit).mul_(d.get(blocks).float())

    def put(blocks, scale):
        x = scale.double() / unit
        largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
        found_d, found_i = torch.zeros_like(largest, dtype=torch.float16), torch.full_like(x, zero, dtype=torch.uint8)
        open_ = (largest != 0).squeeze(-1)
        for s in sorted((low + step * i for i in range(top + 1)), key=lambda s: (-abs(s), -s)):
            if s == 0 or not bool(open_.any()):
                break
            candidate = (largest[open_] / s).half()
            i = (x[open_] / candidate.double() - low) / step
            whole = (i == i.round()) & (i >= 0) & (i <= top)
            exact = candidate.double() * (low + step * i) == x[open_]
            fits = (whole & exact).all(-1)
            found_d[open_] = torch.where(fits.unsqueeze(-1), candidate, found_d[open_])
            found_i[open_] = torch.where(fits.unsqueeze(-1), i.nan_to_num(0, 0, 0).clamp(0, top).to(torch.uint8), found_i[open_])
            open_[open_.clone()] = ~fits
        refuse(open_, f"scales are no float16 times integers {low} to {low + step * top}" + f" by {step}" * (step > 1))
        d.put(blocks, found_d)
        integers.put(blocks, found_i)

    return Field(get, put)


class BadBlock(ValueError):
    """A block that cannot be read or written: its row, its place in the row, and why."""

    def __init__(self, row, block, why):
        super().__init__(f"row {row}, block {block}: {why}")
        self.row, self.block, self.why = row, block, why


def refuse(bad, why):
    """Raise BadBlock where bad, bool (rows, blocks, ...), is true anywhere."""
    if bool(bad.any()):
        row, block = bad.nonzero()[0, :2].tolist()
        raise BadBlock(row, block, why)
