"""Known-bad versions of the project's own code, and right ones: what the suite's verdict is worth (python -m conformance.power)."""

from . import cheats, dense, kernels, layouts, moe, variations

MUTANTS = (*dense.MUTANTS, *kernels.MUTANTS, *moe.MUTANTS, *layouts.MUTANTS)
VARIATIONS = (*variations.VARIATIONS, *moe.VARIATIONS)
CHEATS = cheats.CHEATS
