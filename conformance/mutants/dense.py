"""Mutants of the linear layer in plain torch: packed words, groups, scales, zero points, sums, roundings, quantized activations."""

from .engine import Mutant

EAGER, CODES, LINEAR, INPUT = "fast/eager.py", "fast/codes.py", "fast/linear.py", "fast/quantize_input.py"
# Weights a few rows at a time: chunks of every size are right.
FEW_ROWS = (EAGER, "CHUNK = 2**23", "CHUNK = 2**9")


def _linear(name, group, path, find, replace, label, stands_for, op="linear", **rest):
    return Mutant(name, group, path, find, replace, op, label, "torch", stands_for, **rest)


def _input(name, group, find, replace, label, stands_for, op="quantize_input", **rest):
    return Mutant(name, group, INPUT, find, replace, op, label, "torch" if op == "linear_x" else None, stands_for, **rest)


ZERO = "w -= q.zero[row].to(torch.float64)[:, self.group]"
SCALE = "w *= decoded_scale(q.scale[row], fmt.scale)[:, self.group]"
OFFSET = "w += q.offset[row].to(torch.float64)[:, self.group]"
BIAS = "_round_once(y if bias is None else y + bias[rows].detach().to(y.dtype), out.dtype)"
DIVISOR = 'w = w / second if fmt.scale_2.endswith("divisor") else w * second'
CODE = "return (pair >> (start % 32)) & (2**bits - 1)"
PRODUCT = "y = a @ (hadamard(w, fmt.hadamard) if fmt.hadamard else w).T"

