"""GPTQ checkpoints: AutoGPTQ's version 1, GPTQModel's version 2, and its planar layout for 3, 5, 6 and 7 bits."""

import torch

from ..element import Int
from ..format import Format
from ..pack import pack, unpack, words_per_row
from ..qtensor import QTensor, check_parts, validate
from . import rules
from .bits import transposed
from .check import check_keys, integer, need, one_of, part
from .recipe import RECIPE

FORMATS = ("int4_g128_fp16", "uint4z_g128_fp16", "int8_fp16", "int3_g128_bf16", "uint2z_g64_fp16", "int5_g64_fp16")

GROUP_INDEX = ("int4_g128_fp16", "uint4z_g128_fp16", "int3_g128_bf16", "uint2z_g64_fp16", "int5_g64_fp16")  # these may have one

CHECKPOINT_FORMATS = ("gptq", "gptq_v2", "gptq_p")
SCALES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}

# For 32 codes b words: planes of these widths, each the part of the code from this bit on, one after the other.
PLANES = {3: ((2, 0), (1, 2)), 5: ((4, 0), (1, 4)), 6: ((4, 0), (2, 4)), 7: ((4, 0), (2, 4), (1, 6))}

KEYS = (
    *("quant_method", "method", "bits", "w_bit", "wbits", "group_size", "q_group_size", "groupsize", "sym", "desc_act"),
    *("checkpoint_format", "format", "is_marlin_format", "awq_gemm_checkpoint", "pack_dtype", "dynamic", "lm_head"),
    *("modules_in_block_to_quantize",),
    *RECIPE,
)
WHERE = "gptq: quantization_config"


def find(names, config):
    """{layer: {part: tensor name}}: every layer that has qweight."""
    return rules.layers(names, ("qweight",), ("qzeros", "scales", "g_idx"))


def options(config, layer):
    """What config.json says about a layer, or None where it leaves the layer alone.

    dynamic overrides ("-:", "+:" and bare regular expressions, the first match counts) stand above the common settings; lm_head
    is quantized only where "lm_head" says so or an override names it; modules_in_block_to_quantize lists what is.
    The older names of quantize_config.json (w_bit, wbits, q_group_size, groupsize) mean what the newer ones do.

    Returns:
        {"bits", "group_size" (-1: all of k), "sym", "desc_act" (None: not said), "checkpoint_format", "word_zeros"}.
        checkpoint_format is gptq_p for 5, 6 and 7 bits whatever is written: no other exists. word_zeros: see read.

    Raises:
        ValueError: unknown keys or values, contradictions. NotImplementedError: Marlin's or BitBLAS' layout, other word sizes.
    """
    check_keys(config, KEYS, WHERE)
    one_of(pick(config, ("quant_method", "method"), "gptq", WHERE), ("gptq",), f"{WHERE}: quant_method")
    if config.get("is_marlin_format"):
        raise NotImplementedError(
            f"{WHERE}: is_marlin_format is {config['is_marlin_format']!r}: expected None or False (read B and s with marlin)"
        )
    one_of(config.get("awq_gemm_checkpoint") or False, (False,), f"{WHERE}: awq_gemm_checkpoint")
    if config.get("rotation"):
        raise NotImplementedError(f"{WHERE}: rotation is {config['rotation']!r}: rotations that the model applies as it runs are not read")
    if config.get("pack_dtype") not in (None, "int32"):
        raise NotImplementedError(f"{WHERE}: pack_dtype is {config['pack_dtype']!r}, expected 'int32' (no other is in the wild)")
    overrides = config.get("dynamic") or {}
    if not isinstance(overrides, dict) or not all(isinstance(v, dict) for v in overrides.values()):
        raise ValueError(f"{WHERE}: dynamic is {overrides!r}, expected a dict of dicts")
    override = rules.dynamic(layer, overrides)
    if override is None or (not override and not _covers(config, layer)):
        return None
    check_keys(override, KEYS, f"{WHERE}: dynamic override of {layer}")
    settings = {
        "bits": pick(config, ("bits", "w_bit", "wbits"), None, WHERE),
        "group_size": pick(config, ("group_size", "q_group_size", "groupsize"), -1, WHERE),
        "sym": pick(config, ("sym",), True, WHERE),
        "desc_act": config.get("desc_act"),
    }
    settings |= {key: override[key] for key in settings if override.get(key) is not None}
    integer(settings["bits"], f"{WHERE}: bits", 2, 8)
    if settings["group_size"] != -1 or type(settings["group_size"]) is not int:
        integer(settings["group_size"], f"{WHERE}: group_size (-1: all of k)", 1, 2**31 - 1)
    one_of(settings["sym"], (True, False), f"{WHERE}: sym")
    one_of(settings["desc_act"], (True, False, None), f"{WHERE}: desc_act")
    return settings | {"checkpoint_format": _checkpoint_format(config, settings["bits"]), "word_zeros": _made_by_gptqmodel(config)}


