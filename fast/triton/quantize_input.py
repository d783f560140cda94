"""Quantization of activations, for the GEMM: x becomes numbers of the type in which products are taken, and float32 scales.

The numbers are the values of the codes (int8, fp8, or a 16-bit float that holds them), so the GEMM decodes nothing. They are the codes that
ref.quantize_input gives, bit for bit: quotients are rounded once.
"""

import functools
from typing import NamedTuple

import torch
import triton.language as tl

from ref.element import Int, max_value, min_value
from ref.format import SCALE_DTYPES
from ref.moe.check import ACTIVATIONS

from .decode import round_to_output, to_float32
from .jit import Launcher, device_function, interprets, kernel, multiple_of_16, stride_kind
from .moe_activation import constexprs, load_activated

SMALLEST_SCALE = 1e-30
GROUP_COLUMNS = 2048  # of one block, where groups are quantized
ROW_COLUMNS = 16384  # of the longest row that stays in registers
LOOP_COLUMNS = 8192  # of longer ones, at a time
# x is quantized as it is.
AS_IT_IS = {"ACT": "none", "GATED": False, "INTERLEAVED": False, "LIMIT": None, "ALPHA": None, "BETA": None, "UP_BETA": None}


@device_function
def load_x(
    row, column, inside, k, ACT: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    BETA: tl.constexpr, UP_BETA: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Columns of a row of x, zero where not inside, in x's dtype; with ACT float32: the activation of x, rounded to x's dtype as a store would."""
    if ACT == "none":
        return tl.load(row + column, mask=inside, other=0)
    else:
        v = load_activated(row, column, k, ACT, GATED, INTERLEAVED, LIMIT, ALPHA, BETA, UP_BETA, INTERPRET)
        return tl.where(inside, to_float32(round_to_output(v, row.dtype.element_ty)), 0.0)


@device_function
def magnitude_bits(x):
    """The bits of |x|, int32: in the order of the numbers, with NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@device_function
def from_magnitude(u, top, smallest: tl.constexpr):
    """max(|x| / top, smallest), the division correctly rounded; NaN and infinity stay."""
    s = tl.div_rn(u.to(tl.float32, bitcast=True), top)
    return tl.where(s < smallest, smallest, s)


@device_function
def round_up(
    s, KIND: tl.constexpr, BIAS: tl.constexpr, MANTISSA: tl.constexpr, TOP: tl.constexpr, TINY: tl.constexpr, QUANTUM: tl.constexpr
):
    """The least number of a scale's type that is not below s >= 0, as float32; its largest where none is. NaN and infinity give NaN."""
    if KIND == "fp32":
        return s
    else:
        u = s.to(tl.int32, bitcast=True)
        if KIND == "e8m0":
            u = tl.where(u <= 0x00400000, 0x00400000, (u + 0x7FFFFF) & 0x7F800000)
            v = u.to(tl.float32, bitcast=True)
        else:
            CUT: tl.constexpr = 23 - MANTISSA
            v = (((u + ((1 << CUT) - 1)) >> CUT) << CUT).to(tl.float32, bitcast=True)
            if BIAS < 127:
                v = tl.where(s < TINY, tl.ceil(s * (1.0 / QUANTUM)) * QUANTUM, v)
        return tl.where(s < float("inf"), tl.minimum(v, TOP), float("nan"))


@device_function
def largest_magnitude(v, AXIS: tl.constexpr, INTERPRET: tl.constexpr):
    """The bits of the largest |v| along an axis, with NaN above infinity."""
    if INTERPRET:
        return tl.reduce(magnitude_bits(v), AXIS, tl.standard._elementwise_max)
    else:
        return tl.reduce(tl.abs(v), AXIS, _largest_or_nan).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@device_function
def _largest_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@device_function
def divide(x, s, s_2, TWO: tl.constexpr, INTERPRET: tl.constexpr):
    """x / (s * s_2) in float32, on the right side of every number of up to 20 bits, so that rounding it to fewer is as rounding the quotient.

    s must have the shape of x or broadcast to it: a division is made for each s, not for each x.
    """
    if INTERPRET:
        step = s.to(tl.float64)
        if TWO:
            step = step * s_2.to(tl.float64)
        exact = x.to(tl.float64) / step
        t = exact.to(tl.float32)
        rest = exact - t.to(tl.float64)
        below = ((rest < 0) & (t > 0)) | ((rest > 0) & (t < 0))
        u = t.to(tl.int32, bitcast=True) - below.to(tl.int32)
        return (u | (rest != 0).to(tl.int32)).to(tl.float32, bitcast=True)
    else:
        high = s
        if TWO:
            high = s * s_2
        # All times a power of two that brings the divisor to [1, 2): no remainder leaves float32's range.
        field = tl.minimum(tl.maximum(high.to(tl.int32, bitcast=True) >> 23, 1), 253)
        lift = ((254 - field) << 23).to(tl.float32, bitcast=True)
        if TWO:
            low = tl.fma(s, s_2, -high) * lift
        high = high * lift
        size = tl.minimum(tl.abs(x) * lift, 1e36)
        # The quotient to within 4 units in the last place, to the nearest multiple of 8; then a unit up or down, as the remainder says.
        u = ((size * tl.div_rn(1.0, high)).to(tl.int32, bitcast=True) + 4) & -8
        t = u.to(tl.float32, bitcast=True)
        rest = tl.fma(-t, high, size)
        if TWO:
            rest = tl.fma(-t, low, rest)
        u += tl.minimum(tl.maximum(rest.to(tl.int32, bitcast=True), -1), 1)
        # Zero less a unit is no number, but then the remainder is not negative.
        return (u | (x.to(tl.int32, bitcast=True) & -0x80000000)).to(tl.float32, bitcast=True)


@device_function
def round_to_element(
    x,
    t,
    dtype: tl.constexpr,
    INTEGER: tl.constexpr,
    MANTISSA: tl.constexpr,
    FLOOR: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    NAN: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """The element's value nearest to t, ties to even, saturated, as a dtype. FLOOR: the exponent field, in float32, of its smallest normal.

    CHECKED: where x is NaN, so is its scale; else NAN is put there.
    """
    NATIVE: tl.constexpr = (dtype == tl.float8e4nv and MANTISSA == 3 and HIGH == 448.0) or (
        dtype == tl.float8e5 and MANTISSA == 2 and HIGH == 57344.0
    )
    near = tl.minimum(tl.maximum(t, LOW), HIGH)
    # Adding 1.5 * 2^23 quanta leaves no bit below the quantum.
    if INTEGER:
        v = near + 12582912.0
        if dtype == tl.int8 and CHECKED:
            return v.to(tl.int32, bitcast=True).to(tl.int8)
        v = v - 12582912.0
    elif NATIVE:
        # The conversion rounds so, and saturates.
        v = t
    else:
        field = tl.maximum(magnitude_bits(near) >> 23, FLOOR)
        lift = (((field + (23 - MANTISSA)) << 23) | 0x400000).to(tl.float32, bitcast=True)
        v = (near + lift) - lift
    if not CHECKED:
        v = tl.where(x == x, v, NAN)
    return v.to(dtype)


@kernel(do_not_specialize=["m"])
def peak_kernel(peak, x, m, k, stride_x, COLUMNS: tl.constexpr):
    """peak[0] = the largest bits of |x| over all of x; peak is zero beforehand."""
    row = tl.program_id(0)
    u = tl.full((COLUMNS,), 0, tl.int32)
    for start in range(0, k, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        v = to_float32(tl.load(x + row.to(tl.int64) * stride_x + column, mask=column < k, other=0))
        u = tl.maximum(u, magnitude_bits(v))
    tl.atomic_max(peak, tl.reduce(u, 0, tl.standard._elementwise_max))


@kernel(do_not_specialize=["m"])
def row_kernel(
    codes, scale, x, given, peak, m, k, stride_x, stride_c, top,
    SOURCE: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr, SCALE_MANTISSA: tl.constexpr, TOP: tl.constexpr, TINY: tl.constexpr,
    QUANTUM: tl.constexpr, INTEGER: tl.constexpr, MANTISSA: tl.constexpr, FLOOR: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    NAN: tl.constexpr, COLUMNS: tl.constexpr, ONCE: tl.constexpr,
    ACT: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    UP_BETA: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """One row a block. SOURCE of its scale: the "row" itself, the "peak" of all rows, or "given". ONCE: COLUMNS hold it."""
    row = tl.program_id(0)
    ELEMENT: tl.constexpr = codes.dtype.element_ty
    x_row = x + row.to(tl.int64) * stride_x
    if ONCE:
        column = tl.arange(0, COLUMNS)
        row_x = load_x(x_row, column, column < k, k, ACT, GATED, INTERLEAVED, LIMIT, ALPHA, BETA, UP_BETA, INTERPRET)
    if SOURCE == "given":
        s = tl.load(given)
    else:
        if SOURCE == "row" and ONCE:
            largest = largest_magnitude(to_float32(row_x), 0, INTERPRET)
        elif SOURCE == "row":
            u = tl.full((COLUMNS,), 0, tl.int32)
            for start in range(0, k, COLUMNS):
                column = start + tl.arange(0, COLUMNS)
                v = to_float32(load_x(x_row, column, column < k, k, ACT, GATED, INTERLEAVED, LIMIT, ALPHA, BETA, UP_BETA, INTERPRET))
                u = tl.maximum(u, magnitude_bits(v))
            largest = tl.reduce(u, 0, tl.standard._elementwise_max)
        else:
            largest = tl.load(peak)
        s = round_up(from_magnitude(largest, top, 1e-30), KIND, BIAS, SCALE_MANTISSA, TOP, TINY, QUANTUM)
        if SOURCE == "row":
            tl.store(scale + row, s)
        elif row == 0:
            tl.store(scale, s)
    c_row = codes + row.to(tl.int64) * stride_c
    if ONCE:
        v = to_float32(row_x)
        t = divide(v, s, s, False, INTERPRET)
        c = round_to_element(v, t, ELEMENT, INTEGER, MANTISSA, FLOOR, LOW, HIGH, NAN, SOURCE != "given")
        tl.store(c_row + column, c, mask=column < k)
    else:
        for start in range(0, k, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            v = to_float32(load_x(x_row, column, column < k, k, ACT, GATED, INTERLEAVED, LIMIT, ALPHA, BETA, UP_BETA, INTERPRET))
            t = divide(v, s, s, False, INTERPRET)
            c = round_to_element(v, t, ELEMENT, INTEGER, MANTISSA, FLOOR, LOW, HIGH, NAN, SOURCE != "given")
            tl.store(c_row + column, c, mask=column < k)


@device_function
def load_groups(
    x_row, first, k, GROUP: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
    ACT: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    UP_BETA: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """GROUPS groups of a row, float32 (GROUPS, COLUMNS), zero past their ends."""
    within = tl.arange(0, COLUMNS)[None, :]
    column = (first + tl.arange(0, GROUPS))[:, None] * GROUP + within
    return to_float32(
        load_x(x_row, column, (within < GROUP) & (column < k), k, ACT, GATED, INTERLEAVED, LIMIT, ALPHA, BETA, UP_BETA, INTERPRET)
    )


@device_function
def four_bits(v, top, INTERPRET: tl.constexpr):
    """The scale of each group, rounded up to four significant bits."""
    u = largest_magnitude(v, 1, INTERPRET)
    return round_up(from_magnitude(u, top, 1e-30), "float", 127, 3, 3.0e38, 0.0, 1.0)


@kernel(do_not_specialize=["m"])
def group_kernel(
    codes, scale, scale_2, x, given, m, k, groups, stride_x, stride_c, top,
    SECOND: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr, SCALE_MANTISSA: tl.constexpr, TOP: tl.constexpr,
    TINY: tl.constexpr, QUANTUM: tl.constexpr, INTEGER: tl.constexpr, MANTISSA: tl.constexpr, FLOOR: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, NAN: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
    ACT: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    UP_BETA: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Some groups of a row a block; all of the row where SECOND is "token", whose scale_2 follows from the largest scale of the row."""
    row = tl.program_id(0)
    x_row = x + row.to(tl.int64) * stride_x
    first = tl.program_id(1) * GROUPS
    last = tl.minimum(first + GROUPS, groups)
    if SECOND == "tensor":
        s_2 = tl.load(given)
    elif SECOND == "token":
        last = groups
        peak = tl.full((GROUPS,), 0, tl.int32)
        for g in range(first, last, GROUPS):
            v = load_groups(x_row, g, k, GROUP, GROUPS, COLUMNS, ACT, GATED, INTERLEAVED, LIMIT, ALPHA, BETA, UP_BETA, INTERPRET)
            peak = tl.maximum(peak, magnitude_bits(four_bits(v, top, INTERPRET)))
        largest = tl.reduce(peak, 0, tl.standard._elementwise_max).to(tl.float32, bitcast=True)
        s_2 = round_up(tl.div_rn(largest, 448.0), "e8m0", 127, 0, 2.0**127, 0.0, 1.0)
        tl.store(scale_2 + row, s_2)
    else:
        s_2 = 1.0
    for g in range(first, last, GROUPS):
        v = load_groups(x_row, g, k, GROUP, GROUPS, COLUMNS, ACT, GATED, INTERLEAVED, LIMIT, ALPHA, BETA, UP_BETA, INTERPRET)
        if SECOND == "token":
            s = tl.div_rn(four_bits(v, top, INTERPRET), s_2)
        else:
            s = from_magnitude(largest_magnitude(v, 1, INTERPRET), top, 1e-30)
            if SECOND == "tensor":
                s = tl.div_rn(s, s_2)
        s = round_up(s, KIND, BIAS, SCALE_MANTISSA, TOP, TINY, QUANTUM)
        number = g + tl.arange(0, GROUPS)
        tl.store(scale + row.to(tl.int64) * groups + number, s, mask=number < groups)
        t = divide(v, s[:, None], s_2, SECOND != "none", INTERPRET)
        c = round_to_element(v, t, codes.dtype.element_ty, INTEGER, MANTISSA, FLOOR, LOW, HIGH, NAN, SECOND != "tensor")
        within = tl.arange(0, COLUMNS)[None, :]
        column = number[:, None] * GROUP + within
        tl.store(codes + row.to(tl.int64) * stride_c + column, c, mask=(within < GROUP) & (column < k))


class Quantized(NamedTuple):
    """numbers (m, k), rows padded; group scales (m, groups) or a placeholder; scales (m,) or (1,), or a placeholder; (m, k)."""

    numbers: torch.Tensor
    groups: torch.Tensor
    scale: torch.Tensor
    shape: tuple


class InputQuantizer:
    """Quantizes x by the rules of one activation format: quantizer(x, x_scale) -> Quantized.

    row_scale: "token", "tensor" or "none": what the third result is.
    """

    def __init__(self, x_format, dtype):
        element, scale = x_format.element, SCALE_DTYPES[x_format.scale]
        self.format, self.dtype = x_format, dtype
        integer = isinstance(element, Int) or element.exponent == 0
        self.top = float(2 ** (element.bits - 1) - 1) if isinstance(element, Int) else max_value(element)
        holds_nan = not integer and element.specials != "finite" and dtype != torch.int8
        self.element = {
            "INTEGER": integer,
            "MANTISSA": 0 if integer else element.mantissa,
            "FLOOR": 0 if integer else 127 + 1 - (2 ** (element.exponent - 1) - 1),
            "LOW": float(min_value(element)),
            "HIGH": float(max_value(element)),
            "NAN": float("nan") if holds_nan else 0.0,
        }
        self.scale = _scale_constants(x_format.scale, scale)
        self.row_scale = {"tensor": "tensor", "channel": "token", None: "none"}[x_format.scale_2]
        gn, gk = x_format.group
        self.group = gk
        if not gk:
            self.row_scale = "token" if gn else "tensor"
        self.rows, self.groups, self.peaks = Launcher(row_kernel), Launcher(group_kernel), Launcher(peak_kernel)

    def __call__(self, x, x_scale):
        """
        Args:
            x: (m, k), columns adjacent; or what is Quantized already.
            x_scale: one number for a static format, else None.
        """
        return x if isinstance(x, Quantized) else self._quantized(x, x_scale, x.shape[1], AS_IT_IS)

    def activated(self, x, activation, parameters):
        """The activation of x, rounded to x's dtype and then quantized, in one launch. x: (m, 2 k), or (m, k) where there is no up.

        Scales of tensors are not for it.
        """
        constants = _activation(activation, parameters)
        return self._quantized(x, None, x.shape[1] // (2 if constants["GATED"] else 1), constants)

    def _quantized(self, x, x_scale, k, activation):
        m = x.shape[0]
        interpret = interprets(x.device)
        numbers = torch.empty((m, -(-k // 16) * 16), dtype=self.dtype, device=x.device)
        if x_scale is not None:
            x_scale = x_scale.reshape(1).float()
        kind = (multiple_of_16(x), stride_kind(x.stride(0)), k, *activation.values())
        if self.group:
            return self._grouped(x, x_scale, numbers, kind, interpret, k, activation)
        columns = max(16, _power_of_two(k))
        # Gates take registers of their own.
        once = columns <= (ROW_COLUMNS if activation is AS_IT_IS else LOOP_COLUMNS)
        columns = columns if once else LOOP_COLUMNS
        # 16 bytes at a time, twice or more.
        warps = {"num_warps": min(16, max(4, columns // 512))}
        if columns == ROW_COLUMNS and torch.version.hip is None:
            # Two blocks to a multiprocessor: one reads while the other computes.
            warps["maxnreg"] = 64
        peak = numbers
        source = "given" if x_scale is not None else "row"
        scale = x_scale if x_scale is not None else torch.empty(m if self.row_scale == "token" else 1, dtype=torch.float32, device=x.device)
        if self.row_scale == "tensor" and x_scale is None:
            source = "peak"
            peak = torch.zeros(1, dtype=torch.int32, device=x.device)
            self.peaks(kind, (m, 1, 1), (peak, x, m, k, x.stride(0)), {"COLUMNS": columns}, warps)
        constants = {"SOURCE": source} | self.scale | self.element | {"COLUMNS": columns, "ONCE": once}
        constants |= activation | {"INTERPRET": interpret}
        args = (numbers, scale, x, scale, peak, m, k, x.stride(0), numbers.stride(0), self.top)
        self.rows(kind, (m, 1, 1), args, constants, warps)
        return Quantized(numbers, scale, scale, (m, k))

    def _grouped(self, x, x_scale, numbers, kind, interpret, k, activation):
        m = x.shape[0]
        number = -(-k // self.group)
        scale = torch.empty((m, number), dtype=torch.float32, device=x.device)
        scale_2 = x_scale if x_scale is not None else scale
        if self.row_scale == "token":
            scale_2 = torch.empty(m, dtype=torch.float32, device=x.device)
        columns = _power_of_two(self.group)
        groups = max(1, min(GROUP_COLUMNS // columns, _power_of_two(number)))
        blocks = 1 if self.row_scale == "token" else -(-number // groups)
        constants = {"SECOND": self.row_scale, "GROUP": self.group} | self.scale | self.element
        constants |= {"GROUPS": groups, "COLUMNS": columns} | activation | {"INTERPRET": interpret}
        args = (numbers, scale, scale_2, x, scale_2, m, k, number, x.stride(0), numbers.stride(0), self.top)
        self.groups(kind, (m, blocks, 1), args, constants, {"num_warps": 4})
        return Quantized(numbers, scale, scale_2, (m, k))


@functools.cache
def _activation(name, parameters):
    """The constexprs of an activation, its parameters given as pairs."""
    constants = constexprs(name, ACTIVATIONS[name], dict(parameters))
    return {"ACT": constants.pop("KIND")} | constants


def _scale_constants(name, target):
    if name in ("fp32", "e8m0"):
        return {"KIND": name, "BIAS": 127, "SCALE_MANTISSA": 0, "TOP": 2.0**127, "TINY": 0.0, "QUANTUM": 1.0}
    if isinstance(target, torch.dtype):
        info = torch.finfo(target)
        bias, mantissa, top = (127, 7, info.max) if target == torch.bfloat16 else (15, 10, info.max)
    else:
        bias, mantissa, top = 2 ** (target.exponent - 1) - 1, target.mantissa, max_value(target)
    tiny = 2.0 ** (1 - bias)
    return {"KIND": "float", "BIAS": bias, "SCALE_MANTISSA": mantissa, "TOP": top, "TINY": tiny, "QUANTUM": tiny * 2.0**-mantissa}


def _power_of_two(x):
    return 1 << max(x - 1, 0).bit_length()
