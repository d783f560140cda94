"""Integer weights of 2, 4 and 8 bits times 16-bit x: which tiles, which constexprs, and the launch."""

import contextlib
from dataclasses import dataclass, replace

import torch

from ref.element import Int

X_DTYPES = (torch.bfloat16, torch.float16)
BIAS_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# Tiles are chosen for m in (2^(i-1), 2^i]; beyond 2^15 there are blocks enough.
BUCKETS = 17


def why_not(request):
    """Why these kernels cannot do what is requested, as a sentence; None if they can."""
    return why_not_weight(request) or _why_not_device(request.device, request.format.element.bits)


def why_not_weight(request):
    """Why they cannot for its weight or its x, wherever that is."""
    fmt, element = request.format, request.format.element
    if request.x_format is not None or request.x_dtype not in X_DTYPES:
        return f"x is {request.x_format or request.x_dtype}, expected float16 or bfloat16, not quantized"
    if (
        not isinstance(element, Int)
        or element.bits not in (2, 4, 8)
        or element.signed != (fmt.zero is None)
        or fmt.zero not in (None, "int")
    ):
        return f"the weight is {fmt}, expected signed integers of 2, 4 or 8 bits, or unsigned ones with an integer zero point"
    if fmt.scale not in ("fp32", "fp16", "bf16") or fmt.scale_2 is not None or fmt.offset is not None:
        return f"the weight is {fmt}, expected scales of 16 or 32 bits and nothing else"
    (gn, gk), k, width = fmt.group, request.shape[1], 512 // element.bits
    if gn > 1 or 0 in request.shape or (0 < gk < k and gk % width and gk not in (width // 4, width // 2)):
        return (
            f"the weight is {fmt}, expected scales by tensor, row, or group of {width // 4}, {width // 2} or a multiple of {width} columns"
        )
    return None


def _why_not_device(device, bits):
    if device.type != "cuda":
        return "Triton's interpreter is quicker with the general kernel"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return "weights are decoded by instructions of NVIDIA GPUs of compute capability 8.0 and later"
    if bits == 2 and Device(device).shared_memory < 160 << 10:
        return "weights of 2 bits need 160 KB of shared memory in a block"
    return None


class Device:
    """What the choices depend on; the CPU stands for a small GPU."""

    def __init__(self, device):
        self.multiprocessors, self.shared_memory = 4, 227 << 10
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            self.multiprocessors, self.shared_memory = properties.multi_processor_count, properties.shared_memory_per_block_optin


@dataclass(frozen=True)
class Tile:
    """Rows of x and of w of a block, its warps, and how many steps are loaded ahead. Tiles of 8 rows of x are small_m_kernel's."""

    bm: int
    bn: int
    warps: int = 4
    stages: int = 4

    def stage_bytes(self, bits):
        """Shared memory that a step takes: its part of x and of w."""
        return self.bm * 2 * 512 // bits + self.bn * 64


def choose_tile(m, n, bits, device):
    """The tile for up to m rows of x, m a power of two, as measured on an H200."""
    if m <= 8:
        return Tile(8, 16 if m == 1 else 32)
    if m <= 128:
        tile = Tile(min(m, 64), 128 if m > 64 or n // 128 >= device.multiprocessors else 64, stages=6 if m == 16 else 4)
    else:
        # 256 rows where that makes blocks for most multiprocessors: such a block has no registers left to sum parts of k.
        blocks = -(-m // 256) * -(-n // 128)
        tile = Tile(256 if 2 * blocks > device.multiprocessors else 128, 128, warps=8, stages=3)
    while tile.bm > 64 and tile.stages * tile.stage_bytes(bits) > device.shared_memory:
        tile = replace(tile, bm=tile.bm // 2)
    return replace(tile, stages=min(tile.stages, device.shared_memory // tile.stage_bytes(bits)))


def choose_parts(tile, m, n, tiles_k, device):
    """Into how many parts k is split: blocks for every multiprocessor, each with work enough to be worth the sum."""
    blocks = -(-m // tile.bm) * -(-n // tile.bn)
    wanted = (2 if 8 < tile.bm <= 64 else 1) * device.multiprocessors // blocks
    return max(1, min(wanted, tiles_k // min(16, 1024 // tile.bm)))


@dataclass(frozen=True)
class Way:
    """How calls of one bucket of m are launched."""

    bm: int
    blocks_n: int
    parts: int
    launch: object
    workspace: object


class WeightOnlyPlan:
    """One prepared weight: run(x, bias, x_scale, out) computes out = x W^T + bias.

    Codes times x are exact products, summed in float32; a group's sum is multiplied by its scale. Only where that does not go, with more than
    128 rows of x, or 9 where a tile holds several groups, is the weight times its scale rounded to x's dtype first.
    variant: "exact", or "weight_rounded" if that happens for some m: a name of ref.VARIANTS. accumulator: how sums are kept, in words.
    """

    def __init__(self, q, request):
        from . import fragments

        self.fragments, self.x_dtype, self.device = fragments, request.x_dtype, q.packed.device
        self.properties = Device(self.device)
        self.n, self.k = q.shape
        self.bits = bits = q.format.element.bits
        width = fragments.columns(bits)
        self.tiles_k = -(-self.k // width)
        group = q.format.group[1] if 0 < q.format.group[1] < self.k else 0
        # Tiles to a group (0: one group), groups to a tile.
        self.group_tiles, self.sub = (max(1, group // width), max(1, width // group)) if group else (0, 1)
        groups = max(q.scale.shape[1], self.tiles_k * self.sub if self.sub > 1 else 1)
        self.weight = fragments.pack(q.packed, self.n, self.k, bits)
        self.scale = fragments.by_columns(q.scale, self.n, groups, self.x_dtype)
        self.zero = None
        if q.zero is not None:
            self.zero = fragments.by_columns(fragments.offset(q.zero, bits, self.x_dtype), self.n, groups, self.x_dtype)
        self.weight_how = "weight" if q.scale.dtype == self.x_dtype else "weight32"
        self.variant = "weight_rounded" if group else "exact"
        self.accumulator = f"fp32 sums of {fragments.DTYPES[self.x_dtype]} products"
        self.ways = [None] * BUCKETS
        if self.device.type == "cuda":
            # Calls on other streams read the weight, too.
            torch.cuda.current_stream(self.device).synchronize()

    def run(self, x, bias, x_scale, out):
        """out = x W^T + bias.

        x: (m, k), columns adjacent, m at least 1. bias: (n,) or None. x_scale: None. out: (m, n), contiguous.
        """
        m = x.shape[0]
        if bias is not None and (bias.stride(0) != 1 or bias.dtype not in BIAS_DTYPES):
            bias = bias.to(bias.dtype if bias.dtype in BIAS_DTYPES else torch.float32).contiguous()
        bucket = min((m - 1).bit_length(), BUCKETS - 1)
        if self.device.type == "cpu":
            way = self.ways[bucket] or self._way(bucket)
            way.launch.interpret(way.blocks_n * -(-m // way.bm), way.parts, out, x, bias, m)
            return
        with NOTHING if torch.cuda.current_device() == self.device.index else torch.cuda.device(self.device):
            way = self.ways[bucket] or self._way(bucket)
            workspace = NO_WORKSPACE if way.workspace is None else way.workspace.current()
            way.launch(way.blocks_n * -(-m // way.bm), way.parts, workspace, out, x, bias, m)

    def _way(self, bucket):
        from .launch import Launch
        from .small_m import small_m_kernel
        from .split_k import Workspace
        from .wide import wide_kernel

        m = 1 << bucket
        tile = choose_tile(m, self.n, self.bits, self.properties)
        parts = choose_parts(tile, m, self.n, self.tiles_k, self.properties)
        kernel = small_m_kernel if tile.bm == 8 else wide_kernel
        weight = (self.weight, self.scale, self.zero, self.n, self.k, self.tiles_k, self.scale.shape[1])
        launch = Launch(kernel, weight, self._constants(tile, parts, m), tile.warps)
        blocks_n = -(-self.n // tile.bn)
        workspace = None
        if parts > 1 and self.device.type == "cuda":
            blocks = blocks_n * -(-m // tile.bm)
            workspace = Workspace(self.device, parts * blocks * tile.bm * tile.bn, 2 * blocks)
        self.ways[bucket] = Way(tile.bm, blocks_n, parts, launch, workspace)
        return self.ways[bucket]

    def _constants(self, tile, parts, m):
        """The kernel's constexprs but the first, in the order of its signature."""
        small = tile.bm == 8
        sums = not self.group_tiles or m <= (128 if self.sub == 1 else 8)
        how = "sums" if sums else self.weight_how
        assembly, constraints = self.fragments.assembly(self.bits, self.x_dtype, how, self.zero is not None)
        whole_tiles = self.k % self.fragments.columns(self.bits) == 0
        return {
            "BITS": self.bits,
            "GROUP_TILES": self.group_tiles,
            "SUB": self.sub,
            **({"ONE": m == 1} if small else {"HOW": how}),
            "EVEN_K": whole_tiles and (not small or self.tiles_k % (parts * tile.warps) == 0),
            "SPLIT": min(parts, 3),
            "BN": tile.bn,
            **({"WARPS": tile.warps} if small else {"BM": tile.bm}),
            "STAGES": tile.stages,
            "DTYPE": self.fragments.DTYPES[self.x_dtype],
            "ASSEMBLY": assembly,
            "CONSTRAINTS": constraints,
            "INTERPRET": self.device.type == "cpu",
        }


NOTHING = contextlib.nullcontext()
NO_WORKSPACE = (None, None)


def prepare(q, request):
    """The plan for one weight. It allocates and synchronises; what it launches is compiled at the first call of its kind."""
    return WeightOnlyPlan(q, request)
