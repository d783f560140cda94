"""Marlin: the tensor-core layout of int4 and int8 weights that GPTQ kernels repack to, as AutoGPTQ stored it."""

import functools

import torch

from ..element import Int
from ..format import Format
from ..pack import pack, unpack
from ..qtensor import QTensor, validate
from . import rules
from .bits import transposed, words
from .check import check_keys, integer, need, one_of, part
from .gptq import SCALES, check_integers, finite, pick
from .recipe import RECIPE

FORMATS = ("int4_g128_fp16", "int8_fp16")

TILE = 16
# Which column the i-th of 64 (by group) or 32 (by row) stored scales is of.
SCALES_BY_GROUP = tuple(i + 8 * j for i in range(8) for j in range(8))
SCALES_BY_ROW = tuple(2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25))
# Which of 4 or 8 codes that lie side by side is a word's i-th field: the kernel's shifts take pairs of 16 bits apart.
FIELDS = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
KEYS = (
    *("quant_method", "method", "bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "is_marlin_format"),
    *("lm_head", "pack_dtype", "dynamic"),
    *RECIPE,
)
WHERE = "marlin: quantization_config"


def find(names, config):
    """{layer: {part: tensor name}}: every layer that has B and s."""
    return rules.layers(names, ("B",), ("s",))


def options(config, layer):
    """{"bits", "group_size" (-1: all of k)} of a layer; None for an lm_head that config.json does not call quantized.

    Raises:
        ValueError: unknown keys or values, asymmetry, activation order.
    """
    check_keys(config, KEYS, WHERE)
    one_of(pick(config, ("quant_method", "method"), "marlin", WHERE), ("marlin", "gptq"), f"{WHERE}: quant_method")
    one_of(pick(config, ("checkpoint_format", "format"), "marlin", WHERE), ("marlin",), f"{WHERE}: checkpoint_format")
    for key, legal in (("sym", (True, None)), ("desc_act", (False, None)), ("dynamic", (None,))):
        one_of(config.get(key), legal, f"{WHERE}: {key}")
    lm_head = one_of(config.get("lm_head") or False, (True, False), f"{WHERE}: lm_head")
    bits = one_of(config.get("bits", 4), (4, 8), f"{WHERE}: bits")
    group_size = pick(config, ("group_size",), -1, WHERE)
    if group_size != -1 or type(group_size) is not int:
        integer(group_size, f"{WHERE}: group_size (-1: all of k)", 1, 2**31 - 1)
    return None if layer.split(".")[-1] == "lm_head" and not lm_head else {"bits": bits, "group_size": group_size}


def read(parts, options):
    """A layer's tensors as a QTensor: w[n, k] = (code - 2^(bits-1)) * scale.

    Args:
        parts: B int32 (k / 16, n * bits / 2): for each 16 x 64 codes (k by n) the order in which 32 lanes hold them; s float16,
            bfloat16 or float32 (groups, n), with the columns in the order of SCALES_BY_GROUP, or SCALES_BY_ROW for one group.
        options: as options returns them.

    Raises:
        ValueError: parts that disagree with one another or with the options.

    Source: AutoGPTQ 0.7.1 qlinear_marlin; vLLM marlin_utils_test for 8 bits.
    """
    bits, group_size = options["bits"], options["group_size"]
    need(parts, "marlin", ("B", "s"))
    s = finite(part(parts, "marlin", "s", tuple(SCALES), (-1, -1)), "marlin: s")
    groups, n = s.shape
    stored = part(parts, "marlin", "B", (torch.int32,), (-1, n * bits // 2), f"(k / 16, n * bits / 2) with n={n} of s, bits={bits}")
    k = len(stored) * TILE
    _check_shape(n, k, group_size)
    if groups != (1 if group_size == -1 else k // group_size):
        raise ValueError(f"marlin: s has {groups} groups, expected k / group_size with k={k}, group_size={group_size}")
    fields = words(stored, bits).view(-1, 4 * TILE * TILE)
    tiles = torch.empty_like(fields)
    tiles[:, _order(bits)] = fields
    # (k / 16, n / 16, 16 of k, 16 of n) -> (n, k)
    codes = tiles.view(k // TILE, n // TILE, TILE, TILE).permute(1, 3, 0, 2).reshape(n, k)
    order = _scale_order(group_size, k, s.device)
    scale = torch.empty_like(s).view(-1, len(order))
    scale[:, order] = s.reshape(-1, len(order))
    fmt = Format(Int(bits), SCALES[s.dtype], (1, 0 if group_size == -1 else group_size))
    return validate(QTensor(fmt, (n, k), pack(codes, bits), transposed(scale.view(groups, n))))


def write(q, bits=None):
    """The tensors of a QTensor: the inverse of read, and what GPTQ-Marlin kernels repack a weight to before they run.

    Args:
        q: (n, k), signed integers of 4 or 8 bits; n a multiple of 64, k of 16; scales by groups that divide k, or by row.
            Not a group_index: the kernels permute x, then.
        bits: the only width that will do; None: either.

    Raises:
        ValueError: another format or shape.
    """
    check_integers(q, "marlin", (4, 8) if bits is None else (bits,))
    n, k = q.shape
    bits, group_size = q.format.element.bits, q.format.group[1] or -1
    if q.zero is not None or q.group_index is not None:
        raise ValueError(
            f"marlin: q has {'zero points' if q.zero is not None else 'a group_index'}, expected symmetric integers with groups in order"
        )
    _check_shape(n, k, group_size)
    codes = unpack(q.packed, bits, k).view(n // TILE, TILE, k // TILE, TILE)
    tiles = codes.permute(2, 0, 3, 1).reshape(-1, 4 * TILE * TILE)
    stored = pack(tiles[:, _order(bits)].view(k // TILE, n * TILE), bits)
    order = _scale_order(group_size, k, q.scale.device)
    s = q.scale.t().reshape(-1, len(order))[:, order]
    return {"B": stored, "s": s.reshape(-1, n).contiguous()}


def config_of(q, bits=None):
    """A quantization_config for a checkpoint whose layers are all like q."""
    return {"quant_method": "marlin", "bits": q.format.element.bits, "group_size": q.format.group[1] or -1, "checkpoint_format": "marlin"}


@functools.cache
def _order(bits):
    """Of four 16 x 16 tiles (row-major, one behind the other) which code is stored where: (1024,).

    Lane l of 32 holds of each tile column l // 4 and the one 8 further on, in rows 2r, 2r + 1, 2r + 8 and 2r + 9 with r = l % 4,
    as the fragments of mma.m16n8k16 have them.
    """
    lanes = torch.arange(32)
    rows = 2 * (lanes % 4)[:, None] + torch.tensor([0, 1, 8, 9])
    places = TILE * rows[:, None, :] + (lanes // 4)[:, None, None] + torch.tensor([0, 8])[:, None]  # (32, 2 columns, 4 rows)
    tiles = places.view(32, 1, 8) + TILE * TILE * torch.arange(4)[:, None]
    return tiles.reshape(-1, len(FIELDS[bits]))[:, list(FIELDS[bits])].flatten()


def _scale_order(group_size, k, device):
    return torch.tensor(SCALES_BY_ROW if group_size in (-1, k) else SCALES_BY_GROUP, device=device)


def _check_shape(n, k, group_size):
    if n % 64 or k % TILE or (group_size != -1 and k % group_size):
        raise ValueError(f"marlin: got n={n}, k={k}, expected multiples of 64 and of {TILE} and of group_size={group_size}")
