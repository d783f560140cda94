"""Which layers are quantized how, as vLLM asks; configurations that cannot be; and the registration."""

import importlib
import os
import subprocess
import sys
import tomllib
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import fast.vllm
import ref
from fast.layers import environment
from ref.layouts import humming

from . import test_standins as standins
from .test_linear import INT4, online  # noqa: F401
from .test_standins import ColumnParallelLinear, Config, RoutedExperts, UnquantizedLinearMethod

HUMMING = humming.config_of(ref.quantize(torch.zeros(64, 64), "int4_g32_bf16"))
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def format_of(config, name):
    """Of a linear layer with this name, or None."""
    config.packed_modules_mapping = FUSED
    method = ColumnParallelLinear(config, name, [64], 64).quant_method
    return None if type(method) is UnquantizedLinearMethod else str(method.choice.format)


RULES = [
    ({}, "a.qkv_proj", "int4_g32_bf16"),
    ({}, "lm_head", None),
    ({"ignore": ["qkv"]}, "a.qkv_proj", None),
    ({"ignore": ["re:.*qkv_proj"]}, "a.qkv_proj", None),
    ({"ignore": ["q_proj", "k_proj", "v_proj"]}, "a.qkv_proj", None),
    ({"ignore": ["up_proj"]}, "a.gate_up_proj", None),
    ({"ignored_layers": ["a.o_proj"]}, "b.o_proj", "int4_g32_bf16"),
    ({"dynamic": {"-:.*gate_up": {}}}, "a.gate_up_proj", None),
    ({"dynamic": {"+:.*qkv_proj": {"dtype": "int6"}}}, "a.qkv_proj", "int6_g32_bf16"),
    ({"dynamic": {"+:.*[.][qkv]_proj": {"dtype": "int6"}}}, "a.qkv_proj", "int6_g32_bf16"),
    ({"dynamic": {"+:.*[.][qkv]_proj": {"dtype": "int6"}}}, "qkv_proj", "int4_g32_bf16"),
]


@pytest.mark.parametrize("rules, name, expected", RULES, ids=str)
def test_layers_that_are_left_alone_and_those_that_are_not_as_the_rest(online, rules, name, expected):  # noqa: F811
    online(INT4 | rules)
    assert format_of(Config(), name) == expected


@pytest.mark.parametrize(
    "rules, message", [({"dynamic": {"-:.*k_proj": {}}}, "k_proj: left alone"), ({"ignore": ["q_proj"]}, "q_proj: left")]
)
def test_parts_of_one_layer_that_differ(online, rules, message):  # noqa: F811
    online(INT4 | rules)
    with pytest.raises(ValueError, match=f"^quantref: a.qkv_proj is one layer in vLLM, .*{message}"):
        format_of(Config(), "a.qkv_proj")


def test_checkpoints_lists_are_renamed_as_its_layers_are(online):  # noqa: F811
    online(None)
    config = Config.from_config(HUMMING | {"modules_to_not_convert": ["model.vision.up"]})
    assert format_of(config, "visual.up") == "int4_g32_bf16"
    config.apply_vllm_mapper(SimpleNamespace(apply_list=lambda names: [name.replace("model.vision", "visual") for name in names]))
    assert format_of(config, "visual.up") is None and "model.vision.up" not in config.checkpoint["modules_to_not_convert"]
    online(INT4 | {"ignore": ["model.vision"]}, {"dtype": "int8", "ignore": ["model.audio"]})
    config = Config()
    config.apply_vllm_mapper(SimpleNamespace(apply_list=lambda names: [name.removeprefix("model.") for name in names]))
    assert format_of(config, "vision.up") is None and config.online.x["ignore"] == ["audio"]
    said = environment.quant_config()
    assert said.weight["ignore"] == ["model.vision"] and said.x["ignore"] == ["model.audio"]


def test_other_layers(online):  # noqa: F811
    online(INT4 | {"ignore": ["experts"]})
    assert Config().get_quant_method(nn.Embedding(4, 4), "embed_tokens") is None
    experts = RoutedExperts.__new__(RoutedExperts)
    known = {"moe_config": "moe", "params_dtype": torch.bfloat16} | {f"ckpt_{p}_proj_name": p for p in ("gate", "up", "down")}
    experts.__dict__.update(known)
    method = Config().get_quant_method(experts, "layers.0.experts")
    assert type(method) is standins.UnquantizedFusedMoEMethod and method.moe == "moe"


