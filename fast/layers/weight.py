"""One weight as the buffers of a module."""

import torch
from torch import nn

from ref.format import parse_format
from ref.qtensor import TENSORS, QTensor, check_parts, part_kinds


def empty(format, shape, dtype=torch.bfloat16, device="meta"):
    """A QTensor of a format and a shape without any data, or, where format is None, a plain tensor of the dtype.

    Raises:
        ValueError: no such format, or a shape that it cannot have.
    """
    if min(shape) < 0:
        raise ValueError(f"empty: got shape {tuple(shape)}, expected no negative size")
    if format is None:
        return torch.empty(shape, dtype=dtype, device=device)
    fmt = parse_format(format)
    kinds = {name: (dtype, part) for name, (dtype, part) in part_kinds(fmt, shape).items() if dtype is not None}
    q = QTensor(fmt, tuple(shape), **{name: torch.empty(part, dtype=dtype, device=device) for name, (dtype, part) in kinds.items()})
    check_parts(q, "empty")
    return q


class Weight(nn.Module):
    """One weight as buffers: packed, scale, and of zero, scale_2, group_index and offset those that it has; or, unquantized, plain.

    They move with the model, and a cast leaves those of a QTensor as they are.
    """

    # What a cast leaves as it is, since its dtype means something.
    FIXED = TENSORS

    def __init__(self, weight):
        """
        Args:
            weight: QTensor, or a plain tensor.
        """
        super().__init__()
        for name in (*TENSORS, "plain"):
            self.register_buffer(name, None)
        self.put(weight)

    def put(self, weight):
        """Take another weight, of another format and shape if need be, in the place of the one that is here."""
        quantized = isinstance(weight, QTensor)
        self.format, self.shape = weight.format if quantized else None, tuple(weight.shape)
        for name in TENSORS:
            setattr(self, name, getattr(weight, name) if quantized else None)
        self.plain = None if quantized else weight.detach()
        self._weight = None

    @property
    def weight(self):
        """The QTensor or tensor, or what was prepared of it: the same object at every call, as long as the buffers are the same."""
        if self._weight is None:
            parts = {name: getattr(self, name) for name in TENSORS}
            self._weight = QTensor(self.format, self.shape, **parts) if self.plain is None else self.plain
        return self._weight

    def keep(self, prepared):
        """Let go of the buffers that a prepared weight was made of."""
        self._weight = prepared
        for name in TENSORS:
            setattr(self, name, None)

    def _apply(self, fn, recurse=True):
        if self.packed is None and self.plain is None:
            raise RuntimeError(f"{type(self).__name__}: this layer was prepared for its device; move layers before prepare")
        kept = {name: getattr(self, name) for name in self.FIXED}
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
        return f"{self.format or self.plain.dtype}, shape={self.shape}"
