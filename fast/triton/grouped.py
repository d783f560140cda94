"""The "triton" implementation of the grouped products: stacks of expert weights (e, n, k), quantized or plain."""

import importlib
from dataclasses import replace

from . import why_not as why_not_gemm
from . import why_not_anywhere

# Modules with why_not(request) and prepare(w, request), the special before the general: the first that takes a request serves it.
KERNELS = ("fast.triton.grouped_fragments", "fast.triton.grouped_gemm")


def why_not(request):
    """Why no Triton kernel can do what is requested, as a sentence; None if one can."""
    if 0 in request.shape:
        return f"the weight has shape {request.shape}, and there is nothing to multiply"
    if request.format is None:
        if request.x_format is not None:
            return "x is quantized for quantized weights only"
        return why_not_anywhere(request)
    if request.group_index:
        return "the columns of each expert are in an order of its own, and x would have to be gathered anew for each"
    if request.format.hadamard and request.x_format is not None:
        return "quantized activations and a rotation of the weight do not go together here"
    return why_not_gemm(plain(request))


def plain(request):
    """The request without the weight's rotation, which x takes over: x (W H)^T = (x H) W^T."""
    return replace(request, format=replace(request.format, hadamard=0)) if request.format is not None else request


def prepare(w, request, bias=None):
    """A plan for one stack, from the first kernel that takes the request; see fast.moe.blocks.ByBlocks. Biases are as each call brings them.

    Raises:
        NotImplementedError: none does.
    """
    reasons = [why_not(request)]
    if reasons[0] is None:
        rotation = request.format.hadamard if request.format is not None and request.shape[2] else 0
        if rotation:
            w = replace(w, format=plain(request).format)
        for name in KERNELS:
            module = importlib.import_module(name)
            reason = module.why_not(plain(request))
            if reason is None:
                plan = module.prepare(w, plain(request))
                plan.rotate = importlib.import_module("fast.triton.rotate").Rotation(rotation) if rotation else None
                return plan
            reasons.append(reason)
    raise NotImplementedError("; ".join(r for r in reasons if r))
