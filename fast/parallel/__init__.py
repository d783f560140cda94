"""Layers that are spread over several devices: linear layers' rows or columns (tensor), experts (experts); torch.distributed communicates.

`python -m fast.parallel.check` tries all of it on several CPU processes or GPUs.
"""

from ..layers.shards import shard
from .experts import ExpertParallel, take_experts
from .tensor import ColumnParallelLinear, RowParallelLinear

__all__ = ["ColumnParallelLinear", "ExpertParallel", "RowParallelLinear", "shard", "take_experts"]
