"""Stacks of weights of 2, 4 and 8 bits in the fragments' order, times 16-bit x: which tiles, which constexprs, and the launch."""

from dataclasses import replace

import torch

from fast.moe.blocks import ByBlocks
from ref.element import Float

from . import weight_only

# Rows of a block that the kernel takes at once.
MOST_ROWS = 128
# Floats whose sign, exponent and mantissa the kernel moves to where a 16-bit type has them.
FLOATS = ((2, 1), (4, 3), (5, 2))


def why_not(request):
    """Why this kernel cannot do what is requested, as a sentence; None if it can. The data may still refuse: NaN codes, scales far apart."""
    fmt = request.format
    if fmt is None:
        return "the weight is not quantized"
    if isinstance(fmt.element, Float):
        return _why_not_float(request)
    return weight_only.why_not(replace(request, shape=request.shape[1:]))


def _why_not_float(request):
    fmt, element, k = request.format, request.format.element, request.shape[2]
    if request.x_format is not None or request.x_dtype not in weight_only.X_DTYPES:
        return f"x is {request.x_format or request.x_dtype}, expected float16 or bfloat16, not quantized"
    if (element.exponent, element.mantissa) not in FLOATS or not element.signed or not element.subnormal:
        return f"the weight is {fmt}, expected e2m1, e4m3 or e5m2"
    if fmt.scale_2 is not None or fmt.offset is not None:
        return f"the weight is {fmt}, expected scales and nothing else"
    gk, width = fmt.group[1], 512 // element.bits
    gk = gk if gk < k else 0
    if fmt.scale == "e8m0":
        if fmt.group[0] != 1 or gk not in (width // 4, width // 2):
            return f"the weight is {fmt}, expected e8m0 scales for groups of {width // 4} or {width // 2} columns"
    elif fmt.scale not in ("fp32", "fp16", "bf16") or gk % width:
        return f"the weight is {fmt}, expected scales of 16 or 32 bits by tensor, row, block, or group of a multiple of {width} columns"
    return weight_only._why_not_device(request.device, element.bits)


def prepare(w, request):
    """The plan for one stack. It allocates and synchronises; what it launches is compiled at the first call of its kind."""
    return GroupedFragmentsPlan(w, request)


class GroupedFragmentsPlan(ByBlocks):
    """One stack of weights; see ByBlocks.

    As WeightOnlyPlan, but for floats, which are exact in x's type: with float scales of groups sums are multiplied, e8m0 scales are multiplied
    into the weight, exactly. Integers in blocks of more than 64 rows, or with several groups in a tile, are multiplied by their scale
    and rounded to x's dtype first.
    """

    rotate = None

    def __init__(self, w, request):
        from . import fragments
        from .grouped_wide import grouped_wide_kernel
        from .jit import Counters, Launcher

        self.fragments, self.x_dtype, self.device = fragments, request.x_dtype, request.device
        self.properties = weight_only.Device(self.device)
        self.experts, self.n, self.k = request.shape
        element, fmt = w.format.element, w.format
        self.bits = bits = element.bits
        self.exponent = element.exponent if isinstance(element, Float) else 0
        width = fragments.columns(bits)
        self.tiles_k = -(-self.k // width)
        group = fmt.group[1] if 0 < fmt.group[1] < self.k else 0
        self.group_tiles, self.sub = (max(1, group // width), max(1, width // group)) if group else (0, 1)
        self.rows = fragments.padded_rows(self.n)
        self.groups = max(w.scale.shape[-1], self.tiles_k * self.sub if self.sub > 1 else 1)
        if self.exponent and _has_specials(w):
            raise NotImplementedError(f"the weight has codes of {element} that are no numbers")
        self.out_scale = 1.0
        self._take(w)
        self.launch = Launcher(grouped_wide_kernel)
        self.ways = {}
        self.counters = None
        if self.device.type == "cuda":
            self.counters = Counters(self.device, 4 * self.properties.multiprocessors)
            # Calls on other streams read the weight, too.
            torch.cuda.current_stream(self.device).synchronize()

    def _take(self, w):
        fragments, n = self.fragments, self.n
        self.powers = w.format.scale == "e8m0"
        self.weight_how = "weight" if self.powers or w.scale.dtype == self.x_dtype else "weight32"
        scale = w.scale
        if w.format.group[0] > 1:
            scale = scale.repeat_interleave(w.format.group[0], 1)[:, :n]
        if self.powers:
            found = fragments.exponents(scale, n, self.groups, w.format.element, self.x_dtype)
            if found is None:
                raise NotImplementedError(f"scales of {w.format} are too large, too small or too far apart for {self.x_dtype}")
            self.scale, self.out_scale = found
        else:
            self.scale = torch.stack([fragments.by_columns(part, n, self.groups, self.x_dtype) for part in scale])
        self.zero = None
        if w.zero is not None:
            offsets = fragments.offset(w.zero, self.bits, self.x_dtype)
            self.zero = torch.stack([fragments.by_columns(part, n, self.groups, self.x_dtype) for part in offsets])
        tiles = self.rows // fragments.TILE_ROWS, self.tiles_k, fragments.TILE_HALVES
        self.weight = torch.empty(self.experts, *tiles, dtype=torch.int16, device=self.device)
        for packed, expert in zip(w.packed, self.weight, strict=True):
            expert.copy_(fragments.pack(packed, n, self.k, self.bits))

    def run(
        self, x, bias, x_scale, out, *, sorted_token_ids, expert_ids, num_tokens_post_padded, top_k, topk_weights=None, block_size
    ):  # fmt: skip
        blocks = expert_ids.numel()
        if not blocks or not out.numel():
            return
        bias, topk_weights = (t.float() if t is not None and t.dtype == torch.float64 else t for t in (bias, topk_weights))
        with weight_only.NOTHING if self.device.type == "cpu" else torch.cuda.device(self.device):
            if self.rotate is not None:
                x = self.rotate(x)
            self._multiply(x, bias, out, (sorted_token_ids, expert_ids, num_tokens_post_padded, topk_weights), top_k, block_size, blocks)

    def _multiply(self, x, bias, out, routing, top_k, block, blocks):
        from .jit import multiple_of_16

        tile = choose_tile(block, blocks, self.n, self.bits, self.properties)
        tiles_m, tiles_n = blocks * -(-block // tile.bm), -(-self.n // tile.bn)
        parts = choose_parts(tile, tiles_m * tiles_n, self.tiles_k, self.properties)
        stride = x.stride(0)
        key = block, tile, min(parts, 3), stride % 8 == 0
        constants = self.ways.get(key)
        if constants is None:
            constants = self.ways[key] = self._constants(block, tile, parts, stride % 8 == 0)
        workspace = None, None
        if parts > 1:
            # Of the current stream, and of the graph where one is captured: the allocator sees to it.
            place = torch.empty(parts * tiles_m * tiles_n * tile.bm * tile.bn, dtype=torch.int32, device=self.device)
            tickets = torch.zeros(2 * tiles_m * tiles_n, dtype=torch.int32) if self.counters is None else self.counters.current()
            workspace = place, tickets
        ids = routing[0]
        args = (
            out, x, bias, *routing, *workspace, out.shape[0], stride, ids.numel(), tiles_m, top_k, self.experts,
            self.weight, self.scale, self.zero, self.n, self.k, self.tiles_k, self.rows, self.groups, self.out_scale,
        )  # fmt: skip
        kinds = tuple(None if t is None else (t.dtype, multiple_of_16(t)) for t in (out, x, bias, *routing))
        kind = key, kinds, top_k, stride >> 31 == 0
        self.launch(kind, (tiles_m * tiles_n, parts, 1), args, constants, {"num_warps": tile.warps})

    def _constants(self, block, tile, parts, aligned):
        """The kernel's constexprs, in the order of its signature."""
        exact = self.exponent and not self.powers
        sums = not self.group_tiles or exact or (self.sub == 1 and tile.bm <= 64 and not self.powers)
        how = "sums" if sums else self.weight_how
        assembly, constraints = self.fragments.assembly(self.bits, self.x_dtype, how, self.zero is not None, self.exponent)
        return {
            "ALIGNED": aligned,
            "BITS": self.bits,
            "EXPONENT": self.exponent,
            "GROUP_TILES": self.group_tiles,
            "SUB": self.sub,
            "HOW": how,
            "EVEN_K": self.k % self.fragments.columns(self.bits) == 0,
            "SPLIT": min(parts, 3),
            "BLOCK": block,
            "BN": tile.bn,
            "BM": tile.bm,
            "STAGES": tile.stages,
            "DTYPE": self.fragments.DTYPES[self.x_dtype],
            "ASSEMBLY": assembly,
            "CONSTRAINTS": constraints,
            "INTERPRET": self.device.type == "cpu",
        }


def choose_tile(block, blocks, n, bits, device):
    """The tile for so many blocks of `block` rows of x."""
    bm = min(MOST_ROWS, max(16, 1 << (block - 1).bit_length()))
    many = blocks * -(-block // bm) * -(-n // 128) >= 2 * device.multiprocessors
    if bm == MOST_ROWS:
        tile = weight_only.Tile(bm, 128, warps=8, stages=3)
    else:
        tile = weight_only.Tile(bm, 128 if many else 64, stages=6 if bm == 16 else 4)
    return replace(tile, stages=max(1, min(tile.stages, device.shared_memory // tile.stage_bytes(bits))))


def choose_parts(tile, blocks, tiles_k, device):
    """Into how many parts k is split: blocks for every multiprocessor, each with work enough to be worth the sum."""
    if tile.bm > 64:
        return 1
    return max(1, min(2 * device.multiprocessors // blocks, tiles_k // 16))


def _has_specials(w):
    """Whether a weight of 8-bit floats holds codes that are no numbers."""
    element = w.format.element
    codes = w.packed.view(torch.uint8) & 0x7F
    return element.bits == 8 and element.specials != "finite" and bool((codes >= (0x7F if element.specials == "fn" else 0x7C)).any())
