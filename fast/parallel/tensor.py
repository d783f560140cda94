"""Linear layers that are spread over ranks: by the weight's rows (column parallel) or by its columns (row parallel)."""

import torch
import torch.distributed as dist
from torch import nn

from ..layers.linear import Linear


class ColumnParallelLinear(nn.Module):
    """y = x W^T + bias, of which each rank has some columns: y_rank = x W_rank^T + bias_rank, W_rank some rows of W.

    A column is what one rank alone would compute: where the kernels sum as they do for the whole weight, bit for bit.
    """

    def __init__(self, weight, bias=None, group=None, *, gather_output=False, x_format=None, x_scale=None):
        """
        Args:
            weight: QTensor (n_rank, k): this rank's rows, as shard(q, "n", rank, size) gives them; any number, also none.
            bias: (n_rank,), or None: bias.tensor_split(size)[rank].
            group: of torch.distributed; None: all ranks.
            gather_output: each rank gets all columns. The ranks then tell each other here how many they have: all must make the layer.
            x_format, x_scale: as linear's.

        Raises:
            ValueError: the bias does not fit the weight.
        """
        super().__init__()
        self.local = Linear(weight, bias, x_format=x_format, x_scale=x_scale)
        self.group = group
        self.sizes = _gathered_sizes(weight, group) if gather_output else None

    def forward(self, x):
        """(..., n_rank), or with gather_output (..., n), of an x (..., k) that all ranks have."""
        y = self.local(x)
        return y if self.sizes is None else _gathered(y, self.sizes, self.group)


class RowParallelLinear(nn.Module):
    """y = sum over ranks of x_rank W_rank^T, + bias, where W_rank and x_rank are some columns of W and x.

    Each rank's part is rounded to x's dtype, as linear rounds; the sum over ranks and the bias are float32, rounded once to x's dtype.
    With p_r the exact parts, of R ranks, u the unit roundoff of x's dtype (2^-8 for bfloat16, 2^-11 for float16, 2^-24 for float32) and
    v = 2^-24,

        |y - (sum p_r + bias)| <= u (sum |p_r| + |y|) + R v / (1 - R v) (sum |p_r| (1 + u) + |bias|) + what linear's own sums err by,

    of which one rank alone has u |y| and the last. All ranks get the same bits. A float16 part beyond 65504 is infinite, as is the sum
    then.

    With x_format each rank quantizes the columns that it has: a scale for each token is one for each token and rank. Scales of
    groups that no border cuts, and a given x_scale, are those of one rank alone.
    """

    def __init__(self, weight, bias=None, group=None, *, x_format=None, x_scale=None):
        """
        Args:
            weight: QTensor (n, k_rank): this rank's columns, as shard(q, "k", rank, size) gives them; any number, also none.
            bias: (n,), all of it on every rank, or None. It is added once.
            group: of torch.distributed; None: all ranks.
            x_format, x_scale: as linear's.

        Raises:
            ValueError: the bias does not fit the weight.
        """
        super().__init__()
        n = weight.shape[0]
        if bias is not None and tuple(bias.shape) != (n,):
            raise ValueError(
                f"RowParallelLinear: bias has shape {tuple(bias.shape)}, weight {weight.format} has n={n} "
                "(both must match: each rank has all of it)"
            )
        self.local = Linear(weight, x_format=x_format, x_scale=x_scale)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.group = group

    def forward(self, x):
        """(..., n), the same on every rank, of each rank's own x (..., k_rank)."""
        total = self.local(x).float()
        dist.all_reduce(total, group=self.group)
        if self.bias is not None:
            total += self.bias.float()
        return total.to(x.dtype)


def _gathered_sizes(weight, group):
    """How many rows each rank has."""
    own = torch.tensor([weight.shape[0]], device=weight.packed.device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    return torch.cat(found).tolist()


def _gathered(y, sizes, group):
    """All ranks' columns, side by side. They travel in tensors of one size, as not all backends take others."""
    missing = max(sizes) - y.shape[-1]
    mine = torch.nn.functional.pad(y, (0, missing)) if missing else y
    parts = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(parts, mine, group=group)
    return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], -1)
