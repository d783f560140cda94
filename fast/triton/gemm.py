"""The general GEMM: which tiles, which constexprs, and the launch."""

import contextlib
import math
from dataclasses import dataclass

import torch

from ref.element import value_list
from ref.format import SCALE_DTYPES

from .numerics import DOT_DTYPES, choose, decode_constants, far_rows, step_columns

# Blocks that a split of k may make, for each multiprocessor, and the rows up to which k is split.
BLOCKS_PER_SM, SPLIT_ROWS, LEAST_STEPS = 2, 64, 4


# Products with weights of this size leave float32's range, where sums are kept, long before the scales can bring them back.
TOP_VALUE = 2.0**100


def why_not(request):
    """Why the kernel cannot multiply by such elements, as a sentence; None for all others, with every scale and activation format."""
    element = request.format.element
    top = max((abs(v) for v in value_list(element) if math.isfinite(v)), default=0.0)
    if top >= TOP_VALUE:
        return f"values of {element} reach {top:.3g}: sums of products leave the range of float32 before they are scaled"
    return None


@dataclass(frozen=True)
class Tile:
    """Rows, output features and columns of a block, and how it is run."""

    bm: int
    bn: int
    bk: int
    warps: int = 4
    stages: int = 4


@dataclass(frozen=True)
class Way:
    """A tile, the blocks along k, the steps of each, the numbers that those of one block of rows leave behind, the constexprs without and
    with a bias, the options."""

    tile: Tile
    split: int
    split_steps: int
    parts: int
    constants: list
    options: dict


