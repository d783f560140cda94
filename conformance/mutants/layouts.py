"""Mutants of the readers of checkpoints: the oracle's own code, which the golden vectors judge (see reading).

stands_for is the public bug whose defect it is; else what was done to the code.
"""

from .engine import Mutant

VLLM, SGLANG = "https://github.com/vllm-project/vllm/pull/", "https://github.com/sgl-project/sglang/pull/"


def _read(name, group, layout, find, replace, stands_for, part=None, times=1):
    """A Mutant of ref/layouts/`part`.py, by default `layout`.py."""
    return Mutant(name, group, f"ref/layouts/{part or layout}.py", find, replace, "read", layout, None, stands_for, times=times)


INTEGERS = (
    _read("gptq_zero_without_its_one", "scale", "gptq", "return zero + 1\n", "return zero\n", VLLM + "26092"),
    _read(
        "gptq_v2_zero_with_a_one", "scale", "gptq",
        "if not one_less:\n        return zero\n", "if not one_less:\n        return zero + 1\n",
        VLLM + "38966",
    ),
    _read(
        "gptq_zero_of_0_by_field", "scale", "gptq", "return unpack(qzeros + sum(1 << i for i in range(0, 32, bits)), bits, n)",
        "return zero + 1 & 2**bits - 1", "https://github.com/ModelCloud/GPTQModel/pull/2351",
    ),
    _read(
        "gptq_order_ignored", "layout", "gptq",
        "if g_idx is None or not k:", "if True:",
        "https://github.com/AutoGPTQ/AutoGPTQ/pull/219",
    ),
    _read("gptq_planes_as_a_stream", "layout", "gptq", "_from_planes(qweight, bits) if planar else qweight", "qweight", "planes left out"),
    _read(
        "gptq_zeros_planes_as_a_stream", "layout", "gptq",
        "transposed(_from_planes(qzeros.t(), bits)) if planar else qzeros", "qzeros",
        "planes left out",
    ),
    _read(
        "awq_fields_in_order", "layout", "awq",
        "ORDER = (0, 2, 4, 6, 1, 3, 5, 7)", "ORDER = (0, 1, 2, 3, 4, 5, 6, 7)",
        "https://github.com/wejoncy/QLLM/pull/61",
    ),
    _read(
        "awq_order_inverted", "layout", "awq",
        "codes[..., ORDER] = fields", "codes = fields[..., ORDER].contiguous()",
        "a permutation for its inverse",
    ),
    _read(
        "awq_zeros_not_reordered", "layout", "awq",
        "        zero = transposed(zero)\n    return _weight(packed, transposed(scales)",
        "        zero = transposed(zero.view(groups, -1, 8)[..., ORDER].flatten(1))\n    return _weight(packed, transposed(scales)",
        "https://github.com/pie-project/pie/pull/491",
    ),
    _read(
        "awq_gemv_padding_not_cut", "mask", "awq",
        "zero = unpack(qzeros, 4, padded)[:, : k // group]", "zero = unpack(qzeros, 4, padded)[:, padded - k // group :]",
        "padding on the wrong side",
    ),
    _read(
        "awq_fast_pairs_in_order", "layout", "awq",
        ".transpose(0, 1).reshape(4, 4, 2).transpose(1, 2).reshape(32)", ".transpose(0, 1).reshape(32)",
        "https://github.com/mit-han-lab/llm-awq/issues/169",
    ),
    _read(
        "auto_round_by_gptq_version_1", "scale", "auto_round",
        '("auto_round", "gptqmodel"), "gptq_v2")', '("auto_round", "gptqmodel"), "gptq")',
        VLLM + "38966",
    ),
    _read(
        "auto_round_quarters_as_ones", "scale", "auto_round",
        "scale = scale - 2\n", "scale = scale - 0\n",
        "https://github.com/vllm-project/compressed-tensors/pull/538",
    ),
    _read(
        "marlin_row_scales_by_group", "layout", "marlin",
        "SCALES_BY_ROW if group_size in (-1, k) else SCALES_BY_GROUP", "SCALES_BY_GROUP",
        "https://github.com/pie-project/pie/pull/512",
    ),
    _read("marlin_fields_in_order", "layout", "marlin", "8: (0, 2, 1, 3)}", "8: (0, 1, 2, 3)}", "permutation left out"),
    _read(
        "marlin_lanes_by_row", "layout", "marlin",
        "torch.tensor([0, 1, 8, 9])\n", "torch.tensor([0, 1, 2, 3])\n",
        "fragment of another instruction",
    ),
    _read(
        "humming_zeros_along_k", "layout", "humming",
        "unpack(zero.transpose(-1, -2).contiguous(), element.bits, n).transpose(-1, -2).contiguous()",
        "unpack(zero.transpose(-1, -2).contiguous(), element.bits, n).flip(-1).transpose(-1, -2).contiguous()",
        "order turned round",
    ),
    _read(
        "humming_second_scale_dropped", "scale", "humming",
        "tuple(lead) or (1,)).reshape(*lead, 1, 1)\n", "tuple(lead) or (1,)).reshape(*lead, 1, 1) * 0 + 1\n",
        "scale left out",
    ),
    _read(
        "hqq_chunks_from_the_lowest_bits", "layout", "hqq",
        "data >> (width * (chunks - 1 - i)) &", "data >> (width * i) &",
        "order of fields turned round",
    ),
    _read(
        "hqq_axes_exchanged", "layout", "hqq",
        "codes = _unpack(parts, packing, rows, columns).reshape(shape)",
        "codes = _unpack(parts, packing, rows, columns)\n    codes = (codes if axis else codes.T).reshape(shape)",
        "https://github.com/pytorch/ao/issues/1823",
    ),
    _read(
        "hqq_scales_repeated_by_row", "scale", "hqq",
        "t.repeat(size) if isinstance(index, str)", "t.repeat_interleave(size) if isinstance(index, str)",
        "repeat_interleave for repeat",
    ),
    _read("bitnet_codes_from_minus_2", "scale", "bitnet", "for i in range(4)]) + 1 ", "for i in range(4)]) + 0 ", "offset left out"),
    _read(
        "bitnet_rows_as_neighbours", "layout", "bitnet",
        "torch.cat([weight >> 2 * i & 3 for i in range(4)]) + 1",
        "torch.stack([weight >> 2 * i & 3 for i in range(4)], dim=1).flatten(0, 1) + 1",
        "strided rows taken for neighbours",
    ),
    _read(
        "bitnet_always_multiplied", "scale", "bitnet",
        'if options["linear_class"] == "autobitlinear":', 'if True:',
        "divisor taken for a factor",
    ),
    _read(
        "bitsandbytes_low_nibble_first", "layout", "bitsandbytes",
        "((data << 4) | (data >> 4)).view(torch.int32)", "data.view(torch.int32)",
        "https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1300",
    ),
    _read(
        "bitsandbytes_blocks_start_with_rows", "scale", "bitsandbytes",
        "(absmax if block is None else absmax[block])",
        "(absmax if block is None else absmax[torch.arange(len(block)) * len(absmax) // len(block)])",
        "blocks that cross rows",
    ),
    _read(
        "bitsandbytes_nested_offset_dropped", "scale", "bitsandbytes",
        '* step + torch.tensor(state["nested_offset"])', "* step",
        "offset left out",
    ),
    _read(
        "bitsandbytes_int8_by_128", "scale", "bitsandbytes",
        "torch.full((1, 1), 127.0)\n", "torch.full((1, 1), 128.0)\n",
        "2^(bits - 1) for 2^(bits - 1) - 1",
    ),
    _read(
        "quark_words_in_order", "layout", "quark",
        "REORDER = (0, 2, 4, 6, 1, 3, 5, 7)", "REORDER = (0, 1, 2, 3, 4, 5, 6, 7)",
        "https://github.com/amd/Quark/pull/30", part="quark_codes",
    ),
    _read(
        "quark_uint2_lowest_bits_first", "layout", "quark",
        "[data >> shift & 3 for shift in (6, 4, 2, 0)], dim=-1).flatten(-2)",
        "[data >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(-2)",
        "order of fields turned round", part="quark_codes",
    ),
    _read(
        "quark_exponents_without_bias", "scale", "quark",
        "(exponent.to(torch.int16) + 127)", "(exponent.to(torch.int16) + 128)",
        "https://github.com/jundot/omlx/pull/2159", part="quark_codes",
    ),
    _read(
        "quark_scales_not_transposed", "scale", "quark",
        "(scale.T if exchanged else scale).clone(", "(scale.reshape(n, -1) if exchanged else scale).clone(",
        SGLANG + "39510",
    ),
    _read(
        "torchao_zero_point_subtracted", "scale", "torchao",
        "^ 0x88)\n    return _with_offset(codes, scale.mT.contiguous(), zero.mT.contiguous(), size)",
        "^ 0x88)\n    return _with_offset(codes, scale.mT.contiguous(), -zero.mT.contiguous(), size)",
        "https://github.com/pytorch/ao/pull/605", part="torchao_tensors",
    ),
    _read(
        "torchao_tiles_in_order", "layout", "torchao",
        "(0, 2, 4, 6, 1, 3, 5, 7)).unflatten(-1, (t, 4, 2))", "(0, 1, 2, 3, 4, 5, 6, 7)).unflatten(-1, (t, 4, 2))",
        "permutation left out", part="torchao_tensors",
    ),
    _read(
        "compressed_tensors_order_ignored", "layout", "compressed_tensors",
        'if "weight_g_idx" not in parts:', "if True:",
        "https://github.com/vllm-project/llm-compressor/issues/1780",
    ),
    _read(
        "compressed_tensors_zeros_along_groups", "layout", "compressed_tensors",
        'bits_of.transposed(unpack_words(bits_of.transposed(words), bits, n, packing, "weight_zero_point"))',
        'unpack_words(bits_of.transposed(words), bits, n, packing, "weight_zero_point").reshape(*lead, n, groups)',
        SGLANG + "39510",
    ),
    _read(
        "compressed_tensors_zero_signed", "scale", "compressed_tensors",
        "    return bits_of.from_twos(zero, bits)\n", "    return zero.view(torch.uint8) & (2**bits - 1)\n",
        "https://github.com/vllm-project/compressed-tensors/pull/296",
    ),
    _read(
        "compressed_tensors_mask_from_the_highest_bit", "mask", "compressed_tensors",
        "mask = bits_of.stream(bitmask, 1, k).bool()",
        "mask = bits_of.stream(bitmask, 1, k).unflatten(-1, (-1, 8)).flip(-1).flatten(-2).bool()",
        "order of bits turned round", part="compressed_tensors_codes",
    ),
)  # fmt: skip

