"""Mutants of the MoE operations: routing, maps, blocks, permutation, activation, sums, grouped products, the whole layer.

stands_for is the public bug whose defect it is, in another engine's code or words; else what was done to the code.
"""

from .engine import Mutant

TOPK, ALIGN, PERMUTE, MAP = "fast/moe/topk.py", "fast/moe/align.py", "fast/moe/permute.py", "fast/moe/expert_map.py"
ACTIVATION, SUM, LAYER = "fast/moe/activation.py", "fast/moe/fused_mul_sum.py", "fast/moe/experts.py"
EAGER, GROUPED, BLOCKS, SPACES = "fast/moe/grouped_eager.py", "fast/moe/grouped_linear.py", "fast/moe/blocks.py", "fast/moe/workspace.py"
T_TOPK, T_SORT, T_SUM, T_ACT = (f"fast/triton/moe_{name}.py" for name in ("topk", "sort", "sum", "activation"))
T_BLOCKS, T_EXPERTS, T_GEMM, T_WIDE = (f"fast/triton/{name}.py" for name in ("moe_blocks", "experts", "gemm_kernel", "grouped_wide"))
T_FRAGMENTS, T_GROUPED = "fast/triton/grouped_fragments.py", "fast/triton/grouped_gemm.py"

VLLM, SGLANG = "https://github.com/vllm-project/vllm/pull/", "https://github.com/sgl-project/sglang/pull/"
FLASHINFER, AITER = "https://github.com/flashinfer-ai/flashinfer/", "https://github.com/ROCm/aiter/"

SOFTMAX, SIGMOID, SOFTPLUS = (("fused_topk", scoring, "torch") for scoring in ("softmax", "sigmoid", "sqrtsoftplus"))
T_SOFTMAX, T_SIGMOID, T_SOFTPLUS = ((op, label, "triton") for op, label, _ in (SOFTMAX, SIGMOID, SOFTPLUS))
INDEXED, T_INDEXED = ("indexed_linear", "int4_g128_bf16", "torch"), ("indexed_linear", "int4_g128_bf16", "triton")
CONTIGUOUS, T_CONTIGUOUS = ("grouped_linear", "int4_g128_bf16", "torch"), ("grouped_linear", "int4_g128_bf16", "triton")
EXPERTS, T_FUSED = ("fused_experts", "plain", "torch"), ("fused_experts", "plain", "triton")
# On a GPU blocks are found by a kernel; in the interpreter it runs, too.
BY_KERNEL = ((BLOCKS, "if offsets.is_cuda:", "if True:"),)
COUNTS_BY_KERNEL = ((BLOCKS, "if counts.is_cuda:", "if True:"),)
# On a GPU weights in the fragments' order are tried first, and the general kernel takes what these do not.
BY_FRAGMENTS = (
    (
        "fast/triton/weight_only.py",
        'if device.type != "cuda":',
        'if device.type == "cpu":\n        return None\n    if device.type != "cuda":',
    ),
)
GENERAL = (("fast/triton/grouped.py", '("fast.triton.grouped_fragments", "fast.triton.grouped_gemm")', '("fast.triton.grouped_gemm",)'),)


def _all(op, impl="torch"):
    return op, "all", impl


