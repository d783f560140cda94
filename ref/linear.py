"""The linear layer, exactly."""

import torch

from .activation import quantize_input
from .hadamard import hadamard
from .qtensor import QTensor, check_parts
from .quantize import dequantize, stored_values
from .rounding import round_to

# What kernels legitimately differ in, before the sum: each is a different exact answer.
VARIANTS = {
    "exact": "codes, scales and zero points as they are",
    "weight_rounded": "each weight, code times scale, rounded to x's dtype before the product",
    "input_rotated": "the rotation applied to x and rounded to x's dtype, not taken back from the weight",
    "weight_rounded+input_rotated": "both",
}


def linear(x, w, bias=None, *, x_format=None, x_scale=None):
    """y = x W^T + bias, in float64, rounded once to x's dtype.

    Args:
        x: (..., k), float16, bfloat16, float32 or float64 (which fast does not take).
        w: QTensor (n, k), or a plain tensor (n, k).
        bias: (n,), any float dtype, or None.
        x_format: None, or the format that x is quantized to first (quantize_input), as int8_token.
        x_scale: the static scale of x_format, a tensor with one value.

    Returns:
        (..., n), dtype of x.

    Raises:
        TypeError: a dtype that is none of those.
        ValueError: shapes or devices disagree, or x_format does not fit.

    >>> linear(torch.ones(2, 3), torch.eye(3)[:2], torch.tensor([0.5, 0.0]))
    tensor([[1.5000, 1.0000],
            [1.5000, 1.0000]])
    """
    return linear_variant(x, w, bias, x_format=x_format, x_scale=x_scale, variant="exact")


def linear_variant(x, w, bias=None, *, x_format=None, x_scale=None, variant):
    """linear, with one of the VARIANTS by name."""
    check_linear(x, w, bias, x_format, x_scale)
    a, b = linear_operands(x, w, x_format=x_format, x_scale=x_scale, variant=variant)
    y = a @ b.T
    if bias is not None:
        y = y + bias.to(torch.float64)
    return round_to(y, x.dtype).reshape(*x.shape[:-1], w.shape[0])


def linear_operands(x, w, *, x_format=None, x_scale=None, variant="exact"):
    """The two factors of a linear variant, float64: (m, k) and (n, k), so that y = a b^T + bias."""
    if variant not in VARIANTS:
        raise ValueError(f"linear: unknown variant {variant!r}, expected one of {', '.join(VARIANTS)}")
    k = w.shape[1]
    a = x.detach().to(torch.float64).reshape(x.shape[:-1].numel(), k)
    if not isinstance(w, QTensor):
        return (a if x_format is None else dequantize(quantize_input(x, x_format, x_scale))), w.detach().to(torch.float64)
    rotated = "input_rotated" in variant and w.format.hadamard > 0
    b = stored_values(w)
    if "weight_rounded" in variant:
        b = round_to(b, x.dtype).double()
    if x_format is not None:
        quantized = quantize_input(x, x_format, x_scale)
        a = dequantize(quantized)
        if rotated:
            a = hadamard(a, w.format.hadamard)
    elif rotated:
        a = round_to(hadamard(a, w.format.hadamard), x.dtype).double()
    return a, hadamard(b, w.format.hadamard) if w.format.hadamard and not rotated else b


def check_linear(x, w, bias, x_format, x_scale):
    """Raise TypeError or ValueError where linear's arguments do not fit each other; reads no data."""
    if x_scale is not None and x_format is None:
        raise ValueError("linear: got x_scale without x_format")
    name = f"weight {w.format}" if isinstance(w, QTensor) else "weight"
    if not isinstance(w, (QTensor, torch.Tensor)):
        raise TypeError(f"linear: w is {type(w).__name__}, expected a QTensor or a tensor")
    if not isinstance(x, torch.Tensor) or x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(
            f"linear: x is {x.dtype if isinstance(x, torch.Tensor) else type(x).__name__}, expected a floating-point tensor of 16 bits or more"
        )
    if isinstance(w, QTensor):
        check_parts(w, "linear")
    if len(w.shape) != 2:
        raise ValueError(f"linear: {name} has shape {tuple(w.shape)}, expected (n, k)")
    if x.dim() < 1 or x.shape[-1] != w.shape[1]:
        got = x.shape[-1] if x.dim() else "no axis"
        raise ValueError(f"linear: x has k={got}, {name} has k={w.shape[1]} (both must match)")
    if bias is not None:
        if not isinstance(bias, torch.Tensor) or not bias.dtype.is_floating_point:
            raise TypeError(
                f"linear: bias is {bias.dtype if isinstance(bias, torch.Tensor) else type(bias).__name__}, expected a floating-point tensor"
            )
        if tuple(bias.shape) != (w.shape[0],):
            raise ValueError(f"linear: bias has shape {tuple(bias.shape)}, expected ({w.shape[0]},) as {name} has n={w.shape[0]}")
    device = w.packed.device if isinstance(w, QTensor) else w.device
    for other, tensor in (("w", device), ("bias", None if bias is None else bias.device)):
        if tensor is not None and tensor != x.device:
            raise ValueError(f"linear: x is on {x.device}, {other} is on {tensor} (both must match)")
