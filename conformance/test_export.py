"""An export is enough to compute every answer by, without this project's decoders; wrong outputs are told in clear sentences."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from . import export


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "cases"
    formats = "int4_g128,uint4z_g64,fp8_e4m3_b128x128,nvfp4"
    assert export.main(["export", str(directory), "--formats", formats, "--examples", "6"]) == 0
    return directory


class Reader:
    """Numpy only, by what README.md in the export says."""

    def __init__(self, directory, case, index):
        self.case, self.settings, self.formats = case, case["settings"], index["formats"]
        path = directory / "inputs" / f"{case['name']}.safetensors"
        torch_only = load_torch(path)  # numpy has no bfloat16
        self.inputs = {name: t.double().numpy() if t.is_floating_point() else t.numpy() for name, t in torch_only.items()}

    def codes(self, packed, bits, k):
        unpacked = np.unpackbits(np.ascontiguousarray(packed).view(np.uint8), axis=-1, bitorder="little")
        fields = unpacked[..., : k * bits].reshape(*packed.shape[:-1], k, bits).astype(np.int64)
        return (fields << np.arange(bits)).sum(-1)

    def weight(self, k):
        fmt, part = self.formats[self.settings["format"]], self.inputs.get
        values = np.array([float(v) for v in fmt["values"]])[self.codes(part("w.packed"), fmt["bits"], k)]
        n, (gn, gk) = values.shape[-2], fmt["group"]
        rows = np.arange(n) // (gn or n)
        columns = np.arange(k) // (gk or k)

        def spread(t):
            if part("w.group_index") is None:
                return t[..., rows, :][..., columns]
            index = np.broadcast_to(part("w.group_index")[..., None, :], values.shape)
            return np.take_along_axis(t[..., rows, :], index, -1)

        scale = part("w.scale")
        if fmt["scale_values"] is not None:
            scale = np.array([float(v) for v in fmt["scale_values"]])[scale]
        if fmt["zero"] is not None:
            values = values - spread(part("w.zero").astype(float))
        values = values * spread(scale)
        if fmt["scale_2"] is not None:
            values = values * part("w.scale_2")
        return values

    def answer(self):
        op, part = self.case["op"], self.inputs.get
        if op == "pack":
            bits, codes = self.settings["bits"], part("codes").astype(np.int64)
            k = codes.shape[-1]
            flat = (codes[..., None] >> np.arange(bits) & 1).astype(np.uint8).reshape(*codes.shape[:-1], k * bits)
            flat = np.pad(flat, [(0, 0)] * (codes.ndim - 1) + [(0, -k * bits % 32)])
            return np.packbits(flat, axis=-1, bitorder="little").view(np.int32)
        if op == "unpack":
            return self.codes(part("packed"), self.settings["bits"], self.settings["k"]).astype(np.uint8)
        if op == "dequantize":
            return self.weight(self.settings["k"])
        assert op == "linear"
        x = part("x")
        return x @ self.weight(x.shape[1]).T + (0 if part("bias") is None else part("bias"))


def answer(directory, outputs):
    """Write the answers of a reader that shares no code with the suite; returns the index."""
    index = json.loads((directory / "index.json").read_text())
    outputs.mkdir()
    for case in index["cases"]:
        path = outputs / f"{case['name']}.safetensors"
        if case["op"] == "linear_x":  # quantizing x has decisions of its own: the middle of what is admissible
            expected = load_torch(directory / "expected" / f"{case['name']}.safetensors")
            y = expected["exact.0"]
        else:
            y = torch.from_numpy(np.ascontiguousarray(Reader(directory, case, index).answer()))
        save_torch({"y": y.to(getattr(torch, case["output"]["dtype"]))}, path)
    return index


@pytest.fixture(scope="module")
def answered(exported, tmp_path_factory):
    outputs = tmp_path_factory.mktemp("outputs") / "y"
    return answer(exported, outputs), outputs


def test_a_plain_reader_agrees_in_every_case(exported, answered, capsys):
    index, outputs = answered
    assert export.main(["verify", str(exported), str(outputs)]) == 0
    assert capsys.readouterr().out == f"{len(index['cases'])} agree, 0 fail\n"
    counts = {op: sum(case["op"] == op for case in index["cases"]) for op in export.SOURCES}
    assert counts["linear"] == counts["linear_x"] == 24 and min(counts.values()) >= 12, counts
    assert set(index["formats"]) >= {"int4_g128", "uint4z_g64", "nvfp4"}


def test_the_same_bytes_twice(exported, tmp_path):
    for directory in ("a", "b"):
        args = ["export", str(tmp_path / directory), "--ops", "linear,pack,dequantize", "--formats", "int4_g128", "--examples", "3"]
        assert export.main(args) == 0
    files = [sorted(p.relative_to(tmp_path / d) for p in (tmp_path / d).rglob("*") if p.is_file()) for d in ("a", "b")]
    assert files[0] == files[1] and len(files[0]) == 2 * 9 + 2
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files[0])
    args = ["export", str(tmp_path / "c"), "--ops", "linear", "--formats", "int4_g128", "--examples", "3", "--seed", "1"]
    assert export.main(args) == 0
    assert (tmp_path / "c" / "index.json").read_text() != (tmp_path / "a" / "index.json").read_text()


def test_every_element_is_held_to_its_interval(exported, answered, tmp_path, capsys):
    """One element a single step outside of its interval is told, with where it is."""
    index, outputs = answered
    told = 0
    for case in index["cases"]:
        name = f"{case['name']}.safetensors"
        y = load_torch(outputs / name)["y"]
        if not y.numel():
            continue
        at = tuple(int(s * 0.7) for s in y.shape)
        expected = load_torch(exported / "expected" / name)
        if case["variants"] is None:
            y[at] += 1
        else:
            high = torch.stack([expected[f"high.{i}"][at] for i in range(len(case["variants"]))]).max()
            if not high.isfinite():
                continue
            y[at] = torch.nextafter(high, torch.tensor(math.inf, dtype=y.dtype))
        save_torch({"y": y}, tmp_path / name)
        told += 1
        text = export._judge(case, exported, tmp_path)
        assert text.startswith(f"y{list(at)} = ") and "admissible" in text and f"(1 of {y.numel()} elements" in text, text
    assert told > 60
    bits = next(case["name"] for case in index["cases"] if case["op"] == "pack" and math.prod(case["output"]["shape"]))
    assert f"FAIL {bits}\n  y[" in (export.main(["verify", str(exported), str(tmp_path)]), capsys.readouterr().out)[1]


def test_damaged_outputs_are_told_in_sentences(exported, answered, tmp_path, capsys):
    index, outputs = answered
    copy = tmp_path / "y"
    copy.mkdir()
    for path in outputs.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    names = [case["name"] for case in index["cases"] if math.prod(case["output"]["shape"]) > 1 and case["op"] == "linear"]
    y = {name: load_torch(copy / f"{name}.safetensors")["y"] for name in names[:7]}
    paths = [copy / f"{name}.safetensors" for name in names]
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:-3])
    paths[2].write_bytes(b"")
    save_torch({"y": y[names[3]].double()}, paths[3])
    save_torch({"y": y[names[4]].T.contiguous()[None]}, paths[4])
    save_torch({"z": y[names[5]]}, paths[5])
    save_torch({"y": torch.full_like(y[names[6]], math.nan)}, paths[6])
    (copy / "stranger.safetensors").write_bytes(b"")
    assert export.main(["verify", str(exported), str(copy)]) == 1
    out = capsys.readouterr().out
    for name, text in zip(
        names,
        (
            f"there is no file {names[0]}.safetensors",
            f"{names[1]}.safetensors is no whole safetensors file: ",
            f"{names[2]}.safetensors is no whole safetensors file: ",
            f"y is float64 {list(y[names[3]].shape)}, expected ",
            f"y is {export._name(y[names[4]].dtype)} [1, ",
            f"{names[5]}.safetensors holds z, expected one tensor y",
            "= nan, admissible ",
        ),
        strict=False,
    ):
        assert text in out.partition(f"FAIL {name}\n")[2].partition("FAIL")[0]
    assert "FAIL stranger.safetensors\n  no case has this name" in out and out.endswith(f"{len(index['cases']) - 7} agree, 8 fail\n")


USAGE = {
    "holds no export": ["verify", "{tmp}", "{tmp}"],
    "there is no folder": ["verify", "{exported}", "{tmp}/none"],
    "exists and is no empty folder": ["export", "{exported}"],
    "'fused_topk' cannot be exported (judged conditional": ["export", "{tmp}/x", "--ops", "fused_topk"],
    "'nothing' cannot be exported (there is no such operation)": ["export", "{tmp}/x", "--ops", "nothing"],
    "int4_g": ["export", "{tmp}/x", "--formats", "int4_gg"],
    "--examples is 0": ["export", "{tmp}/x", "--examples", "0"],
    "required": ["export"],
}


@pytest.mark.parametrize("text", USAGE)
def test_usage_errors(text, exported, tmp_path, capsys):
    assert export.main([arg.format(tmp=tmp_path, exported=exported) for arg in USAGE[text]]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_other_schemas_and_damaged_exports(tmp_path, capsys):
    assert export.main(["export", str(tmp_path / "e"), "--ops", "pack", "--formats", "int4", "--examples", "1"]) == 0
    index = json.loads((tmp_path / "e" / "index.json").read_text())
    answer(tmp_path / "e", tmp_path / "y")
    name = index["cases"][0]["name"]
    (tmp_path / "e" / "expected" / f"{name}.safetensors").write_bytes(b"123")
    assert export.main(["verify", str(tmp_path / "e"), str(tmp_path / "y")]) == 2
    (tmp_path / "e" / "index.json").write_text(json.dumps(index | {"schema": 99}))
    assert export.main(["verify", str(tmp_path / "e"), str(tmp_path / "y")]) == 2
    assert "is damaged" in (err := capsys.readouterr().err) and "has schema 99, expected 1" in err


def test_a_gpus_intervals_are_wider(tmp_path):
    for device in export.BOUNDS:
        args = ["export", str(tmp_path / device), "--ops", "linear", "--formats", "int4_g128", "--examples", "20", "--device", device]
        assert export.main(args) == 0
    wider = 0
    for path in (tmp_path / "cpu" / "expected").iterdir():
        cpu, cuda = load_torch(path), load_torch(tmp_path / "cuda" / "expected" / path.name)
        assert torch.equal(cpu["exact.0"], cuda["exact.0"])
        wider += bool((cuda["high.0"] - cuda["low.0"] > cpu["high.0"] - cpu["low.0"]).any())
    assert wider
