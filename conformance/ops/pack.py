"""pack: the bitstream, bit for bit."""

import torch

from ref.pack import pack

from .. import strategies
from ..oracle import Agreement, equal
from ..regimes import below, hashed, view_of
from . import Problem

FUNCTION = "pack"
INTEGERS = {"uint8": torch.uint8, "int32": torch.int32, "int64": torch.int64}


def labels(formats):
    return strategies.bit_labels(formats)


def cases(label, config=None):
    return strategies.pack_cases(label)


def draw_codes(case):
    """int64 (rows, k), every code alike."""
    return below(hashed(case.seed, "codes", torch.Size(case.lead).numel(), case.k), 2**case.bits)


def build(case, device, declared=None):
    device = torch.device(device)
    codes = draw_codes(case).to(INTEGERS[case.integer])
    view, buffer = view_of(codes, case.lead, case.pad, 0, False, device)
    want = pack(codes, case.bits)
    want = want.reshape(*case.lead, want.shape[-1])

    def check(result):
        equal(result, want, "packed")
        return Agreement()

    return Problem((view, case.bits), check, device, {"codes": buffer}, {}, (want.shape, torch.int32))