ROUTING = (
    Mutant(
        "correction_bias_in_the_weights", "routing", TOPK,
        "weights = score.gather(1, ids)", "weights = (score if bias is None else score + bias.float()).gather(1, ids)",
        *SIGMOID, VLLM + "12002",
    ),
    Mutant(
        "renormalized_by_all_scores", "routing", TOPK, "(weights.sum(1, keepdim=True) + epsilon)", "(score.sum(1, keepdim=True) + epsilon)",
        *SOFTMAX, "https://github.com/pytorch/torchtitan/issues/1448",
    ),
    Mutant(
        "renormalized_though_not_asked", "routing", TOPK, "if renormalize else None", "if renormalize else 0.0",
        *SOFTMAX, "https://github.com/HabanaAI/vllm-fork/pull/671",
    ),
    Mutant(
        "denominator_without_epsilon", "routing", TOPK, "(weights.sum(1, keepdim=True) + epsilon)", "weights.sum(1, keepdim=True)",
        *SIGMOID, FLASHINFER + "pull/3875",
    ),
    Mutant(
        "routed_scaling_dropped", "routing", TOPK, "(weights * factor, ", "(weights, ", *SOFTMAX, FLASHINFER + "pull/3499",
    ),
    Mutant(
        "routed_scaling_dropped_with_renormalization", "routing", TOPK,
        "(weights * factor, ", "(weights if renormalize else weights * factor, ", *SIGMOID, SGLANG + "31449",
    ),
    Mutant(
        "routed_scaling_on_shared_experts", "routing", TOPK, "(m, shared), shared_weight)", "(m, shared), shared_weight * factor)",
        *SOFTMAX, "factor on too many terms",
    ),
    Mutant(
        "ties_by_an_unstable_topk", "routing", TOPK,
        "return order.sort(dim=1, descending=True, stable=True).indices[:, :top_k]", "return order.topk(top_k, dim=1).indices",
        *SOFTMAX, VLLM + "52679",
    ),
    Mutant(
        "ties_to_the_higher_expert", "routing", TOPK,
        "return order.sort(dim=1, descending=True, stable=True).indices[:, :top_k]",
        "return order.shape[1] - 1 - order.flip(1).sort(dim=1, descending=True, stable=True).indices[:, :top_k]",
        *SOFTPLUS, VLLM + "54403",
    ),
    Mutant(
        "groups_by_their_best_expert_alone", "routing", TOPK,
        "planes.topk(min(2, size), dim=2).values.sum(2) if bias is not None else planes.amax(2)", "planes.amax(2)",
        *SIGMOID, VLLM + "13474",
    ),
    Mutant(
        "groups_by_the_sum_of_all", "routing", TOPK,
        "planes.topk(min(2, size), dim=2).values.sum(2) if bias is not None", "planes.sum(2) if bias is not None",
        *SIGMOID, "https://github.com/EricLBuehler/mistral.rs/pull/1278",
    ),
    Mutant(
        "experts_of_other_groups_worth_zero", "routing", TOPK, "masked_fill(~member, -torch.inf)", "masked_fill(~member, 0.0)",
        *SIGMOID, SGLANG + "3705",
    ),
    Mutant(
        "hash_of_the_next_token", "routing", TOPK, "torch.where(known, tokens, 0).long()", "((tokens + 1) % table.shape[0]).long()",
        *_all("hash_topk"), "off by one",
    ),
    Mutant(
        "padding_keeps_its_experts", "routing", TOPK, "ids[num_valid:], weights[num_valid:] = -1, 0.0", "weights[num_valid:] = 0.0",
        *SOFTMAX, SGLANG + "24850",
    ),
    Mutant(
        "kernel_ties_to_the_higher_expert", "routing", T_TOPK,
        """(EXPERTS - 1 - lane)[None, :].to(tl.int64)
    best = tl.reduce(joined, 1, tl.standard._elementwise_max)
    return EXPERTS - 1 - (best & 0xFFFFFFFF).to(tl.int32)""",
        """lane[None, :].to(tl.int64)
    best = tl.reduce(joined, 1, tl.standard._elementwise_max)
    return (best & 0xFFFFFFFF).to(tl.int32)""",
        *T_SOFTMAX, VLLM + "54403",
    ),
    Mutant(
        "kernel_minus_zero_below_zero", "routing", T_TOPK, "u = tl.where(v == 0.0, 0, u)", "u = tl.where(v == 0.0, u, u)",
        *T_SOFTMAX, "-0 forgotten",
    ),
    Mutant(
        "kernel_softmax_without_the_maximum", "routing", T_TOPK, "tl.exp(v - top[:, None])", "tl.exp(v)", *T_SOFTMAX, "overflow of exp",
        lane="both",
    ),
    Mutant(
        "kernel_expert_chosen_twice", "routing", T_TOPK,
        "key = tl.where(lane[None, :] == at[:, None], -0x80000000, key)",
        "key = tl.where((lane[None, :] == at[:, None]) & (score > 0), -0x80000000, key)",
        *T_SOFTMAX, VLLM + "39391",
    ),
    Mutant(
        "kernel_group_counts_its_best_twice", "routing", T_TOPK, "others = member & (lane[None, :] != at[:, None])", "others = member",
        *T_SIGMOID, VLLM + "13474",
    ),
    Mutant(
        "kernel_ties_to_the_higher_group", "routing", T_TOPK, "(theirs == mine) & (g < group)", "(theirs == mine) & (g > group)",
        *T_SIGMOID, "comparison turned round",
    ),
    Mutant(
        "kernel_shared_experts_all_the_first", "routing", T_TOPK, "tl.where(valid, e + t, -1)", "tl.where(valid, e, -1)",
        *T_SIGMOID, "index left out",
    ),
    Mutant(
        "kernel_softplus_without_log1p", "rounding", T_TOPK, "log1p(tl.exp(-tl.abs(v)))", "tl.log(1.0 + tl.exp(-tl.abs(v)))",
        *T_SOFTPLUS, "cancellation",
    ),
    Mutant(
        "kernel_sigmoid_of_two_infinities", "rounding", T_TOPK, "1.0 / (1.0 + tl.exp(-v))", "tl.exp(v) / (1.0 + tl.exp(v))",
        *T_SIGMOID, SGLANG + "30079",
    ),
)  # fmt: skip

