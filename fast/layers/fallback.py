"""Which format the activations of a layer get on a device: the one that was asked for, or the next that the device multiplies."""

import functools
import math
import warnings
from dataclasses import replace

import torch

from ref.element import Int, parse_element, value_list
from ref.format import parse_format

from .input_config import TENSOR, TOKEN

INT8, INT4, E4M3, E5M2, E3M4, E2M1, E0M3 = map(parse_element, ("int8", "int4", "e4m3", "e5m2", "e3m4fn", "e2m1", "e0m3"))
# The elements that NVIDIA's tensor cores multiply -> the compute capability from which on they do.
TENSOR_CORES = {
    INT8: 75,
    INT4: 75,
    E4M3: 89,
    E5M2: 89,
    E3M4: 100,
    E2M1: 100,
    E0M3: 100,
    parse_element("e2m3"): 100,
    parse_element("e3m2"): 100,
}
# What takes an element's place, best first; after all of them x as it is.
ORDER = {
    E5M2: (E4M3, E3M4, INT8),
    E4M3: (E3M4, INT8),
    E3M4: (E4M3, INT8),
    E2M1: (E4M3, E3M4, INT8),
    E0M3: (INT4, E4M3, E3M4, INT8),
    INT8: (E4M3, E3M4),
    INT4: (E0M3, INT8, E4M3, E3M4),
}
# Powers of two that weights may be taken times, to be numbers of an element.
SHIFTS = range(-3, 4)


def choose(x_format, static, weight, capability, x_dtype=torch.bfloat16, allow_fallback=False):
    """The format of activations that a device multiplies with a weight.

    fast runs every pair everywhere, some in wider products; a pair is compatible where nothing is lost by that: where the tensor cores have
    x's element, and an element of its kind and width that every weight is exact in, before scaling and up to one power of two. Integers
    between theirs (int5) count as the next wider one. How scales are grouped does not matter.

    Without allow_fallback a compatible format is kept as it is. With it, an 8-bit one gets scales by token (a static one keeps its own; MX
    stays from 12.0 on), since sums are then scaled once; any other is kept. Where it is not compatible, or deprecated (int4 from 9.0
    on, int8 on 10.3 to 10.9), the first of ORDER that is compatible takes its place, by token, or from 12.0 on as MX where it is an 8-bit float
    and the weight's scales are by channel or MX; in the end None.

    Args:
        x_format: a format name or a Format, or None: x as it is. static: its scale comes with the model.
        weight: likewise, a format. capability: of an NVIDIA GPU, as 90; None: of any other device, where all is kept.
        x_dtype: of x.

    Returns:
        (Format or None, static).

    Raises:
        ValueError: not compatible, and nothing may take its place, or nothing can; the message names what would work.

    Source: vLLM, check_and_fallback_input_schema; humming-kernels 0.1.19, is_humming_schema_compatible.

    >>> fmt, static = choose("nvfp4", True, "int4_g128", 90, allow_fallback=True)
    >>> str(fmt), static
    ('fp8', False)
    """
    x_format, weight = x_format and parse_format(x_format), parse_format(weight)
    if capability is None:
        return x_format, static
    reason, deprecated = _why_not(x_format, weight, capability, x_dtype), _deprecated(x_format, capability)
    if reason is None and (x_format is None or not allow_fallback):
        if deprecated:
            warnings.warn(f"activations in {x_format.element} are deprecated on compute capability {_name(capability)}", stacklevel=2)
        return x_format, static
    if reason is None and not deprecated:
        return _by_token(x_format, static, capability)
    found = [fmt for fmt in _candidates(x_format, weight, capability) if _why_not(fmt, weight, capability, x_dtype) is None]
    if found and allow_fallback:
        return found[0], False
    works = " or ".join("none" if fmt is None else str(fmt.element) for fmt in found)
    asked = x_format or str(x_dtype).removeprefix("torch.")
    raise ValueError(
        f"activations in {asked} do not go with weights in {weight} on compute capability {_name(capability)}: {reason}; "
        + (f"{works} would work (allow_fallback true takes the first)" if works else "nothing works")
    )


