"""The "humming" implementation: humming-kernels' GEMMs, told what a Format means, launched from configurations made once.

Nothing here imports humming until a weight is prepared.
"""

from .plan import prepare
from .rules import why_not

__all__ = ["prepare", "why_not"]
