"""compressed-tensors' containers: the two packings of odd widths into words, and bytes under a sparsity mask."""

import torch

from ..pack import pack, unpack, words_per_row
from . import bits as bits_of
from .check import need, part
from .compressed_tensors_config import L


def read_words(parts, options):
    """weight_packed of pack-quantized as ref packs codes.

    Up to version 0.17 a word held 32 // bits codes and, for 3, 5, 6 and 7 bits, some idle ones; since 0.18 there are none. The
    width tells which it is. Where both packings have the same width (short rows) the config's version does.

    Returns:
        packed, shape (..., n, k), and "dense" or "padded".
    """
    bits = options["bits"]
    data = part(parts, L, "weight_packed", (torch.int32,))
    shape = part(parts, L, "weight_shape", (torch.int64, torch.int32), (-1,)).tolist()
    if len(shape) not in (2, 3) or min(shape) < 1 or tuple(data.shape[:-1]) != tuple(shape[:-1]):
        raise ValueError(f"{L}: weight_shape is {shape} and weight_packed has shape {tuple(data.shape)}: expected the same rows")
    *lead, n, k = shape
    widths = [("weight_packed", data.shape[-1], k)]
    if packs_zero(options):
        zero = part(parts, L, "weight_zero_point", (torch.int32,), (*lead, -1, -1))
        widths.append(("weight_zero_point", zero.shape[-2], n))
    packing = packing_of(widths, bits, options["packing"])
    packed = data.contiguous() if packing == "dense" else pack(unpack_words(data, bits, k, packing, "weight_packed"), bits)
    return packed, tuple(shape), packing


def packs_zero(options):
    """Whether zero points are packed as weights are: in pack-quantized, by channel or group."""
    return options["format"] == "pack-quantized" and not options["symmetric"] and options["strategy"] in ("channel", "group")


def packing_of(widths, bits, said):
    """ "dense" or "padded", from (name, words, codes) of what is packed; said: what the config's version says, or None."""
    fits = {"dense", "padded"}
    for name, width, count in widths:
        words = {"dense": words_per_row(count, bits), "padded": -(-count // (32 // bits))}
        fits &= {kind for kind in words if words[kind] == width}
        if not fits:
            raise ValueError(
                f"{L}: {name} has {width} words for {count} codes of {bits} bits, expected {words['dense']} (dense, as of version "
                f"0.18) or {words['padded']} ({32 // bits} codes a word, before), and the same packing in all parts"
            )
    # Both packings are the same bits where widths divide a word, and in a first word that holds all codes.
    if len(fits) == 2 and any(count > 32 // bits for _, _, count in widths) and 32 % bits:
        if said is None:
            raise ValueError(f"{L}: weight_packed fits both packings of {bits} bits, and the config has no version that tells which it is")
        return said
    return "dense" if "dense" in fits else "padded"


def unpack_words(data, bits, count, packing, name):
    """The `count` codes along the last axis, uint8; bits behind them must be zero."""
    if packing == "dense":
        codes, idle = unpack(data, bits, count), count * bits % 32
        if idle and bool((data[..., -1].long() & 0xFFFFFFFF >= 1 << idle).any()):
            raise ValueError(f"{L}: {name} has bits set behind the last of {count} codes")
        return codes
    codes, used = bits_of.words(data, bits), 32 // bits * bits
    if bool((codes[..., count:] != 0).any()) or (used < 32 and bool((data >> used & (2 ** (32 - used) - 1) != 0).any())):
        raise ValueError(f"{L}: {name} has bits set behind the codes ({32 // bits} of {bits} bits in a word, {count} in all)")
    return codes[..., :count]


def pack_words(codes, bits, packing):
    """The inverse of unpack_words: int32 words."""
    if packing == "dense":
        return pack(codes, bits)
    return bits_of.join_words(torch.nn.functional.pad(codes, (0, -codes.shape[-1] % (32 // bits))), bits)


def dense(parts):
    """The weight (n, k) that compressed, bitmask, shape (and row_offsets) hold, in their dtype.

    bitmask is uint8 (n, ceil(k / 8)), lowest bit first; compressed holds what belongs where a bit is set, row by row: (n, k / 2)
    with two of each four for sparse-24-bitmask, flat for sparse-bitmask, whose row_offsets say where each row begins.

    Source: compressed_tensors 0.10.2, compressors/sparse_compressors.
    """
    need(parts, L, ("compressed", "bitmask", "shape"), tuple(set(parts) - {"weight", "weight_packed"}))
    shape = part(parts, L, "shape", (torch.int64, torch.int32)).flatten().tolist()
    bitmask = part(parts, L, "bitmask", (torch.uint8,), (-1, -1))
    if len(shape) != 2 or min(shape) < 1 or tuple(bitmask.shape) != (shape[0], -(-shape[1] // 8)):
        raise ValueError(f"{L}: shape is {shape} and bitmask has shape {tuple(bitmask.shape)}, expected (n, ceil(k / 8)) of n, k")
    n, k = shape
    values = part(parts, L, "compressed", (torch.float8_e4m3fn, torch.int8, torch.float32, torch.float16, torch.bfloat16))
    mask = bits_of.stream(bitmask, 1, k).bool()
    if "row_offsets" in parts:
        counts = mask.sum(-1)
        offsets = part(parts, L, "row_offsets", (torch.int64, torch.int32), (n,), "one for each row")
        if not torch.equal(offsets.long(), counts.cumsum(0) - counts):
            raise ValueError(f"{L}: row_offsets disagree with the bits set in bitmask")
        part(parts, L, "compressed", (values.dtype,), (int(counts.sum()),), "the number of bits set in bitmask")
    else:
        if k % 4 or bool((mask.unflatten(-1, (-1, 4)).sum(-1) != 2).any()):
            raise ValueError(f"{L}: bitmask does not have two bits set of each four along k={k}, as 2:4 sparsity has")
        part(parts, L, "compressed", (values.dtype,), (n, k // 2), "half of k")
    raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.element_size()]
    whole = torch.zeros(n, k, dtype=raw, device=values.device)
    whole[mask] = values.contiguous().view(raw).flatten()
    return whole.view(values.dtype)


def wrap(weight, sparse):
    """The inverse of dense for a weight of bytes: {part: tensor}.

    Args:
        sparse: "sparse-24-bitmask" (two of each four are stored: those that are not zero, then the first zeros) or "sparse-bitmask".

    Raises:
        ValueError: a weight that is not 2:4 sparse.
    """
    n, k = weight.shape
    raw = weight.view(torch.uint8)
    mask = raw != 0
    if sparse == "sparse-bitmask":
        counts = mask.sum(-1)
        parts = {"compressed": raw[mask], "shape": torch.tensor([n, k]), "row_offsets": counts.cumsum(0) - counts}
    else:
        fours = None if k % 4 else mask.unflatten(-1, (-1, 4))
        if fours is None or bool((fours.sum(-1) > 2).any()):
            raise ValueError(f"{L}: weight is not 2:4 sparse along k={k}: of each four neighbours at least two must be zero")
        order = torch.argsort(fours.to(torch.uint8), dim=-1, descending=True, stable=True)
        mask = torch.zeros_like(fours).scatter(-1, order[..., :2], True).flatten(-2)
        parts = {"compressed": raw[mask].reshape(n, k // 2), "shape": torch.tensor([[n], [k]])}
    return parts | {"compressed": parts["compressed"].view(weight.dtype), "bitmask": bits_of.join_stream(mask.to(torch.uint8), 1)}
