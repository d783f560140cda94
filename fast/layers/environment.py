"""The four environment variables, each read once, when it is first asked for, and by its own name."""

import functools
import os
import warnings

from .config import QuantConfig, read_config

# Our name -> the name by which the seed of this project read it; either may be set.
NAMES = {
    "FAST_ONLINE_QUANT_CONFIG": "VLLM_HUMMING_ONLINE_QUANT_CONFIG",
    "FAST_INPUT_QUANT_CONFIG": "VLLM_HUMMING_INPUT_QUANT_CONFIG",
    "FAST_USE_F16_ACCUM": "VLLM_HUMMING_USE_F16_ACCUM",
    "FAST_MOE_GEMM_TYPE": "VLLM_HUMMING_MOE_GEMM_TYPE",
}
# What fused_experts calls a layout -> the names that scripts may have for it.
GEMM_TYPES = {"indexed": "indexed", "grouped": "grouped_contiguous", "grouped_contiguous": "grouped_contiguous", "auto": "auto"}


def text(name):
    """What a variable is set to, under either of its names; None where it is not set, or empty.

    Raises:
        ValueError: both names are set, and not to the same.
    """
    values = {key: os.environ[key] for key in (name, NAMES[name]) if os.environ.get(key)}
    if len(set(values.values())) > 1:
        raise ValueError(f"{name} and {NAMES[name]} are set to different values: {' and '.join(map(repr, values.values()))}; unset one")
    return next(iter(values.values()), None)


@functools.cache
def quant_config():
    """The QuantConfig of FAST_ONLINE_QUANT_CONFIG and FAST_INPUT_QUANT_CONFIG: JSON, or the path of a JSON file.

    Raises:
        ValueError, FileNotFoundError: as read_config; the message begins with the variable's name.
    """
    found = {}
    for name, argument in (("FAST_ONLINE_QUANT_CONFIG", "value"), ("FAST_INPUT_QUANT_CONFIG", "x")):
        found[argument] = text(name)
        try:
            config = read_config(**{"value": None, argument: found[argument]})
        except (ValueError, FileNotFoundError, NotImplementedError) as error:
            raise type(error)(f"{name}: {error}") from None
        config.check_online(name)
    return read_config(**found)


def given(config, x=None):
    """The QuantConfig that a function was given: as it is, or what read_config makes of it; the environment's where nothing was given.

    Raises:
        ValueError, FileNotFoundError: as read_config and quant_config; an x beside a QuantConfig, which has its own.
    """
    if config is None and x is None:
        return quant_config()
    if not isinstance(config, QuantConfig):
        return read_config(config, x)
    if x is not None:
        raise ValueError("config is a QuantConfig, which has an x of its own, and x was given, too; expected one of them")
    return config


@functools.cache
def f16_accum():
    """FAST_USE_F16_ACCUM: 1 allows float16 sums, which no kernel here makes use of, as a warning says; 0, or not set, does not.

    Raises:
        ValueError: anything else.
    """
    value = text("FAST_USE_F16_ACCUM") or "0"
    known = {"0": False, "1": True, "false": False, "true": True}
    if value.lower() not in known:
        raise ValueError(f"FAST_USE_F16_ACCUM is {value!r}, expected 0 or 1")
    if known[value.lower()]:
        warnings.warn("FAST_USE_F16_ACCUM=1 has no effect: all sums here are float32 or better", stacklevel=2)
    return known[value.lower()]


@functools.cache
def gemm_type():
    """FAST_MOE_GEMM_TYPE: how rows come to their experts, as fused_experts' gemm_type; "auto" where it is not set.

    Raises:
        ValueError: no such type.
    """
    value = text("FAST_MOE_GEMM_TYPE") or "auto"
    if value not in GEMM_TYPES:
        raise ValueError(f"FAST_MOE_GEMM_TYPE is {value!r}, expected one of {', '.join(GEMM_TYPES)}")
    return GEMM_TYPES[value]
