"""What this machine gets wrong by itself: a failure that it may be the cause of is no verdict on a candidate."""

import os

import torch

from .status import WAIVABLE
from .waivers import Waiver


def _host(device):
    """Nothing can be judged where the exact answers are not exact."""
    small = torch.tensor([2.0**-140, 2.0**-149])
    if not torch.equal((small * 1).view(torch.int32), torch.tensor([512, 1], dtype=torch.int32)):
        return "the CPU flushes subnormal numbers"
    return None


def _float64(device):
    try:
        exact = torch.tensor([1.0, 2.0**-40], dtype=torch.float64, device=device).sum().item() == 1 + 2.0**-40
    except Exception as error:
        return f"{device} has no float64: {type(error).__name__}"
    return None if exact else f"{device} computes with less than float64"


def _interpreter(device):
    """Only where the environment asks for the interpreter: who calls it otherwise may know his way around it."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return None
    try:
        from .interpreted import what_is_wrong

        found = " and ".join(what_is_wrong())
    except Exception as error:
        found = f"it fails: {type(error).__name__}"
    return f"Triton's interpreter (TRITON_INTERPRET=1): {found}" if found else None


# What is probed, and which cases cannot be judged where it is wrong.
PROBES = {
    "host": (_host, ""),
    "float64": (_float64, "dtype == 'fp64'"),
    "interpreter": (_interpreter, "dtype == 'bf16'"),
}


def probe(device):
    """Waivers for what this environment gets wrong; a cell with such failures only is "precondition failed"."""
    device, found = torch.device(device), []
    for name, (wrong, where) in PROBES.items():
        reason = wrong(device)
        if reason:
            waiver = Waiver(
                name, reason, where=where, statuses=(*WAIVABLE, "error"), becomes="precondition failed", reason=reason, expected=False
            )
            found.append(waiver)
    return tuple(found)
