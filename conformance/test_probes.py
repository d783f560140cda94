"""Failure messages name the mistake: where a wrong element came from, which scale it was multiplied by, what the errors have in common."""

import re
from dataclasses import replace

import pytest
import torch

from ref.pack import pack, unpack
from ref.rounding import round_to

from . import wrong
from .case import LinearCase
from .ops import linear
from .ops.linear_data import draw
from .oracle import Disagreement
from .probes import describe


def message(kernel, **given):
    case = LinearCase(**{"n": 24, "k": 128, "lead": (20,), "format": "int4_g32", "dtype": "bf16", "data": "unique", "seed": 3} | given)
    data = draw(case)
    with pytest.raises(Disagreement) as error:
        linear.Truth(data, torch.device("cpu")).check(kernel.linear(data.x, data.q, data.bias))
    return str(error.value)


class Reads(wrong.Right):
    """The weight after some mistake."""

    def __init__(self, mistake):
        self.mistake = mistake

    def weight(self, q):
        return super().weight(self.mistake(q))


def columns(shift):
    return lambda q: replace(q, packed=pack(unpack(q.packed, 4, q.shape[1]).roll(-shift, 1), 4))


def transposed_scale(q):
    return replace(q, scale=q.scale.T.reshape(q.scale.shape))


MISTAKES = {
    "looks like W[n, k+8]": columns(8),
    "looks like W[n, k-1]": columns(-1),
    "looks like W[n+1, k]": lambda q: replace(q, packed=q.packed.roll(-1, 0)),
    "looks like the scale of row n-1": lambda q: replace(q, scale=torch.cat((q.scale[-1:], q.scale[:-1]))),
    "looks like the scale of group g+1, modulo their number": lambda q: replace(q, scale=q.scale.roll(-1, 1)),
    "looks like the scale of group 0 for all": lambda q: replace(q, scale=q.scale[:, :1].expand_as(q.scale)),
    "looks like scales stored along the other axis": transposed_scale,
}


@pytest.mark.parametrize("text", MISTAKES)
@pytest.mark.parametrize("data", ["unique", "one_hot", "normal", "exact"])
def test_mistakes_are_named(text, data):
    assert text in message(Reads(MISTAKES[text]), data=data, seed=5)


def test_a_single_element_tells_where_it_came_from():
    """By one of the places that have its value; in bfloat16 there may be several."""

    class Stray(wrong.Right):
        def weight(self, q):
            w = super().weight(q)
            w[3, 17] = w[9, 25]
            return w

    for seed in range(4):
        data = draw(LinearCase(n=24, k=128, lead=(128,), format="int4_g32", dtype="fp32", data="unique", seed=seed))
        w = wrong.right.weight(data.q)
        row, column = re.search(
            r"looks like W\[(\d+), (\d+)\], expected W\[3, 17\]", message(Stray(), lead=(128,), dtype="fp32", seed=seed)
        ).groups()
        assert w[int(row), int(column)] == w[9, 25]


@pytest.mark.parametrize(
    ("name", "given", "text"),
    [("swapped_nibbles", {}, "looks like the codes of a byte in the reverse order"),
     ("group_off_by_one", {}, "looks like the group of column k+1"),
     ("group_index_ignored", {"order": True}, "looks like the group index left out"),
     ("last_group_missing", {"k": 120, "data": "normal"}, "looks like the last, partial group left out"),
     ("zero_ignored", {"format": "uint4z_g64"}, "looks like the zero left out"),
     ("divisor_multiplied", {"format": "fp4_e2m1_g16_e4m3_tensor2div", "data": "normal"}, "looks like the second scale multiplied for divided"),
     ("bias_dropped", {"bias": "bf16", "data": "exact"}, "looks like the bias left out")],
)  # fmt: skip
def test_wrong_kernels_are_named(name, given, text):
    assert text in message(getattr(wrong, name), **given)


def test_where_errors_lie():
    y = (torch.arange(40.0).view(5, 8) + 100).double()
    got = y.clone()
    got[4, :] = 0
    fits = got == y
    assert describe(got.float(), y, fits) == "all of row 4, the last; the wrong elements are 0"
    got = y.clone()
    got[:, ::2] *= 0.5
    assert describe(got, y, got == y) == "all of columns 0, 2, 4, 6: every second; the wrong elements are 0.5 times what was expected"
    got = -y
    assert describe(got, y, got == y) == "all elements; the wrong elements are -1 times what was expected"
    y = torch.randn(6, 48, generator=torch.Generator().manual_seed(0)).double()
    got = y.clone()
    got[:, 32:] = torch.nan
    assert describe(got, y, got == y) == "all of columns 32 to 47, the last, from a multiple of 32 on; the wrong elements are NaN"
    got = y[[0, 2, 1, 3, 4, 5]]
    assert describe(round_to(got, torch.bfloat16), y, got == y) == (
        "all of rows 1 to 2; row has row's: 1 what belongs in 2, 2 what belongs in 1"
    )
    got = y.clone()
    got[2, 5] = 9.0
    assert describe(got, y, got == y) == "all of row 2 in column 5"
    assert describe(y, y, y == y) == ""


def test_what_nothing_explains_is_left_alone():
    class Noisy(wrong.Right):
        def weight(self, q):
            w = super().weight(q)
            return w * (1 + 0.3 * torch.rand(w.shape, generator=torch.Generator().manual_seed(1)).double())

    assert "looks like" not in message(Noisy(), data="normal")
