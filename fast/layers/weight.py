"""One weight as the buffers of a module."""

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ref.format import parse_format
from ref.qtensor import TENSORS, QTensor, check_parts, part_kinds

from . import environment


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


def moved(w, device):
    """A QTensor or a tensor on a device."""
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), w)


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
        # Says what is wrong with the variable, or that it has no effect.
        environment.f16_accum()
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

    @property
    def prepared(self):
        """Whether the buffers are gone, for what was prepared of them."""
        return self.packed is None and self.plain is None

    def _apply(self, fn, recurse=True):
        if self.prepared:
            here = self.weight.device
            if (there := fn(torch.empty(0, device=here)).device) != here:
                raise RuntimeError(
                    f"{type(self).__name__}: it was prepared for {here}, and cannot go to {there}; move a model before prepare"
                )
        kept = {name: getattr(self, name) for name in self.FIXED}
        super()._apply(fn, recurse)
        for name, was in kept.items():
            now = getattr(self, name)
            if was is not None and now.dtype != was.dtype:
                setattr(self, name, was.to(now.device))
        if not self.prepared:
            self._weight = None
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self._refuse_prepared(prefix)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        if any(prefix + name in state_dict for name in TENSORS):
            self._refuse_prepared(prefix)
        for name in self.FIXED:
            own, given = getattr(self, name), state_dict.get(prefix + name)
            # torch would convert numbers, and these are codes; of a scale it would round them.
            if own is not None and isinstance(given, torch.Tensor) and given.dtype != own.dtype:
                error_msgs.append(f"dtype mismatch for {prefix}{name}: the state has {given.dtype}, {self.format} has {own.dtype}")
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if not self.prepared:
            self._weight = None

    def _refuse_prepared(self, prefix):
        """A state would lack the weight."""
        if self.prepared:
            where = prefix.removesuffix(".") or type(self).__name__
            raise RuntimeError(f"{where}: the weight was prepared, and has no state any more; save and load a model before prepare")

    def extra_repr(self):
        return f"{self.format or self.plain.dtype}, shape={self.shape}"
