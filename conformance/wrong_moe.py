"""MoE kernels that are wrong on purpose, each in one way that has happened, and one that is right.

python -m conformance --candidate conformance.wrong_moe:last_expert_again
"""

import torch

import ref
from ref.moe.topk import SCORES
from ref.rounding import round_to


class Right:
    """What ref says, in pieces that the others override; sums in float32, in the order of the slots."""

    def fused_topk(self, logits, top_k, renormalize=True, **rest):
        return ref.fused_topk(logits, top_k, renormalize, **rest)

    def hash_topk(self, logits, table, tokens, renormalize=True, **rest):
        return ref.hash_topk(logits, table, tokens, renormalize, **rest)

    def moe_align_block_size(self, topk_ids, block_size, num_experts, expert_map=None, pad_sorted_ids=False, ignore_invalid_experts=False):
        return ref.moe_align_block_size(topk_ids, block_size, num_experts, expert_map, pad_sorted_ids, ignore_invalid_experts)

    def batched_moe_align_block_size(self, max_tokens, block_size, counts):
        return ref.batched_moe_align_block_size(max_tokens, block_size, counts)

    def moe_permute(self, x, topk_ids, num_experts, expert_map=None, **rest):
        return ref.moe_permute(x, topk_ids, num_experts, expert_map, **rest)

    def moe_scatter_masked(self, x, topk_ids, num_experts, max_tokens, expert_map=None, **rest):
        return ref.moe_scatter_masked(x, topk_ids, num_experts, max_tokens, expert_map, **rest)

    def moe_unpermute(self, rows, topk_weights, inv_permuted_idx, out=None):
        here = self.has_row(inv_permuted_idx)
        picked = rows[inv_permuted_idx.long()] if rows.shape[0] else rows.new_zeros(*here.shape, rows.shape[1])
        return self.give(self.sum(picked, topk_weights, here), rows.dtype, out)

    def moe_fused_mul_sum(self, inputs, topk_weights, topk_ids=None, expert_map=None, out=None):
        here = self.counts(topk_ids, expert_map, topk_weights)
        return self.give(self.sum(inputs, topk_weights, here), inputs.dtype, out)

    def moe_activation(self, x, activation="silu", *, limit=None, alpha=None, beta=None, up_beta=None, format=None):
        return ref.moe_activation(x, activation, limit=limit, alpha=alpha, beta=beta, up_beta=up_beta, format=format)

    def expert_map(self, num_experts, ranks, rank, placement="linear", device=None):
        return ref.expert_map(num_experts, ranks, rank, placement, device)

    def has_row(self, index):
        return index >= 0

    def counts(self, ids, expert_map, weights):
        """bool (m, t): the slots that count."""
        if ids is None:
            return torch.ones(weights.shape, dtype=torch.bool)
        if expert_map is None:
            return ids >= 0
        return (ids >= 0) & (expert_map[ids.long().clamp(min=0)] >= 0)

    def sum(self, rows, weights, here):
        total = torch.zeros(rows.shape[0], rows.shape[2])
        for slot in range(rows.shape[1]):
            total = self.add(total, torch.where(here[:, slot, None], weights[:, slot, None].float() * rows[:, slot].float(), 0.0))
        return total

    def add(self, total, part):
        return total + part

    def give(self, y, dtype, out):
        y = round_to(y.double(), dtype)
        return y if out is None else out.copy_(y)


class BiasedWeights(Right):
    """Weighs with the correction bias, which is there to choose by only."""

    def fused_topk(self, logits, top_k, renormalize=True, *, correction_bias=None, **rest):
        ids, weights = super().fused_topk(logits, top_k, renormalize, correction_bias=correction_bias, **rest)
        if correction_bias is None:
            return ids, weights
        worth = SCORES[rest.get("scoring_func", "softmax")](logits.double()) + correction_bias.double()
        real = (ids >= 0) & (ids < logits.shape[1])
        biased = worth.gather(1, ids.long().clamp(0, logits.shape[1] - 1)).float()
        if renormalize:
            biased = biased / torch.where(real, biased, 0.0).sum(1, keepdim=True)
        return ids, torch.where(real, biased * rest.get("routed_scaling_factor", 1.0), weights)


class HigherOfEquals(Right):
    """Ties go to the higher expert."""

    def fused_topk(self, logits, top_k, renormalize=True, *, correction_bias=None, **rest):
        bias = None if correction_bias is None else correction_bias.flip(0)
        ids, weights = super().fused_topk(logits.flip(1), top_k, renormalize, correction_bias=bias, **rest)
        e = logits.shape[1]
        return torch.where((ids >= 0) & (ids < e), e - 1 - ids, ids), weights


