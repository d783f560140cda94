"""Mutants of the Triton kernels: tiles, masks, packed codes, scales, sums, roundings, what prepares them, and what only a GPU shows."""

from .engine import Mutant

KERNEL, GEMM, DECODE, NUMERICS = "fast/triton/gemm_kernel.py", "fast/triton/gemm.py", "fast/triton/decode.py", "fast/triton/numerics.py"
INPUT, GATHER, ROTATE, REARRANGE = "fast/triton/quantize_input.py", "fast/triton/gather.py", "fast/triton/rotate.py", "fast/rearrange.py"
SMALL, WIDE, FRAGMENTS, SPLIT = "fast/triton/small_m.py", "fast/triton/wide.py", "fast/triton/fragments.py", "fast/triton/split_k.py"
WEIGHT_ONLY, LAUNCH = "fast/triton/weight_only.py", "fast/triton/launch.py"

# The interpreter is quickest with large tiles: here, small ones, so that there are several of them along every axis.
TILES = (
    GEMM,
    "tile = Tile(min(64, max(16, _power_of_two(m))), min(128, max(16, _power_of_two(n))), 1024)",
    "tile = Tile(16, 64, 128)",
)
# The kernels for integer weights, in the interpreter, too; and k split wherever there are two tiles along it.
SPECIAL = (WEIGHT_ONLY, '        return "Triton\'s interpreter is quicker with the general kernel"\n', "        return None\n")
PARTS = (WEIGHT_ONLY, "min(wanted, tiles_k // min(16, 1024 // tile.bm))", "min(max(wanted, 2), tiles_k)")
# Split where there are two steps, on the GPU.


def _gemm(name, group, path, find, replace, label, stands_for, op="linear", **rest):
    return Mutant(name, group, path, find, replace, op, label, "triton", stands_for, **rest)


def _special(name, group, path, find, replace, label, stands_for, opens=(), op="linear", **rest):
    return Mutant(name, group, path, find, replace, op, label, "triton", stands_for, opens=(SPECIAL, *opens), **rest)


LOAD_X = "xv = tl.load(x_rows + columns, mask=columns < stop, other=0.0)"
STORE = "mask=(rm < m)[None, :] & (rn < n)[:, None]"
HUB = "https://github.com/"

