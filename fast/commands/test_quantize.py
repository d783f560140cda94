"""python -m fast quantize: what is written, bit for bit, interrupted or not, and every refusal."""

import errno
import gc
import json
import os
import re
import resource
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import fast
from fast.commands import output, quantize
from fast.commands.conftest import LINEAR, contents, draw, llama, save
from fast.commands.source import Source
from fast.layers.inputs import input_of
from ref import layouts, parse_format
from ref.qtensor import equal

ROOT = Path(__file__).parent.parent.parent
NAMES = {f"model.layers.{i}.{name}" for i in range(2) for name in LINEAR}


def check(folder, tensors, formats, transposed=False):
    """The checkpoint is that of the tensors, layers quantized by fast.quantize to {layer: format}, all others as they were."""
    checkpoint = layouts.open(folder)
    assert set(checkpoint.layers) == formats.keys()
    for layer, q in checkpoint:
        w = tensors.get(f"{layer}.weight", tensors.get(layer))
        assert equal(q, fast.quantize(w.transpose(-1, -2) if transposed and w.dim() == 3 else w, formats[layer])), layer
    plain = {name: tensors[name] for name in tensors if name not in formats and name.removesuffix(".weight") not in formats}
    assert set(checkpoint.plain) == plain.keys()
    for name, tensor in plain.items():
        assert checkpoint.tensor(name).dtype == tensor.dtype and torch.equal(checkpoint.tensor(name), tensor), name