class MaskedByZero(Right):
    """Experts of other groups are worth 0 instead of nothing: they win where all scores with their bias are negative."""

    def fused_topk(self, logits, top_k, renormalize=True, *, num_expert_group=None, topk_group=None, correction_bias=None, **rest):
        if num_expert_group is None or correction_bias is None:
            return super().fused_topk(
                logits,
                top_k,
                renormalize,
                num_expert_group=num_expert_group,
                topk_group=topk_group,
                correction_bias=correction_bias,
                **rest,
            )
        scoring = rest.get("scoring_func", "softmax")
        worth = SCORES[scoring](logits.double()) + correction_bias.double()
        planes = worth.unflatten(1, (num_expert_group, -1))
        best = planes.sort(dim=2, descending=True).values[..., :2].sum(2)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(
            1, best.sort(dim=1, descending=True, stable=True).indices[:, :topk_group], True
        )
        worth = torch.where(kept[..., None], planes, 0.0).flatten(1)
        ids = worth.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
        # The weights of a choice are those of a table.
        shared = {name: value for name, value in rest.items() if name != "scoring_func"}
        return ref.hash_topk(logits, ids, torch.arange(len(logits)), renormalize, scoring_func=scoring, **shared)


class PaddingRouted(Right):
    """Routes padding rows, too."""

    def fused_topk(self, logits, top_k, renormalize=True, *, num_valid=None, **rest):
        return super().fused_topk(logits, top_k, renormalize, **rest)

    def hash_topk(self, logits, table, tokens, renormalize=True, *, num_valid=None, **rest):
        return super().hash_topk(logits, table, tokens, renormalize, **rest)


class TableOfRow(Right):
    """Looks the experts up by the token's place instead of its id."""

    def hash_topk(self, logits, table, tokens, renormalize=True, **rest):
        return super().hash_topk(logits, table, torch.arange(len(tokens)) % table.shape[0], renormalize, **rest)


class LastExpertAgain(Right):
    """An empty expert leaves its blocks' owner to the expert after it off by one: owners are counted among the experts that have slots."""

    def moe_align_block_size(self, topk_ids, block_size, num_experts, expert_map=None, pad_sorted_ids=False, ignore_invalid_experts=False):
        order, owners, end = super().moe_align_block_size(
            topk_ids, block_size, num_experts, expert_map, pad_sorted_ids, ignore_invalid_experts
        )
        if expert_map is not None:
            return order, owners, end
        used = owners[owners >= 0].unique()
        return order, torch.where(owners < 0, owners, torch.searchsorted(used, owners).to(torch.int32)), end


class TailAsFirstExpert(Right):
    """Blocks behind the end belong to expert 0, as they did in old kernels."""

    def moe_align_block_size(self, topk_ids, block_size, num_experts, expert_map=None, pad_sorted_ids=False, ignore_invalid_experts=False):
        order, owners, end = super().moe_align_block_size(
            topk_ids, block_size, num_experts, expert_map, pad_sorted_ids, ignore_invalid_experts
        )
        return order, torch.where(torch.arange(len(owners)) * block_size >= end, 0, owners), end