MAPS = (
    Mutant(
        "negative_id_wraps_in_the_map", "routing", MAP,
        "torch.where(ids < 0, -1, mapped.long()[ids.clamp(min=0)]).clamp(min=-1)", "mapped.long()[ids].clamp(min=-1)",
        *_all("moe_permute"), AITER + "issues/4636",
    ),
    Mutant(
        "remainder_of_experts_to_nobody", "routing", MAP,
        "rank * (num_experts // ranks) + min(rank, num_experts % ranks)", "rank * (num_experts // ranks)",
        *_all("expert_map"), "https://github.com/vllm-project/vllm-ascend/pull/16384",
    ),
    Mutant(
        "round_robin_from_the_wrong_rank", "routing", MAP, "local[rank::ranks]", "local[(rank + 1) % ranks :: ranks]",
        *_all("expert_map"), "off by one",
    ),
    Mutant(
        "blocks_by_global_expert", "routing", ALIGN,
        "if expert_map is not None and not ignore_invalid_experts:", "if expert_map is not None and ignore_invalid_experts is None:",
        *_all("moe_align_block_size"), AITER + "issues/3995",
    ),
    Mutant(
        "map_applied_twice", "routing", ALIGN, "expert_map if ignore_invalid_experts else None", "expert_map",
        *_all("moe_align_block_size"), "https://github.com/vllm-project/vllm/issues/19590",
    ),
    Mutant(
        "kernel_negative_id_read_through_the_map", "routing", T_SORT,
        "tl.load(expert_map + expert, mask=expert >= 0, other=-1)", "tl.load(expert_map + tl.maximum(expert, 0))",
        *_all("moe_permute", "triton"), AITER + "issues/4636",
    ),
)  # fmt: skip

SORTING = (
    Mutant(
        "block_at_a_border_to_the_expert_before", "routing", ALIGN,
        "torch.searchsorted(offsets[1:], start, right=True)", "torch.searchsorted(offsets[1:], start)",
        *_all("moe_align_block_size"), "comparison of a border",
    ),
    Mutant(
        "idle_blocks_to_expert_0", "mask", ALIGN,
        "torch.where(start < offsets[-1], owners, -1)", "torch.where(start < offsets[-1], owners, 0)",
        *_all("moe_align_block_size"), VLLM + "35161",
    ),
    Mutant(
        "end_not_padded_to_blocks", "mask", ALIGN,
        "offsets[-1:].to(torch.int32)\n\n", "(ids >= 0).sum().view(1).to(torch.int32)\n\n",
        *_all("moe_align_block_size"), SGLANG + "12701",
    ),
    Mutant(
        "empty_expert_gets_a_block", "mask", ALIGN, "whole = (rows + block_size - 1) // block_size", "whole = rows // block_size + 1",
        *_all("batched_moe_align_block_size"), VLLM + "55896",
    ),
    Mutant(
        "row_behind_the_count", "mask", ALIGN, "(row < rows[held, None])", "(row <= rows[held, None])",
        *_all("batched_moe_align_block_size"), "off by one",
    ),
    Mutant(
        "kernel_end_not_padded_to_blocks", "mask", T_SORT,
        "final = tl.reduce(whole, 0, tl.standard._sum_combine) * block", "final = tl.reduce(total, 0, tl.standard._sum_combine)",
        *_all("moe_align_block_size", "triton"), SGLANG + "12701",
    ),
    Mutant(
        "kernel_empty_expert_gets_a_block", "mask", T_SORT,
        "whole = (total + block - 1) // block", "whole = tl.maximum(total + block - 1, block) // block",
        *_all("moe_align_block_size", "triton"), VLLM + "55896",
    ),
    Mutant(
        "kernel_block_at_a_border_to_the_expert_before", "routing", T_SORT, "(ends[None, :] <= b[:, None])", "(ends[None, :] < b[:, None])",
        *_all("moe_align_block_size", "triton"), "comparison of a border",
    ),
    Mutant(
        "kernel_only_the_first_slot", "routing", T_SORT,
        "tl.store(order + at, slot, mask=placed)", "tl.store(order + at, slot, mask=placed & (rank == 0))",
        *_all("moe_align_block_size", "triton"), "https://github.com/vllm-project/vllm-xpu-kernels/issues/453",
    ),
    Mutant(
        "kernel_second_chunk_over_the_first", "concurrency", T_SORT,
        "tl.where((chunk < program)[:, None], c, 0)", "tl.where((chunk < program - 1)[:, None], c, 0)",
        *_all("moe_align_block_size", "triton"), "https://github.com/kekzl/imp/pull/2056",
    ),
    Mutant(
        "kernel_counts_not_zeroed", "memory", T_SORT, "counts = torch.zeros(chunks, lanes,", "counts = torch.empty(chunks, lanes,",
        *_all("moe_align_block_size", "triton"), "unwritten memory",
        hangs=True,
    ),
    Mutant(
        "kernel_last_expert_without_an_offset", "memory", T_SORT,
        "mask=lane < last)\n        final", "mask=lane < last - 1)\n        final",
        *_all("moe_permute", "triton"), "off by one",
    ),
    Mutant(
        "kernel_slots_out_of_order", "routing", T_SORT, "(other[None, :] < slot[:, None])", "(other[None, :] > slot[:, None])",
        *_all("moe_align_block_size", "triton"), "a sort that is not stable",
    ),
)  # fmt: skip

