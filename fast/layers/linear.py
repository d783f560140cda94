"""A quantized linear layer as a module."""

import torch
from torch import nn

from ref.format import parse_format
from ref.qtensor import TENSORS, QTensor

from ..dispatch import prepare
from ..linear import linear


class Linear(nn.Module):
    """y = x W^T + bias with a quantized W: what takes nn.Linear's place. Buffers only; for inference.

    Buffers: the parts of a QTensor (packed, scale, and of zero, scale_2, group_index and offset those that it has), bias, x_scale.

    >>> import ref
    >>> layer = Linear(ref.quantize(torch.randn(64, 128), "int4_g128"))
    >>> layer(torch.randn(3, 128)).shape, layer
    (torch.Size([3, 64]), Linear(in_features=128, out_features=64, format=int4_g128, bias=False))
    """

    def __init__(self, weight, bias=None, *, x_format=None, x_scale=None):
        """
        Args:
            weight: QTensor (n, k). bias: (n,), or None. x_format, x_scale: as linear's.

        Raises:
            ValueError: the bias does not fit the weight.
        """
        super().__init__()
        if bias is not None and tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(
                f"Linear: bias has shape {tuple(bias.shape)}, weight {weight.format} has n={weight.shape[0]} (both must match)"
            )
        self.format, self.shape = weight.format, tuple(weight.shape)
        self.x_format = None if x_format is None else parse_format(x_format)
        for name in TENSORS:
            self.register_buffer(name, getattr(weight, name))
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("x_scale", x_scale)
        self._weight = None

    in_features = property(lambda self: self.shape[1])
    out_features = property(lambda self: self.shape[0])

    @property
    def weight(self):
        """The QTensor, or what prepare has made of it: the same object at every call, as long as the buffers are the same."""
        if self._weight is None:
            self._weight = QTensor(self.format, self.shape, **{name: getattr(self, name) for name in TENSORS})
        return self._weight

    def prepare(self, x_dtype=torch.bfloat16, **options):
        """Put the weight into its kernels' layout (fast.prepare) and let go of the buffers that it was read from. Returns the layer."""
        self._weight = prepare(
            self.weight,
            x_dtype=x_dtype,
            x_format=self.x_format,
            static_scale=self.x_scale is not None,
            bias=self.bias is not None,
            **options,
        )
        for name in TENSORS:
            setattr(self, name, None)
        return self

    def forward(self, x):
        return linear(x, self.weight, self.bias, x_format=self.x_format, x_scale=self.x_scale)

    def _apply(self, fn, recurse=True):
        # Moved to another device; a cast leaves the parts of the weight as they are, since their dtypes mean something.
        if self.packed is None:
            raise RuntimeError("Linear: this layer was prepared for its device; move layers before prepare")
        kept = {name: getattr(self, name) for name in (*TENSORS, "x_scale")}
        super()._apply(fn, recurse)
        for name, was in kept.items():
            now = getattr(self, name)
            if was is not None and now.dtype != was.dtype:
                setattr(self, name, was.to(now.device))
        self._weight = None
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._weight = None

    def extra_repr(self):
        x = "" if self.x_format is None else f", x_format={self.x_format}"
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format}{x}, bias={self.bias is not None}"
