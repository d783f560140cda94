"""Readers of checkpoints against the golden vectors: what the ecosystem's own code read from the same tensors, which no part of ref made.

python -m conformance.mutants.reading gptq
"""

import fnmatch
import importlib
import sys
from dataclasses import dataclass

import torch

import ref

from ..vectors import FOLDER, parts_of, stored

LAYER = "model.layers.0.mlp.up_proj"
# Cases whose library rounds to the dtype of its result twice (a product of two scales, or a difference from a float zero, comes first).
TWICE = {"hqq": ("*",), "bitsandbytes": ("int8",), "modelopt": ("*nvfp4*",), "quark": ("nvfp4", "amdfp4_two_stages", "progressive*")}
# What is left out of a case to read the rest of it (a factor of the input), and cases that no QTensor holds.
WITHOUT = {("modelopt", "int4_awq"): "pre_quant_scale", ("modelopt", "int8_smoothquant"): "pre_quant_scale"}
SKIPPED = (("modelopt", "w4a8_awq"),)
# Layouts whose library holds the transpose of (..., n, k).
TRANSPOSED = ("mxfp4",)


@dataclass(frozen=True)
class Reading:
    """cases: how many were read before `case`, which disagrees, or in all; error: what disagrees, None if nothing does."""

    cases: int
    case: str | None = None
    error: str | None = None


def read_all(layout):
    """The Reading of a layout's golden vectors, up to the first that disagrees.

    A case is read as a checkpoint is: options of its config, then read; dequantized, it has to be what its library gave: the same bits, or
    within two roundings for TWICE.
    """
    reader = importlib.import_module(f"ref.layouts.{layout}")
    cases, tensors = vectors(layout)
    done = 0
    for case, about in cases.items():
        if (layout, case) in SKIPPED:
            continue
        parts, expected = parts_of(tensors, case)
        parts.pop(WITHOUT.get((layout, case)), None)
        config = {"_metadata": about["metadata"]} if layout == "torchao" else about["config"]
        layer = "layer" if layout == "torchao" else LAYER
        try:
            q = reader.read(parts, reader.options(config, layer))
            error = disagreement(q, expected.mT if layout in TRANSPOSED else expected, layout, case)
        except Exception as raised:
            error = f"raised {type(raised).__name__}: {raised}"
        if error is not None:
            return Reading(done, case, error)
        done += 1
    return Reading(done)


def vectors(layout):
    """stored(layout), and what only a GPU could make of it."""
    cases, tensors = stored(layout)
    if (FOLDER / f"{layout}_cuda.safetensors").exists():
        more = stored(f"{layout}_cuda")
        cases, tensors = cases | more[0], tensors | more[1]
    return cases, tensors


def disagreement(q, expected, layout, case):
    """What of a QTensor is not as expected, or None."""
    if tuple(q.shape) != tuple(expected.shape):
        return f"the weight is {tuple(q.shape)}, expected {tuple(expected.shape)}"
    w = ref.dequantize(q)
    wrong = ref.dequantize(q, expected.dtype) != expected
    if any(fnmatch.fnmatch(case, pattern) for pattern in TWICE.get(layout, ())):
        info = torch.finfo(expected.dtype)
        # Two roundings of at most eps / 2, or of half a subnormal step where numbers are that small.
        wrong = (expected.double() - w).abs() > (1 + info.eps) * (info.eps * w.abs() + info.smallest_normal * info.eps)
    if not bool(wrong.any()):
        return None
    at = tuple(wrong.nonzero()[0].tolist())
    return f"w{list(at)} = {w[at].item():.9g}, expected {expected[at].item():.9g} ({int(wrong.sum())} of {wrong.numel()} are wrong)"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, read_all(name))
