"""How a weight is multiplied: the type of the product, where the scales go, and what keeps every number exact and in range.

All of it follows from the element's table of values, the scales as they are, and what the device can multiply; no format is named.
"""

import math
from dataclasses import dataclass, replace

import torch

from ref.element import Float, Int, max_value, value_list
from ref.format import SCALE_DTYPES

DOT_DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "int8": torch.int8,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
DOT_OF = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
E4M3, E5M2 = SCALE_DTYPES["e4m3"], SCALE_DTYPES["e5m2"]

# Above this many columns an int32 sum of products of int8 could overflow.
INT32_COLUMNS = (2**31 - 1) // 128**2
# Where the largest weight is moved to when a type's range must be used to the full: 2^this.
TOP_EXPONENT = {"fp16": 14, "bf16": 126, "fp32": 126}
# Scales beyond 2^-40 .. 2^40 are far from the middle of float32's range.
FAR_EXPONENT = 40


@dataclass(frozen=True)
class Numerics:
    """One way to multiply.

    dot: the type of the product, a key of DOT_DTYPES; x_dtype: of the operand x (as dot, but fp8 types may differ).
    w_parts: a weight is the exact sum of so many numbers of that type. native: codes are numbers of that type already.
    scale: "end", "sums" or "weight" (see gemm_kernel). unit_exponent, scale_exponent: weights are taken times 2^this, and scales.
    """

    dot: str
    x_dtype: torch.dtype
    w_parts: int = 1
    native: bool = False
    scale: str = "end"
    unit_exponent: int = 0
    scale_exponent: int = 0

    @property
    def accumulator(self):
        if self.dot == "int8":
            return "int32 sums of int8 products"
        if self.dot in ("e4m3", "e5m2"):
            return "chunks of at most 128 products of fp8, summed in fp32"
        return f"fp32 sums of {self.dot} products" + (f", {self.w_parts} to a weight" if self.w_parts > 1 else "")


def choose(q, x_dtype, x_format, capability, fp8=True):
    """The Numerics for a weight.

    Reads the scales and zero points (it synchronises).

    Args:
        q: QTensor (n, k) or (e, n, k).
        x_dtype: float16, bfloat16 or float32.
        x_format: None or the Format that x is quantized to.
        capability: of the device, as 90.
        fp8: whether the device multiplies OCP fp8.
    """
    values = _weight_values(q)
    found = None
    if x_format is not None:
        found = _eight_bit(q, values, x_format, capability >= 80, fp8 and capability >= 89)
    if found is None:
        found = _sixteen_bit(q, values, x_dtype, x_format)
    return _with_scale(q, found, x_format)


def step_columns(q, numerics, x_format):
    """Columns that a step of the kernel must not cross a multiple of; 0 where there are none such."""
    k = q.shape[-1]
    groups = [q.format.group[1]] if numerics.scale == "sums" else []
    groups += [x_format.group[1]] if x_format is not None else []
    return math.gcd(*[g for g in groups if 0 < g < k])


def _weight_values(q):
    """Every number that a code may stand for before scaling, float64; None with a float zero point."""
    values = torch.tensor(value_list(q.format.element), dtype=torch.float64)
    if q.zero is None:
        return values
    if q.format.zero != "int":
        return None
    return (values[:, None] - q.zero.unique().double().cpu()).flatten().unique()


def _eight_bit(q, values, x_format, int8, fp8):
    """int8 or fp8 products, where both sides are exact in such a type."""
    if values is None:
        return None
    x_values = _finite(x_format.element)
    if int8 and q.shape[-1] <= INT32_COLUMNS and _in_int8(x_values):
        for exponent in range(4):
            if _in_int8(values * 2.0**exponent):
                return Numerics("int8", torch.int8, unit_exponent=exponent)
    groups = [g for g in (q.format.group[1], x_format.group[1]) if 0 < g < q.shape[-1]]
    # Integers are promised float32 sums, which an fp8 unit does not keep.
    if not fp8 or isinstance(x_format.element, Int) or (groups and math.gcd(*groups) % 32):
        return None
    x_name = _fp8_holding(x_values)
    w_name = _fp8_holding(values)
    if x_name is None or w_name is None:
        return None
    native = q.zero is None and q.format.element == {"e4m3": E4M3, "e5m2": E5M2}[w_name]
    return Numerics(w_name, DOT_DTYPES[x_name], native=native)


