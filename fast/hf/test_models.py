"""Models of six architectures quantized while transformers loads them, saved, loaded back, generating.

How their logits are checked. A quantized linear layer's result is the exact one, rounded once, on the CPU: so the model computes, bit for bit, what
the same model computes whose linear layers are ref.linear. Experts are held to the interval that the conformance suite derives, put around what
transformers' own module gives in float64 on the dequantized weights and the inputs that they have in the model. What is left, norms and
attention, is transformers' own code. Bounds carried from layer to layer would say nothing at the end, so the logits as a whole are compared with
transformers' model in float64 on the dequantized weights in two ways: they are no farther from it than the same model in float32 is; and where
its best token leads by more than twice the largest error at that position, a greedy choice has to be the same.
"""

import copy
import json

import pytest
import torch

import fast
import ref
from ref import layouts
from ref.qtensor import equal

from ..layers import environment
from .conftest import MODELS, VOCAB, Defined, Watched, check_experts, checkpoint, dequantized, nearer, plain_model

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("fast.hf")
INT4 = {"dtype": "int4", "group_size": 32}


def pretrained(path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager", **options)


def online(tmp_path, name, config=INT4, x=None, dtype=torch.float32):
    """(plain model, the same quantized while it is loaded)."""
    plain = plain_model(name, dtype)
    plain.save_pretrained(tmp_path / "plain")
    return plain, pretrained(tmp_path / "plain", quantization_config=hf.FastConfig(config, x))


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


@pytest.mark.parametrize("name", MODELS)
def test_quantized_saved_loaded_and_generating(tmp_path, name):
    plain, model = online(tmp_path, name)
    kinds = {type(module).__name__ for module in model.modules()} & {"Linear", "Experts"}
    assert kinds == {"Linear"} | ({"Experts"} if name not in ("llama", "qwen3") else set())
    assert not any(parameter.requires_grad for parameter in model.parameters())

    model.save_pretrained(tmp_path / "quantized")
    back = pretrained(tmp_path / "quantized")
    same_state(model, back)
    same_state(model, fast.load(tmp_path / "quantized"))
    # The files are as ref reads them, and every layer is what quantize makes of the plain model's.
    stored = dict(layouts.open(tmp_path / "quantized"))
    for layer, q in stored.items():
        assert str(q.format) == "int4_g32", layer
    linears = {key: module for key, module in back.named_modules() if type(module) is fast.Linear}
    for key, module in linears.items():
        assert equal(module.weight, stored[key]) and equal(module.weight, fast.quantize(plain.get_submodule(key).weight, "int4_g32"))

    experts = {key: module for key, module in back.named_modules() if isinstance(module, fast.FusedExperts)}
    for key, module in experts.items():
        for parameter, part in zip(module.names, (module.w13, module.w2), strict=True):
            w = plain.get_parameter(f"{key}.{parameter}")
            assert equal(part.weight, fast.quantize(w.mT if name == "gpt_oss" else w, "int4_g32"))

    prompt = torch.arange(3, VOCAB, 25)[None]
    tokens = back.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    watched, defined, truth = Watched(back, (fast.Linear, fast.FusedExperts)), copy.deepcopy(back), dequantized(back, name)
    logits = back(tokens).logits
    assert len(watched.calls) >= len(linears)
    for key, layer, args, y in watched.calls:
        if key in linears:
            assert torch.equal(y, ref.linear(args[0], layer.weight, layer.bias)), key
        else:
            check_experts(layer, truth.get_submodule(key), *args, y)
    for key, module in linears.items():
        defined.set_submodule(key, Defined(module))
    assert torch.equal(defined(tokens).logits, logits)

    exact = nearer(logits, truth, tokens)
    error, best = (logits - exact).abs().amax(-1), exact.topk(2).values
    decided = (best[..., 0] - best[..., 1] > 2 * error)[:, prompt.shape[1] - 1 : -1]
    assert decided.any()
    chosen, greedy = tokens[:, prompt.shape[1] :], exact.argmax(-1)[:, prompt.shape[1] - 1 : -1]
    assert torch.equal(chosen[decided], greedy[decided])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_quantize_gives_the_same_model(tmp_path, name):
    plain, model = online(tmp_path, name)
    same_state(fast.quantize_(plain, INT4), model)
    # And is saved as well.
    plain.save_pretrained(tmp_path / "saved")
    same_state(pretrained(tmp_path / "saved"), model)


@pytest.mark.parametrize(
    "name, config, x",
    [
        ("llama", {"dtype": "float8e4m3", "group_size": 32, "group_size_n": 32}, {"dtype": "float8e4m3", "group_size": 32}),
        ("llama", {"dtype": "int8", "scale_type": "tensor"}, {"dtype": "int8"}),
        ("mixtral", {"dtype": "float4e2m1", "group_size": 16, "scale_dtype": "float8e4m3", "scale_2_type": "tensor"}, None),
        ("mixtral", {"dtype": "float8e4m3", "group_size": 32, "group_size_n": 64, "ignore": ["self_attn"]}, {"dtype": "float8e4m3"}),
        ("qwen3_moe", {"dtype": "int4", "group_size": 32, "has_zero_point": True}, {"dtype": "float4e2m1", "group_size": 16, "quant_mode": "dynamic_group_token"}),
        ("gpt_oss", {"dtype": "float4e2m1", "group_size": 32, "scale_dtype": "float8e8m0"}, None),
        ("qwen3", INT4 | {"dynamic": {"+:.*layers.0.*down": {"dtype": "int8", "group_size": 0}, "-:.*layers.1.*v_proj": {}}}, None),
    ],
    ids=str,
)  # fmt: skip
def test_formats_of_weights_and_activations_come_back(tmp_path, name, config, x):
    """Blocks that straddle gate and up, scales of tensors, MX, inputs; and layers that differ from the others."""
    _, model = online(tmp_path, name, config, x, torch.bfloat16)
    model.save_pretrained(tmp_path / "quantized")
    back = pretrained(tmp_path / "quantized")
    same_state(model, back)
    formats = [[(str(m.format), m.x_format) for m in of.modules() if type(m) is fast.Linear] for of in (model, back)]
    assert formats[0] == formats[1]
    tokens = torch.arange(0, VOCAB, 16)[None]
    assert torch.equal(model(tokens).logits, back(tokens).logits)
    document = json.loads((tmp_path / "quantized/config.json").read_text())["quantization_config"]
    assert document["quant_method"] == "humming" and "re:lm_head$" in document["ignored_layers"]
    # Few patterns say how all layers differ.
    assert len(document.get("dynamic", {})) <= 2


def test_parents_that_initialize_the_weights_of_their_children(tmp_path):
    config = transformers.T5Config(vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, decoder_start_token_id=0)
    plain = transformers.T5ForConditionalGeneration(config)
    plain.save_pretrained(tmp_path / "plain")
    model = type(plain).from_pretrained(tmp_path / "plain", quantization_config=hf.FastConfig(INT4))
    model.save_pretrained(tmp_path / "quantized")
    for other in (fast.quantize_(plain, INT4), type(plain).from_pretrained(tmp_path / "quantized"), fast.load(tmp_path / "quantized")):
        same_state(other, model)


def test_a_model_saved_in_shards(tmp_path):
    _, model = online(tmp_path, "mixtral")
    model.save_pretrained(tmp_path / "quantized", max_shard_size="40KB")
    assert len(list((tmp_path / "quantized").glob("*.safetensors"))) > 2
    same_state(model, fast.load(tmp_path / "quantized"))


@pytest.mark.parametrize(
    "name, fmt, layout, config, write",
    [
        ("llama", "uint4z_g32_fp16", layouts.gptq, {}, None),
        ("mixtral", "fp8_tensor", layouts.modelopt, {}, {"input_scale": torch.tensor(0.02)}),
        ("qwen3", "nvfp4", layouts.modelopt, {"quant_algo": "NVFP4"}, {"input_scale": torch.tensor(0.02)}),
        ("gpt_oss", "mxfp4", layouts.mxfp4, {}, None),
    ],
)
def test_a_model_of_another_layout_is_saved_as_this_one(tmp_path, name, fmt, layout, config, write):
    checkpoint(tmp_path, plain_model(name), fmt, layout, config, write)
    model = fast.load(tmp_path)
    model.save_pretrained(tmp_path / "saved")
    back = pretrained(tmp_path / "saved")
    same_state(model, back)
    formats = [[(m.x_format, m.x_scale) for m in of.modules() if type(m) is fast.Linear] for of in (model, back)]
    assert formats[0] == formats[1] and all((scale is not None) == bool(write) for _, scale in formats[0])


@pytest.mark.parametrize("given", [{"dtyp": "int4"}, {"dtype": "int9"}, {"quant_method": "fp8"}], ids=str)
def test_wrong_configs_are_refused_at_once(given):
    with pytest.raises(ValueError, match=r"dtyp|int9|^FastConfig: the config is that of a checkpoint .*\(fp8\)"):
        hf.FastConfig(given)


@pytest.mark.parametrize(
    "config, x, error, message",
    [
        ({"dtype": "int4", "ignore": ["layers"]}, None, ValueError, "leaves every layer of this model as it is"),
        (INT4, {"dtype": "int8", "quant_mode": "static_tensor"}, ValueError, "q_proj: would need the scale of its input"),
    ],
)
def test_configs_that_do_not_fit_the_model(tmp_path, config, x, error, message):
    with pytest.raises(error, match=message):
        online(tmp_path, "llama", config, x)


def test_experts_that_there_is_no_function_for(tmp_path):
    plain = plain_model("mixtral")
    plain.config.hidden_act = "tanh"
    plain.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match=r"layers\.0\.mlp\.experts: MixtralExperts has the activation Tanh; there is SiLU"):
        pretrained(tmp_path, quantization_config=hf.FastConfig(INT4))
    left = pretrained(tmp_path, quantization_config=hf.FastConfig(INT4 | {"ignore": ["mlp.experts"]}))
    assert type(left.model.layers[0].mlp.experts).__name__ == "MixtralExperts"


