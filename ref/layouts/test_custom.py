"""A format in one file: a Format value, a layout of four functions and a writer, one entry in each of two tables; the rest follows."""

import json
import os
import subprocess
import sys
import types

import torch
from safetensors.torch import save_file

import ref
from ref import layouts
from ref.layouts import bits, check, rules

# The format: four values, in groups of 16 under fp16 scales.
CUBES = ref.Format(ref.Codebook("cubes", (-8.0, -1.0, 0.0, 1.0)), scale="fp16", group=(1, 16))


# The layout: X.cubes has four codes a byte, the first in the lowest bits; X.steps has the scales.
def find(names, config):
    return rules.layers(names, ("cubes",), ("steps",))


def options(config, layer):
    check.check_keys(config, ("quant_method", "skip"), "cubes: quantization_config")
    return None if rules.by_glob(layer, rules.strings(config.get("skip"), "cubes: skip")) else {}


def read(parts, options):
    check.need(parts, "cubes", ("cubes", "steps"))
    data = check.part(parts, "cubes", "cubes", (torch.uint8,), (-1, -1))
    n, k = data.shape[0], 4 * data.shape[1]
    scale = check.part(parts, "cubes", "steps", (torch.float16,), CUBES.scale_shape((n, k)), "by cubes")
    return ref.validate(ref.QTensor(CUBES, (n, k), ref.pack(bits.stream(data, 2, k), 2), scale))


def write(q):
    if q.format != CUBES:
        raise ValueError(f"cubes: got {q.format}, expected {CUBES}")
    return {"cubes": bits.join_stream(ref.unpack(q.packed, 2, q.shape[-1]), 2), "steps": q.scale}


def config_of(q):
    return {"quant_method": "cubes"}


LAYOUT = types.SimpleNamespace(__name__="cubes", find=find, options=options, read=read, write=write, config_of=config_of)


def register():
    """The two entries."""
    ref.FORMATS["cubes_g16"] = CUBES
    layouts.LAYOUTS["cubes"] = LAYOUT


def test_a_checkpoint_of_a_made_up_format(tmp_path, monkeypatch):
    monkeypatch.setitem(ref.FORMATS, "cubes_g16", CUBES)
    monkeypatch.setitem(layouts.LAYOUTS, "cubes", LAYOUT)
    w = {f"model.{i}.up": torch.randn(8, 40, generator=torch.Generator().manual_seed(i)) for i in (1, 2, 10)}
    written = {name: ref.quantize(weight, "cubes_g16") for name, weight in w.items()}
    save_file({f"{name}.{part}": t for name, q in written.items() for part, t in write(q).items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config_of(written["model.1.up"])}))
    found = layouts.open(tmp_path)
    assert found.layers == ("model.1.up", "model.2.up", "model.10.up")
    for name, q in found:
        assert str(q.format) == "cubes_g16" and ref.equal(q, written[name])
        codes = ref.unpack(q.packed, 2, 40).long()
        by_hand = torch.tensor([-8.0, -1.0, 0.0, 1.0])[codes] * q.scale.float().repeat_interleave(16, 1)[:, :40]
        assert torch.equal(ref.dequantize(q), by_hand)


def test_the_suite_picks_the_format_up():
    """In a fresh process, as the suite lists its formats when it is imported: the format is among them, and its cells pass."""
    script = """
from ref.layouts.test_custom import register
register()
from conformance import formats, __main__ as suite
assert "cubes_g16" in formats.MAIN
arguments = "--candidate fast --impl torch --device cpu --jobs 0 --examples 5 --formats cubes_g16 --ops linear,linear_x,dequantize"
raise SystemExit(suite.main(arguments.split()))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = [line.split() for line in done.stdout.splitlines() if "cubes_g16" in line]
    assert {cell[0] for cell in cells} == {"linear", "linear_x", "dequantize"} and all("pass" in cell for cell in cells), done.stdout
