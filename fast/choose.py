"""Which implementation runs a call: the one that it names, the one that FAST_IMPL pins, or else the cheapest that can."""

import difflib
import functools
import os

from . import registry

VARIABLE = "FAST_IMPL"


@functools.cache
def pins():
    """{operation: name} of FAST_IMPL: one name for all operations, as "triton", or names of some, as "linear=triton,grouped=humming".

    Read once, when a weight is first prepared. A name has to be registered by then.

    Raises:
        ValueError: an unknown operation or name, with the nearest right one, an operation twice, or something else altogether.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return {}
    if "=" not in text and "," not in text:
        names = dict.fromkeys(name for table in registry.IMPLEMENTATIONS.values() for name in table)
        return dict.fromkeys(registry.OPERATIONS, _one_of(text, names, "implementation"))
    found = {}
    for part in text.split(","):
        operation, equals, name = (word.strip() for word in part.partition("="))
        if not equals:
            raise ValueError(f"{VARIABLE} is {text!r}, expected a name, or operation=name separated by commas")
        _one_of(operation, registry.OPERATIONS, "operation")
        if operation in found:
            raise ValueError(f"{VARIABLE} is {text!r}, which pins {operation} twice")
        found[operation] = _one_of(name, registry.IMPLEMENTATIONS[operation], f"implementation of {operation}")
    return found


def _one_of(word, legal, what):
    if word not in legal:
        (nearest,) = difflib.get_close_matches(word, legal, n=1, cutoff=0.0)
        raise ValueError(f"{VARIABLE}: there is no {what} {word!r}; the nearest is {nearest!r} (of {', '.join(legal)})")
    return word


def asked_for(operation, impl, where):
    """(the Implementation that is named or pinned, or None; what messages begin with).

    Args:
        impl: what the call names, or None. where: what messages begin with.

    Raises:
        ValueError, NotImplementedError: as registry.find; ValueError: as pins.
    """
    if impl is None:
        impl = pins().get(operation)
        if impl is None:
            return None, where
        where = f"{where}: {VARIABLE}"
    return registry.find(operation, impl, where), where


def plan(operation, impl, request, rows, make, where, call):
    """The plan of the first implementation that can; of one that is asked for, or pinned, or none.

    Args:
        operation: one of registry.OPERATIONS. impl: what the call names, or None. rows: as Implementation.cost has them.
        make: Implementation -> plan; raises NotImplementedError. where, call: for messages: what they begin with, the call in words.

    Raises:
        ValueError, NotImplementedError: it cannot be had. ExceptionGroup: no implementation can.
    """
    asked, where = asked_for(operation, impl, where)
    reasons = []
    for one in [asked] if asked else registry.by_cost(operation, request, rows):
        try:
            return make(one)
        except NotImplementedError as error:
            reasons.append(NotImplementedError(f"{where}: impl {one.name!r} cannot run {call}: {error}"))
    if len(reasons) == 1:
        raise reasons[0]
    raise ExceptionGroup(f"{where}: no implementation can run {call}", reasons)


def once(made, key, make):
    """made[key]: a plan, made now if it is not there. A refusal is kept as its sentence, and raised again."""
    if key not in made:
        try:
            made[key] = make()
        except NotImplementedError as error:
            made[key] = str(error)
    if isinstance(made[key], str):
        raise NotImplementedError(made[key])
    return made[key]
