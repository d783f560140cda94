"""What Humming can compute as the contract wants it: each rule is a fact about its kernels (version 0.1.19)."""

import importlib.util

import torch

from ref.element import NAMED, Codebook, Int
from ref.format import SCALE_DTYPES

# Humming's accumulators and epilogues differ between architectures; these are the ones whose paths were checked.
LOWEST_SM, HIGHEST_SM = (8, 0), (9, 0)
X_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# A group of the kernel: at least 16 weights, 32 with 8-bit activations; longer groups of a format are written as several of 128.
SMALLEST_GROUP, SMALLEST_GROUP_8, LARGEST_GROUP = 16, 32, 128
EXPONENT_BITS = {torch.bfloat16: 8, torch.float16: 5}
SIGNIFICANT_BITS = {torch.bfloat16: 8, torch.float16: 11}
BLOCK = (128, 128)


def why_not(request):
    """Why Humming cannot run such a call, as a sentence; None if it can. The data may still refuse (prepare)."""
    return _device(request) or _call(request) or _input(request) or _element(request) or _scales(request)


def _device(request):
    if request.device.type != "cuda" or torch.version.hip is not None:
        return "Humming runs on NVIDIA GPUs only"
    if not LOWEST_SM <= torch.cuda.get_device_capability(request.device) <= HIGHEST_SM:
        return "its kernels are checked on compute capability 8.0 to 9.0"
    if request.x_format is not None and torch.cuda.get_device_capability(request.device) != (9, 0):
        return "its kernels for 8-bit activations are checked on compute capability 9.0"
    if importlib.util.find_spec("humming") is None:
        return "humming-kernels is not installed"
    return None


def _call(request):
    if request.x_dtype not in X_DTYPES:
        return "x has to be float16 or bfloat16"
    if request.bias and request.deterministic:
        return "Humming adds the bias after the result has been rounded"
    if 0 in request.shape:
        return "its tiles are not empty"
    if request.x_format and request.x_format.hadamard:
        return "its kernel does not rotate x"
    return None


def _input(request):
    fmt, x_format = request.format, request.x_format
    if x_format is None:
        return None
    if x_format.element not in (Int(8), NAMED["e4m3"]):
        return f"its activations are int8 or e4m3, not {x_format.element}"
    if x_format.scale_2 is not None:
        return "its int8 and e4m3 activations have no second scale"
    if x_format.group[1] == 0:
        return None if x_format.scale == "fp32" else "scales of rows of x, or of all x, are float32"
    g = x_format.group[1]
    if g & (g - 1) or not SMALLEST_GROUP_8 <= g <= LARGEST_GROUP:
        return f"its groups of activations are a power of two from {SMALLEST_GROUP_8} to {LARGEST_GROUP}, not {g}"
    if fmt.group[1] % g:
        return f"its weights have groups as large as the activations', and {fmt.group[1]} is no multiple of {g}"
    return None


def _element(request):
    element, x_format = request.format.element, request.x_format
    if isinstance(element, Codebook):
        return "it has no look-up tables"
    if isinstance(element, Int):
        if request.format.zero not in (None, "int"):
            return "it subtracts a float zero point in x's dtype and rounds"
        return None if x_format is None else _integer_for(x_format.element, element)
    if not element.signed or not element.subnormal or element.bits < 3:
        return f"it decodes signed floats with subnormals of 3 bits and more, not {element}"
    if element.specials != "finite" and element.bits != 8:
        return f"it has no inf or NaN codes, and {element} may hold some"
    if x_format is not None:
        return _float_for(x_format.element, element)
    if element.exponent > EXPONENT_BITS[request.x_dtype] - (element.exponent > 5):
        return f"the exponents of {element} do not fit {request.x_dtype}"
    return None


def _integer_for(x_element, element):
    """Unsigned integers are read with zero points, which take a bit more."""
    most = {Int(8): 8, NAMED["e4m3"]: 5}[x_element] - (not element.signed)
    return f"with activations in {x_element} it takes integers of at most {most} bits, not {element}" if element.bits > most else None