def _sixteen_bit(q, values, x_dtype, x_format):
    """Products of 16-bit floats where the weights are sums of up to three of them, else of float32."""
    first = DOT_OF[x_dtype]
    if x_format is None:
        names = [first] if first != "fp32" else []
    else:
        x_values = _finite(x_format.element)
        names = [first] if first != "fp32" else []
        names += [name for name in ("bf16", "fp16") if name != first]
        names = [name for name in names if _parts(x_values, DOT_DTYPES[name]) == 1]
    best = None
    for name in names:
        for exponent in _exponents(q, values, name):
            parts = _zero_parts(q, name) if values is None else _parts(values * 2.0**exponent, DOT_DTYPES[name])
            if parts is not None and (best is None or parts < best.w_parts):
                best = Numerics(name, DOT_DTYPES[name], parts, unit_exponent=exponent)
    if best is None:
        fits = values is None or _parts(values, torch.float32) is not None
        best = Numerics("fp32", torch.float32, unit_exponent=0 if fits else _fill(values, "fp32"))
    return best


def _exponents(q, values, name):
    """Powers of two that weights may be taken times: none, then what fills the type's range."""
    if values is not None:
        return [0, _fill(values, name)]
    top = 2**q.format.element.bits + (float(q.zero.double().abs().max()) if q.zero.numel() else 0.0)
    return [TOP_EXPONENT[name] - math.frexp(top)[1]] if name == "fp16" and math.isfinite(top) else [0]


def _fill(values, name):
    """The exponent that brings the largest of the values to the top of a type."""
    finite = values[values.isfinite()].abs()
    top = float(finite.max()) if finite.numel() else 0.0
    return TOP_EXPONENT[name] - math.frexp(top)[1] if top else 0


def _zero_parts(q, name):
    """Parts that hold code - zero to float32's 24 bits."""
    return 2 if name == "fp16" and q.zero.dtype != torch.float32 else 3


def _with_scale(q, numerics, x_format):
    gk = q.format.group[1]
    if q.format.offset is not None:
        # An offset is multiplied by the sum of its group's x, step by step.
        return replace(numerics, scale="sums")
    if not 0 < gk < q.shape[-1]:
        return replace(numerics, scale="end")
    if numerics.dot in ("fp16", "bf16") and numerics.w_parts == 1 and q.zero is None and gk < 64 and gk & (gk - 1) == 0:
        fits_x = x_format is None or x_format.group[1] % gk == 0
        exponent = _product_exponent(q, numerics)
        if fits_x and exponent is not None:
            return replace(numerics, scale="weight", scale_exponent=exponent)
    return replace(numerics, scale="sums")


def _scale_values(q):
    """The finite scales, float64, as magnitudes; each code once."""
    target = SCALE_DTYPES[q.format.scale]
    if isinstance(target, torch.dtype):
        scales = q.scale.double()
    else:
        scales = torch.tensor(value_list(target), dtype=torch.float64)[q.scale.unique().cpu().long()]
    return scales[scales.isfinite()].abs()