PERMUTATION = (
    Mutant(
        "absent_slot_has_a_place", "mask", PERMUTE,
        "inverse = torch.where(local < 0, -1, place)", "inverse = torch.where(local < 0, 0, place)",
        *_all("moe_permute"), "sentinel 0 for -1",
    ),
    Mutant(
        "inverse_is_the_order", "layout", PERMUTE,
        "inverse = torch.where(local < 0, -1, place)", "inverse = torch.where(local < 0, -1, order[: len(local)])",
        *_all("moe_permute"), "a permutation for its inverse",
    ),
    Mutant(
        "rows_by_slot_not_token", "layout", PERMUTE,
        "order // max(t, 1)", "order % max(x.shape[0], 1)",
        *_all("moe_permute"), "the other axis first",
    ),
    Mutant(
        "rows_of_the_next_expert_on_the_plane", "mask", PERMUTE,
        "torch.where(plane < counts[:, None], offsets[:-1, None] + plane, rows.shape[0])",
        "(offsets[:-1, None] + plane).clamp(max=rows.shape[0])",
        *_all("moe_scatter_masked"), "dropped mask",
    ),
    Mutant(
        "row_0_is_no_row", "mask", PERMUTE, "here = (index >= 0) & (index < rows.shape[0])", "here = (index > 0) & (index < rows.shape[0])",
        *_all("moe_unpermute"), "off by one",
    ),
    Mutant(
        "unpermute_sums_in_16_bit", "rounding", PERMUTE,
        "total = torch.zeros(m, rows.shape[1], dtype=torch.float32, device=rows.device)",
        "total = torch.zeros(m, rows.shape[1], dtype=rows.dtype)",
        *_all("moe_unpermute"), "narrower accumulator",
    ),
    Mutant(
        "unpermute_weights_in_16_bit", "rounding", PERMUTE,
        "topk_weights[:, slot, None].float() *", "topk_weights[:, slot, None].to(rows.dtype).float() *",
        *_all("moe_unpermute"), VLLM + "16801",
    ),
    Mutant(
        "kernel_padding_rows_are_token_0", "mask", T_SORT, "mask=column < tl.where(here, k, 0), other=0)", "mask=column < k, other=0)",
        *_all("moe_permute", "triton"), "dropped mask",
    ),
    Mutant(
        "kernel_rows_by_slot_not_token", "layout", T_SORT, "(tl.where(here, slot, 0) // t)", "(tl.where(here, slot, 0) % (n // t))",
        *_all("moe_permute", "triton"), "the other axis first",
    ),
)  # fmt: skip

SUMS = (
    Mutant(
        "sum_weights_in_16_bit", "rounding", SUM,
        "topk_weights[:, slot, None].float() *", "topk_weights[:, slot, None].to(inputs.dtype).float() *",
        *_all("moe_fused_mul_sum"), VLLM + "16801",
    ),
    Mutant(
        "sum_products_in_16_bit", "rounding", SUM,
        "topk_weights[:, slot, None].float() * inputs[:, slot].float()",
        "(topk_weights[:, slot, None].float() * inputs[:, slot].float()).to(inputs.dtype).float()",
        *_all("moe_fused_mul_sum"), "one rounding more",
    ),
    Mutant(
        "absent_slots_times_zero", "mask", SUM, "torch.where(here[:, slot, None], part, 0.0)", "part * here[:, slot, None]",
        *_all("moe_fused_mul_sum"), "https://github.com/NVIDIA/TransformerEngine/pull/3116",
    ),
    Mutant(
        "sum_asks_no_ids_without_a_map", "mask", SUM, "if topk_ids is not None:", "if expert_map is not None:",
        *_all("moe_fused_mul_sum"), SGLANG + "24850",
    ),
    Mutant(
        "sum_without_the_last_slot", "mask", SUM, "for slot in range(inputs.shape[1]):", "for slot in range(max(inputs.shape[1] - 1, 1)):",
        *_all("moe_fused_mul_sum"), "off by one",
    ),
    Mutant(
        "kernel_sum_weighs_absent_slots", "mask", T_SUM, "acc += tl.where(here, weight * v, 0.0)", "acc += weight * v",
        *_all("moe_fused_mul_sum", "triton"), "https://github.com/NVIDIA/TransformerEngine/pull/3116",
    ),
    Mutant(
        "kernel_sum_without_expert_0", "mask", T_SUM,
        "here = expert >= 0", "here = expert > 0",
        *_all("moe_fused_mul_sum", "triton"), "off by one",
    ),
    Mutant(
        "kernel_sum_ignores_the_map", "routing", T_SUM,
        "here = here & (tl.load(expert_map + expert, mask=here, other=-1) >= 0)",
        "here = here & (tl.load(expert_map + expert, mask=here, other=-1) >= -1)",
        *_all("moe_fused_mul_sum", "triton"), SGLANG + "12701",
    ),
    Mutant(
        "kernel_sum_rounds_every_term", "rounding", T_SUM,
        "acc += tl.where(here, weight * v, 0.0)",
        "acc = to_float32(round_to_output(acc + tl.where(here, weight * v, 0.0), y.dtype.element_ty))",
        *_all("moe_fused_mul_sum", "triton"), "narrower accumulator",
    ),
    Mutant(
        "kernel_sum_with_32_bit_offsets", "memory", T_SUM,
        "start = row.to(tl.int64) * stride_m + tl.full((), slot, tl.int64) * stride_t",
        "start = (row * stride_m + slot * stride_t).to(tl.int32)",
        *_all("moe_fused_mul_sum", "triton"), "https://github.com/vllm-project/vllm/issues/5938",
    ),
)  # fmt: skip

