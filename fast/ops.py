"""linear as a torch.library operator, for torch.compile: one node in the graph, shapes by its fake."""

import torch

from ref.format import parse_format
from ref.qtensor import QTensor

from .linear import linear

_SCHEMA = (
    "(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? scale_2, Tensor? group_index, Tensor? bias, str format, int n, int k, "
    "str? x_format, Tensor? x_scale, str? impl, bool deterministic) -> Tensor"
)
_library = torch.library.Library("quantref", "DEF")
_library.define("linear" + _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


class _Owner:
    """Set on a packed tensor: the QTensor that it belongs to, so that its prepared weight is found again. Never copied along."""

    def __init__(self, q):
        self.q = q

    def __reduce__(self):
        return _Owner, (None,)


def call(x, w, bias, x_format, x_scale, impl, deterministic, out):
    """fast.linear while torch.compile traces it."""
    if not isinstance(w, QTensor):
        y = torch.nn.functional.linear(x, w, bias)
    else:
        n, k = w.shape
        name = None if x_format is None else _name(x_format)
        y = torch.ops.quantref.linear(
            x, w.packed, w.scale, w.zero, w.scale_2, w.group_index, bias, _name(w.format), n, k, name, x_scale, impl, deterministic
        )
    return y if out is None else out.copy_(y)


@torch.compiler.assume_constant_result
def _name(fmt):
    return str(fmt)


@torch.library.impl(_library, "linear", "CompositeExplicitAutograd")
def _linear(x, packed, scale, zero, scale_2, group_index, bias, format, n, k, x_format, x_scale, impl, deterministic):
    parts = (scale, zero, scale_2, group_index)
    owner = getattr(packed, "_quantref_owner", None)
    q = None if owner is None else owner.q
    if q is None or q.shape != (n, k) or any(a is not b for a, b in zip(parts, (q.scale, q.zero, q.scale_2, q.group_index), strict=True)):
        q = QTensor(parse_format(format), (n, k), packed, *parts)
        packed._quantref_owner = _Owner(q)
    return linear(x, q, bias, x_format=x_format, x_scale=x_scale, impl=impl, deterministic=deterministic)


@torch.library.register_fake("quantref::linear", lib=_library)
def _fake(x, packed, scale, zero, scale_2, group_index, bias, format, n, k, x_format, x_scale, impl, deterministic):
    return x.new_empty(*x.shape[:-1], n)
