"""The operations: how to draw a case of each, and what is admissible.

A module has
    FUNCTION                     the candidate's function
    labels(formats)              the rows of the report: those of `formats` (names) that the operation has
    cases(label, config)         a Hypothesis strategy; config: a strategy for the part that is costly to prepare, or None
    build(case, device, declared) -> Problem; declared: what the candidate says of itself, a Declaration, or None
and it may have
    pool(label, size, seed)      a strategy of so many configurations, of which cases takes one
    SHARE                        of the examples, and of the seconds that a slow implementation has in a cell (default 1)
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ref.qtensor import TENSORS


@dataclass
class Problem:
    """One call, and how its result is judged.

    args, kwargs: of the call. owned: every buffer that the call may read, by name: it must come back unchanged.
    result: what is expected: (shape, dtype) of a tensor, a list of them for a tuple, or None for a QTensor.
    check: result, on the CPU but for a QTensor -> Agreement, raises Disagreement. settled: of a result's tensors, on the CPU, what has to
    be the same at every call.
    """

    args: tuple
    check: Any
    device: torch.device
    owned: dict
    kwargs: dict = field(default_factory=dict)
    result: tuple | list | None = None
    settled: Callable = list


def accepted(declared, variants):
    """Of an operation's variants, those that a candidate may follow: the declared ones, or all of them."""
    return variants if declared is None or declared.variants is None else declared.variants


def parts_of(q, name):
    """The tensors of a QTensor by name, for Problem.owned."""
    return {f"{name}.{part}": getattr(q, part) for part in TENSORS if getattr(q, part) is not None}


def on_cpu(q):
    """A QTensor that a candidate returned, on the CPU."""
    from dataclasses import replace

    return replace(q, **{name.partition(".")[2]: t.cpu() for name, t in parts_of(q, "q").items()})


# Cheap ones last, layers behind what they are made of.
NAMES = (
    *("linear", "linear_x", "quantize_input", "quantize", "dequantize", "pack", "unpack"),
    *("fused_topk", "hash_topk"),
    *("moe_align_block_size", "batched_moe_align_block_size", "moe_permute", "moe_unpermute", "moe_scatter_masked"),
    *("grouped_linear", "masked_linear", "indexed_linear"),
    *("moe_activation", "moe_fused_mul_sum", "expert_map", "fused_experts"),
)


def operations():
    """The operations by name."""
    return {name: importlib.import_module(f"{__name__}.{name}") for name in NAMES}
