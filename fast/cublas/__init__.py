"""The "cublas" implementation: fp8 products by cuBLAS, whose sums are promoted to float32 every 128 columns, on NVIDIA's Hopper.

Nothing here imports triton, which quantizes x and scales the sums, until a weight is prepared.
"""

import importlib.util

import torch

from ref.element import NAMED

FP8 = {NAMED["e4m3"]: torch.float8_e4m3fn, NAMED["e5m2"]: torch.float8_e5m2}


def why_not(request):
    """Why cuBLAS cannot run such a call, as a sentence; None if it can."""
    return _device(request) or _formats(request)


def _device(request):
    if request.device.type != "cuda" or torch.version.hip is not None:
        return "cuBLAS runs on NVIDIA GPUs only"
    if torch.cuda.get_device_capability(request.device) != (9, 0):
        return "how its fp8 products add up is known for compute capability 9.0"
    if importlib.util.find_spec("triton") is None:
        return "triton, which quantizes x for it, is not installed"
    return None


def _formats(request):
    fmt, x_format = request.format, request.x_format
    if x_format is None or x_format.element not in FP8 or fmt.element not in FP8:
        return "it multiplies fp8 by fp8"
    if fmt.element == x_format.element == NAMED["e5m2"]:
        return "it does not multiply e5m2 by e5m2"
    for name, one in (("weights", fmt), ("activations", x_format)):
        if one.group not in ((1, 0), (0, 0)) or one.scale_2 is not None:
            return f"its {name} have one scale for each row or for all, and no second one"
    if x_format.hadamard:
        return "it does not rotate x"
    if fmt.offset is not None:
        return "it adds nothing to a weight after scaling"
    if x_format.scale != "fp32":
        return "the scales of x are float32"
    if 0 in request.shape:
        return "its products are not empty"
    return None


def prepare(q, request):
    """A Plan: the codes as they are, padded where rows or columns are no multiple of 16."""
    from .plan import Plan

    return Plan(q, request)
