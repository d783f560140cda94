"""The "torch" implementation of the grouped products: expert after expert in plain torch, on every device.

On the CPU each expert's rows are picked, and products run in float64. On a GPU, which is not to be waited for, each expert takes all the rows that
it may have, and what is not its own is left out: slow, and right for everything.
"""

import torch

from fast import eager

from ..quantize_input import quantized_values
from .blocks import ByBlocks


def why_not(request):
    """None: it takes everything."""
    return None


def prepare(w, request, bias=None):
    return GroupedPlan(w, request)


class GroupedPlan(ByBlocks):
    """One stack of weights; see ByBlocks."""

    def __init__(self, w, request):
        self.x_format, self.w = request.x_format, w
        experts = range(request.shape[0])
        self.experts = [_Plain(w[e]) if request.format is None else eager._plan(eager._expert(w, e)) for e in experts]

    def run(
        self, x, bias, x_scale, out, *, sorted_token_ids, expert_ids, num_tokens_post_padded, top_k, topk_weights=None, block_size
    ):  # fmt: skip
        slots = out.shape[0]
        place = torch.arange(sorted_token_ids.numel(), device=x.device)
        ids = sorted_token_ids.long()
        used = (ids >= 0) & (ids < slots) & (place < num_tokens_post_padded)
        # A place for what is left out, behind the last slot.
        owner = torch.full((slots + 1,), len(self.experts), dtype=torch.int32, device=x.device)
        held = torch.where((expert_ids >= 0) & (expert_ids < len(self.experts)), expert_ids, -1)
        owner[torch.where(used, ids, slots)] = held[place // block_size]
        owner = owner[:slots]
        # Blocks of experts that do not exist are zeros; slots in no block are left alone.
        out.copy_(torch.where((owner == len(self.experts))[:, None], out, 0))
        source = torch.arange(slots, device=x.device) // top_k
        self._all(self._operand(x, x_scale), source, owner, bias, topk_weights, out)

    def contiguous(self, x, offsets, bias, x_scale, out):
        row = torch.arange(x.shape[0], device=x.device)
        if self._fits_grouped_mm(x, bias):
            y = torch._grouped_mm(x, self.w.transpose(1, 2), offs=offsets[1:].to(torch.int32))
            out.copy_(torch.where((row < offsets[-1])[:, None], y, 0))
            return
        owner = torch.searchsorted(offsets[1:].contiguous(), row.to(offsets.dtype), right=True)
        self._all(self._operand(x, x_scale), row, owner, bias, None, out.zero_())

    def masked(self, x, counts, bias, x_scale, out):
        e, most, k = x.shape
        a = self._operand(x.view(e * most, k), x_scale).view(e, most, k)
        row = torch.arange(most, device=x.device)
        for expert in range(e):
            here = torch.where(row < counts[expert], expert, -1)
            self._one(expert, a[expert], row, here, bias, None, out[expert].zero_())

    def _operand(self, x, x_scale):
        return x if self.x_format is None else quantized_values(x, self.x_format, x_scale)

    def _all(self, a, source, owner, bias, weights, out):
        for expert in range(len(self.experts)):
            self._one(expert, a, source, owner, bias, weights, out)

    def _one(self, expert, a, source, owner, bias, weights, out):
        """out[i] = (a[source[i]] W^T + bias) * weights[i] where owner[i] is this expert; the rest stays as it is."""
        here = owner == expert
        rows = slice(None) if out.is_cuda else here.nonzero()[:, 0]
        if not out.is_cuda and not rows.numel():
            return
        a = a[source[rows]]
        # Sums as they are, not rounded yet.
        exact = torch.float32 if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16) else torch.float64
        y = torch.empty(a.shape[0], out.shape[1], dtype=exact, device=out.device)
        self.experts[expert].run(a, None if bias is None else bias[expert], None, y)
        if weights is not None:
            y = y * weights[rows, None].to(y.dtype)
        y = eager._round_once(y, out.dtype)
        out[rows] = torch.where(here[:, None], y, out) if out.is_cuda else y

    def _fits_grouped_mm(self, x, bias):
        """Whether torch's own grouped product, one rounding and no bias, takes the call."""
        if not x.is_cuda or not isinstance(self.w, torch.Tensor) or self.x_format is not None or bias is not None:
            return False
        if x.dtype != torch.bfloat16 or self.w.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x.device) < (9, 0):
            return False
        aligned = (x, self.w, x.stride(0) * 2, self.w.stride(1) * 2, self.w.shape[1] * 2)
        strides = self.w.stride(2) == 1 and x.stride(0) >= x.shape[1] and torch.version.hip is None
        return strides and all((t.data_ptr() if isinstance(t, torch.Tensor) else t) % 16 == 0 for t in aligned)


class _Plain:
    """A plain weight (n, k) with the one method of eager.Plan that is asked for."""

    def __init__(self, w):
        self.w = w

    def run(self, x, bias, x_scale, out):
        if out.dtype == torch.float32:
            y = torch.mm(x, self.w.to(x.dtype).T, out_dtype=torch.float32)
        else:
            y = x.to(torch.float64) @ self.w.to(torch.float64).T
        out.copy_(y if bias is None else y + bias.detach().to(y.dtype))