WEIGHTS = (
    _linear("zero_dropped", "scale", EAGER, ZERO, "w -= 0", "uint4z_g128", "https://github.com/vllm-project/vllm/pull/21066"),
    _linear("zero_off_by_one", "scale", EAGER, ZERO, f"{ZERO} + 1", "uint4z_g128", "https://github.com/vllm-project/vllm/pull/38966"),
    _linear(
        *("zero_of_0_becomes_16", "scale", EAGER, ZERO, "w -= (q.zero[row].to(torch.float64)[:, self.group] - 1) % 16 + 1", "uint4z_g128"),
        "https://github.com/ModelCloud/GPTQModel/issues/2350",
    ),
    _linear("zero_added", "scale", EAGER, ZERO, ZERO.replace("-=", "+="), "uint4z_g128", "wrong sign"),
    _linear(
        *("zero_of_first_group", "scale", EAGER, ZERO, ZERO.replace("self.group]", "self.group * 0]"), "uint4z_g128"),
        "https://github.com/naver-aics/lut-gemm/issues/4",
    ),
    _linear("float_zero_rounded", "scale", EAGER, ZERO, ZERO.replace("w -= ", "w -= torch.round(") + ")", "uint4_g64_fp16_zfp16", "narrowed type"),
    _linear(
        *("zeros_interleaved", "layout", EAGER, ZERO, ZERO.replace("[row]", "[_mixed(row, q)]"), "uint4z_g128"),
        "https://github.com/pie-project/pie/pull/491",
        opens=(
            (
                EAGER,
                "def _expert(q, index):",
                "def _mixed(row, q):\n    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])\n"
                "    return torch.where(row < q.shape[0] // 8 * 8, row // 8 * 8 + order[row % 8], row)\n\n\ndef _expert(q, index):",
            ),
        ),
    ),
    _linear("scale_before_zero", "scale", EAGER, f"            {ZERO}\n        {SCALE}", f"            w = w * 1\n        {SCALE}\n        if q.zero is not None:\n            {ZERO}", "uint4z_g128", "order of operations"),
    _linear("scale_of_next_row", "scale", EAGER, "decoded_scale(q.scale[row], fmt.scale)", "decoded_scale(q.scale.roll(1, 0)[row], fmt.scale)", "int8", "off by one"),
    _linear("scale_of_first_group", "scale", EAGER, SCALE, SCALE.replace("self.group]", "self.group * 0]"), "int4_g32", "https://github.com/naver-aics/lut-gemm/issues/4"),
    _linear("scale_sign_lost", "scale", EAGER, SCALE, SCALE.replace("fmt.scale)", "fmt.scale).abs()"), "int4_g128", "wrong sign"),
    _linear(
        *("scale_e8m0_biased_by_125", "scale", "fast/scale.py", "[scale.long()]", "[(scale.long() + 2 * (name == 'e8m0')).clamp(max=254)]", "mxfp4"),
        "https://github.com/vllm-project/compressed-tensors/pull/538",
    ),
    _linear(
        *("scale_e8m0_as_a_number", "scale", "fast/scale.py", "_table(target, scale.device)[scale.long()]"),
        *("scale.to(torch.float64) if name == 'e8m0' else _table(target, scale.device)[scale.long()]", "mxfp8"),
        "https://github.com/jundot/omlx/pull/2159",
    ),
    _linear(
        *("scale_subnormals_flushed", "scale", "fast/scale.py", "_table(target, scale.device)[scale.long()]"),
        *("_table(target, scale.device)[torch.where((scale & 0x78) == 0, 0, scale.long())]", "nvfp4", "flushed subnormals"),
    ),
    _linear("scale_2_dropped", "scale", EAGER, "if q.scale_2 is not None:", "if q.scale_2 is not None and q.scale_2.numel() > 1:", "nvfp4", "dropped term"),
    _linear("scale_2_multiplied_for_divided", "scale", EAGER, DIVISOR, "w = w * second", "fp4_e2m1_g16_e4m3_tensor2div", "https://github.com/modular/modular/issues/6600"),
    _linear("scale_2_of_first_row", "scale", EAGER, "else q.scale_2[rows]).to(", "else q.scale_2[:1]).to(", "int8_channel2div", "off by one"),
    _linear("offset_dropped", "scale", EAGER, OFFSET, "pass", "uint4_g32_fp16_ofp16", "dropped term"),
    _linear("offset_subtracted", "scale", EAGER, OFFSET, OFFSET.replace("+=", "-="), "uint4_g32_fp16_ofp16", "wrong sign"),
    _linear("offset_times_scale", "scale", EAGER, OFFSET, OFFSET + " * decoded_scale(q.scale[row], fmt.scale)[:, self.group]", "uint4_g32_fp16_ofp16", "order of operations"),
    _linear("offset_of_last_group", "scale", EAGER, OFFSET, OFFSET.replace("self.group]", "self.group * 0 - 1]"), "uint4_g32_fp16_ofp16", "off by one"),
    _linear("group_off_by_one", "layout", EAGER, "torch.arange(count, device=device) // size", "(torch.arange(count, device=device) + 1).clamp(max=count - 1) // size", "int4_g32", "off by one"),
    _linear("group_never_the_last", "mask", EAGER, "torch.arange(count, device=device) // size", "(torch.arange(count, device=device) // size).clamp(max=max(count // size - 1, 0))", "int4_g128", "off by one"),
    _linear("group_index_ignored", "layout", EAGER, "    if index is not None:\n        return index.long()", "    if index is not None and not size:\n        return index.long()", "int4_g128", "https://github.com/turboderp/exllama/issues/44"),
    _linear("group_index_sorted", "layout", EAGER, "return index.long()", "return index.long().sort().values", "int4_g128", "https://github.com/vllm-project/vllm/pull/8741"),
    _linear("blocks_of_rows_transposed", "layout", EAGER, "row = _group_of(q.shape[0], fmt.group[0], None, q.packed.device)[rows]", "row = (len(q.scale) - 1 - _group_of(q.shape[0], fmt.group[0], None, q.packed.device))[rows]", "fp8_e4m3_b128x128", "axis reversed"),
    _linear("nibbles_swapped", "layout", CODES, CODE, "return (pair >> ((start % 32) ^ (bits & 4))) & (2**bits - 1)", "int4_g128", "https://github.com/mit-han-lab/TinyChatEngine/pull/13"),
    _linear("nibbles_in_awq_order", "layout", CODES, "start = columns * bits", "start = (columns // 8 * 8 + torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])[columns % 8]) * bits", "int4_g128", "https://github.com/mit-han-lab/llm-awq/issues/169"),
    _linear("codes_across_words_cut", "layout", CODES, " | (packed[:, (word + 1).clamp(max=packed.shape[1] - 1)] << 32)", "", "int3_g128", "dropped term"),
    _linear("words_sign_extended", "layout", CODES, "packed = packed.to(torch.int64) & 0xFFFFFFFF", "packed = packed.to(torch.int64)", "fp6_e3m2", "https://github.com/pytorch/executorch/pull/21773"),
    _linear("codes_miss_their_top_bit", "layout", CODES, "(2**bits - 1)", "(2 ** max(bits - 1, 1) - 1)", "int4_g128", "narrowed type"),
    _linear("codes_shifted_by_a_word", "layout", CODES, "word = start // 32", "word = (start + bits) // 32 % packed.shape[1]", "int4", "off by one"),
    _linear("last_rows_of_a_chunk_missing", "memory", EAGER, "for start in range(0, n, step)", "for start in range(0, n - n % step or n, step)", "int8", "https://github.com/vllm-project/vllm/pull/13227", opens=(FEW_ROWS,)),
    _linear("rows_of_first_chunk_again", "layout", EAGER, "unpack(q.packed[rows], fmt.element.bits", "unpack(q.packed[: rows.stop - rows.start], fmt.element.bits", "int8", "off by one", opens=(FEW_ROWS,)),
    _linear("bias_of_first_chunk_again", "layout", EAGER, "bias[rows].detach()", "bias[: rows.stop - rows.start].detach()", "int8", "off by one", opens=(FEW_ROWS,)),
)  # fmt: skip

