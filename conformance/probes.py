"""What a wrong result looks like: where its errors lie, what they have in common, and which mistake explains them.

Guesses, for the message of a failure: they decide nothing.
"""

import itertools
from dataclasses import replace

import torch

from ref.linear import linear_operands
from ref.pack import pack, unpack
from ref.rounding import round_to

# A guess has to explain this part of the wrong elements, and no right element may speak against it.
SHARE = 0.9
SHIFTS = (1, -1, 2, -2, 4, -4, 8, -8, 16, -16, 32, -32, 64, -64, 128, -128)


def describe(got, y, fits):
    """Where a result (m, n) differs from y (float64), and how, in words; "" where nothing is to be seen.

    Args:
        fits: bool (m, n), False where got is wrong.

    >>> describe(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[False, False], [True, True]]))
    'all of row 0; the wrong elements are 0'
    """
    wrong = ~fits
    if wrong.dim() != 2 or not bool(wrong.any()):
        return ""
    return "; ".join(part for part in (_where(wrong), _values(got.double()[wrong], y[wrong]), _moved(got.double(), y, wrong)) if part)


def _where(wrong):
    """Rows and columns of the wrong elements, if that is all of some of them."""
    m, n = wrong.shape
    if wrong.numel() == 1:
        return ""
    rows, columns = wrong.any(1).nonzero()[:, 0].tolist(), wrong.any(0).nonzero()[:, 0].tolist()
    whole = int(wrong.sum()) >= SHARE * len(rows) * len(columns)
    if not whole:
        return ""
    if len(rows) == m and len(columns) == n:
        return "all elements"
    parts = [_name("row", rows, m)] if len(rows) < m else []
    parts += [_name("column", columns, n)] if len(columns) < n else []
    return "all of " + " in ".join(parts)


def _name(axis, indices, size):
    """
    >>> _name("row", [2, 3, 4], 5), _name("row", [2], 5), _name("column", [0, 2, 4], 5)
    ('rows 2 to 4, the last', 'row 2', 'columns 0, 2, 4: every second')
    """
    first, last = indices[0], indices[-1]
    if len(indices) == 1:
        return f"{axis} {first}" + (", the last" if first == size - 1 else "")
    steps = {b - a for a, b in itertools.pairwise(indices)}
    if steps == {1}:
        tail = ", the last" if last == size - 1 else ""
        tile = max((t for t in (8, 16, 32, 64, 128) if first and first % t == 0), default=0)
        return f"{axis}s {first} to {last}{tail}" + (f", from a multiple of {tile} on" if tile and tail else "")
    shown = ", ".join(map(str, indices[:6])) + (", ..." if len(indices) > 6 else "")
    return f"{axis}s {shown}" + (": every second" if steps == {2} else f": every {steps.pop()}th" if len(steps) == 1 else "")


def _values(got, y):
    """What the wrong elements are of those that were expected: zero, minus these, or these times one number."""
    if bool((got == 0).all()):
        return "the wrong elements are 0"
    if bool(got.isnan().all()):
        return "the wrong elements are NaN"
    known = (y != 0) & y.isfinite() & got.isfinite()
    if int(known.sum()) < 3:
        return ""
    ratio = (got / y)[known]
    middle = ratio.median()
    if bool(((ratio - middle).abs() <= 2.0**-7 * middle.abs()).all()) and middle != 0 and abs(middle - 1) > 2.0**-5:
        return f"the wrong elements are {middle.item():.4g} times what was expected"
    return ""


def _moved(got, y, wrong):
    """Whether a row or a column has what belongs in another one."""
    for axis, name in ((0, "row"), (1, "column")):
        a, b = (got, y) if axis == 0 else (got.T, y.T)
        bad = (wrong if axis == 0 else wrong.T).any(1).nonzero()[:, 0]
        if b.shape[1] < 2 or len(b) < 2:
            continue
        scale = b.abs().amax() * 2.0**-6
        same = ((a[bad][:, None] - b[None]).abs() <= scale * 0.25 + 2.0**-7 * b[None].abs()).all(2)
        same[torch.arange(len(bad)), bad] = False
        if int(same.any(1).sum()) == len(bad) and bool((same.sum(1) == 1).all()):
            pairs = [f"{i} what belongs in {j}" for i, j in zip(bad.tolist(), same.int().argmax(1).tolist(), strict=True)]
            return f"{name} has {name}'s: " + ", ".join(pairs[:3]) + (", ..." if len(pairs) > 3 else "")
    return ""


