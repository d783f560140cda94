"""Which implementation of a MoE operation runs, and the switch that checks ids."""

import importlib.util
import os

from ..registry import is_known


def choose(operation, impl, device, has=("triton", "torch")):
    """The implementation's name: as asked for, or Triton on a GPU and torch elsewhere.

    Args:
        has: the implementations of this operation.

    Raises:
        ValueError: there is no such implementation.
        NotImplementedError: this operation has none of that name, or it cannot run here.
    """
    if impl is None:
        fits = "triton" in has and device.type == "cuda" and importlib.util.find_spec("triton") is not None
        return "triton" if fits else "torch"
    if not is_known(impl):
        raise ValueError(f"{operation}: unknown impl {impl!r}, expected one of {', '.join(has)}")
    if impl not in has:
        raise NotImplementedError(f"{operation}: there is no impl {impl!r} of it; impl {has[0]!r} can")
    reason = why_not(impl, device)
    if reason is not None:
        raise NotImplementedError(f"{operation}: impl {impl!r} cannot run on {device}: {reason}; impl 'torch' can")
    return impl


def why_not(impl, device):
    """Why an implementation cannot run on a device, as a sentence; None if it can."""
    if impl != "triton":
        return None
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type not in ("cpu", "cuda"):
        return f"Triton kernels run on CUDA and ROCm devices, and in the interpreter on the CPU, not on {device.type}"
    return None


def check_ids(operation, ids, end):
    """With FAST_DEBUG=1 in the environment: refuse ids that are not below `end`. It waits for the GPU, and is therefore a switch.

    Without it such ids count as empty slots: nothing is ever read through them.
    """
    if os.environ.get("FAST_DEBUG") == "1" and ids.numel() and int(ids.max()) >= end:
        raise ValueError(f"{operation}: ids reach {int(ids.max())}, expected less than {end}")


def check_integers(operation, **tensors):
    """Refuse ids, maps, offsets and counts that are no integers, and None is fine."""
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.dtype.is_floating_point or tensor.dtype.itemsize < 4):
            raise TypeError(f"{operation}: {name} has dtype {tensor.dtype}, expected int32 or int64")


def check_devices(operation, first, **tensors):
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{operation}: {name} is on {tensor.device}, the rest on {first.device} (all must match)")
