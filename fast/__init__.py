"""ref's functions at speed. linear is a drop-in for torch.nn.functional.linear.

>>> import torch, ref, fast
>>> q = ref.quantize(torch.randn(64, 128), "int4_g128")
>>> fast.linear(torch.randn(3, 128), q).shape
torch.Size([3, 64])
"""

from .dispatch import IMPLEMENTATIONS, Prepared, prepare
from .eager import dequantize
from .hadamard import hadamard
from .linear import linear, why_not
from .quantize_input import quantize_input

__all__ = ["IMPLEMENTATIONS", "Prepared", "dequantize", "hadamard", "linear", "prepare", "quantize_input", "why_not"]
