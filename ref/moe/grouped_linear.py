"""The linear layer of many experts at once, over rows in three layouts: contiguous, masked, indexed."""

import itertools

import torch

from ..activation import quantize_input
from ..combine import take_expert
from ..qtensor import QTensor
from ..quantize import dequantize
from ..rounding import round_to
from .check import check_grouped


def grouped_linear(x, w, expert_first_token_offset, bias=None, *, x_format=None, x_scale=None):
    """Contiguous: y[r] = x[r] W[e]^T + bias[e] for the rows offset[e] <= r < offset[e + 1]; zeros behind the last.

    Args:
        x: (r, k), float16, bfloat16 or float32.
        w: QTensor or plain tensor (e, n, k).
        expert_first_token_offset: (e + 1,), integer, ascending, as moe_permute gives it.
        bias: (e, n), any float dtype, or None.
        x_format, x_scale: as linear. A dynamic scale of a tensor is that of all of x.

    Returns:
        (r, n), dtype of x: float64 sums, rounded once.

    Raises:
        TypeError, ValueError: arguments that do not fit each other, or offsets that do not ascend from 0 to at most r.
    """
    check_grouped(x, w, bias, x_format, x_scale, 2)
    offsets = expert_first_token_offset.tolist()
    if len(offsets) != w.shape[0] + 1 or offsets[0] != 0 or offsets != sorted(offsets) or offsets[-1] > x.shape[0]:
        raise ValueError(
            f"grouped_linear: offsets are {offsets}, expected {w.shape[0] + 1} that ascend from 0 to at most {x.shape[0]} rows"
        )
    a = operand(x, x_format, x_scale)
    y = a.new_zeros(x.shape[0], w.shape[1])
    for expert, (start, end) in enumerate(itertools.pairwise(offsets)):
        if end > start:
            y[start:end] = product(a[start:end], w, expert, bias)
    return round_to(y, x.dtype)


def masked_linear(x, w, counts, bias=None, *, x_format=None, x_scale=None):
    """Masked: y[e, j] = x[e, j] W[e]^T + bias[e] for j < counts[e]. The other rows of x are not read; those of y are zeros here.

    Kernels may leave those rows of y as they were.

    Args:
        x: (e, max_tokens, k). counts: (e,), integer, 0 to max_tokens. The rest: as grouped_linear.

    Returns:
        (e, max_tokens, n), dtype of x.

    Raises:
        TypeError, ValueError: as grouped_linear, or a count out of range.
    """
    check_grouped(x, w, bias, x_format, x_scale, 3, "masked_linear")
    if tuple(counts.shape) != (w.shape[0],) or (counts.numel() and not 0 <= int(counts.min()) <= int(counts.max()) <= x.shape[1]):
        raise ValueError(f"masked_linear: counts are {counts.tolist()}, expected {w.shape[0]} from 0 to {x.shape[1]}")
    here = torch.arange(x.shape[1], device=x.device) < counts[:, None]
    rows = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device).masked_scatter_(
        here, torch.arange(int(counts.sum()), device=x.device)
    )
    y = grouped_linear(x[here], w, torch.cat((counts.new_zeros(1), counts.cumsum(0))).long(), bias, x_format=x_format, x_scale=x_scale)
    out = y.new_zeros(*x.shape[:2], w.shape[1])
    out[here] = y[rows[here]]
    return out


def indexed_linear(
    x, w, sorted_token_ids, expert_ids, num_tokens_post_padded, top_k, bias=None, *, topk_weights=None, block_size=None, x_format=None,
    x_scale=None,
):  # fmt: skip
    """Indexed: y[i] = (x[i // top_k] W[e]^T + bias[e]) * topk_weights[i] for each slot i in a block of expert e.

    The blocks are those of moe_align_block_size: block b is rows b * block_size ... of sorted_token_ids, up to
    num_tokens_post_padded. Sentinels (ids not below the number of slots) are skipped; blocks of expert -1 and slots in no block give zeros.

    Args:
        x: (m, k). w: (e, n, k). top_k: slots of a row of x: t for w13, 1 for w2.
        topk_weights: None, or (m * top_k,) or (m, top_k), float: multiplied after the bias.
        block_size: what moe_align_block_size was given; None where pad_sorted_ids made whole blocks, so that the lengths tell.
        The rest: as grouped_linear.

    Returns:
        (m * top_k, n), dtype of x: float64, rounded once.

    Raises:
        TypeError, ValueError: as grouped_linear, an expert that is not below e, or lengths that do not fit block_size.
    """
    check_grouped(x, w, bias, x_format, x_scale, 2, "indexed_linear")
    n = x.shape[0] * top_k
    blocks = expert_ids.numel()
    block = (-(-sorted_token_ids.numel() // blocks) if blocks else 1) if block_size is None else block_size
    if block < 1 or -(-sorted_token_ids.numel() // block) != blocks:
        raise ValueError(f"indexed_linear: {sorted_token_ids.numel()} sorted_token_ids do not make {blocks} blocks of {block}")
    if blocks and int(expert_ids.max()) >= w.shape[0]:
        raise ValueError(f"indexed_linear: expert_ids reach {int(expert_ids.max())}, expected less than {w.shape[0]} experts")
    a = operand(x, x_format, x_scale)
    y = a.new_zeros(n, w.shape[1])
    used = sorted_token_ids[: int(num_tokens_post_padded)].long()
    experts = expert_ids.long().repeat_interleave(block)[: used.numel()]
    for expert in experts[experts >= 0].unique().tolist():
        slots = used[(experts == expert) & (used < n)]
        y[slots] = product(a[slots // top_k], w, expert, bias)
    if topk_weights is not None:
        y = y * topk_weights.to(torch.float64).reshape(-1, 1)
    return round_to(y, x.dtype)


def operand(x, x_format, x_scale=None):
    """x as the product sees it: float64, the shape of x."""
    return x.detach().to(torch.float64) if x_format is None else dequantize(quantize_input(x, x_format, x_scale)).reshape(x.shape)


def product(a, w, expert, bias):
    """a W[expert]^T + bias[expert], float64."""
    weight = dequantize(take_expert(w, expert)) if isinstance(w, QTensor) else w[expert].detach().to(torch.float64)
    y = a @ weight.T
    return y if bias is None else y + bias[expert].detach().to(torch.float64)