@pytest.mark.parametrize(
    "fmt, layout",
    [
        *((f, "humming") for f in ("int4_g32", "uint4z_g32", "int3_g32_bf16", "fp8", "mxfp4", "nvfp4", "fp8_e4m3_b32x32", "int4_g32_h32")),
        ("int4_g32", "gptq"),
        ("int8", "compressed-tensors"),
        ("mxfp8", "compressed_tensors"),
        ("uint4z_g32", "awq"),
        ("fp8_e4m3_tensor", "fp8"),
        ("nvfp4", "modelopt"),
        ("uint4z_g32", "quark"),
        ("mxfp4", "mxfp4"),
    ],
)
def test_what_is_written_reads_back_bit_for_bit(source, tmp_path, call, fmt, layout):
    code, out, err = call("quantize", source, tmp_path / "out", "--format", fmt, "--layout", layout)
    assert (code, err) == (0, "")
    check(tmp_path / "out", llama(), dict.fromkeys(NAMES, fmt))
    assert layouts.open(tmp_path / "out").layout == layout.replace("-", "_")
    assert set(contents(tmp_path / "out")) == {"config.json", "model.safetensors", "tokenizer.json"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("quantization_config") and config == json.loads((source / "config.json").read_text())
    assert re.search(rf"8 layers in {fmt}\n", out) and re.search(r"peak memory: [1-9]\d* MiB resident\n$", out) and " GB/s" in out


def test_small_files_have_an_index_and_the_same_layers(source, tmp_path, call):
    assert call("quantize", source, tmp_path / "out", "--format", "int4_g32", "--shard-size", "6KB")[0] == 0
    files = contents(tmp_path / "out")
    index = json.loads(files["model.safetensors.index.json"])
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3 and shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    assert files.keys() == {"config.json", "tokenizer.json", "model.safetensors.index.json", *shards}
    check(tmp_path / "out", llama(), dict.fromkeys(NAMES, "int4_g32"))
    whole = sum(t.nbytes for t in quantize_all(llama(), "int4_g32"))
    assert index["metadata"]["total_size"] == whole
    # No file is larger than asked, but for its header, or for holding one tensor alone.
    assert all(len(files[shard]) < 6000 + 1500 for shard in shards)


def quantize_all(tensors, fmt):
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        yield from layouts.humming.write(fast.quantize(tensor, fmt)).values() if layer in NAMES else [tensor]


def test_what_is_left_alone_is_said_and_why(tmp_path, call):
    tensors = llama(1) | {
        "model.norm.weight": draw(64),
        "visual.patch_embed.weight": draw(8, 8),
        "visual.conv.weight": draw(8, 3, 4, 4),
        "model.layers.0.mlp.router.weight": draw(4, 64),
        "model.layers.0.ids.weight": torch.zeros(4, 4, dtype=torch.int32),
        "model.layers.0.mlp.experts.gate_up_proj_bias": draw(4, 32),
        "model.layers.0.none.weight": draw(0, 64),
    }
    save(tmp_path / "in", tensors)
    code, out, _ = call("quantize", tmp_path / "in", tmp_path / "out", "--format", "int8", "--ignore", "k_proj", "--ignore", "re:.*down.*")
    left = dict(re.findall(r"^  (.*): (\d+) \(", out, re.M))
    assert code == 0 and left == {
        "heads": "1",
        "embeddings": "2",
        "vectors": "3",
        "norms": "1",
        "routers": "2",
        "--ignore": "2",
        "I32, no floats of 16 or 32 bits": "1",
        "no linear layers by their names and shapes": "2",
        "empty": "1",
    }
    check(tmp_path / "out", tensors, {f"model.layers.0.{name}": "int8" for name in ("self_attn.q_proj", "mlp.up_proj")})
    ignored = layouts.open(tmp_path / "out").config["ignore"]
    layer = "model.layers.0."
    assert ignored == ["lm_head", *(layer + n for n in ("mlp.down_proj", "mlp.gate", "mlp.router", "self_attn.k_proj"))]


def test_a_config_with_ignored_layers_and_overrides(source, tmp_path, call):
    config = {
        "dtype": "int4",
        "group_size": 32,
        "ignore": ["1.self_attn.k"],
        "dynamic": {"+:.*down_proj": {"dtype": "float8e4m3", "group_size": 0}, "-:.*1.mlp.up": {}, "+:.*0.mlp.up": {"dtype": "uint8"}},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert call("quantize", source, tmp_path / "out", "--config", tmp_path / "config.json")[0] == 0
    down = {f"model.layers.{i}.mlp.down_proj": "fp8_e4m3_bf16" for i in range(2)}
    names = (f"model.layers.{name}" for name in ("0.self_attn.q_proj", "1.self_attn.q_proj", "0.self_attn.k_proj"))
    check(tmp_path / "out", llama(), dict.fromkeys(names, "int4_g32_bf16") | down | {"model.layers.0.mlp.up_proj": "int8_g32_bf16"})
    dynamic = layouts.open(tmp_path / "out").config["dynamic"]
    assert list(dynamic) == [r"+:^model\.layers\.[0-9]+\.mlp\.down_proj$", r"+:^model\.layers\.0\.mlp\.up_proj$"]
    code, _, err = call("quantize", source, tmp_path / "other", "--config", json.dumps(config), "--layout", "compressed_tensors")
    assert code == 2 and "only --layout humming holds both" in err


@pytest.mark.parametrize("model_type, transposed", [("gpt_oss", True), ("qwen3_moe", False)])
def test_stacks_of_experts(tmp_path, call, model_type, transposed):
    """GPT-OSS stores (e, k, n), which is quantized along k also where n and k are equal."""
    up, down = ((3, 64, 96), (3, 64, 64)) if transposed else ((3, 96, 64), (3, 64, 64))
    experts = "model.layers.0.mlp.experts."
    tensors = {experts + "gate_up_proj": draw(*up), experts + "down_proj": draw(*down), experts + "gate_up_proj_bias": draw(3, 96)}
    save(tmp_path / "in", tensors, {"model_type": model_type})
    for fmt, layout in (("mxfp4", "mxfp4"), ("mxfp4", "humming"), ("int8", "compressed_tensors")):
        assert call("quantize", tmp_path / "in", tmp_path / layout, "--format", fmt, "--layout", layout)[0] == 0
        check(tmp_path / layout, tensors, {experts + "gate_up_proj": fmt, experts + "down_proj": fmt}, transposed)
    # And quantized anew: from the numbers that the quantized ones stand for.
    code, _, err = call("quantize", tmp_path / "mxfp4", tmp_path / "anew", "--format", "int8")
    assert code == 2 and "is quantized already; --force-requant" in err
    assert call("quantize", tmp_path / "mxfp4", tmp_path / "anew", "--format", "int8", "--force-requant")[0] == 0
    for layer, q in layouts.open(tmp_path / "anew"):
        assert equal(q, fast.quantize(fast.dequantize(layouts.open(tmp_path / "mxfp4")[layer], torch.float32), "int8"))
    code, _, _ = call("quantize", tmp_path / "mxfp4", tmp_path / "left", "--format", "int8", "--force-requant", "--ignore", "down_proj")
    left = layouts.open(tmp_path / "left").tensor(experts + "down_proj")
    w = fast.dequantize(layouts.open(tmp_path / "mxfp4")[experts + "down_proj"], torch.bfloat16)
    assert torch.equal(left, w.transpose(-1, -2) if transposed else w)


def test_the_config_can_force_a_quantized_checkpoint(source, tmp_path, call):
    assert call("quantize", source, tmp_path / "a", "--format", "int8", "--layout", "compressed_tensors")[0] == 0
    config = '{"dtype": "int4", "group_size": 32, "force_requant": true}'
    assert call("quantize", tmp_path / "a", tmp_path / "b", "--config", config)[0] == 0
    first = layouts.open(tmp_path / "a")
    for layer, q in layouts.open(tmp_path / "b"):
        assert equal(q, fast.quantize(fast.dequantize(first[layer], torch.float32), "int4_g32_bf16"))
    assert "compressed" not in (tmp_path / "b" / "config.json").read_text()


def test_one_tensor_at_a_time(source, tmp_path, call, monkeypatch):
    """What has been quantized is gone before the next is read."""
    real, alive = Source.load, []

    def load(self, name):
        gc.collect()
        assert not [n for n, w in alive if w() is not None and n.removesuffix(".weight") in NAMES]
        w = real(self, name)
        alive.append((name, weakref.ref(w)))
        return w

    monkeypatch.setattr(Source, "load", load)
    assert call("quantize", source, tmp_path / "out", "--format", "int4_g32")[0] == 0
    assert {name.removesuffix(".weight") for name, _ in alive} >= NAMES


KILLED = """
import os, signal, sys
from fast.__main__ import main
from fast.commands import output

real, calls = output.save_tensors, []

def save(tensors, path):
    calls.append(path)
    real(tensors, path)
    if len(calls) == 3:  # killed while the third file is half written
        os.truncate(path, os.path.getsize(path) // 2)
        open(os.path.join(os.path.dirname(path), ".tmp12345"), "w").close()
        os.kill(os.getpid(), signal.SIGKILL)

output.save_tensors = save
main(sys.argv[1:])
"""
SIZE = ("--format", "int4_g32", "--shard-size", "6KB")


def test_a_killed_run_goes_on(source, tmp_path, call):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert call("quantize", source, whole, *SIZE)[0] == 0
    done = subprocess.run([sys.executable, "-c", KILLED, "quantize", source, out, *SIZE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    there = sorted(p.name for p in out.iterdir())
    assert [name[:11] for name in there] == ["model-00001", "model-00002", "quantize.js", "quantize.pa"]
    with pytest.raises((OSError, ValueError)):
        layouts.open(out)
    stamps = {name: os.stat(out / name).st_mtime_ns for name in there[:2]}
    assert call("quantize", source, out, *SIZE)[0] == 0
    assert contents(out) == contents(whole)
    assert {name: os.stat(out / name).st_mtime_ns for name in stamps} == stamps


@pytest.mark.parametrize("step", range(7))
def test_interrupted_anywhere(source, tmp_path, call, monkeypatch, step):
    """By an exception in the write of every file in turn: shards, index, others, config.json."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert call("quantize", source, whole, *SIZE, "--shard-size", "20KB")[0] == 0
    files = sum(name != "quantize.json" for name in contents(whole))
    real, calls = os.replace, []

    def replace(a, b):
        calls.append(b)
        if len(calls) == step + 2:
            raise KeyboardInterrupt
        real(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(output.os, "replace", replace)
        code, _, err = call("quantize", source, out, *SIZE, "--shard-size", "20KB")
    if step < files:
        assert code == 130 and err == "python -m fast quantize: interrupted; the same command goes on from here\n"
        assert "quantize.json" in contents(out) and "quantize.parts" not in os.listdir(out)
        assert call("quantize", source, out, *SIZE, "--shard-size", "20KB")[0] == 0
    assert contents(out) == contents(whole)


def test_interrupted_in_a_library(source, tmp_path, call, monkeypatch):
    """Which would take it for an error of its own, as safetensors does: it counts behind the tensor that is read."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert call("quantize", source, whole, *SIZE)[0] == 0
    real, read = Source.load, []

    def load(self, name):
        if read:
            signal.raise_signal(signal.SIGINT)
        read.append(name)
        return real(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Source, "load", load)
        code, _, err = call("quantize", source, out, *SIZE)
    assert code == 130 and err == "python -m fast quantize: interrupted; the same command goes on from here\n" and len(read) == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert call("quantize", source, out, *SIZE)[0] == 0 and contents(out) == contents(whole)


def test_a_full_disk(source, tmp_path, call, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert call("quantize", source, whole, *SIZE)[0] == 0
    real, calls = save_file, []

    def full(tensors, path, **options):
        calls.append(path)
        real(tensors, path, **options)
        if len(calls) == 2:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        code, _, err = call("quantize", source, out, *SIZE)
    assert code == 1
    assert err == f"python -m fast quantize: the disk of {out} is full; with more room, the same command goes on from here\n"
    assert [name[:11] for name in sorted(contents(out))] == ["model-00001", "quantize.js"]
    assert call("quantize", source, out, *SIZE)[0] == 0 and contents(out) == contents(whole)


def test_a_limit_of_the_system(source, tmp_path, call):
    """What safetensors says of the system's errors is understood."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
        with pytest.raises(OSError) as error:
            output.save_tensors({"a": torch.zeros(2**12)}, tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG
    assert output.explain(error.value, "out").endswith("a.safetensors: File too large; the same command goes on from here")


def test_a_weight_that_is_no_number_is_named(source, tmp_path, call):
    tensors = llama()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save(tmp_path / "nan", tensors)
    code, _, err = call("quantize", tmp_path / "nan", tmp_path / "out", "--format", "int4_g32")
    assert code == 1 and err.startswith("python -m fast quantize: model.layers.1.mlp.up_proj.weight: quantize: w holds nan")


def started(source, out, call):
    """A run that was interrupted at its first file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "save_tensors", lambda tensors, path: (_ for _ in ()).throw(KeyboardInterrupt))
        assert call("quantize", source, out, *SIZE)[0] == 130


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--format", "int8", "--shard-size", "6KB"), r"begun with another format: \"int4_g32\", and now it is \"int8\""),
        ((*SIZE, "--ignore", "up_proj"), r"another ignore: \[\], and now it is \[\"up_proj\"\]"),
        ((*SIZE, "--layout", "gptq"), r"another layout: \"humming\", and now it is \"gptq\""),
        (("--format", "int4_g32"), r"another shard_size: 6000, and now it is 4294967296"),
        (("--config", '{"dtype": "int4"}'), r"another format: \"int4_g32\", and now it is null"),
    ],
    ids=str,
)
def test_another_run_does_not_go_on(source, tmp_path, call, argv, message):
    out = tmp_path / "out"
    started(source, out, call)
    before = contents(out)
    code, _, err = call("quantize", source, out, *argv)
    assert code == 2 and re.search(message, err) and contents(out) == before


def test_another_source_does_not_go_on(source, tmp_path, call):
    out = tmp_path / "out"
    started(source, out, call)
    other = save(tmp_path / "other", llama(), files=2)
    code, _, err = call("quantize", other, out, *SIZE)
    assert code == 2 and f'begun with another source: "{source}", and now it is "{other}"' in err
    os.utime(source / "config.json")
    code, _, err = call("quantize", source, out, *SIZE)
    assert code == 2 and 'begun with another source\'s files: {"config.json": [' in err
    (out / "quantize.json").write_text("{")
    code, _, err = call("quantize", source, out, *SIZE)
    assert code == 2 and "is no JSON" in err and "expected the state of an interrupted run" in err


def test_another_process_is_writing(source, tmp_path, call):
    out = tmp_path / "out"
    started(source, out, call)
    real, seen = output.save_tensors, []

    def save(tensors, path):
        if not seen:
            seen.append(None)
            seen.append(call("quantize", source, out, *SIZE))
        real(tensors, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "save_tensors", save)
        assert call("quantize", source, out, *SIZE)[0] == 0
    assert seen[1][0] == 2 and "another run is writing there" in seen[1][2]


def test_a_broken_shard_is_named(source, tmp_path, call):
    out = tmp_path / "out"
    started(source, out, call)
    shard = next(iter(json.loads((out / "quantize.json").read_text())["plan"]))
    (out / shard).write_bytes(b"1234567890")
    code, _, err = call("quantize", source, out, *SIZE)
    assert code == 1 and shard in err and err.endswith("; delete it to have it written anew\n")


def test_folders_that_hold_something_else_are_left_as_they_are(source, tmp_path, call):
    out = tmp_path / "out"
    assert call("quantize", source, out, *SIZE)[0] == 0
    before = contents(out)
    code, _, err = call("quantize", source, out, *SIZE)
    assert code == 2 and "holds config.json and nothing of an interrupted run" in err and contents(out) == before
    (tmp_path / "link").symlink_to(source)
    for folder in (source, tmp_path / "link", source / ".." / "in"):
        code, _, err = call("quantize", source, folder, *SIZE)
        assert code == 2 and "is where the source is" in err
    code, _, err = call("quantize", source, source / "config.json", *SIZE)
    assert code == 2 and "is no directory" in err
    (tmp_path / "empty").mkdir()
    assert call("quantize", source, tmp_path / "empty", *SIZE)[0] == 0
    assert contents(tmp_path / "empty") == before


def remove(folder, name):
    os.remove(folder / name)


def cut(folder, name):
    os.truncate(folder / name, os.path.getsize(folder / name) - 8)


SECOND = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: remove(f, "config.json"), "config.json: there is no such file; expected a Hugging Face checkpoint"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: holds a list, expected a dict"),
        (lambda f: remove(f, SECOND), f"is said to be in '{SECOND}', which is no .safetensors file of this directory"),
        (lambda f: cut(f, SECOND), f"{SECOND}: safetensors: "),
        (lambda f: [remove(f, n) for n in contents(f) if n.startswith("model")] + [(f / "model.bin").touch()], "pickled ones are not"),
        (lambda f: (f / "hf_quant_config.json").write_text("{}"), "is quantized already"),
        (
            lambda f: (f / "config.json").write_text('{"text_config": {"quantization_config": {"quant_method": "gptq"}}}'),
            "quantized already",
        ),
        (lambda f: (f / "config.json").write_text('{"model_type": "gpt2"}'), "stored transposed, which no layout has: 11"),
        (lambda f: [os.remove(p) for p in f.iterdir()] + [f.rmdir()], "there is no such directory"),
    ],
)
def test_sources_that_cannot_be_read(source, tmp_path, call, spoil, message):
    spoil(source)
    code, out, err = call("quantize", source, tmp_path / "out", "--format", "int4_g32")
    assert (code, out) == (2, "") and message in err and err.startswith("python -m fast quantize: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--format", "int4_g32_h128"), "mlp.down_proj: quantize: k=96 is no multiple of the rotation's block 128"),
        (("--format", "int4_g64"), r"mlp.down_proj: --layout humming cannot hold it: humming: .*whole groups.* \(--layout .*can\)"),
        (
            ("--format", "fp8_tensor", "--layout", "modelopt"),
            r"inputs in .* whose scale is stored, too, .* \(--layout .*fp8 or quark.* can\)",
        ),
        (("--format", "nf4_g64"), r"Humming has no schema for \(no layout that can be written does\)"),
        (("--format", "nvfp4", "--layout", "gptq"), r"--layout gptq cannot hold it: gptq: .* \(--layout humming or modelopt.* can\)"),
        (("--config", '{"dtyp": "int4"}'), "unknown key 'dtyp'; the nearest known one is 'dtype'"),
        (("--config", '{"dtype": "int4"'), "no JSON"),
        (("--config", "nowhere.json"), "'nowhere.json' is neither JSON"),
        (
            ("--config", '{"quant_method": "gptq", "bits": 4, "group_size": 128}'),
            r"--config: the config is that of a checkpoint .* \(gptq\), .*expected how to quantize",
        ),
        (("--config", '{"ignore": ["x"]}'), "no tensor is to be quantized: .*the config leaves them alone: 8"),
        (("--format", "int4_g32", "--ignore", "proj"), "no tensor is to be quantized: .*--ignore: 8"),
        (("--format", "int4_g32", "--ignore", ""), "argument --ignore: it is empty, expected a part of a name"),
        (("--format", "int4_g32", "--ignore", "re:("), "is no regular expression"),
        (("--format", "int4_g3x"), "the nearest is 'int4_g32'"),
        (("--format", "int4_g32", "--layout", "gtpq"), "'gtpq' is none of humming.*; the nearest is gptq"),
        (("--format", "int4_g32", "--devise", "cpu"), "there is no option --devise; the nearest is --device"),
        (("-f", "int4_g32"), "there is no option -f; the nearest is --format"),
        (("--format", "int4_g32", "--device", "cuda:99"), "there is no cuda:99"),
        (("--format", "int4_g32", "--device", "tpu"), "'tpu' is no device"),
        (("--format", "int4_g32", "--shard-size", "0"), "'0' is no size, expected one as 500MB or 4GiB"),
        (("--format", "int4_g32", "--shard-size", "0.1"), "'0.1' is no size"),
        ((), "one of the arguments --format --config is required"),
        (("--format", "int8", "--config", "{}"), "not allowed with argument"),
    ],
    ids=str,
)
def test_wrong_arguments(source, tmp_path, call, argv, message):
    code, out, err = call("quantize", source, tmp_path / "out", *argv)
    assert (code, out) == (2, "") and re.search(message, err), err
    assert not (tmp_path / "out").exists()


