"""Keys that quantizers leave in a GPTQ, AWQ or AutoRound config to say how the checkpoint was made; none has a say in what it means."""

RECIPE = (
    *("damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "mse", "act_group_aware", "hessian", "gptaq"),
    *("foem", "v2", "v2_alpha", "v2_memory_device", "failsafe", "fail_safe", "fallback", "adapter", "rotation", "activation"),
    *("telemetry", "offload_to_disk", "pack_impl", "model_name_or_path", "model_file_base_name", "model_seqlen", "tokenizer"),
    *("dataset", "batch_size", "pad_token_id", "block_name_to_quantize", "module_name_preceding_first_block"),
    *("cache_block_outputs", "max_input_length", "backend", "use_cuda_fp16", "use_exllama", "disable_exllama", "exllama_config"),
    *("exllama_version", "use_exllama_v2", "quantizer", "version", "provider", "autoround_version", "amp", "iters", "lr"),
    *("minmax_lr", "nsamples", "seqlen", "gradient_accumulate_steps", "low_gpu_mem_usage", "low_cpu_mem_usage"),
    *("enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input", "enable_alg_ext", "enable_adam"),
    *("enable_torch_compile", "scale_dtype", "data_type", "act_bits", "act_group_size", "act_sym", "act_data_type", "act_dynamic"),
    *("super_bits", "super_group_size", "static_kv_dtype", "static_kv_granularity", "static_attention_dtype"),
    *("static_attention_granularity", "supported_types", "quant_block_list", "to_quant_block_names", "quant_nontext_module"),
    *("quant_lm_head", "kv_cache_scheme", "format_version", "meta"),
)
