"""Cases: everything that decides one example, as a value that prints to one line and back."""

import shlex
from dataclasses import dataclass, fields
from typing import ClassVar

import torch

from ref.element import Codebook, Float, Int
from ref.format import Format, parse_format

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Case:
    """Shared by every case: a repr of the fields that differ from their defaults, which evaluates back (read_case)."""

    classes: ClassVar = {}  # by name

    def __init_subclass__(cls):
        Case.classes[cls.__name__] = cls

    def __repr__(self):
        shown = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"


@dataclass(frozen=True, repr=False)
class LinearCase(Case):
    """One call of linear.

    n, k, format: of the weight. lead: x's leading dimensions; their product is m. x_format, static: how x is quantized first,
    and whether x_scale is given. dtype: of x. bias: its dtype. order: the weight has a group_index.
    pad, offset: x is a view into a larger buffer, rows `pad` elements further apart, starting `offset` elements in.
    transposed: x is a transposed view. data: a regime (conformance.regimes.DATA). seed: of all tensors.
    """

    op = "linear"
    n: int = 1
    k: int = 1
    format: str | Format = "int8"
    lead: tuple = (1,)
    x_format: str | Format | None = None
    static: bool = False
    dtype: str = "bf16"
    bias: str | None = None
    order: bool = False
    pad: int = 0
    offset: int = 0
    transposed: bool = False
    data: str = "exact"
    seed: int = 0

    @property
    def m(self):
        return torch.Size(self.lead).numel()


@dataclass(frozen=True, repr=False)
class QuantizeInputCase(Case):
    """One call of quantize_input; fields as in LinearCase."""

    op = "quantize_input"
    k: int = 1
    format: str | Format = "int8_token"
    lead: tuple = (1,)
    static: bool = False
    dtype: str = "bf16"
    pad: int = 0
    offset: int = 0
    data: str = "normal"
    seed: int = 0

    @property
    def m(self):
        return torch.Size(self.lead).numel()


@dataclass(frozen=True, repr=False)
class DequantizeCase(Case):
    """One call of dequantize. experts: None for a weight (n, k), else e of (e, n, k). dtype: of the result."""

    op = "dequantize"
    n: int = 1
    k: int = 1
    experts: int | None = None
    format: str | Format = "int8"
    dtype: str = "fp32"
    order: bool = False
    data: str = "normal"
    seed: int = 0


@dataclass(frozen=True, repr=False)
class QuantizeCase(Case):
    """One call of quantize. dtype: of the weight. rule, rounding: arguments of quantize, None where left out."""

    op = "quantize"
    n: int = 1
    k: int = 1
    experts: int | None = None
    format: str | Format = "int8"
    dtype: str = "fp32"
    rule: str | None = None
    rounding: str | None = None
    data: str = "normal"
    seed: int = 0


@dataclass(frozen=True, repr=False)
class PackCase(Case):
    """One call of pack on codes (*lead, k). integer: their dtype. pad: codes are a view, rows `pad` elements further apart."""

    op = "pack"
    bits: int = 4
    lead: tuple = (1,)
    k: int = 1
    integer: str = "uint8"
    pad: int = 0
    seed: int = 0


@dataclass(frozen=True, repr=False)
class UnpackCase(Case):
    """One call of unpack on a bitstream of codes (*lead, k). junk: the bits behind the last code are not zero."""

    op = "unpack"
    bits: int = 4
    lead: tuple = (1,)
    k: int = 1
    junk: bool = False
    pad: int = 0
    seed: int = 0


def read_case(text):
    """The case that repr printed.

    Raises:
        ValueError: text is none.

    >>> read_case("LinearCase(n=3, format='int4_g128')").format
    'int4_g128'
    """
    from .ops import operations

    operations()  # defines all cases
    names = Case.classes | {cls.__name__: cls for cls in (Format, Int, Float, Codebook)}
    try:
        case = eval(text, {"__builtins__": {}}, names)
        for name in ("format", "x_format"):
            if getattr(case, name, None) is not None:
                parse_format(getattr(case, name))
    except Exception as error:
        raise ValueError(f"case: cannot read {text!r}: {error}") from None
    legal = [name for name, cls in Case.classes.items() if hasattr(cls, "op")]
    if type(case).__name__ not in legal:
        raise ValueError(f"case: {text!r} is a {type(case).__name__}, expected one of {', '.join(legal)}")
    return case


def reproduction(case, candidate, impl=None, device="cpu"):
    """The shell command that runs one case again."""
    where = (f" --impl {impl}" if impl else "") + (f" --device {device}" if str(device) != "cpu" else "")
    return f"python -m conformance --candidate {candidate}{where} --case {shlex.quote(repr(case))}"
