"""The experts of a mixture as a module."""

import torch
from torch import nn

from ref.format import check_input_format, parse_format
from ref.moe.check import ACTIVATIONS, check_activation
from ref.qtensor import QTensor

from ..moe import fused_experts, prepare_experts
from ..registry import find
from . import environment
from .weight import Weight, empty


class FusedExperts(nn.Module):
    """y = sum over t of topk_weights[:, t] * w2[id] activation(w13[id] x + bias13[id]) + bias2[id], id = topk_ids[:, t] (fast.fused_experts).

    Buffers only; for inference. w13 and w2 are Weights: their QTensors are w13.weight and w2.weight, their buffers w13.packed, w13.scale...

    >>> import ref
    >>> w13, w2 = (ref.quantize(torch.randn(4, n, k), "int4_g32") for n, k in ((96, 64), (64, 48)))
    >>> FusedExperts(w13, w2)
    FusedExperts(
      experts=4, hidden=64, intermediate=48, activation=silu, bias=False
      (w13): Weight(int4_g32, shape=(4, 96, 64))
      (w2): Weight(int4_g32, shape=(4, 64, 48))
    )
    """

    def __init__(
        self, w13, w2, *, activation="silu", bias13=None, bias2=None, x_format=None, limit=None, alpha=None, beta=None, up_beta=None,
        impl=None,
    ):  # fmt: skip
        """
        Args:
            w13: (e, n, k), QTensor or plain tensor: gate's rows and then up's (every second row for swigluoai), or those of up alone.
            w2: (e, k, i), QTensor or plain tensor, i the columns of the activation's result.
            bias13, bias2: (e, n) and (e, k), or None. The rest: as fused_experts.

        Raises:
            ValueError, NotImplementedError: what does not fit each other; or there is no such impl.
        """
        super().__init__()
        self.activation, self.x_format = activation, None if x_format is None else parse_format(x_format)
        self.activation_parameters = {"limit": limit, "alpha": alpha, "beta": beta, "up_beta": up_beta}
        _check(w13, w2, bias13, bias2, activation, self.activation_parameters, self.x_format)
        if impl is not None:
            find("grouped", impl, "FusedExperts")
        self.impl = impl
        self.w13, self.w2 = Weight(w13), Weight(w2)
        self.register_buffer("bias13", None if bias13 is None else bias13.detach())
        self.register_buffer("bias2", None if bias2 is None else bias2.detach())
        self.gemm_type = environment.gemm_type()

    @classmethod
    def empty(
        cls, experts, hidden, intermediate, format, *, activation="silu", bias=False, dtype=torch.bfloat16, device="meta", **options
    ):  # fmt: skip
        """A layer of the right shapes without any data, for a loader or load_state_dict to fill.

        Args:
            experts, hidden, intermediate: how many experts, k of w13, k of w2. format: of both weights; None leaves them plain, of the dtype.
            bias: whether there are any, of the dtype. options: x_format and the activation's parameters, as FusedExperts has them.

        >>> FusedExperts.empty(8, 64, 40, "nvfp4").w13.scale.shape
        torch.Size([8, 80, 4])
        """
        rows = intermediate * (1 + _activation(activation).gated)
        if bias:
            options |= {name: torch.empty(experts, n, dtype=dtype, device=device) for name, n in (("bias13", rows), ("bias2", hidden))}
        w13, w2 = (empty(format, (experts, *shape), dtype, device) for shape in ((rows, hidden), (hidden, intermediate)))
        return cls(w13, w2, activation=activation, **options)

    experts = property(lambda self: self.w13.shape[0])
    hidden = property(lambda self: self.w13.shape[2])
    intermediate = property(lambda self: self.w2.shape[2])

    def prepare(self, x_dtype=torch.bfloat16, **options):
        """Put quantized weights into their kernels' layouts (fast.prepare_experts); let go of the buffers they were read from. Returns the layer."""
        for weight, bias in ((self.w13, self.bias13), (self.w2, self.bias2)):
            if weight.format is not None:
                bias = False if bias is None else bias
                own = {"x_format": self.x_format, "bias": bias, "impl": self.impl}
                weight.keep(prepare_experts(weight.weight, x_dtype=x_dtype, **own, **options))
        return self

    def forward(self, x, topk_weights, topk_ids, expert_map=None):
        return fused_experts(
            x, self.w13.weight, self.w2.weight, topk_weights, topk_ids, activation=self.activation, expert_map=expert_map,
            bias13=self.bias13, bias2=self.bias2, x_format=self.x_format, impl=self.impl, gemm_type=self.gemm_type,
            **self.activation_parameters,
        )  # fmt: skip

    def extra_repr(self):
        x = "" if self.x_format is None else f", x_format={self.x_format}"
        bias = self.bias13 is not None or self.bias2 is not None
        return (
            f"experts={self.experts}, hidden={self.hidden}, intermediate={self.intermediate}, activation={self.activation}{x}, bias={bias}"
        )


def _activation(name):
    if name not in ACTIVATIONS:
        raise ValueError(f"FusedExperts: unknown activation {name!r}, expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _check(w13, w2, bias13, bias2, activation, parameters, x_format):
    """Refuse what does not fit each other; reads no data."""
    for name, w in (("w13", w13), ("w2", w2)):
        if not isinstance(w, (QTensor, torch.Tensor)):
            raise TypeError(f"FusedExperts: {name} is {type(w).__name__}, expected a QTensor or a tensor")
        if len(w.shape) != 3:
            raise ValueError(f"FusedExperts: {name} has shape {tuple(w.shape)}, expected (experts, n, k)")
    gated = _activation(activation).gated
    (e, n, _), (e2, n2, k2) = w13.shape, w2.shape
    if e != e2:
        raise ValueError(f"FusedExperts: w13 has {e} experts, w2 has {e2} (both must match)")
    try:
        check_activation(torch.empty(0, n), activation, **parameters)
    except ValueError as error:
        raise ValueError(f"FusedExperts: {error}") from None
    if k2 != n // (1 + gated):
        raise ValueError(f"FusedExperts: {activation} makes {n // (1 + gated)} columns of w13's n={n}, w2 has k={k2} (both must match)")
    for name, bias, rows in (("bias13", bias13, n), ("bias2", bias2, n2)):
        if bias is not None and tuple(bias.shape) != (e, rows):
            raise ValueError(f"FusedExperts: {name} has shape {tuple(bias.shape)}, expected {(e, rows)}")
    if x_format is not None:
        check_input_format(x_format, None, "FusedExperts")
