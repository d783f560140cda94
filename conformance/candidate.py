"""Candidates: what is under test, known by name only."""

import difflib
import importlib
import inspect
import mmap
import os
import sys
import time
from dataclasses import dataclass, fields

from .accumulators import parse_accumulator
from .declaration import Declaration

# How often this process has forked.
forks = [0]
os.register_at_fork(after_in_parent=lambda: forks.__setitem__(0, forks[0] + 1))


class Watch:
    """What is told of each call: nothing. A worker process tells its parent. user: a KeyboardInterrupt comes from the user."""

    user = True

    def about(self, impl, case):
        """The next calls are those of a case."""

    def call(self):
        """A call begins."""

    def rest(self):
        """No call runs."""

    def lost(self, reason):
        """This process is of no use any more."""


watch = Watch()


class Candidate:
    """An object with functions of ref's names and signatures; all of them optional.

    It may also have
        IMPLEMENTATIONS: names that its functions take as impl=.
        DECLARATIONS: {function or (function, impl): {field of Declaration: value}}: what it is held to.
        VARIANTS: {function: names of the variants that it keeps to}, or those of linear alone; of other functions any is accepted.
    """

    def __init__(self, name, target):
        self.name = name
        self.target = target
        self.spent = 0.0  # seconds inside its functions
        self.forked = False  # the last call forked, and returned in both processes
        self._parameters = {}
        self._process = os.getpid()
        self._returned_twice = mmap.mmap(-1, 1)  # shared with what the candidate forks

    def function(self, name):
        """The function of this name, or None."""
        found = getattr(self.target, name, None)
        return found if callable(found) else None

    @property
    def implementations(self):
        return tuple(getattr(self.target, "IMPLEMENTATIONS", ()))

    def declared(self, function, impl=None):
        """Declaration of a function: what is said of it, overridden by what is said of it and impl.

        Raises:
            ValueError: DECLARATIONS is not as it should be.
        """
        known = getattr(self.target, "DECLARATIONS", {})
        if not isinstance(known, dict):
            raise ValueError(f"candidate: DECLARATIONS of {self.name} is a {type(known).__name__}, expected a dict")
        older = self.variants(function)
        said = {} if older is None else {"variants": older}
        for key in (function, (function, impl)):
            said |= _fields(self.name, key, known.get(key, {}))
        return Declaration(**{name: tuple(value) if isinstance(value, list) else value for name, value in said.items()})

    def check_declarations(self, functions):
        """Raises:
        ValueError: DECLARATIONS is not as it should be, or of a function that is none of `functions`.
        """
        self.declared("")
        for key in getattr(self.target, "DECLARATIONS", {}):
            function, impl = key if isinstance(key, tuple) and len(key) == 2 else (key, None)
            if function not in functions:
                raise ValueError(f"candidate: {self.name} declares {key!r}, of no function{nearest(function, functions)}")
            self.declared(function, impl)

    def variants(self, function):
        """Names of the variants that a function keeps to, or None: any."""
        declared = getattr(self.target, "VARIANTS", {})
        return declared.get(function) if isinstance(declared, dict) else declared if function == "linear" else None

    def takes(self, function, name):
        """Whether the function has a parameter of this name."""
        return name in self.parameters(function)

    def parameters(self, function):
        """The names of a function's parameters, as far as it tells."""
        if function not in self._parameters:
            try:
                self._parameters[function] = tuple(inspect.signature(self.function(function)).parameters)
            except Exception:
                self._parameters[function] = ()
        return self._parameters[function]

    def call(self, function, args, kwargs, impl=None):
        """function(*args, **kwargs), with impl where there is one and the function takes it.

        Raises:
            Exception: what the function raised; of the same name and with a text, where the original has none or is no Exception.
        """
        if impl is not None and self.takes(function, "impl"):
            kwargs = {**kwargs, "impl": impl}
        called, forked, start = self.function(function), forks[0], time.perf_counter()
        watch.call()
        try:
            return called(*args, **kwargs)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and watch.user:
                raise
            raise presentable(error) from None
        finally:
            if os.getpid() != self._process:
                self._returned_twice[0] = 1
                os._exit(0)
            self.spent += time.perf_counter() - start
            if forks[0] > forked:
                self._look_for_the_other()

    def _look_for_the_other(self):
        """A forked process may do as it likes, but for returning from the call; give it time to."""
        until = time.monotonic() + 0.3
        while not self._returned_twice[0] and time.monotonic() < until:
            time.sleep(0.01)
        self.forked = bool(self._returned_twice[0])
        self._returned_twice[0] = 0


@dataclass(frozen=True)
class Description:
    """What has to be known of a candidate before it is run. functions: the parameters of each that it has.

    formats: those that it is to be tried with, where it says so by a FORMATS of its own; else none.
    """

    functions: dict
    implementations: tuple
    formats: tuple = ()


def describe(candidate, functions):
    """Description of a candidate; functions: the names that matter.

    Raises:
        ValueError: DECLARATIONS is not as it should be.
    """
    candidate.check_declarations(functions)
    found = {name: candidate.parameters(name) for name in functions if candidate.function(name) is not None}
    return Description(found, tuple(map(str, candidate.implementations)), tuple(map(str, getattr(candidate.target, "FORMATS", ()))))


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
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ValueError(f"candidate: cannot import {module_name!r}: {type(error).__name__}: {text(error)}") from None
    for part in attribute.split(".") if attribute else ():
        if not hasattr(target, part):
            raise ValueError(f"candidate: {module_name!r} has no attribute {attribute!r}{nearest(part, dir(target))}")
        target = getattr(target, part)
    return Candidate(name, target)


def nearest(name, known):
    """'; the nearest is ...' for messages, or nothing."""
    found = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.3)
    return f"; the nearest is {found[0]!r}" if found else ""


def text(error):
    """str(error), or why there is none."""
    try:
        return str(error)
    except Exception as another:
        return f"its text raises {type(another).__name__}"


def presentable(error):
    """An Exception to show: the error itself, or one of the same name and text where it is none or cannot be printed."""
    try:
        str(error), repr(error)
        if isinstance(error, Exception):
            return error
    except Exception:
        if isinstance(error, NotImplementedError):
            return NotImplementedError(text(error))
    return type(type(error).__name__, (Exception,), {})(text(error))


# Of what type each field of a declaration is, and in words; accumulator has a reader of its own.
TYPES = {
    "variants": ((tuple, list), "names of variants, in a tuple"),
    "deterministic": (bool, "True or False"),
    "batch_invariant": (bool, "True or False"),
    "formats": ((tuple, list), "names of formats, in a tuple"),
}
NAMES = [field.name for field in fields(Declaration)]


def _fields(candidate, key, said):
    where = f"candidate: DECLARATIONS of {candidate}, {key!r}"
    if not isinstance(said, dict):
        raise ValueError(f"{where}: {said!r} is a {type(said).__name__}, expected a dict")
    for name, value in said.items():
        if name not in NAMES:
            raise ValueError(f"{where}: unknown field {name!r}, expected one of {', '.join(NAMES)}{nearest(name, NAMES)}")
        types, words = TYPES.get(name, (object, ""))
        strange = isinstance(value, (tuple, list)) and name in TYPES and not all(isinstance(part, str) for part in value)
        if strange or not (value is None or isinstance(value, types)):
            raise ValueError(f"{where}: {name} is {value!r}, expected {words}")
    try:
        return {
            name: parse_accumulator(value) if name == "accumulator" else value
            for name, value in said.items()
            if value is not None or getattr(Declaration, name) is None
        }
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