ACTIVATIONS = (
    Mutant(
        "gate_and_up_exchanged", "activation", ACTIVATION, "v.tensor_split(2, dim=-1)", "v.tensor_split(2, dim=-1)[::-1]",
        *_all("moe_activation"), "w1 and w3 exchanged",
    ),
    Mutant(
        "interleaved_taken_as_halves", "activation", ACTIVATION, "if described.interleaved else", "if described.interleaved is None else",
        *_all("moe_activation"), "https://github.com/ROCm/ATOM/pull/885",
    ),
    Mutant(
        "gate_clamped_from_below_too", "activation", ACTIVATION, 'g.clamp(max=p["limit"])', 'g.clamp(-p["limit"], p["limit"])',
        *_all("moe_activation"), "limit on the wrong side",
    ),
    Mutant(
        "up_clamped_from_above_alone", "activation", ACTIVATION, 'u.clamp(-p["limit"], p["limit"])', 'u.clamp(max=p["limit"])',
        *_all("moe_activation"), "https://github.com/vllm-project/vllm-ascend/pull/9259",
    ),
    Mutant(
        "step_clamped_before_silu", "activation", ACTIVATION,
        'g = g if activation == "swiglustep" else g.clamp(max=p["limit"])', 'g = g.clamp(max=p["limit"])',
        *_all("moe_activation"), "clamp on the wrong side of the function",
    ),
    Mutant(
        "alpha_dropped", "activation", ACTIVATION,
        'torch.sigmoid(p["alpha"] * g)', "torch.sigmoid(g)",
        *_all("moe_activation"), "parameter left out",
    ),
    Mutant(
        "beta_fixed_at_1", "activation", ACTIVATION,
        'u + p["beta"]', "u + 1",
        *_all("moe_activation"), "https://github.com/microsoft/onnxruntime/issues/28738",
    ),
    Mutant(
        "gelu_tanh_cubic_short_of_digits", "activation", ACTIVATION,
        "0.044715 * g", "0.0447 * g",
        *_all("moe_activation"), "a constant of fewer digits",
    ),
    Mutant(
        "kernel_up_not_clamped", "activation", T_ACT,
        "u = tl.where(u > LIMIT, LIMIT, tl.where(u < -LIMIT, -LIMIT, u))", "u = u + 0.0",
        *_all("moe_activation", "triton"), SGLANG + "23776",
    ),
    Mutant(
        "kernel_silu_of_two_infinities", "activation", T_ACT, "return 1.0 / (1.0 + tl.exp(-g))", "return tl.exp(g) / (1.0 + tl.exp(g))",
        *_all("moe_activation", "triton"), "overflow of exp",
    ),
    Mutant(
        "kernel_relu2_swallows_nan", "activation", T_ACT,
        "tl.where(g == g, 0.0, g)", "0.0",
        *_all("moe_activation", "triton"), "NaN compares false",
    ),
    Mutant(
        "kernel_tanh_cancels_near_zero", "rounding", T_ACT,
        "tl.where(size < 0.25, near, far)", "far",
        *_all("moe_activation", "triton"), "cancellation",
    ),
    Mutant(
        "kernel_up_beta_ignored", "activation", T_ACT, "if UP_BETA is not None:", "if UP_BETA is None and KIND == '':",
        *_all("moe_activation", "triton"), "parameter left out",
    ),
)  # fmt: skip

