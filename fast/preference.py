"""What each implementation costs beside the others, as measured on one H200 (the README has the figures): the cheapest that can is taken.

In units of the time that the Triton kernels take for the same call. Only the order was measured everywhere; the figures are round.
"""

# Up to so many rows a product waits for its weights, and the Triton kernels read them faster than Humming's deterministic ones.
FEW_ROWS = 64


def triton(request, rows):
    return 1.0


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
