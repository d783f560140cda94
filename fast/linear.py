"""The quantized linear layer at speed: a drop-in for torch.nn.functional.linear."""

import torch

from ref.qtensor import QTensor

from .dispatch import X_DTYPES, Prepared, bucket_of, call_kind, describe, refusal, remember
from .registry import find

NO_GRADIENT = "linear: x requires a gradient, and quantized weights are for inference: call under torch.no_grad()"


def linear(x, w, bias=None, *, x_format=None, x_scale=None, impl=None, deterministic=True, out=None):
    """y = x W^T + bias, with sums in float32 or better and one rounding to x's dtype.

    With a plain tensor w this is torch.nn.functional.linear. With a QTensor it is ref.linear, or one of its variants, within
    the bound that the conformance suite derives. The first call of a kind prepares the weight and may compile.

    Args:
        x: (..., k), float16, bfloat16 or float32; any strides.
        w: QTensor (n, k), what prepare returned, or a plain tensor (n, k). Its tensors must not be written to afterwards.
        bias: (n,), any float dtype, or None.
        x_format: None, or the format that x is quantized to first, as int8_token.
        x_scale: the static scale of x_format, a tensor with one value.
        impl: None for the fastest that can, or for what FAST_IMPL pins; or "torch", "triton", "humming", "cublas" or another that is
            registered, which never falls back.
        deterministic: the same bits on every run, rounded once. False lets a backend add partial sums in x's dtype and in
            any order.
        out: None, or where to write: (..., n), contiguous, dtype and device of x.

    Returns:
        (..., n), dtype of x.

    Raises:
        TypeError, ValueError: arguments that do not fit each other, before any launch.
        NotImplementedError: legal, but impl cannot do it (why_not says why), or x requires a gradient.
        ExceptionGroup: no implementation can do it.
    """
    if torch.compiler.is_compiling():
        from . import ops

        return ops.call(x, w, bias, x_format, x_scale, impl, deterministic, out)
    if not isinstance(w, (QTensor, Prepared)):
        return plain(x, w, bias, x_format, x_scale, impl, out)
    prepared = _prepared_for(x, w, bias, x_scale)
    if x.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(NO_GRADIENT)
    kind = call_kind(x, bias, x_format, x_scale, impl, deterministic)
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), prepared.k)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    if bias is not None and bias.stride(0) != 1:
        bias = bias.contiguous()
    m = rows.shape[0]
    plans = prepared.kinds.get(kind) or prepared.open(kind, x_scale)
    bucket = bucket_of(m)
    plan = plans[bucket] or prepared.plan(kind, bucket)
    if out is None:
        result = x.new_empty(m, prepared.n)
    else:
        _check_out(out, x, prepared.n)
        result = out.view(m, prepared.n)
    if m and prepared.n:
        plan.run(rows, bias, x_scale, result)
    return result if x.dim() == 2 else result.view(*x.shape[:-1], prepared.n)


def why_not(op, x, *args, impl, **given):
    """Why an implementation cannot run a call, as a sentence, without launching anything; None if it can.

    Args:
        op: the operation's name: "linear", or one of the MoE functions.
        impl: the implementation's name.
        The rest: as the operation takes it.

    Raises:
        TypeError, ValueError: arguments that do not fit each other, or no such operation or implementation.
    """
    if op == "linear":
        return _why_not(x, *args, impl=impl, **given)
    from .moe.reasons import why_not as why_not_moe

    return why_not_moe(op, x, *args, impl=impl, **given)


def _why_not(x, w, bias=None, *, x_format=None, x_scale=None, impl, deterministic=True):
    implementation = find("linear", impl)
    if not isinstance(w, (QTensor, Prepared)):
        _check_plain(x, w)
        if x_format is None and x_scale is None and impl == "torch":
            return None
        return "x_format, x_scale and implementations are for quantized weights; a plain tensor goes to torch.nn.functional.linear"
    prepared = _prepared_for(x, w, bias, x_scale)
    kind = call_kind(x, bias, x_format, x_scale, impl, deterministic)
    prepared.open(kind, x_scale)
    request = prepared.request(kind)
    reason = refusal(implementation, request)
    return None if reason is None else f"{describe(request)}: {reason}"


