"""What is asked of an implementation, without the data."""

from dataclasses import dataclass

import torch

from ref.format import Format


@dataclass(frozen=True)
class Request:
    """One kind of call of linear, or of a product of experts' weights: everything that decides whether an implementation can do it.

    format: of the weight. shape: (n, k); of experts (e, n, k), and then format is None for a plain tensor. x_dtype: of x and of the result. device: x's and the weight's.
    x_format: None (16-bit products), or how x is quantized first. static_scale: x_scale is given.
    deterministic: the same bits on every run, one rounding. bias: there is one.
    group_index: the weight has one. Implementations of linear that are not as_is see neither that nor a rotation in format: rearrange has
        taken them over.
    weighed: rows of experts are multiplied by a router's weights before they are rounded.
    """

    format: Format | None
    shape: tuple
    x_dtype: torch.dtype
    device: torch.device
    x_format: Format | None = None
    static_scale: bool = False
    deterministic: bool = True
    bias: bool = False
    group_index: bool = False
    weighed: bool = False