def far_rows(q, numerics):
    """What the scales and offsets of each row are taken times, and what takes it back in two steps: float32 (..., 3, n), powers of two.

    None where none is far from the middle of float32's range: no sum of groups overflows or vanishes before its other factors come.
    """
    if numerics.scale == "weight" or not q.scale.numel():
        return None
    target, scale = SCALE_DTYPES[q.format.scale], q.scale
    if not isinstance(target, torch.dtype):
        scale = torch.tensor(value_list(target), dtype=torch.float64, device=scale.device)[scale.long()]
    top = scale.double().abs().nan_to_num(0.0, 0.0, 0.0).amax(-1)
    if q.offset is not None:
        top = torch.maximum(top, q.offset.double().abs().nan_to_num(0.0, 0.0, 0.0).amax(-1) * 2.0**numerics.unit_exponent)
    exponent = torch.where(top == 0, 0, torch.frexp(top).exponent).clamp(-126, 126)
    if not bool((exponent.abs() > FAR_EXPONENT).any()):
        return None
    n, gn = q.shape[-2], q.format.group[0]
    rows = torch.arange(n, device=q.scale.device) // gn if gn else torch.zeros(n, dtype=torch.long, device=q.scale.device)
    exponent = exponent[..., rows].double()
    half = (exponent / 2).floor()
    return torch.exp2(torch.stack((-exponent, half, exponent - half), -2)).float().contiguous()


def _product_exponent(q, numerics):
    """e such that every value * scale * 2^e is a normal number of the dot's type, exactly; None where there is none."""
    if isinstance(SCALE_DTYPES[q.format.scale], torch.dtype):
        return None
    dtype = DOT_DTYPES[numerics.dot]
    values = _finite(q.format.element) * 2.0**numerics.unit_exponent
    products = (values.abs()[:, None] * _scale_values(q)).flatten().unique()
    products = products[products > 0]
    if not len(products):
        return 0
    low, high = math.frexp(products[0].item())[1], math.frexp(products[-1].item())[1]
    info = torch.finfo(dtype)
    floor, ceiling = math.frexp(info.tiny)[1], min(math.frexp(info.max)[1] - 1, FAR_EXPONENT)
    # Nothing where it fits; else as little as brings it in.
    exponent = ceiling - high if high > ceiling else max(0, floor - low)
    if not floor <= low + exponent <= high + exponent <= ceiling:
        return None
    moved = products * 2.0**exponent
    return exponent if bool((moved.to(dtype).double() == moved).all()) else None


def _finite(element):
    values = torch.tensor(value_list(element), dtype=torch.float64)
    return values[values.isfinite()]


def _in_int8(values):
    return bool(((values == values.round()) & (values >= -128) & (values <= 127)).all())


def _fp8_holding(values):
    """The fp8 type that has all the values (NaN and inf included), or None."""
    for name, element in (("e4m3", E4M3), ("e5m2", E5M2)):
        if torch.isin(values[~values.isnan()], torch.tensor(value_list(element), dtype=torch.float64)).all():
            return name
    return None


def _parts(values, dtype):
    """How many numbers of a type sum to each value exactly: 1 to 3, else None. NaN is NaN, inf must be inf."""
    rest = values[~values.isnan()]
    infinite = rest.isinf()
    for parts in (1, 2, 3):
        part = rest.to(dtype).double()
        if not (part.isinf() == infinite).all():
            return None
        rest = torch.where(infinite, 0.0, rest - part)
        infinite = torch.zeros_like(infinite)
        if not rest.any():
            return parts
    return None


def decode_constants(element):
    """The constexprs of decode.decode for an element."""
    constants = {"DECODE": "table", "MIDDLE": 0, "EXPONENT": 0, "MANTISSA": 0, "SIGNED": False, "SPECIALS": "finite", "UNBIAS": 1.0}
    if isinstance(element, Int):
        constants |= {"DECODE": "int", "MIDDLE": 2 ** (element.bits - 1) if element.signed else 0}
    elif isinstance(element, Float) and element.exponent and element.subnormal and max_value(element) < 2.0**128:
        bias = 2 ** (element.exponent - 1) - 1
        constants |= {"DECODE": "float", "EXPONENT": element.exponent, "MANTISSA": element.mantissa, "SIGNED": element.signed}
        constants |= {"SPECIALS": element.specials, "UNBIAS": 2.0 ** (127 - bias)}
    return constants
