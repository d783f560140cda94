"""The sum over blocks that share an output tile, in a fixed order whoever comes last."""

import torch
import triton.language as tl

from .jit import device_function, stream_of


@device_function
def sum_over_blocks(acc, place, tickets, part, parts, SPLIT: tl.constexpr, stride):
    """The sum of all blocks' acc, in the order of their parts, and whether this block is the one that holds it.

    Each block draws a number. All but the last leave their acc in the workspace and say so; the last keeps its own in registers and
    waits for the rest, which run already since they drew before it. So the bits do not depend on who is last, and no block waits for one that
    has not started. It leaves the tickets at zero for the next launch.

    acc: float32. place: pointers (acc's shape) to the tile's part 0, int32, parts `stride` elements apart. tickets: two int32, zero before the launch.
    part: this block's number, below parts.
    """
    last = tl.atomic_add(tickets, 1, sem="relaxed") == parts - 1
    if last:
        arrived = tl.atomic_add(tickets + 1, 0, sem="acquire")
        while arrived < parts - 1:
            arrived = tl.atomic_add(tickets + 1, 0, sem="acquire")
        tl.debug_barrier()
        if SPLIT == 2:
            # a + b = b + a.
            acc += tl.load(place + (1 - part) * stride, cache_modifier=".cg").to(tl.float32, bitcast=True)
        else:
            acc = _in_order(acc, place, part, parts, stride)
        tl.store(tickets, 0)
        tl.store(tickets + 1, 0)
    else:
        tl.store(place + part * stride, acc.to(tl.int32, bitcast=True))
        # Every thread's part is written before the block says so.
        tl.debug_barrier()
        tl.atomic_add(tickets + 1, 1, sem="release")
    return acc, last


@device_function
def _in_order(own, place, part, parts, stride):
    total = tl.full(own.shape, 0.0, tl.float32)
    for i in range(parts):
        is_own = tl.full(own.shape, i, tl.int32) == part
        other = tl.load(place + i * stride, mask=~is_own, other=0, cache_modifier=".cg").to(tl.float32, bitcast=True)
        total += tl.where(is_own, own, other)
    return total


# By device and stream: how many parts and tickets there are, their addresses, and the tensors.
_OF_STREAM = {}


class Workspace:
    """Parts and tickets for the launches of one plan.

    Launches on one stream follow each other: there, all plans share one workspace. A launch that is captured into a CUDA graph, which may be
    replayed on any stream, has parts of its own in the graph's memory, and tickets of its own: out of a stock that is at zero beforehand, and
    after that in the graph's memory, too, set to zero by a launch of their own.
    """

    STOCK = 32

    def __init__(self, device, parts, tickets):
        """parts, tickets: how many a launch needs."""
        # Rows of the stock start at 16 bytes, as the kernels are told.
        self.device, self.parts, self.tickets = device, parts, -(-tickets // 4) * 4
        self.of_stream = _OF_STREAM.setdefault(device.index, {})
        self.stock = []
        if not torch.cuda.is_current_stream_capturing():
            self.zeros = torch.zeros(self.STOCK, self.tickets, dtype=torch.int32, device=device)
            self.stock = [row.data_ptr() for row in self.zeros]
            # A graph may be replayed on another stream.
            torch.cuda.current_stream(device).synchronize()

    def current(self):
        """Addresses of parts and tickets for a launch on the current stream."""
        if torch.cuda.is_current_stream_capturing():
            return self._for_graph()
        held = self.of_stream.get(stream_of(self.device))
        if held is None or held[0] < self.parts or held[1] < self.tickets:
            held = self._grow(held)
        return held[2]

    def _for_graph(self):
        # Memory of the graph that is given back here is not used again before the launch.
        parts = torch.empty(self.parts, dtype=torch.int32, device=self.device)
        if self.stock:
            return parts.data_ptr(), self.stock.pop()
        return parts.data_ptr(), torch.zeros(self.tickets, dtype=torch.int32, device=self.device).data_ptr()

    def _grow(self, held):
        parts, tickets = (max(self.parts, held[0]), max(self.tickets, held[1])) if held else (self.parts, self.tickets)
        memory = torch.empty(parts, dtype=torch.int32, device=self.device), torch.zeros(tickets, dtype=torch.int32, device=self.device)
        held = self.of_stream[stream_of(self.device)] = parts, tickets, tuple(part.data_ptr() for part in memory), memory
        return held
