"""What each implementation costs beside the others, as measured on one H200 (conformance/FIGURES.md has the figures): the cheapest that can is taken.

In units of the time that the Triton kernels for integers take. Only the order was measured; the figures are round.
"""

import importlib

# Up to so many rows a product waits for its weights, and the Triton kernels read them faster than Humming's deterministic ones.
FEW_ROWS = 64
# Triton's general kernel, which decodes every other format: 2 to 30 times as long as Humming's while few rows wait for their weights.
GENERAL = 3.0


def triton(request, rows):
    if request.x_format is not None:
        return 1.0
    return 1.0 if importlib.import_module("fast.triton.weight_only").why_not_weight(request) is None else GENERAL


def humming(request, rows):
    return 1.4 if rows <= FEW_ROWS else 0.75


def humming_grouped(request, rows):
    """Where it takes a format, it has the better tiles for experts (conformance.bench_moe)."""
    return 0.75


def cublas(request, rows):
    return 0.5


def torch(request, rows):
    """It decodes the weight at every call."""
    return 100.0
