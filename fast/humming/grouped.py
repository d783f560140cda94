"""Products of many experts' weights by Humming: rows that are picked by index, that lie expert after expert, or by expert with room to spare.

One rounding of each product, the same bits on every run: as fast.humming, by the same layers, with tiles of their own.
"""

import contextlib
import itertools
import json
from dataclasses import replace

import torch

from . import layer, moe_tiles
from .plan import kernel_input, quantizer_for
from .rules import group_size, in_blocks
from .rules import why_not as rules

# Of compute capability 9.0: the tables of moe_tiles are for no other.
CAPABILITY = (9, 0)


def why_not(request):
    """Why Humming cannot multiply by such a stack of weights, request.shape (e, n, k), as a sentence; None if it can."""
    fmt = request.format
    if fmt is None:
        return "it multiplies by quantized weights"
    if request.bias and (request.x_format is not None or fmt.scale_2 is not None or fmt.group == (0, 0)):
        return "it can build a bias into weights without a second scale, for 16-bit activations, and would else add it after rounding"
    if request.group_index or fmt.hadamard:
        return "its experts' columns are neither reordered nor rotated"
    if request.weighed:
        return "it applies a router's weight to nothing before the result has been rounded"
    reason = rules(replace(request, bias=False))
    if reason is None and torch.cuda.get_device_capability(request.device) != CAPABILITY:
        return "its tiles for experts are chosen for compute capability 9.0"
    return reason


def tiles_for(request):
    """The table of tiles for a kind of call."""
    if request.x_format is None:
        return moe_tiles.HALF
    return moe_tiles.FP8_BLOCKS if in_blocks(request) else moe_tiles.EIGHT


def bits_of(request):
    """Bits of a number of x, and of a weight with its share of the scale and of the zero point, in shared memory."""
    fmt, x_format = request.format, request.x_format
    zero = (4 if fmt.element.bits <= 4 else 8) if fmt.zero or not getattr(fmt.element, "signed", True) else 0
    return 16 if x_format is None else 8, fmt.element.bits + (32 + zero) / group_size(fmt, x_format)


def choose_block(rows, shapes, request):
    """The block size that serves a layer's weights best, before they are prepared: GroupedPlan.block_size.

    Args:
        rows: slots whose experts live here, about. shapes: (n, k) of each product. request: of one of them.
    """
    sms = torch.cuda.get_device_properties(request.device).multi_processor_count
    return moe_tiles.choose_block(tiles_for(request), rows, [layer.padded(shape) for shape in shapes], request.shape[0], sms)


def prepare(w, request, bias=None):
    """A GroupedPlan: the weights in Humming's layout, the kernels for rows picked by index compiled and loaded.

    Args:
        w: QTensor (e, n, k).
        bias: None, or (e, n), which becomes a part of the weights, and of every product before it is rounded.

    Raises:
        NotImplementedError: values that Humming would change, or a weight that its tiles do not fit.
    """
    if request.bias and bias is None:
        raise NotImplementedError("Humming adds a bias after the result has been rounded, but for the one that it is prepared with")
    from humming.ops.utils import init_humming_launcher

    with torch.cuda.device(request.device):
        init_humming_launcher()
        config, tensors = layer.build(w, request, bias)
        return GroupedPlan(request, config, tensors, bias is not None)


