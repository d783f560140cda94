"""QTensor: a quantized tensor as a plain frozen value."""

from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree

from .element import Int, value_list
from .format import SCALE_DTYPES, Format
from .pack import words_per_row


@dataclass(frozen=True, eq=False)
class QTensor:
    """A weight (n, k), a stack of expert weights (e, n, k), or activations (m, k), quantized.

    w[n, k] = (value[code[n, k]] - zero) * scale * scale_2, and then the inverse rotation where the format has one; scale and
    zero of the group that (n, k) is in.

    Invariants, which validate checks:
        format: a Format.
        shape: (..., n, k), the logical shape.
        packed: int32 (..., n, ceil(k * bits / 32)): each row's codes as a little-endian bitstream (pack), padded with zero bits.
        scale: format.scale_shape(shape); the scale's torch dtype, or uint8 codes for a scale dtype that is an 8-bit element.
        zero: shape of scale, uint8 for "int", else the float dtype; None where the format has no zero point.
        scale_2: float32, (..., 1, 1) for "tensor", (..., n, 1) for "channel"; None where the format has none.
        group_index: None, or int32 (k,): the group, a column of scale, that each k is in. Without it, k is in group k // gk.
        All on one device.

    It is a pytree (its tensors are the leaves), compares and hashes by identity, and has no method that computes.
    """

    format: Format
    shape: tuple
    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    scale_2: torch.Tensor | None = None
    group_index: torch.Tensor | None = None

    def __repr__(self):
        return f"QTensor({self.format}, shape={tuple(self.shape)}, device={self.packed.device})"


TENSORS = ("packed", "scale", "zero", "scale_2", "group_index")

pytree.register_pytree_node(
    QTensor,
    lambda q: ([getattr(q, name) for name in TENSORS], (q.format, q.shape)),
    lambda leaves, context: QTensor(*context, *leaves),
    serialized_type_name="quantref.QTensor",
)


def validate(q):
    """Check every invariant of a QTensor.

    Reads the data too (codes of a group index in range, no NaN scale), so it synchronises with a GPU.

    Returns:
        q.

    Raises:
        TypeError: q is no QTensor, or a part has the wrong dtype.
        ValueError: parts that disagree in shape or device, or values that mean nothing.
    """
    if not isinstance(q, QTensor):
        raise TypeError(f"validate: got {type(q).__name__}, expected a QTensor")
    fmt, shape = q.format, tuple(q.shape)
    if not isinstance(fmt, Format):
        raise TypeError(f"validate: format is {type(fmt).__name__}, expected a Format")
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"validate: shape is {shape}, expected (..., n, k)")
    *lead, n, k = shape
    scale_dtype = SCALE_DTYPES[fmt.scale]
    scale_shape = fmt.scale_shape(shape)
    _part(fmt, "packed", q.packed, torch.int32, (*lead, n, words_per_row(k, fmt.element.bits)))
    _part(fmt, "scale", q.scale, scale_dtype if isinstance(scale_dtype, torch.dtype) else torch.uint8, scale_shape)
    zero_dtype = None if fmt.zero is None else torch.uint8 if fmt.zero == "int" else SCALE_DTYPES[fmt.zero]
    _part(fmt, "zero", q.zero, zero_dtype, scale_shape)
    second = {None: None, "tensor": (*lead, 1, 1), "channel": (*lead, n, 1)}[fmt.scale_2]
    _part(fmt, "scale_2", q.scale_2, None if second is None else torch.float32, second)
    if q.group_index is not None:
        _part(fmt, "group_index", q.group_index, torch.int32, (k,))
        if k and not 0 <= int(q.group_index.min()) <= int(q.group_index.max()) < scale_shape[-1]:
            raise ValueError(
                f"validate: group_index ranges from {int(q.group_index.min())} to {int(q.group_index.max())}, expected 0 to {scale_shape[-1] - 1}"
            )
    devices = {str(t.device) for t in (getattr(q, name) for name in TENSORS) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"validate: parts are on {' and '.join(sorted(devices))}, expected one device")
    if fmt.hadamard and k % fmt.hadamard:
        raise ValueError(f"validate: k={k} is no multiple of the rotation's block {fmt.hadamard}")
    if isinstance(scale_dtype, torch.dtype):
        is_nan = q.scale.isnan()
    else:
        is_nan = torch.tensor([v != v for v in value_list(scale_dtype)], device=q.scale.device)[q.scale.long()]
    if bool(is_nan.any()):
        raise ValueError(f"validate: scale of {fmt} has NaN at {tuple(is_nan.nonzero()[0].tolist())}")
    if fmt.zero == "int" and isinstance(fmt.element, Int) and q.zero.numel() and int(q.zero.max()) >= 2**fmt.element.bits:
        raise ValueError(f"validate: zero of {fmt} reaches {int(q.zero.max())}, expected at most {2**fmt.element.bits - 1}")
    return q


def _part(fmt, name, tensor, dtype, shape):
    if (tensor is None) != (dtype is None):
        raise ValueError(f"validate: {fmt} has {'no ' if tensor is None else 'a '}{name}, expected {'none' if dtype is None else 'one'}")
    if tensor is None:
        return
    if tensor.dtype != dtype:
        raise TypeError(f"validate: {name} of {fmt} has dtype {tensor.dtype}, expected {dtype}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"validate: {name} of {fmt} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
