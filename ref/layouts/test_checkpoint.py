"""Opening: which files, which config, which layers, in which order; and every refusal, with file, tensor and rule."""

import json
import os
import types

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .. import layouts
from ..qtensor import equal
from ..quantize import quantize
from . import checkpoint as opener
from . import rules


def _find(names, config):
    return rules.layers(names, ("codes",), ("scales",))


def _options(config, layer):
    return None if rules.by_substring(layer, config.get("ignore", [])) else {}


def _read(parts, options):
    if set(parts) != {"codes", "scales"}:
        raise ValueError(f"eights: scales is missing (there is {', '.join(parts)})")
    if parts["codes"].dtype != torch.int8 or parts["codes"].dim() != 2 or not parts["scales"].isfinite().all():
        raise ValueError("eights: codes are no matrix of int8, or scales are not finite")
    q = quantize(parts["codes"].float(), "int8")
    return type(q)(q.format, q.shape, q.packed, parts["scales"].reshape(-1, 1))


# A layout as small as one can be: int8 codes and a scale for each row.
EIGHTS = types.SimpleNamespace(__name__="tests.eights", find=_find, options=_options, read=_read)


@pytest.fixture
def eights(monkeypatch):
    monkeypatch.setitem(layouts.LAYOUTS, "eights", EIGHTS)


def layer(name, seed=0, n=3, k=8):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 127, (n, k), dtype=torch.int8, generator=generator)
    codes[:, 0] = 127
    return {f"{name}.codes": codes, f"{name}.scales": torch.arange(1.0, n + 1) / 8}


def write(folder, tensors, file="model.safetensors"):
    save_file(tensors, folder / file)


def configure(folder, **config):
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "eights", **config}}))


