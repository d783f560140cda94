"""Tiny random models of transformers, written as their own checkpoints, and what they compute by ref's definitions."""

import copy
import json
import re

import pytest
import torch
from torch import nn

import ref
from conformance.experts_case import ExpertsCase
from conformance.moe_case import Route
from conformance.ops.experts_data import ExpertsData
from conformance.ops.fused_experts import Truth
from conformance.oracle import compare

H, VOCAB, EXPERTS = 64, 128, 4
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": H, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "max_position_embeddings": 64, "initializer_range": 0.2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
MIXED = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
MODELS = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2, "attention_bias": True, "tie_word_embeddings": True}),
    "mixtral": ("MixtralConfig", {"num_key_value_heads": 2, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_key_value_heads": 2, "num_experts": EXPERTS, "norm_topk_prob": True} | MIXED),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "q_lora_rank": 32,
            "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1,
        } | MIXED,
    ),
    "gpt_oss": (
        "GptOssConfig",
        {"num_key_value_heads": 2, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}  # fmt: skip
# Linear layers and experts of all of these models, as their checkpoints name them.
QUANTIZED = re.compile(r"(_proj|_proj_with_mqa|\.w[123]|experts\.\w+_proj)(\.weight)?$")


def plain_model(name, dtype=torch.float32):
    """A model with random weights, those of norms and biases too."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config, fields = MODELS[name]
    config = getattr(transformers, config)(**SHAPE | fields, experts_implementation="eager")
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or not bool(parameter.any()):
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def checkpoint(folder, model, fmt, layout, config=None, write=None, **options):
    """A model's own checkpoint, whose linear layers and experts are quantized and written in a layout.

    Args:
        config: further keys of the quantization config. write: further tensors of a layer, {part: tensor}. options: of the layout's write.

    Returns:
        {layer: QTensor}, as they were written.
    """
    from safetensors.torch import load_file, save_file

    model.save_pretrained(folder)
    tensors, written = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if QUANTIZED.search(name)]:
        w = tensors[name]
        if w.dim() == 3 or layout.__name__.endswith("mxfp4"):
            if w.dim() == 2:
                continue  # GPT-OSS has only experts quantized
            w = w.mT
        layer = name.removesuffix(".weight")
        del tensors[name]
        written[layer] = q = ref.quantize(w, fmt)
        parts = layout.write(q, **options) | {part: tensor.clone() for part, tensor in (write or {}).items()}
        separator = "_" if w.dim() == 3 else "."
        tensors |= {f"{layer}{separator}{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    document = json.loads((folder / "config.json").read_text())
    quantization = layout.config_of(q, **options) | (config or {})
    (folder / "config.json").write_text(json.dumps(document | {"quantization_config": quantization}))
    return written


class Watched:
    """The inputs and outputs of a model's quantized layers, in one pass."""

    def __init__(self, model, kinds):
        self.calls = []
        for name, module in model.named_modules():
            if isinstance(module, kinds):
                module.register_forward_hook(lambda module, args, y, name=name: self.calls.append((name, module, args, y)))


def check_experts(layer, theirs, x, ids, weights, y):
    """Experts against transformers' own module in float64 on the dequantized weights, within the bound that the suite derives for this input."""
    kind = {"activation": layer.activation} | {name: value for name, value in layer.activation_parameters.items() if value is not None}
    w13, w2 = layer.w13.weight, layer.w2.weight
    route = Route(x.shape[0], ids.shape[1], w13.shape[0])
    case = ExpertsCase(
        route=route, h=x.shape[1], i=w2.shape[2], n=w2.shape[1], format=w13.format, x_format=layer.x_format, dtype="fp32", data="normal", **kind
    )  # fmt: skip
    data = ExpertsData(case, x, w13, w2, layer.bias13, layer.bias2, weights, False)
    data.ids, data.local, data.live = ids, ids.long(), ids >= 0
    truth = Truth(data, x.device)
    truth.check(y)
    # The bound does not depend on whose exact answer it is put around.
    with torch.no_grad():
        exact = theirs(x.double(), ids, weights.double())
    compare(y, exact, truth.answer("stored", "exact", "exact").half + 1e-12 * exact.abs())


def dequantized(model, name):
    """transformers' model in float64 with the numbers that the quantized model's layers stand for: no code of fast's in it."""
    import fast

    truth = plain_model(name).double()
    state, quantized = truth.state_dict(), {}
    for key, module in model.named_modules():
        if isinstance(module, fast.Linear):
            quantized[f"{key}.weight"] = module.weight
        elif isinstance(module, fast.FusedExperts):
            quantized |= {f"{key}.{name}": w.weight for name, w in zip(module.names, (module.w13, module.w2), strict=True)}
            biases = zip(module.names, (module.bias13, module.bias2), strict=True)
            state |= {f"{key}.{name}_bias": bias.double() for name, bias in biases if bias is not None}
    weights = {key: ref.dequantize(q) for key, q in quantized.items()}
    # GPT-OSS has the transpose.
    weights = {key: w if w.shape == state[key].shape and "gpt" not in name else w.mT if w.dim() == 3 else w for key, w in weights.items()}
    plain = {key: tensor.double() for key, tensor in model.state_dict().items() if key in state}
    truth.load_state_dict(state | plain | weights)
    return truth


def nearer(logits, truth, tokens):
    """The exact logits, after the check that these are no farther from them than transformers' own float32 arithmetic on the same weights is.

    Both errors are roundings of float32; a layer of fast's rounds its result once, and torch's every sum. Means of squares are compared, of
    thousands of logits.
    """
    with torch.no_grad():
        exact, theirs = truth(tokens).logits, copy.deepcopy(truth).float()(tokens).logits
    error, allowed = ((t.double() - exact).square().mean() for t in (logits, theirs))
    assert error <= allowed, f"{error.sqrt():.3g} from the exact logits, float32 on the dequantized weights {allowed.sqrt():.3g}"
    return exact


class Defined(nn.Module):
    """A linear layer as ref defines it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return ref.linear(x, self.layer.weight, self.layer.bias, x_format=self.layer.x_format, x_scale=self.layer.x_scale)