def plain(x, w, bias, x_format, x_scale, impl, out):
    """torch.nn.functional.linear, and a refusal of what only quantized weights take."""
    _check_plain(x, w)
    if x_format is not None or x_scale is not None or impl not in (None, "torch"):
        raise NotImplementedError(
            "linear: w is a plain tensor: x_format, x_scale and impl are for quantized weights (ref.quantize makes one)"
        )
    if out is None:
        return torch.nn.functional.linear(x, w, bias)
    _check_out(out, x, w.shape[0])
    return out.copy_(torch.nn.functional.linear(x, w, bias))


def _check_plain(x, w):
    """Refuse what is no tensor or does not fit; dtypes are torch.nn.functional.linear's business."""
    if not isinstance(w, torch.Tensor):
        raise TypeError(f"linear: w is {type(w).__name__}, expected a QTensor, a Prepared or a tensor")
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"linear: x is {type(x).__name__}, expected a tensor")
    if x.dim() and w.dim() and x.shape[-1] != w.shape[-1]:
        raise ValueError(f"linear: x has k={x.shape[-1]}, weight has k={w.shape[-1]} (both must match)")


def _prepared_for(x, w, bias, x_scale):
    """The prepared weight of a call, after the checks that every call has to pass; they read no data."""
    if len(w.shape) != 2 or not _fits(x, w.shape, bias):
        _refuse(x, w, bias)
    prepared = remember(w)
    if x.device != prepared.device or (x_scale is not None and not _scale_fits(x_scale, x)):
        _refuse(x, w, bias, x_scale)
    return prepared


def _fits(x, shape, bias):
    if not isinstance(x, torch.Tensor) or x.dtype not in X_DTYPES or x.dim() < 1 or x.shape[-1] != shape[1]:
        return False
    return bias is None or (
        isinstance(bias, torch.Tensor) and bias.shape == shape[:1] and bias.dtype.is_floating_point and bias.device == x.device
    )


def _scale_fits(x_scale, x):
    return isinstance(x_scale, torch.Tensor) and x_scale.numel() == 1 and x_scale.dtype.is_floating_point and x_scale.device == x.device


def _refuse(x, w, bias, x_scale=None):
    """Say what does not fit."""
    if not isinstance(x, torch.Tensor) or x.dtype not in X_DTYPES:
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"linear: x is {got}, expected a float16, bfloat16 or float32 tensor")
    if len(w.shape) != 2:
        raise ValueError(f"linear: weight {w.format} has shape {tuple(w.shape)}, expected (n, k)")
    n, k = w.shape
    if x.dim() < 1 or x.shape[-1] != k:
        got = f"k={x.shape[-1]}" if x.dim() else "no axis"
        raise ValueError(f"linear: x has {got}, weight {w.format} has k={k} (both must match)")
    if bias is not None and (not isinstance(bias, torch.Tensor) or not bias.dtype.is_floating_point):
        got = bias.dtype if isinstance(bias, torch.Tensor) else type(bias).__name__
        raise TypeError(f"linear: bias is {got}, expected a floating-point tensor")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"linear: bias has shape {tuple(bias.shape)}, weight {w.format} has n={n} (expected ({n},))")
    device = w.device if isinstance(w, Prepared) else w.packed.device
    if x_scale is not None and not (isinstance(x_scale, torch.Tensor) and x_scale.dtype.is_floating_point):
        got = x_scale.dtype if isinstance(x_scale, torch.Tensor) else type(x_scale).__name__
        raise TypeError(f"linear: x_scale is {got}, expected a floating-point tensor with one value")
    if x_scale is not None and x_scale.numel() != 1:
        raise ValueError(f"linear: x_scale has shape {tuple(x_scale.shape)}, expected one value")
    where = f"weight is on {device}" + ("" if bias is None else f", bias on {bias.device}")
    where += "" if x_scale is None else f", x_scale on {x_scale.device}"
    raise ValueError(f"linear: x is on {x.device}, {where} (all must match)")


def _check_out(out, x, n):
    shape = (*x.shape[:-1], n)
    if not isinstance(out, torch.Tensor) or tuple(out.shape) != shape or out.dtype != x.dtype or out.device != x.device:
        got = f"{tuple(out.shape)} {out.dtype} on {out.device}" if isinstance(out, torch.Tensor) else type(out).__name__
        raise ValueError(f"linear: out is {got}, expected {shape} {x.dtype} on {x.device}")
    if not out.is_contiguous():
        raise ValueError("linear: out is not contiguous")