def read(parts, options):
    """A layer's tensors as a QTensor.

    w[n, k] = scales[g, n] * (code[k, n] - zero[g, n]), g = g_idx[k]. A zero of 2^(bits-1) everywhere, which sym promises, makes
    a signed integer without zero points. Version 1 stores zero - 1, which leaves no room for 0: where a field holds 2^bits - 1,
    decoders disagree, and only what GPTQModel wrote (word_zeros) is unambiguous: at 2, 4 and 8 bits it subtracts the ones from
    whole words, borrows included; at 3 bits modulo 8.

    Args:
        parts: qweight int32 (ceil(k * bits / 32), n), a bitstream down each column; qzeros int32 (groups, ceil(n * bits / 32)), a
            bitstream along n; scales float16, bfloat16 or float32 (groups, n); g_idx, if there is one: int32 or int64 (k,).
            gptq_p has planes (PLANES) in place of the bitstreams, for k and n that are multiples of 32.
        options: as options returns them.

    Raises:
        ValueError: parts that disagree with one another or with the options.

    Source: AutoGPTQ 0.7.1 qlinear_cuda, GPTQModel 7.7.0 nn_modules/qlinear and utils/planar_packing.
    """
    bits, group_size, version = options["bits"], options["group_size"], options["checkpoint_format"]
    planar = version == "gptq_p" and bits in PLANES
    need(parts, "gptq", ("qweight", "qzeros", "scales"), ("g_idx",))
    scales = finite(part(parts, "gptq", "scales", tuple(SCALES), (-1, -1)), "gptq: scales")
    groups, n = scales.shape
    qweight = part(parts, "gptq", "qweight", (torch.int32,), (-1, n), f"with n={n} of scales")
    k = _length(parts, len(qweight), bits)
    part(parts, "gptq", "qweight", (torch.int32,), (words_per_row(k, bits), n), f"(k * bits / 32, n) with k={k}, bits={bits}")
    part(parts, "gptq", "qzeros", (torch.int32,), (groups, words_per_row(n, bits)), f"(groups, n * bits / 32) with n={n}, bits={bits}")
    if groups != (1 if group_size == -1 else -(-k // group_size)):
        raise ValueError(f"gptq: scales has {groups} groups, expected ceil(k / group_size) with k={k}, group_size={group_size}")
    if planar and (k % 32 or n % 32):
        raise ValueError(f"gptq: got k={k}, n={n}: gptq_p at {bits} bits packs whole blocks of 32")
    zero = _zeros(parts["qzeros"], n, bits, planar, version == "gptq" and options["word_zeros"], version == "gptq")
    sym = options["sym"]
    if sym and bool((zero != 2 ** (bits - 1)).any()):
        found = int(zero[zero != 2 ** (bits - 1)][0])
        raise ValueError(f"gptq: qzeros has the zero {found} ({version}), but sym is true, which means {2 ** (bits - 1)} everywhere")
    packed = transposed(_from_planes(qweight, bits) if planar else qweight)
    if k * bits % 32:
        packed[:, -1] &= (1 << k * bits % 32) - 1
    group_index = _group_index(parts.get("g_idx"), groups, k, group_size)
    if group_index is not None and options["desc_act"] is False:
        raise ValueError("gptq: g_idx reorders the groups, but desc_act is false, which makes some runtimes ignore it")
    fmt = Format(Int(bits, sym), SCALES[scales.dtype], (1, 0 if group_size == -1 else group_size), None if sym else "int")
    scale, zero = transposed(scales), None if sym else transposed(zero)
    return validate(QTensor(fmt, (n, k), packed, scale, zero, group_index=group_index))


def write(q, checkpoint_format=None, g_idx=True):
    """The tensors of a QTensor: the inverse of read.

    Args:
        q: (n, k): integers of 2 to 8 bits, signed, or unsigned with an integer zero; float scales by group along k or by row.
        checkpoint_format: "gptq" (version 1), "gptq_v2" or "gptq_p"; 5, 6 and 7 bits exist in gptq_p only. None takes that for them,
            version 2 for other integers with zero points, and version 1 for symmetric ones.
        g_idx: whether to write it where groups are in order and the width of qweight says what k is.

    Raises:
        ValueError: another format; a zero of 0 in version 1; k or n that is no multiple of 32 in gptq_p's planes.
    """
    check_integers(q, "gptq", range(2, 9))
    checkpoint_format = one_of(checkpoint_format or _default(q), CHECKPOINT_FORMATS, "gptq: checkpoint_format")
    if checkpoint_format != "gptq_p" and q.format.element.bits in (5, 6, 7):
        raise ValueError(f"gptq: {q.format} has {q.format.element.bits} bits, which checkpoint_format 'gptq_p' alone has")
    return write_integers(q, "gptq", checkpoint_format, g_idx)


def write_integers(q, layout, checkpoint_format, g_idx):
    """write, for every width as a bitstream: what AutoRound writes under its own name."""
    check_integers(q, layout, range(2, 9))
    n, k = q.shape
    bits, planar = q.format.element.bits, checkpoint_format == "gptq_p" and q.format.element.bits in PLANES
    if planar and (k % 32 or n % 32):
        raise ValueError(f"{layout}: got k={k}, n={n}: gptq_p at {bits} bits packs whole blocks of 32")
    zero = torch.full(q.scale.shape, 2 ** (bits - 1), dtype=torch.uint8) if q.zero is None else q.zero
    if checkpoint_format == "gptq":
        if bool((zero == 0).any()):
            raise ValueError(
                f"{layout}: q has the zero 0 at {tuple((zero == 0).nonzero()[0].tolist())}: version 1 stores zero - 1 (take gptq_v2)"
            )
        zero = zero - 1
    qweight, qzeros = transposed(q.packed), pack(zero.t(), bits)
    if planar:
        qweight, qzeros = _to_planes(qweight, bits), transposed(_to_planes(qzeros.t(), bits))
    out = {"qweight": qweight, "qzeros": qzeros, "scales": transposed(q.scale)}
    if g_idx or q.group_index is not None or len(qweight) * 32 // bits != k:
        out["g_idx"] = _in_order(k, q.format.group[1]) if q.group_index is None else q.group_index.clone()
    return out


def config_of(q, checkpoint_format=None, g_idx=True):
    """A quantization_config for a checkpoint whose layers are all like q."""
    return {
        "quant_method": "gptq",
        "bits": q.format.element.bits,
        "group_size": q.format.group[1] or -1,
        "sym": q.format.zero is None,
        "desc_act": q.group_index is not None,
        "checkpoint_format": checkpoint_format or _default(q),
        "lm_head": False,
    }


def pick(config, keys, default, where):
    """The value under the first of some synonymous keys, None counting as absent; they must not contradict each other."""
    found = {key: config[key] for key in keys if config.get(key) is not None}
    values = list(found.values())
    if any(v != values[0] for v in values):
        raise ValueError(f"{where}: {found} contradict each other")
    return values[0] if values else default


def finite(tensor, where):
    """tensor, if it has no NaN or inf."""
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{where} is NaN or inf at {tuple((~tensor.isfinite()).nonzero()[0].tolist())}")
    return tensor


def check_integers(q, layout, widths):
    """Refuse a QTensor that is no (n, k) integer weight with float scales by group or row, symmetric or with integer zeros."""
    check_parts(q, layout)
    fmt = q.format
    plain = isinstance(fmt.element, Int) and fmt.element.bits in widths and fmt.scale in SCALES.values() and fmt.group[0] == 1
    signed = isinstance(fmt.element, Int) and fmt.element.signed
    if not plain or signed != (fmt.zero is None) or fmt.zero not in (None, "int") or fmt.scale_2 or fmt.offset or fmt.hadamard:
        raise ValueError(
            f"{layout}: got {fmt}, expected integers of {', '.join(map(str, widths))} bits, signed or with an integer zero, and float scales by group or row"
        )
    if len(q.shape) != 2:
        raise ValueError(f"{layout}: got shape {tuple(q.shape)}, expected (n, k): experts are layers of their own")


def _default(q):
    return "gptq_p" if q.format.element.bits in (5, 6, 7) else "gptq" if q.format.zero is None else "gptq_v2"


def _covers(config, layer):
    lm_head = one_of(config.get("lm_head") or False, (True, False), f"{WHERE}: lm_head")
    if layer.split(".")[-1] == "lm_head":
        return lm_head
    modules = config.get("modules_in_block_to_quantize")
    if modules is None:
        return True
    if not isinstance(modules, (list, tuple)):
        raise ValueError(f"{WHERE}: modules_in_block_to_quantize is {modules!r}, expected a list of names, or of lists of them")
    nested = [m if isinstance(m, (list, tuple)) else [m] for m in modules]
    flat = rules.strings([name for names in nested for name in names], f"{WHERE}: modules_in_block_to_quantize")
    return any(f".{layer}".endswith(f".{name}") for name in flat)


def _checkpoint_format(config, bits):
    name = pick(config, ("checkpoint_format", "format"), "gptq", WHERE)
    if name in ("marlin", "bitblas"):
        raise NotImplementedError(
            f"{WHERE}: checkpoint_format is {name!r}: a kernel's own layout, expected one of {', '.join(CHECKPOINT_FORMATS)}"
        )
    one_of(name, CHECKPOINT_FORMATS, f"{WHERE}: checkpoint_format")
    return "gptq_p" if bits in (5, 6, 7) else name


def _made_by_gptqmodel(config):
    meta = config.get("meta")
    tools = meta.get("quantizer") if isinstance(meta, dict) else None
    tools = [tools] if isinstance(tools, str) else tools if isinstance(tools, list) else []
    return any(isinstance(tool, str) and tool.lower().startswith("gptqmodel:") for tool in tools)


def _length(parts, rows, bits):
    if parts.get("g_idx") is not None:
        return len(part(parts, "gptq", "g_idx", (torch.int32, torch.int64), (-1,)))
    k, rest = divmod(rows * 32, bits)
    if rest:
        raise ValueError(f"gptq: qweight has {rows} rows, which fit no k at {bits} bits, and there is no g_idx to say what k is")
    return k


def _zeros(qzeros, n, bits, planar, word_zeros, one_less):
    """The zeros, uint8 (groups, n). one_less: the file has zero - 1; word_zeros: with GPTQModel's borrows."""
    stream = transposed(_from_planes(qzeros.t(), bits)) if planar else qzeros
    zero = unpack(stream, bits, n)
    if not one_less:
        return zero
    top = zero == 2**bits - 1
    if not bool(top.any()):
        return zero + 1
    if not word_zeros:
        raise ValueError(
            f"gptq: qzeros has the field {2**bits - 1} at {tuple(top.nonzero()[0].tolist())}: version 1 stores zero - 1, and has none for 0"
        )
    if 32 % bits:
        return zero + 1 & 2**bits - 1
    return unpack(qzeros + sum(1 << i for i in range(0, 32, bits)), bits, n)


def _in_order(k, group):
    columns = torch.arange(k, dtype=torch.int32)
    return columns // group if group else columns * 0


def _group_index(g_idx, groups, k, group_size):
    """g_idx, or None where it is k // group_size."""
    if g_idx is None or not k:
        return None
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise ValueError(f"gptq: g_idx ranges from {low} to {high}, expected 0 to {groups - 1} (scales has {groups} groups)")
    g_idx = g_idx.to(torch.int32)
    return None if torch.equal(g_idx, _in_order(k, max(group_size, 0)).to(g_idx.device)) else g_idx.contiguous()


def _fields(bits):
    """For each of a block's 32 codes, where its parts are: [(word, shift in the word, width, offset in the code)]."""
    places = [[] for _ in range(32)]
    first = 0
    for width, offset in PLANES[bits]:
        for i in range(32):
            word, shift = divmod(i * width, 32)
            places[i].append((first + word, shift, width, offset))
        first += width
    return places


def _from_planes(words, bits):
    """Planes along the first axis, int32 (32-code blocks * bits, n), as a bitstream of the same shape."""
    blocks = words.unflatten(0, (-1, bits))
    out = torch.zeros_like(blocks)
    for i, places in enumerate(_fields(bits)):
        code = sum((blocks[:, word] >> shift & (1 << width) - 1) << offset for word, shift, width, offset in places)
        word, shift = divmod(i * bits, 32)
        out[:, word] |= code << shift
        if shift + bits > 32:
            out[:, word + 1] |= code >> 32 - shift
    return out.flatten(0, 1)


def _to_planes(words, bits):
    """The inverse of _from_planes."""
    blocks = words.unflatten(0, (-1, bits))
    out = torch.zeros_like(blocks)
    for i, places in enumerate(_fields(bits)):
        word, shift = divmod(i * bits, 32)
        code = blocks[:, word] >> shift
        if shift + bits > 32:
            code = (code & (1 << 32 - shift) - 1) | blocks[:, word + 1] << 32 - shift
        for plane, at, width, offset in places:
            out[:, plane] |= (code >> offset & (1 << width) - 1) << at
    return out.flatten(0, 1)
