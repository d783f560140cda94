"""GemLite's Triton kernels, as its helpers set them up. CUDA only.

    A16Wn          integers of 1, 2, 4 and 8 bits by group, HQQ's meaning: (code - zero) * scale, all in x's dtype
    A16W8_INT8     int8 by row, float32 scales          A16W8_FP8    e4m3 by row, float32 scales
    A16W8_MXFP, A16W4_MXFP, A16W4_NVFP                  mxfp8, mxfp4, nvfp4
    A8W8_int8_dynamic, A8W8_fp8_dynamic                 int8 or e4m3 x quantized by token

Not autotuned, which leaves one configuration for one or a few tokens, and two for more: each process takes the one that it finds faster for a
shape. For fewer than 64 tokens one of the two splits k and adds the halves in x's dtype, so that results differ from process to process.

Source: gemlite 0.6.0.post2, helper.py and core.py.
"""

import functools
from dataclasses import replace

import torch

from ref.element import NAMED, Float, Int
from ref.format import FORMATS as BY_NAME
from ref.format import parse_format
from ref.layouts.bits import sign_extended

from . import codes_of, exactly, need, package, plain, version_of

__version__ = version_of("gemlite")

FORMATS = (
    "int4_g128_bf16",
    "uint4z_g128",
    "uint4_g64_fp16_zfp16",
    "int2_g64",
    "int8",
    "fp8",
    "mxfp4",
    "mxfp8",
    "nvfp4",
    "fp4_e2m1_g16_e4m3_tensor2div",
)
VARIANTS = {"linear": ("exact", "weight_rounded")}

BY_ROW, TOKEN = (1, 0), (1, 0)
WIDTHS = (1, 2, 4, 8)
COLUMNS = 32
DYNAMIC = {Int(8): "A8W8_int8_dynamic", NAMED["e4m3"]: "A8W8_fp8_dynamic"}


def linear(x, w, bias=None, *, x_format=None, x_scale=None):
    need(__version__ is None or x.is_cuda, "gemlite runs on CUDA only")
    helper = _helper()
    need(x.dtype in (torch.float16, torch.bfloat16) and x.numel() and w.shape[0], "gemlite takes float16 or bfloat16, and no empty x")
    need(bias is None, "gemlite adds a bias to the rounded result")
    plain(w, "gemlite")
    need(w.format.offset is None and w.shape[1] % COLUMNS == 0, f"gemlite adds no offset, and takes k as a multiple of {COLUMNS}")
    prepare = _weight_only if x_format is None else _dynamic
    layer = prepare(helper, w, x, None if x_format is None else parse_format(x_format))
    try:
        y = layer(x.reshape(-1, x.shape[-1]))
    except RuntimeError as error:
        # Triton 3.6 cannot take a product with e4m3 scales apart, which GPUs before Blackwell need (its pull request 9772).
        refused = w.format.scale == "e4m3" and "PassManager" in str(error)
        need(not refused, f"Triton compiles no product with e4m3 scales for this GPU: {error}")
        raise
    return y.reshape(*x.shape[:-1], w.shape[0])


@functools.cache
def _helper():
    """gemlite.helper, without autotuning: set once, as setting it makes all kernels anew, which are then compiled and timed again."""
    package("gemlite").set_autotune(False)
    return package("gemlite.helper")


def _weight_only(helper, w, x, _):
    fmt, options = w.format, {"device": x.device, "dtype": x.dtype}
    codes = codes_of(w)
    if replace(fmt, scale_2="tensor") == BY_NAME["nvfp4"] and fmt.scale_2 in ("tensor", "tensor_divisor"):
        second = w.scale_2.reshape(())
        divisor = second if fmt.scale_2 == "tensor_divisor" else 1 / second
        need(fmt.scale_2 == "tensor_divisor" or bool(1 / divisor == second), "gemlite divides by NVFP4's second scale")
        return helper.A16W4_NVFP(**options).from_weights(codes, scales=w.scale.view(torch.float8_e4m3fn), meta_scale=divisor)
    need(fmt.scale_2 is None, "gemlite has a second scale in NVFP4 only")
    if fmt == BY_NAME["mxfp4"]:
        return helper.A16W4_MXFP(**options).from_weights(codes, w.scale.view(torch.float8_e8m0fnu))
    if fmt == BY_NAME["mxfp8"]:
        return helper.A16W8_MXFP(**options).from_weights(codes.view(torch.float8_e4m3fn), w.scale.view(torch.float8_e8m0fnu))
    need(w.scale.dtype.is_floating_point, f"gemlite has no {fmt}")
    if fmt.element in DYNAMIC and fmt.group == BY_ROW:
        made = helper.A16W8_INT8 if fmt.element == Int(8) else helper.A16W8_FP8
        return made(**options).from_weights(_eight(codes, fmt.element), scales=w.scale.float())
    need(isinstance(fmt.element, Int) and fmt.element.bits in WIDTHS and fmt.group[0] == 1, f"gemlite has no {fmt}")
    group = fmt.group[1] or w.shape[1]
    need(w.shape[1] % group == 0, "gemlite has whole groups")
    middle = torch.full_like(w.scale, 2 ** (fmt.element.bits - 1) if fmt.element.signed else 0)
    scale = exactly(w.scale, x.dtype, "gemlite's scales")
    zero = exactly(middle if w.zero is None else w.zero.to(torch.float32), x.dtype, "gemlite's zeros")
    return helper.A16Wn(**options).from_weights(codes, scale, zero, fmt.element.bits, group)


def _dynamic(helper, w, x, x_format):
    fmt = w.format
    plain_scale = fmt.scale == x_format.scale == "fp32" and fmt.group == BY_ROW and fmt.scale_2 is None
    same = fmt.element == x_format.element and fmt.element in DYNAMIC
    need(
        plain_scale and same and x_format.group == TOKEN and not x_format.hadamard,
        "gemlite multiplies int8 or e4m3 rows by the same tokens",
    )
    made = getattr(helper, DYNAMIC[fmt.element])(device=x.device, dtype=x.dtype)
    return made.from_weights(_eight(codes_of(w), fmt.element), scales=w.scale)


def _eight(codes, element):
    return codes.view(torch.float8_e4m3fn) if isinstance(element, Float) else sign_extended(codes, 8)
