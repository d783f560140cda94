"""Candidates: what is under test, known by name only."""

import difflib
import importlib
import inspect
import os
import sys
import time


class Candidate:
    """An object with functions of ref's names and signatures; all of them optional.

    It may also have
        IMPLEMENTATIONS: names that its functions take as impl=.
        VARIANTS: {function: names of the variants that it keeps to}, or those of linear alone; of other functions any is accepted.
    """

    def __init__(self, name, target):
        self.name = name
        self.target = target
        self.spent = 0.0  # seconds inside its functions
        self._parameters = {}

    def function(self, name):
        """The function of this name, or None."""
        found = getattr(self.target, name, None)
        return found if callable(found) else None

    @property
    def implementations(self):
        return tuple(getattr(self.target, "IMPLEMENTATIONS", ()))

    def variants(self, function):
        """Names of the variants that a function keeps to, or None: any."""
        declared = getattr(self.target, "VARIANTS", {})
        return declared.get(function) if isinstance(declared, dict) else declared if function == "linear" else None

    def takes(self, function, name):
        """Whether the function has a parameter of this name."""
        if function not in self._parameters:
            try:
                self._parameters[function] = set(inspect.signature(self.function(function)).parameters)
            except (TypeError, ValueError):
                self._parameters[function] = set()
        return name in self._parameters[function]

    def call(self, function, args, kwargs, impl=None):
        """function(*args, **kwargs), with impl where there is one and the function takes it."""
        if impl is not None and self.takes(function, "impl"):
            kwargs = {**kwargs, "impl": impl}
        start = time.perf_counter()
        try:
            return self.function(function)(*args, **kwargs)
        finally:
            self.spent += time.perf_counter() - start


def load(name):
    """The candidate `pkg.mod` or `pkg.mod:attr`.

    Raises:
        ValueError: it cannot be imported, or has no such attribute.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        target = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"candidate: cannot import {module_name!r}: {type(error).__name__}: {error}") from None
    for part in attribute.split(".") if attribute else ():
        if not hasattr(target, part):
            raise ValueError(f"candidate: {module_name!r} has no attribute {attribute!r}{nearest(part, vars(target))}")
        target = getattr(target, part)
    return Candidate(name, target)


def nearest(name, known):
    """'; the nearest is ...' for messages, or nothing."""
    found = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.3)
    return f"; the nearest is {found[0]!r}" if found else ""
