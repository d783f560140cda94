"""The tensor classes of torchao, as their inner tensors: read and write for layouts.torchao.

Each read takes the inner tensors by name ("qdata", "scale", ...) and what the metadata says ("block_size", "shape", ...); values are
those of the class's own dequantize:

    Int8Tensor, IntxUnpackedToInt8Tensor: (qdata - zero_point) * scale, one int8 a weight
    Float8Tensor: qdata * scale
    Int4Tensor: qdata * scale + zero_point, signed nibbles, low first; scale and zero_point (groups, n)
    Int4TilePackedTo4dTensor: (q - 8) * scale + zero, in the order of the tensor cores' operand; padded to k % 1024 == 0, n % 8 == 0
    Int4PlainInt32Tensor: (q - zero_point) * scale, unsigned nibbles in their order (as Intel GPUs have it; NPUs have another)
    MXTensor, NVFP4Tensor: the OCP and NVIDIA formats; scales perhaps in the 128 x 4 tiles of the tensor cores

Source: torchao 0.18.0 (quantization/quantize_/workflows, prototype/mx_formats); PyTorch's _convert_weight_to_int4pack for CUDA
(int4mm.cu) and for XPU; pack_int4 of fbgemm_gpu.experimental.gen_ai, which is now MSLK's.
"""

import torch

from ..element import NAMED, Float, Int
from ..format import Format
from ..pack import pack, unpack
from ..qtensor import QTensor
from . import bits
from .check import part

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FLOAT8 = {torch.float8_e4m3fn: NAMED["e4m3"], torch.float8_e5m2: NAMED["e5m2"]}
MX = {
    "float8_e4m3fn": NAMED["e4m3"],
    "float8_e5m2": NAMED["e5m2"],
    "fp6_e2m3": Float(2, 3),
    "fp6_e3m2": Float(3, 2),
    "float4_e2m1fn_x2": Float(2, 1),
}


def of(inner, name, dtypes, shape=None, why=""):
    return part(inner, "torchao", name, dtypes, shape, why)


def name_of(dtype):
    return next(name for name, d in FLOATS.items() if d == dtype)


def data(inner, dtypes):
    """qdata, (n, k) or (e, n, k) as stored."""
    qdata = of(inner, "qdata", dtypes)
    if qdata.dim() not in (2, 3) or 0 in qdata.shape:
        raise ValueError(f"torchao: qdata has shape {tuple(qdata.shape)}, expected (n, k) or (e, n, k) without zeros")
    return qdata