def on_device(config, device, x_dtype, weight=None):
    """A LayerConfig with the activations that the device multiplies.

    Args:
        config: LayerConfig. device: of the layer. x_dtype: of its input.
        weight: the Format of the weight where config.weight is None: as the checkpoint stores it.

    Raises:
        ValueError: as choose.
    """
    device = torch.device(device)
    capability = None
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        capability = 10 * major + minor
    x_format, static = choose(config.x_format, config.static, config.weight or weight, capability, x_dtype, config.allow_fallback)
    return replace(config, x_format=x_format, static=static)


def _by_token(x_format, static, capability):
    """A compatible format, with one scale for each token, or for all where that is static, if it has 8 bits."""
    if x_format.element.bits != 8 or (capability >= 120 and _mx(x_format)):
        return x_format, static
    kept = static and x_format.group == TENSOR
    return replace(x_format, scale="fp32", group=TENSOR if kept else TOKEN, scale_2=None), kept


def _candidates(x_format, weight, capability):
    """What may take the place of a format, best first."""
    for element in () if x_format is None else ORDER.get(x_format.element, ()):
        mx = capability >= 120 and element in (E4M3, E3M4) and (weight.group[1] == 0 or _mx(weight))
        scale, group = ("e8m0", (1, 32)) if mx else ("fp32", TOKEN)
        fmt = replace(x_format, element=element, scale=scale, group=group, scale_2=None)
        if not _deprecated(fmt, capability):
            yield fmt
    yield None


def _why_not(x_format, weight, capability, x_dtype):
    """Why a pair is not compatible, as a sentence; None if it is."""
    if x_format is None:
        least = 80 if x_dtype == torch.bfloat16 else 75
        name = str(x_dtype).removeprefix("torch.")
        return None if capability >= least else f"{name} is multiplied from {_name(least)} on, and float16 from 7.5 on"
    element = _operand(x_format.element)
    if element is None:
        return f"no tensor core multiplies {x_format.element}"
    if capability < TENSOR_CORES[element]:
        return f"{element} is multiplied from {_name(TENSOR_CORES[element])} on"
    partners = [p for p in TENSOR_CORES if type(p) is type(element) and p.bits == element.bits and capability >= TENSOR_CORES[p]]
    values = _weight_values(weight)
    if values is None:
        return "the weights have offsets or zero points that are floats"
    if not any(_exact(values, partner) for partner in partners):
        return f"the weights are not exact in {' or '.join(map(str, partners))}"
    return None


def _operand(element):
    """The element that the tensor cores multiply for x's: itself, or for integers the next wider; None: there is none."""
    if isinstance(element, Int) and element.signed and element not in TENSOR_CORES:
        return INT4 if element.bits < 4 else INT8
    return element if element in TENSOR_CORES else None


@functools.cache
def _weight_values(weight):
    """Every number that a code less its zero point may be; None where that may be any."""
    if weight.zero not in (None, "int") or weight.offset is not None:
        return None
    values = {v for v in value_list(weight.element) if math.isfinite(v)}
    zeros = range(2**weight.element.bits) if weight.zero else (0,)
    return frozenset(v - zero for v in values for zero in zeros)


@functools.cache
def _exact(values, element):
    """Whether all values are numbers of the element, up to one power of two."""
    numbers = {v for v in value_list(element) if math.isfinite(v)}
    return any(all(v * 2.0**shift in numbers for v in values) for shift in SHIFTS)


def _deprecated(fmt, capability):
    if fmt is None:
        return False
    return (fmt.element == INT4 and capability >= 90) or (fmt.element == INT8 and 103 <= capability < 110)


def _mx(fmt):
    return fmt.scale == "e8m0" and fmt.group == (1, 32)


def _name(capability):
    return f"{capability // 10}.{capability % 10}"