class PaddingCounted(Right):
    """Every expert has a block more than it needs, where its slots are a multiple of the block; the end says so."""

    def moe_align_block_size(self, topk_ids, block_size, num_experts, expert_map=None, pad_sorted_ids=False, ignore_invalid_experts=False):
        order, owners, end = super().moe_align_block_size(
            topk_ids, block_size, num_experts, expert_map, pad_sorted_ids, ignore_invalid_experts
        )
        whole = (topk_ids >= 0).any() and (order[: int(end)] < topk_ids.numel()).all() and block_size > 1
        return order, owners, end + block_size * int(whole)

    def batched_moe_align_block_size(self, max_tokens, block_size, counts):
        order, owners, _ = super().batched_moe_align_block_size(max_tokens, block_size, counts)
        return order, owners, ((counts // block_size + 1) * block_size).sum().to(torch.int32)[None]


class EmptySlotsCounted(Right):
    """Empty slots are slots of the last expert: -1 as an index from the end."""

    def moe_align_block_size(self, topk_ids, block_size, num_experts, expert_map=None, pad_sorted_ids=False, ignore_invalid_experts=False):
        ids = torch.where(topk_ids == -1, num_experts - 1, topk_ids)
        return super().moe_align_block_size(ids, block_size, num_experts, expert_map, pad_sorted_ids, ignore_invalid_experts)

    def moe_permute(self, x, topk_ids, num_experts, expert_map=None, **rest):
        return super().moe_permute(x, torch.where(topk_ids == -1, num_experts - 1, topk_ids), num_experts, expert_map, **rest)


class DocumentedBatches(Right):
    """Owners as a docstring has them: all blocks of a plane, also those that hold nothing."""

    def batched_moe_align_block_size(self, max_tokens, block_size, counts):
        order, _, end = super().batched_moe_align_block_size(max_tokens, block_size, counts)
        each = -(-max_tokens // block_size)
        return order, torch.arange(len(counts), dtype=torch.int32).repeat_interleave(each), end


class TailDropped(Right):
    """Slots behind the last whole 32 keep no row."""

    def moe_permute(self, x, topk_ids, num_experts, expert_map=None, **rest):
        rows, offsets, inverse, order = super().moe_permute(x, topk_ids, num_experts, expert_map, **rest)
        if inverse.numel() > 32:
            lost = inverse.flatten()[inverse.numel() // 32 * 32 :]
            rows[lost[lost >= 0].long()] = 0
        return rows, offsets, inverse, order


class StaleGaps(Right):
    """Rows that fill a gap between experts are not zeroed."""

    def moe_permute(self, x, topk_ids, num_experts, expert_map=None, **rest):
        rows, offsets, inverse, order = super().moe_permute(x, topk_ids, num_experts, expert_map, **rest)
        rows[order == inverse.numel()] = 7
        return rows, offsets, inverse, order

    def moe_scatter_masked(self, x, topk_ids, num_experts, max_tokens, expert_map=None, **rest):
        planes, counts, inverse = super().moe_scatter_masked(x, topk_ids, num_experts, max_tokens, expert_map, **rest)
        planes[torch.arange(max_tokens) >= counts[:, None]] = 7
        return planes, counts, inverse


class MapForgotten(Right):
    """Planes by the experts of all ranks."""

    def moe_scatter_masked(self, x, topk_ids, num_experts, max_tokens, expert_map=None, **rest):
        if expert_map is None or not bool((expert_map >= 0).any()):
            return super().moe_scatter_masked(x, topk_ids, num_experts, max_tokens, expert_map, **rest)
        # The first experts', whichever live here.
        first = torch.arange(num_experts) - (torch.arange(num_experts) >= int((expert_map >= 0).sum())) * 2 * num_experts
        return super().moe_scatter_masked(x, topk_ids, num_experts, max_tokens, first.clamp(min=-1), **rest)


class RowsOfEmptySlots(Right):
    """Slots without a row take the last one."""

    def has_row(self, index):
        return torch.ones_like(index, dtype=torch.bool)


class MapReadBackwards(Right):
    """A negative id is looked up in the expert map: that of the last expert."""

    def counts(self, ids, expert_map, weights):
        if ids is None or expert_map is None:
            return super().counts(ids, expert_map, weights)
        return expert_map[ids.long().clamp(min=-1)] >= 0


class RemoteSlotsCounted(Right):
    """Slots of other ranks count, with whatever their rows hold."""

    def counts(self, ids, expert_map, weights):
        return super().counts(ids, None, weights)


class RowsLeft(Right):
    """Tokens without a local slot are left as they were."""

    def moe_fused_mul_sum(self, inputs, topk_weights, topk_ids=None, expert_map=None, out=None):
        here = self.counts(topk_ids, expert_map, topk_weights).any(1)
        y = super().moe_fused_mul_sum(inputs, topk_weights, topk_ids, expert_map)
        out = torch.full_like(y, 3) if out is None else out
        out[here] = y[here]
        return out


class HalfSums(Right):
    """Sums kept in float16."""

    def add(self, total, part):
        return (total + part).half().float()


class Offsets32(Right):
    """Offsets of rows in 32 bits: those of 2^31 and more elements wrap around."""

    def moe_fused_mul_sum(self, inputs, topk_weights, topk_ids=None, expert_map=None, out=None):
        m, t, k = inputs.shape
        start = inputs.storage_offset()
        token = torch.arange(m) * inputs.stride(0)
        # Behind a wrap there is nothing; what a GPU would find there is as good as the beginning.
        token = torch.where(token >= 2**31, 0, token)
        flat = inputs.as_strided((inputs.untyped_storage().nbytes() // inputs.itemsize,), (1,), 0)
        at = token[:, None, None] + torch.arange(t)[:, None] * inputs.stride(1) + torch.arange(k) * inputs.stride(2) + start
        return super().moe_fused_mul_sum(flat[at], topk_weights, topk_ids, expert_map, out)


class NoSaturation(Right):
    """silu as g e^g / (1 + e^g) in float32: NaN from g = 89."""

    def moe_activation(self, x, activation="silu", *, format=None, **given):
        if activation != "silu" or given.get("limit") is not None or format is not None:
            return super().moe_activation(x, activation, format=format, **given)
        g, u = x.float().chunk(2, dim=-1)
        return (g * g.exp() / (1 + g.exp()) * u).to(x.dtype)


class LimitBeforeSilu(Right):
    """swiglustep's limit on the gate before its silu, not after."""

    def moe_activation(self, x, activation="silu", *, limit=None, format=None, **given):
        if activation == "swiglustep":
            return super().moe_activation(x, "silu", limit=7.0 if limit is None else limit, format=format)
        return super().moe_activation(x, activation, limit=limit, format=format, **given)


class HalvesForInterleaved(Right):
    """swigluoai's gate and up as halves."""

    def moe_activation(self, x, activation="silu", *, limit=None, **rest):
        if activation == "swigluoai":
            return super().moe_activation(x, "swigluoai_uninterleave", limit=7.0 if limit is None else limit, **rest)
        return super().moe_activation(x, activation, limit=limit, **rest)


class GateRounded(Right):
    """The gate rounded before it is multiplied: a variant, right where no other is declared."""

    def moe_activation(self, x, activation="silu", *, limit=None, format=None, **given):
        if activation != "silu" or format is not None:
            return super().moe_activation(x, activation, limit=limit, format=format, **given)
        g, u = x.double().chunk(2, dim=-1)
        g, u = (g, u) if limit is None else (g.clamp(max=limit), u.clamp(-limit, limit))
        return round_to(round_to(g * g.sigmoid(), x.dtype).double() * u, x.dtype)


class GateRoundedUndeclared(GateRounded):
    VARIANTS = {"moe_activation": ("exact",)}  # noqa: RUF012


class AnyOrder(Right):
    """Slots of an expert in descending order: a variant."""

    def moe_align_block_size(self, topk_ids, block_size, num_experts, expert_map=None, pad_sorted_ids=False, ignore_invalid_experts=False):
        n = topk_ids.numel()
        order, owners, end = super().moe_align_block_size(
            topk_ids.flatten().flip(0)[:, None], block_size, num_experts, expert_map, pad_sorted_ids, ignore_invalid_experts
        )
        return torch.where(order < n, n - 1 - order, order), owners, end


class AnyOrderUndeclared(AnyOrder):
    VARIANTS = {"moe_align_block_size": ("stable",)}  # noqa: RUF012


class RemainderToTheLast(Right):
    """The last ranks have one expert more, as a docstring says."""

    def expert_map(self, num_experts, ranks, rank, placement="linear", device=None):
        found = super().expert_map(num_experts, ranks, rank if placement != "linear" else ranks - 1 - rank, placement, device)
        if placement == "linear":
            found = found.flip(0)
            found[found >= 0] = found[found >= 0].flip(0)
        return found


right = Right()
biased_weights = BiasedWeights()
higher_of_equals = HigherOfEquals()
masked_by_zero = MaskedByZero()
padding_routed = PaddingRouted()
table_of_row = TableOfRow()
last_expert_again = LastExpertAgain()
tail_as_first_expert = TailAsFirstExpert()
padding_counted = PaddingCounted()
empty_slots_counted = EmptySlotsCounted()
documented_batches = DocumentedBatches()
tail_dropped = TailDropped()
stale_gaps = StaleGaps()
map_forgotten = MapForgotten()
rows_of_empty_slots = RowsOfEmptySlots()
map_read_backwards = MapReadBackwards()
remote_slots_counted = RemoteSlotsCounted()
rows_left = RowsLeft()
half_sums = HalfSums()
offsets_32 = Offsets32()
no_saturation = NoSaturation()
limit_before_silu = LimitBeforeSilu()
halves_for_interleaved = HalvesForInterleaved()
gate_rounded = GateRounded()
gate_rounded_undeclared = GateRoundedUndeclared()
any_order = AnyOrder()
any_order_undeclared = AnyOrderUndeclared()
remainder_to_the_last = RemainderToTheLast()