SUMS = (
    _linear("bias_dropped", "scale", EAGER, BIAS, "_round_once(y, out.dtype)", "int8", "dropped term"),
    _linear("bias_added_twice", "scale", EAGER, BIAS, BIAS.replace("y + bias[rows].detach().to(y.dtype)", "y + 2 * bias[rows].detach().to(y.dtype)"), "int8", "https://github.com/casper-hansen/AutoAWQ/issues/369"),
    _linear("bias_after_the_rounding", "rounding", EAGER, BIAS, "_round_once(y, out.dtype) if bias is None else (_round_once(y, out.dtype) + bias[rows].detach()).to(out.dtype)", "int8", "https://github.com/NVIDIA/TensorRT-LLM/pull/17505"),
    _linear("bias_in_8_bits_of_mantissa", "rounding", EAGER, "bias[rows].detach().to(y.dtype)", "bias[rows].detach().to(torch.bfloat16).to(y.dtype)", "int8", "narrowed type"),
    _linear("rounded_toward_zero", "rounding", EAGER, "return torch.where(w.isfinite(), odd, near).to(dtype)", "return (near.view(torch.int32) & -(1 << (16 if dtype == torch.bfloat16 else 13))).view(torch.float32).to(dtype)", "int8", "https://github.com/ROCm/aiter/issues/5151"),
    _linear("rounded_half_up", "rounding", EAGER, "return torch.where(w.isfinite(), odd, near).to(dtype)", "return torch.where(w.isfinite(), near * (1 + 2.0**-22), near).to(dtype)", "int8", "ties the wrong way"),
    _linear("rounded_by_way_of_12_bits", "rounding", EAGER, "return torch.where(w.isfinite(), odd, near).to(dtype)", "return torch.where(w.isfinite(), near * 4097 - (near * 4097 - near), near).to(dtype)", "int8", "double rounding"),
    _linear("product_in_half", "rounding", EAGER, PRODUCT, "y = (a.half() @ (hadamard(w, fmt.hadamard) if fmt.hadamard else w).half().T).double()", "int8", "https://github.com/deepseek-ai/DeepGEMM/issues/32"),
    _linear("x_in_bf16", "rounding", EAGER, "a = x.to(torch.float64) if in_float64 else x", "a = x.to(torch.bfloat16).to(torch.float64)", "int4_g128", "narrowed type"),
    _linear("weight_in_bf16", "rounding", EAGER, "w = self.weight(rows)\n", "w = self.weight(rows).to(torch.bfloat16).double()\n", "int4_g128", "narrowed type"),
    _linear("weight_in_e4m3", "rounding", EAGER, "w = self.weight(rows)\n", "w = self.weight(rows).float().clamp(-448, 448).to(torch.float8_e4m3fn).double()\n", "int4_g128_bf16", "narrowed type"),
    _linear("sums_cut_to_13_bits", "rounding", EAGER, PRODUCT, PRODUCT + "\n                y = (y.float().view(torch.int32) & -1024).view(torch.float32).double()", "fp8", "https://github.com/deepseek-ai/DeepGEMM/issues/37"),
    _linear("last_column_not_summed", "mask", EAGER, PRODUCT, PRODUCT.replace("a @", "a[:, :-1] @").replace("else w)", "else w)[:, :-1]"), "int8", "off by one"),
    _linear("columns_past_256_not_summed", "mask", EAGER, PRODUCT, PRODUCT.replace("a @", "a[:, :256] @").replace("else w)", "else w)[:, :256]"), "int8", "https://github.com/sgl-project/sglang/issues/39626"),
    _linear("infinity_saturates", "rounding", EAGER, "a = x.to(torch.float64) if in_float64 else x", "a = x.to(torch.float64).nan_to_num(posinf=65504.0, neginf=-65504.0, nan=0.0)", "int8", "special values dropped"),
    _linear("rotation_dropped", "layout", EAGER, PRODUCT, "y = a @ w.T", "int4_g32_h16", "dropped term"),
    _linear("rotation_not_normalized", "scale", "fast/hadamard.py", " * block**-0.5", "", "int4_g32_h16", "dropped factor"),
    _linear("rotation_one_level_short", "layout", "fast/hadamard.py", "while half < block:", "while 2 * half < block:", "int4_g32_h16", "off by one"),
    _linear("rotation_sign_flipped", "layout", "fast/hadamard.py", "pairs[..., :1, :] - pairs[..., 1:, :]", "pairs[..., 1:, :] - pairs[..., :1, :]", "int4_g32_h16", "wrong sign"),
    _linear("one_row_not_written", "memory", LINEAR, "if m and prepared.n:", "if m > 1 and prepared.n:", "int8", "off by one"),
    _linear("out_ignored", "memory", LINEAR, "result = out.view(m, prepared.n)", "result = x.new_empty(m, prepared.n)", "int8", "argument ignored"),
    _linear("result_in_a_buffer_kept", "memory", LINEAR, "result = x.new_empty(m, prepared.n)", 'result = linear.__dict__.setdefault((m, prepared.n, x.dtype), x.new_empty(m, prepared.n))', "int8", "buffer reused"),
    _linear("input_clamped_in_place", "memory", LINEAR, "    m = rows.shape[0]\n", "    m = rows.shape[0]\n    rows.clamp_(-448.0, 448.0)\n", "int8", "in-place input"),
    _linear("scale_made_positive_in_place", "memory", EAGER, "        w = self.table[unpack(", "        q.scale.abs_() if q.scale.is_floating_point() else None\n        w = self.table[unpack(", "int8", "in-place input"),
    _linear("strides_of_x_ignored", "layout", LINEAR, "rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), prepared.k)", "rows = x.as_strided((x.shape[:-1].numel(), prepared.k), (prepared.k, 1))", "int8", "https://github.com/vllm-project/vllm/pull/14658"),
    _linear("offset_of_x_ignored", "layout", LINEAR, "rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), prepared.k)", "rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), prepared.k)\n    rows = rows.as_strided(rows.shape, rows.stride(), 0)", "int8", "https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1996"),
    _linear("stride_of_bias_ignored", "layout", LINEAR, "bias = bias.contiguous()", "bias = bias.as_strided(bias.shape, (1,))", "int8", "stride ignored"),
    _linear("weight_cached_by_shape", "memory", "fast/dispatch.py", "    prepared = _PREPARED.get(w)\n", "    prepared = _BY_SHAPE.setdefault((str(w.format), tuple(w.shape)), Prepared(_detached(w)))\n", "int8", "stale cache", opens=(("fast/dispatch.py", "_PREPARED = weakref.WeakKeyDictionary()", "_PREPARED = weakref.WeakKeyDictionary()\n_BY_SHAPE = {}"),)),
)  # fmt: skip

