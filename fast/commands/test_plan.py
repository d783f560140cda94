"""What quantize decides before it writes: files, configs that readers understand, and sources as they are."""

import json

import pytest
import torch

from fast.commands import layout, plan
from fast.commands.conftest import draw, save
from fast.commands.source import Source
from ref import FORMATS, parse_format
from ref.qtensor import validate


def made(source, fmt="int4_g32", how="humming", size=10**9, ignore=()):
    return plan.make(source, lambda layer, dtype: parse_format(fmt), ignore, how, size)


def test_files_hold_at_most_their_size_but_for_what_is_larger(tmp_path):
    tensors = {f"l{i}.weight": draw(32, 64) for i in range(5)} | {"l2.weight": draw(512, 64)}
    source = Source(save(tmp_path / "in", tensors))
    # 4 bits of 32 x 64, and as many bits of scales, are 1280 bytes.
    files = made(source, size=2600).files()
    assert [[item.tensor[:2] for item in items] for items in files.values()] == [["l0", "l1"], ["l2"], ["l3", "l4"]]
    assert next(iter(files)) == "model-00001-of-00003.safetensors" and list(made(source).files()) == ["model.safetensors"]
    assert {item.out_bytes for item in made(source).items} == {1280, 20480}


def test_layers_are_in_natural_order(tmp_path):
    source = Source(save(tmp_path / "in", {f"layers.{i}.up.weight": draw(32, 64) for i in (10, 9, 1)}))
    assert [item.layer for item in made(source).items] == ["layers.1.up", "layers.9.up", "layers.10.up"]


@pytest.mark.parametrize("name", [name for name in FORMATS if "z" not in name or name == "uint4z_g128"])
def test_a_blank_is_a_qtensor(name):
    for shape in ((32, 256), (2, 32, 256)):
        q = layout.blank(FORMATS[name], shape)
        assert validate(q).shape == shape and q.format == FORMATS[name]


def test_a_name_that_ends_as_an_ignored_one_is_refused(tmp_path):
    """Humming's ignore list means every layer whose name ends so."""
    tensors = {"a.proj.weight": draw(32, 64), "b.a.proj.weight": draw(32, 64)}
    source = Source(save(tmp_path / "in", tensors))
    with pytest.raises(ValueError, match=r"b\.a\.proj: is quantized, but the lists of --layout humming would leave it alone"):
        made(source, ignore=["re:a.proj"])
    assert made(source, how="compressed_tensors", ignore=["re:a.proj"]).config["ignore"] == ["a.proj"]


def test_only_what_readers_must_know_is_listed(tmp_path):
    tensors = {"model.embed_tokens.weight": draw(8, 64), "norm.weight": draw(64), "gate.weight": draw(4, 64), "up.weight": draw(32, 64)}
    source = Source(save(tmp_path / "in", tensors))
    assert made(source).config["ignore"] == ["gate"]
    assert made(source, how="gptq").config["dynamic"] == {"-:^gate$": {}}
    source = Source(save(tmp_path / "more", {f"h.{i}.{name}.weight": draw(32, 64) for i in range(3) for name in ("up", "down", "gate")}))
    dynamic = made(source, how="gptq", ignore=["h.1.up"]).config["dynamic"]
    assert set(dynamic) == {r"-:^h\.[0-9]+\.gate$", r"-:^h\.1\.up$"}
    assert json.loads(json.dumps(made(source).config)) == made(source).config


def test_a_source_knows_its_tensors(tmp_path):
    tensors = {"a.weight": draw(4, 8), "b.weight": draw(4, 8).half(), "c": torch.zeros(3, dtype=torch.int64)}
    source = Source(save(tmp_path / "in", tensors, {"text_config": {"hidden_size": 8, "dtype": "float16"}, "dtype": "float32"}, files=2))
    assert {name: (entry.dtype, entry.shape, entry.nbytes) for name, entry in source.entries.items()} == {
        "a.weight": (torch.bfloat16, (4, 8), 64),
        "b.weight": (torch.float16, (4, 8), 64),
        "c": ("I64", (3,), 24),
    }
    assert all(torch.equal(source.load(name), tensor) for name, tensor in tensors.items())
    assert source.hidden_size() == 8 and len(source.files()) == 3
