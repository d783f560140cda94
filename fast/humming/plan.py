"""A prepared weight and its launch."""

import contextlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from ref.element import Int

from . import layer, tiles
from .rules import in_blocks

# int32 counters that stream-K's thread blocks meet at; the kernels leave them at zero.
LOCKS = 2048


def prepare(q, request):
    """A Plan: the weight in Humming's layout, its kernels compiled.

    The first weight of a shape and format compiles for some seconds; the results are kept in Humming's cache on disk.

    Raises:
        NotImplementedError: values that Humming would change.
    """
    from humming.kernel.humming import HummingKernel
    from humming.ops.utils import init_humming_launcher

    with torch.cuda.device(request.device):
        init_humming_launcher()
        config, tensors = layer.build(q, request)
        configs = HummingKernel.prepare_kernels(config.to_str(), *_tuning(config, request), request.device)
        locks = torch.zeros(0 if request.deterministic else LOCKS, dtype=torch.int32, device=request.device)
    return Plan(
        launch=torch.ops.humming.launch_kernel.out,
        configs=configs,
        weight=tensors["weight"],
        scale=tensors["weight_scale"],
        tensor_scale=tensors.get("weight_scale_2"),
        zero=tensors.get("zero_point"),
        locks=locks,
        quantizer=quantizer_for(request.x_format),
        grouped=bool(request.x_format and request.x_format.group[1]),
        n=config.shape_n - config.pad_shape_n,
        k=config.shape_k - config.pad_shape_k,
    )


def _tuning(config, request):
    """Humming's compute and tuning configurations, as JSON."""
    if not request.deterministic:
        return "{}", "{}"
    table = tiles.HALF if request.x_format is None else tiles.FP8_BLOCKS if in_blocks(request) else ()
    if not table or torch.cuda.get_device_capability(request.device) < (9, 0):
        return json.dumps({"use_batch_invariant": True}), "{}"
    sms = torch.cuda.get_device_properties(request.device).multi_processor_count
    return "{}", json.dumps(tiles.intervals(table, (config.shape_n, config.shape_k), sms))


def quantizer_for(x_format):
    if x_format is None:
        return None
    from fast.triton.quantize_input import InputQuantizer

    return InputQuantizer(x_format, torch.int8 if isinstance(x_format.element, Int) else torch.float8_e4m3fn)


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """The launcher, the table of kernels by m, and the weight. n and k are rounded up to whole 16-byte rows."""

    launch: Any
    configs: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor
    tensor_scale: torch.Tensor | None
    zero: torch.Tensor | None
    locks: torch.Tensor
    quantizer: Any
    grouped: bool
    n: int
    k: int

    def run(self, x, bias, x_scale, out):
        """out[m, n] = x w^T, rounded once; then the bias, where the call need not be deterministic."""
        device = self.weight.device
        with contextlib.nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device):
            a, a_scale = kernel_input(x, x_scale, self.quantizer, self.grouped, self.k)
            y = out
            if out.shape[1] != self.n or out.data_ptr() % 16:
                y = out.new_empty(out.shape[0], self.n)
            # The last argument: no checks, all was checked above.
            self.launch(
                self.configs, a, self.weight, self.scale, self.tensor_scale, a_scale, None, self.zero, None, y, None, None, None, None,
                self.locks, 1, 0, False,
            )  # fmt: skip
            if y is not out:
                out.copy_(y[:, : out.shape[1]])
            if bias is not None:
                out.add_(bias)


def kernel_input(x, x_scale, quantizer, grouped, k):
    """x as the kernel reads it, (m, k) with whole 16-byte rows and zeros past its end, and the scales of its rows or groups."""
    if quantizer is not None:
        codes, groups, scale, _ = quantizer(x, x_scale)
        if x.shape[1] != k:
            codes.view(torch.uint8)[:, x.shape[1] :] = 0
        return codes, groups if grouped else scale
    if x.shape[1] != k:
        return pad(x, (0, k - x.shape[1])), None
    if not x.is_contiguous() or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format), None
    return x, None
