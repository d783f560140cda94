"""A layer of experts that is spread over ranks: tokens travel to their experts, and what these return travels back."""

import itertools

import torch
import torch.distributed as dist
from torch import nn

from ref.format import parse_format
from ref.qtensor import TENSORS, QTensor

from ..moe.choose import check_integers
from ..moe.expert_map import expert_map
from ..moe.fused_mul_sum import moe_fused_mul_sum


def take_experts(w, here):
    """The experts of one rank.

    Args:
        w: QTensor (e, n, k), or a plain tensor (e, ...), as a bias is. here: (e,), as expert_map gives it.

    Raises:
        ValueError: the map is of another number of experts.

    >>> take_experts(torch.tensor([[1.0], [2.0], [3.0]]), expert_map(3, 2, 1, "round_robin"))
    tensor([[2.]])
    """
    if tuple(here.shape) != (w.shape[0],):
        raise ValueError(f"take_experts: the map has shape {tuple(here.shape)}, w has {w.shape[0]} experts (both must match)")
    own = (here >= 0).nonzero()[:, 0]
    own = own[here[own].argsort()]
    if not isinstance(w, QTensor):
        return w[own.to(w.device)]
    parts = {name: getattr(w, name) for name in TENSORS if getattr(w, name) is not None}
    return QTensor(w.format, (own.numel(), *w.shape[1:]), **{name: part[own.to(part.device)] for name, part in parts.items()})