GENERAL = (
    _gemm("gemm_rows_of_n_not_masked", "mask", KERNEL, STORE, "mask=(rm < m)[None, :]", "int8", HUB + "huggingface/kernels-community/pull/1154"),
    _gemm("gemm_rows_of_m_not_masked", "mask", KERNEL, STORE, "mask=(rn < n)[:, None]", "int8", "dropped mask"),
    _gemm("gemm_last_row_not_stored", "memory", KERNEL, STORE, "mask=(rm < m - (m > 1))[None, :] & (rn < n)[:, None]", "int8", "off by one"),
    _gemm("gemm_x_past_k_not_masked", "mask", KERNEL, LOAD_X, "xv = tl.load(x_rows + columns)", "int8", HUB + "triton-lang/triton/issues/630"),
    _gemm("gemm_x_past_k_reads_one", "mask", KERNEL, LOAD_X, LOAD_X.replace("0.0", "1.0"), "int4_g128", "wrong padding"),
    _gemm("gemm_x_past_the_group_counted", "mask", KERNEL, "stop = tl.minimum(step // SUB * STEP + STEP, k)", "stop = k", "int4_g24", HUB + "triton-lang/triton/issues/1760"),
    _gemm("gemm_tail_of_k_dropped", "mask", KERNEL, "steps = (k + BK - 1) // BK", "steps = tl.maximum(k // BK, 1)", "int8", HUB + "triton-lang/triton/issues/934", opens=(TILES,)),
    _gemm("gemm_last_group_dropped", "mask", KERNEL, "steps = k // STEP * SUB + (k % STEP + BK - 1) // BK", "steps = k // STEP * SUB", "int4_g32", "dropped tail"),
    _gemm("gemm_group_is_the_step", "layout", KERNEL, "                    group = k0 // GK\n", "                    group = step\n", "int4_g128", HUB + "foundation-model-stack/foundation-model-stack/issues/153", opens=((*TILES[:2], "tile = Tile(64, 128, 64)"),)),
    _gemm("gemm_zero_of_first_group", "scale", KERNEL, "tl.load(zero_rows + k0 // GK)", "tl.load(zero_rows)", "uint4z_g128", HUB + "naver-aics/lut-gemm/issues/4"),
    _gemm("gemm_zero_dropped", "scale", KERNEL, "                v = v - z\n", "                v = v\n", "uint4z_g128", HUB + "vllm-project/vllm/pull/21066"),
    _gemm("gemm_zero_after_the_scale", "scale", KERNEL, "                v = v - z\n", "                v = v - z * 2.0\n", "uint4_g64_fp16_zfp16", "wrong factor"),
    _gemm("gemm_offset_of_first_group", "scale", KERNEL, "tl.load(offset_rows + group)", "tl.load(offset_rows)", "uint4_g32_fp16_ofp16", "off by one"),
    _gemm("gemm_offset_not_times_x", "scale", KERNEL, "[:, None] * x_sum[None, :]", "[:, None] + x_sum[None, :] * 0", "uint4_g32_fp16_ofp16", "dropped factor"),
    _gemm("gemm_sum_of_x_cut_off", "mask", KERNEL, "x_sum = tl.reduce(xv.to(tl.float32), 1, tl.standard._sum_combine)", "x_sum = tl.reduce(tl.where(columns < k - 1, xv.to(tl.float32), 0.0), 1, tl.standard._sum_combine)", "uint4_g32_fp16_ofp16", "off by one"),
    _gemm("gemm_sum_starts_again", "rounding", KERNEL, "            acc += p\n", "            acc = p\n", "int4_g32", "assignment for addition"),
    _gemm("gemm_sums_in_half", "rounding", KERNEL, "            acc += p\n", "            acc = (acc + p).to(tl.float16).to(tl.float32)\n", "int4_g32", HUB + "deepseek-ai/DeepGEMM/issues/32"),
    _gemm("gemm_sums_of_steps_in_half", "rounding", KERNEL, "                p = p * s[:, None]\n", "                p = p.to(tl.float16).to(tl.float32) * s[:, None]\n", "int4_g128", "narrowed type"),
    _gemm("gemm_scale_of_next_row", "layout", KERNEL, "scale_rows = scale + gn.to(tl.int64) * stride_s", "scale_rows = scale + tl.minimum(gn + 1, n - 1).to(tl.int64) * stride_s", "int8", "off by one"),
    _gemm("gemm_scale_of_first_group", "scale", KERNEL, "s = load_scale(scale_rows + group, scale_table, gn >= 0)", "s = load_scale(scale_rows, scale_table, gn >= 0)", "int4_g128", HUB + "naver-aics/lut-gemm/issues/4"),
    _gemm("gemm_small_groups_start_again", "layout", KERNEL, "groups = k0 // GK + tl.arange(0, BK // GK)[None, :]", "groups = tl.arange(0, BK // GK)[None, :]", "nvfp4", "off by one", opens=(TILES,)),
    _gemm("gemm_second_scale_dropped", "scale", KERNEL, "out = out * tl.load(scale_2)\n", "out = out * 1.0\n", "nvfp4", "dropped factor"),
    _gemm("gemm_divisor_multiplied", "scale", KERNEL, "out = tl.div_rn(out, tl.load(scale_2))", "out = out * tl.load(scale_2)", "fp4_e2m1_g16_e4m3_tensor2div", HUB + "modular/modular/issues/6600"),
    _gemm("gemm_channel_scale_of_the_tile", "scale", KERNEL, "out = tl.div_rn(out, tl.load(scale_2 + an)[:, None])", "out = tl.div_rn(out, tl.load(scale_2 + tile_n * BN))", "int8_channel2div", "off by one"),
    _gemm("gemm_x_scale_of_first_row", "scale", KERNEL, "out = out * tl.load(x_scale_2 + ax)[None, :]", "out = out * tl.load(x_scale_2)", "int8", HUB + "vllm-project/vllm-xpu-kernels/pull/397", op="linear_x"),
    _gemm("gemm_x_scale_of_first_group", "scale", KERNEL, "tl.load(xs_rows + k0 // X_GROUP)", "tl.load(xs_rows)", "mxfp8", "off by one", op="linear_x"),
    _gemm("gemm_bias_dropped", "scale", KERNEL, "out = out + to_float32(tl.load(bias + an))[:, None]", "out = out + 0.0", "int8", "dropped term"),
    _gemm("gemm_bias_before_the_scale", "scale", KERNEL, "out = acc.to(tl.float32) * out_1", "out = acc.to(tl.float32) * out_1\n        if HAS_BIAS:\n            out = out + to_float32(tl.load(bias + an))[:, None]", "int8", HUB + "vllm-project/vllm/pull/31676"),
    _gemm("gemm_bias_of_the_tile", "layout", KERNEL, "tl.load(bias + an)", "tl.load(bias + an - tile_n * BN)", "int8", "off by one", opens=(TILES,)),
    _gemm("gemm_tiles_transposed", "layout", KERNEL, "    tile_n = tile % rows_n\n    tile_m = tile // rows_n\n", "    tile_m = tile % rows_n\n    tile_n = tile // rows_n\n", "int4_g128", "axes swapped", opens=(TILES,)),
    _gemm("gemm_rows_of_w_in_16_bits", "layout", KERNEL, "w_rows = w + an.to(tl.int64)[:, None] * row_bytes", "w_rows = w + (an[:, None] * row_bytes).to(tl.uint16).to(tl.int64) % 4096", "int8", HUB + "databricks/megablocks/pull/185"),
    _gemm("gemm_stride_of_x_ignored", "layout", KERNEL, "x_rows = x + ax.to(tl.int64)[:, None] * stride_x", "x_rows = x + ax.to(tl.int64)[:, None] * k", "int8", HUB + "vllm-project/vllm/pull/14658"),
    _gemm("gemm_codes_in_wrong_order", "layout", DECODE, "tl.join(c & 15, c >> 4)", "tl.join(c >> 4, c & 15)", "int4_g128", HUB + "mit-han-lab/TinyChatEngine/pull/13"),
    _gemm("gemm_2_bits_in_wrong_order", "layout", DECODE, "tl.join(tl.join(c & 3, (c >> 4) & 3), tl.join((c >> 2) & 3, c >> 6))", "tl.join(tl.join(c & 3, (c >> 2) & 3), tl.join((c >> 4) & 3, c >> 6))", "int2_g64", "order of bits"),
    _gemm("gemm_codes_across_bytes_cut", "layout", DECODE, "        if 8 % BITS != 0:", "        if 8 % BITS > 8:", "int3_g128", "dropped term"),
    _gemm("gemm_codes_across_bytes_shifted", "layout", DECODE, ".to(tl.int32) << 8", ".to(tl.int32) << 7", "fp6_e3m2", "off by one"),
    _gemm("gemm_odd_groups_read_by_bytes", "layout", GEMM, '"WHOLE_BYTES": 8 % bits == 0 and not crossing,', '"WHOLE_BYTES": 8 % bits == 0,', "int4_g7", HUB + "triton-lang/triton/issues/5990"),
    _gemm("gemm_even_though_groups_are_not", "mask", GEMM, '"EVEN": self.k % tile.bk == 0 and not crossing,', '"EVEN": self.k % min(tile.bk, self.step or tile.bk) == 0,', "int4_g100", "dropped condition"),
    _gemm("gemm_middle_off_by_one", "scale", NUMERICS, '"MIDDLE": 2 ** (element.bits - 1) if element.signed else 0', '"MIDDLE": 2 ** (element.bits - 1) - 1 if element.signed else 0', "int8", HUB + "AutoGPTQ/AutoGPTQ/issues/331"),
    _gemm("gemm_exponent_not_rebiased", "scale", NUMERICS, '"UNBIAS": 2.0 ** (127 - bias)', '"UNBIAS": 2.0 ** (128 - bias)', "fp8", HUB + "vllm-project/vllm/pull/47315"),
    _gemm("gemm_sign_of_fp4_lost", "layout", DECODE, "        if SIGNED:\n", "        if SIGNED and MANTISSA > 1:\n", "mxfp4", "dropped bit"),
    _gemm("gemm_subnormals_of_fp8_flushed", "rounding", DECODE, "        if SIGNED:\n", "        v = tl.where(magnitude < (1 << MANTISSA), 0.0, v)\n        if SIGNED:\n", "fp8", "flushed subnormals"),
    _gemm("gemm_table_shifted", "layout", DECODE, "return tl.load(table + code)", "return tl.load(table + (code ^ 1))", "nf4_g64", "off by one"),
    _gemm("gemm_scale_codes_off_by_two", "scale", DECODE, "tl.load(table + stored.to(tl.int32), mask=mask", "tl.load(table + tl.maximum(stored.to(tl.int32) - 2, 0), mask=mask", "mxfp4", HUB + "vllm-project/compressed-tensors/pull/538"),
    _gemm("gemm_bf16_cut_off", "rounding", DECODE, "rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16", "rounded = u >> 16", "int8", HUB + "ROCm/aiter/issues/5151"),
    _gemm("gemm_bf16_half_up", "rounding", DECODE, "rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16", "rounded = (u + 0x8000) >> 16", "int8", HUB + "sgl-project/sglang/pull/37140"),
    _gemm("gemm_far_scales_not_given_back", "scale", KERNEL, "out = out * tl.load(far + n + an)[:, None]", "out = out * 1.0", "fp8_e7m0_g32", "dropped factor"),
    _gemm("gemm_far_scales_of_the_wrong_rows", "layout", KERNEL, "near = tl.load(far + an)", "near = tl.load(far + n - 1 - an)", "fp8_e7m0_g32", "axis reversed"),
    _gemm("gemm_zero_points_overflow_int8", "scale", NUMERICS, "return (values[:, None] - q.zero.unique().double().cpu()).flatten().unique()", "return values - 128", "uint8z", "overflow", op="linear_x"),
    _gemm("gemm_steps_cross_groups_of_x", "layout", NUMERICS, "groups += [x_format.group[1]] if x_format is not None else []", "groups += []", "fp8", HUB + "sgl-project/sglang/issues/39626", op="linear_x"),
    _gemm("gemm_transposed_x_not_copied", "layout", "fast/linear.py", "rows = rows.contiguous()", "pass", "int8", HUB + "ELS-RD/kernl/issues/227"),
)  # fmt: skip

