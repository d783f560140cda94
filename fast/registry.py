"""The implementations that there are, as values in one table: what each is called, where it is, what it costs. Anybody can add one."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from . import preference


@dataclass(frozen=True)
class Implementation:
    """One way to run an operation.

    name: as impl= and FAST_IMPL take it.
    operation: "linear", or "grouped": the products of experts' weights (grouped_linear, masked_linear, indexed_linear, fused_experts).
    module: its dotted name, imported when it is first asked for. It has why_not(request), a sentence or None, and prepare, which may refuse
        the weight's values, or what it needs of the machine, by NotImplementedError:
        linear: prepare(q, request) -> a plan with run(x, bias, x_scale, out), x (m, k), its columns adjacent;
        grouped: prepare(w, request, bias) -> a plan as fast.moe.blocks.ByBlocks describes it; bias: what all its calls bring, or None.
    cost: (request, rows) -> a number, the time that the Triton kernels take being 1; the cheapest that can is taken. rows: of x, or of one
        expert, rounded up to the interval for which plans are made.
    devices: types of the devices where it is tried unasked, as ("cuda",); None: everywhere. By its name it may be asked for on any.
    as_is: linear takes a weight's rotation and its group index as they are; otherwise x takes them over (fast.rearrange).
    """

    name: str
    operation: str
    module: str
    cost: Callable
    devices: tuple | None = None
    as_is: bool = False


GPU = ("cuda",)
OWN = (
    Implementation("torch", "linear", "fast.eager", preference.torch, as_is=True),
    Implementation("triton", "linear", "fast.triton", preference.triton, GPU),
    Implementation("humming", "linear", "fast.humming", preference.humming, GPU),
    Implementation("cublas", "linear", "fast.cublas", preference.cublas, GPU),
    Implementation("torch", "grouped", "fast.moe.grouped_eager", preference.torch),
    Implementation("triton", "grouped", "fast.triton.grouped", preference.triton, GPU),
    Implementation("humming", "grouped", "fast.humming.grouped", preference.humming_grouped, GPU),
)
OPERATIONS = ("linear", "grouped")
# {operation: {name: Implementation}}: all that is registered.
IMPLEMENTATIONS = {operation: {one.name: one for one in OWN if one.operation == operation} for operation in OPERATIONS}


def register(implementation):
    """Add an implementation: impl= takes its name, and where nothing is named it is chosen by its cost.

    Weights that are prepared already keep what they have.

    Args:
        implementation: Implementation.

    Raises:
        TypeError, ValueError: no Implementation, an operation that there is not, or a name that is taken or no word.

    >>> mine = Implementation("mine", "linear", "mypackage.kernels", lambda request, rows: 0.5, devices=("cuda",))
    >>> register(mine)
    >>> unregister(mine)
    """
    if not isinstance(implementation, Implementation):
        raise TypeError(f"register: got {type(implementation).__name__}, expected an Implementation")
    name, operation, devices = implementation.name, implementation.operation, implementation.devices
    if operation not in OPERATIONS:
        raise ValueError(f"register: operation of {name!r} is {operation!r}, expected one of {', '.join(map(repr, OPERATIONS))}")
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"register: name is {name!r}, expected a word of letters, digits and underscores")
    if name in IMPLEMENTATIONS[operation]:
        raise ValueError(f"register: {operation} has an implementation {name!r} already ({IMPLEMENTATIONS[operation][name].module})")
    if not callable(implementation.cost):
        raise TypeError(f"register: cost of {name!r} is {implementation.cost!r}, expected a function (request, rows) -> number")
    if devices is not None and not isinstance(devices, tuple):
        raise TypeError(f"register: devices of {name!r} are {devices!r}, expected a tuple of types of devices, or None for all")
    IMPLEMENTATIONS[operation][name] = implementation


def unregister(implementation):
    """Take an implementation out again; weights that it has prepared keep their plans.

    Raises:
        ValueError: it is not registered.
    """
    if implementation not in (one for table in IMPLEMENTATIONS.values() for one in table.values()):
        raise ValueError(f"unregister: {implementation!r} is not registered")
    del IMPLEMENTATIONS[implementation.operation][implementation.name]


def find(operation, name, where=None):
    """The Implementation of a name.

    Args:
        operation: one of OPERATIONS. where: what messages begin with, if it is not the operation.

    Raises:
        ValueError: there is none of this name. NotImplementedError: there is, but of another operation.
    """
    if name not in IMPLEMENTATIONS[operation]:
        where, legal = where or operation, f"expected one of {', '.join(IMPLEMENTATIONS[operation])}"
        if is_known(name):
            raise NotImplementedError(f"{where}: there is no impl {name!r} of it; {legal}")
        raise ValueError(f"{where}: unknown impl {name!r}, {legal}")
    return IMPLEMENTATIONS[operation][name]


def is_known(name):
    """Whether any operation has an implementation of this name."""
    return any(name in table for table in IMPLEMENTATIONS.values())


def module_of(implementation):
    """Its module, imported if need be."""
    return importlib.import_module(implementation.module)


def runs_unasked(implementation, device):
    """Whether it is tried on such a device where nothing is named."""
    return implementation.devices is None or device.type in implementation.devices


def by_cost(operation, request, rows):
    """The implementations that are tried unasked, the cheapest first; of equal ones, the first that was registered."""
    ones = [one for one in IMPLEMENTATIONS[operation].values() if runs_unasked(one, request.device)]
    return sorted(ones, key=lambda one: one.cost(request, rows))
