"""The general GEMM over stacks of experts: rows in blocks of one expert each."""

from dataclasses import replace

import torch

from fast.moe.blocks import ByBlocks

from . import gemm
from .numerics import DOT_OF, Numerics

# The interpreter runs best with few blocks.
MOST_ROWS = 128


def why_not(request):
    """Why the kernel cannot multiply by such elements, as a sentence; None for all others and for plain weights."""
    return None if request.format is None else gemm.why_not(request)


def prepare(w, request):
    """The plan for one stack.

    Raises:
        NotImplementedError: a plain weight of another type than x.
    """
    return GroupedGemmPlan(w, request)


class GroupedGemmPlan(ByBlocks, gemm.GemmPlan):
    """One stack of weights; see ByBlocks."""

    rotate = None

    def __init__(self, w, request):
        self.experts = request.shape[0]
        if request.format is not None:
            super().__init__(w, request)
            return
        if w.dtype != request.x_dtype:
            raise NotImplementedError(f"the weight is {w.dtype} and x {request.x_dtype}, and both have to be of one type")
        self._set_up(request)
        self.numerics, self.step = Numerics(DOT_OF[w.dtype], w.dtype, native=True, scale="none"), 0
        self._take_plain(w)
        self._finish(request)

    def _take_plain(self, w):
        w = w.contiguous()
        nothing = self.nothing
        self.weight, self.row_bytes = w, w.shape[2]
        self.scale = self.zero = self.offset = self.far = self.scale_2 = self.table = self.scale_table = nothing
        self.scalars = 1.0, 1.0, 1.0
        self.constants = {
            "DECODE": "none", "MIDDLE": 0, "EXPONENT": 0, "MANTISSA": 0, "SIGNED": True, "SPECIALS": "ieee", "UNBIAS": 1.0, "BITS": 8,
            "UNIT": 1.0, "ZERO": False, "OFFSET": False, "SCALE": "none", "FAR": False, "GN": 0, "GK": 0, "SCALE_2": "none",
        }  # fmt: skip

    def _make_ways(self):
        # By block size and split; of both there are few.
        self.ways = {}
        self.counters = None
        if not self.interpret:
            from .jit import Counters

            self.counters = Counters(self.device, gemm.BLOCKS_PER_SM * self.multiprocessors)

    def _way_for(self, block, blocks):
        rows = min(MOST_ROWS, max(16, 1 << (block - 1).bit_length()))
        key = block, self._split(rows, blocks)
        way = self.ways.get(key)
        if way is None:
            way = self._way(rows, blocks)
            way = self.ways[key] = replace(way, constants=[constants | {"BLOCK": block} for constants in way.constants])
        return key, way

    def _split(self, rows, blocks):
        """What decides how often k is split, as _way does it."""
        if rows > gemm.SPLIT_ROWS:
            return 1
        return max(1, min(16, gemm.BLOCKS_PER_SM * self.multiprocessors // (blocks * -(-self.n // 64))))

    def run(
        self, x, bias, x_scale, out, *, sorted_token_ids, expert_ids, num_tokens_post_padded, top_k, topk_weights=None, block_size
    ):  # fmt: skip
        blocks = expert_ids.numel()
        if not blocks or not out.numel():
            return
        if topk_weights is not None and topk_weights.dtype == torch.float64:
            topk_weights = topk_weights.float()
        routing = sorted_token_ids, expert_ids, num_tokens_post_padded, topk_weights
        with gemm._on(self.device):
            if self.rotate is not None:
                x = self.rotate(x)
            key, way = self._way_for(block_size, blocks)
            aligned = tuple(None if t is None else (t.dtype, self.multiple_of_16(t)) for t in routing)
            blocks_m = blocks * -(-block_size // way.tile.bm)
            counts = sorted_token_ids.numel(), top_k, self.experts
            self._launch((key, aligned, top_k), way, blocks_m, out.shape[0], x, bias, x_scale, out, routing, counts)
