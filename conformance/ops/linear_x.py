"""linear with x quantized first (x_format).

Besides what linear may lose, a code may differ from the exact one where x / scale lies within rounding of a cell's edge, and a
scale by its last bit: quantizer.hull has the lowest and the highest value of each x, and y moves by at most half their distance
times |W|. In the exact regime every group's largest value is MAX times a power of two, so scales and codes are certain.
"""

from .. import strategies
from .linear import FUNCTION, build, labels

__all__ = ["FUNCTION", "build", "cases", "labels"]


def cases(label, config=None):
    return strategies.linear_cases(label, config, quantized=True)
