"""A quantized linear layer as a module."""

import torch

from ref.format import check_input_format, parse_format
from ref.qtensor import QTensor

from ..dispatch import prepare
from ..linear import linear
from ..registry import find
from .weight import Weight, empty


class Linear(Weight):
    """y = x W^T + bias with a quantized W: what takes nn.Linear's place. Buffers only; for inference.

    Buffers: the parts of a QTensor (packed, scale, and of zero, scale_2, group_index and offset those that it has), bias, x_scale.

    >>> import ref
    >>> layer = Linear(ref.quantize(torch.randn(64, 128), "int4_g128"))
    >>> layer(torch.randn(3, 128)).shape, layer
    (torch.Size([3, 64]), Linear(in_features=128, out_features=64, format=int4_g128, bias=False))
    """

    FIXED = (*Weight.FIXED, "x_scale")

    def __init__(self, weight, bias=None, *, x_format=None, x_scale=None, impl=None):
        """
        Args:
            weight: QTensor (n, k). bias: (n,), or None. x_format, x_scale, impl: as linear's.

        Raises:
            TypeError: the weight is no QTensor.
            ValueError: the bias does not fit the weight, or x_scale x_format; or there is no such impl.
        """
        if not isinstance(weight, QTensor):
            raise TypeError(f"Linear: weight is {type(weight).__name__}, expected a QTensor; torch.nn.Linear takes a plain tensor")
        if len(weight.shape) != 2:
            raise ValueError(f"Linear: weight {weight.format} has shape {tuple(weight.shape)}, expected (n, k)")
        if bias is not None and tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(
                f"Linear: bias has shape {tuple(bias.shape)}, weight {weight.format} has n={weight.shape[0]} (both must match)"
            )
        if x_format is not None:
            x_format = parse_format(x_format)
            check_input_format(x_format, x_scale, "Linear")
        elif x_scale is not None:
            raise ValueError("Linear: got x_scale without x_format")
        if impl is not None:
            find("linear", impl, "Linear")
        super().__init__(weight)
        self.x_format, self.impl = x_format, impl
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("x_scale", None if x_scale is None else x_scale.detach().reshape(1))

    @classmethod
    def empty(cls, n, k, format, *, bias=False, x_format=None, static=False, dtype=torch.bfloat16, device="meta"):
        """A layer of the right shapes without any data, for a loader or load_state_dict to fill.

        Args:
            n, k: out and in features. format: a format name or a Format. bias: whether there is one, of the dtype.
            x_format: as linear's. static: whether its scale comes with the model.

        Raises:
            ValueError: a format that there is not, or that the shape cannot have.

        >>> Linear.empty(64, 100, "int3_g128", bias=True).packed
        tensor(..., device='meta', size=(64, 10), dtype=torch.int32)
        """
        x_scale = torch.empty(1, dtype=torch.float32, device=device) if static else None
        bias = torch.empty(n, dtype=dtype, device=device) if bias else None
        return cls(empty(format, (n, k), device=device), bias, x_format=x_format, x_scale=x_scale)

    in_features = property(lambda self: self.shape[1])
    out_features = property(lambda self: self.shape[0])

    def prepare(self, x_dtype=torch.bfloat16, **options):
        """Put the weight into its kernels' layout (fast.prepare) and let go of the buffers that it was read from. Returns the layer."""
        static, bias = self.x_scale is not None, self.bias is not None
        own = {"x_format": self.x_format, "static_scale": static, "bias": bias, "impl": self.impl}
        self.keep(prepare(self.weight, x_dtype=x_dtype, **own, **options))
        return self

    def forward(self, x):
        # As attributes buffers cost a microsecond each.
        held = self._buffers
        return linear(x, self.weight, held["bias"], x_format=self.x_format, x_scale=held["x_scale"], impl=self.impl)

    def extra_repr(self):
        x = "" if self.x_format is None else f", x_format={self.x_format}"
        impl = "" if self.impl is None else f", impl={self.impl}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, format={self.format}{x}, bias={self.bias is not None}{impl}"
        )
