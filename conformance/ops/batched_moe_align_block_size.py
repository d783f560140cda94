"""batched_moe_align_block_size, bit for bit."""

import torch

from ref.moe import batched_moe_align_block_size

from .. import moe_strategies
from ..oracle import Agreement, equal
from . import Problem
from .moe_align_block_size import PARTS

FUNCTION = "batched_moe_align_block_size"
SHARE = 0.5


def labels(formats):
    return ["all"]


def cases(label, config=None):
    return moe_strategies.batched_align_cases()


def build(case, device, declared=None):
    device = torch.device(device)
    counts = torch.tensor(case.counts, dtype=torch.int64 if case.int64 else torch.int32)
    want = batched_moe_align_block_size(case.max_tokens, case.block_size, counts)
    owned = {"counts": counts.to(device)}

    def check(result):
        for got, part, name in zip(result, want, PARTS, strict=True):
            equal(got, part, name)
        return Agreement()

    args = case.max_tokens, case.block_size, owned["counts"]
    return Problem(args, check, device, owned, {}, [(part.shape, torch.int32) for part in want])
