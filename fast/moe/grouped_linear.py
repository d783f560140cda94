"""The linear layer of many experts at once, over rows in three layouts: contiguous, masked, indexed."""

import torch

from ref.format import parse_format
from ref.qtensor import QTensor

from ..linear import _scale_fits
from .choose import check_devices, check_ids, check_integers
from .stack import X_DTYPES, Stack, remember


def grouped_linear(
    x, w, expert_first_token_offset, bias=None, *, x_format=None, x_scale=None, impl=None, deterministic=True, out=None
):  # fmt: skip
    """ref.grouped_linear at speed: float32 sums, rounded once, or one of linear's variants. Rows behind the last expert's are zeros.

    Args:
        x: (r, k), float16, bfloat16 or float32; any strides.
        w: QTensor (e, n, k), what prepare_experts returned, or a plain tensor. Its tensors must not be written to afterwards.
        expert_first_token_offset: (e + 1,), int32 or int64. Offsets that do not ascend or leave x give an unspecified result, and read
            nothing outside of x and w; with FAST_DEBUG=1 those beyond x are refused.
        impl: None for the fastest that can, or for what FAST_IMPL pins; or "torch", "triton", "humming" or another that is registered,
            which never falls back.
        deterministic: as linear. "torch" and "triton" always give the same bits, whatever it says.
        out: None, or where to write: (r, n), contiguous.
        The rest, and the result: as ref.grouped_linear.

    Raises:
        TypeError, ValueError: arguments that do not fit each other, before any launch.
        NotImplementedError: legal, but impl cannot do it, or x requires a gradient.
        ExceptionGroup: no implementation can do it.
    """
    stack = _checked("grouped_linear", x, w, bias, x_scale, 2, expert_first_token_offset=expert_first_token_offset)
    e, n, _ = stack.shape
    if tuple(expert_first_token_offset.shape) != (e + 1,):
        raise ValueError(f"grouped_linear: offsets have shape {tuple(expert_first_token_offset.shape)}, expected ({e + 1},)")
    r = x.shape[0]
    check_ids("grouped_linear: offsets", expert_first_token_offset, r + 1)
    y = _result("grouped_linear", x, (r, n), out)
    plan = stack.plan("grouped_linear", x.dtype, x_format, impl, deterministic, bias, x_scale, -(-r // max(e, 1)))
    if _empty(y, e):
        return y
    plan.contiguous(_rows(x), expert_first_token_offset.contiguous(), _contiguous(bias), x_scale, y)
    return y


def masked_linear(x, w, counts, bias=None, *, x_format=None, x_scale=None, impl=None, deterministic=True, out=None):
    """ref.masked_linear at speed; rows from counts[e] on are zeros here, too, and those of x have no influence.

    Args:
        x: (e, max_tokens, k). counts: (e,), int32 or int64; one beyond max_tokens counts as max_tokens (FAST_DEBUG=1: ValueError).
        out: None, or where to write: (e, max_tokens, n), contiguous. The rest, and what is raised: as grouped_linear.
    """
    stack = _checked("masked_linear", x, w, bias, x_scale, 3, counts=counts)
    e, n, _ = stack.shape
    if tuple(counts.shape) != (e,):
        raise ValueError(f"masked_linear: counts have shape {tuple(counts.shape)}, expected ({e},)")
    most = x.shape[1]
    check_ids("masked_linear: counts", counts, most + 1)
    y = _result("masked_linear", x, (e, most, n), out)
    plan = stack.plan("masked_linear", x.dtype, x_format, impl, deterministic, bias, x_scale, most)
    if _empty(y, e):
        return y
    if x_format is not None and x_scale is None and parse_format(x_format).group == (0, 0):
        # The scale of all of x is that of the rows that count.
        x = torch.where((torch.arange(most, device=x.device) < counts[:, None])[:, :, None], x, 0)
    plan.masked(x.contiguous(), counts.contiguous(), _contiguous(bias), x_scale, y)
    return y


def indexed_linear(
    x, w, sorted_token_ids, expert_ids, num_tokens_post_padded, top_k, bias=None, *, topk_weights=None, block_size=None, x_format=None,
    x_scale=None, impl=None, deterministic=True, out=None,
):  # fmt: skip
    """ref.indexed_linear at speed: topk_weights are multiplied in float32, after the bias and before the rounding.

    Args:
        sorted_token_ids, expert_ids, num_tokens_post_padded: integers, as moe_align_block_size gives them. An expert that is not below e
            gives zeros, as -1 does (FAST_DEBUG=1: ValueError).
        out: None, or where to write: (m * top_k, n), contiguous. The rest, and what is raised: as ref.indexed_linear and grouped_linear.
    """
    given = {"sorted_token_ids": sorted_token_ids, "expert_ids": expert_ids, "num_tokens_post_padded": num_tokens_post_padded}
    stack = _checked("indexed_linear", x, w, bias, x_scale, 2, **given)
    e, n, _ = stack.shape
    slots, blocks = x.shape[0] * top_k, expert_ids.numel()
    if block_size is None:
        block_size = -(-sorted_token_ids.numel() // max(blocks, 1)) or 1
    if top_k < 1 or block_size < 1 or -(-sorted_token_ids.numel() // block_size) != blocks or num_tokens_post_padded.numel() != 1:
        raise ValueError(
            f"indexed_linear: got top_k={top_k}, {sorted_token_ids.numel()} sorted_token_ids and {blocks} expert_ids for blocks of "
            f"{block_size}, {num_tokens_post_padded.numel()} num_tokens_post_padded: these do not fit each other"
        )
    if topk_weights is not None:
        if not topk_weights.dtype.is_floating_point:
            raise TypeError(f"indexed_linear: topk_weights are {topk_weights.dtype}, expected floats")
        if tuple(topk_weights.shape) not in ((slots,), (x.shape[0], top_k)):
            raise ValueError(f"indexed_linear: topk_weights have shape {tuple(topk_weights.shape)}, expected ({x.shape[0]}, {top_k})")
        check_devices("indexed_linear", x, topk_weights=topk_weights)
        topk_weights = topk_weights.detach().flatten().contiguous()
    check_ids("indexed_linear: expert_ids", expert_ids, e)
    y = _result("indexed_linear", x, (slots, n), out)
    plan = stack.plan("indexed_linear", x.dtype, x_format, impl, deterministic, bias, x_scale, block_size, topk_weights is not None)
    # Slots in no block are not written again.
    y.zero_()
    if _empty(y, e) or not blocks:
        return y
    plan.run(
        _rows(x), _contiguous(bias), x_scale, y, top_k=top_k, topk_weights=topk_weights, block_size=block_size,
        **{name: t.contiguous() if t.dtype == torch.int32 else t.to(torch.int32).contiguous() for name, t in given.items()},
    )  # fmt: skip
    return y


def _empty(y, experts):
    """Whether nothing is left to compute; y is zeros then."""
    if y.numel() and experts:
        return False
    y.zero_()
    return True


def _rows(x):
    return x if x.stride(1) == 1 else x.contiguous()


def _contiguous(bias):
    return None if bias is None else bias.detach().contiguous()


def _result(operation, x, shape, out):
    if out is None:
        return x.new_empty(shape)
    if tuple(out.shape) != shape or out.dtype != x.dtype or out.device != x.device or not out.is_contiguous():
        raise ValueError(
            f"{operation}: out is {tuple(out.shape)} {out.dtype} on {out.device}, expected {shape} {x.dtype} on {x.device}, contiguous"
        )
    return out


def _checked(operation, x, w, bias, x_scale, dims, **integers):
    """The Stack of a call, after the checks that every call has to pass; they read no data."""
    if not isinstance(w, (QTensor, torch.Tensor, Stack)) or len(w.shape) != 3:
        raise ValueError(f"{operation}: w has shape {tuple(getattr(w, 'shape', ()))}, expected (experts, n, k)")
    stack = remember(w)
    e, n, k = stack.shape
    name = f"weight {stack.format}" if stack.quantized else "weight"
    if not isinstance(x, torch.Tensor) or x.dtype not in X_DTYPES:
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{operation}: x is {got}, expected a float16, bfloat16 or float32 tensor")
    if x.dim() != dims or (dims == 3 and x.shape[0] != e):
        raise ValueError(f"{operation}: x has shape {tuple(x.shape)}, expected {'(rows, k)' if dims == 2 else f'({e}, max_tokens, k)'}")
    if x.shape[-1] != k:
        raise ValueError(f"{operation}: x has k={x.shape[-1]}, {name} has k={k} (both must match)")
    if bias is not None and not bias.dtype.is_floating_point:
        raise TypeError(f"{operation}: bias is {bias.dtype}, expected a floating-point tensor")
    if bias is not None and tuple(bias.shape) != (e, n):
        raise ValueError(f"{operation}: bias has shape {tuple(bias.shape)}, expected {(e, n)}: (experts, n) of {name}")
    if x.device != stack.device:
        raise ValueError(f"{operation}: x is on {x.device}, w is on {stack.device} (both must match)")
    if x_scale is not None and not _scale_fits(x_scale, x):
        raise ValueError(f"{operation}: x_scale has to be one floating-point number on {x.device}")
    check_integers(operation, **integers)
    check_devices(operation, x, bias=bias, **integers)
    if x.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            f"{operation}: x requires a gradient, and quantized weights are for inference: call under torch.no_grad()"
        )
    return stack