def spread(inner, name, dtypes, shape, block):
    """(scales as (*lead, rows, columns), group): from the shape of the scales, which must be that of the metadata's block size."""
    scale = of(inner, name, dtypes)
    *lead, n, k = shape
    if scale.numel() == 1:
        scale = scale.reshape([1] * len(shape))
    if scale.dim() == len(shape) and scale.shape[:-2] == (1,):
        scale = scale.expand(*lead, -1, -1)
    rows, columns = scale.shape[-2:] if scale.dim() == len(shape) else (0, 0)
    if list(scale.shape[:-2]) != lead or not rows or not columns or n % rows or k % columns:
        raise ValueError(
            f"torchao: {name} has shape {tuple(inner[name].shape)}, expected one value for each block of qdata's {tuple(shape)}"
        )
    if block is not None and (len(block) != len(shape) or block[-2:] != [n // rows, k // columns]):
        raise ValueError(f"torchao: {name} has shape {tuple(inner[name].shape)}, and block_size is {block} for shape {tuple(shape)}")
    return scale.contiguous(), whole((n // rows, k // columns), n, k)


def whole(block, n, k):
    """A block size as a group: a row is (1, 0), a tensor (0, 0), all else is what it is."""
    return (1, 0) if block == (1, k) else (0, 0) if block == (n, k) else block


def read_int8(inner, meta):
    return _integers(inner, meta, 8, (torch.float32, torch.bfloat16, torch.float16))


def read_intx(inner, meta):
    return _integers(inner, meta, meta.get("bits") or 8, tuple(FLOATS.values()))


def _integers(inner, meta, width, dtypes):
    qdata = data(inner, (torch.int8,))
    low, half = int(qdata.min()), 2 ** (width - 1)
    if width < 8 and (low < -half or int(qdata.max()) >= half):
        raise ValueError(f"torchao: qdata ranges from {low} to {int(qdata.max())}, expected {-half} to {half - 1} (int{width})")
    shape = tuple(qdata.shape)
    scale, group = spread(inner, "scale", dtypes, shape, meta.get("block_size"))
    packed = pack(bits.from_twos(qdata, width), width)
    zero = inner.get("zero_point")
    if zero is not None:
        zero = spread(inner, "zero_point", (torch.int8, *FLOATS.values()), shape, meta.get("block_size"))[0]
        if zero.shape != scale.shape:
            raise ValueError(f"torchao: zero_point has shape {tuple(zero.shape)}, expected that of scale, {tuple(scale.shape)}")
    if zero is None or not bool((zero != 0).any()):  # symmetric ones have zero points of 0
        return QTensor(Format(Int(width), name_of(scale.dtype), group), shape, packed, scale)
    if zero.dtype != torch.int8:
        shifted = zero.float() + half
        if not torch.equal((shifted - half).to(zero.dtype), zero):
            raise NotImplementedError(f"torchao: zero_point + {half}, of unsigned codes, is no float32")
        return QTensor(Format(Int(width, False), name_of(scale.dtype), group, zero="fp32"), shape, packed, scale, shifted)
    if int(zero.min()) < -half or int(zero.max()) >= half:
        raise ValueError(
            f"torchao: zero_point ranges from {int(zero.min())} to {int(zero.max())}, expected {-half} to {half - 1} (int{width})"
        )
    fmt = Format(Int(width, False), name_of(scale.dtype), group, zero="int")
    return QTensor(fmt, shape, packed, scale, bits.from_twos(zero, 8) - (128 - half))


def write_integers(q):
    fmt, width = q.format, q.format.element.bits
    half = 2 ** (width - 1)
    inner = {"qdata": bits.sign_extended(unpack(q.packed, width, q.shape[-1]), width), "scale": q.scale.clone()}
    if fmt.zero is None:
        return inner | {"zero_point": torch.zeros(q.scale.shape, dtype=torch.int8)}
    if fmt.zero == "int":
        zero = (q.zero.to(torch.int16) - half).to(torch.int8)
    else:
        zero = next((z for d in (q.scale.dtype, torch.float32) if torch.equal((z := (q.zero - half).to(d)).float() + half, q.zero)), None)
    if zero is None or not bool((zero != 0).any()):
        raise ValueError(
            f"torchao: cannot store the zeros of {fmt}: less {half} they are "
            f"{'rounded' if zero is None else 'all 0, as those of signed integers are'}"
        )
    return inner | {"zero_point": zero}


def read_float8(inner, meta):
    qdata = data(inner, tuple(FLOAT8))
    scale, group = spread(inner, "scale", (torch.float32,), qdata.shape, meta.get("block_size"))
    return QTensor(Format(FLOAT8[qdata.dtype], group=group), tuple(qdata.shape), pack(qdata.view(torch.uint8), 8), scale)


def write_float8(q):
    dtype = next(d for d, e in FLOAT8.items() if e == q.format.element)
    return {"qdata": unpack(q.packed, 8, q.shape[-1]).view(dtype), "scale": q.scale.clone()}


def read_int4(inner, meta):
    qdata = data(inner, (torch.int8, torch.uint8))
    *lead, n, half = qdata.shape
    shape = (*lead, n, 2 * half)
    size = _size(meta, shape)
    if meta.get("shape") not in (None, list(shape)):
        raise ValueError(f"torchao: qdata has shape {tuple(qdata.shape)}, expected half as many columns as shape {meta['shape']}")
    stored = (*lead, -(-shape[-1] // size), n)
    scale = of(inner, "scale", tuple(FLOATS.values()), stored, f"for groups of {size}")
    zero = of(inner, "zero_point", (scale.dtype,), stored, f"for groups of {size}")
    codes = bits.nibbles(qdata.view(torch.uint8) ^ 0x88)
    return _with_offset(codes, scale.mT.contiguous(), zero.mT.contiguous(), size)


def _with_offset(codes, scale, offset, size):
    name = name_of(scale.dtype)
    return QTensor(Format(Int(4), name, (1, size), offset=name), tuple(codes.shape), pack(codes, 4), scale, offset=offset)


def _size(meta, shape):
    block = meta.get("block_size")
    if block is None:
        raise ValueError("torchao: block_size is missing: there is neither metadata nor a group_size in the config")
    if (len(block) != len(shape) and len(block) != 2) or any(b != 1 for b in block[:-1]):
        raise ValueError(f"torchao: block_size is {block}, expected ones and the size of groups along k, for shape {tuple(shape)}")
    return block[-1]


def write_int4(q):
    codes = unpack(q.packed, 4, q.shape[-1])
    return {
        "qdata": (bits.join_nibbles(codes) ^ 0x88).view(torch.int8),
        "scale": q.scale.mT.contiguous(),
        "zero_point": q.offset.mT.contiguous(),
    }


def read_tiles(inner, meta):
    """A word holds, for one of 8 rows and one of 4 pairs of columns, codes (0, 1) + 8 (0, 1) + 16 (0, 1), even ones first."""
    qdata = of(inner, "qdata", (torch.int32,))
    if qdata.dim() not in (4, 5) or qdata.shape[-2] != 32 or qdata.shape[-1] not in (1, 2, 4) or 0 in qdata.shape:
        raise ValueError(f"torchao: qdata has shape {tuple(qdata.shape)}, expected (n / 8, k / (32 t), 32, t) with t = 1, 2 or 4")
    *lead, rows, columns, _, t = qdata.shape
    codes = bits.words(qdata.reshape(-1, rows, columns, 8, 4, t), 4, (0, 2, 4, 6, 1, 3, 5, 7)).unflatten(-1, (t, 4, 2))
    codes = codes.permute(0, 1, 3, 2, 5, 6, 4, 7).reshape(*lead, 8 * rows, 32 * columns * t)
    n, k = codes.shape[-2:]
    shape = meta.get("shape") or list(codes.shape)
    if list(shape[:-2]) != lead or not 0 < shape[-2] <= n or not 0 < shape[-1] <= k:
        raise ValueError(f"torchao: qdata has shape {tuple(qdata.shape)}, which is no weight of shape {shape}, padded")
    size = _size(meta, shape)
    both = of(inner, "scale_and_zero", tuple(FLOATS.values()), (*lead, -(-k // size), n, 2), f"for groups of {size}")
    both = both[..., : -(-shape[-1] // size), : shape[-2], :]
    scale, zero = (both[..., i].mT.contiguous() for i in (0, 1))
    return _with_offset(codes[..., : shape[-2], : shape[-1]].contiguous(), scale, zero, size)


def read_plain_int32(inner, meta):
    qdata = of(inner, "qdata", (torch.int32,))
    shape = meta.get("shape") or ([qdata.shape[0], 8 * qdata.shape[1]] if qdata.dim() == 2 else [])
    if len(shape) != 2 or shape[-1] % 8 or qdata.numel() * 8 != shape[0] * shape[1] or not qdata.numel():
        raise ValueError(f"torchao: qdata has shape {tuple(qdata.shape)}, expected one word for 8 weights of shape {shape}")
    size = _size(meta, shape)
    stored = (-(-shape[1] // size), shape[0])
    scale = of(inner, "scale", tuple(FLOATS.values()), stored, f"for groups of {size}")
    zero = of(inner, "zero_point", (torch.int8, *FLOATS.values()), stored, f"for groups of {size}")
    if zero.dtype != torch.int8:
        raise NotImplementedError("torchao: Int4PlainInt32Tensor with a float zero_point is in the order of torch_npu, which is not public")
    if int(zero.min()) < 0 or int(zero.max()) > 15:
        raise ValueError(f"torchao: zero_point ranges from {int(zero.min())} to {int(zero.max())}, expected 0 to 15")
    fmt = Format(Int(4, False), name_of(scale.dtype), (1, size), zero="int")
    packed = qdata.reshape(shape[0], shape[1] // 8).clone()
    return QTensor(fmt, tuple(shape), packed, scale.mT.contiguous(), zero.mT.contiguous().view(torch.uint8))


def read_mx(inner, meta):
    qdata = data(inner, (*FLOAT8, torch.uint8, torch.float4_e2m1fn_x2))
    element = MX.get(meta.get("element")) or FLOAT8.get(qdata.dtype)
    if element is None or (FLOAT8.get(qdata.dtype, element) != element) or (qdata.dtype not in FLOAT8 and element.bits == 8):
        raise ValueError(
            f"torchao: qdata has dtype {qdata.dtype}, and elem_dtype is {meta.get('element')!r}, expected one of {', '.join(MX)} that fits"
        )
    codes = qdata.view(torch.uint8)
    codes = bits.nibbles(codes) if element.bits == 4 else codes
    if element.bits == 6 and int(codes.max()) >= 64:
        raise ValueError(f"torchao: qdata reaches {int(codes.max())}, expected at most 63 (6 bits)")
    size = meta.get("block_size") or [32]
    scale = _scales(inner, torch.float8_e8m0fnu, codes.shape, size[-1], meta)
    fmt = Format(element, "e8m0", (1, size[-1]))
    return QTensor(fmt, tuple(codes.shape), pack(codes, element.bits), scale)


def read_nvfp4(inner, meta):
    codes = bits.nibbles(data(inner, (torch.uint8, torch.float4_e2m1fn_x2)).view(torch.uint8))
    if meta.get("block_size") not in (None, [16]):
        raise ValueError(f"torchao: block_size is {meta['block_size']}, expected 16 for NVFP4Tensor")
    scale = _scales(inner, torch.float8_e4m3fn, codes.shape, 16, meta)
    second = None
    if inner.get("per_tensor_scale") is not None:
        second = of(inner, "per_tensor_scale", (torch.float32,))
        lead = codes.shape[:-2]
        if second.numel() not in (1, torch.Size(lead).numel()) or second.dim() not in (0, 1, 3):
            raise ValueError(
                f"torchao: per_tensor_scale has shape {tuple(second.shape)}, expected (), or ({codes.shape[0]}, 1, 1) of experts"
            )
        second = second.reshape([-1] + [1] * (codes.dim() - 1)).expand(*lead, 1, 1).clone()
    fmt = Format(Float(2, 1), "e4m3", (1, 16), scale_2=None if second is None else "tensor")
    return QTensor(fmt, tuple(codes.shape), pack(codes, 4), scale, None, second)


def write_mx(q, swizzled):
    name = next(n for n, e in MX.items() if e == q.format.element)
    inner = {"qdata": _elements(q, getattr(torch, name) if name.startswith("float8") else torch.uint8)}
    return inner | {"scale": _stored_scales(q, swizzled).view(torch.float8_e8m0fnu)}


def write_nvfp4(q, swizzled):
    inner = {"qdata": _elements(q, torch.uint8), "scale": _stored_scales(q, swizzled).view(torch.float8_e4m3fn)}
    return inner | (
        {} if q.scale_2 is None else {"per_tensor_scale": q.scale_2.reshape(() if q.scale_2.dim() == 2 else q.scale_2.shape).clone()}
    )


def _elements(q, dtype):
    codes = unpack(q.packed, q.format.element.bits, q.shape[-1])
    return (bits.join_nibbles(codes) if q.format.element.bits == 4 else codes).view(dtype)


def _scales(inner, dtype, shape, size, meta):
    """uint8 (..., n, k / size), out of the tiles where the shape says that they are in tiles: no weight has both shapes alike."""
    scale = of(inner, "scale", (dtype,)).view(torch.uint8)
    *lead, n, k = shape
    rows, columns = torch.Size(lead).numel() * n, k // size
    plain = (*lead, n, columns)
    tiles = 512 * -(-rows // 128) * -(-columns // 4)
    swizzled = tuple(scale.shape) != plain
    if k % size or (swizzled and scale.numel() != tiles):
        raise ValueError(
            f"torchao: scale has shape {tuple(scale.shape)}, expected {plain}, or {tiles} values in tiles of 128 x 4, "
            f"for groups of {size} and shape {tuple(shape)}"
        )
    if meta.get("swizzled") not in (None, swizzled):
        raise ValueError(f"torchao: scale has shape {tuple(scale.shape)}, but is_swizzled_scales is {meta['swizzled']}")
    return (unswizzle(scale, rows, columns).reshape(plain) if swizzled else scale).clone()


def _stored_scales(q, swizzled):
    if not swizzled:
        return q.scale.clone()
    *lead, n, columns = q.scale.shape
    tiles = swizzle(q.scale.reshape(-1, columns))
    if len(tiles) % max(torch.Size(lead).numel(), 1):
        raise ValueError(f"torchao: the tiles of {lead[0]} experts of {n} rows are no whole number for each; expected swizzled=False")
    return tiles.reshape(*lead, -1, tiles.shape[-1])


def swizzle(scale):
    """(rows, columns) as (32 ceil(rows / 128), 16 ceil(columns / 4)): tiles of 128 x 4, in each of which rows r, r + 32, r + 64 and
    r + 96 are neighbours; padded with zeros."""
    rows, columns = scale.shape
    padded = torch.nn.functional.pad(scale, (0, -columns % 4, 0, -rows % 128))
    tiles = padded.unflatten(1, (-1, 4)).unflatten(0, (-1, 4, 32)).permute(0, 3, 2, 1, 4)
    return tiles.reshape(32 * -(-rows // 128), 16 * -(-columns // 4))


def unswizzle(tiles, rows, columns):
    """The inverse of swizzle, from its values in any shape."""
    split = tiles.reshape(-(-rows // 128), -(-columns // 4), 32, 4, 4).permute(0, 3, 2, 1, 4)
    return split.reshape(128 * -(-rows // 128), 4 * -(-columns // 4))[:rows, :columns]
