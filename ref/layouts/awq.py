"""AWQ checkpoints: AutoAWQ's GEMM, GEMV and GEMV-fast layouts, and AutoRound's wider GEMM."""

import torch

from ..element import Int
from ..format import Format
from ..pack import pack, unpack, words_per_row
from ..qtensor import QTensor, check_parts, validate
from . import marlin, rules
from .bits import transposed
from .check import check_keys, integer, need, one_of, part
from .gptq import SCALES, check_integers, finite, pick
from .recipe import RECIPE

FORMATS = ("uint4z_g128_fp16", "int4_g128_fp16", "uint4_g128_fp16_ofp16", "uint6z_g128_fp16")

# GEMM: in each run of 8 columns the i-th field is column ORDER[i].
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# GEMV-fast: of each run of 32 along k the i-th place has this one. First 4 x 4 pairs are transposed, then 4 pairs in each 8.
FAST_ORDER = torch.arange(32).reshape(4, 4, 2).transpose(0, 1).reshape(4, 4, 2).transpose(1, 2).reshape(32)

# version in config.json -> the layout of its tensors. The ExLlama and IPEX kernels load GEMM's and convert it.
VERSIONS = {
    "gemm": "gemm",
    "exllama": "gemm",
    "exllamav2": "gemm",
    "ipex": "gemm",
    "gemv": "gemv",
    "gemv_fast": "gemv_fast",
    "marlin": "marlin",
}
KEYS = (
    *("quant_method", "method", "bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "format"),
    *("checkpoint_format", "backend", "modules_to_not_convert", "sym", "desc_act", "pack_dtype", "lm_head", "dynamic", "do_fuse"),
    *("modules_to_fuse", "fuse_max_seq_len", "modules_in_block_to_quantize"),
    *RECIPE,
)
WHERE = "awq: quantization_config"


def find(names, config):
    """{layer: {part: tensor name}}: every layer that has qweight."""
    return rules.layers(names, ("qweight",), ("qzeros", "scales"))


def options(config, layer):
    """What config.json says about a layer, or None where modules_to_not_convert leaves it alone.

    quant_config.json's w_bit and q_group_size mean bits and group_size.

    Returns:
        {"bits", "group_size" (-1: all of k), "zero_point", "version": "gemm", "gemv", "gemv_fast" or "marlin"}.

    Raises:
        ValueError: unknown keys or values, contradictions. NotImplementedError: llm-awq's own files.
    """
    check_keys(config, KEYS, WHERE)
    one_of(pick(config, ("quant_method", "method"), "awq", WHERE), ("awq",), f"{WHERE}: quant_method")
    version = pick(
        {k: v.lower() if isinstance(v, str) else v for k, v in config.items()}, ("version", "format", "checkpoint_format"), "gemm", WHERE
    )
    if "llm-awq" in (version, config.get("backend")):
        raise NotImplementedError(f"{WHERE}: llm-awq writes pickled files of its own, expected one of {', '.join(VERSIONS)}")
    if config.get("dynamic"):
        raise NotImplementedError(f"{WHERE}: dynamic is {config['dynamic']!r}: overrides by layer are GPTQ's")
    one_of(version, tuple(VERSIONS), f"{WHERE}: version")
    zero_point, sym = config.get("zero_point"), config.get("sym")
    one_of(zero_point, (True, False, None), f"{WHERE}: zero_point")
    one_of(sym, (True, False, None), f"{WHERE}: sym")
    if zero_point is not None and zero_point == sym:
        raise ValueError(f"{WHERE}: zero_point and sym are both {sym}, expected one of the two to be true")
    widths = (4, 5, 6, 7) if VERSIONS[version] == "gemm" else (4,)
    bits = one_of(pick(config, ("bits", "w_bit"), 4, WHERE), widths, f"{WHERE}: bits")
    group_size = pick(config, ("group_size", "q_group_size"), 128, WHERE)
    if group_size != -1 or type(group_size) is not int:
        integer(group_size, f"{WHERE}: group_size (-1: all of k)", 1, 2**31 - 1)
    if rules.by_module(layer, rules.strings(config.get("modules_to_not_convert"), f"{WHERE}: modules_to_not_convert")):
        return None
    zero_point = zero_point if zero_point is not None else not sym
    return {"bits": bits, "group_size": group_size, "zero_point": zero_point, "version": VERSIONS[version]}


def read(parts, options):
    """A layer's tensors as a QTensor.

    w[n, k] = scales[g, n] * (code[k, n] - zero[g, n]), g = k // group_size; without zero_point the zero is 2^(bits-1) everywhere,
    and a missing qzeros says the same. GEMV-fast stores -(scale * zero), rounded to float16, and adds it: an offset.

    Args:
        parts: int32 but where said otherwise; the scales are float16, bfloat16 or float32.
            gemm: qweight (k, n * bits / 32), qzeros (groups, n * bits / 32): bitstreams along n, each 8 columns in the order 0, 2,
                4, 6, 1, 3, 5, 7; scales (groups, n).
            gemv: qweight (n, k / 8), qzeros (n, p / 8), scales (n, p): in order along k, p the padded number of groups.
            gemv_fast: qweight int16 (n / 4, k), k a multiple of 64; qzeros float16 (p, n), scales float16 (p, n).
            marlin: as marlin.read, under the names qweight and scales.
        options: as options returns them.

    Raises:
        ValueError: parts that disagree with one another or with the options.

    Source: AutoAWQ 0.2.9 modules/linear; AutoRound 0.16.1 utils/bit_packing for 5 to 7 bits.
    """
    version = options["version"]
    if version == "marlin":
        if options["zero_point"]:
            raise ValueError("awq: zero_point is true, but version marlin has no zero points")
        need(parts, "awq", ("qweight", "scales"))
        return marlin.read({"B": parts["qweight"], "s": parts["scales"]}, {"bits": 4, "group_size": options["group_size"]})
    need(parts, "awq", ("qweight", "scales") if not options["zero_point"] else ("qweight", "scales", "qzeros"), ("qzeros",))
    return {"gemm": _read_gemm, "gemv": _read_gemv, "gemv_fast": _read_fast}[version](parts, options)


def write(q, version=None):
    """The tensors of a QTensor: the inverse of read.

    Args:
        q: (n, k): integers of 4 bits (gemm: 4 to 7), signed, or unsigned with an integer zero; gemv_fast: unsigned with a float16
            offset. Scales by groups along k that divide k (gemv, gemv_fast: of 32 or more), or by row; float16 in gemv_fast.
        version: "gemm", "gemv", "gemv_fast" or "marlin"; None takes gemv_fast for offsets, else gemm.

    Raises:
        ValueError: another format or shape.
    """
    version = one_of(version or _default(q), ("gemm", "gemv", "gemv_fast", "marlin"), "awq: version")
    if version == "marlin":
        written = marlin.write(q, bits=4)
        return {"qweight": written["B"], "scales": written["s"]}
    if version == "gemv_fast":
        return _write_fast(q)
    check_integers(q, "awq", (4, 5, 6, 7) if version == "gemm" else (4,))
    _check_order(q)
    bits = q.format.element.bits
    _group(q.format.group[1] or -1, q.shape[-1])
    zero = torch.full(q.scale.shape, 2 ** (bits - 1), dtype=torch.uint8) if q.zero is None else q.zero
    return (_write_gemm if version == "gemm" else _write_gemv)(q, zero)


def config_of(q, version=None):
    """A quantization_config for a checkpoint whose layers are all like q."""
    zero_point = q.format.zero is not None or q.format.offset is not None
    bits, group_size = q.format.element.bits, q.format.group[1] or -1
    return {"quant_method": "awq", "bits": bits, "group_size": group_size, "zero_point": zero_point, "version": version or _default(q)}


def _default(q):
    return "gemv_fast" if q.format.offset else "gemm"


def _read_gemm(parts, options):
    bits = options["bits"]
    scales = finite(part(parts, "awq", "scales", tuple(SCALES), (-1, -1)), "awq: scales")
    groups, n = scales.shape
    if n % (8 if bits == 4 else 32):
        raise ValueError(f"awq: scales has n={n} columns, expected a multiple of {8 if bits == 4 else 32} ({bits} bits)")
    words = words_per_row(n, bits)
    qweight = part(parts, "awq", "qweight", (torch.int32,), (-1, words), f"(k, n * bits / 32) with n={n}, bits={bits}")
    k = len(qweight)
    _check_groups(groups, options["group_size"], k)
    packed = pack(transposed(_columns(qweight, bits, n)), bits)
    zero = None
    if parts.get("qzeros") is not None:
        zero = _columns(part(parts, "awq", "qzeros", (torch.int32,), (groups, words), f"(groups, n * bits / 32) with n={n}"), bits, n)
        zero = transposed(zero)
    return _weight(packed, transposed(scales), zero, options, k)


def _read_gemv(parts, options):
    qweight = part(parts, "awq", "qweight", (torch.int32,), (-1, -1))
    n, k = len(qweight), qweight.shape[1] * 8
    group = _group(options["group_size"], k)
    padded = _padded_groups(k, group)
    scales = part(parts, "awq", "scales", tuple(SCALES), (n, padded), f"(n, padded groups) with k={k}, group_size={group}")
    zero = None
    if parts.get("qzeros") is not None:
        qzeros = part(parts, "awq", "qzeros", (torch.int32,), (n, padded // 8), f"(n, padded groups / 8) with k={k}, group_size={group}")
        zero = unpack(qzeros, 4, padded)[:, : k // group]
    scales = finite(scales[:, : k // group], "awq: scales")
    return _weight(qweight.contiguous(), scales, zero, options, k)


def _read_fast(parts, options):
    if not options["zero_point"]:
        raise ValueError("awq: zero_point is false, but version gemv_fast stores -(scale * zero)")
    qweight = part(parts, "awq", "qweight", (torch.int16,), (-1, -1))
    n, k = len(qweight) * 4, qweight.shape[1]
    if k % 64:
        raise ValueError(f"awq: qweight has k={k} columns, expected a multiple of 64 (gemv_fast)")
    group = _group(options["group_size"], k)
    shape, why = (_padded_groups(k, group), n), f"(padded groups, n) with k={k}, n={n}, group_size={group}"
    scales = part(parts, "awq", "scales", (torch.float16,), shape, why)[: k // group]
    offset = part(parts, "awq", "qzeros", (torch.float16,), shape, why)[: k // group]
    finite(scales, "awq: scales")
    finite(offset, "awq: qzeros")
    codes = torch.stack([(qweight >> 4 * i & 15).to(torch.uint8) for i in range(4)], dim=-1)  # (n / 4, k, 4): 4 rows by 64, in order
    rows = codes.view(n // 4, k // 64, 4, 64).transpose(1, 2).reshape(n, k // 32, 32)
    codes = torch.empty_like(rows)
    codes[..., FAST_ORDER] = rows
    fmt = Format(Int(4, False), "fp16", (1, 0 if options["group_size"] == -1 else group), offset="fp16")
    packed = pack(codes.view(n, k), 4)
    return validate(QTensor(fmt, (n, k), packed, transposed(scales), offset=transposed(offset)))


def _write_gemm(q, zero):
    n, k, bits = *q.shape, q.format.element.bits
    if n % (8 if bits == 4 else 32):
        raise ValueError(f"awq: q has n={n}, expected a multiple of {8 if bits == 4 else 32} ({bits} bits)")
    qweight = _join(unpack(q.packed, bits, k).t(), bits)
    return {"qweight": qweight, "qzeros": _join(zero.t(), bits), "scales": transposed(q.scale)}


def _write_gemv(q, zero):
    k, groups = q.shape[-1], q.scale.shape[-1]
    if k % 8:
        raise ValueError(f"awq: q has k={k}, expected a multiple of 8 (gemv)")
    pad = (0, _padded_groups(k, q.format.group[1] or k) - groups)
    scales, zero = (torch.nn.functional.pad(t, pad) for t in (q.scale, zero))
    return {"qweight": q.packed.clone(), "qzeros": pack(zero, 4), "scales": scales}


def _write_fast(q):
    check_parts(q, "awq")
    n, k = q.shape[-2:]
    group = q.format.group[1] or k
    if q.format != Format(Int(4, False), "fp16", (1, q.format.group[1]), offset="fp16") or len(q.shape) != 2:
        raise ValueError(
            f"awq: got {q.format} of shape {tuple(q.shape)}, expected (n, k) of uint4 by group or row with float16 scales and offsets (gemv_fast)"
        )
    _check_order(q)
    if n % 4 or k % 64:
        raise ValueError(f"awq: q has n={n}, k={k}, expected multiples of 4 and 64 (gemv_fast)")
    pad = (0, _padded_groups(k, _group(group, k)) - q.scale.shape[-1])
    scales, offset = (transposed(torch.nn.functional.pad(t, pad)) for t in (q.scale, q.offset))
    codes = unpack(q.packed, 4, k).view(n, k // 32, 32)[..., FAST_ORDER]
    fields = codes.reshape(n // 4, 4, k // 64, 64).transpose(1, 2).reshape(n // 4, k, 4).to(torch.int16)
    qweight = fields[..., 0] | fields[..., 1] << 4 | fields[..., 2] << 8 | fields[..., 3] << 12
    return {"qweight": qweight, "qzeros": offset, "scales": scales}


def _columns(words, bits, n):
    """The codes of GEMM's words, uint8 (rows, n), columns in order."""
    fields = unpack(words.contiguous(), bits, n).view(len(words), -1, 8)
    codes = torch.empty_like(fields)
    codes[..., ORDER] = fields
    return codes.flatten(1)


def _join(codes, bits):
    """The inverse of _columns."""
    return pack(codes.unflatten(-1, (-1, 8))[..., ORDER].flatten(1), bits)


def _weight(packed, scale, zero, options, k):
    bits, group_size = options["bits"], options["group_size"]
    if not options["zero_point"]:
        if zero is not None and bool((zero != 2 ** (bits - 1)).any()):
            raise ValueError(
                f"awq: qzeros has the zero {int(zero[zero != 2 ** (bits - 1)][0])}, but zero_point is false, which means {2 ** (bits - 1)}"
            )
        zero = None
    fmt = Format(Int(bits, zero is None), SCALES[scale.dtype], (1, 0 if group_size == -1 else group_size), None if zero is None else "int")
    zero = None if zero is None else zero.contiguous()
    return validate(QTensor(fmt, (len(packed), k), packed, scale.contiguous(), zero))


def _group(group_size, k):
    """The group's real size; AWQ has no partial groups."""
    group = max(k, 1) if group_size == -1 else group_size
    if k % group:
        raise ValueError(f"awq: k={k} is no multiple of group_size={group_size} (AWQ has no partial groups)")
    return group


def _check_order(q):
    if q.group_index is not None:
        raise ValueError("awq: q has a group_index, expected groups in order")


def _check_groups(groups, group_size, k):
    if groups != k // _group(group_size, k):
        raise ValueError(f"awq: scales has {groups} groups, expected k / group_size with k={k}, group_size={group_size}")


def _padded_groups(k, group):
    """The number of groups as GEMV stores it: whole words of 8, and of those a multiple of 1, 2 or 4 for groups of 128, 64 or 32."""
    multiple = 1 if group >= 128 else {64: 2, 32: 4}.get(group)
    if multiple is None:
        raise ValueError(f"awq: group_size is {group}, expected 32, 64, or 128 and more (gemv)")
    words = -(-(k // group) // 8)
    return -(-words // multiple) * multiple * 8
