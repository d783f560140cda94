"""Kernels that are wrong on purpose, each in one way, and one that is right: what the suite's own tests hold it to.

python -m conformance --candidate conformance.wrong:swapped_nibbles
"""

import torch

from ref import quantize_input
from ref.element import decode
from ref.format import parse_format
from ref.pack import unpack
from ref.quantize import dequantize
from ref.rounding import round_to
from ref.scale import decode_scale, times_scale_2

from .accumulators import Block
from .emulate import block_sum


class Right:
    """A plain kernel: weights in float32, sums in float32, one rounding. Its steps are what the others override."""

    def linear(self, x, w, bias=None, *, x_format=None, x_scale=None, out=None):
        rows = x.reshape(-1, w.shape[1])
        a = self.inputs(rows, x_format, x_scale)
        y = self.product(a, self.weight(w), x_format).double()
        y = self.add_bias(y, bias)
        return self.give(self.store(y, x.dtype).reshape(*x.shape[:-1], w.shape[0]), out)

    def inputs(self, rows, x_format, x_scale):
        return rows.double() if x_format is None else dequantize(quantize_input(rows, x_format, x_scale))

    def weight(self, q):
        n, k = q.shape
        w = decode(self.codes(q), q.format.element)
        row, column = self.row(q, torch.arange(n)), self.column(q, torch.arange(k))
        if q.zero is not None:
            w = self.subtract(w, q.zero.double()[row][:, column])
        w = w * decode_scale(q.scale, q.format.scale)[row][:, column]
        w = self.second(w, q)
        w = w if q.offset is None else self.add_offset(w, q.offset.double()[row], column)
        return w if not q.format.hadamard else dequantize(q)

    def codes(self, q):
        return unpack(q.packed, q.format.element.bits, q.shape[1])

    def row(self, q, n):
        return n // q.format.group[0] if q.format.group[0] else n * 0

    def column(self, q, k):
        if q.group_index is not None:
            return q.group_index.long()
        return k // q.format.group[1] if q.format.group[1] else k * 0

    def subtract(self, w, zero):
        return w - zero

    def second(self, w, q):
        return times_scale_2(w, q.format, q.scale_2)

    def add_offset(self, w, offset, column):
        return w + offset[:, column]

    def product(self, a, b, x_format):
        return a @ b.T

    def add_bias(self, y, bias):
        return y if bias is None else y + bias.double()

    def store(self, y, dtype):
        return round_to(y, dtype)

    def give(self, y, out):
        return y if out is None else out.copy_(y)


class SwappedNibbles(Right):
    def codes(self, q):
        codes = unpack(q.packed, q.format.element.bits, q.shape[1])
        k = q.shape[1] // 2 * 2
        return torch.cat((codes[:, :k].unflatten(1, (-1, 2)).flip(2).flatten(1), codes[:, k:]), 1)


class GroupOffByOne(Right):
    def column(self, q, k):
        return super().column(q, (k + 1).clamp(max=k[-1]))


class ZeroIgnored(Right):
    def subtract(self, w, zero):
        return w


class OffsetOfWrongGroup(Right):
    def add_offset(self, w, offset, column):
        return w + offset.roll(1, 1)[:, column]


class DivisorMultiplied(Right):
    def second(self, w, q):
        return w if q.scale_2 is None else w * q.scale_2.double()


class GroupIndexIgnored(Right):
    def column(self, q, k):
        return k // q.format.group[1] if q.format.group[1] else k * 0


class LastGroupMissing(Right):
    def weight(self, q):
        w, group = super().weight(q), q.format.group[1]
        if group and q.shape[1] % group:
            w[:, q.shape[1] // group * group :] = 0
        return w


class ScaleOfWrongRow(Right):
    def row(self, q, n):
        return super().row(q, n).roll(1)


class BiasDropped(Right):
    def add_bias(self, y, bias):
        return y


class IgnoresBiasStride(Right):
    """Reads the bias as though its elements lay side by side."""

    def add_bias(self, y, bias):
        return y if bias is None else y + bias.as_strided(bias.shape, (1,)).double()


class HalfAccumulation(Right):
    def product(self, a, b, x_format):
        y = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64)
        for k in range(a.shape[1]):
            y = round_to(y + a[:, None, k] * b[None, :, k], torch.float16).double()
        return y