def _float_for(x_element, element):
    if x_element == Int(8):
        return f"it does not multiply {element} by int8"
    # Signed integers in disguise (no exponent) have a leading bit less to spare.
    if element.exponent > x_element.exponent or element.mantissa > x_element.mantissa + (element.exponent == 0):
        return f"{element} does not fit {x_element}"
    return None


def _scales(request):
    fmt, kept = request.format, SIGNIFICANT_BITS[request.x_dtype]
    if fmt.offset is not None:
        return "it adds nothing to a weight after scaling"
    if (fmt.scale_2 or "").endswith("divisor"):
        return "it multiplies by second scales, and one over a divisor would be rounded"
    if fmt.scale_2 == "channel":
        return "it multiplies by a channel's second scale after the result has been rounded"
    if fmt.group == (0, 0):
        return None if fmt.scale_2 is None else "it has one tensor scale, not two"
    if in_blocks(request):
        return None
    if fmt.scale == "fp32":
        return f"it keeps scales of groups in 16 bits, and float32 ones would be rounded (a {X_DTYPES[request.x_dtype]} scale is kept)"
    if request.x_format is None and fmt.scale in ("fp16", "bf16") and fmt.scale != X_DTYPES[request.x_dtype]:
        return f"it keeps scales in x's dtype, and {fmt.scale} scales would be rounded (a {X_DTYPES[request.x_dtype]} scale is kept)"
    if request.x_format is None and fmt.scale_2 and _product_bits(fmt) > kept:
        return f"it rounds {fmt.element} times {fmt.scale} before the second scale"
    smallest = SMALLEST_GROUP if request.x_format is None else SMALLEST_GROUP_8
    if group_size(fmt, request.x_format) < smallest:
        return f"its groups are powers of two from {smallest} on, and {fmt.group[1]} is no multiple of one"
    return None


def in_blocks(request):
    """Whether the scales stay blocks in float32: then there is no tensor scale, and codes may not be shifted (exponent_shift)."""
    fmt, x_format = request.format, request.x_format
    if x_format is None or fmt.group != BLOCK or fmt.scale != "fp32" or fmt.scale_2 is not None:
        return False
    return fmt.element == x_format.element == NAMED["e4m3"]


def scale_dtype(request):
    """In which the kernel keeps the scales of groups."""
    held = SCALE_DTYPES[request.format.scale]
    return held if request.x_format is not None and held in X_DTYPES else request.x_dtype


def _product_bits(fmt):
    """Enough significant bits for every product of a code's value and a scale."""
    element, target = fmt.element, SCALE_DTYPES[fmt.scale]
    value = element.bits if isinstance(element, Int) else element.mantissa + 1
    return value + (SIGNIFICANT_BITS[target] if isinstance(target, torch.dtype) else target.mantissa + 1)


def group_size(fmt, x_format=None):
    """The kernel's group along k: that of x, else the largest power of two, up to LARGEST_GROUP, that divides the format's."""
    if x_format is not None and x_format.group[1]:
        return x_format.group[1]
    gk = fmt.group[1]
    return min(gk & -gk, LARGEST_GROUP) if gk else LARGEST_GROUP


def exponent_shift(fmt, x_dtype):
    """Humming holds weights, and sums, too small by this power of two, and makes up for it in float32 with the tensor scale.

    Its include/humming/arith/exp_offset.cuh in a few lines, for 16-bit activations and scales of x's dtype.
    """
    element, bits = fmt.element, fmt.element.bits
    top = 2 ** (EXPONENT_BITS[x_dtype] - 1)
    if isinstance(element, Int):
        wide = bits > (6 if not element.signed else 7)
        return 6 if x_dtype == torch.bfloat16 and wide else 0
    if element.exponent == 0:
        return 0
    inside = top - 1 - (bits - 1 if x_dtype == torch.float16 or bits <= 7 else 0)
    return max(top - 2 ** (element.exponent - 1) - inside, 0)