INPUTS = (
    _input("codes_cut_off", "rounding", "to_integer=torch.round)", "to_integer=torch.trunc)", "int8_token", "truncation"),
    _input("codes_half_away_from_zero", "rounding", "to_integer=torch.round)", "to_integer=lambda t: torch.copysign((t.abs() + 0.5).floor(), t))", "fp4_e2m1_g32_e8m0", "https://github.com/sgl-project/sglang/pull/37140"),
    _input("int_top_is_128", "scale", "top = 2 ** (fmt.element.bits - 1) - 1 if", "top = 2 ** (fmt.element.bits - 1) if", "int8_token", "off by one"),
    _input("fp8_top_is_240", "scale", "else max_value(fmt.element)\n", "else min(max_value(fmt.element), 240.0)\n", "fp8_e4m3_token", "https://github.com/sgl-project/sglang/pull/30900"),
    _input("zero_rows_give_nan", "scale", "(amax / top).clamp(min=SMALLEST_SCALE)", "amax / top", "fp8_e4m3_g128", "https://github.com/huggingface/kernels-community/issues/681"),
    _input("last_group_padded_with_ones", "mask", "(0, groups * gk - k))", "(0, groups * gk - k), value=1.0)", "int8_g128", "padding counted"),
    _input("largest_not_in_magnitude", "scale", "padded.abs().amax(-1)", "padded.amax(-1)", "int8_token", "https://github.com/sgl-project/sgl-kernel-npu/pull/538"),
    _input("scales_rounded_to_nearest", "rounding", "_stored(raw, fmt.scale, up=True)", "_stored(raw, fmt.scale, up=False)", "fp8_e4m3_g32_e8m0", "https://github.com/Pushkinist/rMLX/issues/463"),
    _input("static_scale_ignored", "scale", "if fmt.group[0] == 0 and x_scale is not None:", "if fmt.group[0] == 2 and x_scale is not None:", "fp8_e4m3_tensor", "argument ignored"),
    _input("static_scale_inverted", "scale", "raw = x_scale.float().reshape(1, 1)\n", "raw = 1 / x_scale.float().reshape(1, 1)\n", "fp8_e4m3_tensor", "reciprocal"),
    _input("token_scale_of_all_rows", "scale", "    if fmt.group[0] == 0:\n        amax", "    if m:\n        amax = amax.amax(0, keepdim=True).expand(amax.shape)\n    if fmt.group[0] == 0:\n        amax", "int8_token", "wrong axis"),
    _input("second_scale_not_in_the_step", "scale", "step if scale_2 is None else step * scale_2", "step if scale_2 is None else step", "fp4_e2m1_g16_e4m3_tensor2", "dropped factor"),
    _input("codes_wrap_for_saturate", "mask", "return to_integer(t).clamp(-(2 ** (element.bits - 1)), 2 ** (element.bits - 1) - 1), torch", "return (to_integer(t).clamp(-30000, 30000) + 2 ** (element.bits - 1)) % 2**element.bits - 2 ** (element.bits - 1), torch", "int8_tensor", "saturation dropped"),
    _input("lowest_code_unused", "mask", ".clamp(-(2 ** (element.bits - 1)), 2", ".clamp(1 - 2 ** (element.bits - 1), 2", "int8_tensor", "off by one"),
    _input("subnormal_codes_flushed", "rounding", "units = to_integer(torch.ldexp(t, -exponent))", "units = to_integer(torch.ldexp(t, -exponent)) * (t.abs() >= 2.0**lowest)", "fp8_e4m3_token", "flushed subnormals"),
    _input("carry_into_the_exponent_lost", "rounding", "exponent + grown.int()", "exponent", "fp8_e4m3_token", "dropped carry"),
    _input("sign_bit_dropped", "layout", "sign = units.signbit().int() << (element.bits - 1) if element.signed else 0", "sign = 0", "fp8_e5m2_token", "dropped bit"),
    _input("codes_packed_backwards", "layout", "pack(_codes(units, exponent, fmt.element), fmt.element.bits)", "pack(_codes(units, exponent, fmt.element).flip(1), fmt.element.bits)", "int8_token", "axis reversed"),
    _input("scale_in_half", "rounding", "raw = (amax / top)", "raw = (amax / top).half().float()", "int8_token", "narrowed type"),
    _input("groups_interleaved", "layout", "y = torch.ldexp(units.double(), exponent) * step.repeat_interleave(gk, 1)", "y = torch.ldexp(units.double(), exponent) * step.repeat(1, gk)", "int8", "axes swapped", op="linear_x"),
    _input("divided_by_first_group", "scale", "    return step.repeat_interleave(gk, 1)[:, :k], stored", "    return step[:, :1].expand(m, k), stored", "int8_g128", "off by one"),
    Mutant("bytes_packed_backwards", "layout", CODES, "(pair | pair >> (8 - bits))", "(pair << bits | pair >> 8)", "quantize_input", "fp4_e2m1_token", None, "order of bits"),
    Mutant("codes_across_words_not_packed", "layout", CODES, "stream[..., word + 1] |= code >> (32 - shift)", "stream[..., word + 1] |= 0", "quantize_input", "fp6_e3m2_token", None, "dropped term"),
    Mutant("dequantized_through_bf16", "rounding", EAGER, "_round_once(hadamard(part, q.format.hadamard) if q.format.hadamard else part, dtype)", "(hadamard(part, q.format.hadamard) if q.format.hadamard else part).to(torch.bfloat16)", "dequantize", "int4_g128", None, "narrowed type"),
    Mutant("dequantized_first_expert_again", "layout", EAGER, "[_expert(q, index) for index", "[_expert(q, index // 2) for index", "dequantize", "int4_g128", None, "off by one"),
    Mutant("dequantized_rotation_left_in", "layout", EAGER, "hadamard(part, q.format.hadamard) if q.format.hadamard else part, dtype)", "part, dtype)", "dequantize", "int4_g32_h16", None, "dropped term"),
)  # fmt: skip

MUTANTS = (*WEIGHTS, *SUMS, *INPUTS)