PRODUCTS = (
    Mutant(
        "router_weight_applied_twice", "scale", EAGER,
        "y = y * weights[rows, None].to(y.dtype)", "y = y * weights[rows, None].to(y.dtype) ** 2",
        *INDEXED, VLLM + "43694",
    ),
    Mutant(
        "bias_not_weighted", "scale", EAGER,
        """self.experts[expert].run(a, None if bias is None else bias[expert], None, y)
        if weights is not None:
            y = y * weights[rows, None].to(y.dtype)""",
        """self.experts[expert].run(a, None, None, y)
        if weights is not None:
            y = y * weights[rows, None].to(y.dtype)
        if bias is not None:
            y = y + bias[expert].to(y.dtype)""",
        *INDEXED, "https://github.com/NVIDIA-NeMo/Automodel/pull/2591",
    ),
    Mutant(
        "bias_of_expert_0", "scale", EAGER,
        "None if bias is None else bias[expert]", "None if bias is None else bias[0]",
        *CONTIGUOUS, "index left out",
    ),
    Mutant(
        "stale_expert_after_an_empty_one", "routing", EAGER,
        "row.to(offsets.dtype), right=True)", "row.to(offsets.dtype))", *CONTIGUOUS, "https://github.com/NVIDIA/TensorRT-LLM/issues/15155",
    ),
    Mutant(
        "rows_behind_the_last_expert_left", "mask", EAGER, "bias, None, out.zero_())", "bias, None, out)",
        *CONTIGUOUS, "https://github.com/huggingface/transformers/pull/48205",
    ),
    Mutant(
        "absent_experts_blocks_by_expert_0", "routing", EAGER,
        "(expert_ids < len(self.experts)), expert_ids, -1)", "(expert_ids < len(self.experts)), expert_ids, 0)",
        *INDEXED, VLLM + "35161",
    ),
    Mutant(
        "rows_counted_by_the_neighbour", "mask", EAGER, "row < counts[expert]", "row < counts[expert - 1]",
        "masked_linear", "mxfp4", "torch", "off by one",
    ),
    Mutant(
        "x_by_slot_not_token", "layout", EAGER,
        "source = torch.arange(slots, device=x.device) // top_k", "source = torch.arange(slots, device=x.device) % x.shape[0]",
        *INDEXED, "the other axis first",
    ),
    Mutant(
        "rows_behind_the_last_expert_by_the_last", "mask", BLOCKS,
        "owners = torch.where(run < experts, run, -1)", "owners = run.clamp(max=experts - 1)",
        *T_CONTIGUOUS, "sentinel lost",
    ),
    Mutant(
        "block_of_an_empty_expert", "routing", BLOCKS,
        "run = torch.searchsorted(ends, number, right=True)", "run = torch.searchsorted(ends, number)", *T_CONTIGUOUS,
        "https://github.com/NVIDIA/TensorRT-LLM/issues/15155",
    ),
    Mutant(
        "rows_of_another_block", "mask", T_EXPERTS, "mask=(inside < BLOCK) & (place < length)", "mask=place < length",
        *T_INDEXED, "dropped mask", lane="gpu",
    ),
    Mutant(
        "kernel_scale_block_of_expert_0", "scale", T_GEMM, "expert * ((n + GN - 1) // GN) * stride_s", "expert * (n // GN) * stride_s",
        "grouped_linear", "fp8_e4m3_b16x64_bf16", "triton", "https://github.com/axolotl-ai-cloud/axolotl/pull/3486", opens=GENERAL,
    ),
    Mutant(
        "kernel_second_scale_of_expert_0", "scale", T_GEMM,
        """elif SCALE_2 != "none":
            scale_2 += expert""",
        """elif SCALE_2 != "none":
            scale_2 += 0""",
        "grouped_linear", "nvfp4", "triton", VLLM + "41769",
    ),
    Mutant(
        "kernel_bias_of_expert_0", "scale", T_GEMM,
        "bias += expert * n", "bias += 0",
        "grouped_linear", "mxfp4", "triton", "index left out", opens=GENERAL,
    ),
    Mutant(
        "kernel_router_weight_of_the_token", "scale", T_GEMM, "tl.load(topk_weights + am)", "tl.load(topk_weights + ax)",
        "indexed_linear", "nvfp4", "triton", VLLM + "16801",
    ),
    Mutant(
        "kernel_rows_of_no_expert_left", "mask", T_GEMM, "write_zeros(y, rm, rn, m, n)", "write_zeros(y, rm, rn, 0, n)",
        "grouped_linear", "fp8_e4m3_b128x128", "triton", "https://github.com/huggingface/transformers/pull/48205", opens=GENERAL,
    ),
    Mutant(
        "kernel_zero_points_of_expert_0", "scale", T_GEMM,
        "zero += rows_s", "zero += 0",
        "grouped_linear", "uint8z_g32", "triton", "index left out",
    ),
    Mutant(
        "fragments_scale_of_expert_0", "scale", T_WIDE,
        "scale += expert * groups * stride_s", "scale += 0",
        *T_CONTIGUOUS, "index left out", opens=BY_FRAGMENTS,
    ),
    Mutant(
        "fragments_zero_points_of_expert_0", "scale", T_WIDE, "zero += expert * groups * stride_s", "zero += 0",
        "grouped_linear", "uint4z_g128", "triton", "index left out", opens=BY_FRAGMENTS,
    ),
    Mutant(
        "fragments_rows_not_padded", "layout", T_WIDE, "of_tile = expert * (stride_s // 16)", "of_tile = expert * (n // 16)",
        "grouped_linear", "mxfp4", "triton", "size without its padding", opens=BY_FRAGMENTS,
    ),
    Mutant(
        "fragments_router_weight_of_the_token", "scale", T_WIDE, "tl.load(topk_weights + rm, ", "tl.load(topk_weights + rm // top_k, ",
        *T_INDEXED, VLLM + "16801", opens=BY_FRAGMENTS, lane="both",
    ),
    Mutant(
        "fragments_weight_before_bias", "scale", T_WIDE,
        """        if bias is not None:
            acc += to_float32(tl.load(bias + expert * n + rn, mask=rn < n, other=0))[:, None]
        if topk_weights is not None:
            acc *= to_float32(tl.load(topk_weights + rm, mask=rm < m, other=0))[None, :]
""",
        """        if topk_weights is not None:
            acc *= to_float32(tl.load(topk_weights + rm, mask=rm < m, other=0))[None, :]
        if bias is not None:
            acc += to_float32(tl.load(bias + expert * n + rn, mask=rn < n, other=0))[:, None]
""",
        *T_INDEXED, "https://github.com/NVIDIA-NeMo/Automodel/pull/2591", opens=BY_FRAGMENTS,
    ),
    Mutant(
        "fragments_scales_block_by_block", "scale", T_FRAGMENTS,
        "scale.repeat_interleave(w.format.group[0], 1)[:, :n]", "scale.repeat(1, w.format.group[0], 1)[:, :n]",
        "grouped_linear", "fp8_e4m3_b16x64_bf16", "triton", "repeat for repeat_interleave", opens=BY_FRAGMENTS,
    ),
    Mutant(
        "kernel_blocks_by_the_number_of_rows", "routing", T_BLOCKS, "whole = (count + BLOCK - 1) // BLOCK", "whole = count // BLOCK + 1",
        *T_CONTIGUOUS, VLLM + "55896", opens=BY_KERNEL, lane="both",
    ),
    Mutant(
        "kernel_block_of_the_run_before", "routing", T_BLOCKS,
        "here = (ends - whole <= block) & (block < ends)", "here = (ends - whole < block) & (block <= ends)",
        *T_CONTIGUOUS, "comparison of a border", opens=BY_KERNEL,
    ),
    Mutant(
        "kernel_rows_behind_the_last_expert_by_another", "mask", T_BLOCKS,
        "tl.where(here & (run < experts), run + 1, 0)", "tl.where(here, tl.minimum(run, experts - 1) + 1, 0)",
        *T_CONTIGUOUS, "sentinel lost", opens=BY_KERNEL,
    ),
    Mutant(
        "kernel_planes_without_a_stride", "layout", T_BLOCKS,
        "start = run.to(tl.int64) * most", "start = run.to(tl.int64) * n // experts * 0 + run * (most - 1)",
        "masked_linear", "mxfp4", "triton", "off by one", opens=COUNTS_BY_KERNEL,
    ),
)  # fmt: skip