AROUND = (
    _gemm("x_e8m0_scale_to_nearest", "rounding", INPUT, "(u + 0x7FFFFF) & 0x7F800000", "(u + 0x3FFFFF) & 0x7F800000", "mxfp8", HUB + "vllm-project/vllm/pull/43557", op="linear_x"),
    _gemm("x_groups_start_a_column_late", "layout", INPUT, "(first + tl.arange(0, GROUPS))[:, None] * GROUP + within", "(first + tl.arange(0, GROUPS))[:, None] * GROUP + within + 1", "mxfp8", "off by one", op="linear_x"),
    _gemm("x_highest_code_unused", "mask", INPUT, '"HIGH": float(max_value(element)),', '"HIGH": float(max_value(element)) - 1,', "int8", "off by one", op="linear_x"),
    _gemm("x_codes_floored", "rounding", INPUT, "v = near + 12582912.0\n", "v = tl.floor(near) + 12582912.0\n", "int8", "truncation", op="linear_x"),
    _gemm("x_stride_ignored_when_quantized", "layout", INPUT, "    x_row = x + row.to(tl.int64) * stride_x\n", "    x_row = x + row.to(tl.int64) * k\n", "int8", HUB + "vllm-project/vllm/pull/21773", op="linear_x", times=2),
    _gemm("gathered_padding_reads_column_0", "mask", GATHER, "mask=column >= 0, other=0)", "mask=column >= -1, other=0)", "int4_g32", "dropped mask", opens=((GATHER, "column = tl.load(columns + place, mask=place < k, other=-1)", "column = tl.maximum(tl.load(columns + place, mask=place < k, other=-1), -1)"),)),
    _gemm("gathered_rows_by_k", "layout", GATHER, "x + row * stride_x + column", "x + row * k + column", "int4_g32", "stride ignored"),
    _gemm("gathered_in_the_old_order", "layout", REARRANGE, "columns[place] = order", "columns[place] = order.sort().values", "int4_g32", HUB + "intel/ipex-llm/pull/10851"),
    _gemm("scales_not_repeated", "scale", REARRANGE, 'getattr(q, name)[:, groups] for name', 'getattr(q, name)[:, groups.clamp(max=1)] for name', "int4_g32", HUB + "vllm-project/vllm/pull/8741"),
    _gemm("rotated_one_level_short", "layout", ROTATE, '"LEVELS": self.block.bit_length() - 1', '"LEVELS": self.block.bit_length() - 2', "int4_g32_h16", "off by one"),
    _gemm("rotated_with_signs_swapped", "layout", ROTATE, "tl.join(a + b, a - b)", "tl.join(a + b, b - a)", "int4_g32_h16", "wrong sign"),
    _gemm("rotated_in_two_bytes", "rounding", ROTATE, "    v = v / ROOT\n", "    v = (v / ROOT).to(tl.float16).to(tl.float64)\n", "int4_g32_h16", "narrowed type"),
    _gemm("rotation_left_out", "layout", REARRANGE, "if q.format.hadamard and q.shape[1]:", "if q.format.hadamard and not q.shape[1]:", "int4_g32_h16", "dropped term"),
    _gemm("rotated_after_the_gather", "layout", REARRANGE, '        steps.append(importlib.import_module("fast.triton.gather").Gather(columns))', '        steps.insert(0, importlib.import_module("fast.triton.gather").Gather(columns))', "int4_g32_h16", "order of operations"),
)  # fmt: skip

