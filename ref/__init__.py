"""What every quantization format and every operation on it means: pure functions, exact, one rounding written out.

>>> import torch, ref
>>> q = ref.quantize(torch.randn(64, 128), "int4_g128")
>>> ref.linear(torch.randn(3, 128), q).shape
torch.Size([3, 64])
"""

from .activation import quantize_input
from .combine import fuse, stack, take_rows
from .element import Codebook, Float, Int, decode, encode, parse_element
from .format import FORMATS, Format, parse_format
from .hadamard import hadamard
from .linear import VARIANTS, linear, linear_variant
from .pack import pack, unpack
from .qtensor import QTensor, equal, validate
from .quantize import dequantize, quantize
from .rule import RULES

__all__ = [
    "FORMATS",
    "RULES",
    "VARIANTS",
    "Codebook",
    "Float",
    "Format",
    "Int",
    "QTensor",
    "decode",
    "dequantize",
    "encode",
    "equal",
    "fuse",
    "hadamard",
    "linear",
    "linear_variant",
    "pack",
    "parse_element",
    "parse_format",
    "quantize",
    "quantize_input",
    "stack",
    "take_rows",
    "unpack",
    "validate",
]
