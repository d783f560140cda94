"""fast.load: checkpoints of every layout as ref reads them, in transformers' models; and what it refuses.

The checkpoints are written by ref.layouts, whose write gives the bytes of the ecosystems' own packers (conformance/golden).
"""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import fast
import ref
from ref import layouts
from ref.qtensor import equal

from .conftest import EXPERTS, SHAPE, VOCAB, Watched, check_experts, checkpoint, dequantized, nearer, plain_model

transformers = pytest.importorskip("transformers")
STATIC = {"input_scale": torch.tensor(0.02)}
TOKENS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


def activations(**said):
    """compressed-tensors' config with activations."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": TOKENS | said}}}


# model, format, layout, further config, further tensors, options of write, the format of inputs.
CHECKPOINTS = {
    "gptq": ("llama", "uint4z_g32_fp16", layouts.gptq, {}, None, {}, None),
    "gptq v2": ("mixtral", "int4_g32_fp16", layouts.gptq, {}, None, {"checkpoint_format": "gptq_v2"}, None),
    "awq": ("qwen3", "uint4z_g32_fp16", layouts.awq, {}, None, {}, None),
    "awq, experts": ("qwen3_moe", "uint4z_g32_fp16", layouts.awq, {}, None, {}, None),
    "compressed-tensors int4": ("mixtral", "int4_g32_bf16", layouts.compressed_tensors, {}, None, {}, None),
    "compressed-tensors fp8": ("llama", "fp8_bf16", layouts.compressed_tensors, activations(), None, {}, "fp8_e4m3_token"),
    "compressed-tensors nvfp4": ("qwen3", "fp4_e2m1_g16_e4m3_tensor2div", layouts.compressed_tensors, {}, None, {}, None),
    "fp8 blocks": ("deepseek_v3", "fp8_e4m3_b32x32", layouts.fp8, {}, None, {}, "fp8_e4m3_g32"),
    "mxfp4": ("gpt_oss", "mxfp4", layouts.mxfp4, {}, None, {}, None),
    "modelopt nvfp4": ("qwen3_moe", "nvfp4", layouts.modelopt, {"quant_algo": "NVFP4"}, STATIC, {}, "nvfp4"),
    "modelopt fp8": ("mixtral", "fp8_tensor", layouts.modelopt, {}, STATIC, {}, "fp8_e4m3_tensor"),
    "humming": ("deepseek_v3", "int6_g32_bf16", layouts.humming, {}, None, {}, None),
}


def written(folder, kind):
    name, fmt, layout, config, extra, options, _ = CHECKPOINTS[kind]
    return checkpoint(folder, plain_model(name), fmt, layout, config, extra, **options)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_layers_and_logits(tmp_path, kind):
    name, *_, x_name = CHECKPOINTS[kind]
    made = written(tmp_path, kind)
    model = fast.load(tmp_path, dtype=torch.float32)
    x_format = x_name and ref.parse_format(x_name)
    stored = layouts.open(tmp_path)
    assert set(stored.layers) == set(made)

    # Every linear layer is what ref reads, with the inputs that the config says.
    linears = {key: module for key, module in model.named_modules() if type(module) is fast.Linear}
    for key, module in linears.items():
        assert equal(module.weight, stored[key]) and module.x_format == x_format, key
        assert (module.x_scale is not None) == (kind.startswith("modelopt"))
        assert torch.equal(ref.dequantize(module.weight), ref.dequantize(made[key])), key
    # And experts are theirs, gate above up.
    names = {"mixtral": ("w1", "w3", "w2")}.get(name, ("gate_proj", "up_proj", "down_proj"))
    for key, module in model.named_modules():
        if not isinstance(module, fast.FusedExperts):
            continue
        below = key.replace("mlp", "block_sparse_moe") if name == "mixtral" else key
        if name == "gpt_oss":
            w13, w2 = stored[f"{key}.gate_up_proj"], stored[f"{key}.down_proj"]
        else:
            gate, up, down = ([stored[f"{below}.{e}.{projection}"] for e in range(EXPERTS)] for projection in names)
            w13, w2 = ref.stack([ref.fuse(pair) for pair in zip(gate, up, strict=True)]), ref.stack(down)
        assert equal(module.w13.weight, w13) and equal(module.w2.weight, w2), key

    tokens = torch.arange(0, VOCAB, 3)[None]
    watched = Watched(model, (fast.Linear, fast.FusedExperts))
    logits = model(tokens).logits
    if x_format is None:
        truth = dequantized(model, name)
        for key, layer, args, y in watched.calls:
            if key in linears:
                assert torch.equal(y, ref.linear(args[0], layer.weight, layer.bias)), key
            else:
                check_experts(layer, truth.get_submodule(key), *args, y)
        exact = nearer(logits, truth, tokens)
        error, best = (logits - exact).abs().amax(-1), exact.topk(2).values
        decided = best[..., 0] - best[..., 1] > 2 * error
        assert decided.any() and torch.equal(logits.argmax(-1)[decided], exact.argmax(-1)[decided])
    else:
        for key, layer, args, y in watched.calls:
            if key in linears:
                scale = STATIC["input_scale"] if kind.startswith("modelopt") else None
                assert torch.equal(y, fast.linear(args[0], stored[key], layer.bias, x_format=x_name, x_scale=scale)), key
    assert model.generate(tokens, max_new_tokens=2, do_sample=False).shape == (1, tokens.shape[1] + 2)


def test_experts_take_scales_of_their_own_where_static_ones_are_stored(tmp_path):
    written(tmp_path, "modelopt fp8")
    experts = fast.load(tmp_path).model.layers[0].mlp.experts
    assert str(experts.x_format) == str(ref.parse_format("fp8_e4m3_token"))


def test_no_16_bit_copy_is_made(tmp_path):
    """What transformers holds while it loads has no memory for the weights that are quantized."""
    written(tmp_path, "compressed-tensors int4")
    from fast.hf.fill import Filling

    seen, real = [], Filling.finish

    def finish(self, device):
        seen.append({key for key, tensor in self.model.state_dict().items() if "_proj" in key})
        seen.append([tensor.is_meta for tensor in self.model.parameters()])
        return real(self, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Filling, "finish", finish)
        fast.load(tmp_path)
    assert seen[0] == set() and not any(seen[1])


def test_dtypes_and_the_environment(tmp_path, monkeypatch):
    from fast.layers import environment

    written(tmp_path, "gptq")
    assert fast.load(tmp_path).dtype == torch.float32 and fast.load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert fast.load(tmp_path, device="cpu").device.type == "cpu"
    monkeypatch.setenv("FAST_ONLINE_QUANT_CONFIG", '{"dtype": "int8", "group_size": 0, "scale_dtype": "float32", "force_requant": true}')
    monkeypatch.setenv("FAST_INPUT_QUANT_CONFIG", '{"dtype": "int8"}')
    environment.quant_config.cache_clear()
    try:
        layer = fast.load(tmp_path).model.layers[0].mlp.up_proj
    finally:
        environment.quant_config.cache_clear()
    read = fast.dequantize(layouts.open(tmp_path)["model.layers.0.mlp.up_proj"], torch.float32)
    assert equal(layer.weight, fast.quantize(read, "int8")) and str(layer.x_format) == "int8"


def test_what_may_be_left_over(tmp_path):
    """Scales of a cache, and biases of zeros that old packers wrote."""
    written(tmp_path, "gptq")
    change(
        tmp_path, lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64), "model.layers.1.self_attn.k_scale": torch.ones(1)}
    )
    assert fast.load(tmp_path).model.layers[0].self_attn.q_proj.bias is None


def change(folder, edit):
    save_file(edit(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def without(*parts):
    return lambda tensors: {name: t for name, t in tensors.items() if not any(part in name for part in parts)}


def shorter(name, rows):
    return lambda tensors: tensors | {name: tensors[name][:rows].clone()}


Q = "model.layers.0.self_attn.q_proj"
WRONG = [
    ("gptq", without(Q), ValueError, f"load: {Q}.weight: the checkpoint lacks what LlamaForCausalLM needs"),
    ("gptq", without("norm"), ValueError, r"model\.layers\.0\.input_layernorm\.weight, .* and 1 more: the checkpoint lacks"),
    ("gptq", lambda t: t | {"model.layers.7.x": torch.ones(1)}, ValueError, r"load: model\.layers\.7\.x: in the checkpoint, and LlamaForCausalLM has no"),
    ("gptq", lambda t: t | {f"{Q}.bias": torch.ones(64)}, ValueError, f"load: {Q}.bias: in the checkpoint, and Llama"),
    ("gptq", lambda t: t | {n.replace(".1.", ".2."): v.clone() for n, v in t.items() if "layers.1.mlp" in n}, ValueError,
     r"model\.layers\.2\.mlp\.down_proj, .* and .*quantized in the checkpoint, and LlamaForCausalLM has no such layer|layers\.2\.mlp\.gate_proj"),
    ("gptq", shorter("model.norm.weight", 8), ValueError, r"load: model\.norm\.weight: .* has shape \(8,\), the model's config says \(64,\)"),
    ("humming", lambda t: {n: v[:32].clone() if n.startswith("model.layers.1.self_attn.o_proj") else v for n, v in t.items()}, ValueError,
     r"load: model\.layers\.1\.self_attn\.o_proj\.weight: .*o_proj in int6_g32_bf16 has shape \(32, 64\), the model's config says \(64, 64\)"),
    ("awq, experts", without("layers.1.mlp.experts.2.up_proj"), ValueError,
     r"^load: model\.layers\.1\.mlp\.experts\.gate_up_proj: .*4 experts, .*lacks 1 of .*up_proj\.weight: .*experts\.2\.up_proj"),
    ("awq, experts", without("layers.0.mlp.experts.0.up_proj", "layers.0.mlp.experts.1.up_proj"), ValueError, r"lacks 2 of .*experts\.0\.up_proj"),
    ("awq, experts", lambda t: t | {n.replace("experts.3", "experts.4"): v.clone() for n, v in t.items() if "experts.3" in n}, ValueError,
     r"the model has 4 experts, and the checkpoint 5: .*experts\.4"),
    ("mxfp4", without("experts.down_proj_blocks", "experts.down_proj_scales"), NotImplementedError, r"down_proj is not quantized.*expected both"),
    ("modelopt fp8", without("q_proj.input_scale"), ValueError, r"load: .*q_proj: there is no input_scale"),
]  # fmt: skip


@pytest.mark.parametrize("kind, edit, error, message", WRONG, ids=[f"{kind} {i}" for i, (kind, *_) in enumerate(WRONG)])
def test_checkpoints_that_do_not_fit_the_model(tmp_path, kind, edit, error, message):
    written(tmp_path, kind)
    change(tmp_path, edit)
    with pytest.raises(error, match=message):
        fast.load(tmp_path)


def test_a_layer_of_a_plain_and_of_quantized_parts(tmp_path):
    written(tmp_path, "awq, experts")
    name = "model.layers.0.mlp.experts.1.up_proj"

    def edit(tensors):
        return {n: t for n, t in tensors.items() if not n.startswith(name)} | {f"{name}.weight": torch.ones(32, 64)}

    change(tmp_path, edit)
    with pytest.raises(ValueError, match="lacks 1 of"):
        fast.load(tmp_path)


def test_a_shard_that_is_missing(tmp_path):
    model = plain_model("llama")
    checkpoint(tmp_path, model, "int4_g32_fp16", layouts.gptq)
    tensors = load_file(tmp_path / "model.safetensors")
    first = dict(list(tensors.items())[::2])
    index = {name: f"model-0000{2 - (name in first)}-of-00002.safetensors" for name in tensors}
    (tmp_path / "model.safetensors").unlink()
    save_file(first, tmp_path / "model-00001-of-00002.safetensors", {"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    with pytest.raises(ValueError, match=r"is said to be in 'model-00002-of-00002\.safetensors', which is no"):
        fast.load(tmp_path)


def test_folders_that_cannot_be_loaded(tmp_path):
    with pytest.raises(NotADirectoryError, match=f"load: {re.escape(str(tmp_path / 'none'))}: there is no such directory"):
        fast.load(tmp_path / "none")
    with pytest.raises(RuntimeError, match="cpux"):
        fast.load(tmp_path, device="cpux")
    plain_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="nothing is quantized"):
        fast.load(tmp_path)
    written(tmp_path, "gptq")
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(document | {"architectures": ["MyOwnModel"]}))
    with pytest.raises(NotImplementedError, match="names the class MyOwnModel"):
        fast.load(tmp_path)


def test_without_transformers():
    code = """