INTEGER = (
    _special("tiles_with_rows_swapped", "layout", FRAGMENTS, "tiles_k, 4, per_half, 4, 2).permute(0, 3, 1, 2, 6, 4, 7, 5)", "tiles_k, 4, per_half, 4, 2).flip(1).permute(0, 3, 1, 2, 6, 4, 7, 5)", "int8", "axes swapped"),
    _special("tiles_with_columns_swapped", "layout", FRAGMENTS, "permute(0, 3, 1, 2, 6, 4, 7, 5)\n        out", "permute(0, 3, 1, 2, 4, 6, 7, 5)\n        out", "int4_g128", HUB + "mit-han-lab/llm-awq/issues/169"),
    _special("tiles_lose_their_padding", "mask", FRAGMENTS, "wide[: parts.shape[1], :n] = parts.t()", "wide[: parts.shape[1], : n - (n > 1)] = parts.t()[:, : n - (n > 1)]", "int8", "off by one"),
    _special("integer_zero_off_by_one", "scale", FRAGMENTS, "return (-(zero.float() + power)).to(x_dtype)", "return (-(zero.float() + 1 + power)).to(x_dtype)", "uint4z_g128", HUB + "vllm-project/vllm/pull/38966"),
    _special("integer_zero_of_first_group", "scale", SMALL, "z_group += tl.reshape(w_tile, (WARPS, 1, 1, 1, 1)) // GROUP_TILES * SUB", "z_group += 0", "uint4z_g128", "off by one"),
    _special("small_m_scale_of_first_group", "scale", SMALL, "(batch_tile // GROUP_TILES * SUB + batch_sub)[:, None]", "(batch_tile * 0 + batch_sub)[:, None]", "int4_g128", HUB + "naver-aics/lut-gemm/issues/4"),
    _special("small_m_groups_in_a_tile_swapped", "layout", SMALL, "batch_warp = tl.arange(0, BATCH) % WARPS\n    batch_sub = tl.arange(0, BATCH) // WARPS", "batch_warp = tl.arange(0, BATCH) // SUB\n    batch_sub = tl.arange(0, BATCH) % SUB", "int4_g32", "axes swapped"),
    _special("small_m_tail_of_k_not_masked", "mask", SMALL, "stop = tl.minimum(k, end * WIDTH)", "stop = tiles_k * WIDTH", "int4_g128", HUB + "triton-lang/triton/issues/630"),
    _special("small_m_parts_overlap", "concurrency", SMALL, "stop = tl.minimum(k, end * WIDTH)", "stop = k", "int8", "overlap", opens=(PARTS,)),
    _special("small_m_bias_before_the_scale", "scale", SMALL, "        if GROUP_TILES == 0:\n            acc *= number(tl.load(scale + rn), DTYPE)[:, None]\n        if bias is not None:\n            acc += to_float32(tl.load(bias + rn, mask=rn < n, other=0))[:, None]\n", "        if bias is not None:\n            acc += to_float32(tl.load(bias + rn, mask=rn < n, other=0))[:, None]\n        if GROUP_TILES == 0:\n            acc *= number(tl.load(scale + rn), DTYPE)[:, None]\n", "int8", HUB + "vllm-project/vllm/pull/31676"),
    _special("small_m_stores_8_rows", "mask", SMALL, "mask=(rm[None, :] < m) & (rn[:, None] < n))", "mask=(rm[None, :] < 8) & (rn[:, None] < n))", "int8", HUB + "huggingface/kernels-community/pull/1154"),
    _special("wide_scale_of_first_group", "scale", WIDE, "            group = tile // GROUP_TILES * SUB\n", "            group = 0\n", "int4_g128", "off by one"),
    _special("wide_tail_of_k_not_masked", "mask", WIDE, "mask=rows_in & (rk[None, :] < k - tile * WIDTH), other=0)", "mask=rows_in, other=0)", "int4_g128", HUB + "triton-lang/triton/issues/630"),
    _special("wide_tiles_transposed", "layout", WIDE, "    tile_m = pid % tiles_m\n    tile_n = pid // tiles_m\n", "    tile_m = pid // tiles_m\n    tile_n = pid % tiles_m\n", "int8", "axes swapped"),
    _special("wide_columns_swapped", "layout", WIDE, "tl.permute(v, (0, 1, 2, 4, 6, 7, 3, 5))", "tl.permute(v, (0, 1, 2, 4, 6, 7, 5, 3))", "int4_g128", "axes swapped"),
    _special("wide_first_part_again", "concurrency", WIDE, "+ first * WIDTH + tl.arange(0, WIDTH)[None, :]", "+ tl.arange(0, WIDTH)[None, :]", "int8", "off by one", opens=(PARTS,)),
    _special("split_own_part_twice", "concurrency", SPLIT, "place + (1 - part) * stride", "place + part * stride", "int8", HUB + "NVIDIA/cutlass/issues/3538", opens=(PARTS,)),
    _special("split_parts_in_one_place", "concurrency", SPLIT, "tl.store(place + part * stride, acc.to(tl.int32, bitcast=True))", "tl.store(place, acc.to(tl.int32, bitcast=True))", "int8", "race", opens=(PARTS,)),
    _special("split_last_part_left_out", "concurrency", SPLIT, "    for i in range(parts):\n", "    for i in range(parts - 1):\n", "int8", "off by one", opens=(PARTS,)),
    _special("split_finished_a_part_early", "concurrency", SPLIT, 'sem="relaxed") == parts - 1', 'sem="relaxed") == parts - 2', "int8", HUB + "vllm-project/vllm-xpu-kernels/pull/586", opens=(PARTS,), hangs=True),
    _special("aligned_whatever_the_stride", "layout", LAUNCH, '{"ALIGNED": stride % 8 == 0}', '{"ALIGNED": True}', "int8", HUB + "Jim137/qkan/issues/26", times=2),
)  # fmt: skip