LAYERS = (
    Mutant(
        "router_weight_on_both_sides", "scale", LAYER,
        "topk_weights = torch.ones_like(topk_weights, dtype=torch.float32)", "topk_weights = topk_weights.float()",
        *EXPERTS, VLLM + "43694",
    ),
    Mutant(
        "router_weight_on_the_wrong_side", "scale", LAYER,
        "    if apply_router_weight_on_input:", "    if False:",
        *EXPERTS, SGLANG + "7889",
    ),
    Mutant(
        "router_weight_on_input_in_16_bit", "rounding", LAYER,
        "_round_once(x.double() * topk_weights.double(), x.dtype)", "x * topk_weights.to(x.dtype)",
        *EXPERTS, "https://github.com/NVIDIA/TensorRT-LLM/pull/3492",
    ),
    Mutant(
        "second_bias_forgotten", "scale", LAYER, "hidden, self.biases[1], down, 1)", "hidden, None, down, 1)",
        *EXPERTS, "https://github.com/flagos-ai/vllm-plugin-FL/pull/401",
    ),
    Mutant(
        "layer_without_the_limit", "activation", LAYER,
        "**dict(parameters), impl=self.impl",
        "**(dict(parameters) if name.startswith('swiglu') else dict(parameters) | {'limit': None}), impl=self.impl",
        *EXPERTS, "https://github.com/lightseekorg/tokenspeed/pull/1647",
    ),
    Mutant(
        "layer_sums_experts_of_other_ranks", "routing", LAYER, "identity(experts, x.device) if expert_map is None else expert_map", "None",
        *EXPERTS, VLLM + "12583",
    ),
    Mutant(
        "layer_sorts_by_global_expert", "routing", LAYER,
        "everywhere, expert_map, ignore_invalid_experts=True", "everywhere, None, ignore_invalid_experts=True",
        *EXPERTS, AITER + "issues/3995",
    ),
    Mutant(
        "workspaces_share_their_memory", "memory", SPACES,
        "self.spaces[stage % 2][:size]", "self.spaces[0][:size]",
        *EXPERTS, "aliased buffers",
    ),
    Mutant(
        "scale_of_rows_that_nobody_wrote", "memory", LAYER, "gate_up.zero_()", "pass", "fused_experts", "int4_g32", "torch", VLLM + "35161",
    ),
    Mutant(
        "top_1_sum_of_unwritten_memory", "memory", LAYER,
        "impl=layer.impl, out=y)\n\n\ndef grouped_contiguous", "impl=layer.impl, out=y if t > 1 else None)\n\n\ndef grouped_contiguous",
        *EXPERTS, SGLANG + "40187",
    ),
)  # fmt: skip