import sys
sys.modules["transformers"] = None
import fast, fast.hf
for call in (lambda: fast.load("."), lambda: fast.hf.FastConfig({}), lambda: fast.hf.FastQuantizer):
    try:
        call()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stderr, done.stdout.splitlines()) == ("", ["fast.hf needs transformers 5 or later: pip install transformers"] * 3)


def test_layers_that_the_model_has_as_one_have_the_largest_scale(tmp_path, monkeypatch):
    from transformers import conversion_mapping
    from transformers.core_model_loading import Concatenate, WeightConverter

    parts = [r"\.gate_proj.weight", r"\.up_proj.weight"]
    joined = WeightConverter(source_patterns=parts, target_patterns=r"\.gate_up_proj.weight", operations=[Concatenate(dim=0)])
    config = transformers.Phi3Config(**SHAPE | {"num_hidden_layers": 1, "num_key_value_heads": 2, "pad_token_id": 0})
    checkpoint(tmp_path, transformers.Phi3ForCausalLM(config), "fp8_tensor", layouts.modelopt, write=STATIC)
    whole, name = layouts.open(tmp_path)["model.layers.0.mlp.gate_up_proj"], "model.layers.0.mlp.gate_up_proj"

    def apart(tensors):
        halves = [ref.take_rows(whole, rows) for rows in torch.arange(192).chunk(2)]
        for part, q, scale in zip(("gate", "up"), halves, (0.02, 0.03), strict=True):
            written = layouts.modelopt.write(q) | {"input_scale": torch.tensor(scale)}
            tensors |= {f"model.layers.0.mlp.{part}_proj.{key}": tensor.clone() for key, tensor in written.items()}
        return {key: tensor for key, tensor in tensors.items() if not key.startswith(name)}

    change(tmp_path, apart)
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [joined])
    layer = fast.load(tmp_path).get_submodule(name)
    assert torch.equal(layer.x_scale, torch.tensor([0.03])) and torch.equal(ref.dequantize(layer.weight), ref.dequantize(whole))