def test_zero_points_that_do_not_end_with_a_word(tmp_path, call):
    save(tmp_path / "in", {"a.weight": draw(12, 64)})
    code, _, err = call("quantize", tmp_path / "in", tmp_path / "out", "--format", "uint4z_g32")
    assert code == 2 and re.search(r"a: --layout humming .* n=12, .* do not end with a word \(--layout .*compressed_tensors", err)


def test_a_stack_that_is_not_what_the_model_has(tmp_path, call):
    save(tmp_path / "in", {"mlp.experts.gate_up_proj": draw(2, 64, 32), "a.weight": draw(8, 64)})
    code, _, err = call("quantize", tmp_path / "in", tmp_path / "out", "--format", "int8")
    assert (
        code == 2 and "(2, 64, 32), which is no (e, n, k) of a model with hidden_size=64; --ignore gate_up_proj leaves it as it is" in err
    )
    assert call("quantize", tmp_path / "in", tmp_path / "out", "--format", "int8", "--ignore", "gate_up_proj")[0] == 0


@pytest.mark.parametrize("of", [lambda: torch.OutOfMemoryError("CUDA out of memory"), MemoryError, None])
def test_the_machine_has_too_little_memory(source, tmp_path, call, monkeypatch, of):
    def none(w, fmt):
        if of is None:
            return torch.empty(2**60)  # what torch raises on a CPU is a RuntimeError
        raise of()

    monkeypatch.setattr(quantize, "quantize", none)
    code, _, err = call("quantize", source, tmp_path / "out", *SIZE)
    assert code == 1 and err.startswith("python -m fast quantize: there is too little memory: ") and err.count("\n") == 1


def test_other_errors_are_not_hidden(source, tmp_path, call, monkeypatch):
    monkeypatch.setattr(quantize, "quantize", lambda w, fmt: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        call("quantize", source, tmp_path / "out", *SIZE)


@pytest.mark.parametrize("layout, fmt, x", [("modelopt", "nvfp4", None), ("fp8", "fp8", "fp8"), ("modelopt", "mxfp8", "mxfp8")])
def test_inputs_that_a_layout_quantizes_are_said(source, tmp_path, call, layout, fmt, x):
    """Never those whose scale would have to be stored, too."""
    code, out, _ = call("quantize", source, tmp_path / "out", "--format", fmt, "--layout", layout)
    found = re.findall(rf"^--layout {layout} means inputs that are quantized, too: to (.*)$", out, re.M)
    assert code == 0 and found == ([x] if x else [])
    checkpoint = layouts.open(tmp_path / "out")
    assert {input_of(checkpoint.layout, checkpoint.config, layer) for layer in checkpoint.layers} == {(x and parse_format(x), False)}
