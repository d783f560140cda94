"""Relations between calls of linear, and of what works on rows, and what relations are made of.

A relation is a function of (args, kwargs, y, seed): a call's arguments, its result on the CPU (None where it is no tensor), and a number to
choose by. It returns a Related, or None where it does not apply.
"""

from dataclasses import dataclass, replace

import torch

from ref.combine import take_rows
from ref.format import parse_format
from ref.pack import pack, unpack
from ref.qtensor import QTensor

from .regimes import hashed

# All of them are exact, and make nothing larger.
FACTORS = (0.5, -1.0, 0.25)
# An expert's weights, where a relation appends columns.
LARGEST = 2**20


@dataclass
class Related:
    """A call, and its result on the CPU: None where only that it is another call counts. judged: bool, the rows that count; None: all."""

    name: str
    args: tuple
    kwargs: dict
    expected: torch.Tensor | None
    judged: torch.Tensor | None = None


def tokens_reordered(args, kwargs, y, seed):
    """linear: rows of x in another order."""
    return some_tokens("tokens in another order", args, kwargs, y, lambda m: hashed(seed, "order", m).argsort())


def batch_split(args, kwargs, y, seed):
    """linear: the first or the second half of x's rows."""
    return some_tokens("half of the batch", args, kwargs, y, lambda m: half(m, seed), smaller=True)


def some_tokens(name, args, kwargs, y, choice, smaller=False):
    x, *rest = args
    m, k = x.shape[:-1].numel(), x.shape[-1]
    if m < 2 or spans(kwargs, smaller):
        return None
    index = choice(m)
    lead = (len(index),) if smaller else tuple(x.shape[:-1])
    expected = None if y is None else y.reshape(m, -1)[index].reshape(*lead, y.shape[-1])
    return Related(name, (take(x.reshape(m, k), index).reshape(*lead, k), *rest), kwargs, expected)


def scaled(args, kwargs, y, seed):
    """linear: x and bias times a power of two."""
    x, w, bias = args
    found = scaled_by(x, bias, kwargs, y, seed)
    return None if found is None else Related(found[0], (found[1], w, found[2]), kwargs, found[3])


def scaled_by(x, bias, kwargs, y, seed):
    """(name, x, bias, y), all times one factor; None where one of them would be rounded, or codes of x stand between."""
    factor = FACTORS[seed // 64 % len(FACTORS)]
    if y is None or kwargs.get("x_format") is not None:
        return None
    products = times(x, factor), None if bias is None else times(bias, factor), result_times(y, factor)
    if products[0] is None or products[2] is None or (products[1] is None) != (bias is None):
        return None
    return f"x times {factor}", *products


def columns_appended(args, kwargs, y, seed):
    """linear: k a whole group longer, x zero there. On a GPU a new k is a new kernel to compile, which is what other cases are for."""
    x, w, *rest = args
    if not isinstance(w, QTensor) or x.device.type != "cpu" or kwargs.get("x_format") is not None:
        return None
    longer = _longer(w)
    if longer is None:
        return None
    more = longer.shape[1] - w.shape[1]
    return Related("zeros behind k", (torch.nn.functional.pad(x, (0, more)), longer, *rest), kwargs, y)


def _longer(q):
    """The weight (n, k) with another group of columns, or None where k does not end with a group."""
    (n, k), group = q.shape, q.format.group[1]
    more = max(group, q.format.hadamard, 8)
    if not k or (group and (k % group or more % group)) or n * (k + more) > LARGEST:
        return None
    codes = unpack(q.packed, q.format.element.bits, k)
    codes = torch.cat((codes, codes[:, torch.arange(more, device=codes.device) % k]), 1)
    parts = {"packed": pack(codes, q.format.element.bits)}
    if group:
        for name in ("scale", "zero", "offset"):
            part = getattr(q, name)
            if part is not None:
                parts[name] = torch.cat((part, part[:, -1:].expand(-1, more // group)), 1)
        if q.group_index is not None:
            added = k // group + torch.arange(more, device=codes.device, dtype=torch.int32) // group
            parts["group_index"] = torch.cat((q.group_index, added))
    return replace(q, shape=(n, k + more), **parts)


def rows_split(args, kwargs, y, seed):
    """pack, unpack: half of the rows."""
    return some_tokens("half of the rows", args, kwargs, y, lambda m: half(m, seed), smaller=True)


def weight_rows_split(args, kwargs, y, seed):
    """dequantize: half of the weight's rows."""
    q, *rest = args
    if q.format.group[0] > 1 or q.shape[-2] < 2:
        return None
    index = half(q.shape[-2], seed)
    return Related("half of the rows", (take_rows(q, index), *rest), kwargs, None if y is None else y[..., index, :])


def inputs_split(*positions):
    """A relation that only makes another call: half of the rows of the arguments at these positions."""

    def relation(args, kwargs, y, seed):
        if args[0].dim() < 2 or len(args[0]) < 2:
            return None
        index, given = half(len(args[0]), seed), {name: value for name, value in kwargs.items() if name != "num_valid"}
        args = tuple(take(arg, index) if i in positions else arg for i, arg in enumerate(args))
        return Related("half of the rows", args, given, None)

    return relation


def spans(kwargs, smaller):
    """Whether rows of x share scales that depend on which rows there are, or, where none are missing (smaller), on their order."""
    if kwargs.get("x_format") is None or kwargs.get("x_scale") is not None:
        return False
    fmt = parse_format(kwargs["x_format"])
    return fmt.group[0] > 1 or (smaller and (fmt.group[0] == 0 or (fmt.scale_2 or "").startswith("tensor")))


def half(m, seed):
    cut = (m + 1) // 2
    return torch.arange(cut, m) if seed & 1024 and m > 1 else torch.arange(cut)


def take(t, index):
    return t[index.to(t.device)]


def rows(y, index):
    return None if y is None else y[index]


def times(t, factor):
    """t times a power of two, or None where that is not exact."""
    product = t * factor
    return product if bool(((product / factor == t) | t.isnan()).all()) else None


def result_times(y, factor):
    """A result times a power of two; None where its dtype would round that, subnormal numbers being rounded already."""
    product = y * factor
    smallest = torch.finfo(y.dtype).tiny
    return product if bool(((product.abs() >= smallest) | (y == 0)).all()) else None
