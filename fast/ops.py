"""linear as torch.library operators, for torch.compile: one node in the graph, shapes by a fake.

The first takes a QTensor as its tensors, so that weights stay inputs of the graph; the second a Prepared, by its number.
"""

import torch

from ref.format import parse_format
from ref.qtensor import TENSORS, QTensor

from .dispatch import PREPARED_BY_NUMBER, Prepared
from .linear import NO_GRADIENT, linear, plain

_library = torch.library.Library("quantref", "DEF")
_library.define(
    "linear(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? scale_2, Tensor? group_index, Tensor? offset, Tensor? bias, str format,"
    " SymInt n, SymInt k, str? x_format, Tensor? x_scale, str? impl, bool deterministic) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "linear_prepared(Tensor x, int number, Tensor? bias, SymInt n, str? x_format, Tensor? x_scale, str? impl, bool deterministic) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

# Formats by the text that stands for them in a graph: their names, unless a name means another format already (codebooks).
_FORMATS = {}


def call(x, w, bias, x_format, x_scale, impl, deterministic, out):
    """fast.linear while torch.compile traces it."""
    name = None if x_format is None else _name(x_format)
    if isinstance(w, QTensor):
        parts = [getattr(w, name) for name in TENSORS]
        y = torch.ops.quantref.linear(x, *parts, bias, _name(w.format), *w.shape, name, x_scale, impl, deterministic)
    elif isinstance(w, Prepared):
        y = torch.ops.quantref.linear_prepared(x, w.number, bias, w.n, name, x_scale, impl, deterministic)
    else:
        return plain(x, w, bias, x_format, x_scale, impl, out)
    if out is None:
        return y
    if out.shape != y.shape or out.dtype != y.dtype:
        raise ValueError(f"linear: out is {tuple(out.shape)} {out.dtype}, expected {tuple(y.shape)} {y.dtype}")
    return out.copy_(y)


@torch.compiler.assume_constant_result
def _name(fmt):
    fmt = parse_format(fmt)
    text = str(fmt)
    while _FORMATS.setdefault(text, fmt) != fmt:
        text += "'"
    return text


def _format(text):
    return None if text is None else _FORMATS.get(text) or parse_format(text)


class _Owner:
    """Set on a packed tensor: the prepared weight that it belongs to, so that the next call finds it. Never copied along."""

    def __init__(self, key=None, prepared=None):
        self.key, self.prepared = key, prepared

    def __reduce__(self):
        return _Owner, ()


@torch.library.impl(_library, "linear", "CompositeExplicitAutograd")
def _linear(x, packed, scale, zero, scale_2, group_index, offset, bias, format, n, k, x_format, x_scale, impl, deterministic):
    parts = (scale, zero, scale_2, group_index, offset)
    key = (format, n, k, *map(id, parts))
    owner = getattr(packed, "_quantref_owner", None)
    if owner is None or owner.key != key:
        owner = packed._quantref_owner = _Owner(key, Prepared(QTensor(_format(format), (n, k), packed, *parts)))
    return linear(x.detach(), owner.prepared, bias, x_format=_format(x_format), x_scale=x_scale, impl=impl, deterministic=deterministic)


@torch.library.impl(_library, "linear_prepared", "CompositeExplicitAutograd")
def _linear_prepared(x, number, bias, n, x_format, x_scale, impl, deterministic):
    w = PREPARED_BY_NUMBER[number]
    return linear(x.detach(), w, bias, x_format=_format(x_format), x_scale=x_scale, impl=impl, deterministic=deterministic)


@torch.library.register_fake("quantref::linear", lib=_library)
def _fake(x, packed, scale, zero, scale_2, group_index, offset, bias, format, n, k, x_format, x_scale, impl, deterministic):
    return x.new_empty(*x.shape[:-1], n)


@torch.library.register_fake("quantref::linear_prepared", lib=_library)
def _fake_prepared(x, number, bias, n, x_format, x_scale, impl, deterministic):
    return x.new_empty(*x.shape[:-1], n)


def _backward(context, gradient):
    raise NotImplementedError(NO_GRADIENT)


torch.library.register_autograd("quantref::linear", _backward, lib=_library)
torch.library.register_autograd("quantref::linear_prepared", _backward, lib=_library)
