"""Right changes of the same code: other orders, other tiles, other legal roundings. All of them pass: what a verdict of "fail" is worth."""

from . import kernels
from .dense import CODE, CODES, DIVISOR, EAGER, FEW_ROWS, INPUT, LINEAR, PRODUCT, SCALE, ZERO
from .engine import Mutant
from .kernels import GEMM, KERNEL, NUMERICS, PARTS, SPECIAL, TILES

W = "(hadamard(w, fmt.hadamard) if fmt.hadamard else w)"


def _torch(name, path, find, replace, label, what, op="linear", **rest):
    return Mutant(name, "variation", path, find, replace, op, label, "torch", what, **rest)


def _alone(name, path, find, replace, op, label, what):
    return Mutant(name, "variation", path, find, replace, op, label, None, what)


def _triton(name, path, find, replace, label, what, op="linear", **rest):
    return Mutant(name, "variation", path, find, replace, op, label, "triton", what, **rest)


VARIATIONS = (
    _torch("rows_in_chunks", *FEW_ROWS, "int8", "weights a few rows at a time"),
    _torch("rounded_by_way_of_float32", EAGER, "if w.dtype != torch.float64 or dtype not in (torch.float16, torch.bfloat16):", "if True:", "int8", "the sum as a float32, then rounded"),
    _torch("sums_in_float32", EAGER, PRODUCT, f"y = (a.float() @ {W}.float().T).double()", "int4_g128", "float32 products and sums"),
    _torch("sums_in_float32_of_x_in_codes", EAGER, PRODUCT, f"y = (a.float() @ {W}.float().T).double()", "fp8", "float32 products and sums", op="linear_x"),
    _torch("sums_backwards", EAGER, PRODUCT, f"y = (a.flip(1).float() @ {W}.flip(1).float().T).double()", "int4_g128_bf16", "order of k"),
    _torch("sums_of_even_and_odd", EAGER, PRODUCT, f"y = (a[:, ::2].float() @ {W}[:, ::2].float().T).double() + (a[:, 1::2].float() @ {W}[:, 1::2].float().T).double()", "uint4z_g128", "k split in two"),
    _torch("sums_one_by_one", EAGER, PRODUCT, f"y = torch.zeros(a.shape[0], w.shape[0])\n                for i in range(a.shape[1]):\n                    y = torch.addcmul(y, a[:, i, None].float(), {W}[None, :, i].float())\n                y = y.double()", "mxfp4", "one after the other, fused multiply-add"),
    _torch("sums_of_blocks_of_16", EAGER, PRODUCT, f"y = torch.zeros(a.shape[0], w.shape[0])\n                for part, other in zip(a.split(16, 1), {W}.split(16, 1)):\n                    y = y + (part @ other.T).float()\n                y = y.double()", "mxfp8", "a matrix unit's blocks"),
    _torch("split_k_of_8", EAGER, PRODUCT, f"y = torch.stack([p.float() @ o.float().T for p, o in zip(a.tensor_split(8, 1), {W}.tensor_split(8, 1))]).sum(0).double()", "nf4_g64", "k split in eight"),
    _torch("weight_rounded_to_x", EAGER, "w = self.weight(rows)\n", "w = (self.weight(rows) if fmt.hadamard else _round_once(self.weight(rows), x.dtype).double())\n", "int4_g128", "ref's variant weight_rounded"),
    _torch("rotation_of_x", EAGER, "elif fmt.hadamard and not in_float64:", "elif fmt.hadamard:", "int4_g32_h16", "ref's variant input_rotated", opens=((EAGER, PRODUCT, "y = a.double() @ (w if self.x_format is None or not fmt.hadamard else hadamard(w, fmt.hadamard)).T"),)),
    _torch("divisor_by_its_reciprocal", EAGER, DIVISOR, 'w = w * (1 / second.float()).double() if fmt.scale_2.endswith("divisor") else w * second', "fp4_e2m1_g16_e4m3_tensor2div", "reciprocal and product"),
    _torch("scales_multiplied_first", EAGER, SCALE, "w = (w.float() * decoded_scale(q.scale[row], fmt.scale).float()[:, self.group]).double()", "nvfp4", "weights in float32"),
    _torch("scale_after_the_difference_in_float32", EAGER, f"{ZERO}\n", "w = (w.float() - q.zero[row].float()[:, self.group]).double()\n", "uint4_g64_fp16_zfp16", "difference in float32"),
    _torch("bias_in_float32", EAGER, "y + bias[rows].detach().to(y.dtype)", "(y.float() + bias[rows].detach().float()).double()", "int8", "bias added in float32"),
    _torch("x_always_copied", LINEAR, "    if rows.stride(1) != 1:\n", "    if True:\n", "int8", "a contiguous copy"),
    _torch("out_by_way_of_a_copy", LINEAR, "plan.run(rows, bias, x_scale, result)", "other = torch.empty_like(result)\n        plan.run(rows, bias, x_scale, other)\n        result.copy_(other)", "fp8_e5m2", "out= written at last"),
    _torch("nothing_remembered", "fast/dispatch.py", "    prepared = _PREPARED.get(w)\n", "    prepared = None\n", "int3_g128", "prepared anew"),
    _torch("codes_bit_by_bit", CODES, CODE, "return sum(((pair >> (start % 32 + i)) & 1) << i for i in range(bits))", "fp6_e3m2", "another way to the same codes"),
    _torch("zero_points_scaled_apart", EAGER, f"            {ZERO}\n        {SCALE}", "            scales = decoded_scale(q.scale[row], fmt.scale).float()\n            w = (w.float() * scales[:, self.group] - (q.zero[row].float() * scales)[:, self.group]).double()\n        else:\n            w *= decoded_scale(q.scale[row], fmt.scale)[:, self.group]", "uint4z_g128", "value * scale - zero * scale in float32"),
    _torch("rotation_scaled_first", "fast/hadamard.py", "    half = 1\n", "    y = y * block**-0.5\n    half = 1\n", "int4_g32_h16", "order of factors", opens=(("fast/hadamard.py", "(y.reshape(x.shape) * block**-0.5)", "y.reshape(x.shape)"),)),
    _torch("x_times_a_reciprocal", INPUT, "units, exponent = _round(rows / steps, fmt.element)", "units, exponent = _round(rows * (1 / steps), fmt.element)", "int8", "reciprocal and product", op="linear_x"),
    _alone("codes_by_a_reciprocal", INPUT, "units, exponent = _round(turned / steps, fmt.element)", "units, exponent = _round(turned * (1 / steps), fmt.element)", "quantize_input", "int8_token", "reciprocal and product"),
    _alone("scales_by_a_reciprocal", INPUT, "raw = (amax / top)", "raw = (amax * (1.0 / top))", "quantize_input", "fp8_e4m3_token", "reciprocal and product"),
    _alone("dequantized_in_float32", EAGER, "part = plan.weight(rows)\n", "part = plan.weight(rows).float().double() if dtype != torch.float64 else plan.weight(rows)\n", "dequantize", "int4_g128", "one rounding more"),
    _triton("small_tiles", *TILES, "int4_g128", "tiles of 16 x 64 x 128"),
    _triton("small_tiles_of_small_groups", *TILES, "nvfp4", "tiles of 16 x 64 x 128"),
    _triton("long_tiles", GEMM, TILES[1], "tile = Tile(32, 16, 256)", "int8", "tiles of 32 x 16 x 256"),
    _triton("steps_backwards", KERNEL, "    for step in range(first, last):\n", "    for back in range(first, last):\n        step = first + last - 1 - back\n", "int4_g32", "order of k"),
    _triton("tiles_of_m_first", KERNEL, "    tile_n = tile % rows_n\n    tile_m = tile // rows_n\n", "    rows_m = (m + BM - 1) // BM\n    tile_m = tile % rows_m\n    tile_n = tile // rows_m\n", "int4_g128", "order of tiles", opens=(TILES,)),
    _triton("scales_of_sums_for_scales_of_weights", NUMERICS, "and gk < 64 and gk & (gk - 1) == 0:", "and gk < 0 and gk & (gk - 1) == 0:", "nvfp4", "scale after the product"),
    _triton("kernels_for_integers", *SPECIAL, "int4_g128", "other kernels"),
    _triton("kernels_for_integers_with_zero_points", *SPECIAL, "uint4z_g128", "other kernels"),
    _triton("k_split_between_blocks", *PARTS, "int8", "k split", opens=(SPECIAL,)),
    _triton("k_split_between_blocks_of_groups", *PARTS, "int4_g32", "k split", opens=(SPECIAL,)),
    _triton("x_quantized_by_double_rounding", kernels.INPUT, "        return (u | (rest != 0).to(tl.int32)).to(tl.float32, bitcast=True)\n    else:", "        return t\n    else:", "mxfp8", "a quotient rounded to float32 first", op="linear_x"),
)  # fmt: skip