def test_what_vllm_asks(online):  # noqa: F811
    assert Config.get_name() == "quantref" and Config.get_min_capability() == 75 and Config.get_config_filenames() == []
    assert Config.get_supported_act_dtypes() == [torch.bfloat16, torch.float16]
    ask = Config.override_quantization_method
    assert ask(HUMMING, "quantref") == ask(HUMMING, "quantref", hf_config=None) == "quantref"
    assert ask(HUMMING, None) is ask(HUMMING, "humming") is ask({"quant_method": "gptq"}, "quantref") is ask(None, "quantref") is None


def test_configurations_that_cannot_be(online):  # noqa: F811
    with pytest.raises(ValueError, match=r"^quantref: neither FAST_ONLINE_QUANT_CONFIG nor the checkpoint"):
        Config()
    with pytest.raises(NotImplementedError, match=r"quant_method is 'gptq', expected 'humming'; vLLM's own methods"):
        Config.from_config({"quant_method": "gptq", "bits": 4})
    with pytest.raises(
        ValueError, match=r"unknown key 'weight_dtpe'; the nearest known one is 'weight_dtype'|'weight_dtpe'.*'weight_dtype'"
    ):
        Config.from_config(HUMMING | {"weight_dtpe": "int4"})
    with pytest.raises(NotImplementedError, match=r"^quantref: a.up would need the scale of its input, .*dynamic quant_mode"):
        format_of(Config.from_config(HUMMING | {"a_dtype": "int8", "input_quant_mode": "static_tensor"}), "a.up")
    online({"dtyp": "int4"})
    with pytest.raises(ValueError, match=r"^FAST_ONLINE_QUANT_CONFIG: .*'dtyp'.*'dtype'"):
        Config()


MODULES = {
    "quantization": ("register_quantization_config",),
    "quantization.base_config": ("QuantizationConfig",),
    "linear": ("LinearBase", "LinearMethodBase", "UnquantizedLinearMethod"),
    "fused_moe": ("RoutedExperts", "FusedMoEMethodBase"),
    "fused_moe.unquantized_fused_moe_method": ("UnquantizedFusedMoEMethod",),
}


@pytest.fixture
def vllm(monkeypatch):
    """Modules with vLLM's names in the place of vLLM's: (what was registered, vllm.envs, a function that takes a module away)."""
    known = {}
    for module, names in MODULES.items():
        made = ModuleType(f"{fast.vllm.LAYERS}.{module}")
        for name in names:
            setattr(made, name, getattr(standins, name, None) or (lambda name: lambda kind: known.setdefault(name, []).append(kind)))
        monkeypatch.setitem(sys.modules, made.__name__, made)
    envs = ModuleType("vllm.envs")
    envs.environment_variables = {}
    monkeypatch.setitem(sys.modules, "vllm.envs", envs)
    for parent in ("vllm", "vllm.model_executor", fast.vllm.LAYERS):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    fast.vllm.layers.cache_clear()
    yield known, envs.environment_variables, lambda name: monkeypatch.setitem(sys.modules, name, None)
    fast.vllm.layers.cache_clear()


def test_register(online, vllm):  # noqa: F811
    known, variables, _ = vllm
    fast.vllm.register()
    fast.vllm.register()
    first, second = known["quantref"]
    assert issubclass(first, standins.QuantizationConfig) and first.get_name() == second.get_name()
    online(INT4)
    said = variables["FAST_QUANT_CONFIG"]()
    method = ColumnParallelLinear(first(), "layers.0.up", [64], 64).quant_method
    assert isinstance(method, standins.LinearMethodBase) and str(method.choice.format) == "int4_g32_bf16"
    online({"dtype": "int8"})
    assert variables["FAST_QUANT_CONFIG"]() != said


def test_a_vllm_that_is_not_as_expected(vllm):
    _, _, hide = vllm
    hide(f"{fast.vllm.LAYERS}.fused_moe")
    fast.vllm.register()
    with pytest.raises(
        ImportError, match=r"needs the package vllm, and vllm.model_executor.layers.fused_moe.RoutedExperts in it"
    ) as raised:
        fast.vllm.layers()
    assert raised.value.name == "vllm"


def test_without_vllm():
    """Importing needs none; registering says what it needs."""
    code = """
import sys
sys.modules["vllm"] = None
import fast.vllm
try:
    fast.vllm.register()
except ImportError as error:
    print(error.name, error)
print([name for name in sys.modules if name.startswith(("transformers", "triton", "humming"))])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.stderr == "" and done.stdout.startswith("vllm fast.vllm: needs the package vllm, and") and done.stdout.endswith("[]\n")


def test_the_entry_point():
    with open(standins.__file__.rpartition("fast")[0] + "pyproject.toml", "rb") as file:
        target = tomllib.load(file)["project"]["entry-points"]["vllm.general_plugins"]["quantref"]
    module, _, name = target.partition(":")
    assert getattr(importlib.import_module(module), name) is fast.vllm.register
