"""The two workspaces of a layer: what a stage reads lies in one of them, what it writes in the other."""

import torch


class Workspaces:
    """Memory for a chain of intermediate results, each (rows, columns), of which neighbours never share any.

    Every second result begins where the one before the last began. All sizes are known from shapes, so nothing waits for data, and in a
    CUDA graph the memory is the graph's.

    >>> spaces = Workspaces(torch.empty(0), 4, (6, 3, 5))
    >>> [tuple(spaces[i].shape) for i in range(3)], spaces[0].data_ptr() == spaces[2].data_ptr() != spaces[1].data_ptr()
    ([(4, 6), (4, 3), (4, 5)], True)
    """

    def __init__(self, like, rows, columns):
        """
        Args:
            like: a tensor of the results' dtype and device. rows: of every result. columns: of each, in the order of the chain.
        """
        self.rows, self.columns = rows, columns
        self.spaces = [allocate(like, rows * max(columns[i::2], default=0)) for i in (0, 1)]

    def __getitem__(self, stage):
        """The result of a stage: (rows, columns), contiguous; nothing is said of what is in it."""
        size = self.rows * self.columns[stage]
        return self.spaces[stage % 2][:size].view(self.rows, self.columns[stage])


def allocate(like, size):
    return torch.empty(size, dtype=like.dtype, device=like.device)
