"""unpack: the codes, bit for bit, whatever the bits behind the last code are."""

import torch

from ref.pack import pack

from .. import strategies
from ..oracle import Agreement, equal
from ..regimes import view_of
from . import Problem
from .pack import draw_codes, labels

__all__ = ["FUNCTION", "build", "cases", "labels"]

FUNCTION = "unpack"


def cases(label, config=None):
    return strategies.unpack_cases(label)


def build(case, device, declared=None):
    device = torch.device(device)
    codes = draw_codes(case)
    packed = pack(codes, case.bits)
    used = case.k * case.bits % 32
    if case.junk and used and packed.numel():
        packed[:, -1] |= -1 << used
    view, buffer = view_of(packed, case.lead, case.pad, 0, False, device)
    want = codes.to(torch.uint8).reshape(*case.lead, case.k)

    def check(result):
        equal(result, want, "codes")
        return Agreement()

    return Problem((view, case.bits, case.k), check, device, {"packed": buffer}, {}, (want.shape, torch.uint8))