def guess(got, x, q, bias, fits, error, variant="exact"):
    """Which mistake in reading the weight would give this result of linear, in words; "" where none of those known does.

    Args:
        got: (m, n). x: float64 (m, k), as multiplied. q: the weight. bias: float64 (n,) or 0.0. fits: bool (m, n). error: float64 (m, n).
    """
    wrong = ~fits
    for text, weight in _mistakes(q, variant):
        y = x @ weight.T + bias
        near = _near(got, y, error)
        if bool(near[wrong].double().mean() >= SHARE) and bool(near[fits].double().mean() >= SHARE if bool(fits.any()) else True):
            return text
    if isinstance(bias, torch.Tensor) and bool(_near(got, x @ linear_operands(x[:0].float(), q, variant=variant)[1].T, error)[wrong].all()):
        return "looks like the bias left out"
    return _source(got, x, q, wrong, variant)


def _near(got, y, error):
    """Whether got is y, rounded, give or take the error."""
    return (got >= round_to(y - error, got.dtype)) & (got <= round_to(y + error, got.dtype))


def _mistakes(q, variant):
    """(text, the weight as it would be read), of mistakes that are made in reading weights."""

    def read(**parts):
        return linear_operands(torch.zeros(0, q.shape[1]), replace(q, **parts), variant=variant)[1]

    rows, groups = q.scale.shape[-2:]
    for name in ("scale", "zero", "offset"):
        part = getattr(q, name)
        if part is None:
            continue
        if name != "scale":
            yield f"looks like the {name} left out", read(**{name: torch.zeros_like(part)})
        for shift in (1, -1):
            if groups > 1:
                moved = torch.cat((part[:, 1:], part[:, -1:]), 1) if shift == 1 else torch.cat((part[:, :1], part[:, :-1]), 1)
                yield f"looks like the {name} of group g{shift:+d}", read(**{name: moved})
                yield f"looks like the {name} of group g{shift:+d}, modulo their number", read(**{name: part.roll(-shift, 1)})
            if rows > 1:
                yield f"looks like the {name} of row n{shift:+d}", read(**{name: part.roll(-shift, 0)})
        if groups > 1:
            yield f"looks like the {name} of group 0 for all", read(**{name: part[:, :1].expand_as(part).contiguous()})
        if groups > 1 and rows > 1:
            yield f"looks like {name}s stored along the other axis", read(**{name: part.T.reshape(part.shape)})
    if q.scale_2 is not None:
        yield "looks like the second scale left out", read(scale_2=torch.ones_like(q.scale_2))
        yield "looks like the second scale multiplied for divided, or the reverse", read(scale_2=1 / q.scale_2)
    if q.group_index is not None:
        yield "looks like the group index left out", read(group_index=None)
    k, bits = q.shape[-1], q.format.element.bits
    if groups > 1 and q.group_index is None:
        for shift in (1, -1):
            index = (torch.arange(k) + shift).clamp(0, k - 1) // q.format.group[1]
            yield f"looks like the group of column k{shift:+d}", read(group_index=index.int())
    codes = unpack(q.packed, bits, k)
    width = {1: 8, 2: 4, 4: 2}.get(bits)
    if width and k >= width:
        pairs = torch.arange(k)
        turned = torch.where(pairs // width * width + width <= k, pairs // width * width + width - 1 - pairs % width, pairs)
        yield "looks like the codes of a byte in the reverse order", read(packed=pack(codes[..., turned], bits))
    for shift in SHIFTS:
        if abs(shift) < k:
            yield f"looks like W[n, k{shift:+d}]", read(packed=pack(codes.roll(-shift, -1), bits))
        if abs(shift) < q.shape[0]:
            yield f"looks like W[n{shift:+d}, k]", read(packed=q.packed.roll(-shift, -2))
    group = q.format.group[1]
    if group and k % group:
        tail = read()
        tail[:, k // group * group :] = 0
        yield "looks like the last, partial group left out", tail


def _source(got, x, q, wrong, variant):
    """Whose place the first wrong element came from, where its row of x picks one column: "looks like W[n, k]" of a result W[n', k']."""
    m, n = wrong.nonzero()[0].tolist()
    hot = x[m].nonzero()[:, 0]
    if len(hot) != 1 or not bool(got[m, n].isfinite()) or got[m, n] == 0:
        return ""
    weight = linear_operands(x[:0].float(), q, variant=variant)[1]
    column = int(hot[0])
    found = (round_to(weight * x[m, column], got.dtype) == got[m, n]).nonzero()
    found = found[(found != torch.tensor([n, column])).any(1)]
    if not len(found):
        return ""
    distance = (found - torch.tensor([n, column])).abs()
    row, other = found[(distance[:, 0] * q.shape[1] + distance[:, 1]).argmin()].tolist()
    return f"looks like W[{row}, {other}], expected W[{n}, {column}]"
