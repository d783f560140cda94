"""Own kernels in Triton. On a GPU they are compiled; on the CPU the same source runs in Triton's interpreter, slowly.

Nothing here imports triton until a weight is prepared.
"""

import importlib
import importlib.util

import torch

from ref.element import Codebook, Int

# Modules with why_not(request) and prepare(q, request), the special before the general: the first that takes a request serves it.
KERNELS = ("fast.triton.weight_only", "fast.triton.gemm")

X_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(request):
    """Why no Triton kernel can do what is requested, as a sentence; None if one can. Launches and imports nothing heavy."""
    reason = why_not_anywhere(request)
    if reason is None and request.x_format is not None:
        reason = _why_not_input(request)
    # The general kernel takes what the special ones take, too.
    return reason or importlib.import_module(KERNELS[-1]).why_not(request)


def why_not_anywhere(request):
    """Why Triton cannot run on a device, or with such x, as a sentence; None if it can."""
    device = request.device
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type not in ("cpu", "cuda"):
        return f"Triton kernels run on CUDA and ROCm devices, and in the interpreter on the CPU, not on {device.type}"
    if request.x_dtype not in X_DTYPES:
        return f"x is {request.x_dtype}, expected float16, bfloat16 or float32"
    if device.type == "cuda" and request.x_dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        return "bfloat16 products need compute capability 8.0: use float16"
    return None


def _why_not_input(request):
    x_format = request.x_format
    element = x_format.element
    if x_format.hadamard:
        return "quantized activations and a rotation do not go together here"
    if isinstance(element, Codebook) or not element.signed or (isinstance(element, Int) and element.bits < 2):
        return f"activations are quantized to signed integers of 2 bits or more and to signed floats, not to {element}"
    if not isinstance(element, Int) and not element.subnormal:
        return f"activations are not quantized to {element}, which has no subnormal numbers"
    if x_format.zero is not None or x_format.group[0] not in (0, 1) or (x_format.group[0] == 0 and x_format.group[1]):
        return f"activations are quantized by tensor, token or group, without a zero point, not to {x_format}"
    if x_format.group[1] > 8192:
        return f"activations are quantized in groups of at most 8192, not of {x_format.group[1]}"
    if request.static_scale and not x_format.group[1] and x_format.scale != "fp32":
        return f"a static scale is taken in fp32, not in {x_format.scale}"
    return None


def prepare(q, request):
    """A plan for one weight, from the first kernel that takes the request: plan.run(x, bias, x_scale, out).

    Raises:
        NotImplementedError: none does.
    """
    reasons = [why_not(request)]
    if reasons[0] is None:
        for name in KERNELS:
            module = importlib.import_module(name)
            reason = module.why_not(request)
            if reason is None:
                return module.prepare(q, request)
            reasons.append(reason)
    raise NotImplementedError("; ".join(r for r in reasons if r))
