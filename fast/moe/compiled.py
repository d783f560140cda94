"""What torch.compile sees of a MoE function: one operator."""

import functools

import torch


def compilable(function):
    """The function, which under torch.compile is one node of the graph (fast.moe.ops) and otherwise itself."""
    name = function.__name__

    @functools.wraps(function)
    def called(*args, **kwargs):
        if torch.compiler.is_compiling():
            from . import ops

            return ops.call(name, args, kwargs)
        return function(*args, **kwargs)

    return called