class TruncatingStore(Right):
    def store(self, y, dtype):
        nearest = round_to(y, dtype)
        bits = nearest.view({2: torch.int16, 4: torch.int32}[nearest.element_size()])
        return torch.where(nearest.double().abs() > y.abs(), bits - 1, bits).view(dtype)


class DoubleRounding(Right):
    """By way of a format of 13 bits, as an accumulator copied through a short intermediate would be."""

    def store(self, y, dtype):
        unit = torch.ldexp(torch.ones_like(y), torch.frexp(y).exponent - 13)
        return round_to(torch.round(y / unit) * unit, dtype)


class BiasAfterRounding(Right):
    def linear(self, x, w, bias=None, *, x_format=None, x_scale=None, out=None):
        y = super().linear(x, w, None, x_format=x_format, x_scale=x_scale)
        return self.give(y if bias is None else y + bias.to(y.dtype), out)


class Unpromoted(Right):
    """Hopper's fp8 unit without promotion: 13 bits all the way along k."""

    def product(self, a, b, x_format):
        if x_format is None or not hasattr(parse_format(x_format).element, "mantissa"):
            return a @ b.T
        return block_sum(a, b, Block(32, 13, 13))


class Promoted(Unpromoted):
    """The same with a float32 sum every 128: right on a GPU."""

    def product(self, a, b, x_format):
        if x_format is None or not hasattr(parse_format(x_format).element, "mantissa"):
            return a @ b.T
        return block_sum(a, b, Block(32, 13, 13, 128))


class MutatesInput(Right):
    def linear(self, x, w, bias=None, *, x_format=None, x_scale=None, out=None):
        y = super().linear(x, w, bias, x_format=x_format, x_scale=x_scale, out=out)
        if x.numel():
            x[..., -1] += 1
        return y


class UnwrittenTail(Right):
    """Does not write the last columns when n is no multiple of 16."""

    def give(self, y, out):
        out = torch.empty_like(y) if out is None else out
        n = y.shape[-1] // 16 * 16 or y.shape[-1]
        out[..., :n] = y[..., :n]
        return out


class Undecided(Right):
    """Another order of k at every call."""

    calls = 0

    def product(self, a, b, x_format):
        self.calls += 1
        order = torch.randperm(a.shape[1], generator=torch.Generator().manual_seed(self.calls))
        total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float32)
        for k in order.tolist():
            total = total + (a[:, None, k] * b[None, :, k]).float()
        return total


class WrongDtype(Right):
    def store(self, y, dtype):
        return y.float()


class IgnoresStride(Right):
    """Reads rows as though they lay k apart."""

    def linear(self, x, w, bias=None, *, x_format=None, x_scale=None, out=None):
        k = w.shape[1]
        rows = x.as_strided((x.shape[:-1].numel(), k), (k, 1))
        y = super().linear(rows, w, bias, x_format=x_format, x_scale=x_scale)
        return self.give(y.reshape(*x.shape[:-1], w.shape[0]), out)


right = Right()
swapped_nibbles = SwappedNibbles()
group_off_by_one = GroupOffByOne()
zero_ignored = ZeroIgnored()
offset_of_wrong_group = OffsetOfWrongGroup()
divisor_multiplied = DivisorMultiplied()
group_index_ignored = GroupIndexIgnored()
last_group_missing = LastGroupMissing()
scale_of_wrong_row = ScaleOfWrongRow()
bias_dropped = BiasDropped()
half_accumulation = HalfAccumulation()
truncating_store = TruncatingStore()
double_rounding = DoubleRounding()
bias_after_rounding = BiasAfterRounding()
unpromoted = Unpromoted()
promoted = Promoted()
mutates_input = MutatesInput()
unwritten_tail = UnwrittenTail()
undecided = Undecided()
wrong_dtype = WrongDtype()
ignores_stride = IgnoresStride()
ignores_bias_stride = IgnoresBiasStride()