def sharded(folder, shards, weight_map=None):
    """shards: {file: tensors}; with an index, correct if weight_map is None."""
    for file, tensors in shards.items():
        write(folder, tensors, file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors} if weight_map is None else weight_map
    (folder / opener.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def two_shards():
    a, b = layer("h.9.up", 1), layer("h.10.up", 2)
    return {
        "model-00001-of-00002.safetensors": {**b, "h.9.up.codes": a["h.9.up.codes"], "norm": torch.ones(3)},
        "model-00002-of-00002.safetensors": {"h.9.up.scales": a["h.9.up.scales"], "h.10.up.bias": torch.zeros(3)},
    }


@pytest.mark.usefixtures("eights")
class TestOpens:
    def check(self, path):
        found = layouts.open(path)
        assert found.layers == ("h.9.up", "h.10.up") and len(found) == 2
        assert found.plain == ("h.10.up.bias", "norm") and found.layout == "eights" and found.config["quant_method"] == "eights"
        listed = list(found)
        assert [name for name, _ in listed] == ["h.9.up", "h.10.up"]
        for name, q in listed:
            assert equal(q, found[name]) and q.shape == (3, 8)
        assert torch.equal(found.tensor("norm"), torch.ones(3))
        assert torch.equal(found.tensor("h.9.up.codes"), layer("h.9.up", 1)["h.9.up.codes"])
        assert found.nbytes("h.9.up") == 3 * 8 + 3 * 4 and found.nbytes("norm") == 12
        assert repr(found) == "Checkpoint(eights, 2 quantized layers, 2 plain tensors)"

    def test_shards_with_an_index(self, tmp_path):
        sharded(tmp_path, two_shards())
        configure(tmp_path)
        self.check(tmp_path)
        self.check(str(tmp_path))

    def test_files_without_an_index(self, tmp_path):
        sharded(tmp_path, two_shards())
        configure(tmp_path)
        (tmp_path / opener.INDEX).unlink()
        self.check(tmp_path)

    def test_one_file(self, tmp_path):
        write(tmp_path, {name: t for shard in two_shards().values() for name, t in shard.items()})
        write(tmp_path, layer("other"), "consolidated.safetensors")
        configure(tmp_path)
        self.check(tmp_path)
        self.check(tmp_path / "model.safetensors")

    def test_links_as_the_hub_makes_them(self, tmp_path):
        blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
        blobs.mkdir()
        snapshot.mkdir()
        sharded(blobs, two_shards())
        configure(blobs)
        for i, file in enumerate(sorted(os.listdir(blobs))):
            (blobs / file).rename(blobs / str(i))
            (snapshot / file).symlink_to(blobs / str(i))
        self.check(snapshot)

    def test_in_the_working_directory(self, tmp_path, monkeypatch):
        write(tmp_path, layer("a"))
        configure(tmp_path)
        monkeypatch.chdir(tmp_path)
        assert layouts.open("model.safetensors").layers == layouts.open(".").layers == ("a",)

    def test_layers_are_read_when_asked_for(self, tmp_path, monkeypatch):
        write(tmp_path, {**layer("a"), **layer("b"), **layer("c")})
        configure(tmp_path)
        read = []
        monkeypatch.setattr(EIGHTS, "read", lambda parts, options: read.append(len(parts)))
        found = iter(layouts.open(tmp_path))
        assert read == []
        next(found)
        assert read == [2]

    def test_handles_are_let_go_and_what_is_read_holds_no_map(self, tmp_path, monkeypatch):
        sharded(tmp_path, two_shards())
        configure(tmp_path)
        monkeypatch.setattr(opener, "MAPPED_BYTES", 0)
        opened = []

        def counted(*args):
            opened.append(args)
            return safe_open(*args)

        found = layouts.open(tmp_path)
        monkeypatch.setattr(opener, "safe_open", counted)
        held = [found.tensor("norm"), *list(found)]
        assert len(opened) == 5  # one for each tensor
        del found
        if os.path.exists("/proc/self/maps"):
            with open("/proc/self/maps") as maps:
                assert str(tmp_path) not in maps.read(), held


CONFIG = {"quant_method": "eights", "bits": 8}


@pytest.mark.usefixtures("eights")
@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": CONFIG},
        {"quantization_config": CONFIG, "text_config": {"quantization_config": {"quant_method": "other"}}},
        {"quantization_config": None, "compression_config": CONFIG},
        {"text_config": {"quantization_config": CONFIG}, "vision_config": {}},
        {"llm_config": {"quantization_config": CONFIG}, "torch_dtype": "bfloat16"},
        {"text_config": {"quantization_config": CONFIG}, "audio_config": {"quantization_config": CONFIG}},
        {"text_config": {"compression_config": CONFIG}},
        {"thinker_config": {"text_config": {"quantization_config": CONFIG}}},
    ],
)
def test_where_the_config_is(tmp_path, config):
    write(tmp_path, layer("a"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert layouts.open(tmp_path).config["bits"] == 8


@pytest.mark.parametrize(
    ("file", "config", "method"),
    [
        ("quantize_config.json", {"bits": 4}, "gptq"),
        ("quantize_config.json", {"quant_method": "eights"}, "eights"),
        ("quant_config.json", {"w_bit": 4}, "awq"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "modelopt"),
        ("config.json", {"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ("config.json", {"quantization_config": {"quant_algo": "NVFP4"}}, "modelopt"),
    ],
)
@pytest.mark.parametrize("beside", [True, False])
def test_configs_that_do_not_say_whose_they_are(tmp_path, monkeypatch, file, config, method, beside):
    monkeypatch.setitem(layouts.LAYOUTS, method, EIGHTS)
    write(tmp_path, layer("a"))
    if beside:
        (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(json.dumps(config))
    assert layouts.open(tmp_path).config == config.get("quantization_config", config)


def bad(folder, kind):
    """A directory with one thing wrong: returns the path to open."""
    shards = two_shards()
    first, second = shards
    names = {name: file for file, tensors in shards.items() for name in tensors}
    path = folder / "model.safetensors"
    configure(folder)
    match kind:
        case "no such path":
            return folder / "nowhere"
        case "no such file":
            return folder / "nowhere.safetensors"
        case "pickled file":
            (folder / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")
            return folder / "pytorch_model.bin"
        case "pickled directory":
            (folder / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")
        case "empty directory":
            (folder / "config.json").unlink()
        case "other file":
            return folder / "config.json"
        case "index names an absent file":
            sharded(folder, shards, {**names, "norm": "model-00003-of-00003.safetensors"})
        case "index names a file outside":
            write(folder.parent, layer("x"), "outside.safetensors")
            sharded(folder, shards, {**names, "norm": "../outside.safetensors"})
        case "index names itself":
            sharded(folder, shards, {**names, "norm": opener.INDEX})
        case "index names another tensor":
            sharded(folder, shards, {**names, "more": first})
        case "index puts a tensor into the other shard":
            sharded(folder, shards, {**names, "norm": second})
        case "index leaves a tensor out":
            sharded(folder, shards, {name: file for name, file in names.items() if name != "norm"})
        case "index beside model.safetensors":
            sharded(folder, shards)
            write(folder, layer("x"))
        case "index without weight_map":
            sharded(folder, shards)
            (folder / opener.INDEX).write_text('{"metadata": {}}')
        case "index of numbers":
            sharded(folder, shards, {name: 3 for name in names})
        case "index that is a list":
            sharded(folder, shards)
            (folder / opener.INDEX).write_text("[]")
        case "index that is no JSON":
            sharded(folder, shards)
            (folder / opener.INDEX).write_text("{")
        case "tensor in two shards":
            shards[second]["norm"] = torch.zeros(3)
            sharded(folder, shards, names)
        case "missing shard without an index":
            sharded(folder, shards)
            (folder / opener.INDEX).unlink()
            (folder / second).unlink()
        case "truncated file":
            write(folder, layer("a"))
            path.write_bytes(path.read_bytes()[:-1])
        case "truncated header":
            write(folder, layer("a"))
            path.write_bytes(path.read_bytes()[:30])
        case "empty file":
            path.write_bytes(b"")
        case "header length that lies":
            write(folder, layer("a"))
            path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])
        case "header length one off":
            write(folder, layer("a"))
            data = path.read_bytes()
            path.write_bytes((int.from_bytes(data[:8], "little") - 1).to_bytes(8, "little") + data[8:])
        case "trailing bytes":
            write(folder, layer("a"))
            path.write_bytes(path.read_bytes() + b"more")
        case "dtype that torch lacks":
            header = b'{"a.codes":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
            path.write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
            return path
        case "a directory for a file":
            path.mkdir()
        case "missing tensor":
            write(folder, {name: t for name, t in layer("a").items() if name != "a.scales"})
        case "nan":
            write(folder, {**layer("a"), "a.scales": torch.full((3,), torch.nan)})
        case "ignored but stored quantized":
            write(folder, {**layer("a"), **layer("lm_head")})
            configure(folder, ignore=["lm_head"])
        case "nothing quantized":
            write(folder, {"norm": torch.ones(3)})
        case "no config":
            write(folder, layer("a"))
            (folder / "config.json").unlink()
        case _:
            write(folder, layer("a"))
            (folder / "config.json").write_text(kind)
    return folder


BAD = {
    "no such path": (FileNotFoundError, "nowhere: there is no such file or directory"),
    "no such file": (FileNotFoundError, "nowhere.safetensors: there is no such file"),
    "pickled file": (ValueError, "pytorch_model.bin: is a pickled file, and nothing is unpickled"),
    "pickled directory": (ValueError, "holds no .safetensors file (pytorch_model.bin is none"),
    "empty directory": (ValueError, "holds no .safetensors file"),
    "other file": (ValueError, "config.json: expected a directory of safetensors files, a .safetensors file or a .gguf file"),
    "index names an absent file": (ValueError, "index.json: norm: is said to be in 'model-00003-of-00003.safetensors', which is no"),
    "index names a file outside": (ValueError, "index.json: norm: is said to be in '../outside.safetensors', which is no"),
    "index names itself": (ValueError, "index.json: norm: is said to be in 'model.safetensors.index.json', which is no"),
    "index names another tensor": (ValueError, "index.json: more: is said to be in model-00001-of-00002.safetensors, but is not there"),
    "index puts a tensor into the other shard": (ValueError, "norm: is said to be in model-00002-of-00002.safetensors, but is in"),
    "index leaves a tensor out": (ValueError, "the index does not name it"),
    "index beside model.safetensors": (ValueError, "a model.safetensors that the index does not name"),
    "index without weight_map": (ValueError, "index.json: weight_map is missing"),
    "index of numbers": (ValueError, "index.json: weight_map is missing, or no dict of tensor names to file names"),
    "index that is a list": (ValueError, "index.json: holds a list, expected a dict"),
    "index that is no JSON": (ValueError, "index.json: is no JSON"),
    "tensor in two shards": (ValueError, "model-00002-of-00002.safetensors: norm: is in "),
    "missing shard without an index": (
        FileNotFoundError,
        "model-00002-of-00002.safetensors: there is no such file, but there is model-00001-of-",
    ),
    "truncated file": (ValueError, "model.safetensors: safetensors: "),
    "truncated header": (ValueError, "model.safetensors: safetensors: "),
    "empty file": (ValueError, "model.safetensors: safetensors: "),
    "header length that lies": (ValueError, "model.safetensors: safetensors: "),
    "header length one off": (ValueError, "model.safetensors: safetensors: "),
    "trailing bytes": (ValueError, "model.safetensors: safetensors: "),
    "dtype that torch lacks": (ValueError, "model.safetensors: a: safetensors: a.codes: "),
    "a directory for a file": (FileNotFoundError, "model.safetensors: there is no such file"),
    "missing tensor": (ValueError, "model.safetensors: a: eights: scales is missing"),
    "nan": (ValueError, "model.safetensors: a: eights: codes are no matrix of int8, or scales are not finite"),
    "ignored but stored quantized": (
        ValueError,
        "model.safetensors: lm_head: eights: the config leaves the layer unquantized, but lm_head.codes",
    ),
    "nothing quantized": (ValueError, "config.json: eights: no layer has its tensors"),
    "no config": (FileNotFoundError, "config.json: there is no such file, nor one of"),
    "": (ValueError, "config.json: is no JSON"),
    "\x00": (ValueError, "config.json: is no JSON"),
    "[" * 100000: (ValueError, "config.json: is no JSON"),
    '{"a": ' + "[" * 100 + "]" * 100 + "}": (ValueError, "config.json: is nested more than 100 deep"),
    "3": (ValueError, "config.json: holds a int, expected a dict"),
    "{}": (ValueError, "config.json: has no quantization_config (nor is there one of"),
    '{"quantization_config": []}': (ValueError, "config.json: quantization_config is list, expected a dict"),
    '{"text_config": {"quantization_config": 3}}': (ValueError, "config.json: text_config.quantization_config is int, expected a dict"),
    '{"a_config": {"quantization_config": {}}, "b_config": {"quantization_config": {"bits": 4}}}': (
        ValueError,
        "config.json: a_config.quantization_config and b_config.quantization_config differ",
    ),
    '{"quantization_config": {}}': (ValueError, "config.json: quant_method is None, expected one of"),
    '{"quantization_config": {"quant_method": 4}}': (ValueError, "config.json: quant_method is 4, expected one of"),
    '{"quantization_config": {"quant_method": ["gptq"]}}': (ValueError, "config.json: quant_method is ['gptq'], expected one of"),
    '{"quantization_config": {"quant_method": "eihgts"}}': (NotImplementedError, "'eihgts' has no layout"),
    '{"quantization_config": {"quant_method": "eihgts" }}': (NotImplementedError, "the nearest is 'eights'"),
}


@pytest.mark.usefixtures("eights")
@pytest.mark.parametrize("kind", BAD, ids=[kind[:60].replace("\x00", "NUL") or "empty" for kind in BAD])
def test_refusals_name_file_tensor_and_rule(tmp_path, kind):
    expected, message = BAD[kind]
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(expected) as error:
        list(layouts.open(bad(tmp_path / "checkpoint", kind)))
    assert message in str(error.value)
    assert str(error.value).count("eights: ") <= 1


@pytest.mark.usefixtures("eights")
def test_names_that_are_not_there(tmp_path):
    write(tmp_path, layer("a"))
    configure(tmp_path)
    found = layouts.open(tmp_path)
    with pytest.raises(KeyError):
        found["b"]
    with pytest.raises(KeyError):
        found.tensor("b")
