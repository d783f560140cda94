"""QTensor: a quantized tensor as a plain frozen value."""

import math
from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree

from .element import value_list
from .format import SCALE_DTYPES, Format
from .pack import words_per_row


@dataclass(frozen=True, eq=False)
class QTensor:
    """A weight (n, k), a stack of expert weights (e, n, k), or activations (m, k), quantized.

    w[n, k] = (value[code[n, k]] - zero) * scale * scale_2 + offset, and then the inverse rotation where the format has one;
    scale, zero and offset of the group that (n, k) is in.

    Invariants, which validate checks:
        format: a Format.
        shape: (..., n, k), the logical shape.
        packed: int32 (..., n, ceil(k * bits / 32)): each row's codes as a little-endian bitstream (pack), padded with zero bits.
        scale: format.scale_shape(shape); the scale's torch dtype, or uint8 codes for a scale dtype that is an 8-bit element.
        zero: shape of scale, uint8 for "int", else the float dtype; None where the format has no zero point.
        scale_2: float32, (..., 1, 1) for "tensor", (..., n, 1) for "channel"; divisors likewise; None where the format has none.
        group_index: None, or int32 (..., k): the group, a column of scale, that each k is in. Without it, k is in group k // gk.
        offset: shape of scale, in the format's float dtype; None where the format has none.
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
    offset: torch.Tensor | None = None

    def __repr__(self):
        return f"QTensor({self.format}, shape={tuple(self.shape)}, device={self.packed.device})"


TENSORS = ("packed", "scale", "zero", "scale_2", "group_index", "offset")

pytree.register_pytree_node(
    QTensor,
    lambda q: ([getattr(q, name) for name in TENSORS], (q.format, q.shape)),
    lambda leaves, context: QTensor(*context, *leaves),
    serialized_type_name="quantref.QTensor",
)


def validate(q):
    """Check every invariant of a QTensor.

    Reads the data too (padding bits, finite scales, groups in range), so it synchronises with a GPU; check_parts does not.

    Returns:
        q.

    Raises:
        TypeError: q is no QTensor, or a part has the wrong dtype.
        ValueError: parts that disagree in shape or device, or values that mean nothing.
    """
    check_parts(q, "validate")
    fmt, k = q.format, q.shape[-1]
    last = k * fmt.element.bits % 32
    if last and bool((q.packed[..., -1].long() & 0xFFFFFFFF >= 2**last).any()):
        raise ValueError(f"validate: packed of {fmt} has bits set behind the last code of a row (k={k})")
    for name in ("scale", "zero", "scale_2", "offset"):
        tensor = getattr(q, name)
        if tensor is None or (name == "zero" and fmt.zero == "int"):
            continue
        if tensor.is_floating_point():
            finite = tensor.isfinite()
        else:
            finite = torch.tensor([math.isfinite(v) for v in value_list(SCALE_DTYPES[fmt.scale])], device=tensor.device)[tensor.long()]
        if not bool(finite.all()):
            raise ValueError(f"validate: {name} of {fmt} is NaN or inf at {tuple((~finite).nonzero()[0].tolist())}")
    if fmt.scale_2 is not None and fmt.scale_2.endswith("divisor") and bool((q.scale_2 == 0).any()):
        raise ValueError(
            f"validate: scale_2 of {fmt} is 0 at {tuple((q.scale_2 == 0).nonzero()[0].tolist())}, and weights are divided by it"
        )
    if q.group_index is not None and q.group_index.numel():
        low, high, groups = int(q.group_index.min()), int(q.group_index.max()), q.scale.shape[-1]
        if low < 0 or high >= groups:
            raise ValueError(f"validate: group_index ranges from {low} to {high}, expected 0 to {groups - 1}")
    if fmt.zero == "int" and q.zero.numel() and int(q.zero.max()) >= 2**fmt.element.bits:
        raise ValueError(f"validate: zero of {fmt} reaches {int(q.zero.max())}, expected at most {2**fmt.element.bits - 1}")
    return q


def equal(a, b):
    """Whether two QTensors have the same format, shape and tensors, part by part (0 equals -0, as numbers do)."""
    if a.format != b.format or tuple(a.shape) != tuple(b.shape):
        return False
    pairs = [(getattr(a, name), getattr(b, name)) for name in TENSORS]
    return all((s is None) == (t is None) and (s is None or (s.dtype == t.dtype and torch.equal(s, t))) for s, t in pairs)


def part_kinds(fmt, shape, group_index=False):
    """The dtype and shape of each part of a QTensor (..., n, k) of a format: {name: (dtype, shape)}; dtype None where there is no such part."""
    *lead, n, k = shape
    scale, scale_shape = SCALE_DTYPES[fmt.scale], fmt.scale_shape(shape)
    zero = None if fmt.zero is None else torch.uint8 if fmt.zero == "int" else SCALE_DTYPES[fmt.zero]
    return {
        "packed": (torch.int32, (*lead, n, words_per_row(k, fmt.element.bits))),
        "scale": (scale if isinstance(scale, torch.dtype) else torch.uint8, scale_shape),
        "zero": (zero, scale_shape),
        "scale_2": (fmt.scale_2 and torch.float32, (*lead, n if (fmt.scale_2 or "").startswith("channel") else 1, 1)),
        "group_index": (torch.int32 if group_index else None, (*lead, k)),
        "offset": (fmt.offset and SCALE_DTYPES[fmt.offset], scale_shape),
    }


def check_parts(q, operation):
    """The invariants of a QTensor that can be checked without reading its data.

    Args:
        operation: the name that messages begin with.

    Raises:
        TypeError, ValueError: as validate.
    """
    if not isinstance(q, QTensor):
        raise TypeError(f"{operation}: got {type(q).__name__}, expected a QTensor")
    fmt, shape = q.format, tuple(q.shape)
    if not isinstance(fmt, Format):
        raise TypeError(f"{operation}: format is {type(fmt).__name__}, expected a Format")
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"{operation}: weight {fmt} has shape {shape}, expected (..., n, k)")
    expected = part_kinds(fmt, shape, q.group_index is not None)
    for name, (dtype, part_shape) in expected.items():
        tensor = getattr(q, name)
        if (tensor is None) != (dtype is None):
            raise ValueError(
                f"{operation}: weight {fmt} has {'no ' if tensor is None else 'a '}{name}, expected {'none' if dtype is None else 'one'}"
            )
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{operation}: {name} of {fmt} has dtype {tensor.dtype}, expected {dtype}")
        if tuple(tensor.shape) != part_shape:
            raise ValueError(f"{operation}: {name} of {fmt} has shape {tuple(tensor.shape)}, expected {part_shape}")
        if tensor.device != q.packed.device:
            raise ValueError(f"{operation}: packed of {fmt} is on {q.packed.device}, {name} on {tensor.device} (both must match)")
    if fmt.hadamard and shape[-1] % fmt.hadamard:
        raise ValueError(f"{operation}: k={shape[-1]} is no multiple of the rotation's block {fmt.hadamard} in {fmt}")
