"""What a plan for a stack of expert weights offers; and rows in any layout as blocks of one expert each."""

import torch

from .stack import block_size_for


class ByBlocks:
    """A plan: the three layouts, of which a subclass has the indexed one, `run`. Nothing here waits for a GPU.

    Results are written whole: rows that no expert has are zeros, but for slots in no block of `run`, which it leaves as they are. Experts
    and ids out of range are as if they were not there; nothing is read through them.
    """

    def run(
        self, x, bias, x_scale, out, *, sorted_token_ids, expert_ids, num_tokens_post_padded, top_k, topk_weights=None, block_size
    ):  # fmt: skip
        """out[i] = (x[i // top_k] W[e]^T + bias[e]) * topk_weights[i] for the slots i of blocks of expert e; zeros for expert -1.

        Args:
            x: (m, k), columns adjacent. bias: (e, n) contiguous, or None. x_scale: one number, or None.
            out: (m * top_k, n) contiguous, dtype of x.
            sorted_token_ids, expert_ids, num_tokens_post_padded: int32, as moe_align_block_size gives them for block_size.
            topk_weights: (m * top_k,) contiguous floats, or None.
        """
        raise NotImplementedError

    def contiguous(self, x, offsets, bias, x_scale, out):
        """grouped_linear. x: (r, k), columns adjacent. offsets: (e + 1,) int32 or int64. out: (r, n) contiguous."""
        r, e = x.shape[0], offsets.numel() - 1
        block = block_size_for(-(-r // max(e, 1)))
        self._run(x, bias, x_scale, out, blocks_of_offsets(offsets, r, block), block)

    def masked(self, x, counts, bias, x_scale, out):
        """masked_linear. x: (e, max_tokens, k) contiguous. counts: (e,) int32 or int64. out: (e, max_tokens, n) contiguous."""
        e, most, k = x.shape
        block = block_size_for(most)
        out.zero_()
        self._run(x.view(e * most, k), bias, x_scale, out.view(e * most, -1), blocks_of_counts(counts, most, block), block)

    def _run(self, x, bias, x_scale, out, blocks, block):
        ids, owners, end = blocks
        self.run(
            x, bias, x_scale, out, sorted_token_ids=ids, expert_ids=owners, num_tokens_post_padded=end, top_k=1, block_size=block
        )  # fmt: skip


def blocks_of_offsets(offsets, r, block):
    """Rows offset[e] <= row < offset[e + 1] of r as blocks of expert e, and the rest as blocks of expert -1.

    Returns:
        sorted ids (blocks * block,), experts (blocks,), end (1,): int32, as moe_align_block_size gives them.
    """
    e = offsets.numel() - 1
    most = min(r, -(-r // block) + e)
    if offsets.is_cuda:
        from fast.triton import moe_blocks

        return moe_blocks.blocks(offsets, r, block, most)
    edges = torch.cat((offsets.long().clamp(0, r), offsets.new_full((1,), r).long()))
    # Offsets that do not ascend give empty experts, here as there.
    return _blocks(edges[:-1], edges.diff().clamp(min=0), r, block, most, e)


def blocks_of_counts(counts, most, block):
    """The first counts[e] of `most` rows of each expert as its blocks. Returns: as blocks_of_offsets."""
    e = counts.numel()
    if counts.is_cuda:
        from fast.triton import moe_blocks

        return moe_blocks.blocks(counts, e * most, block, e * -(-most // block), most)
    return _blocks(torch.arange(e, device=counts.device) * most, counts.long().clamp(0, most), e * most, block, e * -(-most // block), e)


def _blocks(starts, counts, n, block, blocks, experts):
    """Runs of rows as blocks; the run with number `experts` belongs to -1."""
    device = starts.device
    ends = (-(-counts // block)).cumsum(0)
    number = torch.arange(blocks, device=device)
    run = torch.searchsorted(ends, number, right=True)
    held = run.clamp(max=max(len(counts) - 1, 0))
    first = torch.cat((ends.new_zeros(1), ends))[held]
    row = ((number - first) * block)[:, None] + torch.arange(block, device=device)
    used = (run < len(counts))[:, None] & (row < counts[held, None])
    ids = torch.where(used, starts[held, None] + row, n)
    owners = torch.where(run < experts, run, -1)
    return ids.flatten().to(torch.int32), owners.to(torch.int32), (ends[-1:] * block).to(torch.int32)
