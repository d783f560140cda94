"""Broken checkpoints: whatever is done to the files, only ValueError, NotImplementedError and OSError come out of opening and reading.

Each layout's own checkpoints are mutated where it hurts: tensors dropped, renamed, reshaped, retyped and filled, config values
replaced by other JSON, headers and indexes edited, bytes flipped, files cut. The same cases on every run; FUZZ_EXAMPLES asks for more.
"""

import copy
import functools
import json
import os
import pathlib
import random
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from .. import layouts
from ..qtensor import QTensor, validate
from . import checkpoint as opener
from .test_roundtrip import CASES, GOLDEN, MODULES, golden, write

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
DOCUMENTED = (ValueError, NotImplementedError, OSError)
# What JSON can hold where something else belongs; numbers that are legal elsewhere; patterns.
VALUES = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        4,
        5,
        8,
        16,
        31,
        32,
        64,
        128,
        2**31,
        2**62,
        2**70,
        -(2**63),
        0.5,
        4.0,
        1e308,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        "4",
        "auto",
        "int",
        "float",
        "fp8",
        "e4m3",
        "group",
        "channel",
        "tensor",
        "block",
        "gemv",
        "gptq_v2",
        "re:(",
        "re:.*",
        "*",
        "[",
        "up_proj",
    ),
    *(
        [],
        [None],
        [[]],
        [1],
        ["re:("],
        ["*"],
        ["re:.*up_proj"],
        {},
        {"a": 1},
        {"": None},
        {"+:(": {}},
        {".*": {"bits": 3}},
        {"-:.*": 1},
        {".*": []},
    ),
]
SUFFIXES = (
    "weight",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight_scale",
    "weight_packed",
    "weight_shape",
    "weight_zero_point",
    "bias",
    "blocks",
)
DTYPES = [
    *(
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bool,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
]


@pytest.fixture(autouse=True, scope="module")
def memory_is_bounded():
    """An allocation by a number in a file fails at once, as it would on a smaller machine."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 3 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def cases(name):
    """What can be broken: a checkpoint of each format, and each golden one."""
    return [fmt for layout, fmt in CASES if layout == name] + (["golden"] if name == "gguf" else list(golden(name)))


@functools.cache
def files(name, case):
    """({tensor name: tensor}, config.json, the header's metadata) of a checkpoint; of a GGUF file, its bytes."""
    if name == "gguf" and case == "golden":
        return (GOLDEN / "gguf.gguf").read_bytes()
    if (name, case) not in CASES:
        tensors, config, metadata = golden(name)[case]
        return tensors, {"quantization_config": config}, metadata
    with tempfile.TemporaryDirectory() as folder:
        path, _ = write(pathlib.Path(folder), name, case)
        if path.suffix == ".gguf":
            return path.read_bytes()
        return load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text()), None


def read_all(path):
    """Open, and read every layer; a layer that is refused does not keep the others from being read."""
    try:
        found = layouts.open(path)
    except DOCUMENTED as error:
        return complain(error)
    for layer in found.layers:
        try:
            q = found[layer]
        except DOCUMENTED as error:
            complain(error)
        else:
            assert isinstance(q, QTensor)
            validate(q)
    for name in found.plain:
        try:
            found.tensor(name)
        except DOCUMENTED as error:
            complain(error)


def complain(error):
    assert type(error).__name__ != "UnicodeDecodeError" and str(error), repr(error)


def changed_tensor(chance, tensor):
    """A tensor of another shape, dtype or content."""
    kind = chance.choice(("shape", "dtype", "bytes", "fill"))
    if kind == "shape":
        rows = tensor[:-1] if tensor.dim() and len(tensor) else tensor[None]
        flat = tensor.flatten()
        scalar = flat[:1].reshape(()) if len(flat) else flat
        shapes = (tensor.mT if tensor.dim() > 1 else tensor[None], flat, tensor[None], tensor[..., None], rows, torch.cat((rows, rows)))
        shapes = (*shapes, flat[:0], scalar, rows[..., :0], rows[..., :-1])
        return chance.choice(shapes).clone(memory_format=torch.contiguous_format)
    if kind == "dtype":
        dtype = chance.choice(DTYPES)
        whole = tensor.dim() and tensor.numel() and tensor.shape[-1] * tensor.element_size() % dtype.itemsize == 0
        return tensor.view(dtype) if whole and chance.random() < 0.5 and tensor.dtype != torch.bool != dtype else tensor.float().to(dtype)
    data = tensor.contiguous().flatten().view(torch.uint8).clone()
    if not data.numel():
        return tensor
    if kind == "bytes":
        for _ in range(chance.choice((1, 1, 4))):
            data[chance.randrange(data.numel())] = chance.randrange(256)
    elif chance.random() < 0.5:
        data.fill_(chance.choice((0, 1, 0x7F, 0x80, 0xFF)))
    else:
        data = torch.frombuffer(bytearray(chance.randbytes(data.numel())), dtype=torch.uint8)
    return data.view(tensor.dtype).view(tensor.shape)


def change_tensors(chance, tensors):
    name = chance.choice(sorted(tensors))
    kind = chance.choice(("drop", "rename", "copy", "change", "change", "change"))
    if kind == "change":
        tensors[name] = changed_tensor(chance, tensors[name])
        return
    tensor = tensors[name] if kind == "copy" else tensors.pop(name)
    if kind != "drop":
        layer = name.rpartition(".")[0]
        other = chance.choice(sorted(tensors)) if tensors else name
        tensors[chance.choice((f"{layer}.{chance.choice(SUFFIXES)}", chance.choice(SUFFIXES), name + "_", "." + name, "", other))] = tensor


def change_json(chance, document):
    """Replace, remove or add a value somewhere in a dict."""
    places = []

    def walk(node):
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            places.append((node, key))
            if isinstance(value, (dict, list)):
                walk(value)

    walk(document)
    if not places or chance.random() < 0.1:
        document[chance.choice(("quant_method", "bits", "colour", "", "group_size", "ignore"))] = copy.deepcopy(chance.choice(VALUES))
        return
    node, key = chance.choice(places)
    if chance.random() < 0.2:
        del node[key]
    else:
        node[key] = copy.deepcopy(chance.choice(VALUES))


def change_header(chance, data):
    """Edit the JSON of a safetensors file's header, and perhaps its length."""
    length = int.from_bytes(data[:8], "little")
    document = json.loads(data[8 : 8 + length])
    change_json(chance, document)
    header = json.dumps(document).encode()
    stated = len(header) if chance.random() < 0.9 else chance.choice((0, 1, len(header) - 1, len(header) + 1, 2**31, 2**63))
    return stated.to_bytes(8, "little") + header + data[8 + length :]


def change_bytes(chance, data):
    """Flip, cut or lengthen, most often in the first kilobytes."""
    kind = chance.choice(("flip", "flip", "flip", "cut", "more"))
    place = chance.randrange(min(len(data), chance.choice((64, 4096, len(data)))))
    if kind == "cut":
        return data[:place]
    if kind == "more":
        return data + chance.randbytes(9)
    return (
        data[:place]
        + chance.choice((b"\0", b"\xff", b"\x7f", b'"', b"{", b"9", chance.randbytes(1), chance.randbytes(8)))
        + data[place + 1 :]
    )


def break_directory(chance, folder, tensors, document, metadata):
    """Write a checkpoint with one to three things wrong."""
    tensors, document = dict(tensors), copy.deepcopy(document)
    where = chance.choices(("tensors", "config", "header", "bytes", "index"), (5, 5, 1, 1, 1), k=chance.choice((1, 1, 2, 3)))
    for _ in range(where.count("tensors")):
        if tensors:
            change_tensors(chance, tensors)
    for _ in range(where.count("config")):
        config = document.get("quantization_config")
        change_json(chance, config if isinstance(config, dict) and config and chance.random() < 0.9 else document)
    shards = {"model.safetensors": tensors}
    if "index" in where:
        shards = {f"model-0000{i + 1}-of-00002.safetensors": {n: tensors[n] for n in sorted(tensors)[i::2]} for i in range(2)}
        index = {"weight_map": {name: file for file, shard in shards.items() for name in shard}}
        if chance.random() < 0.9:
            change_json(chance, index)
        (folder / opener.INDEX).write_text(json.dumps(index))
    for file, shard in shards.items():
        save_file({name: t.contiguous().clone() for name, t in shard.items()}, folder / file, metadata)
        for kind, change in (("header", change_header), ("bytes", change_bytes)):
            if kind in where:
                (folder / file).write_bytes(change(chance, (folder / file).read_bytes()))
    text = json.dumps(document).encode()
    (folder / "config.json").write_bytes(change_bytes(chance, text) if chance.random() < 0.02 else text)


@pytest.mark.parametrize("name", MODULES)
def test_only_documented_errors_come_out(name):
    @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(cases(name)), st.integers(0, 2**32))
    def run(case, seed):
        chance = random.Random(f"{SEED} {seed}")
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            if name == "gguf":
                (folder / "model.gguf").write_bytes(change_bytes(chance, files(name, case)))
                read_all(folder / "model.gguf")
            else:
                break_directory(chance, folder, *files(name, case))
                read_all(folder)

    run()
