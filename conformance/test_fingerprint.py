"""The fingerprint names the adders of emulated kernels rightly, and says where a declaration does not fit."""

import json

import pytest
import torch

from ref import dequantize, quantize_input
from ref.rounding import round_to

from . import wrong
from .accumulators import MMA_16, MMA_FP8, Block
from .candidate import Candidate
from .emulate import block_sum, ieee_sum, tree_sum
from .fingerprint import probe, probe_all


class Kernel:
    """linear of which only the diagonal is computed, which is what the fingerprint looks at, by another sum and another store."""

    def __init__(self, total, store=round_to):
        self.total, self.store = total, store

    def linear(self, x, w, bias=None, *, x_format=None, x_scale=None):
        a = x.double() if x_format is None else dequantize(quantize_input(x, x_format, x_scale))
        products = a * dequantize(w)
        return self.store(torch.diag(self.total(products, torch.ones(1, products.shape[1]).double())[:, 0]), x.dtype)


def block(*args):
    return lambda x, w: block_sum(x, w, Block(*args))


def chain(dtype, turned=False):
    return lambda x, w: ieee_sum(x, w, torch.arange(x.shape[1]).flip(0) if turned else torch.arange(x.shape[1]), dtype)


def descending(*args):
    return lambda x, w: block_sum(x.flip(1), w.flip(1), Block(*args))


def split(parts, total):
    """k in parts, whose sums are added in float32."""

    def both(x, w):
        sums = [total(a, b) for a, b in zip(x.chunk(parts, 1), w.chunk(parts, 1), strict=True)]
        found = sums[0]
        for one in sums[1:]:
            found = (found + one).float().double()
        return found

    return both


def lanes(count):
    """A vector unit: a float32 sum in each lane, then the lanes one after the other."""

    def total(x, w):
        each = torch.cat([ieee_sum(x[:, i::count], w[:, i::count], torch.arange(x.shape[1] // count)) for i in range(count)], 1)
        return ieee_sum(each, torch.ones(1, count).double(), torch.arange(count))

    return total


# The sum, the kind of x, and what has to be found: bits, kept bits, block length, order, promotion, split.
KERNELS = {
    "float32 chain": (chain(torch.float32), "bf16", (23, None, 1, "ascending", 0, 1)),
    "float32 chain of float32": (chain(torch.float32), "fp32", (23, None, 1, "ascending", 0, 1)),
    "float32 chain from the end": (chain(torch.float32, True), "bf16", (23, None, 1, "descending", 0, 1)),
    "float16 chain": (chain(torch.float16), "fp16", (10, None, 1, "ascending", 0, 1)),
    "bfloat16 chain": (chain(torch.bfloat16), "bf16", (7, None, 1, "ascending", 0, 1)),
    "float32 pairs": (tree_sum, "bf16", (23, None, 1, "pairwise", None, None)),
    "float32 lanes": (lanes(8), "bf16", (23, None, 1, "interleaved by 8", None, None)),
    "Hopper, 16 bits": (block(16, 25, 23), "bf16", (23, 25, 16, "ascending", 0, 1)),
    "Hopper, fp16": (block(16, 25, 23), "fp16", (23, 25, 16, "ascending", 0, 1)),
    "Ampere": (block(8, 24, 23), "bf16", (23, 24, 8, "ascending", 0, 1)),
    "Volta": (block(4, 23, 23), "fp16", (23, 23, 4, "ascending", 0, 1)),
    "Hopper, fp8 not promoted": (block(32, 13, 13), "float", (13, 13, 32, "ascending", 0, 1)),
    "Hopper, fp8 promoted": (block(32, 13, 13, 128), "float", (13, 13, 32, "ascending", 128, 1)),
    "fp8 promoted at 64": (block(32, 13, 13, 64), "float", (13, 13, 32, "ascending", 64, 1)),
    "fp8 widened": (block(16, 25, 23), "float", (23, 25, 16, "ascending", 0, 1)),
    "blocks from the end": (descending(16, 25, 23), "bf16", (23, 25, 16, "descending", 0, 1)),
    "split in 2": (split(2, block(16, 25, 23)), "bf16", (23, 25, 16, "ascending", 0, 2)),
    "float32 split in 4": (split(4, chain(torch.float32)), "bf16", (23, None, 1, "ascending", 0, 4)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_sums_are_named(name):
    total, kind, wanted = KERNELS[name]
    found = probe(Candidate("kernel", Kernel(total)), kind=kind)
    names = ("accumulator_bits", "kept_bits", "block_length", "order", "promotion", "split_k")
    assert tuple(found[key] for key in names) == wanted, found
    assert (found["flushes_subnormals"], found["final_rounding"]) == (False, "nearest even")
    json.dumps(found)


def test_wide_sums_have_no_order():
    found = probe(Candidate("right", wrong.right), kind="fp32")
    assert (found["accumulator_bits"], found["order"], found["block_length"]) == (52, "unknown", None) and "no order shows" in found[
        "notes"
    ][0]


def away(y, dtype):
    unit = torch.ldexp(torch.ones_like(y), torch.frexp(y).exponent - {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}[dtype])
    return (torch.sign(y) * torch.floor(y.abs() / unit + 0.5) * unit).to(dtype)


def toward_zero(y, dtype):
    unit = torch.ldexp(torch.ones_like(y), torch.frexp(y).exponent - {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}[dtype])
    return (torch.trunc(y / unit) * unit).to(dtype)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16", "float"])
@pytest.mark.parametrize(("store", "name"), [(away, "nearest away"), (toward_zero, "toward zero")])
def test_stores_are_named(kind, store, name):
    found = probe(Candidate("kernel", Kernel(lambda x, w: x @ w.T, store)), kind=kind)
    assert found["final_rounding"] == name


def test_flushing_is_noticed():
    class Flushing(Kernel):
        def linear(self, x, w, bias=None, *, x_format=None, x_scale=None):
            return super().linear(torch.where(x.abs() < torch.finfo(x.dtype).tiny, 0, x), w, bias)

    for kind in ("fp32", "bf16", "fp16"):
        assert probe(Candidate("kernel", Flushing(lambda x, w: x @ w.T)), kind=kind)["flushes_subnormals"] is True


def test_declarations_are_compared():
    hopper = Candidate("kernel", Kernel(block(16, 25, 23)))
    assert probe(hopper, declared="mma_16")["matches_declaration"] is True
    assert probe(hopper, declared={"bf16": MMA_16, "fp32": "ieee"})["matches_declaration"] is True
    assert probe(hopper, declared={"fp32": "ieee"})["matches_declaration"] is None
    found = probe(hopper, declared="ieee")
    assert found["matches_declaration"] is False and "block_length is 16, declared ieee: 1" in found["notes"]
    unpromoted = Candidate("kernel", Kernel(block(32, 13, 13)))
    found = probe(unpromoted, kind="float", declared=MMA_FP8)
    assert found["matches_declaration"] is False and "promotion is 0, declared 128" in found["notes"]


def test_what_is_not_supported_has_no_fingerprint():
    class Refusing:
        def linear(self, x, w, bias=None, *, x_format=None, x_scale=None):
            if x.dtype != torch.float16 or x_format is not None:
                raise NotImplementedError("linear: float16 only")
            return Kernel(block(8, 24, 23)).linear(x, w)

    assert list(probe_all(Candidate("refusing", Refusing()))) == ["linear fp16"]
