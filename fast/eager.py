"""The "torch" implementation: the linear layer in plain torch, on every device.

Its own code from the packed words to the result, so that checking it against ref proves something. On the CPU, and for
float32 x everywhere, the product runs in float64: neither TF32 nor any other precision setting has a say in it. For 16-bit x
on a GPU the weight is rounded to x's dtype and the product is one matrix product with float32 sums ("weight_rounded").
"""

from dataclasses import dataclass

import torch

from ref.element import values
from ref.format import Format
from ref.qtensor import TENSORS, QTensor, check_parts

from .codes import unpack
from .hadamard import hadamard
from .quantize_input import quantized_values
from .rearrange import check_group_index
from .scale import decoded_scale

# Weights dequantized at a time: 8 million, 64 MiB in float64, and a few times that on the way.
CHUNK = 2**23


def why_not(request):
    """None: it takes everything."""
    return None


def prepare(q, request):
    """A Plan; the weight stays as it is."""
    return _plan(q, request.x_format)


def _plan(q, x_format=None):
    check_group_index(q)
    k, device = q.shape[1], q.packed.device
    return Plan(
        q,
        x_format,
        values(q.format.element, device),
        torch.arange(k, device=device),
        _group_of(k, q.format.group[1], q.group_index, device),
    )


def dequantize(q, dtype=torch.float64):
    """ref.dequantize, by this implementation's own code."""
    check_parts(q, "dequantize")
    if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"dequantize: got {dtype}, expected float64, float32, float16 or bfloat16")
    *lead, n, k = q.shape
    experts = [q] if not lead else [_expert(q, index) for index in range(torch.Size(lead).numel())]
    out = torch.empty(len(experts), n, k, dtype=dtype, device=q.packed.device)
    for expert, w in zip(out, experts, strict=True):
        plan = _plan(w)
        for rows in plan.chunks():
            part = plan.weight(rows)
            expert[rows] = _round_once(hadamard(part, q.format.hadamard) if q.format.hadamard else part, dtype)
    return out.reshape(q.shape)


@dataclass(frozen=True, eq=False)
class Plan:
    """How to read one weight: what each code means, each k, and the column of scale that it belongs to."""

    q: QTensor
    x_format: Format | None
    table: torch.Tensor
    columns: torch.Tensor
    group: torch.Tensor

    def run(self, x, bias, x_scale, out):
        """out[m, n] = x w^T + bias, rounded once."""
        fmt = self.q.format
        in_float64 = x.dtype not in (torch.float16, torch.bfloat16) or not x.is_cuda or self.x_format is not None
        a = x.to(torch.float64) if in_float64 else x
        if self.x_format is not None:
            a = quantized_values(x, self.x_format, x_scale)
        elif fmt.hadamard and not in_float64:
            a = _round_once(hadamard(x.to(torch.float64), fmt.hadamard), x.dtype)
        for rows in self.chunks():
            w = self.weight(rows)
            if in_float64:
                y = a @ (hadamard(w, fmt.hadamard) if fmt.hadamard else w).T
            else:
                y = torch.mm(a, _round_once(w, x.dtype).T, out_dtype=torch.float32)
            out[:, rows] = _round_once(y if bias is None else y + bias[rows].detach().to(y.dtype), out.dtype)

    def chunks(self):
        """Slices of rows that together are the weight."""
        n, k = self.q.shape
        step = max(CHUNK // max(k, 1), 1)
        return [slice(start, min(start + step, n)) for start in range(0, n, step)]

    def weight(self, rows):
        """float64 (rows, k): (value - zero) * scale * scale_2 + offset, before the inverse rotation."""
        q, fmt = self.q, self.q.format
        if q.shape[1] == 0:
            return self.table.new_zeros(rows.stop - rows.start, 0)
        w = self.table[unpack(q.packed[rows], fmt.element.bits, self.columns)]
        row = _group_of(q.shape[0], fmt.group[0], None, q.packed.device)[rows]
        if q.zero is not None:
            w -= q.zero[row].to(torch.float64)[:, self.group]
        w *= decoded_scale(q.scale[row], fmt.scale)[:, self.group]
        if q.scale_2 is not None:
            second = (q.scale_2 if fmt.scale_2.startswith("tensor") else q.scale_2[rows]).to(torch.float64)
            w = w / second if fmt.scale_2.endswith("divisor") else w * second
        if q.offset is not None:
            w += q.offset[row].to(torch.float64)[:, self.group]
        return w


def _round_once(w, dtype):
    """w in another dtype by one rounding: from float64 to 16 bits, float32 on the way keeps in its last bit that something was cut off."""
    if w.dtype != torch.float64 or dtype not in (torch.float16, torch.bfloat16):
        return w.to(dtype)
    near = w.to(torch.float32)
    bits = near.view(torch.int32) - (near.double().abs() > w.abs()).int()
    odd = (bits | (near.double() != w).int()).view(torch.float32)
    return torch.where(w.isfinite(), odd, near).to(dtype)


def _group_of(count, size, index, device):
    if index is not None:
        return index.long()
    return torch.arange(count, device=device) // size if size else torch.zeros(count, dtype=torch.long, device=device)


def _expert(q, index):
    lead = len(q.shape) - 2
    parts = {name: getattr(q, name) for name in TENSORS}
    return QTensor(q.format, q.shape[-2:], **{name: None if t is None else t.flatten(0, lead - 1)[index] for name, t in parts.items()})
