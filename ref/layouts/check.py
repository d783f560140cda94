"""Refusals that every layout shares: unknown keys, wrong values, missing parts, shapes and dtypes."""

import difflib

import torch


def check_keys(config, known, where):
    """Refuse what is no dict, and keys that nobody knows.

    Args:
        where: what the message begins with, as "gptq: quantization_config".
    """
    if not isinstance(config, dict):
        raise ValueError(f"{where} is {type(config).__name__}, expected a dict")
    for key in config:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise ValueError(f"{where} has the unknown key {key!r}; the nearest known one is {nearest[0]!r}")


def one_of(value, legal, where):
    """value, if it is one of legal, of the same type (True is no 1)."""
    for v in legal:
        if type(v) is type(value) and v == value:
            return value
    raise ValueError(f"{where} is {value!r}, expected one of {', '.join(map(repr, legal))}")


def integer(value, where, low, high):
    """value, if it is an int from low to high."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{where} is {value!r}, expected an integer from {low} to {high}")
    return value


def need(parts, layout, required, optional=()):
    """Refuse parts that lack a required tensor, or have one that the layout does not know."""
    missing = [name for name in required if parts.get(name) is None]
    if missing:
        raise ValueError(f"{layout}: {missing[0]} is missing (there is {', '.join(sorted(parts)) or 'nothing'})")
    unknown = sorted(set(parts) - set(required) - set(optional))
    if unknown:
        raise ValueError(f"{layout}: unexpected tensor {unknown[0]}, expected {', '.join((*required, *optional))}")


def part(parts, layout, name, dtypes, shape=None, why=""):
    """parts[name], if it is a tensor of one of the dtypes and of this shape (None: any; -1: any size of that axis)."""
    tensor = parts[name]
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in dtypes:
        got = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"{layout}: {name} has dtype {got}, expected {' or '.join(str(d) for d in dtypes)}")
    fits = shape is None or (len(tensor.shape) == len(shape) and all(e in (-1, g) for g, e in zip(tensor.shape, shape, strict=True)))
    if not fits:
        expected = "(" + ", ".join("any" if e == -1 else str(e) for e in shape) + ("," if len(shape) == 1 else "") + ")"
        raise ValueError(f"{layout}: {name} has shape {tuple(tensor.shape)}, expected {expected}{' ' if why else ''}{why}")
    return tensor
