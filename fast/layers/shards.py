"""The shards of one weight (n, k): checked, quantized and sliced as they arrive, joined when all are there; and the slice of one rank."""

import difflib

import torch

from ref.combine import fuse, take_columns, take_rows
from ref.format import parse_format
from ref.qtensor import QTensor, check_parts

from ..quantize import quantize
from .weight import moved

QUANTIZED = {True: "quantized", False: "not quantized"}


class Shards:
    """What has arrived of one weight, one below the other, and what is missing.

    A rank of several that share a weight takes its slice of each shard (axis "n": rows, "k": columns) after the shard is quantized, so
    that scales, and with them all numbers, do not depend on how many ranks there are.
    """

    def __init__(self, name, rows, k, format, *, online=False, rank=0, size=1, axis="n", device=None):
        """
        Args:
            name: of the layer, for messages. rows: {shard: its rows on this rank}. k: columns on this rank.
            format: what plain shards are quantized to, if online; and whose element quantized ones must have. None: all are plain.
            rank, size, axis: which slice is this rank's. device: where shards are moved to, or None for where they are.
        """
        _check_part(name, axis, rank, size)
        self.name, self.rows, self.k, self.online, self.device = name, dict(rows), k, online, device
        self.format = None if format is None else parse_format(format)
        self.rank, self.size, self.axis = rank, size, axis
        # {shard: its QTensor, its plain tensor, or None once joined}, for each kind of tensor.
        self.weights, self.biases = {}, {}

    def add(self, tensor, shard):
        """A shard of the weight: (n, k), QTensor or plain tensor, for all ranks.

        Raises:
            TypeError, ValueError: it is no weight, has arrived before, or does not fit; the message names layer, shard, got and expected.
        """
        where = self._place("weight", shard, self.weights)
        rows = self.rows[shard]
        self._check_shape(where, tensor, (rows * self._of("n"), self.k * self._of("k")))
        if isinstance(tensor, QTensor):
            check_parts(tensor, where)
            if self.format is None or tensor.format.element != self.format.element:
                raise ValueError(f"{where} is {tensor.format}, expected {self.format or 'a plain tensor'}")
        elif tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise TypeError(f"{where} is {tensor.dtype}, expected float16, bfloat16 or float32, or a QTensor")
        quantized, others = isinstance(tensor, QTensor) or self.online, [isinstance(w, QTensor) for w in self.weights.values()]
        if (not quantized) in others:
            raise ValueError(f"{where} is {QUANTIZED[quantized]}, and what arrived before is {QUANTIZED[not quantized]}")
        tensor = self._here(tensor)
        if self.online and not isinstance(tensor, QTensor):
            try:
                tensor = quantize(tensor, self.format)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        self.weights[shard] = self._slice(where, tensor)

    def add_bias(self, tensor, shard):
        """A shard of the bias: (n,), for all ranks. Where columns are sliced, it is rank 0's, so that the ranks' sum has it once."""
        where = self._place("bias", shard, self.biases)
        rows = self.rows[shard]
        self._check_shape(where, tensor, (rows * self._of("n"),))
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{where} is {tensor.dtype}, expected floats")
        tensor = self._here(tensor)
        self.biases[shard] = self._slice(where, tensor) if self.axis == "n" else tensor

    def missing(self, bias):
        """The names of what has not arrived; bias: whether there is to be one."""
        weights = [self._called("weight", shard) for shard in self.rows if shard not in self.weights]
        return weights + [self._called("bias", shard) for shard in self.rows if bias and shard not in self.biases]

    def weight(self):
        """The whole weight of this rank, after which no shard of it is kept here."""
        parts = [self.weights[shard] for shard in self.rows]
        try:
            whole = fuse(parts) if isinstance(parts[0], QTensor) else torch.cat(parts) if len(parts) > 1 else parts[0]
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        self.weights = dict.fromkeys(self.rows)
        return whole

    def bias(self):
        """The bias of this rank, or None; after which no shard of it is kept here."""
        parts = [self.biases[shard] for shard in self.rows] if self.axis == "n" or self.rank == 0 else []
        self.biases = dict.fromkeys(self.rows)
        return torch.cat(parts) if parts else None

    def _of(self, axis):
        """How many slices an axis has."""
        return self.size if axis == self.axis else 1

    def _place(self, what, shard, arrived):
        if shard not in self.rows:
            nearest = difflib.get_close_matches(str(shard), list(map(str, self.rows)), n=1, cutoff=0.0)
            raise ValueError(f"{self.name}: there is no shard {shard!r}; the nearest is {nearest[0]!r}")
        if shard in arrived:
            raise ValueError(f"{self.name}: {self._called(what, shard)} arrived a second time")
        return f"{self.name}: {self._called(what, shard)}"

    def _called(self, what, shard):
        return f"{what} of {shard!r}" if len(self.rows) > 1 else what

    def _check_shape(self, where, tensor, expected):
        if not isinstance(tensor, (QTensor, torch.Tensor)):
            raise TypeError(f"{where} is {type(tensor).__name__}, expected a tensor")
        if tuple(tensor.shape) != expected:
            ranks = f" ({self.size} ranks have {self.axis} together)" if self.size > 1 else ""
            raise ValueError(f"{where} has shape {tuple(tensor.shape)}, expected {expected}{ranks}")

    def _here(self, tensor):
        tensor = tensor if isinstance(tensor, QTensor) else tensor.detach()
        return tensor if self.device is None else moved(tensor, self.device)

    def _slice(self, where, w):
        if self.size == 1:
            return w
        if not isinstance(w, QTensor):
            return w.tensor_split(self.size, "nk".index(self.axis))[self.rank].clone()
        try:
            return shard(w, self.axis, self.rank, self.size)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def shard(q, axis, rank, size):
    """One rank's part of a weight, never requantized: it means what torch.tensor_split(w, size)[rank] along this axis is.

    Sizes may be uneven: the first ranks have one row or column more. Of a fused weight (qkv, gate_up), shard the parts and ref.fuse them.

    Args:
        q: QTensor (..., n, k).
        axis: "n", for ColumnParallelLinear, or "k", for RowParallelLinear.
        rank, size: which part, of how many.

    Returns:
        QTensor (..., n_rank, k) or (..., n, k_rank). Blocks and groups that a border cuts become finer (ref.take_rows, ref.take_columns).

    Raises:
        ValueError: an unknown axis, no such rank, or a border inside of columns that were rotated together.

    >>> import ref
    >>> shard(ref.quantize(torch.ones(8, 384), "int4_g128"), "k", 1, 2)
    QTensor(int4_g64, shape=(8, 192), device=cpu)
    """
    _check_part("shard", axis, rank, size)
    whole, rest = divmod(q.shape[-2 if axis == "n" else -1], size)
    start = rank * whole + min(rank, rest)
    stop = start + whole + (rank < rest)
    return take_rows(q, torch.arange(start, stop)) if axis == "n" else take_columns(q, start, stop)


def _check_part(where, axis, rank, size):
    if axis not in ("n", "k"):
        raise ValueError(f"{where}: unknown axis {axis!r}, expected 'n' or 'k'")
    if not 0 <= rank < size:
        raise ValueError(f"{where}: got rank {rank} of {size}, expected 0 <= rank < size")
