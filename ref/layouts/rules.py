"""Which layers a config means: the patterns that ecosystems write in ignore lists, targets and overrides."""

import fnmatch
import functools
import re


def by_substring(name, patterns):
    """The first pattern that is part of the layer's name, or None."""
    return next((p for p in patterns if p in name), None)


def by_name_or_re(name, patterns, match=re.match):
    """The first pattern that is the layer's name or, behind "re:", a regular expression that matches it; or None."""
    for pattern in patterns:
        if pattern == name or (pattern.startswith("re:") and match(compiled(pattern[3:]), name)):
            return pattern
    return None


def by_glob(name, patterns):
    """The first glob ("*" crosses dots) that the whole name matches, or None."""
    return next((p for p in patterns if fnmatch.fnmatchcase(name, p)), None)


def dynamic(name, overrides):
    """GPTQ's per-layer overrides: None where a "-:" pattern leaves the layer out, else the dict of the first match, or {}.

    Patterns are regular expressions, matched from the name's start, behind "+:" (or nothing) and "-:".
    """
    for pattern, override in overrides.items():
        kind = pattern[:2] if pattern[:2] in ("+:", "-:") else "+:"
        if re.match(compiled(pattern.removeprefix(kind)), name):
            return None if kind == "-:" else override
    return {}


@functools.cache
def compiled(pattern):
    """The regular expression.

    Raises:
        ValueError: it is none.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None


def strings(value, where):
    """value (None counts as an empty list), if it is a list of strings."""
    if value is None:
        return []
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{where} is {value!r}, expected a list of names")
    return list(value)


def layers(names, keys, parts):
    """{layer: {part: tensor name}} of the layers that have one of the key suffixes; with the tensors of the other suffixes.

    A suffix belongs to a layer behind a dot: "model.up.qweight" is part "qweight" of layer "model.up".

    >>> layers(["a.qweight", "a.scales", "a.bias", "b.weight"], ("qweight",), ("scales",))
    {'a': {'qweight': 'a.qweight', 'scales': 'a.scales'}}
    """
    known = set(names)
    found = {}
    for name in names:
        for key in keys:
            if name.endswith("." + key):
                found.setdefault(name.removesuffix("." + key), None)
    every = (*keys, *parts)
    return {layer: {p: f"{layer}.{p}" for p in every if f"{layer}.{p}" in known} for layer in found}


def by_module(name, patterns):
    """The first of transformers' modules_to_not_convert that means this layer, or None.

    A pattern means a layer whose name it ends, or that it matches as a regular expression from the name's start to a dot or the end.
    """
    for pattern in patterns:
        if name.endswith(pattern) or re.match(compiled(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))"), name):
            return pattern
    return None
