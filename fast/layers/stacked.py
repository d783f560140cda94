"""The shards of a stack of experts (e, n, k), each expert written to its place as soon as its shards are there."""

from ref.combine import take_rows
from ref.qtensor import TENSORS, QTensor

from .shards import Shards


class Stacked:
    """One stack (e, n, k) of two, and its biases, which experts are written to as soon as they are whole."""

    def __init__(self, name, experts, order, rows, k, format, **options):
        """
        Args:
            order: of an expert's rows, where it is not that of the shards. The rest: as Shards.
        """
        self.name, self.order, self.rows, self.weight, self.bias = name, order, rows, None, None
        self.shards = [Shards(f"{name}: expert {e}", rows, k, format, **options) for e in range(experts)]

    def add(self, tensor, expert, shard):
        shards = self._of(expert)
        shards.add(tensor, shard)
        if len(shards.weights) == len(self.rows):
            self.weight = _written(
                f"{self.name}: expert {expert}", self.weight, len(self.shards), expert, _ordered(shards.weight(), self.order)
            )

    def add_bias(self, tensor, expert, shard):
        shards = self._of(expert)
        shards.add_bias(tensor, shard)
        if len(shards.biases) == len(self.rows) and (bias := shards.bias()) is not None:
            self.bias = _written(f"{self.name}: expert {expert}", self.bias, len(self.shards), expert, _ordered(bias, self.order))

    def missing(self, bias):
        return [f"{what} of expert {e}" for e, shards in enumerate(self.shards) for what in shards.missing(bias)]

    def _of(self, expert):
        if not 0 <= expert < len(self.shards):
            raise ValueError(f"{self.name}: there is no expert {expert}, expected 0 to {len(self.shards) - 1}")
        return self.shards[expert]


def _ordered(w, order):
    if order is None:
        return w
    return take_rows(w, order) if isinstance(w, QTensor) else w[order.to(w.device)]


def _written(where, stack, experts, expert, w):
    """The stack with one expert written to its place; the first makes the stack."""

    def described(t):
        return (t.format, t.group_index is None) if isinstance(t, QTensor) else t.dtype

    parts = {name: getattr(w, name) for name in TENSORS if getattr(w, name) is not None} if isinstance(w, QTensor) else {"": w}
    if stack is None:
        made = {name: part.new_empty(experts, *part.shape) for name, part in parts.items()}
        stack = QTensor(w.format, (experts, *w.shape), **made) if isinstance(w, QTensor) else made[""]
    elif described(stack) != described(w):
        raise ValueError(f"{where} is {_called(w)}, and the experts before are {_called(stack)} (all must match)")
    for name, part in parts.items():
        (getattr(stack, name) if name else stack)[expert].copy_(part)
    return stack


def _called(w):
    return f"{w.format}{'' if w.group_index is None else ' with a group_index'}" if isinstance(w, QTensor) else str(w.dtype)