MUTANTS = (*ROUTING, *MAPS, *SORTING, *PERMUTATION, *SUMS, *ACTIVATIONS, *PRODUCTS, *LAYERS)


def _variation(name, path, find, replace, cell, about, opens=()):
    return Mutant(name, "variation", path, find, replace, *cell, about, opens=opens)


ANY_ORDER = (("fast/__init__.py", '    "moe_align_block_size": ("stable",),\n', ""),)
WHOLE = "x_format is not None and parse_format(x_format).group == (0, 0)"
LAYOUT = 'layout = "indexed" if gemm_type == "auto" else gemm_type'
INT4_LAYER = ("fused_experts", "int4_g32", "torch")

# Right changes: the suite has to pass them.
VARIATIONS = (
    _variation(
        "softmax_chosen_by_scores", TOPK,
        '_best(v if scoring == "softmax" and bias is None else score, ', "_best(score, ",
        SOFTMAX, "float32 scores may tie",
    ),
    _variation(
        "softmax_by_powers_of_two", T_TOPK,
        "tl.exp(v - top[:, None])", "tl.exp2((v - top[:, None]) * 1.4426950408889634)",
        T_SOFTMAX, "another exponential",
    ),
    _variation(
        "slots_of_an_expert_backwards", T_SORT,
        "(other[None, :] < slot[:, None])", "(other[None, :] > slot[:, None])",
        _all("moe_align_block_size", "triton"), "any order, where it is not promised", ANY_ORDER,
    ),
    _variation("sort_in_chunks_of_128", T_SORT, "CHUNK = 256", "CHUNK = 128", _all("moe_permute", "triton"), "other chunks"),
    _variation(
        "sum_from_the_last_slot", SUM,
        "for slot in range(inputs.shape[1]):", "for slot in reversed(range(inputs.shape[1])):",
        _all("moe_fused_mul_sum"), "another order",
    ),
    _variation(
        "sum_in_float64", PERMUTE,
        "total = torch.zeros(m, rows.shape[1], dtype=torch.float32,", "total = torch.zeros(m, rows.shape[1], dtype=torch.float64,",
        _all("moe_unpermute"), "a wider accumulator",
    ),
    _variation(
        "activation_in_float64", ACTIVATION,
        "v = x if x.dtype == torch.float64 else x.float()", "v = x.double()",
        _all("moe_activation"), "wider inside",
    ),
    _variation(
        "experts_backwards", EAGER,
        "for expert in range(len(self.experts)):", "for expert in reversed(range(len(self.experts))):",
        INDEXED, "another order",
    ),
    _variation(
        "products_kept_in_float32", EAGER,
        "exact = torch.float32 if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16) else torch.float64", "exact = torch.float32",
        INDEXED, "one rounding to float32 before the last",
    ),
    _variation(
        "layer_moves_rows_together", LAYER,
        LAYOUT, f'{LAYOUT}\n    layout = layout if {WHOLE} else "grouped_contiguous"',
        INT4_LAYER, "another layout",
    ),
    _variation(
        "layer_moves_rows_to_planes", LAYER,
        LAYOUT, f'{LAYOUT}\n    layout = layout if {WHOLE} else "grouped_masked"',
        EXPERTS, "another layout",
    ),
    _variation(
        "blocks_of_64_rows_and_more", "fast/moe/stack.py",
        "BLOCK_SIZES = (16, 32, 64, 128)", "BLOCK_SIZES = (64, 128)",
        EXPERTS, "other blocks",
    ),
    _variation("tiles_of_32_rows", T_GROUPED, "MOST_ROWS = 128", "MOST_ROWS = 32", T_INDEXED, "other tiles"),
)  # fmt: skip