GPU = (
    _gemm("gpu_x_peak_of_the_last_row", "concurrency", INPUT, "tl.atomic_max(peak, tl.reduce(u, 0, tl.standard._elementwise_max))", "tl.store(peak, tl.reduce(u, 0, tl.standard._elementwise_max))", "int8", "race", op="linear_x", lane="gpu"),
    _gemm("gpu_counters_not_reset", "concurrency", KERNEL, "            tl.store(arrived + tile, 0)\n", "", "fp6_e3m2", HUB + "vllm-project/vllm-xpu-kernels/pull/586", lane="gpu"),
    _gemm("gpu_finished_a_block_early", "concurrency", KERNEL, 'sem="acq_rel") == SPLIT - 1', 'sem="acq_rel") == SPLIT - 2', "fp6_e3m2", HUB + "ROCm/tritonBLAS/issues/61", lane="gpu"),
    _gemm("gpu_tiles_share_their_parts", "concurrency", KERNEL, "place = parts + tile.to(tl.int64) * (BN * BM) + inside", "place = parts + inside", "fp6_e3m2", "race", lane="gpu"),
    _gemm("gpu_parts_of_k_overlap", "concurrency", KERNEL, "first = part * split_steps", "first = part * split_steps - (part > 0)", "fp6_e3m2", "overlap", lane="gpu"),
    _gemm("gpu_fp8_sums_never_promoted", "rounding", KERNEL, "max_num_imprecise_acc=BK if BK < 128 else 128", "max_num_imprecise_acc=1073741824", "fp8", HUB + "deepseek-ai/DeepGEMM/issues/50", op="linear_x", lane="gpu", times=2),
    _gemm("gpu_weight_parts_dropped", "rounding", KERNEL, "for _ in tl.static_range(W_PARTS - 1):", "for _ in tl.static_range(W_PARTS - W_PARTS):", "uint4_g64_fp16_zfp16", "narrowed type", lane="gpu"),
    _gemm("gpu_tf32_products", "rounding", KERNEL, 'acc = tl.dot(a, xt, acc, input_precision="ieee")', 'acc = tl.dot(a, xt, acc, input_precision="tf32")', "int8", "narrowed type", lane="gpu"),
    _gemm("gpu_launched_as_if_aligned", "memory", GEMM, "kind = (kind, aligned(out), aligned(x), self.stride_kind(stride_x), bias_kind)", "kind = (kind, bias_kind)", "fp6_e3m2", HUB + "vllm-project/vllm/pull/45466", lane="gpu"),
    _special("gpu_integers_off_by_one", "scale", FRAGMENTS, "pair(-power - 2 ** (bits - 1))", "pair(1 - power - 2 ** (bits - 1))", "int4_g128", HUB + "AutoGPTQ/AutoGPTQ/issues/331", lane="gpu"),
    _special("gpu_bytes_lose_a_bit", "layout", FRAGMENTS, "0x007F007F", "0x003F003F", "int8", "narrowed type", lane="gpu"),
    _special("gpu_scale_of_one_row_for_two", "layout", FRAGMENTS, "prmt.b32 c, ${scales}, ${scales + 1}, 0x7610;", "prmt.b32 c, ${scales}, ${scales + 1}, 0x3210;", "mxfp4", HUB + "pie-project/pie/pull/491", op="indexed_linear", lane="gpu"),
    _special("gpu_weights_cut_off", "rounding", FRAGMENTS, "cvt.rn.{kind}.f32 ${i}, g, f;", "cvt.rz.{kind}.f32 ${i}, g, f;", "int4_g32", HUB + "ROCm/aiter/issues/5151", lane="gpu"),
    _special("gpu_tickets_not_reset", "concurrency", SPLIT, "        tl.store(tickets + 1, 0)\n", "", "int8", HUB + "vllm-project/vllm-xpu-kernels/pull/586", opens=(PARTS,), lane="gpu"),
    _special("gpu_wgmma_overwrites_its_operand", "concurrency", FRAGMENTS, '            "// finished", "=r,0" if acc.dtype == tl.int32 else "=f,0", [acc], dtype=acc.dtype, is_pure=True, pack=1\n        )', '            "// finished", "=r,0" if acc.dtype == tl.int32 else "=f,0", [acc], dtype=acc.dtype, is_pure=True, pack=1\n        ) if acc.dtype == tl.int64 else acc', "int8", HUB + "triton-lang/triton/issues/9433", lane="gpu"),
)  # fmt: skip

MUTANTS = (*GENERAL, *AROUND, *INTEGER, *GPU)
