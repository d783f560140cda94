"""Quantized activations: x becomes a QTensor, as a weight does, by rules of its own."""

import torch

from .element import Int, max_value
from .format import check_input_format, parse_format
from .hadamard import hadamard
from .quantize import check_values, with_scales
from .scale import decode_scale, encode_scale, round_up, tile

# Below this a scale is not allowed to fall: it keeps x / scale finite for rows of zeros.
SMALLEST_SCALE = 1e-30


def quantize_input(x, format, x_scale=None):
    """x, quantized row by row as a quantized product wants it.

    With raw = max(fl32(max|x| / MAX), 1e-30) over a group, MAX the element's largest value (int8: 127, int4: 7):
        per token (int8_token): scale = raw over a row.
        per group (fp8_e4m3_g128; fp4_e2m1_g32_e8m0): scale = raw, rounded up to the scale's dtype.
        per tensor (fp8_e4m3_tensor): scale = x_scale where it is given (static), else raw over all of x.
        static tensor, dynamic group (fp4_e2m1_g16_e4m3_tensor2): scale_2 = x_scale, scale = fl32(raw / x_scale), rounded up.
        group with token (fp4_e2m1_g16_e4m3_channel2): s = raw rounded up to four significant bits, scale_2 of a row = max s / 448
            rounded up to a power of two, scale = s / scale_2 rounded up to e4m3.
    Then code = round to nearest even of x / (scale * scale_2), saturated, on the scales as they are stored.

    Args:
        x: (..., k), float16, bfloat16 or float32, finite; a single row may come as (k,).
        format: a format name or a Format, signed, without zero point.
        x_scale: float32 with one value, > 0: the static tensor scale. Only with a tensor scale or scale_2 = "tensor".

    Returns:
        QTensor (m, k), m the product of x's leading dimensions.

    Raises:
        ValueError: x is not finite, the format has a zero point or groups of rows, or x_scale is missing or superfluous.

    Source: Humming 0.1.19, process_input. Humming multiplies by 1 / scale where this divides: codes may differ at ties.

    >>> quantize_input(torch.tensor([[1.0, -127.0, 2.5]]), "int8_token").scale
    tensor([[1.]])
    """
    fmt = parse_format(format)
    k = x.shape[-1] if isinstance(x, torch.Tensor) and x.dim() else 0
    rows = x.reshape(x.numel() // k if k else x.shape[:-1].numel(), k) if isinstance(x, torch.Tensor) and x.dim() else x
    check_values("quantize_input", "x", rows)
    check_input_format(fmt, x_scale, "quantize_input")
    if x_scale is not None and not bool(x_scale.isfinite().all() & (x_scale > 0).all()):
        raise ValueError(f"quantize_input: x_scale is {x_scale.item()}, expected a positive number")
    values = rows.detach().to(torch.float64)
    if fmt.hadamard:
        values = hadamard(values, fmt.hadamard)
    top = 2 ** (fmt.element.bits - 1) - 1 if isinstance(fmt.element, Int) else max_value(fmt.element)
    tiles, _ = tile(values, fmt.group)
    raw = (tiles.abs().amax(-1) / top).float().double() if tiles.numel() else tiles.new_zeros(fmt.scale_shape(values.shape))
    raw = raw.clamp(min=torch.tensor(SMALLEST_SCALE, dtype=torch.float32).item())
    scale_2 = None
    if fmt.scale_2 == "tensor":
        scale_2 = x_scale.to(torch.float32).reshape(1, 1)
        raw = (raw / scale_2.double()).float().double()
    elif fmt.scale_2 == "channel":
        raw = _round_up_bits(raw, 4)
        peak = raw.amax(-1, keepdim=True) if raw.shape[-1] else raw.new_ones(raw.shape[0], 1)
        scale_2 = decode_scale(round_up(peak / SCALE_TOP, "e8m0"), "e8m0").float()
        raw = raw / scale_2.double()
    if fmt.group == (0, 0) and x_scale is not None:
        scale = encode_scale(x_scale.to(torch.float64).reshape(1, 1), fmt.scale)
    else:
        scale = round_up(raw, fmt.scale)
    return with_scales(values, fmt, scale, None, scale_2)


SCALE_TOP = 448.0  # the largest e4m3


def _round_up_bits(x, bits):
    """x rounded up to this many significant bits."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.ceil(mantissa * 2**bits), exponent - bits)
