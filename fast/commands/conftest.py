"""Small checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fast.__main__ import main

# Llama's names, and one of every kind that is left alone.
LINEAR = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96)}


def draw(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def llama(layers=2, dtype=torch.bfloat16):
    tensors = {"model.embed_tokens.weight": draw(40, 64, dtype=dtype), "lm_head.weight": draw(40, 64, seed=1, dtype=dtype)}
    for i in range(layers):
        names = {f"model.layers.{i}.{name}.weight": shape for name, shape in LINEAR.items()}
        tensors |= {name: draw(*shape, seed=i + len(name), dtype=dtype) for name, shape in names.items()}
        tensors |= {f"model.layers.{i}.mlp.gate.weight": draw(4, 64), f"model.layers.{i}.input_layernorm.weight": draw(64)}
        tensors |= {f"model.layers.{i}.self_attn.q_proj.bias": draw(64), f"model.layers.{i}.self_attn.q_norm.weight": draw(4, 16)}
    return tensors


def save(folder, tensors, config=None, files=1):
    """A checkpoint of so many files, with what else there is beside them."""
    folder.mkdir(parents=True)
    names, weight_map = sorted(tensors), {}
    for i in range(files):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors" if files > 1 else "model.safetensors"
        part = {name: tensors[name].contiguous() for name in names[i::files]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64, "dtype": "bfloat16"} | (config or {})))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def contents(folder):
    """{file: bytes}."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def source(tmp_path):
    """A checkpoint of two files."""
    return save(tmp_path / "in", llama(), files=2)


@pytest.fixture
def call(capsys):
    """Runs a command; returns (exit code, stdout, stderr)."""

    def run(*argv):
        try:
            code = main([str(arg) for arg in argv])
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run
