"""The operations: how to draw a case of each, and what is admissible.

A module has
    FUNCTION                     the candidate's function
    labels(formats)              the rows of the report: those of `formats` (names) that the operation has
    cases(label, config)         a Hypothesis strategy; config: a strategy for the part that is costly to prepare, or None
    build(case, device, variants) -> Problem
"""

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Problem:
    """One call, and how its result is judged.

    args, kwargs: of the call. owned: every buffer that the call may read, by name: it must come back unchanged.
    result: what is expected: (shape, dtype) of a tensor, or None for a QTensor. check: result -> Agreement, raises Disagreement.
    """

    args: tuple
    check: Any
    device: torch.device
    owned: dict
    kwargs: dict = field(default_factory=dict)
    result: tuple | None = None

    def __post_init__(self):
        self.pristine = {name: t.clone() for name, t in self.owned.items()}


def parts_of(q, name):
    """The tensors of a QTensor by name, for Problem.owned."""
    parts = ("packed", "scale", "zero", "scale_2", "group_index")
    return {f"{name}.{part}": getattr(q, part) for part in parts if getattr(q, part) is not None}


def on_cpu(q):
    """A QTensor that a candidate returned, on the CPU."""
    from dataclasses import replace

    return replace(q, **{name.partition(".")[2]: t.cpu() for name, t in parts_of(q, "q").items()})


def operations():
    """The operations by name, cheap ones last."""
    from . import dequantize, linear, linear_x, pack, quantize, quantize_input, unpack

    modules = (linear, linear_x, quantize_input, quantize, dequantize, pack, unpack)
    return {module.__name__.rpartition(".")[2]: module for module in modules}