FLOATS = (
    _read(
        "mxfp4_high_nibble_first", "layout", "mxfp4",
        "bits.from_bytes(blocks.flatten(-2))", "bits.from_bytes((blocks << 4 | blocks >> 4).flatten(-2))",
        "https://github.com/kekzl/imp/pull/567",
    ),
    _read(
        "mxfp4_halves_of_a_block", "layout", "mxfp4",
        "bits.from_bytes(blocks.flatten(-2))",
        "bits.from_bytes(bits.join_nibbles(torch.cat((blocks & 15, blocks >> 4), dim=-1)).flatten(-2))",
        "https://github.com/kekzl/imp/pull/567",
    ),
    _read(
        "mxfp4_exponents_one_up", "scale", "mxfp4",
        "scales.view(torch.uint8).clone()", "scales.view(torch.uint8) + 1",
        "https://github.com/vllm-project/compressed-tensors/pull/538",
    ),
    _read(
        "nvfp4_global_scale_is_a_factor", "scale", "compressed_tensors",
        '"tensor_divisor" if options["strategy"] == "tensor_group" else None',
        '"tensor" if options["strategy"] == "tensor_group" else None',
        "https://github.com/modular/modular/issues/6600",
    ),
    _read(
        "modelopt_second_scale_is_a_divisor", "scale", "modelopt",
        'scale_2="tensor" if nv else None', 'scale_2="tensor_divisor" if nv else None',
        "https://github.com/modular/modular/pull/6699",
    ),
    _read(
        "modelopt_high_row_first", "layout", "modelopt",
        "torch.stack([weight & 15, weight >> 4], dim=1)", "torch.stack([weight >> 4, weight & 15], dim=1)",
        "order of nibbles turned round",
    ),
    _read(
        "modelopt_stack_not_transposed", "layout", "modelopt",
        'parts = parts | {"weight": weight.mT}', 'parts = parts | {"weight": weight.reshape(weight.mT.shape)}',
        "a reshape for a transpose",
    ),
    _read(
        "fp8_blocks_by_the_other_axis", "scale", "fp8",
        "        if got == (*lead, -(-n // block[0]), columns):\n            return block, scale\n",
        "        if got == (*lead, -(-n // block[0]), columns):\n            return block, scale.reshape(*lead, columns, -1).mT\n",
        "https://github.com/unslothai/unsloth/pull/8953",
    ),
    _read(
        "fp8_block_size_from_the_shapes", "scale", "fp8",
        "        if got == (*lead, -(-n // block[0]), columns):\n            return block, scale\n",
        "        if got == (*lead, -(-n // block[0]), columns):\n            return (-(-n // got[-2]), -(-k // got[-1])), scale\n",
        "https://github.com/NVIDIA/TensorRT-Model-Connect/pull/1115",
    ),
    _read(
        "fp8_stack_of_fbgemm_not_transposed", "layout", "fp8",
        "        data = bits_of.transposed(data)\n        scale = bits_of",
        "        data = data.reshape(data.mT.shape)\n        scale = bits_of",
        "a reshape for a transpose",
    ),
    _read(
        "quark_mx_low_bits_first", "layout", "quark",
        "high << 4 | low", "low << 2 | high",
        "order of bits turned round", part="quark_codes",
    ),
    _read(
        "torchao_scales_left_in_tiles", "scale", "torchao",
        "32, 4, 4).permute(0, 3, 2, 1, 4)\n    return split", "32, 4, 4).permute(0, 2, 3, 1, 4)\n    return split",
        "https://github.com/modular/modular/issues/6600", part="torchao_tensors",
    ),
)  # fmt: skip