def test_prepared_models_are_not_saved(tmp_path):
    _, model = online(tmp_path, "llama")
    model.model.layers[1].mlp.up_proj.prepare(torch.float32)
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.up_proj: the weight was prepared, and has no state any more"):
        model.save_pretrained(tmp_path / "quantized")


def test_biases_that_a_checkpoint_lacks_are_zeros_as_in_transformers(tmp_path):
    plain = plain_model("qwen3")
    state = {name: tensor for name, tensor in plain.state_dict().items() if name != "model.layers.0.self_attn.q_proj.bias"}
    plain.save_pretrained(tmp_path, state_dict=state)
    model = pretrained(tmp_path, quantization_config=hf.FastConfig(INT4))
    bias = model.model.layers[0].self_attn.q_proj.bias
    assert bias.shape == (64,) and not bias.any()


def test_weights_that_are_no_numbers_are_named(tmp_path):
    plain = plain_model("mixtral")
    plain.model.layers[1].mlp.experts.down_proj.data[2, 3, 4] = torch.nan
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"fast\.hf: model\.layers\.1\.mlp\.experts\.down_proj: .*nan"):
        pretrained(tmp_path, quantization_config=hf.FastConfig(INT4))


def test_layers_that_humming_has_no_schema_for_are_not_saved(tmp_path):
    _, model = online(tmp_path, "llama", {"dtype": "float8e4m3", "group_size": 32, "group_size_n": 64})
    with pytest.raises(ValueError, match=r"fast\.hf: model\.layers\.0\.self_attn\.k_proj: humming: .*whole groups"):
        model.save_pretrained(tmp_path / "quantized")


def test_a_config_as_a_dict_and_from_the_environment(tmp_path, monkeypatch):
    _, model = online(tmp_path, "llama")
    same_state(model, pretrained(tmp_path / "plain", quantization_config={"quant_method": "humming"} | INT4))
    monkeypatch.setenv("FAST_ONLINE_QUANT_CONFIG", json.dumps(INT4))
    environment.quant_config.cache_clear()
    try:
        config = hf.FastConfig()
    finally:
        environment.quant_config.cache_clear()
    assert config.to_dict() == {"quant_method": "humming"} | INT4 and json.loads(config.to_json_string()) == config.to_dict()
    same_state(model, pretrained(tmp_path / "plain", quantization_config=config))


def test_several_devices_are_refused():
    quantizer = hf.FastQuantizer(hf.FastConfig(INT4), pre_quantized=False)
    with pytest.raises(NotImplementedError, match="device_map has 2 devices; expected one"):
        quantizer.validate_environment(device_map={"model.layers.0": "cpu", "lm_head": "cuda:0"})
