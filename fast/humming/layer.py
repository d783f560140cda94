"""A QTensor as the tensors that Humming's kernels read.

Every weight becomes the one kind of layer that Humming computes with a single rounding of the result: scales of x's dtype, one
for each row and group along k, and one float32 scale for the tensor. Scales by channel would be applied to the rounded result,
and without a tensor scale so would the power of two by which Humming shifts small exponents.
"""

import torch
from torch.nn.functional import pad

from fast.scale import decoded_scale
from ref.element import Int, values

from .rules import exponent_shift, group_size, in_blocks, scale_dtype

# Rows and columns are padded to whole tiles: zero scales make the padding vanish.
TILE = 128
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
# The least product of two e4m3 codes; of two integers, 1.
LEAST_PRODUCT = 2.0**-18


def build(q, request, bias=None):
    """(LayerConfig, tensors) for one weight (n, k), or for a stack of expert weights (e, n, k).

    Args:
        bias: None, or (e, n): what comes with one more column of x, full of ones, at bias_column.

    Raises:
        NotImplementedError: values that Humming would change.
    """
    from humming.config import LayerConfig
    from humming.transform import transform_humming_tensors

    fmt, (*experts, n, k) = q.format, q.shape
    element, x_format, blocks = fmt.element, request.x_format, in_blocks(request)
    g = group_size(fmt, x_format)
    used = k if bias is None else bias_column(k, g) + 1
    rows, columns = padded((n, used))
    _check_codes(q)
    kept = torch.float32 if blocks else scale_dtype(request)
    scale, tensor_scale = _scales(q, kept)
    _check_scales(scale, request)
    zero = _zero(q, g)
    words = columns * element.bits // 32
    weight = pad(q.packed, (0, words - q.packed.shape[-1], 0, rows - n)).contiguous()
    scale = _blocks(scale, rows, columns) if blocks else _grid(scale, fmt, n, k, g)
    if bias is not None:
        scale, zero = (t if t is None else pad(t, (0, columns // g - t.shape[-1])) for t in (scale, zero))
        _add_bias(weight, scale, bias, request, used - 1, g)
    major, minor = torch.cuda.get_device_capability(request.device)
    config = LayerConfig(
        sm_version=10 * major + minor,
        shape_n=rows,
        shape_k=columns,
        pad_shape_n=rows - _even(n, 8),
        pad_shape_k=columns - _even(used, 8 if x_format is None else 16),
        num_experts=experts[0] if experts else 0,
        a_dtype=NAMES[request.x_dtype] if x_format is None else _dtype(x_format.element).removeprefix("u"),
        b_dtype=_dtype(element),
        c_dtype=NAMES[request.x_dtype],
        bs_dtype=NAMES[kept],
        weight_scale_group_size=g,
        weight_scale_group_size_n=fmt.group[0] if blocks else 0,
        weight_scale_type="block" if blocks else "group",
        weight_scale_2_type=None if blocks else "tensor",
        has_zero_point=zero is not None,
        use_int_weight_scale=False,
        use_fused_e8m0_scale=False,
        **_input_options(x_format),
    )
    tensors = {"weight": weight, "weight_scale": scale}
    if not blocks:
        tensors["weight_scale_2"] = tensor_scale
    if zero is not None:
        tensors["zero_point"] = _packed_along_n(zero, element.bits)
    return config, transform_humming_tensors(config, tensors, already_padded=True)


def padded(shape):
    """Rows and columns as the kernel multiplies them."""
    return tuple(-(-size // TILE) * TILE for size in shape)


def bias_column(k, g):
    """Which column of x is full of ones where a bias is built in: the first of a group of its own."""
    return -(-k // g) * g


def _add_bias(weight, scale, bias, request, column, g):
    """One code of value 1 in each row, in a group whose scale is the bias: the product adds it before it is rounded."""
    element = request.format.element
    kept = bias.to(scale.dtype)
    if not torch.equal(kept.double(), bias.double()):
        raise NotImplementedError(f"the bias ({bias.dtype}) is not representable in {scale.dtype}, in which Humming would keep it")
    _check_scales(kept, request)
    table = values(element)
    code = int((table.abs() == 1).nonzero()[-1 if isinstance(element, Int) else 0])
    scale[..., : bias.shape[-1], column // g] = kept * float(table[code])
    word, shift = divmod(column * element.bits, 32)
    weight[..., : bias.shape[-1], word] |= (code << shift) - (2**32 if code << shift >= 2**31 else 0)


def _dtype(element):
    return f"uint{element.bits}" if isinstance(element, Int) else f"float{element.bits}e{element.exponent}m{element.mantissa}"


def _input_options(x_format):
    if x_format is None:
        return {}
    if x_format.group[1]:
        return {"input_quant_mode": "dynamic_group", "input_scale_group_size": x_format.group[1]}
    return {"input_quant_mode": "dynamic_token" if x_format.group[0] else "static_tensor"}


def _even(size, multiple):
    """The size that the launcher sees: rows of 16 bytes."""
    return -(-size // multiple) * multiple


def _check_codes(q):
    element = q.format.element
    if isinstance(element, Int) or element.specials == "finite":
        return
    codes = q.packed.contiguous().view(torch.uint8)[..., : q.shape[-1]]
    special = (~values(element).isfinite()).nonzero()[:, 0].tolist()
    if any(bool((codes == code).any()) for code in special):
        raise NotImplementedError(f"the weight holds inf or NaN codes of {element}, which Humming reads as numbers")


def _scales(q, dtype):
    """The scales of groups in this dtype, exactly, and the scale of the tensor, float32 (1,)."""
    fmt = q.format
    exact = decoded_scale(q.scale, fmt.scale)
    if fmt.group == (0, 0):
        return torch.ones_like(exact, dtype=dtype), exact.flatten().float()
    scale = exact.to(dtype)
    if not torch.equal(scale.double(), exact):
        raise NotImplementedError(f"some scales of {fmt} are not representable in {dtype}, in which Humming keeps them")
    if q.scale_2 is not None:
        return scale, q.scale_2.flatten().float().contiguous()
    return scale, torch.ones(q.shape[0] if len(q.shape) == 3 else 1, device=q.scale.device)


def _check_scales(scale, request):
    """What is multiplied by a scale, a weight or a sum, must still be a normal number: a subnormal one would lose bits."""
    fmt = request.format
    shift = exponent_shift(fmt, request.x_dtype)
    if scale.numel() == 0 or (request.x_format is None and shift == 0):
        return
    if request.x_format is None:
        table = values(fmt.element, scale.device).abs()
        least, dtype = float(table[(table > 0) & table.isfinite()].min()) * 2.0**-shift, request.x_dtype
    else:
        least, dtype = LEAST_PRODUCT, torch.float32
    size = scale.double().abs()
    if bool(((size > 0) & (size * least < torch.finfo(dtype).tiny)).any()):
        raise NotImplementedError(f"some scales are so small that what Humming multiplies by them would be subnormal in {dtype}")


def _grid(t, fmt, n, k, g):
    """Values by the format's groups as values by row and kernel group, zero where the weight is padded: (..., N, K / g)."""
    gn, gk = fmt.group
    rows, columns = padded((n, k))
    row = torch.arange(n, device=t.device) // gn if gn else torch.zeros(n, dtype=torch.long, device=t.device)
    start = torch.arange(-(-k // g), device=t.device) * g
    column = start // gk if gk else torch.zeros_like(start)
    return pad(t[..., row, :][..., column], (0, columns // g - column.numel(), 0, rows - n)).contiguous()


def _blocks(scale, rows, columns):
    """One scale for each block of the padded weight: (..., N / 128, K / 128)."""
    return pad(scale, (0, columns // TILE - scale.shape[-1], 0, rows // TILE - scale.shape[-2])).contiguous()


def _zero(q, g):
    """The zero points of an unsigned integer, 0 where the format has none; None for other elements."""
    element = q.format.element
    if not isinstance(element, Int) or element.signed:
        return None
    zero = torch.zeros_like(q.scale, dtype=torch.uint8) if q.zero is None else q.zero
    return _grid(zero, q.format, *q.shape[-2:], g)


def _packed_along_n(zero, bits):
    from humming.ops import pack_weight

    return pack_weight(zero.transpose(-1, -2).to(torch.int32).contiguous(), bits).transpose(-1, -2).contiguous()