GGUF = (
    _read(
        "gguf_scales_above_four_by_low_bits_alone", "scale", "gguf",
        "& 15 | blocks[..., first] >> 6 << 4), dim=-1)", "& 15), dim=-1)",
        "https://github.com/paiml/trueno/issues/182", part="gguf_fields",
    ),
    _read(
        "gguf_minima_added", "scale", "gguf",
        "_k4(4, 0), _k4(4, 1, -1.0)),\n    \"Q5_K\"", "_k4(4, 0), _k4(4, 1, 1.0)),\n    \"Q5_K\"",
        "sign of the minimum", part="gguf_blocks",
    ),
    _read(
        "gguf_q4_1_header_of_2_bytes", "layout", "gguf",
        "planes((4, 16, 4, 16)), half(0), half(2)", "planes((2, 16, 4, 16)), half(0), half(2)",
        "https://github.com/ml-explore/mlx/pull/3664", part="gguf_blocks",
    ),
    _read(
        "gguf_high_bits_dropped", "layout", "gguf",
        "planes((6, 16, 4, 16), (2, 4, 1, 1))", "planes((6, 16, 4, 16), (3, 4, 1, 1))",
        "https://github.com/1bit-MONSTER/1bit-MONSTER/pull/488", part="gguf_blocks",
    ),
    _read(
        "gguf_q2_k_flat", "layout", "gguf",
        "planes((16, 64, 2, 32)),\n        levels(half(80)", "planes((16, 64, 2, 64)),\n        levels(half(80)",
        "https://github.com/paiml/aprender/pull/1924", part="gguf_blocks",
    ),
    _read(
        "gguf_q3_k_scales_of_4_bits", "scale", "gguf",
        "planes((96, 8, 4, 8), (104, 4, 2, 4)), 63, low=-32)", "planes((96, 8, 4, 8)), 15, low=-8)",
        "https://github.com/paiml/aprender/pull/2115", part="gguf_blocks",
    ),
    _read(
        "gguf_mxfp4_pairs", "layout", "gguf",
        "planes((1, 16, 4, 16)), strided(0, 1, 1)", "planes((1, 16, 4, 1)), strided(0, 1, 1)",
        "https://github.com/kekzl/imp/pull/567", part="gguf_blocks",
    ),
    _read("gguf_signs_of_seven_weights", "layout", "gguf", "v | v.bit_count() % 2 << 7", "v", "parity left out", part="gguf_codes"),
    _read("gguf_trits_without_a_carry", "layout", "gguf", "% 256 * 3 >> 8", "% 256 * 3 >> 9", "off by one", part="gguf_codes"),
    _read(
        "gguf_ternary_from_zero", "scale", "gguf",
        "        return stored + 1\n", "        return stored\n",
        "offset left out", part="gguf_codes",
    ),
)  # fmt: skip

MUTANTS = (*INTEGERS, *FLOATS, *GGUF)
