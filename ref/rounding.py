"""One rounding from float64 to an output dtype."""

import torch


def round_to(x, dtype):
    """x rounded once, to nearest even, to dtype.

    torch converts float64 to float16 and bfloat16 by way of float32, which rounds twice. Here the first step rounds to odd
    (the last bit remembers that something was cut off), so the second one alone decides.

    Args:
        x: float64, any shape.
        dtype: torch.float64, float32, float16 or bfloat16.

    Returns:
        dtype, shape of x; overflow gives inf, as IEEE 754 has it.

    Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd" (2008).

    >>> round_to(torch.tensor(1.0 + 2**-11 + 2**-40, dtype=torch.float64), torch.float16).item() == 1.0 + 2**-10
    True
    """
    if dtype in (torch.float64, torch.float32):
        return x.to(dtype)
    if dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"round_to: got {dtype}, expected float64, float32, float16 or bfloat16")
    nearest = x.to(torch.float32)
    bits = nearest.view(torch.int32)
    toward_zero = bits - (nearest.double().abs() > x.abs()).int()
    odd = toward_zero | (nearest.double() != x).int()
    return torch.where(x.isfinite(), odd.view(torch.float32), nearest).to(dtype)