class GroupedPlan:
    """A stack of weights in Humming's layout and its kernels; the three layouts as fast.moe.blocks.ByBlocks describes them.

    block_sizes: the rows of blocks that `run` takes as they are; others it takes apart or fills up.
    n, k: of the results and of x, rounded up to whole 16-byte rows. ones: the column of x that a built-in bias needs, or None.
    """

    def __init__(self, request, config, tensors, biased):
        device = request.device
        self.config, self.tensors, self.device = config, tensors, device
        self.experts, self.n, self.k = config.num_experts, config.shape_n - config.pad_shape_n, config.shape_k - config.pad_shape_k
        self.ones = layer.bias_column(request.shape[-1], group_size(request.format)) if biased else None
        self.tiles, self.dtype = tiles_for(request), request.x_dtype
        self.sms = torch.cuda.get_device_properties(device).multi_processor_count
        self.block_sizes = moe_tiles.sizes(self.tiles, (config.shape_n, config.shape_k))
        self.bits = bits_of(request)
        self.locks = torch.zeros(0, dtype=torch.int32, device=device)
        self.quantizer = quantizer_for(request.x_format)
        self.grouped = bool(request.x_format and request.x_format.group[1])
        self.launch = torch.ops.humming.launch_kernel.out
        self.tables = {}
        self._compile("indexed")
        self._warm_up("indexed")

    def _compile(self, layout):
        """Humming's kernels by number of rows, for one layout; for picked rows by block size, too. All are compiled at once."""
        from humming.kernel.humming import HummingKernel

        shape = self.config.shape_n, self.config.shape_k
        sizes = self.block_sizes if layout == "indexed" else (None,)
        lists = [moe_tiles.intervals(self.tiles, shape, self.experts, self.sms, layout, self.bits, m) for m in sizes]
        compute = json.dumps({"gemm_type": layout})
        try:
            made = HummingKernel.prepare_kernels(self.config.to_str(), compute, json.dumps(list(itertools.chain(*lists))), self.device)
        except (AssertionError, ValueError) as error:
            raise NotImplementedError(f"Humming has no kernel for these tiles and this weight: {error}") from error
        parts = made.split([4 * len(part) for part in lists])
        self.tables[layout] = {m: part.clone() for m, part in zip(sizes, parts, strict=True)}

    def _warm_up(self, layout):
        """Launch every kernel over no rows at all: the first launch loads it, which a CUDA graph being captured would not survive."""
        x = torch.zeros(1, self.k, dtype=self.quantizer.dtype if self.quantizer else self.dtype, device=self.device)
        x_scale = torch.zeros(self.k, device=self.device) if self.quantizer else None
        zeros = torch.zeros(self.experts + 1, dtype=torch.int32, device=self.device)
        y = torch.empty(1, self.n, dtype=self.dtype, device=self.device)
        for table in self.tables[layout].values():
            for high in table[1::4].tolist():
                if layout == "indexed":
                    self._launch(table, x, x_scale, y, ids=zeros, owners=zeros, end=zeros[:1], top_k=1, rows=high)
                else:
                    self._launch(table, x, x_scale, y, expert_layout=zeros, rows=high)

    def block_size(self, rows, *others):
        """The best block size for so many slots of all experts; where others are given, plans of other weights, for all one after the other."""
        shapes = [(plan.config.shape_n, plan.config.shape_k) for plan in (self, *others)]
        return moe_tiles.choose_block(self.tiles, rows, shapes, self.experts, self.sms)

    def run(
        self, x, bias, x_scale, out, *, sorted_token_ids, expert_ids, num_tokens_post_padded, top_k, topk_weights=None, block_size, trusted=False
    ):  # fmt: skip
        """As ByBlocks.run, but for the bias, which is in the weights already.

        Args:
            x: (m, k); or (m, self.k) as the kernel reads it, with zeros past k and ones in column self.ones.
            trusted: all blocks are of experts that exist, as moe_align_block_size with ignore_invalid_experts makes them. Then, if their
                size is one of block_sizes, nothing looks at them again.
        """
        _refuse(topk_weights)
        blocks, rows = (sorted_token_ids, expert_ids, num_tokens_post_padded), block_size
        with self._device():
            a, a_scale = self._input(x, x_scale)
            y = self._whole(out)
            if not trusted or block_size not in self.block_sizes or sorted_token_ids.data_ptr() % 16:
                from .reblock import reblock

                rows = max((m for m in self.block_sizes if block_size % m == 0), default=self._filled(block_size))
                blocks = reblock(*blocks, block_size, rows, self.experts, y)
            ids, owners, end = blocks
            self._launch(self.tables["indexed"][rows], a, a_scale, y, ids=ids, owners=owners, end=end, top_k=top_k)
            if y is not out:
                out.copy_(y[:, : out.shape[1]])

    def contiguous(self, x, offsets, bias, x_scale, out, trusted=False):
        """As ByBlocks.contiguous. trusted: offsets ascend from 0 to at most r, and rows of out behind the last may stay as they are."""
        if not trusted:
            offsets = offsets.clamp(0, x.shape[0]).cummax(0)[0]
            out.zero_()
        self._by_expert("grouped_contiguous", x, x_scale, offsets, out)

    def masked(self, x, counts, bias, x_scale, out, trusted=False):
        """As ByBlocks.masked. trusted: counts are at most max_tokens, and rows of out from counts[e] on may stay as they are."""
        e, most, k = x.shape
        if not trusted:
            counts = counts.clamp(0, most)
            out.zero_()
        self._by_expert("grouped_masked", x.reshape(e * most, k), x_scale, counts, out.view(e * most, -1))

    def _by_expert(self, layout, x, x_scale, expert_layout, out):
        with self._device():
            if layout not in self.tables:
                self._compile(layout)
                self._warm_up(layout)
            a, a_scale = self._input(x, x_scale)
            y = self._whole(out)
            self._launch(self.tables[layout][None], a, a_scale, y, expert_layout=expert_layout)
            if y is not out:
                out.copy_(y[:, : out.shape[1]])

    def _filled(self, block_size):
        """The block that a given one, of a size that no tile divides, is filled up to; the largest if it must be taken apart, too."""
        return next((m for m in self.block_sizes if m >= block_size), self.block_sizes[-1])

    def _device(self):
        return contextlib.nullcontext() if self.device.index == torch.cuda.current_device() else torch.cuda.device(self.device)

    def _input(self, x, x_scale):
        if self.ones is None or x.shape[1] == self.k:
            return kernel_input(x, x_scale, self.quantizer, self.grouped, self.k)
        a = torch.nn.functional.pad(x, (0, self.k - x.shape[1]))
        a[:, self.ones] = 1
        return a, None

    def _whole(self, out):
        """out; where its rows are not whole and aligned, a copy of it that has such rows."""
        if out.shape[1] == self.n and out.data_ptr() % 16 == 0:
            return out
        return torch.nn.functional.pad(out, (0, self.n - out.shape[1]))

    def _launch(self, table, a, a_scale, y, ids=None, owners=None, end=None, expert_layout=None, top_k=1, rows=0):
        """rows: what the kernel is chosen by; 0: the rows of the result. The last argument: no checks, all was checked above."""
        t = self.tensors
        self.launch(
            table, a, t["weight"], t["weight_scale"], t.get("weight_scale_2"), a_scale, None, t.get("zero_point"), None, y,
            ids, owners, end, expert_layout, self.locks, top_k, rows, False,
        )  # fmt: skip


def _refuse(topk_weights):
    if topk_weights is not None:
        raise NotImplementedError("Humming applies a router's weight to nothing before the result has been rounded; impl 'triton' can")
