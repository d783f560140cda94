"""Grouped products that are wrong on purpose, each in one way that has happened, and one that is right.

python -m conformance --candidate conformance.wrong_grouped:expert_after_empty
"""

import torch

from ref.combine import take_expert
from ref.moe.grouped_linear import operand
from ref.quantize import dequantize
from ref.rounding import round_to


class Right:
    """One product a row, in float64: the row of x, and the expert, of each row of the result."""

    def grouped_linear(self, x, w, expert_first_token_offset, bias=None, *, x_format=None, x_scale=None):
        rows = torch.arange(len(x))
        owner = self.owner(expert_first_token_offset.long(), rows)
        return self.finish(self.products(operand(x, x_format, x_scale), w, owner, bias), x.dtype)

    def masked_linear(self, x, w, counts, bias=None, *, x_format=None, x_scale=None):
        e, most, k = x.shape
        owner = torch.where(self.counted(torch.arange(most), counts[:, None]), torch.arange(e)[:, None], -1)
        a = operand(torch.where(owner[..., None] < 0, 0, x).reshape(e * most, k), x_format, x_scale)
        return self.finish(self.products(a, w, owner.flatten(), bias), x.dtype).view(e, most, w.shape[1])

    def indexed_linear(
        self, x, w, sorted_token_ids, expert_ids, num_tokens_post_padded, top_k, bias=None, *, topk_weights=None, block_size=None,
        x_format=None, x_scale=None,
    ):  # fmt: skip
        slots, blocks = len(x) * top_k, expert_ids.numel()
        block = block_size or -(-sorted_token_ids.numel() // max(blocks, 1)) or 1
        owner = torch.full((slots + 1,), -1)
        place = torch.arange(int(num_tokens_post_padded))
        owner[sorted_token_ids[place].long().clamp(max=slots)] = self.expert(expert_ids.long(), place // block, w)
        a = operand(x, x_format, x_scale)[self.source(torch.arange(slots), top_k, len(x))]
        y = self.products(a, w, owner[:slots], None if topk_weights is not None and self.late_bias else bias)
        if topk_weights is not None:
            y = self.weigh(y, topk_weights.double().reshape(-1, 1), x.dtype)
            if bias is not None and self.late_bias:
                y = y + torch.where(owner[:slots, None] < 0, 0, bias[owner[:slots]].double())
        return self.finish(y, x.dtype)

    late_bias = False

    def owner(self, offsets, rows):
        owner = torch.searchsorted(offsets[1:], rows, right=True)
        return torch.where(rows < offsets[-1], owner, -1)

    def counted(self, row, count):
        return row < count

    def expert(self, owners, block, w):
        return owners[block]

    def source(self, slot, top_k, rows):
        return slot // top_k

    def products(self, a, w, owner, bias):
        y = a.new_zeros(len(owner), w.shape[1])
        for expert in owner[owner >= 0].unique().tolist():
            rows = owner == expert
            y[rows] = a[rows] @ dequantize(self.weight(w, expert)).T
            y[rows] += 0.0 if bias is None else bias[expert].double()
        return y

    def weight(self, w, expert):
        return take_expert(w, expert)

    def weigh(self, y, weights, dtype):
        return y * weights

    def finish(self, y, dtype):
        return round_to(y, dtype)


class ExpertAfterEmpty(Right):
    """Gives the rows behind an empty expert to that one."""

    def owner(self, offsets, rows):
        owner = torch.searchsorted(offsets[1:], rows + 1, right=False)
        first = torch.searchsorted(offsets, offsets[owner.clamp(max=len(offsets) - 2)], right=False)
        return torch.where(rows < offsets[-1], first.clamp(max=len(offsets) - 2), -1)


class RowsBehindTheLast(Right):
    """Multiplies the rows behind the last expert's by the last expert."""

    def owner(self, offsets, rows):
        return torch.searchsorted(offsets[1:], rows, right=True).clamp(max=len(offsets) - 2)


class TailDropped(Right):
    """Counts whole blocks of four rows only."""

    def counted(self, row, count):
        return row < count // 4 * 4


class ScalesOfTheFirst(Right):
    """Reads the first expert's scales for all of them."""

    def weight(self, w, expert):
        own, first = take_expert(w, expert), take_expert(w, 0)
        return type(own)(own.format, own.shape, own.packed, first.scale, own.zero, own.scale_2, own.group_index, own.offset)


class RemoteAsFirst(Right):
    """Takes blocks of experts that live elsewhere for the first's."""

    def expert(self, owners, block, w):
        return owners[block].clamp(min=0)


class RowOfSlot(Right):
    """Reads row `slot` of x, not slot // top_k."""

    def source(self, slot, top_k, rows):
        return slot.clamp(max=max(rows - 1, 0))


class BiasNotWeighed(Right):
    """Adds the bias behind the router's weight."""

    late_bias = True


class RoundedBeforeTheWeight(Right):
    """Rounds to x's dtype before the router's weight, and again."""

    def weigh(self, y, weights, dtype):
        return round_to(y, dtype).double() * weights


right, expert_after_empty, rows_behind_the_last, tail_dropped = Right(), ExpertAfterEmpty(), RowsBehindTheLast(), TailDropped()
scales_of_the_first, remote_as_first, row_of_slot = ScalesOfTheFirst(), RemoteAsFirst(), RowOfSlot()
bias_not_weighed, rounded_before_the_weight = BiasNotWeighed(), RoundedBeforeTheWeight()