class ExpertParallel(nn.Module):
    """fused_experts over ranks: y[m] = sum over t of weight[m, t] * expert[topk_ids[m, t]](x[m]), wherever the experts are.

    Each token's row goes once to each rank that has experts for it (all-to-all), these compute, and what each expert returned, rounded
    to x's dtype as fused_experts rounds it, comes back (all-to-all) and is weighed and added up here, in float32 and in the order of the
    slots. It is what fused_experts with all experts on one rank computes: where the kernels sum as they do there, bit for bit.

    Tokens may be any number, another on each rank, also none; all ranks must call, with one dtype and width of x. How many rows travel must
    be known on the host first: a call waits for the device, and cannot be captured in a CUDA graph.

    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> import fast
    >>> w13, w2 = torch.ones(4, 6, 5), torch.ones(4, 5, 3)
    >>> layer = ExpertParallel(lambda x, *topk: fast.fused_experts(x, w13, w2, *topk), num_experts=4)
    >>> layer(torch.ones(2, 5), torch.tensor([[0.5, 0.5], [1.0, 1.0]]), torch.tensor([[0, 3], [2, -1]])).shape
    torch.Size([2, 5])
    >>> dist.destroy_process_group()
    """

    def __init__(self, experts, num_experts, group=None, placement="linear", device=None):
        """
        Args:
            experts: what computes this rank's experts: (x, topk_weights, topk_ids) -> (m, h'), ids local; a FusedExperts of take_experts.
            num_experts: of all ranks, at least 1; ranks without any are legal.
            group: of torch.distributed; None: all ranks.
            placement: which rank has which: as expert_map has it.
            device: of the layer's own tables, which has to be x's.

        Raises:
            ValueError: no expert, or an unknown placement.
            NotImplementedError: activations with one scale for all tokens, of which each rank sees some.
        """
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"ExpertParallel: got {num_experts} experts, expected at least 1")
        x_format = getattr(experts, "x_format", None)
        if x_format is not None and parse_format(x_format).group == (0, 0):
            raise NotImplementedError(
                f"ExpertParallel: x_format {x_format} has one scale for all tokens, and each rank sees some of them; "
                "a scale for each token can"
            )
        self.experts, self.num_experts, self.group = experts, num_experts, group
        ranks = dist.get_world_size(group)
        maps = torch.stack([expert_map(num_experts, ranks, rank, placement) for rank in range(ranks)])
        # Of each expert: the rank that has it, and its number there.
        self.register_buffer("owner", maps.argmax(0).to(device), persistent=False)
        self.register_buffer("local", maps.amax(0).long().to(device), persistent=False)
        self.register_buffer("ranks", torch.arange(ranks, device=device), persistent=False)

    def forward(self, x, topk_weights, topk_ids):
        """
        Args:
            x: (m, h), float16, bfloat16 or float32.
            topk_weights: (m, t), floats. topk_ids: (m, t), int32 or int64, of all ranks' experts; negative ones, as padding has, and
                those beyond num_experts add nothing.

        Returns:
            (m, h'), dtype of x.

        Raises:
            TypeError, ValueError: arguments that do not fit each other, before anything is sent.
            NotImplementedError: x requires a gradient.
        """
        _check(x, topk_weights, topk_ids, self.owner.device)
        real = (topk_ids >= 0) & (topk_ids < self.num_experts)
        ids = torch.where(real, topk_ids, 0).long()
        slots_to = real[:, :, None] & (self.owner[ids][:, :, None] == self.ranks)
        rows_to = slots_to.any(1)
        # A slot that travels is its row's number among the rows for that rank, and its expert's number there.
        number = rows_to.long().cumsum(0) - 1
        pairs = torch.stack([number.gather(1, self.owner[ids]), self.local[ids]], -1).flatten(0, 1)
        sent = torch.stack([rows_to.sum(0), slots_to.sum((0, 1))], 1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        (rows, slots), (rows_in, slots_in) = torch.stack([sent, received]).transpose(1, 2).tolist()
        tokens = rows_to.T.nonzero()[:, 1]
        order = slots_to.flatten(0, 1).T.nonzero()[:, 1]
        x_in = self._exchange(x[tokens], rows, rows_in)
        pairs_in = self._exchange(pairs[order], slots, slots_in)
        # Each rank numbers its rows from 0.
        first = torch.tensor([0, *itertools.accumulate(rows_in)][:-1]).repeat_interleave(torch.tensor(slots_in))
        x_in = x_in[pairs_in[:, 0] + first.to(x.device)]
        y = self.experts(x_in, torch.ones(len(x_in), 1, device=x.device), pairs_in[:, 1:])
        back = self._exchange(y, slots_in, slots)
        down = y.new_zeros(topk_ids.numel(), y.shape[1])
        down[order] = back
        return moe_fused_mul_sum(down.view(*topk_ids.shape, y.shape[1]), topk_weights.detach(), torch.where(real, topk_ids, -1))

    def _exchange(self, t, sent, received):
        """Rows for each rank, in the order of ranks -> rows from each rank, likewise."""
        out = t.new_empty(sum(received), *t.shape[1:])
        dist.all_to_all_single(out, t.contiguous(), received, sent, group=self.group)
        return out


def _check(x, topk_weights, topk_ids, device):
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"ExpertParallel: x is {x.dtype}, expected a float16, bfloat16 or float32 tensor")
    check_integers("ExpertParallel", topk_ids=topk_ids)
    if not topk_weights.dtype.is_floating_point:
        raise TypeError(f"ExpertParallel: topk_weights are {topk_weights.dtype}, expected floats")
    if x.dim() != 2 or topk_ids.dim() != 2 or topk_ids.shape != topk_weights.shape or len(topk_ids) != len(x):
        raise ValueError(
            f"ExpertParallel: x has shape {tuple(x.shape)}, topk_weights {tuple(topk_weights.shape)}, topk_ids {tuple(topk_ids.shape)}, "
            "expected (m, h), (m, top_k) and (m, top_k)"
        )
    for name, t in (("x", x), ("topk_weights", topk_weights), ("topk_ids", topk_ids)):
        if t.device != device:
            raise ValueError(f"ExpertParallel: {name} is on {t.device}, the layer on {device} (all must match)")
    if x.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            "ExpertParallel: x requires a gradient, and quantized weights are for inference: call under torch.no_grad()"
        )