class GemmPlan:
    """One prepared weight: run(x, bias, x_scale, out) computes out = x W^T + bias.

    accumulator: how sums are kept, in words.
    Where k is split, blocks count their arrivals; each stream and each captured launch has counters of its own.
    """

    def __init__(self, q, request):
        self._set_up(request)
        self.numerics = choose(q, request.x_dtype, request.x_format, self.capability, self.fp8)
        self.step = step_columns(q, self.numerics, request.x_format)
        self._take_weight(q, request)
        self._finish(request)

    def _set_up(self, request):
        from .gemm_kernel import gemm_kernel
        from .jit import Launcher, interprets, multiple_of_16, stride_kind

        self.device = request.device
        self.interpret = interprets(request.device)
        self.n, self.k = request.shape[-2:]
        self.multiple_of_16, self.stride_kind = multiple_of_16, stride_kind
        self.capability, self.multiprocessors, self.fp8 = _device(request.device)
        self.launch = Launcher(gemm_kernel)
        self.nothing = torch.zeros(1, dtype=torch.float32, device=self.device)

    def _finish(self, request):
        from .quantize_input import InputQuantizer

        numerics = self.numerics
        self.accumulator = "fp32" if self.interpret and numerics.dot != "int8" else numerics.accumulator
        self.quantizer = None
        if request.x_format is not None:
            operand = numerics.x_dtype if not self.interpret or numerics.dot == "int8" else torch.float32
            self.quantizer = InputQuantizer(request.x_format, operand)
        self.constants |= {
            "X_GROUP": request.x_format.group[1] if request.x_format is not None else 0,
            "X_ROW": self.quantizer.row_scale if self.quantizer else "none",
            "DOT": "fp32" if self.interpret and numerics.dot != "int8" else numerics.dot,
            "W_PARTS": 1 if self.interpret else numerics.w_parts,
            "STEP": self.step,
            "BLOCK": 0,
            "WGMMA": self.capability == 90 and not self.interpret and torch.version.hip is None,
        }
        self._make_ways()
        if not self.interpret:
            # Calls on other streams read the weight, too.
            torch.cuda.current_stream(self.device).synchronize()

    def _make_ways(self):
        # By m: up to 16, 32, 64, 128, and beyond. The interpreter's are made as they are needed: it runs best with few blocks.
        self.ways = None if self.interpret else [self._way(1 << bits) for bits in range(4, 9)]
        if not self.interpret:
            from .jit import Counters

            tiles = [-(-self.n // way.tile.bn) for way in self.ways if way.split > 1]
            self.counters = Counters(self.device, max(tiles)) if tiles else None

    def _take_weight(self, q, request):
        fmt, numerics = q.format, self.numerics
        native = numerics.native and not self.interpret
        codes = q.packed.contiguous().view(torch.uint8)
        self.row_bytes = codes.shape[-1]
        self.weight = codes.view(DOT_DTYPES[numerics.dot]) if native else codes
        constants = decode_constants(fmt.element) | ({"DECODE": "none"} if native else {})
        nothing = self.nothing
        self.table = nothing
        if constants["DECODE"] == "table":
            values = torch.tensor(value_list(fmt.element), dtype=torch.float64) * 2.0**numerics.unit_exponent
            self.table = values.float().to(self.device)
        scale_element = SCALE_DTYPES[fmt.scale]
        self.scale_table = nothing
        if not isinstance(scale_element, torch.dtype):
            self.scale_table = torch.tensor(value_list(scale_element), dtype=torch.float32, device=self.device)
        self.scale = q.scale.contiguous()
        self.zero = self.scale if q.zero is None else q.zero.contiguous()
        self.scale_2 = nothing if q.scale_2 is None else q.scale_2.contiguous()
        far = far_rows(q, numerics)
        self.far = nothing if far is None else far
        self.offset = nothing if q.offset is None else _moved_offset(q, numerics, far).contiguous()
        # Powers of two taken on the way in are given back in two halves, each of which float32 holds.
        out = -(numerics.unit_exponent + numerics.scale_exponent)
        self.scalars = (2.0**numerics.scale_exponent, 2.0 ** (out // 2), 2.0 ** (out - out // 2))
        gn, gk = fmt.group
        self.constants = constants | {
            "BITS": fmt.element.bits,
            "UNIT": 2.0**numerics.unit_exponent if constants["DECODE"] != "table" else 1.0,
            "ZERO": q.zero is not None,
            "OFFSET": q.offset is not None,
            "SCALE": numerics.scale,
            "FAR": far is not None,
            "GN": gn if gn < self.n else 0,
            "GK": gk if gk < self.k else 0,
            "SCALE_2": fmt.scale_2 or "none",
        }

    def _tile(self, m):
        """The tile for up to m rows (for more than 128, any number)."""
        dot, step, n, k = self.numerics.dot, self.step, self.n, self.k
        # A second set of sums in registers leaves room for half as many.
        eight = dot in ("int8", "e4m3", "e5m2")
        per_step = self.constants["SCALE"] == "sums" or self.constants["X_GROUP"]
        two_sums = per_step or self.numerics.w_parts > 1 or dot in ("e4m3", "e5m2")
        if self.interpret:
            tile = Tile(min(64, max(16, _power_of_two(m))), min(128, max(16, _power_of_two(n))), 1024)
        elif dot == "fp32":
            tile = Tile(min(m, 64), 32, 32, stages=2)
        elif m <= 64:
            # Codes that straddle bytes are costly to cut out, and more so the longer the row of them.
            deep = 8 % self.constants["BITS"] == 0
            if m <= 32:
                tile = Tile(m, 64, 128 if deep else 64)
            else:
                tile = Tile(m, 64, 128, stages=3) if deep and self.numerics.w_parts == 1 and not eight else Tile(m, 64, 64)
        elif self.capability >= 90 and eight and not per_step:
            tile = Tile(128, 128, 128, 4, 3)
        elif self.capability >= 90 and eight and dot != "int8":
            tile = Tile(64, 128, 128, 4, 4)
        elif m <= 128 or self.capability < 90 or two_sums:
            tile = Tile(128, 128, 64, 8, 3)
        elif self.constants["SCALE"] == "weight":
            tile = Tile(256, 64, 64, 4, 3)
        else:
            tile = Tile(256, 128, 64, 8, 3)
        bk = tile.bk * (2 if eight and tile.bk < 128 else 1)
        least = 32 if eight else 16
        if self.numerics.scale == "weight":
            least = max(least, self.constants["GK"])
        even = step & -step
        if not step:
            bk = max(least, min(bk, _power_of_two(k)))
        elif even >= least and (even == step or even >= 32) and not self.interpret:
            bk = min(bk, even)
        else:
            bk = max(least, min(bk, _power_of_two(step)))
        return Tile(tile.bm, tile.bn, bk, tile.warps, tile.stages)

    def _way(self, m, blocks_m=1):
        """How a call with up to m rows is launched, or one with so many blocks of m rows."""
        tile = self._tile(m)
        bits, step = self.constants["BITS"], self.step
        if step:
            steps = self.k // step * -(-step // tile.bk) + -(-(self.k % step) // tile.bk)
        else:
            steps = -(-self.k // tile.bk)
        crossing = step % tile.bk != 0
        # Enough blocks for every multiprocessor, none of them empty.
        wanted = 1
        if m <= SPLIT_ROWS and not self.interpret and self.n and blocks_m:
            wanted = min(BLOCKS_PER_SM * self.multiprocessors // (blocks_m * -(-self.n // tile.bn)), steps // LEAST_STEPS, 16)
        split_steps = -(-steps // max(wanted, 1)) or 1
        split = -(-steps // split_steps) or 1
        constants = self.constants | {
            "EVEN": self.k % tile.bk == 0 and not crossing,
            "WHOLE_BYTES": 8 % bits == 0 and not crossing,
            "SPLIT": split,
            "BM": tile.bm,
            "BN": tile.bn,
            "BK": tile.bk,
        }
        parts = split * -(-self.n // tile.bn) * tile.bn * tile.bm
        both = [{name: (constants | {"HAS_BIAS": bias})[name] for name in CONSTANTS} for bias in (False, True)]
        return Way(tile, split, split_steps, parts, both, {"num_warps": tile.warps, "num_stages": tile.stages})

    def run(self, x, bias, x_scale, out):
        """out = x W^T + bias.

        x: (m, k), columns adjacent. bias: (n,) or None. x_scale: one number, or None. out: (m, n), contiguous.
        """
        m = x.shape[0]
        if m == 0 or self.n == 0:
            return
        if self.k == 0:
            out.copy_(bias.expand(m, -1)) if bias is not None else out.zero_()
            return
        with _on(self.device):
            self._run(m, x, bias, x_scale, out)

    def _run(self, m, x, bias, x_scale, out):
        rows = (m - 1).bit_length()
        index = 0 if rows < 4 else min(rows, 8) - 4
        way = self._way(m) if self.interpret else self.ways[index]
        self._launch(index, way, -(-m // way.tile.bm), m, x, bias, x_scale, out, (None,) * 4, (0, 1, 1))

    def _launch(self, kind, way, blocks_m, m, x, bias, x_scale, out, routing, counts):
        """Quantize x where that is asked for, and launch.

        Args:
            kind: what tells this way from others. blocks_m: the grid along m. m: rows of out.
            routing: the kernel's ids, owners, end and topk_weights, or four times None. counts: its length, top_k and experts.
        """
        scale_x = scale_x_2 = self.nothing
        stride_xs = 0
        if self.quantizer is not None:
            x, scale_x, scale_x_2, _ = self.quantizer(x, x_scale)
            stride_xs = scale_x.shape[-1]
        if bias is not None and bias.dtype == torch.float64:
            bias = bias.float()
        parts = arrived = self.nothing
        if way.split > 1:
            arrived = self.counters.current()
            # Of the current stream, and of the graph where one is captured: the allocator sees to it.
            parts = torch.empty(blocks_m * way.parts, dtype=torch.int32, device=self.device)
        stride_x = x.stride(0)
        aligned = self.multiple_of_16
        args = (
            out, x, self.weight, self.scale, self.zero, self.offset, self.far, self.scale_2,
            self.nothing if bias is None else bias, self.table, self.scale_table, scale_x, scale_x_2, parts, arrived, *routing,
            m, self.n, self.k, stride_x, self.row_bytes, self.scale.shape[-1], stride_xs, way.split_steps, *counts, *self.scalars,
        )  # fmt: skip
        bias_kind = None if bias is None else (bias.dtype, aligned(bias))
        kind = (kind, aligned(out), aligned(x), self.stride_kind(stride_x), bias_kind)
        grid = (blocks_m * -(-self.n // way.tile.bn), way.split, 1)
        self.launch(kind, grid, args, way.constants[bias is not None], way.options)


# In the order of the kernel's signature.
CONSTANTS = (
    "BITS", "DECODE", "MIDDLE", "EXPONENT", "MANTISSA", "SIGNED", "SPECIALS", "UNBIAS", "UNIT", "ZERO", "OFFSET", "SCALE", "FAR",
    "GN", "GK", "SCALE_2", "X_GROUP", "X_ROW", "HAS_BIAS", "DOT", "W_PARTS", "STEP", "EVEN", "WHOLE_BYTES", "SPLIT", "BLOCK", "WGMMA", "BM", "BN", "BK",
)  # fmt: skip


def prepare(q, request):
    """The plan for one weight. It may allocate, and it reads the scales."""
    return GemmPlan(q, request)


def _moved_offset(q, numerics, far):
    """The offsets of groups, times the powers of two that sums are kept times: as they are where there are none, else float32."""
    if far is None and not numerics.unit_exponent:
        return q.offset
    near = 1.0 if far is None else far[..., 0, :: q.format.group[0] or max(far.shape[-1], 1), None].double()
    return (q.offset.double() * 2.0**numerics.unit_exponent * near).float()


def _power_of_two(x):
    """The least power of two from x on."""
    return 1 << max(x - 1, 0).bit_length()


def _device(device):
    """Compute capability (as 90), multiprocessors, and whether the device multiplies OCP fp8."""
    if device.type == "cpu":
        # The interpreter goes the ways of the newest device, with float32 products.
        return 90, 1, True
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count, torch.version.hip is None


def _on(device):
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
